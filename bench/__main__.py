"""One front for all benchmarks.

    python -m bench --list                    what there is, and the cases of each
    python -m bench --quick                   every benchmark on toy sizes: shows that it runs
    python -m bench --all                     every benchmark that this device is for
    python -m bench kernels --case scan-B256  one of them, with its own flags (--help)
    python -m bench --table                   the newest rows of this device, with ratios

Rows are appended to bench/results/<device>.jsonl (toy runs: build/bench). What has a row of the
present commit is not run again, so a run that was cut off goes on where it was; --again repeats it.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from bench import harness

# name: (module, what it measures); the order is that of --all
BENCHMARKS = {
    "kernels": ("bench.rnn_kernels", "kernels and layers against their rivals"),
    "tune": ("bench.tune", "launch constants that only a GPU can settle"),
    "train_step": ("bench.train_step", "training steps of language models over lengths"),
    "decode": ("bench.decode", "generation, against a transformer with a cache"),
    "cpu": ("bench.cpu", "the torch backend on a CPU, and how its cost grows"),
    "compiled": ("bench/compiled.py", "registers and instructions of the compiled kernels"),
    "data": ("bench/data.py", "the data path alone"),
}
MORE = {
    "model": ("bench.model", "predicted times, what bounds them, growth"),
    "plot": ("bench.plot", "draws the figures from the rows"),
    "checkpoints": ("bench.checkpoints", "what checkpoints cost a training run"),
    "context": ("bench.context", "time per token after 10 to 100,000 others"),
    "convert": ("bench.convert", "what converting a trained RNN loses, and how fast it recovers"),
    "lm_search": ("bench/lm_search.py", "blocks of the language model at equal parameters"),
    "baselines": ("bench/baselines.py", "trained models at equal tokens and equal time"),
}
FOR_CPU, FOR_GPU = ("cpu", "compiled", "data"), ("kernels", "tune", "train_step", "decode")
QUICK = {  # what --quick is to the scripts; the compiler has no toy sizes
    "compiled": ["--variant", "forward-16x16-bf16", "--arch", "sm_90"],
    "data": ["--quick"],
}


def is_there(name: str) -> bool:
    where = {**BENCHMARKS, **MORE}[name][0]
    return not where.endswith(".py") or (harness.ROOT / where).exists()


def run(name: str, flags: list[str]) -> int:
    """A module in this process, a script in one of its own."""
    where = {**BENCHMARKS, **MORE}[name][0]
    if not where.endswith(".py"):
        return importlib.import_module(where).main(flags)
    environment = dict(os.environ)
    if name == "compiled":
        environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(harness.ROOT / where), *flags]
    return subprocess.run(command, cwd=harness.ROOT, env=environment).returncode


def run_script(name: str, flags: list[str], common: argparse.Namespace) -> int:
    """bench/compiled.py or bench/data.py, what they write as rows of their device."""
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "rows.json"
        code = run(name, [*flags, "--json" if name == "compiled" else "--out", str(written)])
        if code or not written.exists():
            return code
        text = written.read_text()
    told = harness.command_line(name, flags)
    if name == "data":
        results = harness.Results(torch.device("cpu"), common, told)
        for row in map(json.loads, text.splitlines()):
            label = f"data {row['source']} {row['tokenizer']} {row['workers']} workers"
            results.add("data", label, f"{row['mb_s'][1]} MB/s", **row)
        return results.finish()
    found = json.loads(text)
    for arch in dict.fromkeys(row["arch"] for row in found):
        results = harness.Results(arch, common, told)
        results.title(f"compiled for {arch}")
        for row in found:
            if row["arch"] == arch:
                line = f"{row['instructions_per_step']} instructions per step"
                results.add("compiled", row["variant"], line, **row)
    return 0


def list_everything() -> None:
    for name, (_, what) in {**BENCHMARKS, **MORE}.items():
        print(f"{name:<11} {what}" + ("" if is_there(name) else " (not in this version)"))
    for name in ("kernels", "tune", "train_step", "decode", "cpu"):
        print(f"\ncases of {name}:")
        importlib.import_module(BENCHMARKS[name][0]).main(["--list"])


def table(folder: Path, device: str) -> int:
    """The newest rows of a device: times in ms, and how many times a rival's time is ours."""
    path = folder / f"{harness.slug(device)}.jsonl"
    rows = harness.latest(harness.read_rows(path))
    if not rows:
        print(f"no rows in {path}")
        return 1
    ours = {}  # our best time of every case
    for row in rows:
        if str(row.get("implementation")).startswith("kru") and {"ms_p50", "case"} <= row.keys():
            key = (row["bench"], row["case"], row["direction"])
            ours[key] = min(row["ms_p50"], ours.get(key, row["ms_p50"]))
    print(f"| {device}: benchmark, row | ms (p50) | times ours | what else |\n|---|---|---|---|")
    for row in rows:
        if row["status"] != "ok":
            print(f"| {row['bench']} {row['name']} | {row['status']} | | {row['reason'][:80]} |")
            continue
        base = ours.get((row["bench"], row.get("case"), row.get("direction")))
        ms = row.get("ms_p50")
        told = []
        if "predicted_ms" in row:
            told.append(f"predicted {row['predicted_ms']:.3f}")
        if "floor_ms" in row:
            told.append(f"floor {row['floor_ms']:.3f}")
        if "tokens_per_s" in row:
            told.append(f"{row['tokens_per_s']:.4g} tokens/s")
        if "train_bpb_last" in row:
            told.append(f"{row['train_bpb_last']:.3f} bits per byte")
        ratio = f"{ms / base:.2f}" if ms and base else ""
        shown = f"{ms:.3f}" if ms else ""
        print(f"| {row['bench']} {row['name']} | {shown} | {ratio} | {', '.join(told)} |")
    failed = [row for row in rows if row["status"] == "failed"]
    print(f"\n{len(rows)} rows of {path}, {len(failed)} failed")
    return int(bool(failed))


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    everything = {**BENCHMARKS, **MORE}
    if argv and not argv[0].startswith("-"):
        name, flags = argv[0], argv[1:]
        if name not in everything:
            print(f"bench: no benchmark {name!r}; there are {', '.join(everything)}",
                  file=sys.stderr)  # fmt: skip
            return 2
        if not is_there(name):
            print(f"bench: {name} is not in this version", file=sys.stderr)
            return 2
        if name in ("compiled", "data") and not {"-h", "--help"} & {*flags}:
            known = argparse.ArgumentParser(add_help=False)
            known.add_argument("--out", type=Path)
            known.add_argument("--quick", action="store_true")
            common, flags = known.parse_known_args(flags)
            flags += QUICK[name] if common.quick else []
            common = argparse.Namespace(again=True, minutes=None, **vars(common))
            return run_script(name, flags, common)
        return run(name, flags)
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--out", type=Path, help="folder of the rows")
    options = parser.parse_args(argv)
    if options.list:
        list_everything()
        return 0
    device = harness.device_for(options, parser)
    out = ["--out", str(options.out)] if options.out else []
    if options.table:
        folder = options.out or (harness.SCRATCH if options.quick else harness.RESULTS)
        return table(folder, harness.device_name(device))
    if not (options.quick or options.all):
        parser.error("say --list, --quick, --all, --table or the name of a benchmark")
    names = [name for name in BENCHMARKS if is_there(name)]
    if not options.quick:
        names = [n for n in names if n in (FOR_CPU if device.type == "cpu" else FOR_GPU)]
    codes = {}
    for name in names:
        print(f"\n=== {name}", flush=True)
        flags = ["--quick"] if options.quick else []
        if name in ("kernels", "tune", "train_step", "decode"):
            flags += ["--device", str(device), *out]
        else:
            flags += out
        # a process each: what breaks a device's context, or runs out of memory, ends one alone
        command = [sys.executable, "-m", "bench", name, *flags]
        codes[name] = subprocess.run(command, cwd=harness.ROOT).returncode
    failed = [name for name, code in codes.items() if code]
    print(f"\nran {', '.join(codes)}" + (f"; FAILED: {', '.join(failed)}" if failed else ""))
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
