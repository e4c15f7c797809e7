"""The device that is measured, the commit, and what every row says of both."""

import datetime
import gc
import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def pick_device(name: str) -> torch.device:
    """The device of this name; "auto" takes the first GPU there is, else the CPU."""
    there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name == "auto":
        name = "cuda" if len(there) > 1 else "cpu"
    if name == "cuda" and len(there) > 1:
        name = f"cuda:{torch.cuda.current_device()}"
    if name not in there:
        raise ValueError(f"device: {name!r} is not here; there are auto, {', '.join(there)}")
    if name != "cpu" and torch.device(name).index != torch.cuda.current_device():
        torch.cuda.set_device(name)  # events and graphs belong to the current one
    return torch.device(name)


def cpu_info() -> dict[str, str]:
    """What /proc/cpuinfo says of the first processor, {} where there is none."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().split("\n\n")[0].splitlines() if path.exists() else []
    return dict(map(str.strip, line.split(":", 1)) for line in lines if ":" in line)


def cpu_kind() -> str | None:
    """Family, model and the vector extensions by which processors of one name differ."""
    known = cpu_info()
    if "cpu family" not in known:
        return None
    flags = [f for f in known["flags"].split() if f.startswith(("amx", "avx"))]
    return f"family {known['cpu family']} model {known['model']}: {' '.join(sorted(flags))}"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_info().get("model name") or platform.processor() or platform.machine()


def slug(name: str) -> str:
    """A device's name as a file name: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")


def commit() -> str:
    """Short hash of what is measured, with -dirty where the library differs from it.

    BENCH_COMMIT in the environment overrides it. In a copy without git it is a hash of the
    library's sources, so that an interrupted run still knows its own rows.
    """

    def git(*arguments):
        return subprocess.run(
            ["git", "--no-optional-locks", *arguments], cwd=ROOT, capture_output=True, text=True
        )

    if given := os.environ.get("BENCH_COMMIT"):
        return given
    if (ROOT / ".git").exists() and shutil.which("git"):
        head = git("rev-parse", "--short", "HEAD")
        if not head.returncode:
            changed = git("status", "--porcelain", "--", "kru_triton", "kernels").stdout.strip()
            return head.stdout.strip() + ("-dirty" if changed else "")
    sources = sorted([*ROOT.glob("kru_triton/**/*.py"), *ROOT.glob("kernels/*.py")])
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources))
    return f"sources-{digest.hexdigest()[:10]}"


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def provenance(device_or_name, command: str) -> dict:
    """What every row says of where it came from."""
    on_gpu = isinstance(device_or_name, torch.device) and device_or_name.type == "cuda"
    name = device_or_name if isinstance(device_or_name, str) else device_name(device_or_name)
    return {
        "device": name,
        "cpu": None if on_gpu or isinstance(device_or_name, str) else cpu_kind(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "cuda": (torch.version.cuda or torch.version.hip) if on_gpu else None,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
    }


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
