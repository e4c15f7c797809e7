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
from kru_triton.ops.scan import (
    _check,
    _check_places,
    _check_same,
    _check_shape,
    _grouped,
    _kernel_precision,
    _state_dtype,
    _way_out,
    choose_triton,
    refuse_forward_mode,
    refuse_second_derivatives,
    register_autocast,
    run_loop,
    takes_loop,
    why_not_op,
)
from kru_triton.torch_backend import lstm as lstm_torch_backend


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
        backend: "auto", "triton" or "torch".
        precision: "auto", "fp32" or "bf16": of the products inside the Triton kernels. The torch
            backend always computes in the dtype of the factors.

    Returns:
        `h (B, T, H·N)` in the dtype of `x_proj` (its memory is time-first), and the last state and
        cell `(h_n, c_n)`, each `(B, H·N)` in the dtype of the factors.

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
    _check_lstm(x_proj, factors, h_0, c_0, reset, lengths, backend, precision)
    dtype = _state_dtype(x_proj)
    a, b = _grouped_gates(factors, dtype)
    h_0, c_0 = (None if s is None else s.to(dtype) for s in (h_0, c_0))
    args = (x_proj, a, b, h_0, c_0, reset, lengths)
    if takes_loop("kru_lstm_scan", x_proj, backend):
        _check_places(x_proj, lengths, None)
        h, _, h_n, c_n = run_loop(reference.lstm_forward, *args)
    else:
        h, _, h_n, c_n = _lstm_scan(*args, backend, precision)
    return h.transpose(0, 1), (h_n, c_n)


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
    _check_lstm(x_proj, factors, h_0, c_0, reset, lengths, "auto", precision)
    a, b = _grouped_gates(factors, _state_dtype(x_proj))
    return why_not_op() or _why_not(x_proj, a, b, h_0, c_0, reset, lengths, precision)


def _why_not(x_proj, a, b, h_0, c_0, reset, lengths, precision) -> str | None:
    precision = _kernel_precision(x_proj, precision)
    tensors = (x_proj, a, b, h_0, c_0, reset, lengths)
    return why_not_kernels(*tensors, precision=precision, lstm=True)


def _grouped_gates(factors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A and B of every gate, `(4, H, P, P)` and `(4, H, Q, Q)`."""
    return tuple(w.view(4, w.shape[1] // 4, *w.shape[2:]) for w in _grouped(factors, dtype))


def _check_lstm(x_proj, factors, h_0, c_0, reset, lengths, backend, precision) -> None:
    """Check every argument of `kru_lstm_scan`: a real recurrence on 4·H heads, and what differs."""
    _check(x_proj, factors, None, None, "tanh", reset, backend, precision, lengths)
    parts, heads = factors[0].shape[:2]
    if parts != 1 or heads % 4:
        raise ValueError(
            "factors: must be real, (1, 4·H, P, Q) with the H heads of the gates i, f, g and o, "
            f"got {tuple(factors[0].shape)}"
        )
    for name, state in (("h_0", h_0), ("c_0", c_0)):
        if state is not None:
            _check_same(name, state, x_proj)
            _check_shape(name, state, (x_proj.shape[0], x_proj.shape[2] // 4), "(B, H·N)")


@torch.library.custom_op("kru_triton::lstm_scan", mutates_args=())
def _lstm_scan(
    x_proj: Tensor,
    a: Tensor,
    b: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    reset: Tensor | None,
    lengths: Tensor | None,
    backend: str,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    refuse_forward_mode("kru_lstm_scan")
    args = (x_proj, a, b, h_0, c_0, reset, lengths)
    _check_places(x_proj, lengths, None)
    if not _on_triton(*args, backend, precision):
        return lstm_torch_backend.lstm_forward(*args)
    from kru_triton.kernels.lstm import lstm_forward

    with _way_out():
        h, c = lstm_forward(*args, precision=_kernel_precision(x_proj, precision))
    h_n, c_n = (reference.last_state(*s, lengths) for s in ((h, a.dtype, h_0), (c, a.dtype, c_0)))
    return h, c, h_n, c_n


def _on_triton(x_proj, a, b, h_0, c_0, reset, lengths, backend, precision) -> bool:
    if backend == "torch":
        return False
    reason = _why_not(x_proj, a, b, h_0, c_0, reset, lengths, precision)
    return choose_triton("kru_lstm_scan", x_proj, backend, reason)


@_lstm_scan.register_fake
def _(x_proj, a, b, h_0, c_0, reset, lengths, backend, precision):
    batch, time, features = x_proj.shape
    h = x_proj.new_empty(time, batch, features // 4)
    return h, a.new_empty(h.shape), *(a.new_empty(h.shape[1:]) for _ in range(2))


@torch.library.custom_op("kru_triton::lstm_scan_backward", mutates_args=())
def _lstm_scan_backward(
    dh: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    h: Tensor,
    c: Tensor,
    x_proj: Tensor,
    a: Tensor,
    b: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    reset: Tensor | None,
    lengths: Tensor | None,
    backend: str,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    refuse_forward_mode("kru_lstm_scan", dh, dh_n, dc_n)
    grads, args = (dh, dh_n, dc_n), (x_proj, a, b, h_0, c_0, reset, lengths)
    if not _on_triton(*args, backend, precision):
        return lstm_torch_backend.lstm_backward(*grads, h, c, *args)
    from kru_triton.kernels.lstm import lstm_backward, lstm_weight_grad

    precision = _kernel_precision(x_proj, precision)
    with _way_out():
        dx, dh_0, dc_0 = lstm_backward(*grads, h, c, *args, precision=precision)
        da, db = lstm_weight_grad(dx, h, a, b, h_0, reset, precision=precision)
    return dx, da, db, dh_0, dc_0


@_lstm_scan_backward.register_fake
def _(dh, dh_n, dc_n, h, c, x_proj, a, b, h_0, c_0, reset, lengths, backend, precision):
    time, batch, features = h.shape
    return (
        x_proj.new_empty(time, batch, 4 * features),
        torch.empty_like(a, memory_format=torch.contiguous_format),
        torch.empty_like(b, memory_format=torch.contiguous_format),
        a.new_empty(batch, features),
        a.new_empty(batch, features),
    )


def _setup_context(ctx, inputs, output):
    *tensors, ctx.backend, ctx.precision = inputs
    h, c, _, _ = output
    ctx.save_for_backward(h, c, *tensors)
    ctx.mark_non_differentiable(c)
    ctx.set_materialize_grads(False)


def _backward(ctx, dh, dc, dh_n, dc_n):
    if dh is None and dh_n is None and dc_n is None:
        return (None,) * 9
    refuse_forward_mode("kru_lstm_scan", dh, dh_n, dc_n)
    h, c, x_proj, a, b, h_0, c_0, reset, lengths = ctx.saved_tensors
    args = (h, c, x_proj, a, b, h_0, c_0, reset, lengths, ctx.backend, ctx.precision)
    dx, da, db, dh_0, dc_0 = _lstm_scan_backward(dh, dh_n, dc_n, *args)
    dh_0, dc_0 = None if h_0 is None else dh_0, None if c_0 is None else dc_0
    return dx.transpose(0, 1), da, db, dh_0, dc_0, None, None, None, None


_lstm_scan.register_autograd(_backward, setup_context=_setup_context)
refuse_second_derivatives("kru_lstm_scan", _lstm_scan_backward)
register_autocast("lstm_scan", _lstm_scan, _lstm_scan_backward)
