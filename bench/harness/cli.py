"""The flags that benchmarks share."""

import argparse
import shlex
import sys
from pathlib import Path

import torch

from bench.harness.device import pick_device


def plain_parser(doc: str, name: str) -> argparse.ArgumentParser:
    """A benchmark's parser, whose help is its module's docstring."""
    return argparse.ArgumentParser(
        prog=f"python -m bench {name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def parser(doc: str, name: str) -> argparse.ArgumentParser:
    """The same with the flags that `Results` reads."""
    made = plain_parser(doc, name)
    made.add_argument("--quick", action="store_true", help="toy sizes: shows only that it runs")
    made.add_argument("--out", type=Path, help="folder of the rows; default bench/results")
    made.add_argument("--again", action="store_true", help="also what has a row of this commit")
    return made


def device_for(options: argparse.Namespace, made: argparse.ArgumentParser) -> torch.device:
    """The device of --device; one that is not here ends the program."""
    try:
        return pick_device(options.device)
    except ValueError as error:
        made.error(str(error))


def command_line(bench: str, argv: list[str] | None) -> str:
    return shlex.join(["python", "-m", "bench", bench, *(sys.argv[1:] if argv is None else argv)])


def pyplot_for(options_parser: argparse.ArgumentParser):
    """matplotlib's pyplot without a screen, the same rows giving the same file; without matplotlib
    the program ends."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        options_parser.error("needs matplotlib: pip install 'kru-triton[plot]'")
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "kru_triton"
    from matplotlib import pyplot

    return pyplot
