"""Where a run's numbers go: `metrics.jsonl` is the record, Weights & Biases is best effort."""

import contextlib
import html
import io
import json
import netrc
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from kru_triton.train.run.checkpoints import write_atomic


class Metrics:
    """`metrics.jsonl`: one JSON object per line, ordered by step.

    Opening it at step N drops the rows of later steps, so that a resumed run ends with the file of
    a run that never stopped. Rows that a full disk refuses are kept and written with the next one.
    """

    def __init__(self, path: Path, last_step: int):
        self.path = path
        self.rows = [row for row in read_rows(path) if row["step"] <= last_step]
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self.good_bytes = path.stat().st_size
        self.unwritten = b""

    def write(self, row: dict) -> None:
        self.rows.append(row)
        self.unwritten += json.dumps(row).encode() + b"\n"
        try:
            with open(self.path, "r+b", buffering=0) as file:
                file.truncate(self.good_bytes)  # drops a line that was cut short
                file.seek(self.good_bytes)
                if file.write(self.unwritten) == len(self.unwritten):
                    self.good_bytes += len(self.unwritten)
                    self.unwritten = b""
        except OSError as error:
            print(
                f"warning: {self.path}: {error.strerror}; the row is kept for later",
                file=sys.stderr,
            )

    def sync(self) -> None:
        """Flush to the disk (before a checkpoint that stands for these rows)."""
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())


def read_rows(path: Path) -> list[dict]:
    """All whole rows of a metrics file; a last line cut short by a crash is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class Wandb:
    """Weights & Biases, which may neither stop nor slow a run.

    Everything goes through a queue to a thread, so that no call waits for a network. The first
    failure turns it off, in one line; `replay_wandb.py` makes the whole run of metrics.jsonl.

    W&B's own environment variables hold where an argument here leaves something open.

    Args:
        mode: "auto" (WANDB_DISABLED, WANDB_MODE; else online with a key and a host that answers,
            else offline), "online", "offline" or "disabled".
        resume: go on with the run of this id where the server has it, instead of replacing it.
        project: "" for WANDB_PROJECT, or kru_triton.
        name: "" for WANDB_NAME, or that of the directory.
    """

    def __init__(
        self,
        mode: str,
        run_dir: Path,
        run_id: str,
        config: dict,
        resume: bool = True,
        project: str = "",
        name: str = "",
    ):
        self.run, self.off, self.draws = None, True, True
        mode = mode_of_environment() if mode == "auto" else mode
        if mode == "disabled":
            return
        self.off = False
        self.calls = queue.SimpleQueue()
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()
        project = project or theirs("project") or "kru_triton"
        name = name or theirs("name") or run_dir.resolve().name
        self.calls.put((self.start, mode, run_dir, run_id, config, resume, project, name))

    def log(self, row: dict, sample: str = "", draw: Callable | None = None) -> None:
        """A row of metrics.jsonl, a text sample, the matplotlib figures (by name) of `draw`."""
        if self.off:
            return
        pictures = {}
        if draw and self.draws:
            try:
                pictures = {name: as_picture(figure) for name, figure in draw().items()}
            except Exception as error:  # a picture is never worth a run
                self.draws = False
                say(f"wandb: no figures: {error}")
        self.calls.put((self.send, row, sample, pictures))

    def summarize(self, summary: dict) -> None:
        if not self.off:
            self.calls.put((lambda: self.run.summary.update(summary),))

    def finish(self, seconds: float = 30.0) -> bool:
        """Wait until everything has been handed over, for so long. False where it was not."""
        if self.off:
            return False
        self.calls.put((lambda: self.run.finish(),))
        self.calls.put(None)
        self.thread.join(seconds)
        if self.thread.is_alive():
            self.off = True
            say(f"wandb: not done after {seconds:.0f} s, left; replay_wandb.py sends the rest")
        return not self.off

    # In the thread

    def work(self) -> None:
        """Make the calls in the queue, up to None or to the first that fails."""
        while not self.off and (call := self.calls.get()):
            try:
                call[0](*call[1:])
            except ImportError:
                self.off = True
                say("wandb: not installed, off (metrics.jsonl is the record)")
            except Exception as error:  # whatever goes wrong in there must not stop the training
                self.off = True
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                say(f"wandb: off ({reason}); metrics.jsonl goes on")
                with contextlib.suppress(Exception):  # it may be this that is broken
                    self.wandb.teardown()

    def start(
        self,
        mode: str,
        run_dir: Path,
        run_id: str,
        config: dict,
        resume: bool,
        project: str,
        name: str,
    ) -> None:
        import wandb

        self.wandb = wandb
        reason = ""
        if mode == "auto":
            reason = why_offline(wandb.setup().settings.base_url)
            mode = "offline" if reason else "online"
        ours = {"console": "off", "silent": True, "init_timeout": 10, "disable_git": True}
        defaults = {key: value for key, value in ours.items() if not theirs(key)}
        folder = theirs("dir") or str(run_dir)
        self.run = wandb.init(
            project=project,
            name=name,
            id=run_id,
            resume="allow" if resume and mode == "online" and not theirs("resume") else None,
            mode=mode,
            dir=folder,
            config=config,
            settings=wandb.Settings(**defaults),
        )
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")
        if not is_true(theirs("silent")):
            say(f"wandb: {mode}{f' ({reason})' if reason else ''}, files in {folder}/wandb")

    def send(self, row: dict, sample: str, pictures: dict) -> None:
        media = {name: self.wandb.Image(picture) for name, picture in pictures.items()}
        if sample:
            media["sample"] = self.wandb.Html(f"<pre>{html.escape(sample)}</pre>")
        self.run.log({**row, **media})


def why_offline(base_url: str) -> str:
    """The reason to stay offline; empty where there is a key and the host answers within 3 s."""
    host = urlsplit(base_url).hostname or ""
    if not os.environ.get("WANDB_API_KEY"):
        try:
            known = netrc.netrc().authenticators(host)
        except (OSError, netrc.NetrcParseError):
            known = None
        if not known:
            return "no key"
    port = urlsplit(base_url).port or (443 if base_url.startswith("https") else 80)
    try:
        socket.create_connection((host, port), timeout=3).close()
    except OSError as error:
        return f"{host} cannot be reached: {error}"
    return ""


def as_picture(figure):
    """A matplotlib figure as a PIL image."""
    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer)


def say(line: str) -> None:
    with contextlib.suppress(OSError):  # nobody may be reading any more
        print(line)


def theirs(name: str) -> str:
    """W&B's environment variable of a name; empty where it is not set."""
    return os.environ.get(f"WANDB_{name.upper()}", "")


def is_true(switch: str) -> bool:
    return switch.lower() in ("true", "1", "yes", "on")


def mode_of_environment() -> str:
    """The mode that W&B's variables ask for; "auto" where they do not."""
    mode = "disabled" if is_true(theirs("disabled")) else theirs("mode") or "auto"
    return {"dryrun": "offline", "run": "online"}.get(mode, mode)


def new_run_id() -> str:
    """WANDB_RUN_ID where W&B takes it, else an id of our own."""
    chosen = theirs("run_id").strip()
    if chosen and not set(chosen) & set(":;,#?/'"):
        return chosen
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}"
