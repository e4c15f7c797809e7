"""`kru_scan` and `kru_embedding_scan`, the recurrence as one operation.

    z_t = (W_0 ⊗ … ⊗ W_{F-1}) (gate_t ⊙ h_{t-1}) + x_proj_t        h_t = σ(z_t)

Source: Jose, Cissé and Fleuret, "Kronecker Recurrent Units", ICML 2018, section 3, where there is
no gate: with one, the recurrent matrix depends on the input. The factors are
regrouped into two matrices A and B by small Kronecker products under autograd; one `torch.library`
op then runs the whole sequence, and a second one its adjoint. Its input is a sequence, or a table
of which each step reads the row of its token. Where nothing but plain operations can run (see
`dispatch.why_not_op`), the loop of `reference.py` takes the place of the op.

The public functions take and return `(B, T, …)`. Everything inside is time first, `(T, B, …)`,
which is what the loop writes and what costs no copy: `run_scan` is the same op for those who have
their sequences so.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kru_triton import reference
from kru_triton.kernels.why_not import why_not as why_not_kernels
from kru_triton.ops.arguments import (
    How,
    Scan,
    check_places,
    check_tensor,
    scan_arguments,
    steps_and_rows,
)
from kru_triton.ops.dispatch import (
    choose_triton,
    for_kernels,
    run_loop,
    takes_loop,
    way_out,
    why_not_op,
)
from kru_triton.ops.library import (
    adjoint_schema,
    bags,
    empty_like,
    refuse_forward_mode,
    refuse_second_derivatives,
    register_autocast,
    schema,
)
from kru_triton.torch_backend import scan as torch_backend


def kru_scan(
    x_proj: Tensor,
    factors: Sequence[Tensor],
    beta: Tensor | None = None,
    h_0: Tensor | None = None,
    *,
    nonlinearity: str = "modrelu",
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
    gate: Tensor | None = None,
    backend: str = "auto",
    precision: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run the Kronecker recurrence over a whole sequence.

    `h_t = σ((W_0 ⊗ … ⊗ W_{F-1}) (gate_t ⊙ h_{t-1}) + x_proj_t)`, per batch row and head; without a
    gate as in Jose et al., 2018. Complex data is planar: all real parts, then all imaginary parts,
    unit index `head·N + n`.
    Differentiable in every float argument, through both results: once in reverse mode, and under
    torch.func's transforms and in forward mode any number of times, as a plain loop over time.

    Args:
        x_proj: `(B, T, parts·H·N)` input projection, float64, float32, bfloat16 or float16; any
            strides. Under autocast it is cast to the autocast dtype.
        factors: sequence of `(parts, H, P_f, Q_f)` tensors, `parts` 2 ([real, imag]) or 1 (real
            field), ∏P_f = ∏Q_f = N; float64 with float64 `x_proj`, else float32.
        beta: `(H·N,)` threshold of modReLU (zeros if None); refused by the others.
        h_0: `(B, parts·H·N)` initial state, zeros if None.
        nonlinearity: "modrelu", "modtanh", "tanh", "relu" (both on Re and Im apart) or "identity".
        reset: `(B, T)` bool; where True, h_{t-1} of that row is replaced by 0 before step t.
        lengths: `(B,)` int64 from 0 to T, the steps of each row; T for all if None. Beyond its
            length a row's h is 0, x_proj, reset and gate are not looked at, and no gradient arises.
        gate: `(B, T, parts·H·N)`, a number for every unit (complex: real parts, then imaginary
            parts) by which its h_{t-1} is multiplied before step t; of |gate_t| = 1 it turns the
            state, of 0 it forgets it. `(B, T, H·N)` in the complex field are real numbers. In the
            dtype of `x_proj` or of the factors.
        backend: "auto", "triton" or "torch".
        precision: of the products inside the Triton kernels. "bf16" rounds factors and states to
            bfloat16; "bf16x2" takes each factor as a sum of two bfloat16 numbers, in two products,
            and is several times as exact over a long sequence; "fp32" takes states so as well, in
            three products. "auto" is "bf16" with a bfloat16 `x_proj`, else "fp32". The torch
            backend always computes in the dtype of the factors.

    Returns:
        `h (B, T, parts·H·N)` in the dtype of `x_proj` (its memory is time-first), and each row's
        last state `h_n (B, parts·H·N)`: the values of its last h, hence rounded to the dtype of
        `x_proj`, in the dtype of the factors; h_0 for a row of length 0.

    Raises:
        ValueError: a shape or value breaks a rule; TypeError: a dtype or kind does;
        RuntimeError: `backend="triton"` where it cannot run, with the reason.

    Example:
        >>> x = torch.randn(2, 5, 2 * 6)
        >>> h, h_n = kru_scan(x, [unitary_(torch.empty(2, 1, p, p)) for p in (2, 3)])
        >>> h.shape, h_n.shape
        (torch.Size([2, 5, 12]), torch.Size([2, 12]))
    """
    how = How(nonlinearity, backend, precision)
    scan = scan_arguments(x_proj, factors, beta, h_0, how, reset=reset, lengths=lengths, gate=gate)
    h, h_n = run_scan(scan, how)
    return h.transpose(0, 1), h_n


def kru_embedding_scan(
    tokens: Tensor,
    table: Tensor,
    factors: Sequence[Tensor],
    beta: Tensor | None = None,
    h_0: Tensor | None = None,
    *,
    nonlinearity: str = "modrelu",
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
    gate: Tensor | None = None,
    backend: str = "auto",
    precision: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`kru_scan` whose input at each step is the row of an embedding table.

    `h_t = σ((W_0 ⊗ … ⊗ W_{F-1}) h_{t-1} + table[tokens_t])`: the results are those of
    `kru_scan(table[tokens], …)`, but the rows are read inside the recurrence: no tensor of
    `(B, T, parts·H·N)` is gathered. An embedding E and an input projection U, b are one table,
    `E @ U.T + b`, for the price of one product over the vocabulary.

    Args:
        tokens: `(B, T)` int64, rows of the table.
        table: `(V, parts·H·N)`, float64, float32, bfloat16 or float16, as `x_proj` of `kru_scan`.
        factors, beta, h_0, nonlinearity, reset, lengths, gate, backend, precision: as in
            `kru_scan`. Beyond a row's length its tokens must still be in the table (0 is).

    Returns:
        `h (B, T, parts·H·N)` in the dtype of the table and `h_n (B, parts·H·N)`, as `kru_scan`.
        The table's gradient is summed in an order that does not change from run to run.

    Raises:
        As `kru_scan`; ValueError: a token is outside the table (on a GPU a device-side assertion,
        which does not wait for the device).

    Example:
        >>> w = [unitary_(torch.empty(2, 1, p, p)) for p in (2, 3)]
        >>> h, h_n = kru_embedding_scan(torch.tensor([[0, 3, 1]]), torch.randn(4, 2 * 6), w)
        >>> h.shape, h_n.shape
        (torch.Size([1, 3, 12]), torch.Size([1, 12]))
    """
    check_tensor("tokens", tokens)
    how = How(nonlinearity, backend, precision)
    scan = scan_arguments(
        table, factors, beta, h_0, how, reset=reset, lengths=lengths, tokens=tokens, gate=gate
    )
    h, h_n = run_scan(scan, how)
    return h.transpose(0, 1), h_n


def kru_step(
    x_proj: Tensor,
    factors: Sequence[Tensor],
    beta: Tensor | None = None,
    h_0: Tensor | None = None,
    *,
    nonlinearity: str = "modrelu",
    gate: Tensor | None = None,
    backend: str = "auto",
    precision: str = "auto",
) -> Tensor:
    """One step of `kru_scan`: `x_proj (B, parts·H·N)`, state `h_0` and gate alike, returns the next
    state.

    Args, errors and gradients are those of `kru_scan`.

    Example:
        >>> w = [unitary_(torch.empty(2, 1, 4, 4))]
        >>> kru_step(torch.zeros(3, 8), w, h_0=torch.ones(3, 8)).shape
        torch.Size([3, 8])
    """
    check_tensor("x_proj", x_proj)
    if x_proj.dim() != 2:
        raise ValueError(f"x_proj: one step takes (B, parts·H·N), got shape {tuple(x_proj.shape)}")
    if gate is not None:
        check_tensor("gate", gate)
        if gate.dim() != 2:
            raise ValueError(f"gate: one step takes (B, parts·H·N), got shape {tuple(gate.shape)}")
        gate = gate.unsqueeze(1)
    _, h = kru_scan(
        x_proj.unsqueeze(1),
        factors,
        beta,
        h_0,
        nonlinearity=nonlinearity,
        gate=gate,
        backend=backend,
        precision=precision,
    )
    return h


def why_not_triton(
    x_proj: Tensor,
    factors: Sequence[Tensor],
    beta: Tensor | None = None,
    h_0: Tensor | None = None,
    *,
    nonlinearity: str = "modrelu",
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
    gate: Tensor | None = None,
    precision: str = "auto",
) -> str | None:
    """Why the fused kernels cannot run these arguments, in one sentence; None if they can.

    The arguments are those of `kru_scan`. What it says of `x_proj` holds for the table of
    `kru_embedding_scan` as well.

    Example:
        >>> x, w = torch.zeros(1, 1, 512, device="meta"), torch.zeros(2, 1, 256, 256, device="meta")
        >>> why_not_triton(x, [w]) is None
        False
    """
    how = How(nonlinearity, precision=precision)
    scan = scan_arguments(x_proj, factors, beta, h_0, how, reset=reset, lengths=lengths, gate=gate)
    return why_not_op() or _why_not(scan.x, scan, how)


def run_scan(scan: Scan, how: How) -> tuple[Tensor, Tensor]:
    """`h (T, B, F)` in the dtype of x and `h_n (B, F)` in that of a, differentiable."""
    if takes_loop("kru_scan", scan.x, how.backend):
        check_places(scan)
        return run_loop(reference.scan_forward, scan, how)
    return _scan(*scan[:-1], *how, scan.gate)


def forward(scan: Scan, how: How) -> tuple[Tensor, Tensor]:
    """What the op computes, on the backend that it takes."""
    check_places(scan)
    x = scan.x
    if scan.tokens is not None:
        x = x.new_empty(1).expand(*steps_and_rows(scan), x.shape[1])
    if not _on_triton(x, scan, how):
        return torch_backend.forward(scan, how)
    from kru_triton.kernels import scan as kernels

    with way_out():
        return kernels.forward(scan, for_kernels(how, x))


def backward(
    dh: Tensor | None, dh_n: Tensor | None, h: Tensor, scan: Scan, how: How
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, a, b, beta (zeros without one), h_0 and gate (nothing without one)."""
    table = scan.x
    if how.nonlinearity != "modtanh":  # the others are inverted from h
        scan = scan._replace(x=None)
    if _on_triton(h, scan, how):
        from kru_triton.kernels import scan as kernels

        with way_out():
            dx, *others, d_gate = kernels.backward(dh, dh_n, h, scan, for_kernels(how, h))
    else:
        dx, *others, d_gate = torch_backend.backward(dh, dh_n, h, scan, how)
    if scan.tokens is not None:  # sums in a fixed order, which index_add does not
        dx = torch.ops.aten.embedding_dense_backward(
            dx.to(scan.a.dtype), scan.tokens, table.shape[0], -1, False
        ).to(table.dtype)
    d_gate = h.new_empty(0) if d_gate is None else d_gate.to(scan.gate.dtype)
    return dx, *others, d_gate


def _on_triton(x: Tensor, scan: Scan, how: How) -> bool:
    """Choose the backend of one call, whose input is like x."""
    if how.backend == "torch":
        return False
    return choose_triton("kru_scan", x, how.backend, _why_not(x, scan, how))


def _why_not(x: Tensor, scan: Scan, how: How) -> str | None:
    nonlinearity, _, precision = for_kernels(how, x)
    tensors = (x, scan.a, scan.b, scan.beta, scan.h_0, scan.reset, scan.lengths)
    return why_not_kernels(*tensors, nonlinearity=nonlinearity, precision=precision, gate=scan.gate)


def _bags(flat: tuple) -> tuple[Scan, How]:
    scan, how, *gate = bags(Scan, flat)
    return scan._replace(gate=gate[0] if gate else None), how


@torch.library.custom_op(
    "kru_triton::recurrence",
    mutates_args=(),
    schema=f"({schema(Scan)}, Tensor? gate=None) -> (Tensor, Tensor)",
)
def _scan(*flat):
    refuse_forward_mode("kru_scan")
    return forward(*_bags(flat))


@_scan.register_fake
def _(*flat):
    scan, _ = _bags(flat)
    time, batch = steps_and_rows(scan)
    features = scan.x.shape[-1]
    return scan.x.new_empty(time, batch, features), scan.a.new_empty(batch, features)


@torch.library.custom_op(
    "kru_triton::recurrence_backward",
    mutates_args=(),
    schema=f"(Tensor? dh, Tensor? dh_n, Tensor h, {adjoint_schema(Scan)}, Tensor? gate=None) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _scan_backward(dh, dh_n, h, *flat):
    refuse_forward_mode("kru_scan", dh, dh_n)
    return backward(dh, dh_n, h, *_bags(flat))


@_scan_backward.register_fake
def _(dh, dh_n, h, *flat):
    scan, _ = _bags(flat)
    units = scan.a.shape[1] * scan.a.shape[2] * scan.b.shape[2]
    like_x = h if scan.tokens is None else scan.x
    gradients = (empty_like(x) for x in (like_x, scan.a, scan.b))
    d_gate = h.new_empty(0) if scan.gate is None else empty_like(scan.gate)
    return *gradients, scan.a.new_empty(units), scan.a.new_empty(h.shape[1:]), d_gate


def _setup_context(ctx, inputs, output):
    scan, ctx.how = _bags(inputs)
    if ctx.how.nonlinearity != "modtanh" and scan.tokens is None:
        scan = scan._replace(x=None)
    ctx.save_for_backward(output[0], *scan)
    ctx.set_materialize_grads(False)


def _backward(ctx, dh, dh_n):
    unused = (None,) * len(How._fields)
    if dh is None and dh_n is None:
        return *(None,) * len(Scan._fields), *unused
    refuse_forward_mode("kru_scan", dh, dh_n)
    h, *saved = ctx.saved_tensors
    scan = Scan(*saved)
    arguments = (*scan[:-1], *ctx.how, scan.gate)
    dx, da, db, d_beta, dh_0, d_gate = _scan_backward(dh, dh_n, h, *arguments)
    d_beta = None if scan.beta is None else d_beta
    dh_0 = None if scan.h_0 is None else dh_0
    d_gate = None if scan.gate is None else d_gate
    return *Scan(dx, da, db, d_beta, dh_0)[:-1], *unused, d_gate


_scan.register_autograd(_backward, setup_context=_setup_context)
refuse_second_derivatives("kru_scan", _scan_backward)
register_autocast("recurrence", _scan, _scan_backward)
