"""Draws the figures from the rows in bench/results alone, into bench/figures.

    python -m bench plot
    python -m bench plot --results build/bench --figures build/figures --format png --toy

Figures that have no rows are left out, and said so; nothing is computed but ratios. Each carries
device, commit and date of its rows. Needs matplotlib (the extra `plot`).

    steps             time of a step on a GPU against batch rows, ours, predicted, torch.nn
    context           time per token against the tokens read before it, on a CPU
    cpu-speed         torch backend against the loop and torch.nn
    curves            training loss of each size's longest finals of several models, of the
                      first seed, over the tokens read; at its end the bits per byte of the
                      validation text, of every seed
    scaling           bits per byte at 20 tokens a parameter over the parameters, with power laws
"""

import math
import statistics
from collections import defaultdict
from pathlib import Path

import numpy as np

from bench import harness
from bench.quality.baselines import with_choices

FORMATS = ("svg", "png", "pdf")
COMPARED = ("kru", "nn.LSTM", "nn.GRU")


def ok(rows, bench, **equal):
    """Rows with times of one benchmark."""
    return [
        row
        for row in rows
        if row["bench"] == bench
        and row["status"] == "ok"
        and all(row.get(key) == value for key, value in equal.items())
    ]


def lines(axis, rows, x: str, y: str, label, style="-") -> None:
    """One line per label, in the order of x."""
    series = defaultdict(list)
    for row in rows:
        series[label(row)].append((row[x], row[y]))
    for name, points in series.items():
        ours = name.startswith("kru")
        width = 2.2 if ours else 1
        axis.plot(
            *zip(*sorted(points)), style, marker="o", markersize=3, label=name, linewidth=width
        )


def finish(axis, xlabel: str, ylabel: str, log=True, **legend) -> None:
    from matplotlib import ticker

    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    if log:
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(ticker.NullFormatter())
    axis.grid(alpha=0.3)
    axis.legend(fontsize=6, **legend)


def steps(rows, new):
    found = ok(rows, "steps", dtype="bf16")
    found = [row for row in found if "setting" not in row and row["implementation"] in COMPARED]
    panels = defaultdict(list)
    for row in found:
        panels[row["P"], row["Q"], row["heads"]].append(row)
    if not panels:
        return None
    figure, axes = new(len(panels))
    for axis, ((P, Q, heads), chosen) in zip(axes, panels.items()):
        lines(axis, chosen, "B", "us_per_step", lambda r: f"{r['implementation']} {r['direction']}")
        said = [
            {**r, "said": 1e3 * r["predicted_ms"] / r["T"]} for r in chosen if "predicted_ms" in r
        ]
        lines(axis, said, "B", "said", lambda r: f"{r['direction']}, predicted", ":")
        axis.set_title(f"{P}x{Q}, {heads} head{'s' * (heads > 1)}", fontsize=9)
        finish(axis, "batch rows", "microseconds per step")
    return figure, found


def context(rows, new):
    found = ok(rows, "context")
    if len({row["context"] for row in found}) < 2:
        return None
    figure, (axis,) = new(1)
    lines(axis, found, "context", "ms_p50", lambda row: row["implementation"])
    finish(axis, "tokens read before", "ms per token")
    axis.set_ylim(bottom=0.1)
    return figure, found


def speed(rows, new):
    panels = defaultdict(list)  # by what is compared
    for section in ("scan", "layer"):
        for row in ok(rows, "cpu", section=section):
            if "ratio" in row:
                panels[row.get("shape", section)].append(row)
    if not panels:
        return None
    figure, axes = new(len(panels))
    for axis, (title, chosen) in zip(axes, panels.items()):
        names = [row.get("implementation", row["name"].removeprefix("layer ")) for row in chosen]
        bars = axis.barh(names, [row["ms_p50"] for row in chosen], color="C0")
        axis.bar_label(bars, fmt="{:.3g}", fontsize=7, padding=2)
        axis.margins(x=0.15)
        axis.invert_yaxis()
        axis.tick_params(labelsize=7)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("ms, forward + backward")
    return figure, [row for chosen in panels.values() for row in chosen]


def curves(rows, new):
    comparisons = defaultdict(list)
    for row in ok(rows, "baselines", kind="tokens"):
        if row.get("curve") and not read_twenty(row):
            size, half = f"{row['parameters']:.0e}", "--dtype" in row["flags"]
            comparisons[size, row["data"], row["steps"], uncommon(row), half].append(row)
    longest: dict[str, list] = {}  # of each size
    for (size, *_), found in comparisons.items():
        if len({row["model"] for row in found}) > 1:
            longest[size] = max(longest.get(size, []), found, key=length_and_date)
    if not longest:
        return None
    figure, axes = new(len(longest))
    figure.set_figheight(6)
    for axis, found in zip(axes, longest.values()):
        draw_curves(axis, found)
    return figure, [row for found in longest.values() for row in found]


def length_and_date(found: list[dict]) -> tuple[int, str]:
    return max(((row["tokens"], row["date"]) for row in found), default=(0, ""))


def draw_curves(axis, found: list[dict]) -> None:
    models = defaultdict(list)
    for row in sorted(found, key=lambda row: row["val_bpb"]):
        own = models[f"{described(row)}, {row['optimizer']}"]
        if not own or all(row[key] == own[0][key] for key in ("lr", "params")):  # the best ones
            own.append(row)
    for number, (model, own) in enumerate(models.items()):
        curve = min(own, key=lambda row: row.get("seed", 0))["curve"]  # seeds read in other orders
        groups = [curve[i : i + 4] for i in range(0, len(curve), 4)]
        tokens = [group[-1][0] / 1e6 for group in groups]
        bits = [statistics.mean(nats for _, nats in group) / math.log(2) for group in groups]
        name = f"{model}, {len(own)} seed{'s' * (len(own) > 1)}"
        width = 2.2 if own[0]["model"] == "kru" else 1
        style = {"color": f"C{number}", "linestyle": "-" if number < 10 else "--"}
        axis.plot(tokens[1:], bits[1:], label=name, linewidth=width, **style)
        ends = [row["val_bpb"] for row in own]
        axis.plot([tokens[-1]] * len(ends), ends, "x", color=f"C{number}", markersize=5)
    size = statistics.median_low(row["parameters"] for row in found)
    axis.set_title(f"{size:,} parameters, {found[0]['data']}", fontsize=9)
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2)}  # there are many
    finish(
        axis, "million tokens", "bits per byte of the first seed; x: held-out", log=False, **below
    )
    axis.set_ylim(top=1.3 * min(row["val_bpb"] for row in found))


def scaling(rows, new):
    models = defaultdict(dict)  # rows by size
    for row in sorted(ok(rows, "baselines", kind="tokens"), key=lambda row: row["val_bpb"]):
        if read_twenty(row) and not row.get("seed"):  # of seed 0 the best rate
            models[described(row)].setdefault(row["params"], row)
    models = {model: list(own.values()) for model, own in models.items() if len(own) > 2}
    if not models:
        return None
    figure, (axis,) = new(1)
    for number, (model, own) in enumerate(sorted(models.items())):
        sizes, bits = np.array(sorted((row["parameters"], row["val_bpb"]) for row in own)).T
        scale, exponent, error, residual = power_law(sizes, bits)
        axis.plot(sizes, bits, "o", markersize=4, color=f"C{number}")
        label = f"{model}: {scale:.2f} N^({exponent:.3f} ± {error:.3f}), rms {residual:.1%}"
        axis.plot(sizes, scale * sizes**exponent, color=f"C{number}", label=label)
    finish(axis, "parameters N, each read 20 tokens", "bits per byte of held-out text")
    return figure, [row for own in models.values() for row in own]


def described(row: dict) -> str:
    """The model, its gate, linear attention and whether in the last block, and what is uncommon."""
    config = with_choices(row)["model_config"]
    gate, attends, blocks = (config[k] for k in ("state_gate", "linear_attention", "num_layers"))
    label = row["model"] + ("" if gate == "none" else f" ({gate} gate)")
    if attends:
        label += " + linear attention" + (" last" if blocks - 1 in attends else "")
    return label + ("" if blocks == 3 else f", {blocks} blocks") + uncommon(row)


def uncommon(row: dict) -> str:
    """For a label: the lanes of a step and Muon's momentum, where they are not the oldest rows'."""
    lanes, momentum = row.get("lanes", "32x128"), with_choices(row)["muon_momentum"] or 0.95
    return f", {lanes}" * (lanes != "32x128") + f", momentum {momentum:g}" * (momentum != 0.95)


def read_twenty(row: dict) -> bool:
    """Whether it read about twenty tokens a parameter."""
    return 19 < row["tokens"] / row["parameters"] < 22


def power_law(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float, float]:
    """y = a x^b by least squares of logarithms: a, b, the standard error of b, and the root mean
    square of what is left of log y."""
    design = np.stack((np.log(x), np.ones(len(x))), 1)
    (exponent, offset), *_ = np.linalg.lstsq(design, np.log(y), rcond=None)
    left = np.log(y) - design @ (exponent, offset)
    spread = left @ left / (len(x) - 2) * np.linalg.inv(design.T @ design)[0, 0]
    return math.exp(offset), exponent, math.sqrt(spread), math.sqrt(np.mean(left**2))


FIGURES = {
    "steps": steps,
    "context": context,
    "cpu-speed": speed,
    "curves": curves,
    "scaling": scaling,
}


def main(argv: list[str] | None = None) -> int:
    parser = harness.plain_parser(__doc__, "plot")
    parser.add_argument("--results", type=Path, default=harness.RESULTS)
    parser.add_argument("--figures", type=Path, default=harness.ROOT / "bench" / "figures")
    parser.add_argument("--format", choices=FORMATS, default="svg")
    parser.add_argument("--toy", action="store_true", help="also rows of --quick runs")
    options = parser.parse_args(argv)
    pyplot = harness.pyplot_for(parser)

    def new(panels: int):
        figure, axes = pyplot.subplots(
            1, panels, figsize=(3.4 * panels + 0.6, 3.3), squeeze=False, layout="constrained"
        )
        return figure, axes[0]

    options.figures.mkdir(parents=True, exist_ok=True)
    files = sorted(options.results.glob("*.jsonl"))
    if not files:
        parser.error(f"--results: no .jsonl files in {options.results}")
    for path in files:
        rows = harness.read_rows(path)
        rows = harness.latest([row for row in rows if options.toy or not row.get("quick")])
        for name, draw in FIGURES.items():
            made = draw(rows, new)
            if made is None:
                continue
            figure, used = made
            commits = ", ".join(dict.fromkeys(row["commit"] for row in used))
            figure.suptitle(
                f"{used[0]['device']}, torch {used[0]['torch']}, triton {used[0].get('triton')}, "
                f"commit {commits}, {max(row['date'] for row in used)[:10]}",
                fontsize=7,
            )
            target = options.figures / f"{path.stem}-{name}.{options.format}"
            figure.savefig(target, metadata={"Date": None} if options.format == "svg" else None)
            pyplot.close(figure)
            print(target)
    return 0
