"""The flags that benchmarks share."""

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from bench.harness.device import free_memory, pick_device
from bench.harness.rows import Results


def plain_parser(doc: str, name: str) -> argparse.ArgumentParser:
    """A benchmark's parser, whose help is its module's docstring."""
    return argparse.ArgumentParser(
        prog=f"python -m bench {name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def parser(doc: str, name: str) -> argparse.ArgumentParser:
    """The flags of the benchmarks that have cases and a device."""
    made = plain_parser(doc, name)
    made.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    made.add_argument("--case", nargs="+", metavar="NAME", help="only these; see --list")
    made.add_argument("--list", action="store_true", help="names of the cases, and nothing else")
    return row_flags(made)


def row_flags(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The flags that `Results` reads."""
    made.add_argument("--quick", action="store_true", help="toy sizes: shows only that it runs")
    made.add_argument("--out", type=Path, help="folder of the rows; default bench/results")
    made.add_argument("--minutes", type=float, help="start nothing after so long")
    made.add_argument("--again", action="store_true", help="also what has a row of this commit")
    return made


def device_for(options: argparse.Namespace, made: argparse.ArgumentParser) -> torch.device:
    """The device of --device; one that is not here ends the program."""
    try:
        return pick_device(options.device)
    except ValueError as error:
        made.error(str(error))


def chosen(names: list[str], wanted: list[str] | None, options_parser) -> list[str]:
    """Those of `names` that equal or begin with one of `wanted`; unknown ones end the program."""
    if not wanted:
        return names
    for name in wanted:
        if not any(n.startswith(name) for n in names):
            options_parser.error(f"--case: no case {name!r}; there are {', '.join(names)}")
    return [n for n in names if any(n.startswith(w) for w in wanted)]


def cases_main(
    doc: str,
    bench: str,
    argv: list[str] | None,
    cases_of: Callable[[argparse.Namespace, torch.device], dict],
    run: Callable[[Results, object, argparse.Namespace, torch.device], None],
    made: argparse.ArgumentParser | None = None,
) -> int:
    """The main of a benchmark with cases: runs the chosen ones while there is time.

    Args:
        cases_of: (options, device) -> what `run` takes, by the names of the cases.
        run: (results, case, options, device).
        made: `parser(doc, bench)` with more flags.
    """
    made = made or parser(doc, bench)
    options = made.parse_args(argv)
    device = device_for(options, made)
    cases = cases_of(options, device)
    names = chosen(list(cases), options.case, made)
    if options.list:
        print(*names, sep="\n")
        return 0
    results = Results(device, options, command_line(bench, argv))
    for name in names:
        if not results.out_of_time(name):
            run(results, cases[name], options, device)
            free_memory(device)
    return results.finish()


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
