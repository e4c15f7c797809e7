"""Make the Weights & Biases run of a run directory anew, from its metrics.jsonl.

    RUN_DIR/config.json, metrics.jsonl, summary.json -> the W&B run of the same id

    python train/replay_wandb.py runs/lm
    python train/replay_wandb.py runs/lm --wandb offline && wandb sync runs/lm/wandb/offline-run-*

A run of that id that the server has is replaced. For runs that were logged offline in several
legs, and for those whose logging broke. Samples and figures are not in metrics.jsonl, so they are
not in the new run. Exit codes: 0 done, 1 W&B failed, 2 no run there.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from kru_triton.train.config import UserError
from kru_triton.train.logger import Wandb, read_rows


@dataclass
class ReplayConfig:
    run_dir: tyro.conf.Positional[str]
    """The run directory of train/lm.py."""
    wandb: Literal["auto", "online", "offline"] = "auto"
    """auto: online with a key and a reachable host, else offline."""
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
    wandb = Wandb(config.wandb, run_dir, run_id, settings, resume=False)
    for row in rows:
        wandb.log(row)
    wandb.summarize(summary)
    sent = wandb.finish(config.seconds)
    if sent:
        print(f"{len(rows)} rows")
    return sent


def main() -> None:
    description, _, examples = __doc__.partition("\n\n    python")
    config = tyro.cli(ReplayConfig, description=description + "\n\n    python" + examples)
    try:
        sys.exit(0 if replay(config) else 1)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
