"""The five nonlinearities, their names, and the numbers that keep them finite at z = 0."""

import torch

NONLINEARITIES = ("modrelu", "modtanh", "tanh", "relu", "identity")
PHASE_NONLINEARITIES = ("modrelu", "modtanh")  # act on |z| and keep the phase z / |z|


def tiny(dtype: torch.dtype) -> float:
    """The number added to |z|² before a reciprocal square root: z = 0 then gives 0, never NaN."""
    return 1e-280 if dtype == torch.float64 else 1e-30


def check_nonlinearity(name: str) -> str:
    """Return `name`, or raise a ValueError that lists the valid ones."""
    if name not in NONLINEARITIES:
        raise ValueError(
            f"nonlinearity: must be one of {', '.join(map(repr, NONLINEARITIES))}, got {name!r}"
        )
    return name
