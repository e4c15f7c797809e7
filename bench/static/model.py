"""What a kernel should take, from the instructions it compiles to, and what limits it.

    python -m bench model --device h200      # times, what bounds them; measured ones beside them

A program of a scan kernel is a few warps that run all steps of one group of batch rows. Its step
cannot be shorter than its latency, warps that share a subpartition add their issue or tensor-core
cycles, and all programs together cannot move their bytes faster than memory does:

    cycles of a step = max(latency, warps per subpartition · max(instructions, mma · mma cycles))
    time = max(waves · T · cycles / clock, bytes · B · T · heads / bandwidth)

The latency is that of the compiled code's scheduling bits, one warp alone. The weight gradients
run in parallel over time: a processor takes `row_cycles` for a row and step. The kernels that
stream a factor, and those of the LSTM, are not in it. Counts are the newest rows of `python -m
bench schedule` for the architecture, else the budget of `compiled_budget.json` (sm_90).

Constants are from data sheets and from the distances that ptxas keeps (see DEVICES): guesses, in
whose place comes what `make gpu` has measured (`constants` of rows in --results); its times are
shown beside the predicted ones. By hand: `--set mma_cycles=6.4 bandwidth=2.9e12`.

B batch rows, T steps, H heads, P, Q sides of the factors, N = P·Q complex units per head.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bench import harness
from kru_triton.kernels import geometry
from kru_triton.kernels.options import compile_options

ITEMSIZE = {"bf16": 2, "fp32": 4}
# numbers of a batch row, step and unit that a kernel moves
NUMBERS = {"forward": 4, "backward": 6, "weight_grad": 4}
SIZES = ((8, 8), (8, 16), (16, 16), (16, 32), (32, 32), (32, 64), (64, 64))


@dataclass(frozen=True)
class Device:
    """A GPU as the model sees it."""

    match: str  # in the name that the driver gives
    arch: str
    processors: int
    clock: float  # Hz, sustained
    bandwidth: float  # bytes/s of a copy, read and written
    mma_cycles: float  # per 16x8x16 bfloat16 product and subpartition
    registers: int  # of 4 bytes per processor and lane of 32 (64 for AMD)
    warps: int  # resident per processor


# processors, clock: data sheets; bandwidth: 90 % of the data sheet's (h200, h100: as copies
# have been seen to run); mma_cycles: the distance at which ptxas issues independent products
# (`schedule.PIPES`; mi300x: a guess).
DEVICES = {
    "h200": Device("H200", "sm_90", 132, 1.8e9, 4.3e12, 6.0, 65536, 64),
    "h100": Device("H100", "sm_90", 132, 1.75e9, 3.0e12, 6.0, 65536, 64),
    "a100": Device("A100", "sm_80", 108, 1.41e9, 1.8e12, 8.0, 65536, 64),
    "b200": Device("B200", "sm_100", 148, 1.85e9, 7.2e12, 8.0, 65536, 64),
    "mi300x": Device("MI300X", "gfx942", 304, 2.1e9, 4.8e12, 8.0, 131072, 32),
}


@functools.cache
def _compiled(arch: str) -> dict[str, dict]:
    rows = harness.read_rows(harness.RESULTS / f"{harness.slug(arch)}.jsonl")
    return {row["name"]: row for row in rows if row["bench"] == "schedule"}


@functools.cache
def budget() -> dict[str, dict]:
    """Figures of the variants on sm_90."""
    return json.loads(Path(__file__).with_name("compiled_budget.json").read_text())["sm_90"]


def products(tile: geometry.Tile, precision: str) -> float:
    """16x8x16 products per step of one program of a scan: two complex ones."""
    pe, qe = tile.S1 * tile.PP, tile.S2 * tile.QP
    one = 4 * math.ceil(pe / 16) * math.ceil(qe / 16)
    return one * (math.ceil(qe / 8) + math.ceil(pe / 8)) * (3 if precision == "fp32" else 1)


def nearest(kernel: str, P: int, Q: int, dtype: str, arch: str) -> tuple[list[dict], float]:
    """Rows of a modReLU kernel for P·Q units, one for each launch, and their share in the units.

    A size that was not compiled takes those of its padded sides, or else of the compiled size
    nearest in units.

    Raises:
        ValueError: no size of that kernel and dtype has been compiled.
    """
    tile = geometry.Tile.of(P, Q, ITEMSIZE[dtype])
    pattern = re.compile(rf"{kernel}-(\d+)x(\d+)-{dtype}(-da|-db|-dbeta)?")
    sizes = {}
    for name, row in (budget() | _compiled(arch)).items():
        if match := pattern.fullmatch(name):
            sizes.setdefault((int(match[1]), int(match[2])), []).append(row)
    if not sizes:
        raise ValueError(f"no {kernel} kernel of {dtype} is among the compiled ones")
    same = ((P, Q), (tile.PP, tile.QP), (Q, P), (tile.QP, tile.PP))
    distance = {s: abs(math.log(s[0] * s[1] / (P * Q))) for s in sizes}
    size = next((s for s in same if s in sizes), min(sizes, key=distance.get))
    return sizes[size], 1.0 if size in same else P * Q / (size[0] * size[1])


@dataclass(frozen=True)
class Prediction:
    seconds: float
    bound: str  # latency, issue, tensor, memory


def predict(
    kernel: str, P: int, Q: int, dtype: str, B: int, T: int, heads: int, device: Device
) -> Prediction:
    """Time of one launch of `kernel`: "forward", "backward" or "weight_grad"."""
    memory = NUMBERS[kernel] * ITEMSIZE[dtype] * P * Q * heads * B * T / device.bandwidth
    launches, units = nearest(kernel, P, Q, dtype, device.arch)
    if kernel == "weight_grad":
        steps = B * T * heads * units / device.processors / device.clock
        times = [steps * row["row_cycles"] for row in launches]
        bound = "memory" if memory * len(times) > sum(times) else "issue"
        return Prediction(sum(max(memory, t) for t in times), bound)
    (row,), tile = launches, geometry.Tile.of(P, Q, ITEMSIZE[dtype])
    options = compile_options(tile, 1, 2, dtype, "modrelu", nvidia=True)[1]
    latency, issue = units * row["step_cycles"], units * row["instructions_per_step"]
    tensor = products(tile, dtype) / options["num_warps"] * device.mma_cycles
    busy = max(issue, tensor)
    subpartitions = 4 * device.processors
    programs = math.ceil(B / tile.rows) * heads
    held = max(
        1, min(device.warps, device.registers // (32 * (8 * math.ceil(row["registers"] / 8))))
    )
    resident = max(1, held // options["num_warps"]) * device.processors
    seconds, left = 0.0, programs
    bound = "latency"
    while left > 0:
        warps = math.ceil(min(left, resident) * options["num_warps"] / subpartitions)
        if not seconds and warps * busy > latency:
            bound = "issue" if issue >= tensor else "tensor"
        seconds += T * max(latency, warps * busy) / device.clock
        left -= resident
    return Prediction(memory, "memory") if memory > seconds else Prediction(seconds, bound)


def forward_backward(*arguments) -> Prediction:
    """All three launches."""
    parts = [predict(kernel, *arguments) for kernel in NUMBERS]
    slowest = max(parts, key=lambda p: p.seconds)
    return Prediction(sum(p.seconds for p in parts), slowest.bound)


def device_of(name: str, rows: Iterable[dict] = ()) -> Device | None:
    """The known device whose name the driver's name contains, with the constants that rows of one
    measured (`python -m bench gpu --part c`) in place of its own; the last of each."""
    device = next((d for d in DEVICES.values() if d.match.lower() in name.lower()), None)
    return device and dataclasses.replace(device, **constants(device, rows)[0])


def constants(device: Device, rows: Iterable[dict]) -> tuple[dict, dict]:
    """Measured constants of the device: its fields, and the latencies of `static/schedule.py`."""
    own, latencies = {}, {}
    for row in rows:
        if device.match.lower() in row["device"].lower():
            for name, value in row.get("constants", {}).items():
                if name.startswith("latency "):
                    latencies[name.removeprefix("latency ")] = round(value)
                else:
                    own[name] = value
    return own, latencies


BATCHES = (1, 16, 64, 256, 1024, 2048)


def table(device: Device, T: int, dtype: str) -> list[str]:
    """Times of every size and batch."""
    lines = ["| factors | " + " | ".join(f"B={b}" for b in BATCHES) + " |", "|---" * 7 + "|"]
    for P, Q in SIZES:
        found = [forward_backward(P, Q, dtype, B, T, 1, device) for B in BATCHES]
        cells = [f"{1e3 * p.seconds:.3g} {p.bound}" for p in found]
        lines.append(f"| {P}x{Q} | " + " | ".join(cells) + " |")
    return lines


def beside(device: Device, rows: Iterable[dict]) -> list[str]:
    """Measured times of our kernels (`python -m bench gpu --part d`) beside predicted ones."""
    lines = []
    for row in rows:
        own = (row["bench"], row["status"], row.get("implementation")) == ("steps", "ok", "kru")
        if own and device.match.lower() in row["device"].lower() and not row.get("setting"):
            shape = [row[key] for key in ("P", "Q", "dtype", "B", "T", "heads")]
            found = predict(row["direction"], *shape, device)
            predicted = 1e3 * found.seconds
            times = f"{row['ms_p50']:.3f} | {predicted:.3f} | {row['ms_p50'] / predicted:.2f}"
            lines.append(f"| {row['case']} | {row['direction']} | {times} | {found.bound} |")
    heads = ["| case | kernel | measured ms | predicted ms | measured / predicted | bound by |"]
    return ["", *heads, "|---" * 6 + "|", *lines] if lines else []


def main(argv: list[str] | None = None) -> int:
    parser = harness.plain_parser(__doc__, "model")
    parser.add_argument("--device", nargs="+", choices=DEVICES, default=list(DEVICES))
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--dtype", choices=ITEMSIZE, default="bf16")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="of a Device")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder of rows")
    options = parser.parse_args(argv)
    names = [field.name for field in dataclasses.fields(Device) if field.type is not str]
    given = {}
    for pair in options.set:
        name, _, value = pair.partition("=")
        try:
            given[name] = float(value)
        except ValueError:
            name = ""
        if name not in names:
            parser.error(f"--set: must be NAME=NUMBER, NAME of {', '.join(names)}, got {pair}")
    if options.length < 1:
        parser.error(f"--length: must be positive, got {options.length}")
    files = sorted(options.results.glob("*.jsonl"))
    rows = harness.latest([row for path in files for row in harness.read_rows(path)])
    for name in options.device:
        measured, latencies = constants(DEVICES[name], rows)
        if measured:
            print("measured:", ", ".join(f"{k} {v:.4g}" for k, v in measured.items()))
        if latencies:
            words = " ".join(f"{k}={v}" for k, v in latencies.items())
            print(f"the cycles of a step, with the measured latencies, are those of\n  python -m "
                  f"bench schedule --arch {DEVICES[name].arch} --latency {words}")  # fmt: skip
        device = dataclasses.replace(DEVICES[name], **measured, **given)
        what = f"{options.dtype}, T={options.length}, one head: ms of forward + backward"
        print(f"kru_scan on {device.match}, modReLU, {what} with weight gradients, and what bounds "
              f"most of it\n({len(_compiled(device.arch))} kernels compiled for {device.arch}; for "
              "the rest the budget of sm_90)\n")  # fmt: skip
        print(*table(device, options.length, options.dtype), *beside(device, rows), "", sep="\n")
    return 0
