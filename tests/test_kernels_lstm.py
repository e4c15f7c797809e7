"""The LSTM kernels against a float64 loop over dense Kronecker products, under autograd.

Without a GPU they run in Triton's interpreter (see conftest.py).
"""

from dataclasses import dataclass

import pytest
import rounding
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton")

# the interpreter computes exp(2x) of tanh in numpy, where infinity is reached with a warning
pytestmark = [pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")]
if DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)

from kru_triton.kernels import lstm, why_not  # noqa: E402 (after importorskip)
from kru_triton.ops.arguments import How, LSTMScan  # noqa: E402

# Relative L2 errors: products of bfloat16 pairs are exact to 2^-17. "bf16", against a definition
# that rounds what the kernel rounds: h is rounded once more at its store (2^-9), c not at all, and
# the hardware's tanh is good to 2^-11.
LIMITS = {"fp32": {"h": 1e-5, "c": 1e-5}, "bf16": {"h": 4e-3, "c": 2e-3}}
GRADIENT_LIMIT = {"fp32": 1e-4, "bf16": 6e-3}


@dataclass(frozen=True)
class Case:
    P: int
    Q: int
    B: int = 3
    T: int = 4
    H: int = 1
    precision: str = "fp32"
    states: bool = True  # h_0 and c_0
    reset: bool = False
    lengths: bool = False
    time_first: bool = False
    cotangents: tuple[str, ...] = ("dh", "dh_n", "dc_n")
    scale: float = 1.0

    def __str__(self):
        on = [k for k in ("states", "reset", "lengths", "time_first") if getattr(self, k)]
        shape = f"B{self.B}-T{self.T}-H{self.H}-{self.P}x{self.Q}-{self.precision}"
        return "-".join([shape, f"x{self.scale:g}", *on, "+".join(self.cotangents)])


CASES = [
    Case(16, 16),
    Case(16, 16, precision="bf16"),
    Case(16, 16, B=1, T=1),
    Case(16, 16, states=False, time_first=True),
    Case(16, 16, reset=True),
    Case(16, 16, lengths=True, H=2),
    Case(16, 16, T=3, scale=50.0),
    Case(8, 8, B=5, reset=True, lengths=True),
    Case(8, 16, B=5, T=3, lengths=True, precision="bf16"),
    Case(8, 8, B=5, states=False, lengths=True, cotangents=("dh",)),
    Case(8, 8, B=5, lengths=True, cotangents=("dc_n",)),
    Case(3, 11, B=5, T=3, reset=True),
    Case(32, 1, T=2),
    Case(16, 32, B=2, T=2),
    Case(32, 32, B=1, T=2),
    Case(16, 16, cotangents=("dh_n",)),
    Case(16, 16, cotangents=("dc_n",), states=False),
]


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """What the kernels do not write stays NaN."""
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        tensor = new_empty(self, *args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


def products(case, a, b, h):
    """(A ⊗ B) h of the four gates (4, B, H, N); for "bf16" with every operand rounded."""
    if case.precision == "bf16":
        x = h.unflatten(-1, (case.P, case.Q))
        return torch.stack([rounding.kron(*w, x, narrow=True).flatten(-2) for w in zip(a, b)])
    dense = [torch.stack([torch.kron(*w) for w in zip(*gate)]) for gate in zip(a, b)]
    return torch.einsum("khmn,bhn->kbhm", torch.stack(dense), h)


def definition(case, x_proj, a, b, h_0, c_0, reset, lengths):
    """h and c (T, B, H·N)."""
    u = x_proj.unflatten(-1, (4, case.H, -1))
    h = torch.zeros_like(u[:, 0, 0]) if h_0 is None else h_0.view(case.B, case.H, -1)
    c = torch.zeros_like(h) if c_0 is None else c_0.view(case.B, case.H, -1)
    states, cells = [], []
    for t in range(case.T):
        if reset is not None:
            h, c = (torch.where(reset[:, t, None, None], 0.0, v) for v in (h, c))
        i, f, g, o = products(case, a, b, h) + u[:, t].transpose(0, 1)
        alive = (t < lengths)[:, None, None]
        c = torch.where(alive, f.sigmoid() * c + i.sigmoid() * g.tanh(), 0.0)
        h = torch.where(alive, o.sigmoid() * c.tanh(), 0.0)
        states.append(h.flatten(1))
        cells.append(c.flatten(1))
    return torch.stack(states), torch.stack(cells)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_definition(case):
    random = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    F = case.H * case.P * case.Q

    def normal(*shape):
        return torch.randn(shape, generator=random)

    inputs = {
        "x_proj": (normal(case.B, case.T, 4 * F) * case.scale).to(dtype),
        "a": normal(4, case.H, case.P, case.P) / case.P**0.5,
        "b": normal(4, case.H, case.Q, case.Q) / case.Q**0.5,
        "h_0": normal(case.B, F) * 0.5 if case.states else None,
        "c_0": normal(case.B, F) if case.states else None,
    }
    reset = torch.rand(case.B, case.T, generator=random) < 0.3 if case.reset else None
    if case.reset:
        reset[0, 0] = reset[-1, -1] = True
    lengths = torch.full((case.B,), case.T)
    if case.lengths:
        lengths = torch.arange(case.B) * 2 % (case.T + 1)  # the first row has no step
    cotangents = {
        "dh": normal(case.T, case.B, F).to(dtype),
        "dh_n": normal(case.B, F),
        "dc_n": normal(case.B, F),
    }
    cotangents = {k: v if k in case.cotangents else None for k, v in cotangents.items()}

    leaves = {k: None if v is None else v.double().requires_grad_() for k, v in inputs.items()}
    h, c = definition(case, **leaves, reset=reset, lengths=lengths)
    ends = (lengths.clamp(min=1) - 1, torch.arange(case.B))
    alive = (torch.arange(case.T)[:, None] < lengths)[..., None]
    outputs = {"dh": h * alive}
    for name, last, first in (("dh_n", h[ends], leaves["h_0"]), ("dc_n", c[ends], leaves["c_0"])):
        start = torch.zeros_like(last) if first is None else first
        outputs[name] = torch.where((lengths == 0)[:, None], start, last)
    sum((outputs[k] * v.double()).sum() for k, v in cotangents.items() if v is not None).backward()
    want = {k: v.grad for k, v in leaves.items() if v is not None}
    want["x_proj"] = want["x_proj"].transpose(0, 1)

    def move(values):
        return {k: None if v is None else v.to(DEVICE) for k, v in values.items()}

    arguments = move({**inputs, "reset": reset, "lengths": lengths if case.lengths else None})
    x = arguments.pop("x_proj").transpose(0, 1)
    x = x.contiguous() if case.time_first else x
    arguments["reset"] = None if reset is None else arguments["reset"].t()
    given, how = LSTMScan(x, **arguments), How("tanh", precision=case.precision)
    assert why_not.why_not(*given, lstm=True, precision=case.precision) is None
    got_h, got_c, _, _ = lstm.forward(given, how)
    grads = lstm.backward(**move(cotangents), h=got_h, c=got_c, scan=given, how=how)
    dx, da, db, dh_0, dc_0 = grads
    got = {"x_proj": dx, "a": da, "b": db, "h_0": dh_0, "c_0": dc_0}

    def error(found, true):
        found, true = found.double().cpu(), true.detach()
        return ((found - true).norm() / true.norm().clamp_min(1e-30)).item()

    assert error(got_h, h) < LIMITS[case.precision]["h"]
    assert error(got_c, c) < LIMITS[case.precision]["c"]
    errors = {k: error(got[k], want[k]) for k in want}
    assert errors == {k: pytest.approx(0, abs=GRADIENT_LIMIT[case.precision]) for k in errors}


def test_empty():
    a, b = (torch.zeros(4, 1, 16, 16, device=DEVICE) for _ in range(2))
    for B, T in [(0, 2), (2, 0)]:
        given = LSTMScan(torch.zeros(T, B, 1024, device=DEVICE), a, b)
        how = How("tanh", precision="fp32")
        h, c, _, _ = lstm.forward(given, how)
        assert h.shape == c.shape == (T, B, 256)
        ones = torch.ones(B, 256, device=DEVICE)
        dx, *_, dh_0, dc_0 = lstm.backward(None, ones, None, h, c, given, how)
        assert dx.shape == (T, B, 1024)
        assert torch.equal(dh_0, ones)
        assert not dc_0.any()


def test_refusal_of_other_planes(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x_proj, w = torch.zeros(1, 1, 512), torch.zeros(2, 1, 16, 16)
    assert why_not.why_not(x_proj, w, w, lstm=True) == "the factors have 2 planes, not 4"
    w = torch.zeros(4, 1, 16, 16)
    assert why_not.why_not(x_proj, w, w) == "the factors have 4 planes, not 1 or 2"


def test_refusal_of_sizes_that_shared_memory_cannot_hold(monkeypatch):
    """The interpreter says what the device that it stands for would say."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x, w = torch.zeros(1, 1, 4 * 4096), torch.zeros(4, 1, 64, 64)
    reason = why_not.why_not(x, w, w, lstm=True)
    assert reason.startswith("64·64 units in fp32 precision need 299008 bytes of shared memory and")
    assert why_not.why_not(x, w, w, lstm=True, precision="bf16") is None
