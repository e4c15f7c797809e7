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
eigenvectors of A and B would (compared in bench/NOTES.md, 2026-11-24), and a real W stays
real. W^r must not overflow: that takes a spectral radius above 4 even for blocks of 64 steps.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as nnf
from torch import Tensor

from kru_triton import reference
from kru_triton.kronecker import adjoint
from kru_triton.ops import scan as scan_op
from kru_triton.ops.arguments import How, Scan, check_lengths, scan_arguments
from kru_triton.ops.dispatch import run_loop, takes_loop
from kru_triton.ops.library import (
    adjoint_schema,
    bags,
    empty_like,
    refuse_forward_mode,
    refuse_second_derivatives,
    register_autocast,
    schema,
)
from kru_triton.torch_backend.rows import handed_on, last_state, past_end


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
    how = How("identity", backend, precision)
    scan = scan_arguments(x_proj, factors, None, h_0, how, reset=reset, lengths=lengths)
    h, h_n = run_linear_scan(scan, how, block or 0)
    return h.transpose(0, 1), h_n


def run_linear_scan(scan: Scan, how: How, block: int = 0) -> tuple[Tensor, Tensor]:
    """As `run_scan` of `ops.scan`, without tokens; a block of 0 steps as one of None."""
    if takes_loop("kru_linear_scan", scan.x, how.backend):
        check_lengths(scan.lengths, scan.x.shape[0])
        return run_loop(reference.scan_forward, scan, how)
    return _linear_scan(*scan[:-1], *how, block)


def _block(time: int, block: int) -> int:
    """Steps of a block; 0 takes the power of two nearest to √(T/2)."""
    return block or 1 << round(math.log2(max(1, time / 2)) / 2)


def _rows(x: Tensor, block: int) -> Tensor:
    """`(T, B, …)` as `(block, B·m, …)`, zero behind T: row b·m + j is block j of row b."""
    blocks = -(-x.shape[0] // block)
    pad = [0, 0] * (x.dim() - 1) + [0, blocks * block - x.shape[0]]
    x = nnf.pad(x, pad).unflatten(0, (blocks, block))
    return x.movedim(0, 2).reshape(block, x.shape[2] * blocks, *x.shape[3:])


def _joined(y: Tensor, batch: int, time: int) -> Tensor:
    """The inverse: `(block, B·m, F)` to `(T, B, F)`."""
    y = y.view(y.shape[0], batch, -1, y.shape[-1]).permute(2, 0, 1, 3)
    return y.reshape(-1, batch, y.shape[-1])[:time].contiguous()  # blocks of one step are a view


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
    a_power, b_power = (w.to(a.dtype) for w in planar)
    return a_power, b_power


def _between(first: Tensor | None, ends: Tensor, scan: Scan, how: How, block: int) -> Tensor:
    """s_j `(m, B, F)` from s_0 `(B, F)` and e_j `(m, B, F)`, with the factors of `scan`; its reset
    `(m, B)` says where a block is cut inside, and its end does not depend on its start."""
    first = torch.zeros_like(ends[0]) if first is None else first
    cuts = None if scan.reset is None else scan.reset[:-1]
    between = Scan(ends[:-1], *_power(scan.a, scan.b, block), h_0=first, reset=cuts)
    states, _ = scan_op.forward(between, how)
    return torch.cat((first[None], states))


def _by_block(x: Tensor, batch: int) -> Tensor:
    """Of each block `(B·m, F)`: `(m, B, F)`."""
    return x.unflatten(0, (batch, -1)).transpose(0, 1)


def _forward(scan: Scan, how: How, block: int) -> tuple[Tensor, Tensor]:
    time, batch = scan.x.shape[:2]
    block = _block(time, block)
    if block >= time or not batch:
        return scan_op.forward(scan, how)
    check_lengths(scan.lengths, time)
    if scan.lengths is not None:  # the blocks run on behind a row's end, beside other rows
        beyond = past_end(time, scan.lengths)[..., None]
        scan = scan._replace(x=scan.x.masked_fill(beyond, 0))
    cuts = None if scan.reset is None else _rows(scan.reset, block)
    blocks = Scan(_rows(scan.x, block), scan.a, scan.b, reset=cuts)
    _, ends = scan_op.forward(blocks, how)
    cut = None if cuts is None else _by_block(cuts.any(0), batch)
    steps = scan._replace(reset=cut)
    starts = _between(scan.h_0, _by_block(ends, batch), steps, how, block)
    starts = starts.transpose(0, 1).flatten(0, 1)
    h, _ = scan_op.forward(blocks._replace(h_0=starts), how)
    h = _joined(h, batch, time)
    if scan.lengths is not None:
        h.masked_fill_(past_end(time, scan.lengths)[..., None], 0)
    return h, last_state(h, scan.a.dtype, scan.h_0, scan.lengths)


def _backward(
    dh: Tensor | None, dh_n: Tensor | None, h: Tensor, scan: Scan, how: How, block: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    time, batch, features = h.shape
    block = _block(time, block)
    if block >= time or not batch:
        dx, da, db, _, dh_0, _ = scan_op.backward(dh, dh_n, h, scan, how)
        return dx, da, db, dh_0
    dh = _rows(_with_last(dh, dh_n, h, scan.lengths), block)
    cuts = None if scan.reset is None else _rows(scan.reset, block)
    none = torch.zeros_like(dh[:1])
    backwards = Scan(torch.cat((dh.flip(0), none)), adjoint(scan.a), adjoint(scan.b))
    if cuts is not None:  # to the state before
        backwards = backwards._replace(reset=torch.cat((torch.zeros_like(cuts[:1]), cuts.flip(0))))
    _, d_starts = scan_op.forward(backwards, how)
    d_starts = _by_block(d_starts, batch).flip(0)
    cut = None if cuts is None else _by_block(cuts.any(0), batch).flip(0)
    nothing = torch.zeros_like(d_starts[0])  # behind the last block
    d_ends = _between(nothing, d_starts, backwards._replace(reset=cut), how, block).flip(0)
    first = torch.zeros_like(nothing) if scan.h_0 is None else scan.h_0
    starts = torch.cat((first[None], h[block - 1 : time - 1 : block].to(scan.a.dtype)))
    d_ends, starts = (x.transpose(0, 1).flatten(0, 1) for x in (d_ends, starts))  # (B·m, F)
    blocks = Scan(None, scan.a, scan.b, h_0=starts, reset=cuts)
    dx, da, db, _, d_starts, _ = scan_op.backward(dh, d_ends, _rows(h, block), blocks, how)
    dh_0 = d_starts.view(batch, -1, features)[:, 0].contiguous()
    return _joined(dx, batch, time), da, db, handed_on(dh_0, dh_n, scan.lengths, time)


def _with_last(dh: Tensor | None, dh_n: Tensor | None, h: Tensor, lengths: Tensor | None) -> Tensor:
    """The gradients of all states `(T, B, F)`, with those of the last ones among them."""
    time, batch, _ = h.shape
    dh = torch.zeros_like(h) if dh is None else dh.clone()
    if lengths is not None:
        dh.masked_fill_(past_end(time, lengths)[..., None], 0)
    if dh_n is not None:
        rows = torch.arange(batch, device=h.device)
        ends = rows.new_full((batch,), time) if lengths is None else lengths
        dh_end = dh_n.masked_fill((ends == 0)[:, None], 0)
        dh[(ends - 1).clamp_min(0), rows] += dh_end.to(dh.dtype)
    return dh


@torch.library.custom_op(
    "kru_triton::linear_recurrence",
    mutates_args=(),
    schema=f"({schema(Scan)}, int block) -> (Tensor, Tensor)",
)
def _linear_scan(*flat):
    refuse_forward_mode("kru_linear_scan")
    return _forward(*bags(Scan, flat))


@_linear_scan.register_fake
def _(*flat):
    scan, *_ = bags(Scan, flat)
    return scan.x.new_empty(scan.x.shape), scan.a.new_empty(scan.x.shape[1:])


@torch.library.custom_op(
    "kru_triton::linear_recurrence_backward",
    mutates_args=(),
    schema=f"(Tensor? dh, Tensor? dh_n, Tensor h, {adjoint_schema(Scan)}, int block) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
)
def _linear_scan_backward(dh, dh_n, h, *flat):
    refuse_forward_mode("kru_linear_scan", dh, dh_n)
    return _backward(dh, dh_n, h, *bags(Scan, flat))


@_linear_scan_backward.register_fake
def _(dh, dh_n, h, *flat):
    scan, *_ = bags(Scan, flat)
    return *(empty_like(x) for x in (h, scan.a, scan.b)), scan.a.new_empty(h.shape[1:])


def _setup_context(ctx, inputs, output):
    scan, ctx.how, ctx.block = bags(Scan, inputs)
    ctx.save_for_backward(output[0], *scan._replace(x=None)[:-1])
    ctx.set_materialize_grads(False)


def _autograd(ctx, dh, dh_n):
    unused = (None,) * (len(How._fields) + 1)
    if dh is None and dh_n is None:
        return *(None,) * len(Scan._fields[:-1]), *unused
    refuse_forward_mode("kru_linear_scan", dh, dh_n)
    h, *saved = ctx.saved_tensors
    dx, da, db, dh_0 = _linear_scan_backward(dh, dh_n, h, *saved, *ctx.how, ctx.block)
    dh_0 = None if Scan(*saved).h_0 is None else dh_0
    return *Scan(dx, da, db, h_0=dh_0)[:-1], *unused


_linear_scan.register_autograd(_autograd, setup_context=_setup_context)
refuse_second_derivatives("kru_linear_scan", _linear_scan_backward)
register_autocast("linear_recurrence", _linear_scan, _linear_scan_backward)
