"""The language model against its baselines: equal parameters, each at its best learning rate.

    python -m bench baselines --run-dir runs/baselines
    python -m bench baselines --models kru lstm --steps 200 --minutes 0.5 --run-dir runs/two
    python -m bench baselines --params 108000 --flags '--hidden-size 168' --seeds 3 \\
        --data text:shakespeare.txt --name shakespeare --run-dir runs/small

Two comparisons, both through `train/lm.py`, in one residual frame of equally many blocks. Each
model has its own width of state over that of the stream: the Kronecker models the preset's, the
others the better one of those tried (`SHAPES`).

    tokens  every model reads the same number of tokens (`--steps`)
    wall    every model takes the steps that it makes in `--minutes`, from speeds measured before
            with the models in turn in one process, so other load on the machine favours none

The learning rates double from `--lr` on; while the best one is at an end of those tried, the next
one beyond it is run too, so every best is bracketed from both sides. The Kronecker factors keep the
preset's rate. `--seeds` repeats the best rate of each model with other seeds. Rows go to
`bench/results/baselines.jsonl`; runs found there are not repeated, `--table` prints them all.
"""

import dataclasses
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from bench import harness
from kru_triton.lm.model import LanguageModel
from kru_triton.train.reproduce import without_folder
from kru_triton.train.run.device import keep_freed_memory, pick_dtype
from kru_triton.train.run.optimizers import build_optimizers
from kru_triton.train.run.settings import model_config, parse
from kru_triton.train.text.tokenizer import ByteTokenizer

MODELS = ("kru", "krulstm", "lstm", "gru", "rnn", "mingru", "transformer")
SHAPES = {  # what matters is the ratio: --match-params scales both
    "lstm": "--d-model 64 --hidden-size 64",
    "gru": "--d-model 64 --hidden-size 128",
    "rnn": "--d-model 64 --hidden-size 128",
    "transformer": "--num-heads 4",
}


def main(argv: list[str] | None = None) -> int:
    parser = harness.plain_parser(__doc__, "baselines")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--preset", default="tiny", help="of the KRU; the others match its size")
    parser.add_argument("--params", type=int, default=0, help="parameters of all; 0: the preset's")
    parser.add_argument("--flags", default="", help="of train/lm.py, over the preset, for all")
    parser.add_argument("--data", default="stdlib", help="as of train/lm.py")
    parser.add_argument("--name", default="stdlib", help="of the data, in the rows")
    parser.add_argument("--seeds", type=int, default=1, help="of the best rate of each model")
    parser.add_argument("--steps", type=int, default=400, help="at equal tokens; 0: leave out")
    parser.add_argument("--minutes", type=float, default=1.5, help="at equal time; 0: leave out")
    parser.add_argument("--lr", type=float, default=2e-3, help="lowest learning rate of the grid")
    parser.add_argument("--rates", type=int, default=4, help="learning rates before extending")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/baselines"))
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "baselines.jsonl")
    parser.add_argument("--table", action="store_true", help="print the rows, run nothing")
    args = parser.parse_args(argv)
    if args.table:
        print_table(harness.read_rows(args.out))
        return 0

    shared = ["--preset", args.preset, *shlex.split(args.flags)]
    count = args.params or num_parameters(shared)
    shared += ["--match-params", str(count)]
    settings = {
        model: [*shared, "--model", model, *shlex.split(SHAPES.get(model, ""))]
        for model in args.models
    }
    args.run_dir.mkdir(parents=True, exist_ok=True)
    steps = {}
    if args.steps:
        steps["tokens"] = dict.fromkeys(args.models, args.steps)
    if args.minutes:
        speeds_file = args.run_dir / "speeds.json"
        if not speeds_file.exists():
            speeds_file.write_text(json.dumps(measure_speeds(settings)))
        speeds = json.loads(speeds_file.read_text())  # steps per second, one thread
        steps["wall"] = {model: round(60 * args.minutes * speeds[model]) for model in args.models}
    tasks = [(kind, model) for kind in steps for model in args.models]
    with ThreadPoolExecutor(args.jobs) as pool:
        done = pool.map(
            lambda task: bracket(args, *task, settings[task[1]], steps[task[0]][task[1]]),
            tasks,
        )
        print_table([row for rows in done for row in rows])
    return 0


def num_parameters(flags: list[str]) -> int:
    with torch.device("meta"):
        return LanguageModel(model_config(parse(flags), ByteTokenizer.vocab_size)).num_parameters


def measure_speeds(settings: dict[str, list[str]], rounds: int = 7) -> dict[str, float]:
    """Training steps per second of every model on one thread: medians of rounds taken in turn."""
    torch.set_num_threads(1)
    keep_freed_memory()
    seconds = {model: [] for model in settings}
    ready, dtype = {}, pick_dtype("auto", torch.device("cpu"))
    for model, flags in settings.items():
        config = parse(flags)
        net = LanguageModel(model_config(config, ByteTokenizer.vocab_size))
        ready[model] = (config, net, build_optimizers(net, config))
    for round_ in range(rounds):
        for model, (config, net, optimizers) in ready.items():
            tokens = torch.randint(256, (config.batch_size, config.segment_length))
            reset = torch.zeros_like(tokens, dtype=torch.bool)
            began = time.perf_counter()
            for optimizer in optimizers:
                optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                logits, _ = net(tokens, None, reset)
            torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), tokens.flatten()
            ).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), config.clip)
            for optimizer in optimizers:
                optimizer.step()
            if round_:  # the first one warms up
                seconds[model].append(time.perf_counter() - began)
    return {model: 1 / statistics.median(times) for model, times in seconds.items()}


def bracket(args, kind: str, model: str, flags: list[str], steps: int) -> list[dict]:
    """Rows of one model in one comparison, its best learning rate inside the ones tried."""
    rates = [args.lr * 2**k for k in range(args.rates)]
    rows = {}
    while True:
        for lr in rates:
            if lr not in rows:
                rows[lr] = run(args, kind, model, flags, steps, lr)
        best = min(rows, key=lambda lr: rows[lr]["val_bpb"])
        if best == min(rows):
            rates = [best / 2]
        elif best == max(rows):
            rates = [best * 2]
        else:
            break
    seeds = range(1, args.seeds)
    return [*rows.values(), *(run(args, kind, model, flags, steps, best, s) for s in seeds)]


def run(args, kind, model, flags, steps, lr, seed=0) -> dict:
    """One training run, or its row where it has been made before."""
    key = {"kind": kind, "preset": args.preset, "model": model, "lr": lr, "steps": steps}
    key |= {"data": args.name, "params": args.params, "flags": args.flags, "seed": seed}
    for row in harness.read_rows(args.out):
        if all(row[name] == value for name, value in key.items()):
            return row
    folder = args.run_dir / f"{args.name}-{args.params}-{kind}-{model}-{lr:g}-{seed}"
    flags = [*flags, "--steps", str(steps), "--lr", f"{lr:g}", "--wandb", "disabled"]
    flags += ["--eval-every", "0", "--checkpoint-every", "0", "--sample-tokens", "0"]
    flags += ["--seed", str(seed)]
    summary = train([*flags, "--data", args.data], folder)
    config, data_name = parse(flags), without_folder(args.data)
    told = shlex.join(["python", "train/lm.py", *flags, "--data", data_name])
    row = {
        "bench": "baselines",
        "name": folder.name,
        "status": "ok" if summary else "failed",
        **({} if summary else {"reason": "the loss diverged"}),
        **key,
        "diverged": summary is None,  # worse than all that did not
        "val_bpb": summary["val/bpb"] if summary else 99.0,
        "tokens": steps * config.batch_size * config.segment_length,
        "parameters": summary and summary["parameters"],
        "recurrent_parameters": summary and summary["recurrent_parameters"],
        "minutes": args.minutes if kind == "wall" else None,
        "model_config": dataclasses.asdict(model_config(config, ByteTokenizer.vocab_size)),
        "valid_sha256": summary and summary["data"]["valid"]["sha256"],
        **harness.provenance(torch.device("cpu"), told),
        "threads": 1,
    }
    harness.append_row(args.out, row)
    print(f"{kind} {model} lr {lr:g} seed {seed}: {row['val_bpb']:.4f} bits per byte", flush=True)
    return row


def train(flags: list[str], folder: Path) -> dict | None:
    """summary.json of one run of train/lm.py on one thread; None where it diverged."""
    done = subprocess.run(
        [sys.executable, str(harness.ROOT / "train" / "lm.py"), *flags, "--run-dir", str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode == 3:
        return None
    if done.returncode:
        raise RuntimeError(f"{' '.join(flags)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return json.loads((folder / "summary.json").read_text())


def print_table(rows: list[dict]) -> None:
    """Per comparison and model the best rate, its mean over seeds, and every rate of seed 0."""
    columns = "data, comparison, model, parameters (recurrent), tokens, best lr, val bpb, all"
    print(f"\n| {columns.replace(', ', ' | ')} |\n{'|---' * 8}|")
    cells = {}
    for row in rows:
        comparison = row["data"], row["preset"], row["params"], row["flags"], row["kind"]
        cells.setdefault((comparison, row["model"]), []).append(row)
    for ((name, *_, kind), model), own in sorted(cells.items(), key=lambda cell: cell[0][0]):
        first = sorted((r for r in own if r["seed"] == 0), key=lambda r: r["lr"])
        best = min(first, key=lambda r: r["val_bpb"])
        bits = [r["val_bpb"] for r in own if (r["lr"], r["steps"]) == (best["lr"], best["steps"])]
        spread = f" ± {statistics.stdev(bits):.3f} ({len(bits)} seeds)" if len(bits) > 1 else ""
        tried = ", ".join(f"{r['lr']:g}: {r['val_bpb']:.3f}" for r in first)
        print(
            f"| {name} | {kind} | {model} "
            f"| {best['parameters']:,} ({best['recurrent_parameters']:,}) "
            f"| {best['tokens'] / 1e6:.2f} M | {best['lr']:g} "
            f"| {statistics.mean(bits):.3f}{spread} | {tried} |"
        )
