"""Which block learns language best: trials at equal parameters and equal tokens.

    python bench/lm_search.py                                        every trial on stdlib
    python bench/lm_search.py --only heads depth --seeds 0 1 2
    python bench/lm_search.py --data text:shakespeare.txt --name shakespeare

Each trial is `train/lm.py` with the flags of the base and its own after them; the widths are scaled
until the parameters are the base's. A trial that is a learning rate away from its best says little,
so each is run at every rate of `--lr`. Rows go to `bench/results/lm_search.jsonl`; runs found there
are not repeated. `--table` prints what the file holds and runs nothing.
"""

import argparse
import json
import shlex
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from baselines import ROOT, read, train

BASE = (
    "--preset tiny --d-model 48 --num-layers 2 --hidden-size 128 --num-heads 1 --nonlinearity relu "
    "--radius 1 --no-input-gated --no-token-shift --recurrent-lr 2e-3 --match-params 107840"
)
LEADER = (
    "--nonlinearity modrelu --radius 0.9 --num-layers 3 --d-model 28 --hidden-size 168 "
    "--num-heads 2"
)
LONG = f"{LEADER} --recurrent-lr 5e-4"
BOTH = f"{LONG} --input-gated --token-shift"
TRIALS = {
    "base": "",
    # nonlinearity, and the scale of the recurrent matrix at the start
    "modrelu": "--nonlinearity modrelu",
    "modrelu-0.95": "--nonlinearity modrelu --radius 0.95",
    "tanh": "--nonlinearity tanh",
    "modtanh": "--nonlinearity modtanh",
    "identity-0.95": "--nonlinearity identity --radius 0.95",
    "identity-0.8": "--nonlinearity identity --radius 0.8",
    "radius-0.9": "--radius 0.9",
    "radius-0.7": "--radius 0.7",
    "real": "--field real --hidden-size 256",
    # gate and norm
    "no-gate": "--no-gated",
    # heads and factor shapes
    "heads-2": "--num-heads 2",
    "heads-4": "--num-heads 4",
    "heads-8": "--num-heads 8",
    "factors-2x64": "--factors 2 64",
    "factors-2^7": "--factors 2 2 2 2 2 2 2",
    # width of the state against that of the stream, depth, MLP
    "hidden-256": "--d-model 27 --hidden-size 256",
    "hidden-64": "--d-model 72 --hidden-size 64",
    "hidden-32": "--d-model 98 --hidden-size 32",
    "depth-1": "--num-layers 1 --d-model 72 --hidden-size 192",
    "depth-3": "--num-layers 3 --d-model 40 --hidden-size 100",
    "depth-4": "--num-layers 4 --d-model 36 --hidden-size 81",
    "mlp-1": "--mlp-ratio 1",
    "mlp-4": "--mlp-ratio 4",
    # rates and penalty
    "recurrent-lr-5e-4": "--recurrent-lr 5e-4",
    "recurrent-lr-8e-3": "--recurrent-lr 8e-3",
    "unitarity-1e-3": "--unitarity-weight 1e-3",
    "unitarity-1e-1": "--unitarity-weight 1e-1",
    "dropout-0.1": "--dropout 0.1",
    "weight-decay-0": "--weight-decay 0",
    # the leaders together
    "joint-identity-wide": "--nonlinearity identity --radius 0.9 --d-model 27 --hidden-size 256",
    "joint-identity-deep": "--nonlinearity identity --radius 0.9 --num-layers 3 --d-model 40 "
    "--hidden-size 100",
    "joint-modrelu-wide": "--nonlinearity modrelu --radius 0.9 --d-model 27 --hidden-size 256",
    "joint-modrelu-deep": "--nonlinearity modrelu --radius 0.9 --num-layers 3 --d-model 40 "
    "--hidden-size 100",
    "joint-modrelu-deep-wide": "--nonlinearity modrelu --radius 0.9 --num-layers 3 --d-model 28 "
    "--hidden-size 168",
    "joint-heads-2": LEADER,
    "joint-heads-4": "--nonlinearity modrelu --radius 0.9 --num-layers 3 --d-model 28 "
    "--hidden-size 168 --num-heads 4",
    "joint-identity-heads-2": "--nonlinearity identity --radius 0.9 --num-layers 3 --d-model 28 "
    "--hidden-size 168 --num-heads 2",
    "joint-real-identity": "--field real --nonlinearity identity --radius 0.9 --num-layers 3 "
    "--d-model 28 --hidden-size 336 --num-heads 2",
    "joint-real-modrelu": "--field real --nonlinearity modrelu --radius 0.9 --num-layers 3 "
    "--d-model 28 --hidden-size 336 --num-heads 2",
    "joint-real-relu": "--field real --nonlinearity relu --num-layers 3 --d-model 28 "
    "--hidden-size 336 --num-heads 2",
    "joint-relu": "--nonlinearity relu --num-layers 3 --d-model 28 --hidden-size 168 --num-heads 2",
    "joint-two-blocks": "--nonlinearity modrelu --radius 0.9 --num-heads 2",
    "joint-factors-4x42": f"{LEADER} --num-heads 1 --factors 4 42",
    "joint-mlp-4": f"{LEADER} --mlp-ratio 4",
    "joint-mlp-1": f"{LEADER} --mlp-ratio 1",
    "long": LONG,  # for more steps
    "long-input-gated": f"{LONG} --input-gated",
    "long-token-shift": f"{LONG} --token-shift",
    "long-both": BOTH,
    "long-both-identity": f"{BOTH} --nonlinearity identity",
    "long-both-relu": f"{BOTH} --nonlinearity relu --radius 1",
    "long-both-100": f"{BOTH} --hidden-size 100",
    "long-both-64": f"{BOTH} --hidden-size 64",
    "long-both-100-identity": f"{BOTH} --hidden-size 100 --nonlinearity identity",
    "long-both-100-recurrent-lr-2e-3": f"{LEADER} --input-gated --token-shift --hidden-size 100",
    "long-both-100-2x50": f"{BOTH} --hidden-size 100 --num-heads 1 --factors 2 50",
    "long-both-100-mlp-1": f"{BOTH} --hidden-size 100 --mlp-ratio 1",
    "long-both-80-deep": f"{BOTH} --hidden-size 80 --num-layers 4",
    # the leader with one change of `bench/lm_variants.py`, whose name stands after "variant-"
    "variant-no-state-norm": LEADER,
    "variant-sigmoid-gate": LEADER,
    "variant-conv-4": LEADER,
    "variant-conv-4-input-gated": f"{LEADER} --input-gated",
    "variant-forget": f"{LEADER} --radius 1",
    "variant-selective": f"{LEADER} --radius 1",
    "variant-head-radii": f"{LEADER} --num-heads 4",
    "variant-penalty-down": f"{LEADER} --unitarity-weight 1e-1",
    "variant-penalty-up": f"{LEADER} --unitarity-weight 1e-1",
    "variant-no-state-norm-both": f"{BOTH} --hidden-size 100",
    "variant-forget-both": f"{BOTH} --hidden-size 100 --radius 1",
    "variant-selective-both": f"{BOTH} --hidden-size 100 --radius 1",
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=[""], help="trials whose names begin so")
    parser.add_argument("--data", default="stdlib", help="as of train/lm.py")
    parser.add_argument("--name", default="stdlib", help="of the data, in the rows")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--lr", type=float, nargs="+", default=[1.6e-2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/lm_search"))
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/lm_search.jsonl")
    parser.add_argument("--table", action="store_true", help="print the rows, run nothing")
    args = parser.parse_args(argv)

    names = [name for name in TRIALS if name.startswith(tuple(args.only))]
    if not names:
        parser.error(f"--only: no trial begins with {args.only}; there are {', '.join(TRIALS)}")
    if not args.table:
        todo = [(n, lr, seed) for seed in args.seeds for n in names for lr in args.lr]
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda trial: run(args, *trial), todo))
    print_table([row for row in read(args.out) if row["trial"] in names])


def run(args, trial: str, lr: float, seed: int) -> None:
    """One training run, unless its row is there."""
    flags = shlex.split(BASE) + shlex.split(TRIALS[trial])
    flags += ["--steps", str(args.steps), "--lr", f"{lr:g}", "--seed", str(seed)]
    key = {"data": args.name, "trial": trial, "lr": lr, "seed": seed, "steps": args.steps}
    key["flags"] = shlex.join(flags)
    if any(all(row[name] == value for name, value in key.items()) for row in read(args.out)):
        return
    folder = args.run_dir / f"{args.name}-{trial}-{lr:g}-{seed}"
    quiet = "--resume never --wandb disabled --eval-every 0 --checkpoint-every 0 --sample-tokens 0"
    began = time.perf_counter()
    flags = [*flags, *quiet.split(), "--data", args.data]
    if trial.startswith("variant-"):
        name = trial.removeprefix("variant-").removesuffix("-input-gated").removesuffix("-both")
        ended = train([name, *flags], folder, "bench/lm_variants.py")
    else:
        ended = train(flags, folder)
    summary = ended or {}
    row = {
        **key,
        "diverged": ended is None,  # a row like any other
        "val_bpb": summary.get("val/bpb"),
        "seconds": round(time.perf_counter() - began, 1),  # of whatever else ran meanwhile, too
        **{k: summary.get(k) for k in ("tokens", "parameters", "recurrent_parameters")},
        "valid_sha256": summary and summary["data"]["valid"]["sha256"],
        **{k: summary.get(k) for k in ("versions", "commit")},
        "date": time.strftime("%Y-%m-%d"),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("a") as out:
        out.write(json.dumps(row) + "\n")
    print(f"{args.name} {trial} lr {lr:g} seed {seed}: {row['val_bpb']}", flush=True)


def print_table(rows: list[dict]) -> None:
    """Per data, budget and trial: bits per byte at every rate, mean over seeds, best first."""
    groups = {}
    for row in rows:
        rates = groups.setdefault((row["data"], row["steps"]), {}).setdefault(row["trial"], {})
        rates.setdefault(row["lr"], []).append(row)
    for (data, steps), trials in groups.items():
        print(f"\n{data}, {steps} steps\n| trial | parameters | val bits per byte by lr |")
        print("|---|---|---|")
        lines = []
        for trial, rates in trials.items():
            means = {}
            for lr, own in sorted(rates.items()):
                bits = [row["val_bpb"] for row in own if not row["diverged"]]
                means[lr] = statistics.mean(bits) if bits else float("inf")
            count = next((r["parameters"] for own in rates.values() for r in own), None)
            shown = ", ".join(f"{lr:g}: {bits:.3f}" for lr, bits in means.items())
            lines.append((min(means.values()), f"| {trial} | {count} | {shown} |"))
        print("\n".join(line for _, line in sorted(lines)))


if __name__ == "__main__":
    main()
