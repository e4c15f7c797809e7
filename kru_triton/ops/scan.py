"""`kru_scan` and `kru_embedding_scan`, the recurrence as one operation, and the choice of backend.

    z_t = (W_0 ⊗ … ⊗ W_{F-1}) h_{t-1} + x_proj_t        h_t = σ(z_t)

Source: Jose, Cissé and Fleuret, "Kronecker Recurrent Units", ICML 2018, section 3. The factors are
regrouped into two matrices A and B by small Kronecker products under autograd; one `torch.library`
op then runs the whole sequence, and a second one its adjoint. Its input is a sequence, or a table
of which each step reads the row of its token. Where nothing but plain operations can run (see
`why_not_op`), the loop of `reference.py` takes the place of the op.
"""

import contextlib
import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kru_triton import reference
from kru_triton.kernels.why_not import why_not as why_not_kernels
from kru_triton.kronecker import as_one_matrix, check_factors, group_factors, product_shape
from kru_triton.nonlinearity import check_nonlinearity
from kru_triton.torch_backend import scan as torch_backend

BACKENDS = ("auto", "triton", "torch")
PRECISIONS = ("auto", "fp32", "bf16")
_logger = logging.getLogger("kru_triton")
_said = set()


def kru_scan(
    x_proj: Tensor,
    factors: Sequence[Tensor],
    beta: Tensor | None = None,
    h_0: Tensor | None = None,
    *,
    nonlinearity: str = "modrelu",
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
    backend: str = "auto",
    precision: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run the Kronecker recurrence over a whole sequence.

    `h_t = σ((W_0 ⊗ … ⊗ W_{F-1}) h_{t-1} + x_proj_t)`, per batch row and head (Jose et al., 2018).
    Complex data is planar: all real parts, then all imaginary parts, unit index `head·N + n`.
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
            length a row's h is 0, x_proj and reset are not looked at, and no gradient arises.
        backend: "auto", "triton" or "torch".
        precision: "auto", "fp32" or "bf16": of the products inside the Triton kernels. The torch
            backend always computes in the dtype of the factors.

    Returns:
        `h (B, T, parts·H·N)` in the dtype of `x_proj` (its memory is time-first), and each row's
        last state `h_n (B, parts·H·N)` in the dtype of the factors (h_0 for a row of length 0).

    Raises:
        ValueError: a shape or value breaks a rule; TypeError: a dtype or kind does;
        RuntimeError: `backend="triton"` where it cannot run, with the reason.

    Example:
        >>> x = torch.randn(2, 5, 2 * 6)
        >>> h, h_n = kru_scan(x, [unitary_(torch.empty(2, 1, p, p)) for p in (2, 3)])
        >>> h.shape, h_n.shape
        (torch.Size([2, 5, 12]), torch.Size([2, 12]))
    """
    args = (x_proj, factors, beta, h_0, nonlinearity, reset, backend, precision)
    return _run(*args, lengths, None)


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
        factors, beta, h_0, nonlinearity, reset, lengths, backend, precision: as in `kru_scan`.
            Beyond a row's length its tokens must still be in the table (0 is).

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
    _check_tensor("tokens", tokens)
    args = (table, factors, beta, h_0, nonlinearity, reset, backend, precision)
    return _run(*args, lengths, tokens)


def _run(
    x_proj, factors, beta, h_0, nonlinearity, reset, backend, precision, lengths, tokens
) -> tuple[Tensor, Tensor]:
    units = _check(
        *(x_proj, factors, beta, h_0, nonlinearity, reset, backend, precision, lengths, tokens)
    )
    dtype = _state_dtype(x_proj)
    if nonlinearity == "modrelu" and beta is None:
        beta = x_proj.new_zeros(units, dtype=dtype)
    a, b = _grouped(factors, dtype)
    beta = None if beta is None else beta.to(dtype)
    h_0 = None if h_0 is None else h_0.to(dtype)
    args = (x_proj, a, b, beta, h_0, reset)
    if takes_loop("kru_scan", x_proj, backend):
        _check_places(x_proj, lengths, tokens)
        h, h_n = run_loop(reference.scan_forward, *args, nonlinearity, lengths, tokens)
    else:
        h, h_n = _scan(*args, lengths, tokens, nonlinearity, backend, precision)
    return h.transpose(0, 1), h_n


def kru_step(
    x_proj: Tensor,
    factors: Sequence[Tensor],
    beta: Tensor | None = None,
    h_0: Tensor | None = None,
    *,
    nonlinearity: str = "modrelu",
    backend: str = "auto",
    precision: str = "auto",
) -> Tensor:
    """One step of `kru_scan`: `x_proj (B, parts·H·N)`, state `h_0` alike, returns the next state.

    Args, errors and gradients are those of `kru_scan`.

    Example:
        >>> w = [unitary_(torch.empty(2, 1, 4, 4))]
        >>> kru_step(torch.zeros(3, 8), w, h_0=torch.ones(3, 8)).shape
        torch.Size([3, 8])
    """
    if x_proj.dim() != 2:
        raise ValueError(f"x_proj: one step takes (B, parts·H·N), got shape {tuple(x_proj.shape)}")
    _, h = kru_scan(
        x_proj.unsqueeze(1),
        factors,
        beta,
        h_0,
        nonlinearity=nonlinearity,
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
    _check(x_proj, factors, beta, h_0, nonlinearity, reset, "auto", precision, lengths)
    a, b = _grouped(factors, _state_dtype(x_proj))
    args = (x_proj, a, b, beta, h_0, reset, lengths, nonlinearity, precision)
    return why_not_op() or _why_not(*args)


def _why_not(x_proj, a, b, beta, h_0, reset, lengths, nonlinearity, precision) -> str | None:
    return why_not_kernels(
        *(x_proj, a, b, beta, h_0, reset, lengths),
        nonlinearity=nonlinearity,
        precision=_kernel_precision(x_proj, precision),
    )


def _kernel_precision(x_proj: Tensor, precision: str) -> str:
    if precision == "auto":
        return "bf16" if x_proj.dtype == torch.bfloat16 else "fp32"
    return precision


def _grouped(factors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A and B; a single matrix takes the place of B, beside a 1×1 identity."""
    a, b = group_factors([w.to(dtype) for w in factors])
    if a.shape[-1] == 1 or b.shape[-1] == 1:
        return as_one_matrix(a, b)
    return a, b


def _state_dtype(x_proj: Tensor) -> torch.dtype:
    return torch.float64 if x_proj.dtype == torch.float64 else torch.float32


def _check(
    x_proj, factors, beta, h_0, nonlinearity, reset, backend, precision, lengths=None, tokens=None
) -> int:
    """Check every argument of `kru_scan`, or with tokens of `kru_embedding_scan`, whose table comes
    as `x_proj`; returns the number of units H·N."""
    check_nonlinearity(nonlinearity)
    check_choice("backend", backend, BACKENDS)
    check_choice("precision", precision, PRECISIONS)
    name = "x_proj" if tokens is None else "table"
    _check_tensor(name, x_proj)
    if x_proj.is_complex():
        raise TypeError(
            f"{name}: must be planar real (all real parts, then all imaginary parts), got "
            f"{x_proj.dtype}; convert with torch.cat((x.real, x.imag), -1)"
        )
    if x_proj.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(
            f"{name}: must be float64, float32, bfloat16 or float16, got "
            f"{x_proj.dtype}; convert with .float()"
        )
    shape = "(B, T, parts·H·N)" if tokens is None else "(V, parts·H·N)"
    if x_proj.dim() != (3 if tokens is None else 2):
        raise ValueError(f"{name}: must be {shape}, got shape {tuple(x_proj.shape)}")
    if tokens is not None:
        _check_tokens(tokens, x_proj)
    factors = check_factors(factors)
    for f, w in enumerate(factors):
        if w.is_complex() or w.dim() != 4:
            raise TypeError(
                f"factors[{f}]: must be planar real (2, H, P, Q), or (1, H, P, Q) in the real field"
                f", got {w.dtype} of shape {tuple(w.shape)}; convert a complex (H, P, Q) factor "
                "with torch.stack((w.real, w.imag))"
            )
    _check_same("factors", factors[0], x_proj, name)
    parts, heads = factors[0].shape[:2]
    rows, columns = product_shape(factors)
    shapes = [tuple(w.shape[2:]) for w in factors]
    if rows != columns:
        raise ValueError(
            f"factors: rows multiply to {rows} and columns to {columns} (shapes {shapes}); "
            "both products must be N, the units per head"
        )
    units = heads * rows
    if x_proj.shape[-1] != parts * units:
        raise ValueError(
            f"{name}: the last dimension must be {parts}·{heads}·{rows} = {parts * units} "
            f"(parts · heads · product of the factor sizes {shapes}), got {x_proj.shape[-1]}"
        )
    batch, time = (x_proj if tokens is None else tokens).shape[:2]
    if beta is not None:
        if nonlinearity != "modrelu":
            raise ValueError(f'beta: only "modrelu" has one; leave it out for "{nonlinearity}"')
        _check_same("beta", beta, x_proj, name)
        _check_shape("beta", beta, (units,), "one per unit, (H·N,)")
    if h_0 is not None:
        _check_same("h_0", h_0, x_proj, name)
        _check_shape("h_0", h_0, (batch, parts * units), "(B, parts·H·N)")
    if reset is not None:
        _check_shape("reset", reset, (batch, time), "(B, T)")
        _check_kind("reset", reset, "a bool", x_proj, name)
    if lengths is not None:
        _check_shape("lengths", lengths, (batch,), "steps of each row, (B,)")
        _check_kind("lengths", lengths, "an int64", x_proj, name)
    return units


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    """Return `value`, or raise a ValueError that lists the valid choices."""
    if value not in choices:
        raise ValueError(f"{name}: must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def _check_tensor(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: must be a tensor, got {type(x).__name__}")


def _check_shape(name: str, x: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    _check_tensor(name, x)
    if tuple(x.shape) != shape:
        raise ValueError(f"{name}: must have shape {shape} ({meaning}), got {tuple(x.shape)}")


def _check_kind(name: str, x: Tensor, kind: str, x_proj: Tensor, x_name: str) -> None:
    """`x` is "a bool" or "an int64" tensor on the input's device."""
    dtype, convert = {"a bool": (torch.bool, ".bool()"), "an int64": (torch.int64, ".long()")}[kind]
    if x.dtype != dtype:
        raise TypeError(f"{name}: must be {kind} tensor, got {x.dtype}; convert with {convert}")
    if x.device != x_proj.device:
        raise ValueError(f"{name}: is on {x.device} but {x_name} is on {x_proj.device}")


def _check_tokens(tokens: Tensor, table: Tensor) -> None:
    if tokens.dim() != 2:
        raise ValueError(f"tokens: must be (B, T), got shape {tuple(tokens.shape)}")
    _check_kind("tokens", tokens, "an int64", table, "table")


def _check_same(name: str, x: Tensor, x_proj: Tensor, x_name: str = "x_proj") -> None:
    """`x` is a real tensor of x_proj's precision class and on its device."""
    _check_tensor(name, x)
    if x.is_complex():
        raise TypeError(
            f"{name}: must be planar real, got {x.dtype}; convert with "
            "torch.cat((x.real, x.imag), -1)"
        )
    allowed = {_state_dtype(x_proj), x_proj.dtype}
    if x.dtype not in allowed:
        names = " or ".join(sorted(str(d) for d in allowed))
        raise TypeError(f"{name}: must be {names} with {x_name} of {x_proj.dtype}, got {x.dtype}")
    if x.device != x_proj.device:
        raise ValueError(f"{name}: is on {x.device} but {x_name} is on {x_proj.device}; move one")


def _say_once(message: str) -> None:
    if not torch.compiler.is_compiling() and message not in _said:
        _said.add(message)
        _logger.info(message)


# Where the ops cannot run: torch.func and forward mode look into plain operations only


def why_not_op() -> str | None:
    """Why a call must be a loop of plain operations, in one sentence; None: the op may run."""
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func (vmap, grad, jvp, …) sees into plain operations only"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation sees into plain operations only"
    if torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
        return "ONNX has plain operations only"
    return None


def takes_loop(op: str, x_proj: Tensor, backend: str) -> bool:
    """Whether `op` must run as a loop of plain operations; says so once, or raises as told."""
    reason = why_not_op()
    if reason is not None and backend != "torch":
        choose_triton(op, x_proj, backend, reason)
    return reason is not None


def run_loop(loop, x_proj: Tensor, *args):
    """`loop(x_proj, *args)`, under autocast by the rule of the ops."""
    device = x_proj.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return under_autocast(loop, device, x_proj, *args)
    return loop(x_proj, *args)


def refuse_forward_mode(function: str, *cotangents: Tensor | None) -> None:
    """Raise where an op would drop tangents: that of a result in a forward pass (no cotangents are
    given), or those of its cotangents in a backward pass."""
    duals = (forward_ad.unpack_dual(d).tangent for d in cotangents if d is not None)
    if forward_ad._current_level >= 0 and (not cotangents or any(t is not None for t in duals)):
        raise RuntimeError(
            f"{function}: forward-mode differentiation does not go through its op; call {function} "
            "itself inside of torch.func.jvp or forward_ad.dual_level(), where it is a loop of "
            "plain operations"
        )


def refuse_second_derivatives(function: str, backward_op) -> None:
    """Let a backward pass through `backward_op` raise in words."""

    def refuse(ctx, *grads):
        raise RuntimeError(
            f"{function}: its op is differentiable once; for second derivatives use torch.func "
            "(hessian, or jvp, jacfwd or jacrev of grad), under which it is a loop of plain "
            "operations, or call its loop in kru_triton.reference"
        )

    backward_op.register_autograd(refuse)


# The ops. Time-first results: (T, B, F) is what the loop writes and what costs no copy.
# With tokens, x_proj is the table (V, F).


@torch.library.custom_op("kru_triton::scan", mutates_args=())
def _scan(
    x_proj: Tensor,
    a: Tensor,
    b: Tensor,
    beta: Tensor | None,
    h_0: Tensor | None,
    reset: Tensor | None,
    lengths: Tensor | None,
    tokens: Tensor | None,
    nonlinearity: str,
    backend: str,
    precision: str,
) -> tuple[Tensor, Tensor]:
    refuse_forward_mode("kru_scan")
    return run_scan(
        *(x_proj, a, b, beta, h_0, reset, lengths, tokens, nonlinearity, backend, precision)
    )


def run_scan(
    x_proj, a, b, beta, h_0, reset, lengths, tokens, nonlinearity, backend, precision
) -> tuple[Tensor, Tensor]:
    """What the op computes, on the backend that it takes."""
    _check_places(x_proj, lengths, tokens)
    batch, time = (x_proj if tokens is None else tokens).shape[:2]
    like_x = x_proj if tokens is None else x_proj.new_empty(1).expand(batch, time, x_proj.shape[1])
    args = (x_proj, a, b, beta, h_0, reset)
    if not _on_triton(like_x, *args[1:], lengths, nonlinearity, backend, precision):
        return torch_backend.scan_forward(*args, nonlinearity, lengths, tokens)
    from kru_triton.kernels.scan import scan_forward

    options = {"nonlinearity": nonlinearity, "precision": _kernel_precision(x_proj, precision)}
    with _way_out():
        h = scan_forward(*args, lengths, tokens=tokens, **options)
    return h, reference.last_state(h, a.dtype, h_0, lengths)


def _on_triton(x_proj, a, b, beta, h_0, reset, lengths, nonlinearity, backend, precision) -> bool:
    """Choose the backend of one call: the kernels on a GPU wherever they can run, or as told."""
    if backend == "torch":
        return False
    reason = _why_not(x_proj, a, b, beta, h_0, reset, lengths, nonlinearity, precision)
    return choose_triton("kru_scan", x_proj, backend, reason)


def choose_triton(op: str, x_proj: Tensor, backend: str, reason: str | None) -> bool:
    """Whether `op` runs on the kernels, given why they cannot; says so once, or raises as told."""
    if backend == "auto" and x_proj.device.type == "cpu":  # the interpreter runs when asked for
        reason = reason or "the tensors are on the CPU"
    if backend == "triton" and reason is not None:
        raise RuntimeError(f'backend="triton" cannot run here: {reason}')
    _say_once(
        f"{op} runs on the triton backend"
        if reason is None
        else f"{op} runs on the torch backend: {reason}"
    )
    return reason is None


@contextlib.contextmanager
def _way_out():
    """Errors of the kernels, of their compilation say, name what works without them."""
    try:
        yield
    except Exception as error:
        error.add_note(
            'raised by the fused kernels; backend="torch" computes the same without them'
        )
        raise


def _check_places(x_proj: Tensor, lengths: Tensor | None, tokens: Tensor | None) -> None:
    if lengths is not None:
        time = (x_proj if tokens is None else tokens).shape[1]
        check_values("lengths", lengths, 0, time, "the steps of a row")
    if tokens is not None:
        check_values("tokens", tokens, 0, x_proj.shape[0] - 1, "rows of the table")


def check_values(name: str, x: Tensor, low: int, high: int, meaning: str) -> None:
    """low <= x <= high: at once on a CPU; elsewhere the device asserts it and nothing waits."""
    if torch.compiler.is_compiling():  # a loop of plain operations: there are no values yet
        return
    while torch._C._functorch.is_functorch_wrapped_tensor(x):  # of all samples at once
        x = torch._C._functorch.get_unwrapped(x)
    rule = f"{name}: must be from {low} to {high} ({meaning})"
    if x.device.type != "cpu":
        torch._assert_async(((x >= low) & (x <= high)).all(), rule)
    elif x.numel() and not (low <= x.min() and x.max() <= high):
        raise ValueError(f"{rule}, got values from {x.min()} to {x.max()}")


@_scan.register_fake
def _(x_proj, a, b, beta, h_0, reset, lengths, tokens, nonlinearity, backend, precision):
    batch, time = (x_proj if tokens is None else tokens).shape[:2]
    features = x_proj.shape[-1]
    return x_proj.new_empty(time, batch, features), a.new_empty(batch, features)


@torch.library.custom_op("kru_triton::scan_backward", mutates_args=())
def _scan_backward(
    dh: Tensor | None,
    dh_n: Tensor | None,
    h: Tensor,
    x_proj: Tensor | None,
    a: Tensor,
    b: Tensor,
    beta: Tensor | None,
    h_0: Tensor | None,
    reset: Tensor | None,
    lengths: Tensor | None,
    tokens: Tensor | None,
    nonlinearity: str,
    backend: str,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    refuse_forward_mode("kru_scan", dh, dh_n)
    return run_scan_backward(
        *(dh, dh_n, h, x_proj, a, b, beta, h_0, reset, lengths, tokens),
        *(nonlinearity, backend, precision),
    )


def run_scan_backward(
    dh, dh_n, h, x_proj, a, b, beta, h_0, reset, lengths, tokens, nonlinearity, backend, precision
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    args = (a, b, beta, h_0, reset)
    source = x_proj if nonlinearity == "modtanh" else None
    if _on_triton(h.transpose(0, 1), *args, lengths, nonlinearity, backend, precision):
        from kru_triton.kernels.scan import scan_backward
        from kru_triton.kernels.weight_grad import weight_grad

        options = {"nonlinearity": nonlinearity, "precision": _kernel_precision(h, precision)}
        with _way_out():
            dx, dh_0 = scan_backward(dh, dh_n, h, source, *args, lengths, tokens=tokens, **options)
            da, db, d_beta = weight_grad(dx, h, a, b, h_0, reset, **options)
        d_beta = a.new_zeros(h.shape[2] // a.shape[0]) if d_beta is None else d_beta
        dh_0 = a.new_zeros(h.shape[1:]) if dh_0 is None else dh_0
        if lengths is not None and dh_n is not None:  # a row without a step hands it on
            dh_0 = torch.where(lengths[:, None] > 0, dh_0, dh_n.to(dh_0.dtype))
    else:
        dx, da, db, d_beta, dh_0 = torch_backend.scan_backward(
            dh, dh_n, h, source, *args, nonlinearity, lengths, tokens
        )
    if tokens is not None:  # sums in a fixed order, which index_add does not
        dx = torch.ops.aten.embedding_dense_backward(
            dx.to(a.dtype), tokens.t(), x_proj.shape[0], -1, False
        ).to(x_proj.dtype)
    return dx, da, db, d_beta, dh_0


@_scan_backward.register_fake
def _(
    dh, dh_n, h, x_proj, a, b, beta, h_0, reset, lengths, tokens, nonlinearity, backend, precision
):
    units = a.shape[1] * a.shape[2] * b.shape[2]
    like_x = h if tokens is None else x_proj
    return (
        torch.empty_like(like_x, memory_format=torch.contiguous_format),
        torch.empty_like(a, memory_format=torch.contiguous_format),
        torch.empty_like(b, memory_format=torch.contiguous_format),
        a.new_empty(units),
        a.new_empty(h.shape[1:]),
    )


def _setup_context(ctx, inputs, output):
    x_proj, a, b, beta, h_0, reset, lengths, tokens, *ctx.options = inputs
    if ctx.options[0] != "modtanh" and tokens is None:  # the others are inverted from h
        x_proj = None
    ctx.save_for_backward(output[0], x_proj, a, b, beta, h_0, reset, lengths, tokens)
    ctx.set_materialize_grads(False)


def _backward(ctx, dh, dh_n):
    if dh is None and dh_n is None:
        return (None,) * 11
    refuse_forward_mode("kru_scan", dh, dh_n)
    h, x_proj, a, b, beta, h_0, reset, lengths, tokens = ctx.saved_tensors
    dx, da, db, d_beta, dh_0 = _scan_backward(
        dh, dh_n, h, x_proj, a, b, beta, h_0, reset, lengths, tokens, *ctx.options
    )
    dx = dx.transpose(0, 1) if tokens is None else dx
    d_beta = None if beta is None else d_beta
    dh_0 = None if h_0 is None else dh_0
    return dx, da, db, d_beta, dh_0, None, None, None, None, None, None


_scan.register_autograd(_backward, setup_context=_setup_context)
refuse_second_derivatives("kru_scan", _scan_backward)


def under_autocast(op, device_type: str, x_proj: Tensor, *args):
    """`op` of x_proj in the autocast dtype; weights and state keep their precision."""
    with torch.autocast(device_type, enabled=False):
        if x_proj.dtype != torch.float64:
            x_proj = x_proj.to(torch.get_autocast_dtype(device_type))
        return op(x_proj, *args)


def register_autocast(name: str, op, backward) -> None:
    def register(device_type: str) -> None:
        def forward_rule(*args):
            return under_autocast(op, device_type, *args)

        def backward_rule(*args):  # where backward() is called under autocast
            with torch.autocast(device_type, enabled=False):
                return backward(*args)

        key = f"Autocast{device_type.upper()}"
        _library.impl(name, forward_rule, key)
        _library.impl(f"{name}_backward", backward_rule, key)

    register("cpu")
    register("cuda")


_library = torch.library.Library("kru_triton", "FRAGMENT")
register_autocast("scan", _scan, _scan_backward)
