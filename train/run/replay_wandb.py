"""Make the Weights & Biases run of a run directory anew, from its metrics.jsonl.

    RUN_DIR/config.json, metrics.jsonl, summary.json -> the W&B run of the same id

    python train/run/replay_wandb.py runs/lm
    python train/run/replay_wandb.py runs/lm --wandb offline
    wandb sync runs/lm/wandb/offline-run-*

A run of that id that the server has is replaced. For runs that were logged offline in several
legs, and for those whose logging broke. Samples and figures are not in metrics.jsonl, so they are
not in the new run. Exit codes: 0 done, 1 W&B failed, 2 no run there, 130 Ctrl-C.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of an import

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from kru_triton.train.run.metrics import Wandb, read_rows
from kru_triton.train.run.script import one_line
from kru_triton.train.run.settings import UserError


@dataclass
class ReplayConfig:
    run_dir: tyro.conf.Positional[str]
    """The run directory of train/lm.py."""
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
