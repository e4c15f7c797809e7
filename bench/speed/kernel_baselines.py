"""What the kernels are measured against: torch.nn, the definition as a loop, other libraries.

One that is not installed, or fails, is a row with its reason.
"""

import importlib
import math
from dataclasses import replace

import torch
import torch.nn.functional as nnf
from torch import nn

from bench import harness
from bench.harness import Candidate, Unavailable
from bench.speed.kernel_cases import DTYPES, Case, eager, graphs, scan_problem
from kru_triton.kronecker import group_factors
from kru_triton.reference import kru_scan_reference

LOOP_STEPS = 1024  # loops that launch every step from Python are not run for longer


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
        graphs(name, problem, values, baseline=True) if graph and device.type == "cuda" else []
    )


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
            found += graphs(name, made, values, baseline=True)
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
    """A baseline's module, with its version in the reason if it does not import."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise Unavailable(f"{package} is not installed: {error}") from None


def flashrnn(case: Case, device) -> list[Candidate]:
    """FlashRNN's LSTM, pre-activations given: every backend it has."""

    def problem(backend):
        module = load("flashrnn", "flashrnn")
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
            return module.flashrnn(wx, r, bias, function="lstm", backend=backend, dtype=name)[0][0]

        return forward, [wx, r, bias], dy

    return [
        eager(
            f"flashrnn {backend}",
            lambda backend=backend: problem(backend),
            {"kind": "LSTM", "hidden": case.units // case.heads, "heads_of_baseline": case.heads,
             "checked": "finite", "version": harness.version("flashrnn")},
        )
        for backend in ("cuda_fused", "cuda", "triton_fused")
    ]  # fmt: skip


def xma(case: Case, device) -> list[Candidate]:
    """XMA's Triton RNN and GRU, projections given."""

    def problem(kind):
        module = load("xma.functional", "XMA")
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
        function = getattr(module, kind)
        return lambda: function(*made, kernel_backend=backend)[0], made, dy

    return [
        eager(
            f"xma {kind}",
            lambda kind=kind: problem(kind),
            {"kind": kind.upper(), "hidden": case.units // case.heads, "checked": "finite",
             "heads_of_baseline": case.heads,
             "version": harness.version("accelerated-model-architectures")},
        )
        for kind in ("rnn", "gru")
    ]  # fmt: skip


def torchrl(case: Case, device) -> list[Candidate]:
    """TorchRL's Triton LSTM and GRU, with a projection of few inputs (scan) or of D."""
    inputs = case.D or 16

    def problem(kind):
        module = load("torchrl.modules.tensordict_module._rnn_triton", "torchrl")
        gates = 4 if kind == "lstm" else 3
        n, dtype = case.units, DTYPES[case.dtype]
        x = torch.randn(case.B, case.T, inputs, device=device, requires_grad=True)
        w_ih, w_hh = (torch.randn(gates * n, k, device=device) / math.sqrt(k) for k in (inputs, n))
        biases = [torch.zeros(gates * n, device=device) for _ in range(2)]
        weights = [w.requires_grad_() for w in (w_ih, w_hh, *biases)]
        start = [torch.zeros(case.B, case.T, n, device=device) for _ in range(gates - 2)]
        init = torch.zeros(case.B, case.T, dtype=torch.bool, device=device)
        function = module.lstm_triton if kind == "lstm" else module.gru_triton
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
        module = load("pararnn", "pararnn-torch")
        inputs, dtype = case.D or 16, DTYPES[case.dtype]
        torch.manual_seed(0)
        layer = module.ParaRNN(getattr(module, cell)(inputs, case.units)).to(device, dtype).train()
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
        module = load("fla.ops.hgrn", "flash-linear-attention")
        x = tensor(case.B, case.T, case.units)
        g = nnf.logsigmoid(tensor(case.B, case.T, case.units)).detach().requires_grad_()
        function = getattr(module, kind)
        return lambda: function(x, g)[0], [x, g], torch.randn_like(x)

    def gla():
        module = load("fla.ops.gla", "flash-linear-attention")
        heads = max(1, case.units // 64)
        size = case.units // heads
        q, k, v = (tensor(case.B, case.T, heads, size) for _ in range(3))
        g = nnf.logsigmoid(tensor(case.B, case.T, heads, size)).detach().requires_grad_()
        return lambda: module.chunk_gla(q, k, v, g)[0], [q, k, v, g], torch.randn_like(v)

    def mamba():
        module = load("mamba_ssm.ops.selective_scan_interface", "mamba-ssm")
        u, delta = (tensor(case.B, case.units, case.T) for _ in range(2))
        a = -torch.rand(case.units, 16, device=device)
        b, c = (tensor(case.B, 16, case.T) for _ in range(2))
        leaves = [u, delta, a.requires_grad_(), b, c]
        dy = torch.randn_like(u)
        return lambda: module.selective_scan_fn(*leaves, delta_softplus=True), leaves, dy

    def mamba2():
        module = load("mamba_ssm.ops.triton.ssd_combined", "mamba-ssm")
        heads = max(1, case.units // 64)
        x, dt = tensor(case.B, case.T, heads, case.units // heads), tensor(case.B, case.T, heads)
        a = -torch.rand(heads, device=device)
        b, c = (tensor(case.B, case.T, 1, 64) for _ in range(2))
        leaves = [x, dt, a.requires_grad_(), b, c]

        def forward():
            return module.mamba_chunk_scan_combined(*leaves, chunk_size=256, dt_softplus=True)

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
            one = graphs(f"nn.{kind}Cell", lambda kind=kind: problem(kind), values, baseline=True)
            found += one[:1]
    return found
