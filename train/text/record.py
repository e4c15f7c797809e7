"""What a run keeps of its data: RUN_DIR/data.json and tokenizer.json.

They are written when it begins, for its other processes and for going on: the remote shards, the
held-out documents, the tokenizer.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from kru_triton.train.run.checkpoints import write_atomic
from kru_triton.train.run.settings import Config, UserError
from kru_triton.train.text.shards import Source
from kru_triton.train.text.tokenizer import (
    ByteTokenizer,
    FileTokenizer,
    bpe_merges,
    character_tokenizer,
    read_tokenizer,
    train_bpe,
)


def data_settings(config: Config) -> dict:
    """The settings that data.json and tokenizer.json follow from."""
    names = ("data", "valid", "valid_bytes", "tokenizer", "shuffle_buffer")
    return json.loads(json.dumps({name: getattr(config, name) for name in names}))


def remembered(config: Config, run_dir: Path, rank: int) -> dict | None:
    """data.json of this run, None where it is to be written."""
    if rank == 0 and config.resume == "never":
        return None
    saved, now = read_record(run_dir / "data.json"), data_settings(config)
    there = saved.get("settings") or read_record(run_dir / "config.json")
    different = [key for key in now if there.get(key, now[key]) != now[key]]
    if not different:
        return saved or None
    if rank == 0 and not (run_dir / "config.json").exists():
        return None  # of a run that never began
    lines = [f"  {key}: {there[key]!r} there, {now[key]!r} now" for key in different]
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


def remember(
    config: Config,
    run_dir: Path,
    sources: Sequence[Source],
    held_out: list[tuple[str, bytes]],
    tokenizer: ByteTokenizer | FileTokenizer,
) -> None:
    """Write both files; of data in memory (no `sources`) the held-out part follows from itself."""
    found = {"settings": data_settings(config), "tokenizer_sha256": tokenizer.sha256}
    if sources:
        found["sources"] = [source.as_json() for source in sources]
        found["held_out"] = [(name, text.decode("utf-8", "replace")) for name, text in held_out]
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
