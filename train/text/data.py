"""From `--data` specs to batches of tokens.

    in memory   documents [(name, bytes)] -> train | validation -> tokens -> lanes -> batches
    streamed    shards -> documents without the held-out ones -> tokens -> lanes -> batches

One `stdlib` or local `text:` source is read into memory; everything else, and several sources, are
streamed (`kru_triton.train.text.streams`; the specs are in `kru_triton.train.text.sources`).

A document's tokens are `BOS t1 t2 ... tn`: with the `bytes` tokenizer 256 byte values, and BOS is
256. All documents in a row, each behind its BOS, are the *stream*. The model reads stream[i] and
predicts stream[i + 1]; where it reads BOS, `reset` is True and its state starts from zero. So the
first token of a document is predicted from BOS alone, and after the last token of a document the
next BOS is predicted: the model also learns where documents end. Bits per byte counts the targets
that are no BOS, and divides by bytes: each byte of each validation document exactly once.

The held-out part, where `--valid` is empty (`split` decides, for a run and for evaluate.py). In
memory, by file: the files are ordered by the SHA-256 of "kru_triton:0:NAME" (NAME: the path below
the common folder), and each one that still fits into 5% of the bytes is held out. Where that yields
less than 1% (one file, or a few large ones), the last tenth of each file is held out instead, from
a line start on. So the split depends on names and sizes only, not on `--seed`. Streamed, by
document: a checksum of its text holds 1 in 50 out. None of those is ever trained on; the first of
them, `--valid-bytes` in all, are the validation text.

A file counts once. One that is in `--valid` too is not trained on; of several `--data` that name a
file (with the same field) the first one has it. Both are said in words.

RUN_DIR/data.json and tokenizer.json keep what a run found and trained when it began, for its other
processes and for going on: the remote shards, the held-out documents, the tokenizer.
"""

import dataclasses
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from kru_triton.train.run.checkpoints import write_atomic
from kru_triton.train.run.settings import Config, UserError
from kru_triton.train.text.sources import (
    START,
    DataError,
    Source,
    common_folder,
    compression_of,
    describe_error,
    find_paths,
    find_source,
    is_url,
    matching_files,
    read,
    read_all,
    relative_names,
    stdlib_files,
    unpacked,
)
from kru_triton.train.text.streams import (
    HELD_OUT_SHARE,
    PANEL,
    Plan,
    StreamBatches,
    is_held_out,
    join,
)
from kru_triton.train.text.tokenizer import (
    TRAINING_BYTES,
    ByteTokenizer,
    FileTokenizer,
    bpe_merges,
    character_tokenizer,
    is_lossless,
    read_tokenizer,
    train_bpe,
)

__all__ = ["ByteTokenizer", "Data", "DataError", "Lanes", "Stream", "build"]

HELD_OUT_BYTES = 0.05  # by file
HELD_OUT_TAIL = 0.10  # of each file, where whole files do not fit
MEMORY_LIMIT = 4 << 30  # bytes of text; more is streamed
UNPACKED = 4  # bytes of text that a byte of a compressed file is taken for

Document = tuple[str, bytes]  # name, text


@dataclass
class Data:
    """What a run reads, on one rank.

    Batches have `next()`, `state()`, `load_state(state)`, `epochs_read()`, `counts()`, `close()`,
    and `waited`, the seconds that `next()` has waited for data.
    """

    tokenizer: ByteTokenizer | FileTokenizer
    train: "Lanes | StreamBatches"
    valid: "Stream"
    test: "Stream | None"  # of --test
    facts: dict  # what is known of "train" and "valid"
    baselines: dict[str, float]  # bits per byte of gzip and xz on the validation text; rank 0 only


def build(config: Config, run_dir: Path, rank: int = 0, world_size: int = 1) -> Data:
    """Tokenizer, training batches of this rank and validation stream, as `config` says.

    Rank 0 calls it before the other ranks do: it writes data.json and tokenizer.json, they read
    them.

    Raises:
        UserError: a spec, the data or the tokenizer is not what it should be.
        DataError: a shard cannot be read.
    """
    saved = remembered(config, run_dir, rank)
    began = read_record(run_dir / "config.json")
    found = {"settings": data_settings(config)}
    sizes = config.batch_size, config.segment_length
    parts = split(config.data, config.valid, config.valid_bytes, saved, began)
    train, held_out, sources = parts.train, parts.held_out, parts.sources
    if rank == 0:
        for note in parts.notes:
            print(f"note: {note}")
    if sources:
        if not held_out:
            raise UserError("no document of --data is in the held-out part (1 in 50); give --valid")
        sample = sample_documents(sources, parts.by_checksum)
        found["sources"] = [source.as_json() for source in sources]
        found["held_out"] = [(name, text.decode("utf-8", "replace")) for name, text in held_out]
    else:
        sample = (text for _, text in train)
    tokenizer = make_tokenizer(config, run_dir, saved, sample)
    found["tokenizer_sha256"] = tokenizer.sha256
    if rank == 0 and not saved and (sources or tokenizer.sha256):
        remember(config, run_dir, found, tokenizer)
    if rank == 0 and tokenizer.sha256 and not is_lossless(tokenizer, [t for _, t in held_out]):
        print(
            f"warning: --tokenizer {config.tokenizer} does not give texts back as they were: "
            "bits per byte come out too low"
        )

    valid = Stream(held_out, tokenizer)
    if len(valid) <= config.segment_length:
        raise UserError(
            f"validation stream too short: {len(valid)} tokens, one segment has "
            f"{config.segment_length}; give more text with --valid, or lower --segment-length"
        )
    if sources:
        known = shard_facts(sources)
        plan = Plan(
            sources,
            tokenizer,
            config.seed,
            rank,
            world_size,
            config.shuffle_buffer,
            parts.by_checksum,
        )
        batches = StreamBatches(plan, *sizes, config.workers)
    else:
        known = facts(train)
        batches = Lanes(Stream(train, tokenizer), *sizes, config.seed, rank, world_size)
    baselines = compressed_bits_per_byte(held_out) if rank == 0 else {}
    known_facts = {"train": known, "valid": facts(held_out)}
    test = None
    if config.test:
        documents = read_documents(config.test)
        if not any(document for _, document in documents):
            raise UserError(f"test data is empty (--test {config.test!r})")
        test, known_facts["test"] = Stream(documents, tokenizer), facts(documents)
        trained = parts.files.intersection(files_by_name(config.test).values())
        if rank == 0 and trained:
            print(f"warning: {len(trained)} files of --test are trained on, as {min(trained)}")
    return Data(tokenizer, batches, valid, test, known_facts, baselines)


# What a run remembers of its data


def data_settings(config: Config) -> dict:
    """The settings that data.json and tokenizer.json follow from."""
    names = ("data", "valid", "valid_bytes", "tokenizer", "shuffle_buffer")
    return json.loads(json.dumps({name: getattr(config, name) for name in names}))


def remembered(config: Config, run_dir: Path, rank: int) -> dict | None:
    """data.json of this run, None where it is to be written."""
    if rank == 0 and config.resume == "never":
        return None
    saved = read_record(run_dir / "data.json")
    if not saved:
        return None
    if saved["settings"] == data_settings(config):
        return saved
    if rank == 0 and not (run_dir / "config.json").exists():
        return None  # of a run that never began
    lines = [
        f"  {key}: {saved['settings'].get(key)!r} there, {value!r} now"
        for key, value in data_settings(config).items()
        if saved["settings"].get(key) != value
    ]
    raise UserError(
        "\n".join([f"{run_dir} belongs to a run with other data:", *lines])
        + "\nchoose another --run-dir, or --resume never to set that run's files aside"
    )


def read_record(path: Path) -> dict:
    """A JSON file of a run; empty where it is not there."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read {path}: {error}; choose another --run-dir") from error


def remember(config: Config, run_dir: Path, found: dict, tokenizer) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if tokenizer.sha256:
            write_atomic(run_dir / "tokenizer.json", tokenizer.json)
        write_atomic(run_dir / "data.json", json.dumps(found))
    except OSError as error:
        raise UserError(f"--run-dir {run_dir} cannot be written: {error.strerror}") from error


def make_tokenizer(config: Config, run_dir: Path, saved: dict | None, sample: Iterator[bytes]):
    """The tokenizer that `--tokenizer` names; the one in the run directory where it has one."""
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    if saved:
        return run_tokenizer(run_dir, saved["tokenizer_sha256"])
    if config.tokenizer == "characters":
        return character_tokenizer(sample)
    merges = bpe_merges(config.tokenizer)
    return train_bpe(merges, sample) if merges else read_tokenizer(config.tokenizer)


def run_tokenizer(run_dir: Path, sha256: str = "") -> ByteTokenizer | FileTokenizer:
    """The tokenizer of a run: of its tokenizer.json, or bytes where there is none."""
    path = run_dir / "tokenizer.json"
    if not path.exists() and not sha256:
        return ByteTokenizer()
    try:
        tokenizer = FileTokenizer(path.read_text(encoding="utf-8"))
    except Exception as error:  # `tokenizers` raises plain Exception
        raise UserError(f"cannot read {path}: {error}") from error
    if sha256 and tokenizer.sha256 != sha256:
        raise UserError(f"{path} is not the tokenizer that this run began with")
    return tokenizer


# What is trained on, and what is held out


class Split(NamedTuple):
    """What a run trains on, in memory or as streams, and what it is validated on."""

    train: list[Document]
    held_out: list[Document]
    files: set[str]  # real paths and URLs that are trained on
    notes: list[str]  # for people: the files that count once
    sources: tuple[Source, ...] = ()  # none: `train` is in memory
    by_checksum: bool = False  # whether `is_held_out` keeps documents of `sources` back


def split(
    data: tuple[str, ...],
    valid: str,
    valid_bytes: int,
    saved: dict | None = None,
    began: dict | None = None,
) -> Split:
    """The rule of what is held out, for a run and for whoever reads its held-out part.

    Args:
        data, valid, valid_bytes: as the flags of these names.
        saved: data.json of a run that goes on. Remote shards are those that the run found when it
            began; local ones must still be the same.
        began: config.json of that run.
    """
    if fits_in_memory(data) if not saved else "sources" not in saved:
        parts = split_in_memory(data[0], valid, valid_bytes)
        if began and not is_as_begun(parts, began) and has_copies(data[0], valid):
            earlier = split_in_memory(data[0], valid, valid_bytes, once=False)
            return earlier if is_as_begun(earlier, began) else parts
        return parts
    by_checksum = valid == "" or data == (valid,)
    notes = []
    if saved:
        sources = [find_again(Source.of_json(value)) for value in saved["sources"]]
        held_out = [(name, text.encode()) for name, text in saved["held_out"]]
    elif by_checksum:
        sources = find_sources(data, set(), notes)
        held_out = held_out_documents(sources, valid_bytes)
    else:
        held_out, there = validation(valid, valid_bytes)
        sources = find_sources(data, there, notes)
    files = {shard.identity for source in sources for shard in source.shards}
    return Split([], held_out, files, notes, tuple(sources), by_checksum)


def is_as_begun(parts: Split, began: dict) -> bool:
    """Whether texts in memory are those of a run's config.json."""
    texts = {"train": parts.train, "valid": parts.held_out}
    return all(began.get(f"{k}_sha256", "") in ("", facts(t)["sha256"]) for k, t in texts.items())


def has_copies(*specs: str) -> bool:
    """Whether links lead to a file once more: runs have begun that read such files as often."""
    texts = filter(is_local_text, specs)
    return any(len(matching_files(spec, False)) > len(matching_files(spec)) for spec in texts)


def run_data(run_dir: Path | None) -> tuple[str, ...]:
    """`--data` of a run; its default where there is none."""
    began = read_record(run_dir / "config.json") if run_dir else {}
    return tuple(began.get("data", Config.data))


def held_out_text(specs: tuple[str, ...], run_dir: Path | None = None) -> list[Document]:
    """The validation text of training on `specs` without `--valid`.

    Where the run in `run_dir` was trained on files of them, it is what that run has held out.
    """
    if run_dir is None:
        return split(specs, "", Config.valid_bytes).held_out
    began, saved = read_record(run_dir / "config.json"), read_record(run_dir / "data.json")
    data, valid = run_data(run_dir), began.get("valid", Config.valid)
    valid_bytes = began.get("valid_bytes", Config.valid_bytes)
    if specs == data:
        if "held_out" in saved:
            return [(name, text.encode()) for name, text in saved["held_out"]]
        documents = split(data, valid, valid_bytes, saved, began).held_out
        if began.get("valid_sha256") not in (None, facts(documents)["sha256"]):
            raise UserError(
                f"{run_dir}: the text that it held out of --data {' '.join(data)} has changed; "
                "give other text with --data"
            )
        return documents
    files = {shard.identity for spec in specs for shard in find_source(spec).shards}
    if "sources" in saved:
        sources = map(Source.of_json, saved["sources"])
        trained = {shard.identity for source in sources for shard in source.shards}
    else:
        paths = [stdlib_files() if s == "stdlib" else find_paths(s.partition(":")[2]) for s in data]
        trained = {os.path.realpath(path) for path in itertools.chain(*paths)}
    if trained.isdisjoint(files):
        return split(specs, "", Config.valid_bytes).held_out
    if "sources" in saved and valid in ("", *data):
        share = valid_bytes // len(saved["sources"])
        return [d for spec in specs for d in held_out_documents([find_source(spec)], share)]
    if trained == files and valid in ("", *data):
        return held_out_text(data, run_dir)
    raise UserError(
        f"{run_dir} was trained on {min(trained & files)}, of --data {' '.join(specs)}: without "
        "--data it is evaluated on what it held out"
    )


# Documents in memory


def fits_in_memory(specs: tuple[str, ...]) -> bool:
    """Whether the data is one `stdlib` or local `text:` source that is not too large."""
    if len(specs) > 1 or not is_local_text(specs[0]):
        return specs == ("stdlib",)
    files = matching_files(specs[0])
    sizes = [os.path.getsize(f) * (UNPACKED if compression_of(f) else 1) for f in files]
    return sum(sizes) <= MEMORY_LIMIT


def is_local_text(spec: str) -> bool:
    return spec.startswith("text:") and not is_url(spec.removeprefix("text:"))


def load_documents(
    data: str, valid: str, valid_bytes: int = 1 << 62
) -> tuple[list[Document], list[Document]]:
    """Training and validation documents of `--data` and `--valid`, the former in memory."""
    parts = split_in_memory(data, valid, valid_bytes)
    return parts.train, parts.held_out


def split_in_memory(data: str, valid: str, valid_bytes: int, once: bool = True) -> Split:
    """`split` for one source in memory. `once` is that of `matching_files`."""
    documents, files, notes = read_documents(data, once=once), files_by_name(data, once), []
    if valid in ("", data):
        train, held_out = hold_out(documents)
    else:
        held_out, there = validation(valid, valid_bytes, once)
        train = [document for document in documents if files[document[0]] not in there]
        files = {name: file for name, file in files.items() if file not in there}
        if len(train) < len(documents):
            notes.append(in_valid(data, len(documents) - len(train)))
    check_not_empty("training", train, data, valid)
    check_not_empty("validation", held_out, data, valid)
    train, held_out = ([d for d in part if d[1]] for part in (train, held_out))
    return Split(train, held_out, set(files.values()), notes)


def in_valid(spec: str, count: int) -> str:
    return f"--data {spec}: files in --valid, too, which are not trained on: {count}"


def validation(valid: str, limit: int, once: bool = True) -> tuple[list[Document], set[str]]:
    """The documents of `--valid`, and the files that they are of.

    `stdlib` is the part of it that training on it holds out.
    """
    documents, files = read_documents(valid, limit, once), files_by_name(valid, once)
    if valid == "stdlib":
        documents = hold_out(documents)[1]
        files = {name: files[name] for name, _ in documents}
    return documents, set(files.values())


def files_by_name(spec: str, once: bool = True) -> dict[str, str]:
    """Real paths and URLs of a spec's files; without `once`, paths as they are."""
    if once or not is_local_text(spec):
        return {shard.name: shard.identity for shard in find_source(spec).shards}
    files = matching_files(spec, once)
    return dict(zip(relative_names(files), files))


def check_not_empty(role: str, part: list[Document], data, valid: str) -> None:
    if not any(text for _, text in part):
        raise UserError(f"{role} data is empty (--data {data!r}, --valid {valid!r})")


def read_documents(spec: str, limit: int = 1 << 62, once: bool = True) -> list[Document]:
    """Every document that `spec` names, in a fixed order; of a stream, the first `limit` bytes.

    `once` is that of `matching_files`.
    """
    if spec == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        files = stdlib_files()
        return [(Path(file).relative_to(root).as_posix(), read_text(file)) for file in files]
    if is_local_text(spec):
        files = matching_files(spec, once)
        texts = [read_text(file) for file in files]
        if not any(texts):
            raise UserError(f"{spec!r} is an empty corpus: all {len(files)} files have 0 bytes")
        return list(zip(relative_names(files), texts))
    return list(first_bytes(source_documents(find_source(spec)), limit))


def read_text(file: str) -> bytes:
    """The bytes of one file, which must be UTF-8, maybe compressed."""
    try:
        text = Path(file).read_bytes()
        if compression := compression_of(file, text[:16]):
            with unpacked(io.BytesIO(text), compression) as plain:
                text = read_all(plain)
        text.decode("utf-8")
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or describe_error(error)
        raise UserError(f"cannot read {file}: {reason}") from error
    except UnicodeDecodeError as error:
        byte = f"byte 0x{text[error.start]:02x} at offset {error.start}"
        raise UserError(f"{file} is not UTF-8 text: {byte} ({error.reason})") from error
    return text


# Documents of streams


def find_sources(data: tuple[str, ...], held_out: set[str], notes: list[str]) -> list[Source]:
    """The sources of `--data` without the files that are held out, each file in the first that
    names it (with this field). Those that have none left are left out."""
    sources, taken = [], set()
    for spec in data:
        source = find_source(spec)
        rest = [shard for shard in source.shards if shard.identity not in held_out]
        own = [s for s in rest if (s.identity, s.kind, source.field) not in taken]
        taken |= {(shard.identity, shard.kind, source.field) for shard in own}
        if not rest:
            raise UserError(f"--data {spec}: all of its shards are in --valid")
        if len(rest) < len(source.shards):
            notes.append(in_valid(spec, len(source.shards) - len(rest)))
        if len(own) < len(rest):
            count = len(rest) - len(own)
            notes.append(f"--data {spec}: files of an earlier --data, which count there: {count}")
        if not own:
            continue
        sources.append(source.with_shards(own))
        if not any(text for _, text in itertools.islice(source_documents(sources[-1]), 10_000)):
            raise UserError(f"--data {spec}: the first rows have no text")
    return sources


def find_again(source: Source) -> Source:
    """A source of a run that goes on; local shards may have been moved with their folder."""
    if any(shard.remote for shard in source.shards):
        return source
    folder, shards = common_folder([shard.url for shard in find_source(source.spec).shards]), []
    for shard in source.shards:
        paths = filter(os.path.isfile, (shard.url, os.path.join(folder, shard.name)))
        sizes = {os.path.getsize(path): path for path in paths}
        if shard.size not in sizes:
            state = f"has {min(sizes):,} bytes" if sizes else "is gone"
            raise DataError(shard.url, f"{state}; it had {shard.size:,} when the run began")
        shards.append(dataclasses.replace(shard, url=sizes[shard.size]))
    return source.with_shards(shards)


def source_documents(source: Source) -> Iterator[Document]:
    """The documents of a source, shard after shard; the name of each is its place."""
    for index, shard in enumerate(source.shards):
        for row in read(source, index, START, 0, 1):
            if row.text:
                yield f"{shard.name}:{row.at}", row.text


def first_bytes(documents: Iterator[Document], limit: int) -> Iterator[Document]:
    """The first documents that have `limit` bytes together."""
    size = 0
    for name, text in documents:
        yield name, text
        size += len(text)
        if size >= limit:
            return


def held_out_documents(sources: Sequence[Source], limit: int) -> list[Document]:
    """The first held-out documents of all sources, about `limit` bytes together.

    Reading ends where, from the share that is held out, twice as many were to be expected.
    """
    share = limit // len(sources)
    documents = []
    for source in sources:
        read = first_bytes(source_documents(source), int(2 * share / HELD_OUT_SHARE))
        held_out = (document for document in read if is_held_out(document[1]))
        documents += first_bytes(held_out, share)
    return documents


def sample_documents(sources: Sequence[Source], hold_out_some: bool) -> Iterator[bytes]:
    """Training documents from the beginning of each source, for a tokenizer to be trained on."""
    for source in sources:
        documents = first_bytes(source_documents(source), TRAINING_BYTES // len(sources))
        yield from (t for _, t in documents if not (hold_out_some and is_held_out(t)))


def shard_facts(sources: Sequence[Source]) -> dict:
    """Number and size of the shards, and the SHA-256 of their names and sizes."""
    shards = [shard for source in sources for shard in source.shards]
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(name_bytes(f"{shard.name}\0{shard.size}\0"))
    sizes = [shard.size for shard in shards]
    return {
        "sources": [source.spec for source in sources],
        "shards": len(shards),
        "bytes": None if None in sizes else sum(sizes),
        "sha256": digest.hexdigest(),
    }


# The held-out part and facts of documents in memory


def hold_out(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents, as the module's docstring says."""

    def draw(document: Document) -> bytes:
        return hashlib.sha256(name_bytes(f"kru_triton:0:{document[0]}")).digest()

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
        digest.update(name_bytes(f"{name}\0{len(text)}\0"))
        digest.update(text)
    count = sum(len(text) for _, text in documents)
    return {"documents": len(documents), "bytes": count, "sha256": digest.hexdigest()}


def name_bytes(name: str) -> bytes:
    """UTF-8, or what bytes a file's name has that is none."""
    return name.encode("utf-8", "surrogateescape")


def describe(facts: dict) -> str:
    """Facts for people."""
    size = "unknown size" if facts["bytes"] is None else f"{facts['bytes']:,} bytes"
    if "shards" in facts:
        kind = f"{facts['shards']:,} shards of {', '.join(facts['sources'])}, streamed, {size}"
        return f"{kind}, sha256 of names and sizes {facts['sha256'][:16]}"
    return f"{facts['documents']:,} documents, {size}, sha256 {facts['sha256'][:16]}"


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

    def __init__(self, documents: list[Document], tokenizer: ByteTokenizer | FileTokenizer):
        self.bos = tokenizer.bos
        self.tokens, starts = join(tokenizer, [text for _, text in documents])
        self.starts = np.array(starts)  # of each document, and the end
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
        """Nothing beyond `facts`."""
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
