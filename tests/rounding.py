"""Products as the kernels take them in bfloat16: the reference for all that they compute with them.

A definition that does not round is a poor one there. Near |z| = 0 modReLU bends like 1/|z|, and a
state that rounding moves past the jump of a derivative counts in full: gradients differ by 3e-2 to
1.5e-1 from those of the plain definition, and by less than 1e-2 from those of this one.
"""

import torch


def rounded(z: torch.Tensor) -> torch.Tensor:
    """Real or complex z rounded to bfloat16, as a straight line to autograd."""
    planes = torch.view_as_real(z) if z.is_complex() else z
    planes = planes + (planes.bfloat16().to(planes.dtype) - planes).detach()
    return torch.view_as_complex(planes.contiguous()) if z.is_complex() else planes


def pair(z: torch.Tensor) -> torch.Tensor:
    """z as hi + lo, both rounded to bfloat16."""
    return rounded(z) + rounded(z - rounded(z))


def kron(a, b, x, narrow: bool, a_first: bool = False, pairs: bool = False) -> torch.Tensor:
    """A X Bᵀ for factors (H, P, P), (H, Q, Q) and states (B, H, P, Q).

    narrow: every operand of the two products is rounded to bfloat16, what lies between them too.
    pairs: but the factors are pairs of bfloat16.
    a_first: A X is the first of them (as in the kernels of `wide` where Q > P), not X Bᵀ.
    """
    operand = rounded if narrow else lambda z: z
    factor = pair if pairs else operand
    a, b, x = factor(a), factor(b), operand(x)
    if a_first:
        return operand(a @ x) @ b.mT
    return a @ operand(x @ b.mT)
