"""Recurrent kernels and layers against their rivals, on the same device, in turn.

    python -m bench kernels                        # everything there is time for, on the first GPU
    python -m bench kernels --case scan-B256       # cases of which the name begins so
    python -m bench kernels --device cpu --quick   # the same code on toy sizes

Operations:
    scan    kru_scan, its input projection given
    tokens  kru_embedding_scan, its input a row of a table of D, against gathering the rows before
    layer   KRU(D, N) with its projection, against torch.nn at equal units and at equal parameters,
            and with every 64th state kept (`recompute`)
    lstm    KRULSTM(D, N), likewise
    step    one step of decoding, KRUCell(D, N) against torch.nn's cells

Before it is timed, our result of the exact case is checked against the torch backend in float64
(itself tested against the definition): all steps of three batch rows, the gradients of the input
and of all parameters with a cotangent on those rows alone, factors rounded as the kernels do.
Rivals must return finite numbers of the right shape; one that is not there, or fails, is a row with
its reason. A row holds the 20th, 50th and 80th percentile of a call (GPU: between events, L2
flushed before), the rates that follow, and the floor: the bytes that any implementation must move
over the measured speed of a copy, or its FLOPs over the measured speed of a matrix product,
whichever is longer. `predicted_ms` is what bench/model.py says.

B batch, T time, D input features, N = P·Q complex units per head.
"""

import functools
import importlib
import itertools
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as nnf
from torch import nn

from bench import harness, model
from bench.harness import Candidate, Unavailable
from kru_triton import KRU, KRULSTM, KRUCell, kru_embedding_scan, kru_scan, unitary_
from kru_triton.kernels import support
from kru_triton.kronecker import group_factors
from kru_triton.reference import kru_scan_reference

BENCH = "kernels"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LOOP_STEPS = 1024  # rivals that launch every step from Python are not run for longer
LOOP_BATCHES = (3, 16, 256)  # of those in `cases` and `quick_cases`
CHECKED_ROWS = 3
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
    rivals: str = "few"  # "all", "few" (torch.nn.LSTM alone) or "none"

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
    found = [replace(scan, B=B, rivals="all") for B in batches]
    found += [replace(scan, B=B, P=16, Q=16, heads=4, rivals="all") for B in batches]
    layer = Case("layer", 256, 1024, 32, 32, D=1024, rivals="all")
    found += [layer, replace(layer, B=64), replace(layer, P=16, Q=16, heads=4)]
    lstm = replace(layer, op="lstm")
    found += [lstm, replace(lstm, P=16, Q=16, heads=4), replace(lstm, B=64)]
    step = Case("step", 1, 1, 32, 32, D=1024, rivals="all")
    found += [replace(step, B=B) for B in (1, 64, 1024, 16384)]
    tokens = replace(scan, op="tokens", D=257, rivals="none")
    found += [tokens, replace(tokens, B=2048)]
    # growth and choices, one thing at a time
    found += [replace(scan, B=64, T=T) for T in (256, 4096, 16384)]
    sizes = ((8, 8), (8, 16), (16, 16), (16, 32), (32, 64), (64, 64))
    found += [replace(scan, P=P, Q=Q) for P, Q in sizes]
    found += [replace(scan, P=P, Q=Q, heads=h) for P, Q, h in ((16, 32, 2), (8, 16, 8), (8, 8, 16))]
    found += [replace(scan, P=P, Q=Q, rivals="none") for P, Q in ((16, 64), (64, 16), (8, 128))]
    found += [replace(scan, B=64, P=P, Q=Q, rivals="none") for P, Q in ((256, 16), (2, 512))]
    fp32 = replace(scan, dtype="fp32")
    found += [fp32, replace(fp32, P=16, Q=16), replace(fp32, precision="bf16", rivals="none")]
    others = ("modtanh", "tanh", "relu", "identity")
    found += [replace(scan, nonlinearity=n, rivals="none") for n in others]
    return found


def quick_cases(device: torch.device) -> list[Case]:
    tiny = Case("scan", 3, 8, 4, 4, dtype="fp32", rivals="all")
    found = [
        tiny,
        replace(tiny, op="tokens", D=5, rivals="none"),
        replace(tiny, op="layer", T=RECOMPUTE + 2, D=8),
        replace(tiny, op="lstm", T=RECOMPUTE + 2, D=8),
        replace(tiny, op="step", T=1, D=8),
    ]
    return found if device.type == "cpu" else [*found, *(replace(c, dtype="bf16") for c in found)]


# Work: bytes and FLOPs that any implementation needs


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


# Ours


def our_name(kind: str, backend: str) -> str:
    interpreted = backend == "triton" and support.interpreted()
    return f"{kind} {backend}" + (" (interpreted)" if interpreted else "")


def bf16_products(case: Case, backend: str) -> bool:
    """Whether factors and states are rounded to bfloat16 for the products."""
    own = case.precision == "bf16" or (case.precision == "auto" and case.dtype == "bf16")
    return own and backend == "triton"


def limits(case: Case, backend: str) -> tuple[float, float]:
    """Largest relative errors allowed of states and of gradients.

    Rounding the state is a random walk over the steps: 5e-3 (bfloat16) or 6e-7 (float32, and split
    products of 2e-5) each. modReLU's adjoint divides by |z| and flips at its kink: gradients of
    single units are an order worse.
    """
    exact = case.dtype == "fp32" and not bf16_products(case, backend)
    each = (2e-5 if backend == "triton" else 1e-6) if exact else 5e-3
    state = each * math.sqrt(case.T + 8)
    return state, (30 if exact else 6) * state


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-300)).item()


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


def checked_rows(case: Case) -> list[int]:
    return sorted({0, case.B // 2, case.B - 1})[:CHECKED_ROWS]


def on_rows(cotangent: torch.Tensor, rows: list[int], dim: int) -> torch.Tensor:
    """The cotangent, zero on all other rows of `dim`."""
    kept = torch.zeros_like(cotangent)
    index = torch.tensor(rows, device=cotangent.device)
    return kept.index_copy_(dim, index, cotangent.index_select(dim, index))


def check_errors(errors: dict, first: float, others: float) -> None:
    """Raise if an error is too large, or NaN: `first` is the limit of the first, the result's."""
    for number, (name, error) in enumerate(errors.items()):
        limit = others if number else first
        if not error <= limit:
            raise AssertionError(f"{name} is wrong: relative error {error:.2e}, limit {limit:.1e}")


def check_scan(case: Case, backend: str, scan, x, factors, beta, dh, tokens=None) -> dict:
    """Errors of h, dx and the parameters' gradients against float64; raises if one is too large."""
    rows = checked_rows(case)
    own = rows if tokens is None else slice(None)  # all rows read the table
    parameters = [*factors, *([] if beta is None else [beta])]
    h, _ = scan(x, factors, beta)
    grads = torch.autograd.grad(h, (x, *parameters), on_rows(dh, rows, 0))
    actual = [h.detach()[rows], grads[0][own], *grads[1:]]
    with torch.no_grad():
        pair = [w.double() for w in group_factors(factors)]
        if bf16_products(case, backend):
            pair = [w.to(torch.bfloat16).double() for w in pair]
    pair = [w.requires_grad_() for w in pair]
    beta64 = None if beta is None else beta.detach().double().requires_grad_()
    x64 = x.detach()[own].double().requires_grad_()
    given = x64 if tokens is None else x64[tokens[rows]]
    h64, _ = kru_scan(given, pair, beta64, nonlinearity=case.nonlinearity, backend="torch")
    leaves = [x64, *pair, *([] if beta is None else [beta64])]
    expected = [h64.detach(), *torch.autograd.grad(h64, leaves, dh[rows].double())]
    names = ["h", "dx", "dA", "dB", "dbeta"]
    errors = {n: relative(a, e) for n, a, e in zip(names, actual, expected)}
    check_errors(errors, *limits(case, backend))
    return errors


def ours_scan(case: Case, device, backend: str, gathered: bool = False) -> list[Candidate]:
    """`gathered`: of tokens, the rows of the table as a tensor, and kru_scan."""
    options = {
        "nonlinearity": case.nonlinearity,
        "backend": backend,
        "precision": case.precision,
    }
    values = {"checked": "float64", "kind": "kru"}

    def problem():
        x, factors, beta, dh, tokens = scan_problem(case, device)
        leaves = [x, *factors, *([] if beta is None else [beta])]

        def scan(x, factors, beta):
            if tokens is None:
                return kru_scan(x, factors, beta, **options)
            if gathered:
                return kru_scan(nnf.embedding(tokens, x), factors, beta, **options)
            return kru_embedding_scan(tokens, x, factors, beta, **options)

        return scan, (x, factors, beta), leaves, dh, tokens

    def prepare():
        scan, inputs, leaves, dh, tokens = problem()
        values["errors"] = check_scan(case, backend, scan, *inputs, dh, tokens)
        return lambda: scan(*inputs)[0], lambda h: torch.autograd.grad(h, leaves, dh)

    def for_graph():
        scan, inputs, leaves, dh, _ = problem()
        return lambda: scan(*inputs)[0], leaves, dh

    name = our_name("kru", backend) + (" gathered" if gathered else "")
    found = [Candidate(name, prepare, rival=False, values=values)]
    if device.type == "cuda" and backend == "triton":
        found += graphs(name, for_graph, {"kind": "kru", "checked": "finite"}, rival=False)
    if case.op == "tokens" and not gathered:
        found += ours_scan(case, device, backend, gathered=True)
    return found


def graphs(name: str, problem, values: dict, rival: bool) -> list[Candidate]:
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
        Candidate(f"{name} graph", prepare_forward, rival, ("forward",), values),
        Candidate(f"{name} graph", prepare_both, rival, ("both",), values),
    ]


def ours_layer(case: Case, device, backend: str, recompute: int = 0) -> list[Candidate]:
    """KRU or KRULSTM with its projection; then with `recompute`."""
    lstm = case.op == "lstm"
    values = {"kind": "kru", "checked": "float64"}

    def prepare():
        kind = KRULSTM if lstm else KRU
        options = {} if lstm else {"nonlinearity": case.nonlinearity}

        def make(chosen, dtype, precision):
            torch.manual_seed(0)
            layer = kind(
                case.D,
                case.units,
                factors=(case.P, case.Q),
                num_heads=case.heads,
                backend=chosen,
                precision=precision,
                recompute=recompute,
                **options,
            )
            return layer.to(device=device, dtype=dtype)

        layer = make(backend, torch.float32, case.precision)
        values["parameters"] = sum(p.numel() for p in layer.parameters())
        dtype = DTYPES[case.dtype]
        x = torch.randn(case.T, case.B, case.D, device=device, dtype=dtype).requires_grad_()
        leaves = [x, *layer.parameters()]

        def forward():
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                return layer(x)[0]

        y = forward()
        dy = torch.randn_like(y)
        rows = checked_rows(case)
        grads = torch.autograd.grad(y, leaves, on_rows(dy, rows, 1))
        exact = make("torch", torch.float64, "auto")
        with torch.no_grad():
            for parameter_name, p in exact.named_parameters():
                factor = parameter_name.startswith("factor")
                if bf16_products(case, backend) if factor else case.dtype == "bf16":
                    p.copy_(p.to(torch.bfloat16))
        x64 = x.detach()[:, rows].double().requires_grad_()
        y64 = exact(x64)[0]
        grads64 = torch.autograd.grad(y64, (x64, *exact.parameters()), dy[:, rows].double())
        names = ["dx", *(f"d {n}" for n, _ in layer.named_parameters())]
        actual = [grads[0][:, rows], *grads[1:]]
        values["errors"] = {"output": relative(y.detach()[:, rows], y64.detach())} | {
            n: relative(a, e) for n, a, e in zip(names, actual, grads64)
        }
        # the projection is rounded as well
        check_errors(values["errors"], *(2 * limit for limit in limits(case, backend)))
        return forward, lambda y: torch.autograd.grad(y, leaves, dy)

    name = our_name("krulstm" if lstm else "kru", backend)
    name += f" recompute={recompute}" if recompute else ""
    found = [Candidate(name, prepare, rival=False, values=values)]
    if not recompute and case.T > RECOMPUTE:
        found += ours_layer(case, device, backend, RECOMPUTE)
    return found


def ours_step(case: Case, device, backend: str) -> list[Candidate]:
    values = {"kind": "kru", "checked": "float64"}

    def problem():
        torch.manual_seed(0)
        cell = KRUCell(
            case.D,
            case.units,
            factors=(case.P, case.Q),
            num_heads=case.heads,
            backend=backend,
            precision=case.precision,
        ).to(device)
        x = torch.randn(case.B, case.D, device=device)
        h = torch.randn(case.B, cell.output_size, device=device)

        def step():
            with (
                torch.no_grad(),
                torch.autocast(device.type, torch.bfloat16, enabled=case.dtype == "bf16"),
            ):
                return cell(x, h)

        return cell, x, h, step

    def prepare():
        cell, x, h, step = problem()
        y = step()
        exact = KRUCell(
            case.D, case.units, factors=(case.P, case.Q), num_heads=case.heads, backend="torch"
        ).to(device, torch.float64)
        exact.load_state_dict(cell.state_dict())
        with torch.no_grad():
            error = relative(y, exact(x.double(), h.double()))
        values["errors"] = {"h": error}
        check_errors(values["errors"], *limits(case, backend))
        return step, None

    found = [Candidate(our_name("kru", backend), prepare, False, ("forward",), values)]
    if device.type == "cuda":

        def for_graph():
            step = problem()[3]
            return step, None, None

        found += graphs(f"kru {backend}", for_graph, {"kind": "kru"}, rival=False)[:1]
    return found


# Rivals


def torch_rnn(
    case: Case, device, kind: str, hidden: int, name: str, dtype=None, graph: bool = True
) -> list[Candidate]:
    """torch.nn.LSTM, GRU or RNN (cuDNN on a GPU), its projection included."""
    inputs = case.D or 16  # for scan: a projection that costs next to nothing
    dtype = dtype or DTYPES[case.dtype]
    values = {"kind": kind, "hidden": hidden, "inputs": inputs, "checked": "finite"}
    if dtype == torch.float32 and device.type == "cuda":
        values["tf32"] = torch.backends.cudnn.allow_tf32

    def problem():
        torch.manual_seed(0)
        layer = getattr(nn, kind)(inputs, hidden).to(device=device, dtype=dtype)
        values["parameters"] = sum(p.numel() for p in layer.parameters())
        x = torch.randn(case.T, case.B, inputs, device=device, dtype=dtype, requires_grad=True)
        dy = torch.randn(case.T, case.B, hidden, device=device, dtype=dtype)
        return lambda: layer(x)[0], [x, *layer.parameters()], dy

    return [eager(name, problem, values)] + (
        graphs(name, problem, values, rival=True) if graph and device.type == "cuda" else []
    )


def eager(name: str, problem, values: dict) -> Candidate:
    def prepare():
        forward, leaves, dy = problem()
        y = forward()
        if y.shape != dy.shape or not torch.isfinite(y).all():
            raise AssertionError(f"a result of shape {tuple(y.shape)}, not finite or unexpected")
        return forward, lambda y: torch.autograd.grad(y, leaves, dy)

    return Candidate(name, prepare, values=values)


def equal_parameters(kind: str, inputs: int, count: int) -> int:
    """Hidden units, a multiple of 8, of a torch.nn layer of about `count` parameters."""
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind]
    # gates · n · (inputs + n + 2) = count
    b = inputs + 2
    n = (-b + math.sqrt(b * b + 4 * count / gates)) / 2
    return max(8, 8 * round(n / 8)) if n > 12 else max(1, round(n))


def layer_parameters(case: Case) -> int:
    gates = 4 if case.op == "lstm" else 1
    features = gates * case.parts * case.units
    factors = gates * case.parts * case.heads * (case.P**2 + case.Q**2)
    return features * (case.D + 1) + factors + (case.units if case.op != "lstm" else 0)


def loops(case: Case, device) -> list[Candidate]:
    """The definition as a loop under autograd: eager, its step compiled, in a CUDA graph.

    In float32: complex numbers have no bfloat16.
    """

    def problem():
        if case.T > LOOP_STEPS:
            raise Unavailable(f"T={case.T}: loops of launches are run to T={LOOP_STEPS}")
        x, factors, beta, dh, _ = scan_problem(replace(case, dtype="fp32"), device)
        leaves = [x, *factors, *([] if beta is None else [beta])]

        def forward():
            return kru_scan_reference(x, factors, beta, nonlinearity=case.nonlinearity)[0]

        return forward, leaves, dh

    def compiled():
        if case.nonlinearity != "modrelu":
            raise Unavailable("the compiled step is written for modReLU")
        _, leaves, dh = problem()
        x, *factors, beta = leaves
        a, b = group_factors([w.detach() for w in factors])
        leaves = [x, a.requires_grad_(), b.requires_grad_(), beta]
        step = torch.compile(planar_step, dynamic=False)

        def forward():
            h = x.new_zeros(case.B, 2, case.heads, case.P, case.Q)
            states = []
            inputs = x.view(case.B, case.T, 2, case.heads, case.P, case.Q).unbind(1)
            scale = beta.view(case.heads, case.P, case.Q)
            for u in inputs:
                h = step(h, u, a, b, scale)
                states.append(h)
            return torch.stack(states, 1).flatten(2)

        expected = kru_scan_reference(x, [a, b], beta)[0]
        if not torch.allclose(forward(), expected, atol=1e-3, rtol=1e-3):
            raise AssertionError("the compiled loop differs from the definition")
        return forward, leaves, dh

    values = {"kind": "kru", "checked": "definition", "compute": "float32"}
    found = []
    for name, made in (("loop eager", problem), ("loop compiled step", compiled)):
        found.append(eager(name, made, values))
        if device.type == "cuda":
            found += graphs(name, made, values, rival=True)
    return found


def planar_step(h, u, a, b, beta):
    """One modReLU step on (B, 2, H, P, Q) without complex dtypes, which inductor does not fuse."""
    xr, xi = h[:, 0], h[:, 1]
    br, bi = b[0].mT, b[1].mT
    yr, yi = xr @ br - xi @ bi, xr @ bi + xi @ br
    zr = a[0] @ yr - a[1] @ yi + u[:, 0]
    zi = a[0] @ yi + a[1] @ yr + u[:, 1]
    m2 = zr * zr + zi * zi + 1e-30
    scale = torch.relu(1 + beta * torch.rsqrt(m2))
    return torch.stack((zr * scale, zi * scale), 1)


def load(module: str, package: str):
    """A rival's module, with its version in the reason if it does not import."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise Unavailable(f"{package} is not installed: {error}") from None


def flashrnn(case: Case, device) -> list[Candidate]:
    """FlashRNN's LSTM, pre-activations given: every backend it has."""

    def problem(backend):
        rival = load("flashrnn", "flashrnn")
        dtype = DTYPES[case.dtype]
        size = case.units // case.heads
        shape = (case.B, case.T, 4, case.heads, size)
        wx = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
        r = torch.randn(4, case.heads, size, size, device=device, dtype=dtype) / math.sqrt(size)
        bias = torch.zeros(4, case.heads, size, device=device, dtype=dtype, requires_grad=True)
        r.requires_grad_()
        name = {"bf16": "bfloat16", "fp32": "float32"}[case.dtype]
        dy = torch.randn(case.B, case.T, case.heads, size, device=device, dtype=dtype)

        def forward():
            return rival.flashrnn(wx, r, bias, function="lstm", backend=backend, dtype=name)[0][0]

        return forward, [wx, r, bias], dy

    return [
        eager(
            f"flashrnn {backend}",
            lambda backend=backend: problem(backend),
            {"kind": "LSTM", "hidden": case.units // case.heads, "heads_of_rival": case.heads,
             "checked": "finite", "version": harness.version("flashrnn")},
        )
        for backend in ("cuda_fused", "cuda", "triton_fused")
    ]  # fmt: skip


def xma(case: Case, device) -> list[Candidate]:
    """XMA's Triton RNN and GRU, projections given."""

    def problem(kind):
        rival = load("xma.functional", "XMA")
        backend = load("xma", "XMA").KernelBackend.triton
        dtype = DTYPES[case.dtype]
        size = case.units // case.heads
        gates = 3 if kind == "gru" else 1
        made = [
            tensor.requires_grad_()
            for _ in range(gates)
            for tensor in (
                torch.randn(case.B, case.T, case.heads, size, device=device, dtype=dtype),
                torch.randn(case.heads, size, size, device=device, dtype=dtype) / math.sqrt(size),
            )
        ]
        dy = torch.randn_like(made[0])
        function = getattr(rival, kind)
        return lambda: function(*made, kernel_backend=backend)[0], made, dy

    return [
        eager(
            f"xma {kind}",
            lambda kind=kind: problem(kind),
            {"kind": kind.upper(), "hidden": case.units // case.heads, "checked": "finite",
             "heads_of_rival": case.heads,
             "version": harness.version("accelerated-model-architectures")},
        )
        for kind in ("rnn", "gru")
    ]  # fmt: skip


def torchrl(case: Case, device) -> list[Candidate]:
    """TorchRL's Triton LSTM and GRU, with a projection of few inputs (scan) or of D."""
    inputs = case.D or 16

    def problem(kind):
        rival = load("torchrl.modules.tensordict_module._rnn_triton", "torchrl")
        gates = 4 if kind == "lstm" else 3
        n, dtype = case.units, DTYPES[case.dtype]
        x = torch.randn(case.B, case.T, inputs, device=device, requires_grad=True)
        w_ih, w_hh = (torch.randn(gates * n, k, device=device) / math.sqrt(k) for k in (inputs, n))
        biases = [torch.zeros(gates * n, device=device) for _ in range(2)]
        weights = [w.requires_grad_() for w in (w_ih, w_hh, *biases)]
        start = [torch.zeros(case.B, case.T, n, device=device) for _ in range(gates - 2)]
        init = torch.zeros(case.B, case.T, dtype=torch.bool, device=device)
        function = rival.lstm_triton if kind == "lstm" else rival.gru_triton
        states = start if kind == "lstm" else start[:1]
        dy = torch.randn(case.B, case.T, n, device=device)
        return lambda: function(x, *states, *weights, init, dtype)[0], [x, *weights], dy

    return [
        eager(
            f"torchrl {kind}",
            lambda kind=kind: problem(kind),
            {"kind": kind.upper(), "hidden": case.units, "inputs": inputs, "checked": "finite",
             "version": harness.version("torchrl")},
        )
        for kind in ("lstm", "gru")
    ]  # fmt: skip


def pararnn(case: Case, device) -> list[Candidate]:
    """pararnn-torch: recurrences with a diagonal or block-diagonal Jacobian, parallel in time."""

    def problem(cell):
        rival = load("pararnn", "pararnn-torch")
        inputs, dtype = case.D or 16, DTYPES[case.dtype]
        torch.manual_seed(0)
        layer = rival.ParaRNN(getattr(rival, cell)(inputs, case.units)).to(device, dtype).train()
        x = torch.randn(case.B, case.T, inputs, device=device, dtype=dtype, requires_grad=True)
        dy = torch.randn(case.B, case.T, case.units, device=device, dtype=dtype)
        return lambda: layer(x), [x, *layer.parameters()], dy

    return [
        eager(
            f"pararnn {cell}",
            lambda cell=cell: problem(cell),
            {"kind": None, "checked": "finite", "version": harness.version("pararnn-torch"),
             "note": "diagonal recurrence: does less than a dense or a Kronecker one"},
        )
        for cell in ("ParaGRU", "ParaSLSTM")
    ]  # fmt: skip


def linear_recurrences(case: Case, device) -> list[Candidate]:
    """fla and Mamba: recurrences that are linear in the state, hence parallel in time."""
    dtype = DTYPES[case.dtype]

    def tensor(*shape):
        return torch.randn(*shape, device=device, dtype=dtype, requires_grad=True)

    def hgrn(kind):
        rival = load("fla.ops.hgrn", "flash-linear-attention")
        x = tensor(case.B, case.T, case.units)
        g = nnf.logsigmoid(tensor(case.B, case.T, case.units)).detach().requires_grad_()
        function = getattr(rival, kind)
        return lambda: function(x, g)[0], [x, g], torch.randn_like(x)

    def gla():
        rival = load("fla.ops.gla", "flash-linear-attention")
        heads = max(1, case.units // 64)
        size = case.units // heads
        q, k, v = (tensor(case.B, case.T, heads, size) for _ in range(3))
        g = nnf.logsigmoid(tensor(case.B, case.T, heads, size)).detach().requires_grad_()
        return lambda: rival.chunk_gla(q, k, v, g)[0], [q, k, v, g], torch.randn_like(v)

    def mamba():
        rival = load("mamba_ssm.ops.selective_scan_interface", "mamba-ssm")
        u, delta = (tensor(case.B, case.units, case.T) for _ in range(2))
        a = -torch.rand(case.units, 16, device=device)
        b, c = (tensor(case.B, 16, case.T) for _ in range(2))
        leaves = [u, delta, a.requires_grad_(), b, c]
        dy = torch.randn_like(u)
        return lambda: rival.selective_scan_fn(*leaves, delta_softplus=True), leaves, dy

    def mamba2():
        rival = load("mamba_ssm.ops.triton.ssd_combined", "mamba-ssm")
        heads = max(1, case.units // 64)
        x, dt = tensor(case.B, case.T, heads, case.units // heads), tensor(case.B, case.T, heads)
        a = -torch.rand(heads, device=device)
        b, c = (tensor(case.B, case.T, 1, 64) for _ in range(2))
        leaves = [x, dt, a.requires_grad_(), b, c]

        def forward():
            return rival.mamba_chunk_scan_combined(*leaves, chunk_size=256, dt_softplus=True)

        return forward, leaves, torch.randn_like(x)

    def values(package):
        return {
            "kind": None,
            "checked": "finite",
            "version": harness.version(package),
            "note": "linear in the state: another model",
        }

    return [
        eager("fla hgrn", lambda: hgrn("fused_recurrent_hgrn"), values("flash-linear-attention")),
        eager("fla hgrn chunk", lambda: hgrn("chunk_hgrn"), values("flash-linear-attention")),
        eager("fla gla", gla, values("flash-linear-attention")),
        eager("mamba", mamba, values("mamba-ssm")),
        eager("mamba2", mamba2, values("mamba-ssm")),
    ]


def torch_cells(case: Case, device) -> list[Candidate]:
    def problem(kind):
        torch.manual_seed(0)
        dtype = DTYPES[case.dtype]
        cell = getattr(nn, f"{kind}Cell")(case.D, case.units).to(device=device, dtype=dtype)
        x = torch.randn(case.B, case.D, device=device, dtype=dtype)
        h = torch.randn(case.B, case.units, device=device, dtype=dtype)
        state = (h, h) if kind == "LSTM" else h

        def step():
            with torch.no_grad():
                result = cell(x, state)
            return result[0] if kind == "LSTM" else result

        return step, None, None

    found = []
    for kind in ("LSTM", "GRU", "RNN"):
        values = {"kind": kind, "hidden": case.units, "checked": "finite"}

        def prepare(kind=kind):
            return problem(kind)[0], None

        found.append(Candidate(f"nn.{kind}Cell", prepare, directions=("forward",), values=values))
        if device.type == "cuda":
            one = graphs(f"nn.{kind}Cell", lambda kind=kind: problem(kind), values, rival=True)
            found += one[:1]
    return found


def candidates(case: Case, device: torch.device) -> list[Candidate]:
    """Ours first, then what the case asks for."""
    interpreted = device.type == "cpu" and support.interpreted()
    backends = ["torch"] if device.type == "cpu" and not interpreted else ["triton", "torch"]
    ours = {
        "scan": ours_scan,
        "tokens": ours_scan,
        "layer": ours_layer,
        "lstm": ours_layer,
        "step": ours_step,
    }[case.op]
    found = list(itertools.chain(*(ours(case, device, backend) for backend in backends)))
    if case.rivals == "none":
        return found
    if case.op == "step":
        return found + torch_cells(case, device)
    found += torch_rnn(case, device, "LSTM", case.units, f"nn.LSTM({case.units})")
    if case.rivals == "few":
        return found
    for kind in ("GRU", "RNN"):
        found += torch_rnn(case, device, kind, case.units, f"nn.{kind}({case.units})", graph=False)
    if case.op in ("layer", "lstm"):
        for kind in ("LSTM", "GRU", "RNN"):
            hidden = equal_parameters(kind, case.D, layer_parameters(case))
            name = f"nn.{kind} at equal parameters"
            found += torch_rnn(case, device, kind, hidden, name, graph=False)
        return found + torchrl(case, device) + pararnn(case, device)
    if case.B in LOOP_BATCHES:
        found += loops(case, device)
    found += xma(case, device) + torchrl(case, device) + linear_recurrences(case, device)
    return found + flashrnn(case, device)  # compiles for minutes: the last


# Rows


def predicted_ms(case: Case, name: str, direction: str, device: str, limit: dict) -> float | None:
    """What bench/model.py says of our kernels, and a layer's projection at the measured ceilings.

    None for what it does not know: other devices, cells, tokens, recomputation.
    """
    usual = (case.precision, case.nonlinearity) == ("auto", "modrelu")
    ours = name.removesuffix(" graph") in ("kru triton", "krulstm triton")
    if not (usual and ours and case.op in ("scan", "layer", "lstm")):
        return None
    kind = "lstm" if case.op == "lstm" else "kru"
    shape = (case.P, case.Q, case.dtype, case.B, case.T, case.heads)
    found = model.predicted_ms(direction, *shape, device, kind)
    if found is None or case.op == "scan":
        return found
    features = (4 if case.op == "lstm" else 2) * case.units
    products = {"forward": 1, "backward": 2, "both": 3}[direction]
    steps, io = case.B * case.T, 2 if case.dtype == "bf16" else 4
    flops = 2 * case.D * features * steps / limit["matmul_flops"]
    moved = io * (case.D + features) * steps / limit["copy_bytes_per_s"]
    return found + 1e3 * products * max(flops, moved)


def run_case(results: harness.Results, case: Case, device: torch.device, limit: dict) -> None:
    results.title(case.name)

    def describe(candidate, direction, times):
        seconds = times["ms_p50"] / 1e3
        values = {
            "op": case.op,
            "B": case.B,
            "T": case.T,
            "P": case.P,
            "Q": case.Q,
            "heads": case.heads,
            "units": case.units,
            "dtype": case.dtype,
            "precision": case.precision,
            "nonlinearity": case.nonlinearity,
            "D": case.D,
            "tokens_per_s": case.B * case.T / seconds,
            "us_per_step": 1e6 * seconds / case.T,
        }
        line = f"{values['us_per_step']:8.2f} us/step"
        kind = candidate.values.get("kind")
        if kind:
            hidden = candidate.values.get("hidden", 0)
            moved, flops, formula = work(case, kind, direction, hidden)
            flops *= candidate.values.get("heads_of_rival", 1)
            moved *= candidate.values.get("heads_of_rival", 1)
            floor = max(moved / limit["copy_bytes_per_s"], flops / limit["matmul_flops"])
            values |= {
                "bytes": moved,
                "flops": flops,
                "gb_per_s": moved / seconds / 1e9,
                "fraction_of_copy": moved / seconds / limit["copy_bytes_per_s"],
                "fraction_of_matmul": flops / seconds / limit["matmul_flops"],
                "floor_ms": 1e3 * floor,
                "floor_formula": formula,
            }
            line += f"  {100 * values['fraction_of_copy']:5.1f}% copy"
            line += f"  {100 * values['fraction_of_matmul']:5.1f}% product"
        predicted = predicted_ms(case, candidate.name, direction, results.facts["device"], limit)
        if predicted:
            values["predicted_ms"] = predicted
            line += f"  predicted {predicted:.3f}"
        return line, values

    harness.race(
        results,
        BENCH,
        case.name,
        candidates(case, device),
        device,
        describe,
        rounds=3 if results.quick else None,
    )
    scan_problem.cache_clear()


def main(argv: list[str] | None = None) -> int:
    parser = harness.parser(__doc__, prog="python -m bench kernels")
    options = parser.parse_args(argv)
    device = harness.device_for(options, parser)
    found = quick_cases(device) if options.quick else cases()
    names = harness.chosen([case.name for case in found], options.case, parser)
    if options.list:
        print(*names, sep="\n")
        return 0
    results = harness.Results(device, options, harness.command_line("kernels", argv))
    limit = harness.ceilings(results, device)
    for case in found:
        if case.name in names and not results.out_of_time(case.name):
            run_case(results, case, device, limit)
            harness.free_memory(device)
    return results.finish()


if __name__ == "__main__":
    raise SystemExit(main())
