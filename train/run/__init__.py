"""What every run has: settings, directory, checkpoints, metrics, processes and how it ends."""
