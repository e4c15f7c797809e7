"""The synthetic and classic tasks, and the loop that only they share."""
