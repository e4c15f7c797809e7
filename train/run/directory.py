"""The run directory: whose it is, what to go on from, and what ran there.

RUN_DIR/config.json holds the settings of the run. A later leg must have the same ones, up to those
that do not change what is learned (`config.IDENTITY_FREE`). RUN_DIR/.lock is held while a run is
going on; the system releases it when the process ends, however it ends.
"""

import fcntl
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
from pathlib import Path
from typing import TextIO

from kru_triton.train.run import checkpoints
from kru_triton.train.run.settings import BEFORE, IDENTITY_FREE, UserError

RUN_FILES = (
    "config.json",
    "metrics.jsonl",
    "summary.json",
    "data.json",
    "tokenizer.json",
    "checkpoints",
    "wandb",
)


def claim(run_dir: Path, resume: str) -> tuple[TextIO, Path | None]:
    """Take the directory for this run, before anything else is written there.

    Args:
        run_dir: created where it is missing.
        resume: "auto", "must" or "never".

    Returns:
        The lock, held while this file is open, and the checkpoint to go on from, or None.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = take_lock(run_dir)
        checkpoint = None
        if resume == "never":
            set_aside(run_dir)
        else:
            checkpoint = find_checkpoint(run_dir, resume == "must")
    except OSError as error:
        raise UserError(f"--run-dir {run_dir} cannot be written: {error.strerror}") from error
    return lock, checkpoint


def take_lock(run_dir: Path) -> TextIO:
    """The lock on the directory; UserError where another process has it."""
    lock = open(run_dir / ".lock", "a+")  # noqa: SIM115 (open as long as the run goes on)
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by forked data workers
    except BlockingIOError as error:
        lock.seek(0)
        raise UserError(
            f"--run-dir {run_dir} is in use by {lock.read().strip() or 'another process'}; "
            "wait for that run to end, or choose another --run-dir"
        ) from error
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
    return lock


def share(run_dir: Path, rank: int) -> None:
    """Check on a further process that it sees the directory of the first one, and may write."""
    where = f"--run-dir {run_dir}"
    if not (run_dir / ".lock").exists():
        raise UserError(
            f"{where} on {socket.gethostname()} is not the directory of process 0: all processes "
            "need one that they share"
        )
    try:
        checkpoints.write_atomic(run_dir / f".rank-{rank}", "here")
        (run_dir / f".rank-{rank}").unlink()
    except OSError as error:
        raise UserError(f"{where} cannot be written: {error.strerror}") from error


def find_checkpoint(run_dir: Path, must: bool = False) -> Path | None:
    """The newest good checkpoint; corrupt ones are renamed. UserError where one `must` be there."""
    checkpoint, corrupt = checkpoints.latest(run_dir)
    if must and not checkpoint:
        reasons = "".join(f"; {path.name} is corrupt: {reason}" for path, reason in corrupt)
        where = run_dir / "checkpoints"
        raise UserError(f"--resume must: no good checkpoint under {where}{reasons}")
    for path, reason in corrupt:
        aside = path.with_name(f"corrupt-{path.name}")
        print(f"warning: {path} is corrupt: {reason}; now named {aside.name}")
        path.rename(aside)
    if corrupt and checkpoint:
        print(f"warning: falling back to {checkpoint}")
    if corrupt and not checkpoint:
        print("warning: no good checkpoint is left; starting at step 0")
        set_aside(run_dir)
    return checkpoint


def write_settings(run_dir: Path, settings: dict) -> None:
    """Write config.json, unless the directory is of a run with other settings.

    Args:
        settings: its `wandb_id` is replaced by that of the run that goes on.
    """
    compare_settings(run_dir, settings)
    try:
        checkpoints.write_atomic(run_dir / "config.json", json.dumps(settings, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--run-dir {run_dir} cannot be written: {error.strerror}") from error


def compare_settings(run_dir: Path, settings: dict) -> None:
    """Refuse a directory of another configuration, naming what differs."""
    path = run_dir / "config.json"
    if not path.exists():
        return
    try:
        old = json.loads(path.read_text())
        settings["wandb_id"] = old["wandb_id"]
        before, now = identity(old), identity(settings)
        budgets = {key: (old[key], settings[key]) for key in ("steps", "minutes")}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not the configuration of a run ({error!r}); choose another --run-dir"
        ) from error
    different = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if different:
        lines = [f"  {key}: {before.get(key)!r} there, {now.get(key)!r} now" for key in different]
        raise UserError(
            "\n".join([f"{run_dir} belongs to a run with other settings:", *lines])
            + "\nchoose another --run-dir, or --resume never to set that run's files aside"
        )
    for key, (then, today) in budgets.items():
        if then != today:
            print(f"note: --{key} was {then} and is {today}: the schedule follows the new budget")


def setting_of(run_dir: Path, name: str):
    """A setting of the run in a directory; None where its config.json does not say."""
    try:
        return json.loads((run_dir / "config.json").read_text()).get(name)
    except (OSError, ValueError, AttributeError):
        return None


def identity(settings: dict) -> dict:
    """The settings that make a run what it is."""
    flat = {**BEFORE, **settings, **settings["model_config"]}
    free = IDENTITY_FREE | {"model_config", "wandb_id"}
    free |= {"muon_momentum"} if flat["optimizer"] != "muon" else set()
    return {key: value for key, value in flat.items() if key not in free}


def set_aside(run_dir: Path) -> None:
    """Move the files of an earlier run into `old-N/`."""
    present = [run_dir / name for name in RUN_FILES if (run_dir / name).exists()]
    if not present:
        return
    number = 1
    while (run_dir / f"old-{number}").exists():
        number += 1
    (run_dir / f"old-{number}").mkdir()
    for path in present:
        path.rename(run_dir / f"old-{number}" / path.name)
    print(f"the files of the earlier run are now in {run_dir}/old-{number}")


def versions() -> dict[str, str]:
    """Of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in ("kru-triton", "torch", "numpy", "triton", "safetensors", "wandb"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The git commit of this code, `-dirty` where it was changed; None outside a checkout."""
    here = Path(__file__).resolve()
    git = ["git", "--no-optional-locks", "-C", str(here.parent)]
    tracked = [*git, "ls-files", "--error-unmatch", here.name]
    describe = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        subprocess.run(tracked, capture_output=True, check=True)
        return subprocess.run(describe, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
