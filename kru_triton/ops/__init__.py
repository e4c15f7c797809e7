"""The differentiable operations: scan, LSTM scan, linear scan; checks and dispatch."""
