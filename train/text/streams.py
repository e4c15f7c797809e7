"""Batches from sources that are too large for memory, at a position that is exact and small.

    shards --> pieces --> 4 lines per rank --> blocks, shuffled, tokenised --> lanes --> batches
               dealt to ranks      (in worker processes)                   (in a thread)

**Who reads what.** The shards of a source are cut into equal pieces; each epoch deals them in a new
order to the ranks, and each rank's to its *lines*, which are read in turn, document by document.
So in an epoch every document is read by exactly one rank, once. Ranks that have fewer are an epoch
ahead of the others for a while; one that has none goes on to the next.

**Shuffling.** A line reads a *block*, the next `--shuffle-buffer` documents, and permutes it. The
order depends on `--seed` and on where the block begins; no buffer is ever saved.

**Several sources** are mixed document by document: the next one comes from the source that has
given the fewest tokens for its weight.

**Lanes.** A lane reads its document to the end, then the next document that there is. Lanes are
filled for `PANEL` tokens at a time, one panel ahead of the batches that are handed out.

**Position.** Where each line's block begins and how many of its documents are gone; which document
each lane is in, and how far; which segment of the panel comes next. Everything else is read again.
The order of documents depends on the data, the seed and the number of ranks only: `--workers` may
change whenever a run goes on.
"""

import collections
import hashlib
import json
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import NamedTuple

import numpy as np
import torch

from kru_triton.train.text.batches import PANEL, join
from kru_triton.train.text.held_out import is_held_out
from kru_triton.train.text.rows import START, Row, read_shard
from kru_triton.train.text.shards import DataError, Source
from kru_triton.train.text.tokenizer import ByteTokenizer, FileTokenizer, token_dtype

LINES = 4  # of each rank and source, where there are so many pieces
BLOCK_BYTES = 4 << 20  # a block ends here even if it has fewer documents

Offset = tuple[int, int]  # in a line: number of the piece, position in its shard


@dataclass(frozen=True)
class Plan:
    """All that the order of documents depends on."""

    sources: tuple[Source, ...]
    tokenizer: ByteTokenizer | FileTokenizer
    seed: int
    rank: int
    world_size: int
    buffer: int  # documents of a block
    hold_out: bool  # whether the held-out documents are left out

    def fingerprint(self) -> str:
        """A hash of everything here but the rank."""
        sources = [
            [source.weight, source.field, [[shard.name, shard.size] for shard in source.shards]]
            for source in self.sources
        ]
        content = [sources, self.tokenizer.sha256, self.seed, self.world_size, self.buffer]
        return hashlib.sha256(json.dumps([*content, self.hold_out]).encode()).hexdigest()[:16]


class Block(NamedTuple):
    """Documents of one line, shuffled, each behind its BOS."""

    tokens: np.ndarray
    starts: list[int]  # of each document in `tokens`, and the end
    places: list[Offset]  # shard and position of each document
    next: Offset | None  # where the line's next block begins; None: the line has ended
    counts: dict[str, int]  # documents, bytes, rows with each remark


# Who reads what


class Piece(NamedTuple):
    """A part of a shard: piece `number` of `count`."""

    shard: int
    number: int
    count: int


def lines_of_rank(plan: Plan, source: int, epoch: int) -> list[list[Piece]]:
    """The pieces that each line of a rank reads in an epoch."""
    shards, ranks = plan.sources[source].shards, plan.world_size
    splittable = all(s.kind != "text" and s.size is not None for s in shards)
    compressed = any(s.compression for s in shards)
    count = 1
    if splittable:
        readers = ranks if compressed else LINES * ranks  # a compressed file is read by each
        while len(shards) * count % readers and len(shards) * count < 16 * ranks:
            count += 1
    total = len(shards) * count
    order = np.random.default_rng([plan.seed, source, epoch]).permutation(max(total, ranks))
    mine = [Piece(*divmod(int(p), count), count) for p in order[plan.rank :: ranks] if p < total]
    lines = min(LINES, len(mine))
    return [mine[line::lines] for line in range(lines)]


# Reading blocks, in worker processes or in a thread


class Reader:
    """Reads the blocks of lines, and keeps what it has open for the next block of each."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.open = {}  # (source, line) -> epoch, position and documents after it
        self.warned = set()
        self.busy = False  # with a block

    def block(self, source: int, epoch: int, line: int, begin: Offset) -> Block:
        """The block of a line that begins at `begin`."""
        plan = self.plan
        at, documents = self.open.pop((source, line), (None, None))
        if at != (epoch, begin):
            pieces = lines_of_rank(plan, source, epoch)[line]
            documents = self.documents(source, pieces, begin)
        texts, places, size, after = [], [], 0, None
        counts = collections.Counter()
        for position, place, row in documents:
            if row.remark:
                counts[row.remark] += 1
                self.warn(source, place, row)
            if not row.text or (plan.hold_out and is_held_out(row.text)):
                continue
            texts.append(row.text)
            places.append(place)
            size += len(row.text)
            if len(texts) == plan.buffer or size >= BLOCK_BYTES:
                self.open[source, line] = (epoch, position), documents
                after = position
                break
        counts["documents"], counts["bytes"] = len(texts), size
        key = [plan.seed, plan.rank, source, epoch, line, begin[0], begin[1] - START]
        order = np.random.default_rng(key).permutation(len(texts))
        tokens, starts = join(plan.tokenizer, [texts[index] for index in order])
        return Block(tokens, starts, [places[index] for index in order], after, dict(counts))

    def warn(self, source: int, place: Offset, row: Row) -> None:
        """Say where the first row with a remark was, and why; the others are counted."""
        if row.remark not in self.warned:
            self.warned.add(row.remark)
            shard, at = place
            where = f"{self.plan.sources[source].shards[shard].url}: {row.remark} at {at}"
            print(f"warning: {where}: {row.why}; further ones are counted", file=sys.stderr)

    def documents(self, source: int, pieces: list[Piece], begin: Offset) -> Iterator:
        """(position after it, place, row) of each document of a line from `begin` on."""
        first, at = begin
        for number in range(first, len(pieces)):
            shard, piece, count = pieces[number]
            for row in read_shard(self.plan.sources[source], shard, at, piece, count):
                yield (number, row.next), (shard, row.at), row
            at = START

    def find(self, source: int, shard: int, positions: list[int]) -> list[np.ndarray]:
        """The tokens of the documents at some positions of a shard, each behind its BOS."""
        found, missing = {}, set(positions)
        for row in read_shard(self.plan.sources[source], shard, min(positions), 0, 1):
            if row.at in missing:
                found[row.at], _ = join(self.plan.tokenizer, [row.text])
                missing.remove(row.at)
                if not missing:
                    return [found[position] for position in positions]
        url = self.plan.sources[source].shards[shard].url
        raise DataError(url, f"no document at {min(missing)} any more, where the run has read one")


def start_worker(plan: Plan, alive: Connection) -> None:
    """Make a process a worker: it ends when `alive` closes, and leaves signals to its parent."""
    global reader
    reader = Reader(plan)
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to all processes of a group
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=end_with, args=(alive,), daemon=True).start()


def end_with(alive: Connection) -> None:
    """End this process when `alive` closes, also while it reads: it may wait for a server.

    Never while it sends a block to a parent that lives: half a message would let that one wait for
    the rest for ever.
    """
    wait([alive])
    while True:
        with reading:
            if reader.busy or not multiprocessing.parent_process().is_alive():
                os._exit(1)
        time.sleep(0.05)


reading = threading.Lock()  # held where a worker begins or ends to read


def work(*task) -> Block:
    with reading:
        reader.busy = True
    try:
        return reader.block(*task)
    finally:
        with reading:
            reader.busy = False


class Background:
    """A thread that does tasks in order. Unlike an executor's it does not hold up the exit."""

    def __init__(self):
        self.tasks, self.closed = queue.SimpleQueue(), False
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def submit(self, call: Callable, *arguments) -> Future:
        future = Future()
        if self.closed:
            future.cancel()
        else:
            self.tasks.put((future, call, arguments))
        return future

    def run(self) -> None:
        while (task := self.tasks.get()) is not None:
            future, call, arguments = task
            if self.closed:
                future.cancel()
                continue
            try:
                future.set_result(call(*arguments))
            except BaseException as error:  # it is raised where the result is asked for
                future.set_exception(error)

    def close(self) -> None:
        self.closed = True
        self.tasks.put(None)
        self.thread.join(timeout=2)  # not for ever: it may wait for a server


class Workers:
    """`count` processes that read blocks, or a thread where it is 0.

    Each line has its own process: the one that keeps its shard open.
    """

    def __init__(self, plan: Plan, count: int):
        if count:
            context = multiprocessing.get_context("spawn")
            self.alive, theirs = context.Pipe()
            self.pools = [
                ProcessPoolExecutor(1, context, start_worker, (plan, theirs)) for _ in range(count)
            ]
            self.work = work
        else:
            self.pools, self.work = [Background()], Reader(plan).block
        self.num_processes = count

    def block(self, source: int, epoch: int, line: int, begin: Offset) -> Future:
        pool = self.pools[(source * LINES + line) % len(self.pools)]
        return pool.submit(self.work, source, epoch, line, begin)

    def close(self) -> None:
        """End the processes, and wait for that: one left to the exit of a process that is itself a
        child of multiprocessing may never be told to end."""
        if self.num_processes:
            self.alive.close()
            for pool in self.pools:
                pool.shutdown(cancel_futures=True)
        else:
            self.pools[0].close()


# The order of documents


class Document(NamedTuple):
    tokens: np.ndarray
    place: Offset


class Line:
    """The documents of one line, in order, from its position on.

    Args:
        read: gives the block that begins at a position.
        begin: of the current block; None: the line has ended.
        index: of the next document in that block.
        counts: where the counts of finished blocks are added.
    """

    def __init__(
        self,
        read: Callable[[Offset], Future],
        begin: Offset | None,
        index: int,
        counts: collections.Counter,
    ):
        self.read, self.counts = read, counts
        self.begin, self.index = begin, index
        self.block, self.ahead = None, read(begin) if begin else None

    def take(self) -> Document | None:
        while self.begin:
            if self.block is None:
                try:
                    self.block = self.ahead.result()
                except BrokenExecutor as error:
                    reason = "its process has died; if for lack of memory, use fewer --workers"
                    raise DataError("data worker", reason) from error
                self.ahead = self.read(self.block.next) if self.block.next else None
            if self.index < len(self.block.places):
                begin, end = self.block.starts[self.index : self.index + 2]
                place = self.block.places[self.index]
                self.index += 1
                return Document(self.block.tokens[begin:end], place)
            self.counts.update(self.block.counts)
            self.begin, self.index, self.block = self.block.next, 0, None
        return None

    def state(self) -> list | None:
        return [*self.begin, self.index] if self.begin else None


class Documents:
    """The documents of one source on one rank, endlessly, epoch after epoch."""

    def __init__(self, plan: Plan, source: int, workers: Workers, state: dict | None):
        self.plan, self.source, self.workers = plan, source, workers
        self.tokens = state["tokens"] if state else 0
        self.counts = collections.Counter(state["counts"] if state else {})
        self.begin_epoch(state["epoch"] if state else 0, state and state["lines"])
        self.turn = state["turn"] if state else 0

    def begin_epoch(self, epoch: int, positions: list | None) -> None:
        self.epoch, self.turn = epoch, 0
        self.pieces = [len(line) for line in lines_of_rank(self.plan, self.source, epoch)]
        self.lines = []
        for number, position in enumerate(positions or [[0, START, 0]] * len(self.pieces)):

            def read(begin: Offset, number: int = number) -> Future:
                return self.workers.block(self.source, epoch, number, begin)

            *begin, index = position or (0,)
            self.lines.append(Line(read, tuple(begin) or None, index, self.counts))

    def take(self) -> Document:
        for _ in range(1000):  # epochs
            for _ in self.lines:
                line = self.lines[self.turn]
                self.turn = (self.turn + 1) % len(self.lines)
                if (document := line.take()) is not None:
                    self.tokens += len(document.tokens)
                    return document
            self.begin_epoch(self.epoch + 1, None)
        raise DataError(self.plan.sources[self.source].spec, "no document with text to train on")

    def state(self) -> dict:
        return {
            "epoch": self.epoch,
            "turn": self.turn,
            "lines": [line.state() for line in self.lines],
            "pieces": self.pieces,
            "tokens": self.tokens,
            "counts": dict(self.counts),
        }


# Lanes


class Panel(NamedTuple):
    before: dict  # the state before it
    tokens: np.ndarray  # (lanes, segments * segment_length + 1)


class StreamBatches:
    """Endless batches of this rank, (batch_size, segment_length) each.

    Args:
        plan: sources, tokenizer and order of documents.
        batch_size: lanes of this rank.
        segment_length: tokens of a lane in a batch.
        workers: processes that read ahead; 0: a thread.
    """

    def __init__(self, plan: Plan, batch_size: int, segment_length: int, workers: int = 0):
        self.plan, self.fingerprint, self.segment_length = plan, plan.fingerprint(), segment_length
        self.batch_size, self.num_workers = batch_size, workers
        self.segments = max(1, PANEL // segment_length)  # of a panel
        self.waited = 0.0
        self.workers = None  # nothing runs before the first batch
        self.position = {"sources": [None] * len(plan.sources), "lanes": [None] * batch_size}
        self.segment = 0  # of the panel that comes next

    def next(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Inputs, targets (int64) and reset (bool), each (batch_size, segment_length)."""
        began = time.perf_counter()
        if self.workers is None:
            try:
                self.start()
            except DataError:
                self.close()
                raise
        if self.segment == self.segments:
            self.panel, self.segment = self.ahead.result(), 0
            self.position = self.panel.before
            self.ahead = self.filler.submit(self.fill)
        self.waited += time.perf_counter() - began
        begin = self.segment * self.segment_length
        end = begin + self.segment_length
        inputs = torch.from_numpy(self.panel.tokens[:, begin:end].astype(np.int64))
        targets = torch.from_numpy(self.panel.tokens[:, begin + 1 : end + 1].astype(np.int64))
        self.segment += 1
        return inputs, targets, inputs == self.plan.tokenizer.bos

    def start(self) -> None:
        """Begin to read at `self.position`."""
        self.workers, self.filler = Workers(self.plan, self.num_workers), Background()
        self.sources = [
            Documents(self.plan, source, self.workers, state)
            for source, state in enumerate(self.position["sources"])
        ]
        self.lanes = self.reopen(self.position["lanes"])
        self.panel = self.fill()
        self.position = self.panel.before
        self.ahead = self.filler.submit(self.fill)

    def reopen(self, lanes: list) -> list:
        """The documents that lanes are in, from where they are."""
        wanted = collections.defaultdict(list)
        for number, lane in enumerate(lanes):
            if lane:
                source, shard, at, offset = lane
                wanted[source, shard].append((at, offset, number))
        opened, reader = [None] * len(lanes), Reader(self.plan)
        for (source, shard), documents in wanted.items():
            positions = [at for at, _, _ in documents]
            for tokens, (at, offset, number) in zip(
                reader.find(source, shard, positions), documents
            ):
                opened[number] = [source, (shard, at), tokens, offset]
        return opened

    def fill(self) -> Panel:
        """The next panel: in each lane the rest of its document, then further documents."""
        before = {
            "sources": [source.state() for source in self.sources],
            "lanes": [[lane[0], *lane[1], lane[3]] if lane else None for lane in self.lanes],
        }
        length = self.segments * self.segment_length
        tokenizer = self.plan.tokenizer
        panel = np.full((self.batch_size, length + 1), tokenizer.bos, dtype=token_dtype(tokenizer))
        for number, row in enumerate(panel):
            lane, at = self.lanes[number], 0
            while at < length:
                if lane is None:
                    source = self.next_source()
                    document = self.sources[source].take()
                    lane = [source, document.place, document.tokens, 0]
                _, _, tokens, offset = lane
                count = min(len(tokens) - offset, length + 1 - at)
                row[at : at + count] = tokens[offset : offset + count]
                lane[3] += min(count, length - at)
                at += count
                if lane[3] == len(tokens):
                    lane = None
            self.lanes[number] = lane
        return Panel(before, panel)

    def next_source(self) -> int:
        """The source that has given the fewest tokens for its weight."""
        weights = [source.weight for source in self.plan.sources]
        return min(range(len(weights)), key=lambda s: self.sources[s].tokens / weights[s])

    def epochs_read(self) -> float:
        """How many times the source that was read least has been read, by finished pieces."""

        def epochs(state: dict) -> float:
            lines = zip(state["lines"], state["pieces"])
            done = sum(line[0] if line else pieces for line, pieces in lines)
            return state["epoch"] + done / max(1, sum(state["pieces"]))

        return min(epochs(state) if state else 0.0 for state in self.position["sources"])

    def counts(self) -> dict[str, int]:
        """Documents and bytes of all finished blocks; rows with each remark."""
        total = collections.Counter()
        for state in self.position["sources"]:
            total.update(state["counts"] if state else {})
        return dict(total)

    def state(self) -> dict:
        return {
            **self.position,
            "segment": self.segment,
            "plan": self.fingerprint,
            "rank": [self.plan.rank, self.plan.world_size],
            "shape": [self.batch_size, self.segment_length],
        }

    def load_state(self, state: dict) -> None:
        """Go on at the position of `state()`."""
        rank, shape = self.state()["rank"], self.state()["shape"]
        if state["rank"] != rank:
            raise ValueError(
                f"its streams belong to rank {state['rank'][0]} of {state['rank'][1]}, this is "
                f"rank {rank[0]} of {rank[1]}; go on with as many processes"
            )
        if state["shape"] != shape:
            raise ValueError(
                f"its batches have (lanes, tokens) {state['shape']}, now {shape}; keep "
                "--batch-size and --segment-length"
            )
        if state["plan"] != self.fingerprint:
            raise ValueError("its streams are of other data, tokenizer, seed or --shuffle-buffer")
        self.close()
        self.position = {key: state[key] for key in ("sources", "lanes")}
        self.segment = state["segment"]

    def close(self) -> None:
        """End the workers."""
        if self.workers is not None:
            self.workers.close()
            self.filler.close()
            self.workers = None
