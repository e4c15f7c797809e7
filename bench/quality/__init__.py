"""What models learn: against baselines, and after a conversion."""
