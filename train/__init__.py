"""Training scripts and the few modules they share."""
