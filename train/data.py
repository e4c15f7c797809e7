"""From a `--data` spec to lanes of tokens.

    documents [(name, bytes)] -> train | validation -> tokens -> lanes of (inputs, targets, reset)

A document's tokens are `BOS b1 b2 ... bn`: with the `bytes` tokenizer 256 byte values, and BOS is
256. All documents in a row, each behind its BOS, are the *stream*. The model reads stream[i] and
predicts stream[i + 1]; where it reads BOS, `reset` is True and its state starts from zero. So the
first byte of a document is predicted from BOS alone, and after the last byte of a document the
next BOS is predicted: the model also learns where documents end. Bits per byte counts the byte
targets only: each byte of each validation document exactly once.

The held-out part, where `--valid` is empty. By file: the files are ordered by the SHA-256 of
"kru_triton:0:NAME" (NAME: the path below the common folder), and each one that still fits into 5%
of the bytes is held out. Where that yields less than 1% (one file, or a few large ones), the last
tenth of each file is held out instead, from a line start on. So the split depends on names and
sizes only, not on `--seed`.
"""

import glob
import gzip
import hashlib
import lzma
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kru_triton.train.config import Config, UserError

HELD_OUT_BYTES = 0.05  # by file
HELD_OUT_TAIL = 0.10  # of each file, where whole files do not fit

Document = tuple[str, bytes]  # name, text


class ByteTokenizer:
    """One token per byte, and BOS."""

    bos = 256
    vocab_size = 257

    def encode(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, dtype=np.uint8)

    def decode(self, tokens: list[int]) -> bytes:
        return bytes(token for token in tokens if token < 256)

    def describe(self) -> str:
        return "bytes"


class DataError(UserError):
    """Training data that cannot be read any more."""


@dataclass
class Data:
    """What a run reads, on one rank."""

    tokenizer: ByteTokenizer
    train: "Lanes"
    valid: "Stream"
    facts: dict  # what is known of "train" and "valid"
    rivals: dict[str, float]  # bits per byte of gzip and xz on the validation text; rank 0 only


def build(config: Config, run_dir: Path, rank: int = 0, world_size: int = 1) -> Data:
    """Tokenizer, training batches of this rank and validation stream, as `config` says.

    Rank 0 calls it before the other ranks do.
    """
    tokenizer = ByteTokenizer()
    train, held_out = load_documents(config.data, config.valid)
    valid = Stream(held_out, tokenizer)
    if len(valid) <= config.segment_length:
        raise UserError(
            f"validation stream too short: {len(valid)} tokens, one segment has "
            f"{config.segment_length}; give more text with --valid, or lower --segment-length"
        )
    sizes = config.batch_size, config.segment_length
    lanes = Lanes(Stream(train, tokenizer), *sizes, config.seed, rank, world_size)
    known = {"train": facts(train), "valid": facts(held_out)}
    rivals = compressed_bits_per_byte(held_out) if rank == 0 else {}
    return Data(tokenizer, lanes, valid, known, rivals)


# Documents


def load_documents(data: str, valid: str) -> tuple[list[Document], list[Document]]:
    """Training and validation documents of `--data` and `--valid`."""
    documents = read_documents(data)
    if valid in ("", data):
        train, held_out = hold_out(documents)
    else:
        held_out = read_documents(valid)
        if valid == "stdlib":
            held_out = hold_out(held_out)[1]
        train = documents
        if data.startswith("text:") and valid.startswith("text:"):
            held_out_files = set(matching_files(valid))
            files = matching_files(data)
            train = [d for d, file in zip(documents, files) if file not in held_out_files]
    for role, part in (("training", train), ("validation", held_out)):
        if not any(text for _, text in part):
            raise UserError(f"{role} data is empty (--data {data!r}, --valid {valid!r})")
    return [d for d in train if d[1]], [d for d in held_out if d[1]]


def read_documents(spec: str) -> list[Document]:
    """Every document that `spec` names, in a fixed order."""
    if spec == "stdlib":
        return stdlib_documents()
    if spec.startswith("text:"):
        files = matching_files(spec)
        texts = [read_text(file) for file in files]
        if not any(texts):
            raise UserError(f"{spec!r} is an empty corpus: all {len(files)} files have 0 bytes")
        folder = os.path.commonpath([os.path.dirname(file) for file in files])
        return [(os.path.relpath(file, folder), text) for file, text in zip(files, texts)]
    raise UserError(f"unknown data {spec!r}; known: stdlib, text:GLOB (as in text:books/**/*.txt)")


def matching_files(spec: str) -> list[str]:
    """The files of `text:GLOB`, absolute, sorted."""
    pattern = os.path.abspath(os.path.expanduser(spec.removeprefix("text:")))
    files = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    if not files:
        raise UserError(f"no file matches {spec!r} (looked for {pattern})")
    return files


def read_text(file: str) -> bytes:
    """The bytes of one file, which must be UTF-8."""
    try:
        text = Path(file).read_bytes()
        text.decode("utf-8")
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        byte = f"byte 0x{text[error.start]:02x} at offset {error.start}"
        raise UserError(f"{file} is not UTF-8 text: {byte} ({error.reason})") from error
    return text


def stdlib_documents() -> list[Document]:
    """The `*.py` files of the running Python's standard library, sorted by path.

    Left out: tests, installed packages, and what depends on how this Python was built. The text is
    the same for every build of one Python version, up to what a distribution changes; so its
    SHA-256 is part of every result.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    documents = []
    for folder, folders, files in os.walk(root):
        folders[:] = [n for n in folders if n not in skip and not n.startswith("config-")]
        for name in files:
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                path = Path(folder, name)
                documents.append((path.relative_to(root).as_posix(), read_text(str(path))))
    if not documents:
        raise UserError(f"no *.py file under {root}; use --data text:GLOB")
    return sorted(documents)


def hold_out(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents, as the module's docstring says."""

    def draw(document: Document) -> bytes:
        return hashlib.sha256(f"kru_triton:0:{document[0]}".encode()).digest()

    total = sum(len(text) for _, text in documents)
    names, taken = set(), 0
    for name, text in sorted(documents, key=draw):
        if taken + len(text) <= HELD_OUT_BYTES * total:
            names.add(name)
            taken += len(text)
    if taken >= 0.01 * total:
        train = [document for document in documents if document[0] not in names]
        return train, [document for document in documents if document[0] in names]
    cuts = [tail_start(text) for _, text in documents]
    train = [(name, text[:cut]) for (name, text), cut in zip(documents, cuts)]
    return train, [(name, text[cut:]) for (name, text), cut in zip(documents, cuts)]


def tail_start(text: bytes) -> int:
    """Where the last tenth of `text` begins: at a line start, or else between two characters."""
    cut = int(len(text) * (1 - HELD_OUT_TAIL))
    line = text.find(b"\n", cut, cut + len(text) // 50)
    if line >= 0:
        return line + 1
    while cut > 0 and text[cut] & 0xC0 == 0x80:  # inside a UTF-8 character
        cut -= 1
    return cut


def facts(documents: list[Document]) -> dict:
    """Counts, and the SHA-256 of all names, lengths and texts."""
    digest = hashlib.sha256()
    for name, text in documents:
        digest.update(f"{name}\0{len(text)}\0".encode())
        digest.update(text)
    count = sum(len(text) for _, text in documents)
    return {"documents": len(documents), "bytes": count, "sha256": digest.hexdigest()}


def describe(facts: dict) -> str:
    """Facts for people."""
    return (
        f"{facts['documents']:,} documents, {facts['bytes']:,} bytes, sha256 {facts['sha256'][:16]}"
    )


def compressed_bits_per_byte(documents: list[Document]) -> dict[str, float]:
    """What `gzip -9` and `xz` make of the documents, one after another."""
    text = b"".join(text for _, text in documents)
    return {
        "gzip": 8 * len(gzip.compress(text, 9)) / len(text),
        "xz": 8 * len(lzma.compress(text)) / len(text),
    }


# Streams


class Stream:
    """Documents as one array of tokens, each document behind its BOS."""

    def __init__(self, documents: list[Document], tokenizer: ByteTokenizer):
        self.bos = tokenizer.bos
        pieces = []
        for _, text in documents:
            pieces += [np.array([self.bos], np.uint16), tokenizer.encode(text).astype(np.uint16)]
        self.tokens = np.concatenate(pieces)
        lengths = [1 + len(piece) for piece in pieces[1::2]]
        self.starts = np.cumsum([0, *lengths])  # of each document, and the end
        self.num_bytes = sum(len(text) for _, text in documents)

    def __len__(self) -> int:
        return len(self.tokens)


class Lanes:
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
        stream: Stream,
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
        self.orders = {}  # epoch -> order of documents, and their starts in it; the last two

    def next(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Inputs, targets (int64) and reset (bool), each (batch_size, segment_length)."""
        shape = len(self.cuts) - 1, self.segment_length
        inputs, targets = np.empty(shape, np.int64), np.empty(shape, np.int64)
        reset = np.zeros(shape, bool)
        for lane, (begin, end) in enumerate(zip(self.cuts, self.cuts[1:])):
            done = 0
            while done < self.segment_length:
                epoch, offset = divmod(self.position + done, end - begin)
                count = min(self.segment_length - done, end - begin - offset)
                tokens = self.read(epoch, begin + offset, count + 1)
                inputs[lane, done : done + count] = tokens[:-1]
                targets[lane, done : done + count] = tokens[1:]
                reset[lane, done] = offset == 0
                done += count
        reset |= inputs == self.stream.bos
        self.position += self.segment_length
        return torch.from_numpy(inputs), torch.from_numpy(targets), torch.from_numpy(reset)

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
            pieces.append(np.array([self.stream.bos], np.uint16))
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

    def state(self) -> dict:
        return {"position": self.position, "lanes": self.num_lanes}

    def load_state(self, state: dict) -> None:
        if state["lanes"] != self.num_lanes:
            raise ValueError(
                f"its {state['lanes']} lanes are {self.num_lanes} now; keep processes times "
                "--batch-size as it was"
            )
        self.position = state["position"]

    def close(self) -> None:
        """Nothing to end: everything is in memory."""


def validation_segments(
    stream: Stream, max_lanes: int, segment_length: int, warm_up: int = 512
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
