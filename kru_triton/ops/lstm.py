"""`kru_lstm_scan`, the recurrence of the Kronecker LSTM as one differentiable operation.

    z_k = A_k X_{t-1} B_kᵀ + x_k   for the gates k = i, f, g, o,   X = h.reshape(P, Q)
    c_t = σ(z_f) c_{t-1} + σ(z_i) tanh(z_g),   h_t = σ(z_o) tanh(c_t)

An LSTM (Hochreiter and Schmidhuber, Neural Computation 9, 1997; with a forget gate, Gers et al.,
2000) whose four recurrent matrices are Kronecker products as in Jose et al., ICML 2018. Like
`kru_scan` one `torch.library` op runs the whole sequence and a second one its adjoint.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kru_triton import reference
from kru_triton.kernels.why_not import why_not as why_not_kernels
from kru_triton.ops.arguments import How, LSTMScan, check_lengths, lstm_arguments
from kru_triton.ops.dispatch import (
    choose_triton,
    for_kernels,
    run_loop,
    takes_loop,
    way_out,
    why_not_op,
)
from kru_triton.ops.library import (
    bags,
    empty_like,
    refuse_forward_mode,
    refuse_second_derivatives,
    register_autocast,
    schema,
)
from kru_triton.torch_backend import lstm as torch_backend

ACTIVATION = "tanh"  # of the cell, and all that there is to choose


def kru_lstm_scan(
    x_proj: Tensor,
    factors: Sequence[Tensor],
    h_0: Tensor | None = None,
    c_0: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
    backend: str = "auto",
    precision: str = "auto",
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Run the Kronecker LSTM over a whole sequence.

    `c_t = σ(z_f) c_{t-1} + σ(z_i) tanh(z_g)`, `h_t = σ(z_o) tanh(c_t)`, where the pre-activation of
    gate k is `z_k = (W_k,0 ⊗ … ⊗ W_k,F-1) h_{t-1} + x_k`. Gates come in the order of
    `torch.nn.LSTM`: input i, forget f, cell g, output o. Differentiable in every float argument,
    through every result, as `kru_scan`.

    Args:
        x_proj: `(B, T, 4·H·N)` input projections of the gates i, f, g, o; float64, float32,
            bfloat16 or float16; any strides. Under autocast it is cast to the autocast dtype.
        factors: sequence of real planar `(1, 4·H, P_f, Q_f)` tensors, ∏P_f = ∏Q_f = N: the H heads
            of gate i, then those of f, g and o; float64 with float64 `x_proj`, else float32.
        h_0, c_0: `(B, H·N)` initial state and cell, zeros if None.
        reset: `(B, T)` bool; where True, h_{t-1} and c_{t-1} of that row are replaced by 0 before
            step t.
        lengths: `(B,)` int64, steps of each row from 0 to T (all T if None): beyond them h is zero
            and x_proj is not used; h_n and c_n are those after each row's last step.
        backend, precision: as in `kru_scan`.

    Returns:
        `h (B, T, H·N)` in the dtype of `x_proj` (its memory is time-first), and the last state and
        cell `(h_n, c_n)`, each `(B, H·N)` in the dtype of the factors: h_n has the values of each
        row's last h, hence rounded to the dtype of `x_proj`, and c_n is not rounded.

    Raises:
        ValueError: a shape or value breaks a rule; TypeError: a dtype or kind does;
        RuntimeError: `backend="triton"` where it cannot run, with the reason.

    Example:
        >>> x = torch.randn(2, 5, 4 * 6)
        >>> factors = [unitary_(torch.empty(1, 4, p, p)) for p in (2, 3)]
        >>> h, (h_n, c_n) = kru_lstm_scan(x, factors)
        >>> h.shape, h_n.shape, c_n.shape
        (torch.Size([2, 5, 6]), torch.Size([2, 6]), torch.Size([2, 6]))
    """
    how = How(ACTIVATION, backend, precision)
    scan = lstm_arguments(x_proj, factors, h_0, c_0, how, reset=reset, lengths=lengths)
    h, last = run_lstm_scan(scan, how)
    return h.transpose(0, 1), last


def why_not_triton_lstm(
    x_proj: Tensor,
    factors: Sequence[Tensor],
    h_0: Tensor | None = None,
    c_0: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
    precision: str = "auto",
) -> str | None:
    """Why the fused LSTM kernels cannot run these arguments, in one sentence; None if they can.

    The arguments are those of `kru_lstm_scan`.

    Example:
        >>> x = torch.zeros(1, 1, 1024, device="meta")
        >>> why_not_triton_lstm(x, [torch.zeros(1, 4, 256, 256, device="meta")]) is None
        False
    """
    how = How(ACTIVATION, precision=precision)
    scan = lstm_arguments(x_proj, factors, h_0, c_0, how, reset=reset, lengths=lengths)
    return why_not_op() or _why_not(scan, how)


def run_lstm_scan(scan: LSTMScan, how: How) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """As `kru_lstm_scan`, with sequences `(T, B, …)`."""
    if takes_loop("kru_lstm_scan", scan.x, how.backend):
        check_lengths(scan.lengths, scan.x.shape[0])
        h, _, *last = run_loop(reference.lstm_forward, scan, how)
    else:
        h, _, *last = _lstm_scan(*scan, *how)
    return h, tuple(last)


def forward(scan: LSTMScan, how: How) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the op computes, on the backend that it takes: h, c `(T, B, F)`, h_n, c_n `(B, F)`."""
    check_lengths(scan.lengths, scan.x.shape[0])
    if not _on_triton(scan, how):
        return torch_backend.forward(scan, how)
    from kru_triton.kernels import lstm as kernels

    with way_out():
        return kernels.forward(scan, for_kernels(how, scan.x))


def backward(
    dh: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    h: Tensor,
    c: Tensor,
    scan: LSTMScan,
    how: How,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, a, b, h_0 and c_0 from those of h, h_n and c_n."""
    if not _on_triton(scan, how):
        return torch_backend.backward(dh, dh_n, dc_n, h, c, scan, how)
    from kru_triton.kernels import lstm as kernels

    with way_out():
        return kernels.backward(dh, dh_n, dc_n, h, c, scan, for_kernels(how, scan.x))


def _on_triton(scan: LSTMScan, how: How) -> bool:
    if how.backend == "torch":
        return False
    return choose_triton("kru_lstm_scan", scan.x, how.backend, _why_not(scan, how))


def _why_not(scan: LSTMScan, how: How) -> str | None:
    return why_not_kernels(*scan, precision=for_kernels(how, scan.x).precision, lstm=True)


@torch.library.custom_op(
    "kru_triton::lstm_recurrence",
    mutates_args=(),
    schema=f"({schema(LSTMScan)}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _lstm_scan(*flat):
    refuse_forward_mode("kru_lstm_scan")
    return forward(*bags(LSTMScan, flat))


@_lstm_scan.register_fake
def _(*flat):
    scan, _ = bags(LSTMScan, flat)
    time, batch, features = scan.x.shape
    h = scan.x.new_empty(time, batch, features // 4)
    return h, scan.a.new_empty(h.shape), *(scan.a.new_empty(h.shape[1:]) for _ in range(2))


@torch.library.custom_op(
    "kru_triton::lstm_recurrence_backward",
    mutates_args=(),
    schema="(Tensor? dh, Tensor? dh_n, Tensor? dc_n, Tensor h, Tensor c, "
    f"{schema(LSTMScan)}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _lstm_scan_backward(dh, dh_n, dc_n, h, c, *flat):
    refuse_forward_mode("kru_lstm_scan", dh, dh_n, dc_n)
    return backward(dh, dh_n, dc_n, h, c, *bags(LSTMScan, flat))


@_lstm_scan_backward.register_fake
def _(dh, dh_n, dc_n, h, c, *flat):
    scan, _ = bags(LSTMScan, flat)
    gradients = (empty_like(x) for x in (scan.x, scan.a, scan.b))
    return *gradients, *(scan.a.new_empty(h.shape[1:]) for _ in range(2))


def _setup_context(ctx, inputs, output):
    scan, ctx.how = bags(LSTMScan, inputs)
    h, c, _, _ = output
    ctx.save_for_backward(h, c, *scan)
    ctx.mark_non_differentiable(c)
    ctx.set_materialize_grads(False)


def _backward(ctx, dh, dc, dh_n, dc_n):
    unused = (None,) * len(How._fields)
    if dh is None and dh_n is None and dc_n is None:
        return *(None,) * len(LSTMScan._fields), *unused
    refuse_forward_mode("kru_lstm_scan", dh, dh_n, dc_n)
    h, c, *saved = ctx.saved_tensors
    dx, da, db, dh_0, dc_0 = _lstm_scan_backward(dh, dh_n, dc_n, h, c, *saved, *ctx.how)
    scan = LSTMScan(*saved)
    dh_0, dc_0 = None if scan.h_0 is None else dh_0, None if scan.c_0 is None else dc_0
    return *LSTMScan(dx, da, db, dh_0, dc_0), *unused


_lstm_scan.register_autograd(_backward, setup_context=_setup_context)
refuse_second_derivatives("kru_lstm_scan", _lstm_scan_backward)
register_autocast("lstm_recurrence", _lstm_scan, _lstm_scan_backward)
