"""Checkpoints: safetensors and JSON with checksums, written atomically. No pickle is ever loaded.

    RUN_DIR/checkpoints/step-1000/
        model.safetensors
        optimizer.safetensors
        trainer.json           step, tokens, seconds, model configuration, number of processes
        rank-0.safetensors     of process 0: carried states, RNG, losses that are not logged yet
        rank-0.json            of process 0: data position
        manifest.json          size and SHA-256 of each file above

With several processes each writes its own `rank-R` files (so they must share the run directory),
the first one writes the rest. A checkpoint is written to a hidden temporary folder, flushed to the
disk, and renamed. So a folder `step-N` is complete, or it was damaged later; the manifest tells:

    python train/run/checkpoints.py RUN_DIR     lists and verifies; exit code 1 where one is corrupt
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of an import

import argparse
import hashlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import safetensors
import safetensors.torch
import torch

from kru_triton.train.run.processes import Processes
from kru_triton.train.run.script import one_line
from kru_triton.train.run.settings import UserError

FORMAT = 2
Tensors = dict[str, torch.Tensor]
T = TypeVar("T")


class CorruptError(Exception):
    """A checkpoint that is not what was written."""


@dataclass
class Checkpoint:
    path: Path
    tensors: dict[str, Tensors]  # file stem -> name -> tensor
    documents: dict[str, dict]  # file stem -> content of a JSON file

    @property
    def trainer(self) -> dict:
        return self.documents["trainer"]


def list_steps(run_dir: Path) -> list[int]:
    """Steps of the checkpoints of a run, oldest first, whether good or not."""
    names = (path.name.removeprefix("step-") for path in (run_dir / "checkpoints").glob("step-*"))
    return sorted(int(name) for name in names if name.isdigit())


def folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step}"


# Write


def save(
    run_dir: Path,
    step: int,
    tensors: dict[str, Tensors],
    documents: dict[str, dict],
    keep: int,
    processes: Processes = Processes(),  # noqa: B008 (frozen)
    before: Callable[[], None] = lambda: None,
) -> int:
    """Write `step-N`, then remove all but the last `keep`. Returns its bytes.

    Called by all processes, each with the tensors and JSON documents that are its own. On OSError
    (a full disk), on any of them, all raise and the older checkpoints are as they were. `before`
    is called first.
    """
    target = folder(run_dir, step)
    temporary = target.with_name(f".tmp-{target.name}")
    files, error = {}, None
    try:
        before()
        temporary.mkdir(parents=True, exist_ok=True)
        for stem, group in tensors.items():
            group = {name: tensor.detach().cpu().contiguous() for name, tensor in group.items()}
            name = f"{stem}.safetensors"
            files[name] = write_counted(temporary / name, safetensors.torch.save(group))
        for stem, document in documents.items():
            content = json.dumps({"format": FORMAT, **document}, indent=1).encode()
            files[f"{stem}.json"] = write_counted(temporary / f"{stem}.json", content)
    except OSError as caught:
        error = caught
    written = processes.gather((files, error))
    files = {name: entry for part, _ in written for name, entry in part.items()}
    errors = [error for _, error in written if error]
    if processes.rank == 0:
        try:
            if not errors:
                write_synced(temporary / "manifest.json", json.dumps(files, indent=1).encode())
                sync_folder(temporary)
                temporary.rename(target)
                sync_folder(target.parent)
        except OSError as caught:
            errors = [caught]
        if errors:
            shutil.rmtree(temporary, ignore_errors=True)
    errors = processes.gather(errors)[0]
    if errors:
        raise errors[0]
    if processes.rank == 0:
        for old in list_steps(run_dir)[:-keep]:
            remove(folder(run_dir, old))
    return sum(entry["bytes"] for entry in files.values())


def remove(path: Path) -> None:
    """Delete a checkpoint; a kill in the middle leaves nothing that looks like one."""
    hidden = path.with_name(f".tmp-old-{path.name}")
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def remove_unfinished(run_dir: Path) -> None:
    """What a killed run was about to write or to delete."""
    for stale in (run_dir / "checkpoints").glob(".tmp-*"):
        shutil.rmtree(stale, ignore_errors=True)


class Writer:
    """Writes checkpoints in a thread, one at a time, while the training goes on.

    `save` copies the tensors and returns. All processes call it, and `wait`, at the same steps.

    Args:
        say: prints a line: what was written, or a warning that it could not be.
        saved_step: the newest checkpoint that is known to be good.
    """

    def __init__(
        self,
        run_dir: Path,
        keep: int,
        processes: Processes,
        say: Callable[[str], None],
        saved_step: int | None,
    ):
        self.run_dir, self.keep, self.say = run_dir, keep, say
        self.processes = processes.new_group()
        self.saved_step = saved_step
        self.bytes, self.seconds = 0, 0.0  # of the last checkpoint; of all writes together
        self.blocked = 0.0  # seconds that the training has waited for them
        self.thread = self.error = None
        if processes.rank == 0:
            remove_unfinished(run_dir)

    def save(
        self,
        step: int,
        tensors: dict[str, Tensors],
        documents: dict[str, dict],
        before: Callable[[], None] = lambda: None,
    ) -> None:
        """Copy the tensors and start to write them; waits for an earlier write that goes on yet."""
        began = time.perf_counter()
        self.wait()
        copies = {
            stem: {name: tensor.detach().to("cpu", copy=True) for name, tensor in group.items()}
            for stem, group in tensors.items()
        }
        self.thread = threading.Thread(target=self.write, args=(step, copies, documents, before))
        self.thread.start()
        self.blocked += time.perf_counter() - began

    def write(self, step: int, tensors: dict[str, Tensors], documents: dict, before) -> None:
        began = time.perf_counter()
        try:
            arguments = (self.keep, self.processes, before)
            self.bytes = save(self.run_dir, step, tensors, documents, *arguments)
        except OSError as error:
            last = "there is none yet"
            if self.saved_step is not None:
                last = f"step-{self.saved_step} stays"
            line = f"warning: checkpoint of step {step} not written: {error.strerror}; {last}"
        except BaseException as error:  # for `wait`, in the thread that trains
            self.error = error
            return
        else:
            self.saved_step = step
            seconds = time.perf_counter() - began
            self.seconds += seconds
            line = f"checkpoint step-{step}: {self.bytes:,} bytes, {seconds:.2f} s"
        try:
            self.say(line)
        except OSError as error:  # nobody reads it any more
            self.error = error

    def wait(self) -> None:
        """Until nothing is being written."""
        if self.thread:
            self.thread.join()
            self.thread = None
        if self.error:
            error, self.error = self.error, None
            raise error


# Read


def verify(path: Path) -> dict:
    """Check every file of a checkpoint against its manifest, which is returned.

    Raises:
        CorruptError: naming the file that is wrong.
        UserError: it is good, and of another version of this program.
    """
    with reading(path):
        manifest = json.loads((path / "manifest.json").read_bytes())
        for name in manifest:
            verify_file(path, name, manifest)
        if "trainer.json" not in manifest:
            raise CorruptError("manifest.json does not list trainer.json")
        check_format(path, json.loads((path / "trainer.json").read_bytes()))
    return manifest


def verify_file(path: Path, name: str, manifest: dict) -> None:
    with open(path / name, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        compare(name, manifest[name], file.tell(), digest)


def check_format(path: Path, trainer: dict) -> None:
    if trainer["format"] != FORMAT:
        raise UserError(
            f"{path} has format {trainer['format']}, this version reads format {FORMAT}: go on "
            "with the version that wrote it, choose another --run-dir, or set it aside with "
            "--resume never"
        )


def load(path: Path, ranks: Collection[int] | None = None, whole: bool = False) -> Checkpoint:
    """Read a checkpoint, verifying what is read.

    All that is wanted is open before any of it is read, so that a run that goes on may delete the
    checkpoint in the meantime.

    Args:
        ranks: the processes whose files are wanted; None: all.
        whole: verify the files that are not wanted, too.

    Raises:
        CorruptError: naming the file that is wrong.
        UserError: it is good, and of another version of this program.
    """
    checkpoint = Checkpoint(path, {}, {})
    with reading(path), ExitStack() as stack:
        manifest = json.loads((path / "manifest.json").read_bytes())
        wanted = [
            name
            for name in manifest
            if ranks is None or not name.startswith("rank-") or int(Path(name).stem[5:]) in ranks
        ]
        files = {name: stack.enter_context(open(path / name, "rb")) for name in wanted}
        for name in manifest.keys() - files.keys() if whole else ():
            verify_file(path, name, manifest)
        for name, file in files.items():
            content = file.read()
            compare(name, manifest[name], len(content), hashlib.sha256(content).hexdigest())
            stem, kind = name.rsplit(".", 1)
            if kind == "safetensors":
                checkpoint.tensors[stem] = safetensors.torch.load(content)
            else:
                checkpoint.documents[stem] = json.loads(content)
        check_format(path, checkpoint.trainer)
    return checkpoint


def newest(run_dir: Path, read: Callable[[Path], T]) -> tuple[T | None, list[tuple[Path, str]]]:
    """What `read` makes of the newest good checkpoint, and the newer ones, each with its reason.

    One that a run which goes on has deleted since it was listed is no bad one: the choice is made
    anew, for a newer one is there.
    """
    corrupt, steps = [], list_steps(run_dir)
    while steps:
        path = folder(run_dir, steps.pop())
        try:
            return read(path), corrupt
        except CorruptError as error:
            if os.path.lexists(path):
                corrupt.append((path, str(error)))
            else:
                corrupt, steps = [], list_steps(run_dir)
    return None, corrupt


def latest(run_dir: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest good checkpoint, and the newer ones that are not good, each with its reason."""

    def good(path: Path) -> Path:
        verify(path)
        return path

    return newest(run_dir, good)


def load_latest(run_dir: Path) -> tuple[Checkpoint | None, list[tuple[Path, str]]]:
    """`latest`, with the checkpoint loaded: what all processes share."""
    return newest(run_dir, lambda path: load(path, ranks=(), whole=True))


def compare(name: str, expected: dict, count: int, digest: str) -> None:
    if count != expected["bytes"]:
        raise CorruptError(f"{name} has {count} bytes, {expected['bytes']} were written")
    if digest != expected["sha256"]:
        raise CorruptError(f"{name} has another SHA-256 than was written")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever is wrong with a file in the block is a CorruptError."""
    try:
        yield
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


# Files


def write_counted(path: Path, content: bytes) -> dict:
    """Write a file; its entry in the manifest."""
    write_synced(path, content)
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


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


def main() -> None:
    parser = argparse.ArgumentParser(description="List and verify the checkpoints of a run.")
    parser.add_argument("run_dir", type=Path)
    run_dir = parser.parse_args().run_dir
    with one_line():
        failed = list_all(run_dir)
    sys.exit(failed)


def list_all(run_dir: Path) -> bool:
    """Print what is known of every checkpoint; whether one is not good."""
    steps = list_steps(run_dir)
    if not steps:
        raise UserError(f"no checkpoint under {run_dir / 'checkpoints'}")
    failed = False
    for step in steps:
        path = folder(run_dir, step)
        try:
            manifest = verify(path)
        except (CorruptError, UserError) as error:
            if not os.path.lexists(path):  # deleted by a run that goes on
                continue
            failed = True
            print(f"{path.name}: CORRUPT: {error}" if isinstance(error, CorruptError) else error)
        else:
            count = sum(entry["bytes"] for entry in manifest.values())
            print(f"{path.name}: good, {len(manifest)} files, {count:,} bytes")
    return failed


if __name__ == "__main__":
    main()
