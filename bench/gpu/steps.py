"""d: how long a step and a sequence take, beside torch.nn, the loop and FlashRNN.

Each case races our three kernels (forward, adjoint, weight gradients) with torch.nn.LSTM and GRU
(cuDNN) of as many units, their projection of 16 inputs included, in the same type of memory; a few,
in float32, the definition as a loop under autograd and the torch backend. Then launch constants
that only a GPU can settle (`options.TUNABLE`), each against the default (`setting`), and FlashRNN.

Before the timing our results of 64 steps of the very case are checked against float64 (`errors`), a
setting's against the default's. `predicted_ms` is what `static/model.py` says, with the constants
that part c has measured; times are of a call between events, L2 flushed before.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from bench import harness
from bench.gpu.launches import DTYPES, KERNELS, Problem, checked
from bench.harness import Candidate, Unavailable
from bench.static import model
from kru_triton import kru_scan
from kru_triton.reference import kru_scan_reference

BENCH = "steps"
CHECKED = 64  # steps


@dataclass(frozen=True)
class Case:
    B: int
    T: int
    P: int
    Q: int
    heads: int = 1
    dtype: str = "bf16"

    @property
    def units(self) -> int:
        return self.heads * self.P * self.Q

    @property
    def name(self) -> str:
        heads = f"-{self.heads}heads" if self.heads > 1 else ""
        return f"B{self.B}-T{self.T}-{self.P}x{self.Q}{heads}-{self.dtype}"

    def problem(self, device) -> Problem:
        return Problem.of(self.B, self.T, self.P, self.Q, self.heads, self.dtype, device)


SHAPES = ((16, 16, 1), (32, 32, 1), (16, 32, 1), (16, 16, 4))
QUICK = Case(3, 4, 4, 4, 1, "fp32")
LOOPED = (16, 528)  # rows of the cases that the loops run too


def cases(quick: bool) -> list[Case]:
    """The most telling first."""
    if quick:
        return [QUICK]
    few = [(B, 1024) for B in (16, 132, 528, 1)]
    found = [
        Case(B, T, *shape, dtype)
        for rows in (few, [(1024, 512), (2048, 512)])
        for dtype in ("bf16", "fp32")
        for B, T in rows
        for shape in SHAPES
    ]
    return found + [Case(B, 1024, *shape, "bf16x2") for B in LOOPED for shape in SHAPES[:2]]


# which launch constants are tried: kernel, P, Q, rows, settings
WARPS = [{"num_warps": n, "maxnreg": None} for n in (1, 2, 4, 8)]
TILES = [{"FRAGMENTS": False, **warps} for warps in WARPS[:3]]
FETCH = [*({"PREFETCH": n} for n in (0, 2, 4, 8)), {"AHEAD": 0}]
REGISTERS = [{"BETA_IN_LOOP": True}, {"maxnreg": 128}, {"maxnreg": 168}]
VARIANTS = [
    *(("weight_grad", *shape, 1024, TILES) for shape in ((16, 16), (32, 32), (16, 32))),
    *(("forward", *shape, B, FETCH) for shape in ((16, 16), (32, 32)) for B in (300, 1024)),
    *(("forward", 32, 32, B, [{"ANCHORED": 1}]) for B in (132, 528, 2112)),
    ("forward", 32, 32, 2048, REGISTERS),
    *((kernel, 32, 64, 64, WARPS) for kernel in ("forward", "backward")),
    *((kernel, 64, 64, 64, WARPS[2:]) for kernel in ("forward", "backward")),
    ("weight_grad", 64, 64, 64, [{"SLICES": 1}, {"SLICES": 2}]),
]


class Shared:
    """A case's tensors, made once for all that is timed of it, and our launches."""

    def __init__(self, case: Case, device: torch.device):
        self.case, self.device, self.made = case, device, None

    def ready(self) -> tuple:
        if self.made is None:
            own = self.case.problem(self.device)
            h = own.forward()
            dh = torch.randn_like(h)
            self.made = own, h, dh, own.backward(h, dh)
        return self.made

    def launch(self, kernel: str, **tuning) -> Callable:
        own, h, dh, dx = self.ready()
        return {
            "forward": lambda: own.forward(**tuning),
            "backward": lambda: own.backward(h, dh, **tuning),
            "weight_grad": lambda: own.weight_grad(dx, h, **tuning),
        }[kernel]


def ours(shared: Shared) -> list[Candidate]:
    """The three kernels; checked once."""
    values = {}

    def prepare(kernel):
        launch = shared.launch(kernel)
        if not values:
            values["errors"] = checked(shared.made[0].part(CHECKED))
        return launch, None

    return [Candidate("kru", partial(prepare, k), False, (k,), values) for k in KERNELS]


def finite(forward: Callable) -> Callable:
    if not forward().isfinite().all():
        raise AssertionError("its result is not finite")
    return forward


def torch_rnn(case: Case, device, kind: str) -> Candidate:
    """torch.nn.LSTM or GRU of as many units."""

    def prepare():
        dtype = DTYPES[case.dtype]
        torch.manual_seed(0)
        layer = getattr(nn, kind)(16, case.units).to(device=device, dtype=dtype)
        x = torch.randn(case.T, case.B, 16, device=device, dtype=dtype, requires_grad=True)
        dy = torch.randn(case.T, case.B, case.units, device=device, dtype=dtype)
        leaves = [x, *layer.parameters()]
        return finite(lambda: layer(x)[0]), lambda y: torch.autograd.grad(y, leaves, dy)

    values = {"tf32": torch.backends.cudnn.allow_tf32} if case.dtype == "fp32" else {}
    return Candidate(f"nn.{kind}", prepare, directions=("forward", "backward"), values=values)


LOOPS = {  # the definition as a loop of launches under autograd, and the torch backend
    "loop": kru_scan_reference,
    "torch backend": lambda *arguments: kru_scan(*arguments, backend="torch"),
}


def loop(case: Case, device, name: str) -> Candidate:
    def prepare():
        x, a, b, beta = case.problem(device).scan[:4]
        leaves = [w.requires_grad_() for w in (x.transpose(0, 1), a, b, beta)]
        dh = torch.randn_like(leaves[0])

        def forward():
            return LOOPS[name](leaves[0], leaves[1:3], leaves[3])[0]

        return finite(forward), lambda h: torch.autograd.grad(h, leaves, dh)

    return Candidate(name, prepare, directions=("forward", "backward"))


def flashrnn(case: Case, device, backend: str) -> Candidate:
    """FlashRNN's LSTM, pre-activations given."""

    def prepare():
        try:
            from flashrnn import flashrnn
        except ModuleNotFoundError as error:
            raise Unavailable(f"flashrnn is not installed: {error}") from None
        dtype, size = DTYPES[case.dtype], case.units // case.heads
        gates = (case.B, case.T, 4, case.heads, size)
        wx = torch.randn(gates, device=device, dtype=dtype)
        r = torch.randn(4, case.heads, size, size, device=device, dtype=dtype) / math.sqrt(size)
        bias = torch.zeros(4, case.heads, size, device=device, dtype=dtype)
        leaves = [w.requires_grad_() for w in (wx, r, bias)]
        dy = torch.randn(case.B, case.T, case.heads, size, device=device, dtype=dtype)
        how = {"function": "lstm", "backend": backend, "dtype": str(dtype).removeprefix("torch.")}

        def forward():
            return flashrnn(*leaves, **how)[0][0]

        return finite(forward), lambda y: torch.autograd.grad(y, leaves, dy)

    values = {"version": harness.version("flashrnn")}
    return Candidate(f"flashrnn {backend}", prepare, True, ("forward", "backward"), values)


def settings(shared: Shared, kernel: str, tried: list[dict]) -> list[Candidate]:
    """A kernel with each of the settings, the default first."""

    def prepare(setting):
        def flat(result):
            return torch.cat([g.flatten() for g in result]) if kernel == "weight_grad" else result

        expected, launch = flat(shared.launch(kernel)()), shared.launch(kernel, **setting)
        # no copies in double precision: the largest ones would not fit
        norm = partial(torch.linalg.vector_norm, dtype=torch.float32)
        error = (norm(flat(launch()) - expected) / norm(expected)).item()
        if not error < 1e-2:
            raise AssertionError(f"differs from the default by {error:.1e}")
        return launch, None

    found = []
    for setting in [{}, *tried]:
        name = "kru" + "".join(f" {k}={v}" for k, v in setting.items())
        # one that does not compile, or not to the same result, is an answer too
        about = bool(setting), (kernel,), {"setting": setting}
        found.append(Candidate(name, partial(prepare, setting), *about))
    return found


def race(results, case: Case, found: list[Candidate], device, rounds: int, about="") -> None:
    on = results.provenance["device"]
    known = model.device_of(on, harness.read_rows(results.path))

    def describe(candidate, direction, times):
        seconds = times["ms_p50"] / 1e3
        values = {name: getattr(case, name) for name in Case.__dataclass_fields__}
        values |= {"units": case.units, "us_per_step": 1e6 * seconds / case.T}
        line = f"{values['us_per_step']:8.3f} us/step"
        if candidate.name.startswith("kru"):
            numbers = model.NUMBERS[direction] * case.units * case.B * case.T
            values["gb_per_s"] = numbers * DTYPES[case.dtype].itemsize / seconds / 1e9
            line += f"  {values['gb_per_s']:7.1f} GB/s"
        if candidate.name == "kru" and known and case.dtype in model.ITEMSIZE:
            shape = (case.P, case.Q, case.dtype, case.B, case.T, case.heads)
            expected = model.predict(direction, *shape, known)
            values |= {"predicted_ms": 1e3 * expected.seconds, "bound": expected.bound}
            line += f"  predicted {values['predicted_ms']:.3f} ms, by {expected.bound}"
        return line, values

    rounds = 1 if results.quick else rounds
    harness.race(results, BENCH, about + case.name, found, device, describe, rounds)


def run(results: harness.Results, device: torch.device) -> None:
    for case in cases(results.quick):
        results.title(case.name)
        kinds = () if case.dtype == "bf16x2" else ("LSTM", "GRU")
        rnns = [torch_rnn(case, device, kind) for kind in kinds]
        race(results, case, ours(Shared(case, device)) + rnns, device, rounds=10)
        harness.free_memory(device)
    for case in cases(results.quick):
        looped = case.B in LOOPED and case.dtype == "fp32" and case.P == case.Q
        if results.quick or (looped and case.heads == 1):
            race(results, case, [loop(case, device, name) for name in LOOPS], device, rounds=2)
    results.title("launch constants, against the default")
    for kernel, P, Q, B, tried in VARIANTS:
        case = Case(B, 512, P, Q)
        if results.quick:
            case, tried = replace(QUICK, P=P // 4, Q=Q // 4), tried[:1]
        shared = Shared(case, device)
        found = settings(shared, kernel, tried)
        race(results, case, found, device, rounds=10, about=f"{kernel} ")
        harness.free_memory(device)
        if results.quick:
            break
    case = replace(cases(results.quick)[0], B=16 if not results.quick else 3)
    last = [flashrnn(case, device, name) for name in ("triton_fused", "cuda_fused")]
    race(results, case, last, device, rounds=10)  # compiles for minutes
