"""Batches of tokens from text in memory, and what they share with those of streams.

A document's tokens are `BOS t1 t2 ... tn`: with the `bytes` tokenizer 256 byte values, and BOS is
256. All documents in a row, each behind its BOS, are one long array. The model reads token i and
predicts token i + 1; where it reads BOS, `reset` is True and its state starts from zero. So the
first token of a document is predicted from BOS alone, and after the last token of a document the
next BOS is predicted: the model also learns where documents end. Bits per byte counts the targets
that are no BOS, and divides by bytes: each byte of each validation document exactly once.
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch

from kru_triton.train.run.settings import UserError
from kru_triton.train.text.documents import Document
from kru_triton.train.text.tokenizer import ByteTokenizer, FileTokenizer, token_dtype

PANEL = 8192  # tokens per lane that are read at a time, or one segment


class Batches(Protocol):
    """Training batches of one rank, endless: those in memory, and those of streams.

    Row k of every batch is *lane* k: it goes on with the text where it was in the batch before, so
    that the model's state can be carried. `--batch-size` is the number of lanes of a rank.

    What they promise of the number of ranks differs: in memory it may change as long as the lanes
    of all ranks together stay, for a position is one number for all of them; a stream deals its
    documents to the ranks, so their number must stay.
    """

    waited: float  # seconds that `next` has waited for data

    def next(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Inputs, targets (int64) and reset (bool), each (batch_size, segment_length)."""

    def state(self) -> dict:
        """The position before the next batch, for a checkpoint: JSON."""

    def load_state(self, state: dict) -> None:
        """Go on at a position; ValueError where it is of other data or another shape."""

    def epochs_read(self) -> float:
        """How many times the text has been read."""

    def counts(self) -> dict[str, int]:
        """What has been read and left out, where the statistics of the data do not say it."""

    def close(self) -> None:
        """End what runs in the background."""


def join(tokenizer, texts: list[bytes]) -> tuple[np.ndarray, list[int]]:
    """Tokens of documents in a row, each behind its BOS; where each starts, and the end."""
    documents = tokenizer.encode_batch(texts)
    starts = [0]
    for document in documents:
        starts.append(starts[-1] + 1 + len(document))
    tokens = np.empty(starts[-1], token_dtype(tokenizer))
    tokens[starts[:-1]] = tokenizer.bos
    for start, document in zip(starts, documents):
        tokens[start + 1 : start + 1 + len(document)] = document
    return tokens, starts


class TokenArray:
    """Documents as one array of tokens, each document behind its BOS."""

    def __init__(self, documents: list[Document], tokenizer: ByteTokenizer | FileTokenizer):
        self.bos = tokenizer.bos
        self.tokens, starts = join(tokenizer, [text for _, text in documents])
        self.starts = np.array(starts)  # of each document, and the end
        self.num_bytes = sum(len(text) for _, text in documents)

    def __len__(self) -> int:
        return len(self.tokens)


class MemoryBatches:
    """Endless batches of training text: each lane reads its own contiguous part of the stream.

        documents of an epoch, permuted   |---- lane 0 ----|---- lane 1 ----|---- lane 2 ----|
        next()                             ==>              ==>              ==>

    With L tokens and B lanes (of all ranks together), lane k reads [k L // B, (k + 1) L // B) of
    epoch 0, then of epoch 1, and so on: every token is a target exactly once per epoch. `reset`
    marks document starts and the start of each part (a part may begin inside a document; what came
    before is in another lane). Rank r of W holds lanes [r B / W, (r + 1) B / W), so W may change
    while B stays. All lanes have read equally many tokens at any time, so the whole position is
    that one number.
    """

    waited = 0.0  # everything is in memory

    def __init__(
        self,
        stream: TokenArray,
        batch_size: int,
        segment_length: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.num_lanes = batch_size * world_size
        if len(stream) < 2 * self.num_lanes:
            raise UserError(
                f"{len(stream)} training tokens are too few for {self.num_lanes} lanes; lower "
                "--batch-size or add text"
            )
        self.stream, self.segment_length, self.seed = stream, segment_length, seed
        lanes = range(rank * batch_size, (rank + 1) * batch_size + 1)
        self.cuts = [lane * len(stream) // self.num_lanes for lane in lanes]
        self.position = 0  # tokens that each lane has read
        longest = min(PANEL, len(stream) // self.num_lanes)  # that is read at a time
        self.panel_length = segment_length * max(1, longest // segment_length)
        self.panel_begin = -self.panel_length  # nothing yet
        self.orders = {}  # epoch -> order of documents, and their starts in it; the last two

    def next(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Inputs, targets (int64) and reset (bool), each (batch_size, segment_length)."""
        begin = self.position - self.panel_begin
        if not 0 <= begin < self.panel_length:
            self.panel, self.panel_begin, begin = self.fill(), self.position, 0
        self.position += self.segment_length
        inputs, targets, reset = (p[:, begin : begin + self.segment_length] for p in self.panel)
        inputs, targets = (torch.from_numpy(p.astype(np.int64)) for p in (inputs, targets))
        return inputs, targets, torch.from_numpy(reset.copy())

    def fill(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Inputs, targets and reset of the next segments, each (batch_size, panel_length)."""
        shape = len(self.cuts) - 1, self.panel_length
        inputs, targets = (np.empty(shape, self.stream.tokens.dtype) for _ in range(2))
        reset = np.zeros(shape, bool)
        for lane, (begin, end) in enumerate(zip(self.cuts, self.cuts[1:])):
            done = 0
            while done < self.panel_length:
                epoch, offset = divmod(self.position + done, end - begin)
                count = min(self.panel_length - done, end - begin - offset)
                tokens = self.read(epoch, begin + offset, count + 1)
                inputs[lane, done : done + count] = tokens[:-1]
                targets[lane, done : done + count] = tokens[1:]
                reset[lane, done] = offset == 0
                done += count
        reset |= inputs == self.stream.bos
        return inputs, targets, reset

    def read(self, epoch: int, begin: int, count: int) -> np.ndarray:
        """`count` tokens of an epoch's stream from `begin` on; one BOS follows its last token."""
        order, starts = self.epoch_order(epoch)
        pieces, at, end = [], begin, min(begin + count, len(self.stream))
        index = int(np.searchsorted(starts, begin, side="right")) - 1
        while at < end:
            source = self.stream.starts[order[index]] + at - starts[index]
            length = min(end, starts[index + 1]) - at
            pieces.append(self.stream.tokens[source : source + length])
            at, index = at + length, index + 1
        if begin + count > len(self.stream):
            pieces.append(np.array([self.stream.bos], self.stream.tokens.dtype))
        return np.concatenate(pieces)

    def epoch_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if epoch not in self.orders:
            lengths = np.diff(self.stream.starts)
            order = np.random.default_rng([self.seed, epoch]).permutation(len(lengths))
            if len(self.orders) == 2:
                self.orders.pop(min(self.orders))
            self.orders[epoch] = order, np.concatenate(([0], np.cumsum(lengths[order])))
        return self.orders[epoch]

    def epochs_read(self) -> float:
        """How many times the text has been read."""
        return self.position * self.num_lanes / len(self.stream)

    def counts(self) -> dict[str, int]:
        """Nothing beyond the statistics."""
        return {}

    def state(self) -> dict:
        tokens = len(self.stream)
        return {"position": self.position, "lanes": self.num_lanes, "tokens": tokens}

    def load_state(self, state: dict) -> None:
        if state["lanes"] != self.num_lanes:
            raise ValueError(
                f"its {state['lanes']} lanes are {self.num_lanes} now; keep processes times "
                "--batch-size as it was"
            )
        if state["tokens"] != len(self.stream):
            raise ValueError(
                f"its text has {state['tokens']} tokens, this one {len(self.stream)}: other data "
                "or another tokenizer"
            )
        self.position = state["position"]

    def close(self) -> None:
        """Nothing to end: everything is in memory."""


def validation_segments(
    stream: TokenArray, max_lanes: int, segment_length: int, warm_up: int = 512
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The validation stream, once: inputs, targets, reset and counted, each (lanes, time).

        |---- lane 0 ----|---- lane 1 ----|---- lane 2 ----|
                      ~~~              ~~~
                      read by the next lane too, not counted, to warm its state up

    `counted` is True for each byte of each document exactly once, and False for document ends,
    warm-up and padding.
    """
    last = len(stream) - 1  # nothing is to be predicted after the last token
    lanes = max(1, min(max_lanes, last // (8 * warm_up)))
    cuts = np.array([lane * last // lanes for lane in range(lanes + 1)])
    begins = np.maximum(cuts[:-1] - warm_up, 0)
    longest = int((cuts[1:] - begins).max())
    for offset in range(0, longest, segment_length):
        index = begins[:, None] + np.arange(offset, min(offset + segment_length, longest))
        inside = (index >= cuts[:-1, None]) & (index < cuts[1:, None])
        index = np.minimum(index, last - 1)
        inputs, targets = (stream.tokens[i].astype(np.int64) for i in (index, index + 1))
        counted = inside & (targets != stream.bos)
        yield tuple(map(torch.from_numpy, (inputs, targets, inputs == stream.bos, counted)))
