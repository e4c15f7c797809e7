"""Documents to tokens to batches."""
