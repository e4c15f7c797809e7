"""Triton kernels of the Kronecker recurrence and their launchers; imported as `kru_triton.kernels`.

`support` says what the kernels can run and with which constants, `tile` and `activation` hold what
they share and `launch` what their launchers do. `scan` runs the recurrence and its adjoint, `wide`
the same for factors too large for one program, `weight_grad` contracts the gradients of the two
factors over time, and `lstm` runs the gated recurrence.
"""
