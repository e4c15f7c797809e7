"""Unitary factors: Haar initialisation and the soft penalty that keeps factors near it.

W = W_0 ⊗ … ⊗ W_{F-1} is unitary when every factor is, so both act on the small factors alone.

Dimensions: parts = 2 ([real, imag]) or 1 (real field), H heads, factors of P rows and Q columns,
n matrices of one shape taken together.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from kru_triton.kronecker import check_factors

__all__ = ["gram_residual", "named_factors", "unitarity_penalty", "unitary_"]


@torch.no_grad()
def unitary_(tensor: Tensor, spread: float = 1.0) -> Tensor:
    """Fill `tensor` in place with Haar-distributed unitary (real: orthogonal) matrices.

    Z = QR for a Gaussian Z, then Q diag(R_jj / |R_jj|) (Mezzadri, Notices of the AMS 54, 2007).
    Rectangular matrices are semi-unitary: orthonormal columns for P > Q, rows for P < Q. The draw
    comes from torch's global generator in double precision, so that it depends on the seed and
    the shape, not on the dtype.

    Args:
        tensor: planar `(parts, H, P, Q)`, or complex or real `(P, Q)` or `(H, P, Q)`.
        spread: below 1, square matrices exp(spread A) instead, with A skew-Hermitian and Gaussian,
            of such a size that its eigenvalues fill (-πi, πi) (Wigner's semicircle): those of
            exp(spread A) have angles up to about spread π. 0: the identity, an integrator.

    Returns:
        `tensor`.

    Raises:
        TypeError: `tensor` is not a floating-point or complex tensor.
        ValueError: `tensor` has none of these shapes, or is not square where `spread` is below 1,
            or `spread` is not in [0, 1].

    Example:
        >>> import torch
        >>> w = unitary_(torch.empty(2, 3, 8, 8))
        >>> torch.allclose(unitarity_penalty([w]), torch.zeros(()), atol=1e-6)
        True
    """
    check_factors([tensor])
    complex_field = tensor.is_complex() or (tensor.ndim == 4 and tensor.shape[0] == 2)
    dtype = torch.complex128 if complex_field else torch.float64
    P, Q = tensor.shape[-2:]
    if not 0 <= spread <= 1:
        raise ValueError(f"spread: must be in [0, 1], got {spread}")
    if spread < 1 and P != Q:
        raise ValueError(f"spread: below 1 is for square matrices, got {spread} for {P} x {Q}")
    batch = tensor.shape[1:-2] if tensor.ndim == 4 else tensor.shape[:-2]
    w = torch.randn(*batch, max(P, Q), min(P, Q), dtype=dtype, device=tensor.device)
    if spread < 1:
        # The entries of w - wᴴ have variance 2, so its eigenvalues fill ±2i sqrt(2 P)
        w = torch.matrix_exp((w - w.mH) * (spread * math.pi / math.sqrt(8 * P)))
    else:
        w, R = torch.linalg.qr(w)
        w = w * R.diagonal(dim1=-2, dim2=-1).sgn()[..., None, :]
        w = w.mT if P < Q else w
    if tensor.ndim == 4:
        w = torch.stack([w.real, w.imag]) if complex_field else w[None]
    if hasattr(tensor, "full_tensor"):  # a DTensor: shards of what the first rank has drawn
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(tensor, DTensor)
        w = distribute_tensor(w.to(tensor.dtype), tensor.device_mesh, tensor.placements)
    return tensor.copy_(w)


def unitarity_penalty(module_or_factors: nn.Module | Iterable) -> Tensor:
    """The soft unitary penalty Σ_f ‖W_fᴴ W_f − I‖²_F of Jose et al. (ICML 2018), as a sum.

    The sum runs over factors, heads, layers and directions; a module contributes the factors of
    every submodule that has a method `recurrent_factors()`, each submodule once. A factor with
    P < Q is measured by ‖W Wᴴ − I‖²_F, the smaller Gram matrix, so that the penalty of a
    semi-unitary factor is 0. Real arithmetic throughout, and never under autocast.

    Sharded factors (DTensors, as `fully_shard` makes them) are gathered, so every process has to
    call this; each gets the gradient of its own shard. Factors that accelerate keeps elsewhere are
    brought in.

    Args:
        module_or_factors: a module, or a list of planar factors `(parts, H, P_f, Q_f)`; the list
            may be nested, as `recurrent_factors()` returns it.

    Returns:
        0-dimensional tensor of the factors' dtype (float32 for half-precision factors); zero where
        there is no factor.

    Raises:
        TypeError: a factor that is not a floating-point tensor, or not in a list.
        ValueError: a factor that is not planar.
        RuntimeError: the memory of a factor is freed (FSDP1, outside of forward).

    Example:
        >>> import torch
        >>> unitarity_penalty([2 * torch.eye(3).view(1, 1, 3, 3)])
        tensor(27.)
    """
    groups: dict[tuple, list[Tensor]] = {}
    for _, w in named_factors(module_or_factors):
        w = w.mT if w.shape[-2] < w.shape[-1] else w  # same singular values
        key = (w.shape[0], *w.shape[2:], w.dtype, w.device)
        groups.setdefault(key, []).append(w)
    if not groups:
        return torch.zeros(())
    sums = [gram_residual(torch.cat(same, dim=1)).square().sum() for same in groups.values()]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum()


def gram_residual(w: Tensor) -> Tensor:
    """The smaller Gram matrix of each factor minus I, real part above imaginary part.

    For P >= Q, WᴴW = (AᵀA + BᵀB) + i (AᵀB − BᵀA) with W = A + iB. For P < Q it is taken of Wᵀ,
    which gives the conjugate of W Wᴴ and the same norm.

    Args:
        w: planar `(parts, n, P, Q)`.

    Returns:
        `(n, parts·K, K)` with K = min(P, Q); at least float32.

    Example:
        >>> import torch
        >>> gram_residual(torch.ones(1, 1, 3, 1))
        tensor([[[2.]]])
    """
    w = w.float() if w.dtype in (torch.float16, torch.bfloat16) else w
    w = w.mT if w.shape[-2] < w.shape[-1] else w
    # the meta device has no autocast
    with torch.autocast("cpu" if w.is_meta else w.device.type, enabled=False):
        if w.shape[0] == 1:
            left = right = w[0]
        else:
            re, im = w.unbind()
            right = torch.cat([re, im], -2)  # (n, 2P, Q)
            left = torch.cat([right, torch.cat([-im, re], -2)], -1)  # (n, 2P, 2Q)
        gram = left.mT @ right
    return gram - torch.eye(*gram.shape[1:], dtype=w.dtype, device=w.device)


def named_factors(module_or_factors: nn.Module | Iterable) -> Iterator[tuple[str, Tensor]]:
    """Every planar factor with a unique name.

    Args:
        module_or_factors: as `unitarity_penalty`.

    Returns:
        Iterator of (name, factor). A factor that is a parameter of the module has the parameter's
        name, any other `MODULE.recurrent_factors[i][f]`; in a list, `factors[f]` or
        `factors[i][f]`.

    Raises:
        TypeError, ValueError: as `unitarity_penalty`.

    Example:
        >>> import torch
        >>> [name for name, _ in named_factors([torch.ones(2, 1, 2, 2), torch.ones(2, 1, 3, 3)])]
        ['factors[0]', 'factors[1]']
    """
    if not isinstance(module_or_factors, nn.Module):
        for name, w in _walk(module_or_factors, "factors"):
            yield name, _whole(w)
        return
    for path, module in module_or_factors.named_modules():
        # Asked of the type: torch.compile's wrapper forwards attributes, and counted twice if not.
        if hasattr(type(module), "recurrent_factors"):
            prefix = f"{path}.recurrent_factors" if path else "recurrent_factors"
            with _weights_in_place(module):
                names = {id(p): name for name, p in module.named_parameters(path)}
                factors = list(_walk(module.recurrent_factors(), prefix))
            flat = all(name.endswith("_flat_param") for name in names.values())
            if flat and any(w.untyped_storage().nbytes() == 0 for _, w in factors):
                raise RuntimeError(
                    f"{prefix}: FullyShardedDataParallel has freed the factors until the next "
                    "forward; ask inside FullyShardedDataParallel.summon_full_params(model)"
                )
            for name, w in factors:
                yield names.get(id(w), name), _whole(w)


@contextlib.contextmanager
def _weights_in_place(module: nn.Module):
    """Inside, the weights are there that accelerate's hook brings in for a call of `module`."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def _whole(w: Tensor) -> Tensor:
    """All of a factor of which this process may hold a shard alone: a DTensor is gathered."""
    return w.full_tensor() if hasattr(w, "full_tensor") else w


def _walk(factors: Iterable, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(factors, Tensor | str) or not isinstance(factors, Iterable):
        raise TypeError(f"{name}: expected a list of factors, got {type(factors).__name__}")
    for i, item in enumerate(factors):
        if isinstance(item, Tensor):
            check_factors([item])
            if item.ndim != 4:
                raise ValueError(
                    f"{name}[{i}]: expected a planar factor (parts, heads, P, Q), got "
                    f"{item.dtype} of shape {tuple(item.shape)}; convert a complex (heads, P, Q) w "
                    "with torch.stack([w.real, w.imag]), a real one with w[None]"
                )
            yield f"{name}[{i}]", item
        else:
            yield from _walk(item, f"{name}[{i}]")
