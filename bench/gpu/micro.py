"""c: what the simulated schedule and the model of the kernels assume of a GPU.

    mma          cycles from a product (HMMA.16816, bfloat16) to its use, and between products of
                 1, 2 and 4 warps on each subpartition; whether one-warp programs spread over them
    special      cycles from a reciprocal root (MUFU) to its use, and between independent ones
    load         cycles of a load that waits for the one before: from L2, from memory, and from
                 memory with its line fetched into L2 some steps ahead
    code         cycles per instruction of straight loops of several sizes: the instruction cache
    copy         bytes per second of a copy, FLOP/s of a matrix product

The kernels count cycles themselves. A row's `constants` are named as `static/model.py` (fields of
`Device`) and `static/schedule.py` (LATENCY) name them, which is how both come to use them.
"""

import statistics
from collections import Counter
from functools import partial

import torch
import triton
import triton.language as tl

from bench import harness
from kru_triton.kernels.scan import prefetch
from kru_triton.kernels.tile import rsqrt

BENCH = "micro"


@triton.jit
def read(REGISTER: tl.constexpr, ON: tl.constexpr):
    """A special register; 0 where compiled code does not run on a device."""
    if ON:
        return tl.inline_asm_elementwise(
            "mov.u32 $0, %" + REGISTER + ";", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        return 0


@triton.jit
def mma(p_out, p_said, steps, CHAINS: tl.constexpr, ON: tl.constexpr):
    """Four products a step, of two instructions each: of one chain, in which they wait for one
    another, or of four, whose sums begin apart, since the compiler would make one of equal ones."""
    i = tl.arange(0, 16)
    a = (i[:, None] == i[None, :]).to(tl.bfloat16)
    acc = tl.zeros((16, 16), tl.float32)
    acc2 = acc + 1.0
    acc3 = acc + 2.0
    acc4 = acc + 3.0
    begin = read("clock", ON)
    for _ in range(steps):
        if CHAINS == 1:
            for _ in tl.static_range(4):
                acc = tl.dot(a, a, acc)
        else:
            acc = tl.dot(a, a, acc)
            acc2 = tl.dot(a, a, acc2)
            acc3 = tl.dot(a, a, acc3)
            acc4 = tl.dot(a, a, acc4)
    end = read("clock", ON)
    i_p = tl.program_id(0)
    tl.store(p_out + i_p * 256 + i[:, None] * 16 + i[None, :], acc + acc2 + acc3 + acc4)
    tl.store(p_said + i_p * 3, end - begin)
    tl.store(p_said + i_p * 3 + 1, read("smid", ON))
    tl.store(p_said + i_p * 3 + 2, read("warpid", ON))


@triton.jit
def special(p_x, p_said, steps, SIZE: tl.constexpr, ON: tl.constexpr):
    """Eight reciprocal roots a step, each of the one before, on SIZE/32 values of a lane."""
    o = tl.arange(0, SIZE)
    x = tl.load(p_x + o)
    begin = read("clock", ON)
    for _ in range(steps):
        for _ in tl.static_range(8):
            x = rsqrt(x, ON)
    end = read("clock", ON)
    tl.store(p_x + o, x)
    tl.store(p_said, end - begin)


@triton.jit
def load(p_x, p_out, p_said, steps, stride, AHEAD: tl.constexpr, ON: tl.constexpr):
    """A line of zeros a step, which are added to the address of the next one."""
    o = tl.arange(0, 32)
    p = p_x + o
    p_line = p_x + AHEAD * stride
    sum = tl.zeros((32,), tl.int32)
    begin = read("clock", ON)
    for t in range(steps):
        if AHEAD:
            prefetch(p_line)
            p_line += tl.where(t + AHEAD + 1 < steps, stride, 0)
        x = tl.load(p, cache_modifier=".cg")
        sum += x
        p += x + stride
    end = read("clock", ON)
    tl.store(p_out + o, sum)
    tl.store(p_said, end - begin)


@triton.jit
def code(p_x, p_said, steps, a, b, SIZE: tl.constexpr, ON: tl.constexpr):
    """SIZE groups of four multiply-adds a step, 64 bytes of instructions each."""
    o = tl.arange(0, 32)
    x = tl.load(p_x + o)
    y = x + 1.0
    z = x + 2.0
    w = x + 3.0
    begin = read("clock", ON)
    for _ in range(steps):
        for _ in tl.static_range(SIZE):
            x = x * a + b
            y = y * a + b
            z = z * a + b
            w = w * a + b
    end = read("clock", ON)
    tl.store(p_x + o, x + y + z + w)
    tl.store(p_said, end - begin)


WARPS = (1, 2, 4)  # on each subpartition
KIB = (4, 16, 32, 48)  # of code in a loop
AHEAD = 8  # steps by which a line is fetched


class Micro:
    """The measurements; where no device counts cycles, each a few steps of its kernel.

    Args:
        on: whether the device's registers can be read.
        processors: of the device.
    """

    def __init__(self, device: torch.device, on: bool, processors: int):
        self.device, self.on, self.processors = device, on, processors
        self.said = torch.zeros(16 * processors, 3, dtype=torch.int32, device=device)

    def steps(self, count: int) -> int:
        return count if self.on else 2

    def products(self, programs: int, chains: int, steps: int) -> list[list[int]]:
        """Cycles, processor and warp of every program."""
        out = torch.empty(programs, 16, 16, device=self.device)
        for _ in range(2):
            mma[(programs,)](out, self.said, steps, CHAINS=chains, ON=self.on, num_warps=1)
        if not (out.diagonal(dim1=1, dim2=2) == 4 * steps + 6).all():
            raise AssertionError("the chain of products is wrong")
        return self.said[:programs].tolist()

    def latency(self) -> dict:
        """From a product to its use, one program on each processor."""
        steps = self.steps(4096)
        said = self.products(self.processors, 1, steps)
        return {"cycles": statistics.median(cycles for cycles, *_ in said) / (4 * steps)}

    def rate(self, warps: int) -> dict:
        """Between products of one subpartition, and the most programs that one of them ran."""
        steps = self.steps(4096)
        said = self.products(4 * warps * self.processors, 4, steps)
        places = Counter((processor, warp % 4) for _, processor, warp in said)
        cycles = statistics.median(cycles for cycles, *_ in said) / (8 * steps * warps)
        return {"cycles": cycles, "most_programs": max(places.values())}

    def special(self, values: int) -> dict:
        """Of a reciprocal root, of a warp with so many independent ones."""
        steps = self.steps(1024)
        x = torch.full((32 * values,), 3.0, device=self.device)
        for _ in range(2):
            special[(1,)](x, self.said, steps, SIZE=32 * values, ON=self.on, num_warps=1)
        if not ((x - 1).abs() < 0.1).all():
            raise AssertionError("the chain of reciprocal roots is wrong")
        return {"cycles": self.said[0, 0].item() / (8 * steps * values)}

    def load(self, warm: bool, ahead: int) -> dict:
        """Of a load."""
        steps, stride = (self.steps(512), 1024) if warm else (self.steps(4096), 4096)
        x = torch.zeros(steps * stride, dtype=torch.int32, device=self.device)
        out = torch.empty(32, dtype=torch.int32, device=self.device)
        for _ in range(2):
            if not warm and self.on:  # out of the cache with x
                torch.zeros(2**28, dtype=torch.int8, device=self.device)
            load[(1,)](x, out, self.said, steps, stride, AHEAD=ahead, ON=self.on, num_warps=1)
        if out.any():
            raise AssertionError("the chain of loads is wrong")
        return {"cycles": self.said[0, 0].item() / steps}

    def code(self, kib: int) -> dict:
        """Of an instruction in a loop of so much code."""
        size = 16 * kib if self.on else 1
        steps = self.steps(65536 // size)
        x = torch.ones(32, device=self.device)
        for _ in range(2):
            code[(1,)](x, self.said, steps, 0.5, 0.25, SIZE=size, ON=self.on, num_warps=1)
        if not x.isfinite().all():
            raise AssertionError("the loop's result is not finite")
        return {"cycles": self.said[0, 0].item() / (4 * size * steps)}

    def clock(self) -> dict:
        """Cycles of a second while all processors multiply."""
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        out = torch.empty(16 * self.processors, 16, 16, device=self.device)
        self.products(len(out), 4, 16)  # compiles, and warms up
        start.record()
        mma[(len(out),)](out, self.said, 200_000, CHAINS=4, ON=True, num_warps=1)
        stop.record()
        stop.synchronize()
        return {"cycles": 1e3 * self.said[:, 0].max().item() / start.elapsed_time(stop)}


def measurements(micro: Micro) -> dict:
    """By name: a function, and the constant that its `cycles` are, if one."""
    found = {"mma latency": (micro.latency, None)}
    for warps in WARPS:
        constant = "mma_cycles" if warps == max(WARPS) else None
        found[f"mma rate, {warps} warps"] = partial(micro.rate, warps), constant
    found |= {
        "special latency": (partial(micro.special, 1), "latency xu"),
        "special rate": (partial(micro.special, 8), None),
        "load from L2": (partial(micro.load, True, 0), "latency l2"),
        "load from memory": (partial(micro.load, False, 0), None),
        **{f"code of {kib} KiB": (partial(micro.code, kib), None) for kib in KIB},
    }
    if micro.on:
        found["load fetched ahead"] = partial(micro.load, False, AHEAD), None
        found["clock"] = micro.clock, "clock"
    return found


def micro_of(device: torch.device) -> Micro:
    if device.type == "cpu":
        return Micro(device, False, 1)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return Micro(device, torch.version.hip is None, processors)


def run(results: harness.Results, device: torch.device) -> None:
    harness.ceilings(results, device)
    for name, (function, constant) in measurements(micro_of(device)).items():
        if results.is_done(BENCH, name) or results.out_of_time(name):
            continue
        try:
            found = function()
        except Exception as error:  # one that does not compile is an answer too
            results.add_reason(BENCH, name, "failed", harness.reason_of(error))
            harness.synchronize(device)
            continue
        line = ", ".join(f"{value:.4g} {key}" for key, value in found.items())
        constants = {constant: found["cycles"]} if constant and found["cycles"] else {}
        results.add(BENCH, name, line, constants=constants, **found)
