"""What compiled code says without running: counts of instructions, predicted times."""
