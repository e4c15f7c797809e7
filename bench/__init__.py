"""Benchmarks; `python -m bench --list` says which there are."""
