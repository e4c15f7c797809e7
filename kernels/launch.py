"""What the launchers share: where rows lie in memory, flags as words of bits, tokens, adjoints."""

import contextlib

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from kru_triton import kronecker
from kru_triton.ops.arguments import LSTMScan, Scan
from kru_triton.torch_backend.rows import past_end

from .geometry import Tile, Wide
from .tile import INTERPRET


def device_guard(x):
    """Launches go to the current device: make it the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def on_nvidia() -> bool:
    """Whether kernels are compiled for NVIDIA devices (and not for AMD's or interpreted)."""
    return torch.version.hip is None and not INTERPRET.value


def architecture() -> int:
    """Compute capability that kernels are compiled for, 90 of 9.0; where not for NVIDIA, any."""
    return driver.active.get_current_target().arch if on_nvidia() else 0


def aligned_rows(x, tile, dims=(0, 1)):
    """x itself if the kernels can read its rows where they lie, else a contiguous copy."""
    unit = tile.aligned
    strides_fit = all(x.stride(d) % unit == 0 or x.shape[d] == 1 for d in dims)
    if x.stride(-1) == 1 and strides_fit and x.data_ptr() % 16 == 0:
        return x
    return x.contiguous() if not x.is_contiguous() else x.clone()


def packed(x):
    """x contiguous and aligned to 16 bytes, as the kernels are compiled for; None stays None."""
    if x is None or (x.is_contiguous() and x.data_ptr() % 16 == 0):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def whole_groups(x, rows):
    """(B, ...) as (groups, rows, ...): the last row repeated, as the kernels repeat it."""
    groups = triton.cdiv(x.shape[0], rows)
    i_row = torch.arange(groups * rows, device=x.device).clamp(max=x.shape[0] - 1)
    return x[i_row].unflatten(0, (groups, rows))


def row_words(flags: Tensor, rows: int) -> Tensor:
    """Flags (T, B) as words (T, groups) that hold one bit for each row of a group."""
    bits = torch.arange(rows, device=flags.device)[:, None]
    words = (whole_groups(flags.t(), rows).long() << bits).sum(1)
    return words.t().to(torch.int32).contiguous()


def group_flags(
    scan: Scan | LSTMScan, T: int, rows: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Words of the rows that keep their state and of those still alive, and steps of each group."""
    keep = alive = steps = None
    if scan.reset is not None:
        keep = row_words(~scan.reset, rows)
    if scan.lengths is not None:
        lengths = scan.lengths.clamp(0, T)
        steps = whole_groups(lengths, rows).amax(1).to(torch.int32)
        if rows > 1:
            alive = row_words(~past_end(T, lengths), rows)
    return keep, alive, steps


def last_rows(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Rows (B, ...) of x (T, B, ...) at each row's last step; of a row without one, any."""
    if lengths is None:
        return x[-1]
    return x[lengths.clamp(1, x.shape[0]) - 1, torch.arange(x.shape[1], device=x.device)]


def token_words(tokens: Tensor, table: Tensor) -> Tensor:
    """Tokens (T, B) as the kernels read them, int32, none outside the table."""
    inside = (tokens >= 0) & (tokens < table.shape[0])
    torch._assert_async(inside.all(), f"a token is outside the table's {table.shape[0]} rows")
    return tokens.clamp(0, table.shape[0] - 1).to(torch.int32).contiguous()


def input_arguments(x: Tensor, tokens: Tensor | None, tile: Tile | Wide) -> dict:
    """The kernels' arguments that say where the rows of the input (T, B, F), or table, lie."""
    if tokens is None:
        x = aligned_rows(x, tile)
        strides = (x.stride(0), x.stride(1))
    else:
        tokens = token_words(tokens, x)
        x = aligned_rows(x, tile, dims=(0,))
        strides = (0, x.stride(0))
    return {
        "p_x": x,
        "p_tokens": tokens,
        "x_stride_t": strides[0] // tile.aligned,
        "x_stride_b": strides[1] // tile.aligned,
    }


def floor_of(dtype) -> float:
    """Least |z|/|h| that a state in this type of memory can tell (modReLU inverts h)."""
    return 2.0**-8 if dtype == torch.bfloat16 else 2.0**-20


def adjoint(w: Tensor) -> Tensor:
    """Conjugate transpose of planar factors (parts, H, side, side)."""
    return packed(kronecker.adjoint(w))
