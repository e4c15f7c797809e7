"""The language model against its baselines: equal parameters, each at its best optimizer and rate.

    python -m bench baselines --run-dir runs/baselines
    python -m bench baselines --models kru lstm --steps 200 --minutes 0.5 --run-dir runs/two
    python -m bench baselines --params 108000 --flags '--hidden-size 168' --seeds 3 \\
        --data text:shakespeare.txt --name shakespeare --run-dir runs/small
    python -m bench baselines --params 108000 --optimizers adamw muon --steps 250 \\
        --final-steps 1250 --seeds 3 --minutes 0 --run-dir runs/long

Two comparisons, both through `train/lm.py`, in a residual frame of equally many blocks, with the
preset's linear attention, 32 lanes of 128 tokens, and float32 (or what `--flags` say). Each model
has its own width of state over that of the stream: the Kronecker models the preset's, the others
the better one of those tried (`SHAPES`).

    tokens  every model reads the same number of tokens (`--steps`)
    wall    every model takes the steps that it makes in `--minutes`, from speeds measured before
            with the models in turn in one process, so other load on the machine favours none

For each optimizer the learning rates double from `--lr` on; while the best one is at an end of
those tried, the next one beyond it is run too, so every best is bracketed from both sides. The
Kronecker factors keep the preset's rate. The finals then take each model's best optimizer and rate,
with `--seeds` seeds, the first of all models before the second; at equal tokens they may be longer
than what found the rate (`--final-steps`). Rows go to `bench/results/baselines.jsonl`; runs found
there are not repeated, so a command that was cut off goes on where it was. `--table` prints all.
"""

import dataclasses
import itertools
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
from kru_triton.train.lm import autocast_of
from kru_triton.train.reproduce import without_folder
from kru_triton.train.run.device import keep_freed_memory
from kru_triton.train.run.optimizers import build_optimizers
from kru_triton.train.run.settings import model_config, parse
from kru_triton.train.text.tokenizer import ByteTokenizer

MODELS = ("kru", "krulstm", "lstm", "gru", "rnn", "mingru", "transformer")
OPTIMIZERS = ("adamw", "muon")
LANES = ("--batch-size", "32", "--segment-length", "128")  # those of the rows so far
SHAPES = {  # what matters is the ratio: --match-params scales both
    "lstm": "--d-model 64 --hidden-size 64",
    "gru": "--d-model 64 --hidden-size 128",
    "rnn": "--d-model 64 --hidden-size 128",
    "mingru": "--d-model 64 --hidden-size 128",
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
    parser.add_argument("--seeds", type=int, default=1, help="of each model's finals")
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=["adamw"])
    parser.add_argument("--steps", type=int, default=400, help="at equal tokens; 0: leave out")
    parser.add_argument("--final-steps", type=int, default=0, help="of their finals; 0: as many")
    parser.add_argument("--minutes", type=float, default=1.5, help="at equal time; 0: leave out")
    parser.add_argument("--lr", type=float, default=2e-3, help="lowest learning rate of the grid")
    parser.add_argument("--rates", type=int, default=4, help="before extending; 1: --lr alone")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/baselines"))
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "baselines.jsonl")
    parser.add_argument("--table", action="store_true", help="print the rows, run nothing")
    args = parser.parse_args(argv)
    if args.table:
        print_table(harness.read_rows(args.out))
        return 0

    shared = ["--preset", args.preset, "--dtype", "float32", *LANES, *shlex.split(args.flags)]
    count = args.params or num_parameters(shared)
    shared += ["--match-params", str(count)]
    settings = {
        (model, optimizer): [
            *(*shared, "--model", model, *shlex.split(SHAPES.get(model, ""))),
            *("--optimizer", optimizer),
        ]
        for model in args.models
        for optimizer in args.optimizers
    }
    args.run_dir.mkdir(parents=True, exist_ok=True)
    steps = {}
    if args.steps:
        steps["tokens"] = dict.fromkeys(settings, args.steps)
    if args.minutes:
        speeds_file = args.run_dir / "speeds.json"
        if not speeds_file.exists():
            speeds = {" ".join(key): speed for key, speed in measure_speeds(settings).items()}
            speeds_file.write_text(json.dumps(speeds))
        speeds = json.loads(speeds_file.read_text())  # steps per second, one thread
        steps["wall"] = {key: round(60 * args.minutes * speeds[" ".join(key)]) for key in settings}

    def search(kind: str, model: str, optimizer: str) -> list[dict]:
        key = model, optimizer
        return bracket(args, kind, *key, settings[key], steps[kind][key])

    def final(kind: str, best: dict, seed: int) -> dict:
        key = best["model"], best["optimizer"]
        count = args.final_steps if kind == "tokens" and args.final_steps else best["steps"]
        return run(args, kind, *key, settings[key], count, best["lr"], seed)

    with ThreadPoolExecutor(args.jobs) as pool:
        searches = itertools.product(steps, args.models, args.optimizers)
        rows = list(itertools.chain(*pool.map(lambda of: search(*of), searches)))
        best = {}
        for row in sorted(rows, key=lambda row: -row["val_bpb"]):
            best[row["kind"], row["model"]] = row
        finals = [
            (kind, best[kind, model], seed)
            for seed in range(args.seeds)
            for kind in steps
            for model in args.models
        ]
        rows += pool.map(lambda of: final(*of), finals)
        print_table(harness.latest(rows))
    return 0


def num_parameters(flags: list[str]) -> int:
    with torch.device("meta"):
        return LanguageModel(model_config(parse(flags), ByteTokenizer.vocab_size)).num_parameters


def measure_speeds(settings: dict[tuple, list[str]], rounds: int = 7) -> dict[tuple, float]:
    """Training steps per second of every setting on one thread: medians of rounds taken in turn."""
    torch.set_num_threads(1)
    keep_freed_memory()
    seconds = {key: [] for key in settings}
    ready = {}
    for key, flags in settings.items():
        config = parse(flags)
        net = LanguageModel(model_config(config, ByteTokenizer.vocab_size))
        ready[key] = (config, net, build_optimizers(net, config))
    for round_ in range(rounds):
        for key, (config, net, optimizers) in ready.items():
            tokens = torch.randint(256, (config.batch_size, config.segment_length))
            reset = torch.zeros_like(tokens, dtype=torch.bool)
            began = time.perf_counter()
            for optimizer in optimizers:
                optimizer.zero_grad()
            with autocast_of(config, tokens.device):
                logits, _ = net(tokens, None, reset)
            torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), tokens.flatten()
            ).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), config.clip)
            for optimizer in optimizers:
                optimizer.step()
            if round_:  # the first one warms up
                seconds[key].append(time.perf_counter() - began)
    return {key: 1 / statistics.median(times) for key, times in seconds.items()}


def bracket(
    args, kind: str, model: str, optimizer: str, flags: list[str], steps: int
) -> list[dict]:
    """Rows of one model and optimizer in one comparison, the best rate inside the ones tried."""
    rates = [args.lr * 2**k for k in range(args.rates)]
    rows = {}
    while True:
        for lr in rates:
            if lr not in rows:
                rows[lr] = run(args, kind, model, optimizer, flags, steps, lr)
        best = min(rows, key=lambda lr: rows[lr]["val_bpb"])
        if args.rates == 1 or min(rows) < best < max(rows):
            return list(rows.values())
        rates = [best / 2 if best == min(rows) else best * 2]


def run(args, kind, model, optimizer, flags, steps, lr, seed=0) -> dict:
    """One training run, or its row where it has been made before."""
    key = {"kind": kind, "preset": args.preset, "model": model, "lr": lr, "steps": steps}
    key |= {"optimizer": optimizer, "data": args.name, "params": args.params, "flags": args.flags}
    key |= {"seed": seed}
    flags = [*flags, *shlex.split(f"--steps {steps} --lr {lr:g} --wandb disabled --eval-every 0")]
    flags += shlex.split(f"--checkpoint-every 0 --sample-tokens 0 --seed {seed}")
    config = parse(flags)
    key["muon_momentum"] = momentum = config.muon_momentum if optimizer == "muon" else None
    sizes = dataclasses.asdict(model_config(config, ByteTokenizer.vocab_size))
    sizes = json.loads(json.dumps(sizes))
    if model != "kru":  # which alone has it, whatever the preset says
        sizes["state_gate"] = "none"
    for row in map(with_choices, harness.read_rows(args.out)):
        same = all(row[name] == value for name, value in key.items())
        if same and row["model_config"] == sizes:
            return row
    lanes = f"{config.batch_size}x{config.segment_length}"
    setting = f"{kind}-{model}-{optimizer}-{lr:g}-{steps}-{seed}"
    setting += f"-{lanes}" if lanes != "x".join(LANES[1::2]) else ""
    setting += f"-{sizes['state_gate']}" if sizes["state_gate"] != "none" else ""
    setting += f"-momentum-{momentum:g}" if momentum not in (None, 0.95) else ""
    blocks = sizes["linear_attention"]
    setting += f"-attends-{'-'.join(map(str, blocks))}" if blocks not in ([], [1]) else ""
    folder = args.run_dir / f"{args.name}-{args.params}-{setting}"
    summary = train("lm.py", [*flags, "--data", args.data], folder)
    told = shlex.join(["python", "train/lm.py", *flags, "--data", without_folder(args.data)])
    row = {
        "bench": "baselines",
        "name": folder.name,
        "status": "ok" if summary else "failed",
        **({} if summary else {"reason": "the loss diverged"}),
        **key,
        "lanes": lanes,
        "diverged": summary is None,  # worse than all that did not
        "val_bpb": summary["val/bpb"] if summary else 99.0,
        "tokens": steps * config.batch_size * config.segment_length,
        "parameters": summary and summary["parameters"],
        "recurrent_parameters": summary and summary["recurrent_parameters"],
        "seconds": summary and summary["seconds"],
        "minutes": args.minutes if kind == "wall" else None,
        "curve": curve(folder),
        "model_config": sizes,
        "valid_sha256": summary and summary["data"]["valid"]["sha256"],
        **harness.provenance(torch.device("cpu"), told),
        "threads": 1,
    }
    harness.append_row(args.out, row)
    print(f"{setting}: {row['val_bpb']:.4f} bits per byte", flush=True)
    return row


def with_choices(row: dict) -> dict:
    """A row from before there was a choice says what it used, too."""
    old = {"linear_attention": [], "state_gate": "none", "input_gated": False, "token_shift": False}
    row = {"optimizer": "adamw", **row, "model_config": old | row["model_config"]}
    return {"muon_momentum": 0.95 if row["optimizer"] == "muon" else None, **row}


def curve(folder: Path) -> list[list]:
    """Tokens read, and the training loss in nats since the point before."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [[row["tokens"], round(row["train/loss_nats"], 4)] for row in rows]


def train(script: str, flags: list[str], folder: Path) -> dict | None:
    """summary.json of one run of a script of train/ on one thread; None where it diverged."""
    done = subprocess.run(
        [sys.executable, str(harness.ROOT / "train" / script), *flags, "--run-dir", str(folder)],
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
    """Per comparison, model and optimizer the best rate, its mean over seeds, and every rate of
    the lowest seed."""
    columns = "data, comparison, model, optimizer, parameters (recurrent), tokens, best lr, val bpb"
    print(f"\n| {columns.replace(', ', ' | ')} | all |\n{'|---' * 9}|")
    cells = {}
    for row in map(with_choices, rows):
        blocks = tuple(row["model_config"]["linear_attention"])
        comparison = row["data"], row["preset"], row["params"], row["flags"], blocks, row["kind"]
        length = row["steps"] if row["kind"] == "tokens" else 0
        gate, momentum = row["model_config"]["state_gate"], row["muon_momentum"]
        model = row["model"] + (f", {gate} gate" if gate != "none" else "")
        optimizer = row["optimizer"] + (f", momentum {momentum}" if momentum else "")
        cells.setdefault((*comparison, length, model, optimizer), []).append(row)
    for key, own in sorted(cells.items(), key=lambda c: c[0][:7]):
        name, *_, blocks, kind, _, model, optimizer = key
        model += f", linear attention in {', '.join(map(str, blocks))}" if blocks else ""
        lowest = min(r["seed"] for r in own)
        first = sorted((r for r in own if r["seed"] == lowest), key=lambda r: r["lr"])
        best = min(first, key=lambda r: r["val_bpb"])
        bits = [r["val_bpb"] for r in own if (r["lr"], r["steps"]) == (best["lr"], best["steps"])]
        spread = f" ± {statistics.stdev(bits):.3f} ({len(bits)} seeds)" if len(bits) > 1 else ""
        tried = ", ".join(f"{r['lr']:g}: {r['val_bpb']:.3f}" for r in first)
        print(
            f"| {name} | {kind} | {model} | {optimizer} "
            f"| {best['parameters']:,} ({best['recurrent_parameters']:,}) "
            f"| {best['tokens'] / 1e6:.2f} M | {best['lr']:g} "
            f"| {statistics.mean(bits):.3f}{spread} | {tried} |"
        )
