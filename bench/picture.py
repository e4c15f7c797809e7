"""The picture of the README: copy memory over 1,000 steps, a KRU beside an LSTM.

    python -m bench picture

Drawn from the training curves of `bench/results/reproduction.json` (`python train/reproduce.py copy
--seeds 3`): nothing is computed but the loss over that of a predictor without memory. One file for
a light page, one for a dark one. Needs matplotlib (the extra `plot`).
"""

import json
from pathlib import Path

from bench import harness

MODELS = {"kru-T1000": "KRU", "lstm-T1000": "LSTM"}
INK = {"light": "#1f2328", "dark": "#e6edf3"}
COLORS = {"light": ("#0969da", "#bc4c00"), "dark": ("#58a6ff", "#f0883e")}


def curves(rows: list[dict]) -> dict[str, list[dict]]:
    """The finished runs of each of MODELS, its seeds in order."""
    found = {cell: [] for cell in MODELS}
    for row in rows:
        if row["table"] == "copy" and row["cell"] in found and row["status"] == "done":
            found[row["cell"]].append(row)
    return found


def draw(pyplot, page: str, runs: dict[str, list[dict]]):
    ink = INK[page]
    figure, axis = pyplot.subplots(figsize=(8.4, 3.9), layout="constrained")
    for (cell, name), color in zip(MODELS.items(), COLORS[page]):
        numbers = runs[cell][0]["summary"]["recurrent_parameters"]
        for run in runs[cell]:
            steps = run["curve"]["step"]
            share = [loss / run["summary"]["baseline"] for loss in run["curve"]["loss"]]
            axis.plot(steps, share, color=color, linewidth=2.2)
        half = len(steps) // 2  # the label stands above the second half of the curves
        tops = [max(run["curve"]["loss"][half:]) / run["summary"]["baseline"] for run in runs[cell]]
        label = f"{name}: {numbers:,} recurrent numbers"
        axis.annotate(
            label,
            (steps[-1], max(tops)),
            (-4, 5),
            textcoords="offset points",
            ha="right",
            color=color,
            fontsize=15,
            fontweight="bold",
        )
    axis.axhline(1, color=ink, linestyle="--", linewidth=1)
    axis.text(steps[-1], 0.8, "no memory at all", color=ink, fontsize=12, ha="right", va="top")
    axis.set_yscale("log")
    axis.set_ylim(top=60)
    axis.set_xlim(0, steps[-1])
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_xlabel(f"training steps, {len(runs[cell])} seeds each", color=ink, fontsize=13)
    axis.set_ylabel("loss / loss without memory", color=ink, fontsize=13)
    axis.set_title("Repeat ten symbols after 1,000 steps of nothing", color=ink, fontsize=15)
    axis.tick_params(colors=ink, labelsize=12, which="both")
    for side, spine in axis.spines.items():
        spine.set_color(ink)
        spine.set_visible(side in ("left", "bottom"))
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = harness.plain_parser(__doc__, "picture")
    parser.add_argument("--rows", type=Path, default=harness.RESULTS / "reproduction.json")
    parser.add_argument("--figures", type=Path, default=harness.ROOT / "bench" / "figures")
    options = parser.parse_args(argv)
    if not options.rows.is_file():
        parser.error(f"--rows: no file {options.rows}")
    pyplot = harness.pyplot_for(parser)
    runs = curves(json.loads(options.rows.read_text()))
    for cell, found in runs.items():
        if not found:
            parser.error(f"--rows: {options.rows} has no finished run of {cell}")
    options.figures.mkdir(parents=True, exist_ok=True)
    for page in INK:
        figure = draw(pyplot, page, runs)
        target = options.figures / f"copy-memory-{page}.svg"
        figure.savefig(target, metadata={"Date": None}, transparent=True)
        pyplot.close(figure)
        print(target)
    return 0
