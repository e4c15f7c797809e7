"""Is the recurrence stable? Unitarity error, spectrum, singular values, gradient norm against lag.

The eigenvalues and the singular values of a Kronecker product are the products of its factors'
(Van Loan, J. Comput. Appl. Math. 123, 2000), so both are exact and cheap. Each diagnostic has a
figure beside it, a `matplotlib.figure.Figure` outside pyplot's global state; matplotlib is
imported only there.

Dimensions: B batch, T time steps, D input features, H heads, N units per head, F real features of
a state (parts·H·N).
"""

import math
from collections.abc import Iterable, Sequence
from functools import reduce
from itertools import pairwise

import torch
from torch import Tensor, nn

from kru_triton.kronecker import check_factors, kron_dense, product_shape, square_cuts
from kru_triton.layers.kru import KRU
from kru_triton.layers.lstm import KRULSTM
from kru_triton.reference import kru_lstm_scan_reference, kru_scan_reference
from kru_triton.unitarity import gram_residual, named_factors

__all__ = [
    "gradient_norm_by_lag",
    "gradient_norm_figure",
    "singular_value_figure",
    "singular_values",
    "spectrum",
    "spectrum_figure",
    "unitarity_error",
    "unitarity_figure",
]


@torch.no_grad()
def unitarity_error(module_or_factors: nn.Module | Iterable) -> dict[str, Tensor]:
    """‖W_fᴴ W_f − I‖_F of every factor and head; the smaller Gram matrix for P < Q.

    Args:
        module_or_factors: a module, or a list of planar factors `(parts, H, P_f, Q_f)`.

    Returns:
        Name of the factor to its errors `(H,)`. The sum of their squares is `unitarity_penalty`.

    Raises:
        TypeError, ValueError: as `unitarity_penalty`.

    Example:
        >>> import torch
        >>> unitarity_error([2 * torch.eye(4).view(1, 1, 4, 4)])
        {'factors[0]': tensor([6.])}
    """
    return {
        name: torch.linalg.matrix_norm(gram_residual(w))
        for name, w in named_factors(module_or_factors)
    }


@torch.no_grad()
def spectrum(factors: Sequence[Tensor], *, max_size: int = 2048) -> Tensor:
    """The exact eigenvalues of W = W_0 ⊗ … ⊗ W_{F-1}: all products of the factors' eigenvalues.

    Rectangular factors have none; they are multiplied out up to the smallest square groups first.

    Args:
        factors: one kind of factor, ∏P_f = ∏Q_f; see `kron_dense`.
        max_size: refuse to decompose a dense group with more rows than this. Default 2048.

    Returns:
        complex128 `(H, N)`, or `(N,)` for factors without heads, in no particular order.

    Raises:
        ValueError: W is not square, or a group is larger than `max_size`; else as `kron_dense`.
        TypeError: as `kron_dense`.

    Example:
        >>> import torch
        >>> spectrum([torch.diag(torch.tensor([1.0, 2.0])), torch.tensor([[3.0]])]).real
        tensor([3., 6.], dtype=torch.float64)
    """
    factors = check_factors(factors)
    rows, columns = product_shape(factors)
    if rows != columns:
        raise ValueError(
            f"factors: only a square matrix has eigenvalues, got {rows} x {columns} (shapes "
            f"{_shapes(factors)}); use singular_values"
        )
    ends = [0, *square_cuts(factors), len(factors)]
    groups = [factors[start:end] for start, end in pairwise(ends)]
    for group in groups:
        size = product_shape(group)[0]
        if size > max_size:
            raise ValueError(
                f"factors: the factors of shapes {_shapes(group)} form a dense {size} x {size} "
                f"matrix, above max_size={max_size}; use smaller square factors or raise max_size"
            )
    return reduce(
        _products, [torch.linalg.eigvals(_double_matrix(kron_dense(group))) for group in groups]
    )


@torch.no_grad()
def singular_values(factors: Sequence[Tensor]) -> Tensor:
    """The exact singular values of W = W_0 ⊗ … ⊗ W_{F-1}: all products of the factors' ones.

    Args:
        factors: one kind of factor, square or rectangular; see `kron_dense`.

    Returns:
        float64 `(H, min(M, N))` for an M × N matrix, or without H for factors without heads,
        descending. Rectangular factors may leave W without full rank: the rest are zeros.

    Raises:
        TypeError, ValueError: as `kron_dense`.

    Example:
        >>> import torch
        >>> singular_values([torch.diag(torch.tensor([1.0, 2.0])), torch.tensor([[3.0]])])
        tensor([6., 3.], dtype=torch.float64)
    """
    factors = check_factors(factors)
    values = reduce(_products, [torch.linalg.svdvals(_double_matrix(w)) for w in factors])
    values = values.sort(dim=-1, descending=True).values
    return nn.functional.pad(values, (0, min(product_shape(factors)) - values.shape[-1]))


def _double_matrix(w: Tensor) -> Tensor:
    """Planar to complex (real field: real) `(H, P, Q)`; anything to double precision."""
    if w.ndim == 4:
        w = torch.complex(*w.double().unbind()) if w.shape[0] == 2 else w[0]
    return w.to(torch.complex128 if w.is_complex() else torch.float64)


def _products(a: Tensor, b: Tensor) -> Tensor:
    return (a[..., :, None] * b[..., None, :]).flatten(-2)


def _shapes(factors: Sequence[Tensor]) -> str:
    return ", ".join(str(tuple(w.shape[-2:])) for w in factors)


def gradient_norm_by_lag(
    kru: KRU | KRULSTM,
    x: Tensor,
    h_0: Tensor | tuple[Tensor, Tensor] | None = None,
    *,
    layer: int = 0,
    direction: int = 0,
    readout_steps: int = 1,
    cotangent: Tensor | None = None,
    seed: int = 0,
    relative: bool = False,
) -> tuple[Tensor, Tensor]:
    """How far back the gradient reaches: ‖∂L/∂h_t‖ against the lag T − 1 − t.

    L = Σ ⟨c_t, h_t⟩ over the last `readout_steps` steps, for a fixed cotangent c; the gradients
    are exact, from the loop reference under autograd, on the states that `kru` visits on `x`
    (the vanishing gradient of Pascanu, Mikolov and Bengio, ICML 2013, as it is measured). The norm
    is taken over the batch and the features. For a `KRULSTM` it is that of (∂L/∂h_t, ∂L/∂c_t), the
    gradient in all that goes on to step t + 1: ∂L/∂c_t is taken with h_t held fixed.

    Args:
        kru: a `KRU` or a `KRULSTM`; its first layer's forward direction is looked at.
        x: input `(T, B, D)`, or `(B, T, D)` if `kru.batch_first`.
        h_0: initial states as `kru` takes them, `(layers·directions, B, F)`, for a `KRULSTM` the
            tuple (h_0, c_0) of two such; the first is used. Default zeros.
        layer: 0, the only one supported.
        direction: 0, the only one supported.
        readout_steps: number of last steps in the loss. Default 1.
        cotangent: c, `(B, readout_steps, F)`. Default standard normal.
        seed: seed of the default cotangent.
        relative: divide by the norm at lag 0. Default False.

    Returns:
        lags: int64 `(T,)`, 0 … T − 1. norms: `(T,)` in the dtype of the states, norms[lag].

    Raises:
        TypeError: a `kru` that is neither; an `h_0` that is no tensor, for a `KRULSTM` no tuple of
            two.
        ValueError: another layer or direction, an `x`, `h_0` or `cotangent` of the wrong shape,
            or a `readout_steps` outside 1 … T.

    Example:
        >>> import torch, kru_triton
        >>> kru = kru_triton.KRU(3, 16, batch_first=True)
        >>> lags, norms = gradient_norm_by_lag(kru, torch.randn(2, 50, 3), relative=True)
    """
    if not hasattr(kru, "input_projection"):
        raise TypeError(f"kru: must be a KRU or a KRULSTM, got {type(kru).__name__}")
    if (layer, direction) != (0, 0):
        raise ValueError(
            "layer, direction: only the first layer's forward direction (0, 0) is supported, got "
            f"({layer}, {direction}); build a one-layer KRU with the weights of interest"
        )
    if x.ndim != 3:
        layout = "(B, T, D)" if kru.batch_first else "(T, B, D)"
        raise ValueError(
            f"x: must have shape {layout}, got {tuple(x.shape)}; x.unsqueeze adds a batch"
        )
    with torch.no_grad():
        x_proj = kru.input_projection(x, layer=0, direction=0)
        gate = kru.gate_projection(x, layer=0, direction=0)
        factors = [w.detach() for w in kru.recurrent_factors(layer=0, direction=0)]
    B, T, F = x_proj.shape
    F = F // kru.gates if isinstance(kru, KRULSTM) else F
    if not 1 <= readout_steps <= T:
        raise ValueError(f"readout_steps: must be 1 … T = {T}, got {readout_steps}")
    start = _first_states(kru, h_0, B, F)
    expected = (B, readout_steps, F)
    if cotangent is None:
        generator = torch.Generator().manual_seed(seed)
        cotangent = torch.randn(expected, dtype=torch.float64, generator=generator)
    elif tuple(cotangent.shape) != expected:
        raise ValueError(
            f"cotangent: must have shape (B, readout_steps, F) = {expected}, got "
            f"{tuple(cotangent.shape)}"
        )
    with torch.enable_grad():
        x_proj.requires_grad_()
        if isinstance(kru, KRULSTM):
            states, cells = _lstm_states(x_proj, factors, *start)
        else:
            beta = kru.beta(layer=0, direction=0)
            _, _, states = kru_scan_reference(
                x_proj,
                factors,
                None if beta is None else beta.detach(),
                start[0],
                nonlinearity=kru.nonlinearity,
                gate=gate,
                return_states=True,
            )
            cells = []
        loss = (torch.stack(states[-readout_steps:], 1) * cotangent.to(x_proj)).sum()
        # the last cell goes nowhere: its gradient is zero
        gradients = torch.autograd.grad(loss, [*states, *cells], materialize_grads=True)
    norms = torch.stack([g.norm() for g in gradients]).view(-1, T).norm(dim=0).flip(0)
    return torch.arange(T), norms / norms[0] if relative else norms


def _first_states(kru: KRU | KRULSTM, h_0, B: int, F: int) -> list[Tensor | None]:
    """h_0 of the first layer, for a KRULSTM c_0 too."""
    names = ("h_0", "c_0") if isinstance(kru, KRULSTM) else ("h_0",)
    if len(names) == 1 or h_0 is None:
        h_0 = [h_0] * len(names)
    elif not (isinstance(h_0, tuple | list) and len(h_0) == 2):
        raise TypeError(f"h_0: must be a tuple (h_0, c_0) for a KRULSTM, got {type(h_0).__name__}")
    return [_first_state(name, state, B, F) for name, state in zip(names, h_0)]


def _first_state(name: str, state: Tensor | None, B: int, F: int) -> Tensor | None:
    """The first of the states `(layers·directions, B, F)`, or None."""
    if state is None:
        return None
    if not isinstance(state, Tensor):
        raise TypeError(f"{name}: must be a tensor, got {type(state).__name__}")
    if state.ndim != 3 or state.shape[1:] != (B, F):
        raise ValueError(
            f"{name}: must have shape (layers·directions, B, F) = (…, {B}, {F}), got "
            f"{tuple(state.shape)}"
        )
    return state[0].detach()


def _lstm_states(x_proj: Tensor, factors, h: Tensor | None, c: Tensor | None):
    """h_t and c_t of all steps, each as a node through which it goes on to the next step."""
    states, cells = [], []
    for u in x_proj.unsqueeze(2).unbind(1):
        _, last = kru_lstm_scan_reference(u, factors, h, c)
        h, c = (s + 0 for s in last)  # what h_t takes of c_t passes the node of c_t by
        states.append(h)
        cells.append(c)
    return states, cells


def unitarity_figure(module_or_factors: nn.Module | Iterable):
    """Figure of `unitarity_error`: one row per factor, one point per head, logarithmic axis.

    Args:
        module_or_factors: as `unitarity_error`.

    Returns:
        `matplotlib.figure.Figure`. Errors below 1e-16 are drawn at 1e-16.

    Raises:
        ValueError: there is no factor. RuntimeError: matplotlib is not installed. Else as
            `unitarity_error`.

    Example:
        >>> import torch
        >>> figure = unitarity_figure([torch.randn(2, 1, 8, 8), torch.randn(2, 1, 16, 16)])
        >>> figure.savefig("/dev/null", format="png")
    """
    errors = unitarity_error(module_or_factors)
    if not errors:
        raise ValueError(
            "module_or_factors: must hold Kronecker factors, got none; pass a model with KRU or "
            "KRULSTM layers, or a list of factors"
        )
    figure, axes = _figure(width=7.0, height=1.8 + 0.25 * len(errors))
    for row, values in enumerate(errors.values()):
        points = values.double().clamp_min(1e-16).tolist()
        axes.plot(points, [row] * len(points), "o", color="C0", alpha=0.6, markersize=5)
    axes.set_xscale("log")
    axes.set_yticks(range(len(errors)), errors.keys(), fontsize=8)
    axes.set_ylim(len(errors) - 0.5, -0.5)
    axes.set_xlabel("‖WᴴW − I‖ (Frobenius norm), a point per head")
    axes.set_title("Unitarity error of the factors")
    return figure


def spectrum_figure(factors: Sequence[Tensor], *, max_size: int = 2048):
    """Figure of `spectrum`: the eigenvalues of W in the complex plane, with the unit circle.

    Args:
        factors, max_size: as `spectrum`.

    Returns:
        `matplotlib.figure.Figure`.

    Raises:
        RuntimeError: matplotlib is not installed. Else as `spectrum`.

    Example:
        >>> import torch
        >>> figure = spectrum_figure([torch.randn(2, 1, 8, 8), torch.randn(2, 1, 16, 16)])
        >>> figure.savefig("/dev/null", format="png")
    """
    heads = torch.atleast_2d(spectrum(factors, max_size=max_size)).cpu()
    figure, axes = _figure(width=5.5, height=5.5)
    angle = torch.linspace(0, 2 * math.pi, 361)
    axes.plot(angle.cos(), angle.sin(), color="0.6", linewidth=1, label="unit circle")
    for head, values in enumerate(heads):
        label = f"head {head}" if len(heads) > 1 else "eigenvalues"
        axes.plot(values.real, values.imag, ".", markersize=4, alpha=0.6, label=label)
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_xlabel("Re λ")
    axes.set_ylabel("Im λ")
    axes.set_title(f"Eigenvalues of W, N = {heads.shape[1]}, max |λ| = {heads.abs().max():.3g}")
    _legend(axes, len(heads))
    return figure


def singular_value_figure(factors: Sequence[Tensor]):
    """Figure of `singular_values`: largest first, one line per head, 1 marked.

    Args:
        factors: as `singular_values`.

    Returns:
        `matplotlib.figure.Figure`.

    Raises:
        RuntimeError: matplotlib is not installed. Else as `singular_values`.

    Example:
        >>> import torch
        >>> figure = singular_value_figure([torch.randn(2, 1, 8, 8), torch.randn(2, 1, 16, 16)])
        >>> figure.savefig("/dev/null", format="png")
    """
    heads = torch.atleast_2d(singular_values(factors)).cpu()
    figure, axes = _figure(width=6.5, height=4.0)
    axes.axhline(1.0, color="0.6", linewidth=1, label="unitary W")
    for head, values in enumerate(heads):
        label = f"head {head}" if len(heads) > 1 else "singular values"
        axes.plot(range(1, len(values) + 1), values, ".-", markersize=3, linewidth=1, label=label)
    axes.set_ylim(0, 1.1 * max(1.0, heads.max().item()))
    axes.set_xlabel("rank of the singular value (1 = largest)")
    axes.set_ylabel("singular value")
    axes.set_title(f"Singular values of W, N = {heads.shape[1]}")
    _legend(axes, len(heads))
    return figure


def gradient_norm_figure(lags: Tensor, norms: Tensor):
    """Figure of `gradient_norm_by_lag`: the gradient norm against the lag, logarithmic axis.

    Args:
        lags: `(T,)`. norms: `(T,)`; both as `gradient_norm_by_lag` returns them.

    Returns:
        `matplotlib.figure.Figure`. A norm of exactly zero is not drawn.

    Raises:
        RuntimeError: matplotlib is not installed.

    Example:
        >>> import torch
        >>> figure = gradient_norm_figure(torch.arange(100), 0.9 ** torch.arange(100))
        >>> figure.savefig("/dev/null", format="png")
    """
    figure, axes = _figure(width=6.5, height=4.0)
    norms = norms.detach().double().cpu()
    axes.plot(lags.cpu(), norms.masked_fill(norms == 0, math.nan), ".-", markersize=3, linewidth=1)
    axes.set_yscale("log")
    axes.set_xlabel("lag T − 1 − t (time steps)")
    axes.set_ylabel("‖∂L/∂h_t‖ (2-norm)")
    axes.set_title("Gradient norm against time lag")
    return figure


def _figure(width: float, height: float):
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise RuntimeError(
            "the figures of kru_triton.diagnostics need matplotlib; install it with "
            "pip install 'kru-triton[plot]'"
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(True, alpha=0.3)
    return figure, axes


def _legend(axes, heads: int) -> None:
    if heads <= 8:
        axes.legend(fontsize=8, loc="best")
