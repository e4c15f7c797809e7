"""Speed and memory of the torch backend on a CPU.

    python bench/cpu.py                        # everything, some minutes
    python bench/cpu.py --quick                # the same code on toy sizes, to see that it runs
    python bench/cpu.py --only scan memory     # some sections
    python bench/cpu.py --threads 1 --out bench/results/cpu.jsonl

Sections:
    scan     forward + backward with x_proj given, against the loop reference under autograd
    memory   peak memory of the same two
    layer    a full KRU layer against torch.nn.LSTM, GRU and RNN
    profile  operations per time step, and where the time goes
    growth   time against length, batch, size and number of factors

Results are checked against the loop in float64 on the shapes that are timed, before the timing.
Rivals take turns within one process; a row holds the 20th, 50th and 80th percentile of one call.
Rows are appended to `--out` as JSON lines.

B batch, T time, N units; a shape is written B32-T128-32x32.
"""

import argparse
import ctypes
import datetime
import gc
import json
import math
import platform
import resource
import shlex
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kru_triton import KRU, kru_scan, torch_backend, unitary_
from kru_triton.kronecker import group_factors
from kru_triton.reference import kru_scan_reference

ROOT = Path(__file__).parents[1]
SECTIONS = ("scan", "memory", "layer", "profile", "growth")
SHAPES = [(32, 128, (32, 32)), (32, 1020, (2,) * 7)]  # (B, T, sizes of square factors)
QUICK_SHAPES = [(4, 16, (4, 4)), (4, 20, (2, 2, 2))]
IMPLEMENTATIONS = {
    "torch": lambda *a, **k: kru_scan(*a, **k, backend="torch"),
    "loop": kru_scan_reference,
}


def shape_name(batch, length, sizes):
    same = len(set(sizes)) == 1 and len(sizes) > 2
    text = f"{sizes[0]}^{len(sizes)}" if same else "x".join(map(str, sizes))
    return f"B{batch}-T{length}-{text}"


def problem(batch, length, sizes, dtype=torch.float32, seed=0):
    """Leaf tensors x_proj, factors, beta and the cotangents of h and h_n."""
    torch.manual_seed(seed)
    units = math.prod(sizes)
    x = torch.randn(batch, length, 2 * units).to(dtype).requires_grad_()
    factors = [unitary_(torch.empty(2, 1, p, p)).to(dtype).requires_grad_() for p in sizes]
    beta = (0.1 * torch.randn(units)).to(dtype).requires_grad_()
    return x, factors, beta, torch.randn(x.shape).to(dtype), torch.randn(batch, 2 * units).to(dtype)


def forward_backward(scan, x, factors, beta, dh, dh_n):
    """h, h_n and the gradients of x_proj, beta and all factors, for modReLU."""
    h, h_n = scan(x, factors, beta, nonlinearity="modrelu")
    return h, h_n, *torch.autograd.grad((h, h_n), (x, beta, *factors), (dh, dh_n))


def check(shape):
    """Largest relative RMS error of the float32 torch backend against the float64 loop.

    It may be three times that of the float32 loop, the best that the definition does at this
    length: roundings of 6e-8 add up over T steps, and modReLU's adjoint divides by |z|.
    """
    expected = forward_backward(kru_scan_reference, *problem(*shape, torch.float64))
    errors = {}
    for name, scan in IMPLEMENTATIONS.items():
        actual = forward_backward(scan, *problem(*shape))
        errors[name] = [((a - e).norm() / e.norm()).item() for a, e in zip(actual, expected)]
    if not all(e <= 3 * limit + 1e-6 for e, limit in zip(errors["torch"], errors["loop"])):
        raise SystemExit(f"{shape_name(*shape)}: wrong results, relative errors {errors}")
    return max(errors["torch"])


def interleaved(candidates, rounds):
    """{name: (p20, p50, p80) in ms}: every round calls each candidate once, after a warm-up."""
    times = defaultdict(list)
    for turn in range(rounds + 1):
        for name, function in candidates.items():
            start = time.perf_counter()
            function()
            if turn:
                times[name].append(1e3 * (time.perf_counter() - start))
    quantiles = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return {
        name: tuple(torch.tensor(ms, dtype=torch.float64).quantile(quantiles).tolist())
        for name, ms in times.items()
    }


class Table:
    """Prints a line per result and appends it to the output file."""

    def __init__(self, path, command):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.common = {
            "device": cpu_name(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "commit": commit(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": command,
        }
        print(" · ".join(f"{k} {v}" for k, v in self.common.items() if k != "command"))

    def title(self, text):
        print(f"\n{text}", flush=True)

    def add(self, section, name, line, **values):
        print(f"  {name:<34} {line}", flush=True)
        row = {"section": section, "name": name, **values, **self.common}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def add_times(self, section, name, ms, baseline=None, **values):
        p20, p50, p80 = ms
        line = f"{p50:9.2f} ms   (p20 {p20:.2f}, p80 {p80:.2f})"
        if baseline is not None:
            values["ratio"] = baseline / p50
            line += f"   {baseline / p50:5.2f}x"
        self.add(section, name, line, ms_p20=p20, ms_p50=p50, ms_p80=p80, **values)


def cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit():
    """Short hash, with -dirty where the library differs from it; "unknown" outside git."""

    def git(*arguments):
        return subprocess.run(
            ["git", "--no-optional-locks", *arguments], cwd=ROOT, capture_output=True, text=True
        )

    try:
        head = git("rev-parse", "--short", "HEAD")
        dirty = git("status", "--porcelain", "--", "kru_triton").stdout.strip()
    except OSError:
        return "unknown"
    return head.stdout.strip() + ("-dirty" if dirty else "") if not head.returncode else "unknown"


# scan


def bench_scan(table, quick):
    table.title("scan: forward + backward, x_proj given, modReLU, float32; ratio = loop / torch")
    for shape in QUICK_SHAPES if quick else SHAPES:
        error = check(shape)
        arguments = problem(*shape)
        times = interleaved(
            {
                name: lambda scan=scan, arguments=arguments: forward_backward(scan, *arguments)
                for name, scan in IMPLEMENTATIONS.items()
            },
            3 if quick else 15,
        )
        for name, ms in times.items():
            table.add_times(
                "scan",
                f"{shape_name(*shape)} {name}",
                ms,
                baseline=times["loop"][1],
                implementation=name,
                shape=shape_name(*shape),
                max_relative_error=error if name == "torch" else None,
            )


# memory


def memory_of_this_process(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key + ":"))


def measure_memory(implementation, shape):
    """Bytes by which the resident set grew at its highest during one forward + backward.

    In a process of its own, since memory freed to the allocator would hide what the next
    implementation takes. A run of two steps comes first, so that libraries and thread pools are
    loaded. The kernel's high-water mark of this address space (VmHWM) is then set back to the
    present (clear_refs 5) and read at the end: it misses nothing, whoever allocates. ru_maxrss
    would not do alone: it starts from the parent's, which fork and exec hand down.
    """
    scan = IMPLEMENTATIONS[implementation]
    batch, _, sizes = shape
    forward_backward(scan, *problem(batch, 2, sizes))
    arguments = problem(*shape)
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_of_this_process("VmRSS")
    forward_backward(scan, *arguments)
    peak = memory_of_this_process("VmHWM")
    assert peak <= 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak - before


def bench_memory(table, quick):
    table.title("memory: highest growth of resident memory in one forward + backward")
    for shape in QUICK_SHAPES if quick else SHAPES:
        batch, length, sizes = shape
        h_bytes = batch * length * 2 * math.prod(sizes) * 4
        peaks = {}
        for name in ("loop", "torch"):
            command = [sys.executable, __file__, "--measure-memory", name, json.dumps(shape)]
            command += ["--threads", str(torch.get_num_threads())]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                raise SystemExit(f"memory of {name}:\n{result.stderr}")
            peaks[name] = peak = int(result.stdout)
            ratio = peaks["loop"] / max(1, peak)
            table.add(
                "memory",
                f"{shape_name(*shape)} {name}",
                f"{peak / 2**20:9.1f} MiB   {peak / h_bytes:5.2f} times h   {ratio:5.2f}x less",
                implementation=name,
                shape=shape_name(*shape),
                peak_bytes=peak,
                h_bytes=h_bytes,
                ratio=ratio,
            )


# layer


def bench_layer(table, quick):
    batch, length, d, n = (4, 8, 16, 16) if quick else (32, 128, 512, 1024)
    table.title(
        f"layer: forward + backward of all parameters and the input, B={batch}, T={length}, "
        f"{d} -> {n}; ratio = LSTM / this"
    )
    torch.manual_seed(0)
    layers = {
        "KRU (complex, modReLU)": KRU(d, n, backend="torch"),
        "KRU (complex, tanh)": KRU(d, n, nonlinearity="tanh", backend="torch"),
        "KRU (real, tanh)": KRU(d, n, field="real", nonlinearity="tanh", backend="torch"),
        "nn.LSTM": nn.LSTM(d, n),
        "nn.GRU": nn.GRU(d, n),
        "nn.RNN (tanh)": nn.RNN(d, n),
    }
    x = torch.randn(length, batch, d, requires_grad=True)

    def train_step(layer):
        output = layer(x)[0]
        return torch.autograd.grad(output, (x, *layer.parameters()), torch.ones_like(output))

    candidates = {name: lambda layer=layer: train_step(layer) for name, layer in layers.items()}
    times = interleaved(candidates, 2 if quick else 7)
    for name, ms in times.items():
        size = sum(p.numel() for p in layers[name].parameters())
        table.add_times("layer", name, ms, baseline=times["nn.LSTM"][1], parameters=size)


# profile


class CountCalls(TorchDispatchMode):
    """Counts aten calls; views apart, since they touch no data."""

    def __init__(self):
        super().__init__()
        self.calls, self.views = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        (self.views if func.is_view else self.calls)[name] += 1
        return func(*args, **(kwargs or {}))


def grouped(batch, length, sizes):
    """What the op's own kernels take: x_proj, a, b, beta, and the cotangents time-first."""
    x, factors, beta, dh, dh_n = problem(batch, length, sizes)
    a, b = (w.detach().contiguous() for w in group_factors(factors))
    return x.detach(), a, b, beta.detach(), dh.transpose(0, 1).contiguous(), dh_n


def run_forward(x, a, b, beta, dh, dh_n):
    return torch_backend.scan_forward(x, a, b, beta, None, None, "modrelu")[0]


def run_backward(h, x, a, b, beta, dh, dh_n):
    return torch_backend.scan_backward(dh, dh_n, h, None, a, b, beta, None, None, "modrelu")


def calls_of(implementation, direction, batch, length, sizes):
    """(calls, views) of a whole run; of the loop, autograd's own backward."""
    with CountCalls() as counter:
        if implementation == "torch":
            arguments = grouped(batch, length, sizes)
            if direction == "backward":
                h = run_forward(*arguments)
            counter.calls.clear()
            counter.views.clear()
            if direction == "forward":
                run_forward(*arguments)
            else:
                run_backward(h, *arguments)
        else:
            x, factors, beta, dh, dh_n = problem(batch, length, sizes)
            counter.calls.clear()
            counter.views.clear()
            h, h_n = kru_scan_reference(x, factors, beta)
            if direction == "backward":
                counter.calls.clear()
                counter.views.clear()
                torch.autograd.grad((h, h_n), (x, beta, *factors), (dh, dh_n))
    return counter.calls, counter.views


def bench_profile(table, quick):
    table.title("profile: aten calls per time step (slope between two lengths), views apart")
    for batch, _, sizes in QUICK_SHAPES if quick else SHAPES:
        for implementation in IMPLEMENTATIONS:
            for direction in ("forward", "backward"):
                # whole chunks at both lengths, so that the work per chunk counts in proportion
                few, many = (8, 16) if quick else (32, 96)
                runs = [calls_of(implementation, direction, batch, t, sizes) for t in (few, many)]
                calls, views = (
                    (sum(b.values()) - sum(a.values())) / (many - few) for a, b in zip(*runs)
                )
                growth = runs[1][0] - runs[0][0]
                most = ", ".join(
                    f"{name} {count / (many - few):.2f}" for name, count in growth.most_common(5)
                )
                table.add(
                    "calls",
                    f"{shape_name(batch, many, sizes)} {implementation} {direction}",
                    f"{calls:6.2f} + {views:5.2f} views per step   ({most})",
                    implementation=implementation,
                    direction=direction,
                    calls_per_step=calls,
                    views_per_step=views,
                )
    for shape in QUICK_SHAPES if quick else SHAPES:
        profile_shape(table, shape, 2 if quick else 5)


def kind_of(event, sizes):
    """The part of the algorithm an aten call belongs to, told by its name and operand shapes."""
    heads, batch, p, c, q = sizes
    name, shapes = event.key.removeprefix("aten::"), [list(s) for s in event.input_shapes]
    if name in ("baddbmm_", "baddbmm", "bmm", "mm", "addmm"):
        if name == "baddbmm_" and shapes[0] == [heads, c * q, c * q]:
            return "weight gradients"
        if name == "bmm" and shapes[0][1:] == [p * c, q]:
            return "weight gradients"
        if name == "bmm" and shapes[0][1] > batch * p and shapes[1] == [heads, c * q, c * q]:
            return "recomputed X Bᵀ"
        return "matrix products in the loop"
    if name in ("copy_", "clone", "_to_copy", "contiguous"):
        return "copies"
    if name in ("sum", "add_", "add"):
        return "weight gradients"
    if name in ("zero_", "fill_", "empty", "empty_like", "zeros", "empty_strided", "new_zeros"):
        return "allocation"
    return "nonlinearity"


def profile_shape(table, shape, repeats):
    """Self time of aten calls by purpose, and what is left of the wall time.

    The profiler adds about a microsecond to every call, so shares are of the profiled run; the
    floor is an unprofiled run of the same steps on 1 row and 2x2 factors, where nothing is left but
    the calls themselves.
    """
    batch, length, _ = shape
    arguments = grouped(*shape)
    h = run_forward(*arguments)
    p, q = arguments[1].shape[-1], arguments[2].shape[-1]
    functions = {
        "forward": lambda a, h: run_forward(*a),
        "backward": lambda a, h: run_backward(h, *a),
    }
    small = grouped(1, length, (2, 2))
    small_h = run_forward(*small)
    for direction, function in functions.items():
        times = interleaved(
            {
                "all": lambda f=function: f(arguments, h),
                "floor": lambda f=function: f(small, small_h),
            },
            2 * repeats,
        )
        wall, floor = times["all"][1], times["floor"][1]
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
            start = time.perf_counter()
            for _ in range(repeats):
                function(arguments, h)
            profiled = (time.perf_counter() - start) * 1e3 / repeats
        shares = Counter()
        for event in profiler.key_averages(group_by_input_shape=True):
            if event.key.startswith("aten::"):
                kind = kind_of(event, (1, batch, p, 2, q))
                shares[kind] += event.self_cpu_time_total / 1e3 / repeats / profiled
        shares["Python between calls"] = 1 - sum(shares.values())
        text = ", ".join(f"{kind} {share:.0%}" for kind, share in shares.most_common())
        table.add(
            "profile",
            f"{shape_name(*shape)} {direction}",
            f"{wall:8.2f} ms, {1e3 * wall / length:.1f} µs per step, of which calls alone "
            f"{1e3 * floor / length:.1f} µs\n{'':37}{text}",
            ms_p50=wall,
            us_per_step=1e3 * wall / length,
            call_floor_us_per_step=1e3 * floor / length,
            shares={k: round(v, 4) for k, v in shares.items()},
        )


# growth


def bench_growth(table, quick):
    base = (4, 8, (4, 4)) if quick else (32, 128, (32, 32))
    batch, length, sizes = base
    p, steps = sizes[0], (1, 2) if quick else (1, 2, 4)
    many = 4 if quick else 12  # 2^12 = 64² units as factors of one size
    families = {
        "length T (linear)": [(batch, k * length, sizes) for k in steps],
        "batch B (linear)": [(max(1, k * batch // 4), length, sizes) for k in (1, 2, 4, 8)],
        "units N = P² (N^1.5 products, N the rest)": [
            (batch, length, (k * p // 2, k * p // 2)) for k in (1, 2, 4)
        ],
        "factors F, same N (constant where a balanced cut exists)": [
            (batch, length, (2 ** (many // f),) * f) for f in range(2, many + 1) if many % f == 0
        ],
    }
    for title, shapes in families.items():
        table.title(f"growth: {title}; forward + backward")
        arguments = {shape_name(*shape): problem(*shape) for shape in shapes}
        times = interleaved(
            {
                name: lambda a=a: forward_backward(IMPLEMENTATIONS["torch"], *a)
                for name, a in arguments.items()
            },
            2 if quick else 5,
        )
        first = next(iter(times.values()))[1]
        for name, ms in times.items():
            p20, p50, p80 = ms
            table.add(
                "growth",
                name,
                f"{p50:9.2f} ms   {p50 / first:5.2f} times the first",
                family=title.split(" (")[0],
                ms_p20=p20,
                ms_p50=p50,
                ms_p80=p80,
                relative=p50 / first,
            )


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="toy sizes: shows only that it runs")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="SECTION")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--out", default=ROOT / "bench" / "results" / "cpu.jsonl")
    parser.add_argument("--measure-memory", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.measure_memory:
        implementation, shape = options.measure_memory
        batch, length, sizes = json.loads(shape)
        print(measure_memory(implementation, (batch, length, tuple(sizes))))
        return
    arguments = sys.argv[1:] if argv is None else argv
    table = Table(options.out, shlex.join(["python", "bench/cpu.py", *arguments]))
    functions = {
        "scan": bench_scan,
        "memory": bench_memory,
        "layer": bench_layer,
        "profile": bench_profile,
        "growth": bench_growth,
    }
    for section in options.only:
        functions[section](table, options.quick)
    print(f"\nrows appended to {options.out}")


if __name__ == "__main__":
    main()
