"""Where documents start: read from attention masks, position ids and packed bounds.

B batch, T tokens of this call.
"""

from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from kru_triton.hf.cache import KRUCache

# Other words for where packed documents start, as collators add them to position ids
PACKED = ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def read_mask(
    mask: Tensor, batch: int, time: int, cache: KRUCache | None
) -> tuple[Tensor, bool, Tensor, Tensor | None]:
    """What an attention mask says of these tokens: `start (B, T)`, True at the first token of a
    row; whether a row ends in padding; `started (B,)`, whether a row has seen a token; and the
    `order (B, T)` that puts all padding first, for which `start` is, if there is some in between.

    Compiled, a mask is trusted: its values are not looked at, and no row ends in padding."""
    seen = 0 if cache is None else cache.seen
    if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] not in (time, seen + time):
        raise ValueError(
            f"attention_mask: must be ({batch}, {time}) or, with what was read before, "
            f"({batch}, {seen + time}), got {tuple(mask.shape)}"
        )
    mask = mask[:, -time:].bool()
    if seen == 0:
        started = mask.new_zeros(batch)
    else:
        started = mask.new_ones(batch) if cache.started is None else cache.started
    real = (mask.cumsum(1) > 0) | started[:, None]  # this token or one before it is one
    before = torch.cat((started[:, None], real[:, :-1]), 1)
    previous = torch.cat((started[:, None], mask[:, :-1]), 1)
    start = mask & ~before
    if torch.compiler.is_compiling():
        return start, False, real[:, -1], None
    holes = (mask & before & ~previous).any(1)
    if (holes & started).any():
        row = int((holes & started).nonzero()[0])
        raise ValueError(
            f"attention_mask: row {row} has padding between its tokens and those that the cache "
            "has read; a recurrent state would read it, so pad on the left only"
        )
    padded_right, order = bool((real[:, -1] & ~mask[:, -1]).any()), None
    if holes.any():
        order = mask.byte().argsort(dim=1, stable=True)
        start = read_mask(ordered(mask, order), batch, time, cache)[0]
    if cache is None and not real[:, -1].all():
        row = int((~real[:, -1]).nonzero()[0])
        raise ValueError(
            f"attention_mask: row {row} is padding alone; an empty prompt starts with the BOS token"
        )
    return start, padded_right, real[:, -1], order


def ordered(x: Tensor, order: Tensor) -> Tensor:
    """What `x (B, T, ...)` has at the places `order (B, T)` of each row."""
    return x[torch.arange(len(x), device=x.device)[:, None], order]


def read_documents(
    position_ids: Tensor | None,
    packed: dict[str, Any],  # tensors, numbers or None
    mask: Tensor | None,
    batch: int,
    time: int,
    cache: KRUCache | None,
) -> Tensor | None:
    """`(B, T)`, True where a document starts; None where no argument says so.

    Compiled, they are trusted: values are not looked at."""
    found, real = {}, None if mask is None else mask[:, -time:].bool()
    if position_ids is not None:
        found["position_ids"] = _read_position_ids(position_ids, real, batch, time)
    for name, value in packed.items():
        if name not in PACKED:
            raise TypeError(f"{name}: no argument of KRUModel.forward")
        if value is None or name.startswith("max_length"):
            continue
        if name == "seq_idx":
            numbers = _one_per_token(name, value, batch, time)
            found[name] = nnf.pad(numbers[:, 1:] != numbers[:, :-1], (1, 0), value=True)
        else:
            found[name] = _read_bounds(name, value, batch, time)
    if not found:
        return None
    (first, start), *others = found.items()
    if position_ids is None and cache is not None and cache.state is not None:
        raise ValueError(
            f"{first}: does not say whether the first token goes on with what the cache has read; "
            "give position_ids, which start a document with 0"
        )
    for name, other in others:
        differ = (start != other)[:, 1:]
        differ = differ if real is None else differ & real[:, 1:]
        if not torch.compiler.is_compiling() and differ.any():
            row, place = (int(i) for i in differ.nonzero()[0])
            raise ValueError(
                f"{name}: disagrees with {first} on whether token {place + 1} of row {row} starts "
                "a document; give one of them"
            )
    return start


def _one_per_token(name: str, numbers: Tensor, batch: int, time: int) -> Tensor:
    if numbers.dim() != 2 or numbers.shape[0] not in (1, batch) or numbers.shape[1] != time:
        raise ValueError(
            f"{name}: must be ({batch}, {time}), one for each token, or (1, {time}) for all rows, "
            f"got {tuple(numbers.shape)}"
        )
    return numbers.expand(batch, time)


def _read_position_ids(ids: Tensor, real: Tensor | None, batch: int, time: int) -> Tensor:
    ids = _one_per_token("position_ids", ids, batch, time)
    start = ids == 0
    jumps = ~start[:, 1:] & (ids[:, 1:] != ids[:, :-1] + 1)
    if real is not None:  # between two tokens: the first one of a row may have any id
        jumps = jumps & real[:, 1:] & real[:, :-1]
    if not torch.compiler.is_compiling() and jumps.any():
        row, place = (int(i) for i in jumps.nonzero()[0])
        before, after = ids[row, place : place + 2].tolist()
        raise ValueError(
            f"position_ids: row {row} goes from {before} to {after} at token {place + 1}; they "
            "must count up by one within a document, and start the next one with 0"
        )
    return start


def _read_bounds(name: str, bounds: Tensor, batch: int, time: int) -> Tensor:
    """`(B, T)`, True at all bounds but the last, in rows one after the other."""
    if bounds.dim() != 1:
        raise ValueError(f"{name}: must be (documents + 1,), got {tuple(bounds.shape)}")
    start = torch.zeros(batch * time + 1, dtype=torch.bool, device=bounds.device)
    if not torch.compiler.is_compiling():
        ends = bounds[:1].tolist() + bounds[-1:].tolist()
        if ends != [0, batch * time] or (bounds.diff() < 0).any():
            raise ValueError(
                f"{name}: must count up from 0 to {batch * time}, the tokens of the batch, got "
                f"{bounds.tolist()}"
            )
    start[bounds.long()] = True
    return start[:-1].view(batch, time)
