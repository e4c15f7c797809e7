"""What the ops take: a bag of tensors for each recurrence, a bag of choices, and every check.

The public functions and the layers hand their arguments to `scan_arguments` or `lstm_arguments`,
which check them and return the bag. From there on it goes whole, and time first, through dispatch,
loop and op down to both backends; only the schema of an op spells it out.

B batch, T time, H heads, c parts (2 complex, 1 real), P, Q sizes of the grouped factors A and B,
N = P·Q units of a head, F = c·H·N features, V rows of a table.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as nnf
from torch import Tensor

from kru_triton.kronecker import as_one_matrix, check_factors, group_factors, product_shape
from kru_triton.nonlinearity import NONLINEARITIES

Backend = Literal["auto", "triton", "torch"]
Precision = Literal["auto", "fp32", "bf16x2", "bf16"]
BACKENDS: tuple[str, ...] = get_args(Backend)
PRECISIONS: tuple[str, ...] = get_args(Precision)


class Scan(NamedTuple):
    """Tensors of the recurrence. An adjoint gets `x` None where it does not read it."""

    x: Tensor  # (T, B, F), or with tokens the table (V, F); any strides of T and B
    a: Tensor  # (c, H, P, P)
    b: Tensor  # (c, H, Q, Q)
    beta: Tensor | None = None  # (H·N,)
    h_0: Tensor | None = None  # (B, F)
    reset: Tensor | None = None  # (T, B) bool
    lengths: Tensor | None = None  # (B,) int64, from 0 to T
    tokens: Tensor | None = None  # (T, B) int64
    gate: Tensor | None = None  # (T, B, F), or (T, B, H·N) of real numbers; any strides of T and B


class LSTMScan(NamedTuple):
    """Tensors of the recurrence of an LSTM, F = H·N; gates lie in the order i, f, g, o."""

    x: Tensor  # (T, B, 4·F), any strides of T and B
    a: Tensor  # (4, H, P, P)
    b: Tensor  # (4, H, Q, Q)
    h_0: Tensor | None = None  # (B, F)
    c_0: Tensor | None = None  # (B, F)
    reset: Tensor | None = None  # (T, B) bool
    lengths: Tensor | None = None  # (B,) int64, from 0 to T


class How(NamedTuple):
    """Choices, as in `kru_scan`. The kernels get a precision that is not "auto"."""

    nonlinearity: str
    backend: str = "auto"
    precision: str = "auto"


def steps_and_rows(scan: Scan) -> tuple[int, int]:
    """T and B."""
    time, batch = (scan.x if scan.tokens is None else scan.tokens).shape[:2]
    return time, batch


def scan_arguments(
    x: Tensor,
    factors: Sequence[Tensor],
    beta: Tensor | None,
    h_0: Tensor | None,
    how: How,
    *,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
    tokens: Tensor | None = None,
    gate: Tensor | None = None,
    time_first: bool = False,
) -> Scan:
    """The bag of the arguments of `kru_scan`, or with tokens of `kru_embedding_scan`, whose table
    comes as `x`. With `time_first`, x and gate are `(T, B, F)` and tokens `(T, B)`; reset is
    `(B, T)` always.

    Raises:
        ValueError, TypeError: as `kru_scan`.
    """
    check_choice("nonlinearity", how.nonlinearity, NONLINEARITIES)
    check_choice("backend", how.backend, BACKENDS)
    check_choice("precision", how.precision, PRECISIONS)
    name = "x_proj" if tokens is None else "table"
    _check_input(x, tokens, name)
    parts, heads, units = _check_factors(factors, x, name)
    first, second = (x if tokens is None else tokens).shape[:2]
    batch, time = (second, first) if time_first else (first, second)
    if beta is not None:
        if how.nonlinearity != "modrelu":
            raise ValueError(f'beta: only "modrelu" has one; leave it out for "{how.nonlinearity}"')
        check_same("beta", beta, x, name)
        check_shape("beta", beta, (heads * units,), "one per unit, (H·N,)")
    if h_0 is not None:
        check_same("h_0", h_0, x, name)
        check_shape("h_0", h_0, (batch, parts * heads * units), "(B, parts·H·N)")
    if gate is not None:
        check_same("gate", gate, x, name)
        rows = (time, batch) if time_first else (batch, time)
        meaning = f"({'T, B' if time_first else 'B, T'}, parts·H·N)"
        if tuple(gate.shape) != (*rows, heads * units):  # real
            check_shape("gate", gate, (*rows, parts * heads * units), f"{meaning}, real: H·N")
    if reset is not None:
        check_shape("reset", reset, (batch, time), "(B, T)")
        check_kind("reset", reset, "a bool", x, name)
    if lengths is not None:
        check_shape("lengths", lengths, (batch,), "steps of each row, (B,)")
        check_kind("lengths", lengths, "an int64", x, name)

    dtype = state_dtype(x)
    if how.nonlinearity == "modrelu" and beta is None:
        beta = x.new_zeros(heads * units, dtype=dtype)
    a, b = _grouped(factors, dtype)
    beta = None if beta is None else beta.to(dtype)
    h_0 = None if h_0 is None else h_0.to(dtype)
    reset = None if reset is None else reset.t()
    if not time_first:
        x = x.transpose(0, 1) if tokens is None else x
        tokens = None if tokens is None else tokens.t()
        gate = None if gate is None else gate.transpose(0, 1)
    return Scan(x, a, b, beta, h_0, reset, lengths, tokens, gate)


def lstm_arguments(
    x: Tensor,
    factors: Sequence[Tensor],
    h_0: Tensor | None,
    c_0: Tensor | None,
    how: How,
    *,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
    time_first: bool = False,
) -> LSTMScan:
    """The same for `kru_lstm_scan`: a real recurrence on 4·H heads, and what differs."""
    scan = scan_arguments(
        x, factors, None, None, how, reset=reset, lengths=lengths, time_first=time_first
    )
    parts, heads = factors[0].shape[:2]
    if parts != 1 or heads % 4:
        raise ValueError(
            "factors: must be real, (1, 4·H, P, Q) with the H heads of the gates i, f, g and o, "
            f"got {tuple(factors[0].shape)}"
        )
    for name, state in (("h_0", h_0), ("c_0", c_0)):
        if state is not None:
            check_same(name, state, x)
            check_shape(name, state, (scan.x.shape[1], x.shape[2] // 4), "(B, H·N)")
    a, b = (w.view(4, heads // 4, *w.shape[2:]) for w in (scan.a, scan.b))
    h_0, c_0 = (None if s is None else s.to(a.dtype) for s in (h_0, c_0))
    return LSTMScan(scan.x, a, b, h_0, c_0, scan.reset, lengths)


def _grouped(factors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A and B; a single matrix takes the place of B, beside a 1×1 identity."""
    a, b = group_factors([w.to(dtype) for w in factors])
    if a.shape[-1] == 1 or b.shape[-1] == 1:
        return as_one_matrix(a, b)
    return a, b


def state_dtype(x: Tensor) -> torch.dtype:
    """That of states, weights and sums, of an input in whatever type."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check_input(x: Tensor, tokens: Tensor | None, name: str) -> None:
    check_tensor(name, x)
    if x.is_complex():
        raise TypeError(
            f"{name}: must be planar real (all real parts, then all imaginary parts), got "
            f"{x.dtype}; convert with torch.cat((x.real, x.imag), -1)"
        )
    if x.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(
            f"{name}: must be float64, float32, bfloat16 or float16, got "
            f"{x.dtype}; convert with .float()"
        )
    shape = "(B, T, parts·H·N)" if tokens is None else "(V, parts·H·N)"
    if x.dim() != (3 if tokens is None else 2):
        raise ValueError(f"{name}: must be {shape}, got shape {tuple(x.shape)}")
    if tokens is not None:
        if tokens.dim() != 2:
            raise ValueError(f"tokens: must be (B, T), got shape {tuple(tokens.shape)}")
        check_kind("tokens", tokens, "an int64", x, "table")


def _check_factors(factors: Sequence[Tensor], x: Tensor, name: str) -> tuple[int, int, int]:
    """Parts, heads and units of a head."""
    factors = check_factors(factors)
    for f, w in enumerate(factors):
        if w.is_complex() or w.dim() != 4:
            raise TypeError(
                f"factors[{f}]: must be planar real (2, H, P, Q), or (1, H, P, Q) in the real field"
                f", got {w.dtype} of shape {tuple(w.shape)}; convert a complex (H, P, Q) factor "
                "with torch.stack((w.real, w.imag))"
            )
    check_same("factors", factors[0], x, name)
    parts, heads = factors[0].shape[:2]
    rows, columns = product_shape(factors)
    shapes = [tuple(w.shape[2:]) for w in factors]
    if rows != columns:
        raise ValueError(
            f"factors: rows multiply to {rows} and columns to {columns} (shapes {shapes}); "
            "both products must be N, the units per head"
        )
    if x.shape[-1] != parts * heads * rows:
        raise ValueError(
            f"{name}: the last dimension must be {parts}·{heads}·{rows} = {parts * heads * rows} "
            f"(parts · heads · product of the factor sizes {shapes}), got {x.shape[-1]}"
        )
    return parts, heads, rows


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    """Return `value`, or raise a ValueError that lists the valid choices."""
    if value not in choices:
        raise ValueError(f"{name}: must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def check_tensor(name: str, x: Tensor) -> None:
    """Raise a TypeError where `x` is something else."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: must be a tensor, got {type(x).__name__}")


def check_shape(name: str, x: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    """Raise where `x` is no tensor of that shape."""
    check_tensor(name, x)
    if tuple(x.shape) != shape:
        raise ValueError(f"{name}: must have shape {shape} ({meaning}), got {tuple(x.shape)}")


def check_kind(name: str, x: Tensor, kind: str, x_proj: Tensor, x_name: str) -> None:
    """`x` is "a bool" or "an int64" tensor on the input's device."""
    dtype, convert = {"a bool": (torch.bool, ".bool()"), "an int64": (torch.int64, ".long()")}[kind]
    if x.dtype != dtype:
        raise TypeError(f"{name}: must be {kind} tensor, got {x.dtype}; convert with {convert}")
    if x.device != x_proj.device:
        raise ValueError(f"{name}: is on {x.device} but {x_name} is on {x_proj.device}")


def check_same(name: str, x: Tensor, x_proj: Tensor, x_name: str = "x_proj") -> None:
    """Raise where `x` is no real tensor of x_proj's precision class and on its device."""
    check_tensor(name, x)
    if x.is_complex():
        raise TypeError(
            f"{name}: must be planar real, got {x.dtype}; convert with "
            "torch.cat((x.real, x.imag), -1)"
        )
    allowed = {state_dtype(x_proj), x_proj.dtype}
    if x.dtype not in allowed:
        names = " or ".join(sorted(str(d) for d in allowed))
        raise TypeError(f"{name}: must be {names} with {x_name} of {x_proj.dtype}, got {x.dtype}")
    if x.device != x_proj.device:
        raise ValueError(f"{name}: is on {x.device} but {x_name} is on {x_proj.device}; move one")


def check_lengths(lengths: Tensor | None, time: int) -> None:
    """Raise a ValueError where a row has fewer steps than 0 or more than T."""
    if lengths is not None:
        _check_values("lengths", lengths, 0, time, "the steps of a row")


def check_places(scan: Scan) -> None:
    """Raise a ValueError where a length is out of bounds or a token outside the table."""
    check_lengths(scan.lengths, steps_and_rows(scan)[0])
    if scan.tokens is not None:
        _check_tokens(scan.tokens, scan.x)


def rows_of(table: Tensor, tokens: Tensor) -> Tensor:
    """`table[tokens]`, with the error of the ops for a token outside."""
    try:
        return nnf.embedding(tokens, table)
    except IndexError:
        _check_tokens(tokens, table)
        raise


def _check_tokens(tokens: Tensor, table: Tensor) -> None:
    _check_values("tokens", tokens, 0, table.shape[0] - 1, "rows of the table")


def _check_values(name: str, x: Tensor, low: int, high: int, meaning: str) -> None:
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
