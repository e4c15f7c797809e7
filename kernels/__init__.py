"""Triton kernels of the Kronecker recurrence and their launchers; imported as `kru_triton.kernels`.

`support` says what the kernels can run, `tile` holds what they share, `scan` runs the recurrence
and its adjoint, `weight_grad` contracts the gradients of the two factors over time, and `lstm` runs
the gated recurrence.
"""
