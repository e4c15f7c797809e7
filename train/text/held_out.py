"""What is held out of the training text: one rule, for a run and for whoever reads it.

Where `--valid` is empty, in memory, by file: the files are ordered by the SHA-256 of
"kru_triton:0:NAME" (NAME: the path below the common folder), and each one that still fits into 5%
of the bytes is held out. Where that yields less than 1% (one file, or a few large ones), the last
tenth of each file is held out instead, from a line start on. So the split depends on names and
sizes only, not on `--seed`. Streamed, by document: a checksum of its text holds 1 in 50 out. None
of those is ever trained on; the first of them, `--valid-bytes` in all, are the validation text.

A file counts once. One that is in `--valid` too is not trained on; of several `--data` that name a
file (with the same field) the first one has it. Both are said in words.
"""

import dataclasses
import hashlib
import itertools
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from kru_triton.train.run.settings import Config, UserError
from kru_triton.train.text.documents import (
    Document,
    files_by_name,
    first_bytes,
    is_local_text,
    name_bytes,
    read_documents,
    source_documents,
    statistics,
)
from kru_triton.train.text.record import read_record
from kru_triton.train.text.shards import DataError, Source, compression_of
from kru_triton.train.text.sources import (
    common_folder,
    find_paths,
    find_source,
    matching_files,
    stdlib_files,
)

HELD_OUT_BYTES = 0.05  # by file
HELD_OUT_TAIL = 0.10  # of each file, where whole files do not fit
HELD_OUT_SHARE = 0.02  # of the documents, by hash
MEMORY_LIMIT = 4 << 30  # bytes of text; more is streamed
UNPACKED = 4  # bytes of text that a byte of a compressed file is taken for


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
        sources = find_sources(data, set(), notes, by_checksum)
        held_out = held_out_documents(sources, valid_bytes)
    else:
        held_out, there = validation(valid, valid_bytes)
        sources = find_sources(data, there, notes)
    files = {shard.identity for source in sources for shard in source.shards}
    return Split([], held_out, files, notes, tuple(sources), by_checksum)


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
            documents = [(name, text.encode()) for name, text in saved["held_out"]]
        else:
            documents = split(data, valid, valid_bytes, saved, began).held_out
        if began.get("valid_sha256") not in (None, statistics(documents)["sha256"]):
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


# In memory


def fits_in_memory(specs: tuple[str, ...]) -> bool:
    """Whether the data is one `stdlib` or local `text:` source that is not too large."""
    if len(specs) > 1 or not is_local_text(specs[0]):
        return specs == ("stdlib",)
    files = matching_files(specs[0])
    sizes = [os.path.getsize(f) * (UNPACKED if compression_of(f) else 1) for f in files]
    return sum(sizes) <= MEMORY_LIMIT


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


def is_as_begun(parts: Split, began: dict) -> bool:
    """Whether texts in memory are those of a run's config.json."""
    texts = {"train_sha256": parts.train, "valid_sha256": parts.held_out}
    return all(began.get(key, "") in ("", statistics(t)["sha256"]) for key, t in texts.items())


def has_copies(*specs: str) -> bool:
    """Whether links lead to a file once more: runs have begun that read such files as often."""
    texts = filter(is_local_text, specs)
    return any(len(matching_files(spec, False)) > len(matching_files(spec)) for spec in texts)


def validation(valid: str, limit: int, once: bool = True) -> tuple[list[Document], set[str]]:
    """The documents of `--valid`, and the files that they are of.

    `stdlib` is the part of it that training on it holds out.
    """
    documents, files = read_documents(valid, limit, once), files_by_name(valid, once)
    if valid == "stdlib":
        documents = hold_out(documents)[1]
        files = {name: files[name] for name, _ in documents}
    return documents, set(files.values())


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


def in_valid(spec: str, count: int) -> str:
    return f"--data {spec}: files in --valid, too, which are not trained on: {count}"


def check_not_empty(role: str, part: list[Document], data, valid: str) -> None:
    if not any(text for _, text in part):
        raise UserError(f"{role} data is empty (--data {data!r}, --valid {valid!r})")


# Streamed


def find_sources(
    data: tuple[str, ...], held_out: set[str], notes: list[str], by_checksum: bool = False
) -> list[Source]:
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
        texts = (text for _, text in itertools.islice(source_documents(sources[-1]), 10_000))
        first = next(texts, None)
        if first is None:
            raise UserError(f"--data {spec}: the first rows have no text")
        if by_checksum and all(map(is_held_out, itertools.chain([first], texts))):
            raise UserError(
                f"--data {spec}: all of its documents are in the held-out part (1 in 50); give "
                "--valid, or split them"
            )
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


def is_held_out(text: bytes) -> bool:
    """Whether a document belongs to the held-out part: by its text alone, 1 in 50."""
    return zlib.crc32(text, 0x6B7275) < HELD_OUT_SHARE * 2**32
