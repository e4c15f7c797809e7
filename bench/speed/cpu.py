"""Speed and memory of the torch backend on a CPU.

    python -m bench cpu                        # everything, some minutes
    python -m bench cpu --quick                # the same code on toy sizes, to see that it runs
    python -m bench cpu --only scan memory     # some sections
    python -m bench cpu --threads 1

Sections:
    scan     forward + backward with x_proj given, against the loop reference under autograd
    memory   peak memory of the same two, and of a layer that recomputes
    layer    a full KRU layer against torch.nn.LSTM, GRU and RNN, and the part of its products

Results are checked against the loop in float64 on the shapes that are timed, before the timing.
Baselines take turns within one process; a row holds the 20th, 50th and 80th percentile of one call.
Rows are appended to bench/results/<processor>.jsonl (`--quick`: build/bench).

B batch, T time, N units; a shape is written B32-T128-32x32.
"""

import ctypes
import functools
import gc
import math
import multiprocessing
import resource
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch import nn

from bench import harness
from kru_triton import KRU, KRULSTM, kru_scan, unitary_
from kru_triton.reference import kru_scan_reference

BENCH = "cpu"
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

    It may be three times that of the float32 loop, the best that the definition does here.
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
    """The `quantiles` of each: every round calls each candidate once, after a warm-up."""
    times = defaultdict(list)
    for turn in range(rounds + 1):
        for name, function in candidates.items():
            start = time.perf_counter()
            function()
            if turn:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: harness.quantiles(ms) for name, ms in times.items()}


class Table(harness.Results):
    """Results whose rows carry their section."""

    def add(self, section, name, line, **values):
        super().add(BENCH, name, line, section=section, **values)

    def add_times(self, section, name, ms, baseline=None, **values):
        line = f"{ms['ms_p50']:9.2f} ms   (p20 {ms['ms_p20']:.2f}, p80 {ms['ms_p80']:.2f})"
        if baseline is not None:
            values["ratio"] = baseline["ms_p50"] / ms["ms_p50"]
            line += f"   {values['ratio']:5.2f}x"
        self.add(section, name, line, **ms, **values)


# scan


def bench_scan(table, quick):
    table.title("scan: forward + backward, x_proj given, modReLU, float32; ratio = loop / torch")
    for shape in QUICK_SHAPES if quick else SHAPES:
        error = check(shape)
        candidates = {
            name: functools.partial(forward_backward, scan, *problem(*shape))
            for name, scan in IMPLEMENTATIONS.items()
        }
        times = interleaved(candidates, 3 if quick else 15)
        for name, ms in times.items():
            values = {"implementation": name, "shape": shape_name(*shape)}
            values["max_relative_error"] = error if name == "torch" else None
            table.add_times("scan", f"scan {values['shape']} {name}", ms, times["loop"], **values)


# memory


def memory_of_this_process(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key + ":"))


def growth_of_memory(function):
    """Bytes by which the resident set grows at its highest while `function` runs.

    In a process of its own, since memory freed to the allocator would hide what the next one takes,
    and after a run at a small size, which loads libraries. The kernel's high-water mark (VmHWM) is
    set back to the present (clear_refs 5) and read at the end: it misses nothing.
    """
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_of_this_process("VmRSS")
    function()
    peak = memory_of_this_process("VmHWM")
    assert peak <= 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak - before


def measure_memory(threads, name, shape):
    """Growth in one forward + backward of a scan, its inputs there before, or of a layer of which
    the last state alone is used."""
    torch.set_num_threads(threads)
    batch, length, sizes = shape
    if name in IMPLEMENTATIONS:
        scan = IMPLEMENTATIONS[name]
        forward_backward(scan, *problem(batch, 2, sizes))
        arguments = problem(*shape)
        return growth_of_memory(lambda: forward_backward(scan, *arguments))
    torch.manual_seed(0)
    recompute = int(name.partition("=")[2] or 0)
    layer = KRU(64, math.prod(sizes), factors=sizes, recompute=recompute, backend="torch")

    def run(steps):
        x = torch.randn(steps, batch, 64, requires_grad=True)
        torch.autograd.grad(layer(x, h_n_only=True)[1].square().sum(), (x, *layer.parameters()))

    run(2)
    return growth_of_memory(lambda: run(length))


def bench_memory(table, quick):
    table.title("memory: highest growth of resident memory in one forward + backward")
    measured = [(shape, "loop", "torch") for shape in (QUICK_SHAPES if quick else SHAPES)]
    measured.append((measured[0][0], "layer", f"layer recompute={8 if quick else 16}"))
    for shape, *names in measured:
        batch, length, sizes = shape
        h_bytes = batch * length * 2 * math.prod(sizes) * 4
        peaks = {}
        for name in names:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                peak = pool.apply(measure_memory, (torch.get_num_threads(), name, shape))
            peaks[name] = peak
            ratio = peaks[names[0]] / max(1, peak)
            line = f"{peak / 2**20:9.1f} MiB   {peak / h_bytes:5.2f} times h   {ratio:5.2f}x less"
            values = {"implementation": name, "shape": shape_name(*shape), "peak_bytes": peak}
            values |= {"h_bytes": h_bytes, "ratio": ratio}
            table.add("memory", f"memory {values['shape']} {name}", line, **values)


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
        "KRULSTM": KRULSTM(d, n, backend="torch"),
    }
    x = torch.randn(length, batch, d, requires_grad=True)

    def train_step(layer):
        output = layer(x)[0]
        return torch.autograd.grad(output, (x, *layer.parameters()), torch.ones_like(output))

    flat, weight = x.detach().flatten(0, 1), torch.randn(2 * n, d)
    dy = torch.randn(len(flat), 2 * n)
    products = "three products of a complex KRU's input projection"
    candidates = {name: lambda layer=layer: train_step(layer) for name, layer in layers.items()}
    candidates[products] = lambda: (flat @ weight.t(), dy @ weight, dy.t() @ flat)
    flops = {products: 3 * 2 * flat.numel() * 2 * n, "nn.LSTM": 3 * 2 * len(flat) * 4 * n * (d + n)}
    times = interleaved(candidates, 2 if quick else 7)
    for name, ms in times.items():
        size = sum(p.numel() for p in layers[name].parameters()) if name in layers else 2 * n * d
        values = {"parameters": size}
        if name in flops:
            values["gflops_per_s"] = flops[name] / ms["ms_p50"] / 1e6
        table.add_times("layer", f"layer {name}", ms, baseline=times["nn.LSTM"], **values)


BENCHES = {"scan": bench_scan, "memory": bench_memory, "layer": bench_layer}


def main(argv=None):
    parser = harness.parser(__doc__, "cpu")
    parser.add_argument("--only", nargs="+", choices=BENCHES, default=BENCHES, metavar="SECTION")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    options = parser.parse_args(argv)
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads: must be positive, got {options.threads}")
    if options.threads:
        torch.set_num_threads(options.threads)
    options.again = True
    table = Table(torch.device("cpu"), options, harness.command_line("cpu", argv))
    for section in options.only:
        BENCHES[section](table, options.quick)
    return table.finish()
