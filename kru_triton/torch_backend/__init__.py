"""The operations in plain PyTorch: forward, and a hand-written adjoint."""
