"""The cases of `python -m bench kernels`, the work that each needs, and what its candidates share.

B batch, T time, D input features, N = P·Q complex units per head.
"""

import functools
from dataclasses import dataclass, replace

import torch

from bench import harness
from bench.harness import Candidate
from kru_triton import unitary_

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
RECOMPUTE = 64  # steps


@dataclass(frozen=True)
class Case:
    op: str  # scan, tokens, layer, lstm, step
    B: int
    T: int
    P: int
    Q: int
    heads: int = 1
    dtype: str = "bf16"  # of activations
    precision: str = "auto"  # of products
    nonlinearity: str = "modrelu"
    D: int = 0  # input features of layer, lstm and step; tokens: rows of the table
    baselines: str = "few"  # "all", "few" (torch.nn.LSTM alone) or "none"

    @property
    def units(self) -> int:
        return self.heads * self.P * self.Q

    @property
    def parts(self) -> int:
        return 1 if self.op == "lstm" else 2

    @property
    def name(self) -> str:
        words = [self.op, f"B{self.B}", f"T{self.T}", f"{self.P}x{self.Q}"]
        words += [f"h{self.heads}"] if self.heads > 1 else []
        words += [f"D{self.D}"] if self.D else []
        words += [self.dtype]
        words += [f"products-{self.precision}"] if self.precision != "auto" else []
        words += [self.nonlinearity] if self.nonlinearity != "modrelu" else []
        return "-".join(words)


def cases() -> list[Case]:
    """All cases, the most telling first."""
    scan = Case("scan", 256, 1024, 32, 32)
    batches = (256, 16, 2048, 64, 1024, 128, 512)
    found = [replace(scan, B=B, baselines="all") for B in batches]
    found += [replace(scan, B=B, P=16, Q=16, heads=4, baselines="all") for B in batches]
    layer = Case("layer", 256, 1024, 32, 32, D=1024, baselines="all")
    found += [layer, replace(layer, B=64), replace(layer, P=16, Q=16, heads=4)]
    lstm = replace(layer, op="lstm")
    found += [lstm, replace(lstm, P=16, Q=16, heads=4), replace(lstm, B=64)]
    step = Case("step", 1, 1, 32, 32, D=1024, baselines="all")
    found += [replace(step, B=B) for B in (1, 64, 1024, 16384)]
    tokens = replace(scan, op="tokens", D=257, baselines="none")
    found += [tokens, replace(tokens, B=2048)]
    # growth and choices, one thing at a time
    found += [replace(scan, B=64, T=T) for T in (256, 4096, 16384)]
    sizes = ((8, 8), (8, 16), (16, 16), (16, 32), (32, 64), (64, 64))
    found += [replace(scan, P=P, Q=Q) for P, Q in sizes]
    found += [replace(scan, P=P, Q=Q, heads=h) for P, Q, h in ((16, 32, 2), (8, 16, 8), (8, 8, 16))]
    found += [replace(scan, P=P, Q=Q, baselines="none") for P, Q in ((16, 64), (64, 16), (8, 128))]
    found += [replace(scan, B=64, P=P, Q=Q, baselines="none") for P, Q in ((256, 16), (2, 512))]
    fp32 = replace(scan, dtype="fp32")
    found += [fp32, replace(fp32, P=16, Q=16), replace(fp32, precision="bf16", baselines="none")]
    others = ("modtanh", "tanh", "relu", "identity")
    found += [replace(scan, nonlinearity=n, baselines="none") for n in others]
    return found


def quick_cases(device: torch.device) -> list[Case]:
    tiny = Case("scan", 3, 8, 4, 4, dtype="fp32", baselines="all")
    found = [
        tiny,
        replace(tiny, op="tokens", D=5, baselines="none"),
        replace(tiny, op="layer", T=RECOMPUTE + 2, D=8),
        replace(tiny, op="lstm", T=RECOMPUTE + 2, D=8),
        replace(tiny, op="step", T=1, D=8),
    ]
    return found if device.type == "cpu" else [*found, *(replace(c, dtype="bf16") for c in found)]


def work(case: Case, kind: str, direction: str, hidden: int = 0) -> tuple[float, float, str]:
    """(bytes, FLOPs, formula in words) of one call.

    Args:
        kind: "kru", or the torch.nn name "LSTM", "GRU", "RNN" of `hidden` units.
    """
    B, T, io = case.B, case.T, 2 if case.dtype == "bf16" else 4
    steps = B * T
    passes = {"forward": (1, 1), "backward": (2, 2), "both": (3, 3)}[direction]
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}.get(kind, 4 if case.op == "lstm" else 1)
    features = case.parts * case.units if kind == "kru" else hidden
    inputs = case.D or gates * features
    given = 8 * passes[0] * steps if case.op == "tokens" else 0  # the tokens alone
    if case.op == "tokens":
        inputs = 0
    if kind == "kru":
        recurrent = (8 if case.parts == 2 else 2 * gates) * case.units * (case.P + case.Q)
    else:
        recurrent = 2 * gates * hidden * hidden
    projection = 2 * inputs * gates * features if case.D else 0
    moved = given + io * steps * (passes[0] * inputs + passes[1] * features)
    flops = steps * (recurrent + projection) * {"forward": 1, "backward": 2, "both": 3}[direction]
    formula = (
        f"max({io} B T ({passes[0]} inputs + {passes[1]} states) / copy, "
        f"{flops / steps:.0f} B T FLOP / product), inputs {inputs}, states {features}"
    )
    return moved, flops, formula


@functools.lru_cache(maxsize=2)  # the candidates of a case share their inputs
def scan_problem(case: Case, device):
    """x_proj or the table, factors, beta, the cotangent of h, tokens or None."""
    torch.manual_seed(0)
    shape, dtype = (case.B, case.T, 2 * case.units), DTYPES[case.dtype]
    tokens = None
    if case.op == "tokens":
        tokens = torch.randint(case.D, shape[:2], device=device)
    x = torch.randn(shape if tokens is None else (case.D, shape[2]), device=device, dtype=dtype)
    factors = [
        unitary_(torch.empty(2, case.heads, side, side, device=device)).requires_grad_()
        for side in (case.P, case.Q)
    ]
    beta = None
    if case.nonlinearity == "modrelu":
        beta = (0.02 * torch.randn(case.units, device=device)).requires_grad_()
    dh = torch.randn(shape, device=device, dtype=dtype)
    return x.requires_grad_(), factors, beta, dh, tokens


def eager(name: str, problem, values: dict) -> Candidate:
    def prepare():
        forward, leaves, dy = problem()
        y = forward()
        if y.shape != dy.shape or not torch.isfinite(y).all():
            raise AssertionError(f"a result of shape {tuple(y.shape)}, not finite or unexpected")
        return forward, lambda y: torch.autograd.grad(y, leaves, dy)

    return Candidate(name, prepare, values=values)


def graphs(name: str, problem, values: dict, baseline: bool) -> list[Candidate]:
    """A CUDA graph of the forward part without gradients, and one of both parts.

    Args:
        problem: () -> (forward, leaves, cotangent).
    """

    def prepare_forward():
        forward, _, _ = problem()
        with torch.no_grad():
            return harness.captured(lambda: (forward(),)), None

    def prepare_both():
        forward, leaves, dh = problem()
        return harness.captured(lambda: torch.autograd.grad(forward(), leaves, dh)), None

    return [
        Candidate(f"{name} graph", prepare_forward, baseline, ("forward",), values),
        Candidate(f"{name} graph", prepare_both, baseline, ("both",), values),
    ]
