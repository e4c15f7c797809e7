"""From `--data` specs to batches of tokens.

    in memory   documents [(name, bytes)] -> train | validation -> tokens -> lanes -> batches
    streamed    shards -> documents without the held-out ones -> tokens -> lanes -> batches

One `stdlib` or local `text:` source is read into memory; everything else, and several sources, are
streamed.

    sources     specs -> shards             rows       shard -> documents
    shards      local and remote files      held_out   what is trained on, what is not
    documents   names and texts             record     what a run remembers of its data
    tokenizer   bytes -> tokens             batches    tokens in memory -> batches
                                            streams    shards -> batches
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kru_triton.train.run.settings import Config, UserError
from kru_triton.train.text.batches import Batches, MemoryBatches, TokenArray
from kru_triton.train.text.documents import (
    Document,
    compressed_bits_per_byte,
    files_by_name,
    first_bytes,
    read_documents,
    shard_statistics,
    source_documents,
    statistics,
)
from kru_triton.train.text.held_out import Split, is_held_out, split
from kru_triton.train.text.record import make_tokenizer, read_record, remember, remembered
from kru_triton.train.text.streams import Plan, StreamBatches
from kru_triton.train.text.tokenizer import (
    TRAINING_BYTES,
    ByteTokenizer,
    FileTokenizer,
    is_lossless,
)


@dataclass
class Data:
    """What a run reads, on one rank."""

    tokenizer: ByteTokenizer | FileTokenizer
    train: Batches
    valid: TokenArray
    test: TokenArray | None  # of --test
    statistics: dict  # of "train", "valid" and, where there is one, "test"
    baselines: dict[str, float]  # bits per byte of gzip and xz on the validation text; rank 0 only


def build(config: Config, run_dir: Path, rank: int = 0, world_size: int = 1) -> Data:
    """Tokenizer, training batches of this rank and validation text, as `config` says.

    Rank 0 calls it before the other ranks do: it writes data.json and tokenizer.json, they read
    them.

    Raises:
        UserError: a spec, the data or the tokenizer is not what it should be.
        DataError: a shard cannot be read.
    """
    saved = remembered(config, run_dir, rank)
    began = read_record(run_dir / "config.json")
    parts = split(config.data, config.valid, config.valid_bytes, saved, began)
    if rank == 0:
        for note in parts.notes:
            print(f"note: {note}")
    if parts.sources and not parts.held_out:
        raise UserError("no document of --data is in the held-out part (1 in 50); give --valid")
    tokenizer = make_tokenizer(config, run_dir, saved, sample_texts(parts))
    if rank == 0 and not saved and (parts.sources or tokenizer.sha256):
        remember(config, run_dir, parts.sources, parts.held_out, tokenizer)
    texts = [text for _, text in parts.held_out]
    if rank == 0 and tokenizer.sha256 and not is_lossless(tokenizer, texts):
        print(
            f"warning: --tokenizer {config.tokenizer} does not give texts back as they were: "
            "bits per byte come out too low"
        )
    valid = TokenArray(parts.held_out, tokenizer)
    if len(valid) <= config.segment_length:
        raise UserError(
            f"validation text too short: {len(valid)} tokens, one segment has "
            f"{config.segment_length}; give more text with --valid, or lower --segment-length"
        )
    batches, known = training_batches(config, parts, tokenizer, rank, world_size)
    found = {"train": known, "valid": statistics(parts.held_out)}
    test = None
    if config.test:
        documents = test_documents(config, parts, rank)
        test, found["test"] = TokenArray(documents, tokenizer), statistics(documents)
    baselines = compressed_bits_per_byte(parts.held_out) if rank == 0 else {}
    return Data(tokenizer, batches, valid, test, found, baselines)


def training_batches(
    config: Config, parts: Split, tokenizer, rank: int, world_size: int
) -> tuple[Batches, dict]:
    """Those of this rank, and the statistics of what they read."""
    sizes = config.batch_size, config.segment_length
    if not parts.sources:
        batches = MemoryBatches(
            TokenArray(parts.train, tokenizer), *sizes, config.seed, rank, world_size
        )
        return batches, statistics(parts.train)
    plan = Plan(
        parts.sources,
        tokenizer,
        config.seed,
        rank,
        world_size,
        config.shuffle_buffer,
        parts.by_checksum,
    )
    return StreamBatches(plan, *sizes, config.workers), shard_statistics(parts.sources)


def sample_texts(parts: Split) -> Iterator[bytes]:
    """Training text from the beginning of each source, for a tokenizer to be trained on."""
    yield from (text for _, text in parts.train)
    for source in parts.sources:
        documents = first_bytes(source_documents(source), TRAINING_BYTES // len(parts.sources))
        yield from (t for _, t in documents if not (parts.by_checksum and is_held_out(t)))


def test_documents(config: Config, parts: Split, rank: int) -> list[Document]:
    documents = read_documents(config.test)
    if not any(text for _, text in documents):
        raise UserError(f"test data is empty (--test {config.test!r})")
    trained = parts.files.intersection(files_by_name(config.test).values())
    if rank == 0 and trained:
        print(f"warning: {len(trained)} files of --test are trained on, as {min(trained)}")
    return documents
