"""Checkpoints: safetensors and JSON with checksums, written atomically. No pickle is ever loaded.

    RUN_DIR/checkpoints/step-1000/
        model.safetensors
        optimizer.safetensors
        rank-0.safetensors     carried states, RNG, losses that are not logged yet
        trainer.json           step, tokens, seconds, data position, model configuration
        manifest.json          size and SHA-256 of each file above

A checkpoint is written to a hidden temporary folder, flushed to the disk, and renamed. So a folder
`step-N` is complete, or it was damaged later; the manifest tells.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch

FORMAT = 1
Tensors = dict[str, torch.Tensor]


class CorruptError(Exception):
    """A checkpoint that is not what was written."""


@dataclass
class Checkpoint:
    path: Path
    tensors: dict[str, Tensors]  # file stem -> name -> tensor
    trainer: dict


def list_steps(run_dir: Path) -> list[int]:
    """Steps of the checkpoints of a run, oldest first, whether good or not."""
    names = (path.name.removeprefix("step-") for path in (run_dir / "checkpoints").glob("step-*"))
    return sorted(int(name) for name in names if name.isdigit())


def folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step}"


def save(run_dir: Path, step: int, tensors: dict[str, Tensors], trainer: dict, keep: int) -> Path:
    """Write `step-N`, then remove all but the last `keep`.

    On OSError (a full disk) the older checkpoints are as they were.
    """
    target = folder(run_dir, step)
    temporary = target.with_name(f".tmp-{target.name}")
    for stale in target.parent.glob(".tmp-*"):  # of a run that was killed while it wrote
        shutil.rmtree(stale, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        manifest = {}
        for stem, group in tensors.items():
            group = {name: tensor.detach().cpu().contiguous() for name, tensor in group.items()}
            manifest[f"{stem}.safetensors"] = safetensors.torch.save(group)
        manifest["trainer.json"] = json.dumps({"format": FORMAT, **trainer}, indent=1).encode()
        for name, content in manifest.items():
            write_synced(temporary / name, content)
            manifest[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        write_synced(temporary / "manifest.json", json.dumps(manifest, indent=1).encode())
        sync_folder(temporary)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        sync_folder(target.parent)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in list_steps(run_dir)[:-keep]:
        shutil.rmtree(folder(run_dir, old), ignore_errors=True)
    return target


def load(path: Path) -> Checkpoint:
    """Read and verify one checkpoint. Raises CorruptError, naming the file that is wrong."""
    tensors, trainer = {}, None
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        for name, expected in manifest.items():
            content = (path / name).read_bytes()
            if len(content) != expected["bytes"]:
                raise CorruptError(
                    f"{name} has {len(content)} bytes, {expected['bytes']} were written"
                )
            if hashlib.sha256(content).hexdigest() != expected["sha256"]:
                raise CorruptError(f"{name} has another SHA-256 than was written")
            if name.endswith(".safetensors"):
                tensors[name.removesuffix(".safetensors")] = safetensors.torch.load(content)
            elif name == "trainer.json":
                trainer = json.loads(content)
    except FileNotFoundError as error:
        raise CorruptError(f"{Path(error.filename).name} is missing") from error
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        safetensors.SafetensorError,
    ) as error:
        raise CorruptError(f"cannot be read ({error})") from error
    if trainer is None:
        raise CorruptError("manifest.json does not list trainer.json")
    if trainer["format"] != FORMAT:
        raise CorruptError(f"has format {trainer['format']}, this version reads {FORMAT}")
    return Checkpoint(path, tensors, trainer)


def load_latest(run_dir: Path) -> tuple[Checkpoint | None, list[tuple[Path, str]]]:
    """The newest good checkpoint, and the newer ones that are not good, each with its reason."""
    corrupt = []
    for step in reversed(list_steps(run_dir)):
        try:
            return load(folder(run_dir, step)), corrupt
        except CorruptError as error:
            corrupt.append((folder(run_dir, step), str(error)))
    return None, corrupt


def write_synced(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_atomic(path: Path, content: str) -> None:
    """Replace a file in one go: a reader sees the old content or the new, never a part."""
    temporary = path.with_name(f".tmp-{path.name}")
    write_synced(temporary, content.encode())
    temporary.replace(path)


def sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
