"""Recurrent kernels and layers against others, on the same device, in turn.

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
Baselines must return finite numbers of the right shape; one that is not there, or fails, is a row
with its reason. A row holds the 20th, 50th and 80th percentile of a call (GPU: between events, L2
flushed before), the rates that follow, and the floor: the bytes that any implementation must move
over the measured speed of a copy, or its FLOPs over the measured speed of a matrix product,
whichever is longer. `predicted_ms` is what bench/static/model.py says.

B batch, T time, D input features, N = P·Q complex units per head.
"""

import itertools
import math

import torch
import torch.nn.functional as nnf

from bench import harness
from bench.harness import Candidate
from bench.speed.kernel_baselines import (
    equal_parameters,
    flashrnn,
    layer_parameters,
    linear_recurrences,
    loops,
    pararnn,
    torch_cells,
    torch_rnn,
    torchrl,
    xma,
)
from bench.speed.kernel_cases import (
    DTYPES,
    RECOMPUTE,
    Case,
    cases,
    graphs,
    quick_cases,
    scan_problem,
    work,
)
from bench.static import model
from kru_triton import KRU, KRULSTM, KRUCell, kru_embedding_scan, kru_scan
from kru_triton.kernels import why_not
from kru_triton.kronecker import group_factors

BENCH = "kernels"
LOOP_BATCHES = (3, 16, 256)  # of those in `cases` and `quick_cases`
CHECKED_ROWS = 3


# Ours


def our_name(kind: str, backend: str) -> str:
    interpreted = backend == "triton" and why_not.interpreted()
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
    found = [Candidate(name, prepare, baseline=False, values=values)]
    if device.type == "cuda" and backend == "triton":
        found += graphs(name, for_graph, {"kind": "kru", "checked": "finite"}, baseline=False)
    if case.op == "tokens" and not gathered:
        found += ours_scan(case, device, backend, gathered=True)
    return found


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
    found = [Candidate(name, prepare, baseline=False, values=values)]
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

        found += graphs(f"kru {backend}", for_graph, {"kind": "kru"}, baseline=False)[:1]
    return found


def candidates(case: Case, device: torch.device) -> list[Candidate]:
    """Ours first, then what the case asks for."""
    interpreted = device.type == "cpu" and why_not.interpreted()
    backends = ["torch"] if device.type == "cpu" and not interpreted else ["triton", "torch"]
    ours = {
        "scan": ours_scan,
        "tokens": ours_scan,
        "layer": ours_layer,
        "lstm": ours_layer,
        "step": ours_step,
    }[case.op]
    found = list(itertools.chain(*(ours(case, device, backend) for backend in backends)))
    if case.baselines == "none":
        return found
    if case.op == "step":
        return found + torch_cells(case, device)
    found += torch_rnn(case, device, "LSTM", case.units, f"nn.LSTM({case.units})")
    if case.baselines == "few":
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
    """What `model.py` says of our kernels, and a layer's projection at the measured ceilings.

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
            flops *= candidate.values.get("heads_of_baseline", 1)
            moved *= candidate.values.get("heads_of_baseline", 1)
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
        on = results.provenance["device"]
        predicted = predicted_ms(case, candidate.name, direction, on, limit)
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
    def found(options, device):
        return {case.name: case for case in (quick_cases(device) if options.quick else cases())}

    def run(results, case, options, device):
        run_case(results, case, device, harness.ceilings(results, device))

    return harness.cases_main(__doc__, BENCH, argv, found, run)
