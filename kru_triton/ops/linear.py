"""`kru_linear_scan`, the recurrence without a nonlinearity, parallel over time.

    h_t = W h_{t-1} + u_t,    W = A ⊗ B

Without σ the state behind a block of r steps depends linearly on the state before it: if a block
that starts from zero ends in e_j, then s_{j+1} = W^r s_j + e_j, and W^r = A^r ⊗ B^r. So

    1. all T/r blocks run at once, as rows of a batch, from zero: they end in e_j;
    2. T/r steps of W^r give the states s_j between the blocks;
    3. all blocks run once more, each from its s_j.

That is 2r + T/r steps one after another in place of T, for twice the products. Each pass is
`kru_scan`, on either backend. The adjoint is the same backwards in time: (1) and (2) with Wᴴ give
the gradient that each block receives from those behind it, and in place of (3) the adjoint of
`kru_scan` returns the gradients of input and factors, with the true states and gradients of every
step: nothing is differentiated through the powers.

The powers are taken in double precision. Where W is not normal this loses nothing, as the
eigenvectors of A and B would (`python -m bench cpu --only linear` compares), and a real W stays
real. W^r must not overflow: that takes a spectral radius above 4 even for blocks of 64 steps.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as nnf
from torch import Tensor

from kru_triton import reference
from kru_triton.ops.scan import (
    _check,
    _check_places,
    _grouped,
    _state_dtype,
    refuse_forward_mode,
    refuse_second_derivatives,
    register_autocast,
    run_loop,
    run_scan,
    run_scan_backward,
    takes_loop,
)


def kru_linear_scan(
    x_proj: Tensor,
    factors: Sequence[Tensor],
    h_0: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
    block: int | None = None,
    backend: str = "auto",
    precision: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`kru_scan(…, nonlinearity="identity")` in about √(8T) steps one after another, not T.

    `h_t = (W_0 ⊗ … ⊗ W_{F-1}) h_{t-1} + x_proj_t`, equal up to rounding. Time is cut into blocks
    that run side by side, twice: it pays where B rows alone do not fill the device (see
    `bench/NOTES.md`), and costs up to twice the time where they do. Differentiable as `kru_scan`.

    Args:
        x_proj, factors, h_0, reset, lengths, backend, precision: as in `kru_scan`.
        block: steps of a block. None: the power of two nearest to √(T/2), which makes the
            fewest steps.

    Returns:
        `h (B, T, parts·H·N)` and `h_n (B, parts·H·N)`, as `kru_scan`.

    Raises:
        As `kru_scan`; ValueError: block is less than 1.

    Example:
        >>> x = torch.randn(2, 100, 2 * 6)
        >>> w = [unitary_(torch.empty(2, 1, p, p)) for p in (2, 3)]
        >>> h, h_n = kru_linear_scan(x, w)
        >>> torch.allclose(h, kru_scan(x, w, nonlinearity="identity")[0], atol=1e-4)
        True
    """
    if block is not None and (isinstance(block, bool) or not isinstance(block, int)):
        raise TypeError(f"block: must be an int or None, got {type(block).__name__}")
    if block is not None and block < 1:
        raise ValueError(f"block: must be at least 1 step, got {block}")
    _check(x_proj, factors, None, h_0, "identity", reset, backend, precision, lengths)
    dtype = _state_dtype(x_proj)
    a, b = _grouped(factors, dtype)
    h_0 = None if h_0 is None else h_0.to(dtype)
    if takes_loop("kru_linear_scan", x_proj, backend):
        _check_places(x_proj, lengths, None)
        args = (x_proj, a, b, None, h_0, reset, "identity", lengths)
        h, h_n = run_loop(reference.scan_forward, *args)
    else:
        h, h_n = _linear_scan(x_proj, a, b, h_0, reset, lengths, block or 0, backend, precision)
    return h.transpose(0, 1), h_n


def _block(time: int, block: int) -> int:
    """Steps of a block; 0 takes the power of two nearest to √(T/2)."""
    return block or 1 << round(math.log2(max(1, time / 2)) / 2)


def _rows(x: Tensor, block: int) -> Tensor:
    """`(B, T, …)` as `(B·m, block, …)`, zero behind T: row b·m + j is block j of row b."""
    blocks = -(-x.shape[1] // block)
    pad = [0, 0] * (x.dim() - 2) + [0, blocks * block - x.shape[1]]
    return nnf.pad(x, pad).reshape(x.shape[0] * blocks, block, *x.shape[2:])


def _joined(y: Tensor, batch: int, time: int) -> Tensor:
    """The inverse, time-first: `(block, B·m, F)` to `(T, B, F)`."""
    y = y.view(y.shape[0], batch, -1, y.shape[-1]).permute(2, 0, 1, 3)
    return y.reshape(-1, batch, y.shape[-1])[:time]


def _power(a: Tensor, b: Tensor, exponent: int) -> tuple[Tensor, Tensor]:
    """A^r and B^r, scaled alike: their product alone has to be within float32. A 1×1 A
    stays the identity that the backends take it for."""
    powers = [
        torch.linalg.matrix_power(
            torch.complex(*w.double()) if w.shape[0] == 2 else w[0].double(), exponent
        )
        for w in (a, b)
    ]
    if a.shape[-1] > 1:
        tiny = torch.finfo(torch.float64).tiny
        most = [w.abs().amax((-2, -1), keepdim=True).clamp_min(tiny) for w in powers]
        ratio = (most[1] / most[0]).sqrt()
        powers = [powers[0] * ratio, powers[1] / ratio]
    planar = (torch.stack((w.real, w.imag)) if w.is_complex() else w[None] for w in powers)
    return tuple(w.to(a.dtype) for w in planar)


def _adjoint(w: Tensor) -> Tensor:
    """wᴴ of planar w."""
    w = w.transpose(-1, -2)
    return torch.stack((w[0], -w[1])) if w.shape[0] == 2 else w.contiguous()


def _between(first: Tensor | None, ends: Tensor, a, b, block: int, cuts, backend, precision):
    """s_j `(B, m, F)` from s_0 `(B, F)` and e_j `(B, m, F)`; `cuts (B, m)` bool where a block is
    cut inside, so that its end does not depend on its start."""
    first = torch.zeros_like(ends[:, 0]) if first is None else first
    cuts = None if cuts is None else cuts[:, :-1]
    states, _ = run_scan(
        *(ends[:, :-1], *_power(a, b, block), None, first, cuts, None, None),
        *("identity", backend, precision),
    )
    return torch.cat((first[:, None], states.transpose(0, 1)), 1)


@torch.library.custom_op("kru_triton::linear_scan", mutates_args=())
def _linear_scan(
    x_proj: Tensor,
    a: Tensor,
    b: Tensor,
    h_0: Tensor | None,
    reset: Tensor | None,
    lengths: Tensor | None,
    block: int,
    backend: str,
    precision: str,
) -> tuple[Tensor, Tensor]:
    refuse_forward_mode("kru_linear_scan")
    batch, time, features = x_proj.shape
    options = "identity", backend, precision
    block = _block(time, block)
    if block >= time or not batch:
        return run_scan(x_proj, a, b, None, h_0, reset, lengths, None, *options)
    _check_places(x_proj, lengths, None)
    x = _rows(x_proj, block)
    cuts = None if reset is None else _rows(reset, block)
    _, ends = run_scan(x, a, b, None, None, cuts, None, None, *options)
    starts = _between(
        *(h_0, ends.view(batch, -1, features), a, b, block),
        *(None if cuts is None else cuts.any(1).view(batch, -1), backend, precision),
    )
    h, _ = run_scan(x, a, b, None, starts.flatten(0, 1), cuts, None, None, *options)
    h = _joined(h, batch, time)
    if lengths is not None:
        h.masked_fill_(_behind(lengths, time).t()[..., None], 0)
    return h, reference.last_state(h, a.dtype, h_0, lengths)


def _behind(lengths: Tensor, time: int) -> Tensor:
    """`(B, T)`, True behind the length of a row."""
    return torch.arange(time, device=lengths.device) >= lengths[:, None]


@_linear_scan.register_fake
def _(x_proj, a, b, h_0, reset, lengths, block, backend, precision):
    batch, time, features = x_proj.shape
    return x_proj.new_empty(time, batch, features), a.new_empty(batch, features)


@torch.library.custom_op("kru_triton::linear_scan_backward", mutates_args=())
def _linear_scan_backward(
    dh: Tensor | None,
    dh_n: Tensor | None,
    h: Tensor,
    a: Tensor,
    b: Tensor,
    h_0: Tensor | None,
    reset: Tensor | None,
    lengths: Tensor | None,
    block: int,
    backend: str,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    refuse_forward_mode("kru_linear_scan", dh, dh_n)
    time, batch, features = h.shape
    options = "identity", backend, precision
    block = _block(time, block)
    if block >= time or not batch:
        dx, da, db, _, dh_0 = run_scan_backward(
            dh, dh_n, h, None, a, b, None, h_0, reset, lengths, None, *options
        )
        return dx, da, db, dh_0
    dh = torch.zeros_like(h) if dh is None else dh.clone()
    if lengths is not None:
        dh.masked_fill_(_behind(lengths, time).t()[..., None], 0)
    if dh_n is not None:
        rows = torch.arange(batch, device=h.device)
        ends = rows.new_full((batch,), time) if lengths is None else lengths
        dh_end = dh_n.masked_fill((ends == 0)[:, None], 0)
        dh[(ends - 1).clamp_min(0), rows] += dh_end.to(dh.dtype)
    dh = _rows(dh.transpose(0, 1), block)
    cuts = None if reset is None else _rows(reset, block)
    backwards = torch.cat((dh.flip(1), torch.zeros_like(dh[:, :1])), 1)  # to the state before
    cuts_backwards = None
    if cuts is not None:
        cuts_backwards = torch.cat((torch.zeros_like(cuts[:, :1]), cuts.flip(1)), 1)
    adjoint = _adjoint(a), _adjoint(b)
    _, d_starts = run_scan(backwards, *adjoint, None, None, cuts_backwards, None, None, *options)
    d_starts = d_starts.view(batch, -1, features).flip(1)
    d_ends = _between(  # behind the last block there is nothing
        *(torch.zeros_like(d_starts[:, 0]), d_starts, *adjoint, block),
        *(None if cuts is None else cuts.any(1).view(batch, -1).flip(1), backend, precision),
    ).flip(1)
    starts = h[block - 1 : time - 1 : block].transpose(0, 1).to(a.dtype)  # (B, m - 1, F)
    first = torch.zeros_like(starts[:, 0]) if h_0 is None else h_0
    starts = torch.cat((first[:, None], starts), 1)
    dx, da, db, _, d_starts = run_scan_backward(
        *(dh.transpose(0, 1), d_ends.flatten(0, 1)),
        *(_rows(h.transpose(0, 1), block).transpose(0, 1).contiguous(), None, a, b, None),
        *(starts.flatten(0, 1), cuts, None, None, *options),
    )
    dh_0 = d_starts.view(batch, -1, features)[:, 0].contiguous()
    if lengths is not None and dh_n is not None:  # a row without a step hands it on
        dh_0 = torch.where(lengths[:, None] > 0, dh_0, dh_n.to(dh_0.dtype))
    return _joined(dx, batch, time), da, db, dh_0


@_linear_scan_backward.register_fake
def _(dh, dh_n, h, a, b, h_0, reset, lengths, block, backend, precision):
    like = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (h, a, b))
    return *like, a.new_empty(h.shape[1:])


def _setup_context(ctx, inputs, output):
    _, *saved, ctx.block, ctx.backend, ctx.precision = inputs
    ctx.save_for_backward(output[0], *saved)
    ctx.set_materialize_grads(False)


def _backward(ctx, dh, dh_n):
    if dh is None and dh_n is None:
        return (None,) * 9
    refuse_forward_mode("kru_linear_scan", dh, dh_n)
    dx, da, db, dh_0 = _linear_scan_backward(
        dh, dh_n, *ctx.saved_tensors, ctx.block, ctx.backend, ctx.precision
    )
    dh_0 = None if ctx.saved_tensors[3] is None else dh_0
    return dx.transpose(0, 1), da, db, dh_0, *(None,) * 5


_linear_scan.register_autograd(_backward, setup_context=_setup_context)
refuse_second_derivatives("kru_linear_scan", _linear_scan_backward)
register_autocast("linear_scan", _linear_scan, _linear_scan_backward)
