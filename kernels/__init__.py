"""Triton kernels of the Kronecker recurrence and their launchers; imported as `kru_triton.kernels`.

`why_not` says what the kernels can run, `geometry` how states lie in a tile, `options` with which
constants they are compiled; `tile` and `activation` hold what the kernels share, `launch` what
their launchers do. `scan` runs the recurrence and its adjoint, `wide`
the same for factors too large for one program, `weight_grad` contracts the gradients of the two
factors over time, and `lstm` runs the gated recurrence.
"""
