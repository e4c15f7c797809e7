"""The five nonlinearities, their names, and the numbers that keep them finite at z = 0."""

from typing import Literal, get_args

import torch

Nonlinearity = Literal["modrelu", "modtanh", "tanh", "relu", "identity"]
NONLINEARITIES: tuple[str, ...] = get_args(Nonlinearity)
PHASE_NONLINEARITIES = ("modrelu", "modtanh")  # act on |z| and keep the phase z / |z|


def tiny(dtype: torch.dtype) -> float:
    """The number added to |z|² before a reciprocal square root: z = 0 then gives 0, never NaN."""
    return 1e-280 if dtype == torch.float64 else 1e-30
