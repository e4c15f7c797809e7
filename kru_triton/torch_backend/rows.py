"""Rows of different length: what lies beyond their ends, and who computes them.

A row without a step hands its state on: its last state is the one it began with, and backward the
gradient of the last state is that of the first.

T time, B batch, F features.
"""

import torch
from torch import Tensor

from kru_triton.ops.arguments import Scan


def past_end(time: int, lengths: Tensor) -> Tensor:
    """`(T, B)`, True behind the last step of a row."""
    return torch.arange(time, device=lengths.device)[:, None] >= lengths


def last_state(h: Tensor, dtype: torch.dtype, h_0: Tensor | None, lengths: Tensor | None) -> Tensor:
    """The last of each row's states `h (T, B, F)` in a dtype; h_0 for a row without a step."""
    time, batch, features = h.shape
    start = h.new_zeros(batch, features, dtype=dtype) if h_0 is None else h_0
    if time == 0:
        return start.clone()
    if lengths is None:
        return h[-1].to(dtype, copy=True)
    ends = h[(lengths - 1).clamp_min(0), torch.arange(batch, device=h.device)].to(dtype)
    return torch.where(lengths[:, None] > 0, ends, start)


def handed_on(d_first: Tensor, d_last: Tensor | None, lengths: Tensor | None, time: int) -> Tensor:
    """The gradient `(B, F)` of the first states; for a row without a step that of its last state,
    zero if None."""
    if lengths is None and time:
        return d_first
    d_last = torch.zeros_like(d_first) if d_last is None else d_last.to(d_first.dtype)
    return d_last.clone() if lengths is None else torch.where(lengths[:, None] > 0, d_first, d_last)


def descending(lengths: Tensor) -> bool:
    """Whether no row is longer than the one before it."""
    return bool((lengths[1:] <= lengths[:-1]).all())


def by_length(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The order of rows by descending length, and the order that undoes it."""
    order = lengths.argsort(descending=True, stable=True)
    return order, order.argsort()


def in_order(scan: Scan, order: Tensor) -> Scan:
    """The rows of `scan` in another order."""
    x, a, b, beta, h_0, reset, lengths, tokens, gate = scan
    if x is not None and tokens is None:
        x = x[:, order]
    reset, tokens, gate = (None if v is None else v[:, order] for v in (reset, tokens, gate))
    h_0, lengths = (None if v is None else v[order] for v in (h_0, lengths))
    return Scan(x, a, b, beta, h_0, reset, lengths, tokens, gate)


def intervals(batch: int, time: int, lengths: Tensor | None) -> list[tuple[int, int, int]]:
    """`(start, end, rows)`: the times in which the same leading rows run; lengths descend."""
    if not batch * time:
        return []
    parts, start = [], 0
    for i, end in enumerate([time] if lengths is None else lengths.flip(0).tolist()):
        if end > start:
            parts.append((start, end, batch - i))
            start = end
    return parts


def interval(scan: Scan, start: int, end: int, rows: int) -> Scan:
    """The part of `scan` that the steps from `start` to `end` of its leading rows read."""
    place = slice(start, end), slice(rows)
    x = scan.x if scan.x is None or scan.tokens is not None else scan.x[place]
    reset, tokens, gate = (
        None if v is None else v[place] for v in (scan.reset, scan.tokens, scan.gate)
    )
    return scan._replace(x=x, reset=reset, tokens=tokens, gate=gate)
