"""State tracking: which recurrences find a finite automaton, and how far beyond training it holds.

    python -m bench states --tasks parity s3 --flags '--steps 3000' --run-dir runs/states
    python -m bench states --settings '--model kru --nonlinearity tanh' '--model lstm' --seeds 3
    python -m bench states --table

Every setting is flags of `train/tasks/state_tracking.py`, which says what the tasks are; `--flags`
holds for all. Rows go to `bench/results/states.jsonl` when they are there; runs found in it are not
repeated, so a command that was cut off goes on where it was.
"""

import shlex
import statistics
from pathlib import Path

import torch

from bench import harness
from bench.quality.baselines import train

TASKS = ("parity", "modular", "s3", "s5")
SETTINGS = (
    *(f"--model kru --nonlinearity {n}" for n in ("tanh", "modtanh", "relu", "modrelu")),
    "--model kru --nonlinearity identity",
    *(f"--model {model}" for model in ("krulstm", "lstm", "gru", "rnn", "mingru")),
    "--model transformer --num-heads 4",
)


def main(argv: list[str] | None = None) -> int:
    parser = harness.plain_parser(__doc__, "states")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--settings", nargs="+", default=SETTINGS, metavar="FLAGS")
    parser.add_argument("--flags", default="", help="for all settings")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/states"))
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "states.jsonl")
    parser.add_argument("--table", action="store_true", help="print the rows, run nothing")
    args = parser.parse_args(argv)
    if not args.table:
        for seed in range(args.seeds):
            for task in args.tasks:
                for setting in args.settings:
                    run(args, task, f"{setting} {args.flags}".strip(), seed)
    print_table(harness.read_rows(args.out))
    return 0


def run(args, task: str, flags: str, seed: int) -> None:
    """One training run, unless it has been made before."""
    key = {"task": task, "flags": flags, "seed": seed}
    for row in harness.read_rows(args.out):
        if all(row[name] == value for name, value in key.items()):
            return
    name = f"{task} {flags} seed {seed}"
    settings = ["--task", task, *shlex.split(flags), "--seed", str(seed), "--wandb", "disabled"]
    settings += ["--checkpoint-every", "0", "--no-pictures"]
    summary = train("tasks/state_tracking.py", settings, args.run_dir / harness.slug(name))
    told = shlex.join(["python", "train/tasks/state_tracking.py", *settings])
    row = {"bench": "states", "name": name, "status": "ok" if summary else "failed", **key}
    if summary:
        for kind in ("accuracy", "last"):
            found = {k.split("_")[-1]: v for k, v in summary.items() if f"test/{kind}_" in k}
            row[kind] = found  # by length
        row["validation_nats"] = summary["best/loss_nats"]
        kept = ("steps", "best_step", "parameters", "recurrent_parameters", "seconds")
        row |= {key: summary[key] for key in kept}
    else:
        row["reason"] = "the loss diverged"
    harness.append_row(args.out, row | harness.provenance(torch.device("cpu"), told))
    print(f"{name}: {row.get('last', row['status'])}", flush=True)


def print_table(rows: list[dict]) -> None:
    """Share of right answers after the last symbol: mean of the seeds, and the worst of them."""
    cells = {}
    for row in harness.latest(rows):
        cells.setdefault((row["task"], row["flags"]), []).append(row)
    print("\n| task | setting | seeds | at each length: mean (worst) |\n|---|---|---|---|")
    for (task, flags), own in sorted(cells.items()):
        own = [row for row in own if row["status"] == "ok"]
        told = [
            f"{n}: {statistics.mean(shares):.3f} ({min(shares):.3f})"
            for n in (own[0]["last"] if own else ())
            for shares in [[row["last"][n] for row in own]]
        ]
        print(f"| {task} | {flags} | {len(own)} | {', '.join(told) or 'diverged'} |")
