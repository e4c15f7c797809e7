"""Weights & Biases is best effort: `metrics.jsonl` is the record, and makes its run anew.

    RUN_DIR/config.json, metrics.jsonl, summary.json -> the W&B run of the same id

    python train/run/wandb_run.py runs/lm
    python train/run/wandb_run.py runs/lm --wandb offline
    wandb sync runs/lm/wandb/offline-run-*

A run of that id that the server has is replaced. For runs that were logged offline in several
legs, and for those whose logging broke. Samples and figures are not in metrics.jsonl, so they are
not in the new run. Exit codes: 0 done, 1 W&B failed, 2 no run there, 130 Ctrl-C.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of an import

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
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import tyro

from kru_triton.train.run.metrics import read_rows
from kru_triton.train.run.script import one_line
from kru_triton.train.run.settings import UserError


class Wandb:
    """Weights & Biases, which may neither stop nor slow a run.

    Everything goes through a queue to a thread, so that no call waits for a network. The first
    failure turns it off, in one line; `replay` makes the whole run of metrics.jsonl.

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
            say(f"wandb: not done after {seconds:.0f} s, left; wandb_run.py sends the rest")
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
        for variable in [v for v in os.environ if v.startswith("WANDB_") and not os.environ[v]]:
            del os.environ[variable]  # W&B refuses an empty mode
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


# Replay


@dataclass
class ReplayConfig:
    run_dir: tyro.conf.Positional[str]
    """The directory of a run."""
    wandb: Literal["auto", "online", "offline"] = "auto"
    """auto: as WANDB_MODE says; else online with a key and a reachable host, else offline."""
    wandb_project: str = ""
    """Project there. Empty: that of the run's flags, WANDB_PROJECT, or kru_triton."""
    wandb_name: str = ""
    """Name of the run there. Empty: that of the run's flags, WANDB_NAME, or that of run_dir."""
    seconds: float = 600.0
    """How long W&B may take."""


def replay(config: ReplayConfig) -> bool:
    """Send everything; False where W&B did not take it."""
    run_dir = Path(config.run_dir)
    try:
        settings = json.loads((run_dir / "config.json").read_text())
        rows = read_rows(run_dir / "metrics.jsonl")
        run_id = settings["wandb_id"]
        path = run_dir / "summary.json"
        summary = json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run_dir} is not the directory of a run: {error!r}") from error
    os.environ.pop("WANDB_RESUME", None)  # the run on the server is replaced
    wandb = Wandb(
        config.wandb,
        run_dir,
        run_id,
        settings,
        resume=False,
        project=config.wandb_project or settings.get("wandb_project", ""),
        name=config.wandb_name or settings.get("wandb_name", ""),
    )
    if wandb.off:
        raise UserError("WANDB_MODE or WANDB_DISABLED switches W&B off: give --wandb")
    for row in rows:
        wandb.log(row)
    wandb.summarize(summary)
    sent = wandb.finish(config.seconds)
    if sent:
        print(f"{len(rows)} rows")
    return sent


def main() -> None:
    description, _, examples = __doc__.partition("\n\n    python")
    with one_line():
        config = tyro.cli(ReplayConfig, description=description + "\n\n    python" + examples)
        sent = replay(config)
    sys.exit(0 if sent else 1)


if __name__ == "__main__":
    main()
