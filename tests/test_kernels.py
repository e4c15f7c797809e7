"""The kernels against a complex128 loop over dense Kronecker products, under autograd.

Without a GPU they run in Triton's interpreter (see conftest.py). It computes a bfloat16 product as
float32 product of values rounded to bfloat16, which is what a tensor core does up to the order of a
float32 sum.
"""

import ast
import dataclasses
import math
from pathlib import Path

import pytest
import rounding
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton")

# the interpreter computes exp(2x) of tanh in numpy, where infinity is reached with a warning
pytestmark = [pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")]
if DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)

from kru_triton.kernels import scan, weight_grad, why_not  # noqa: E402 (after importorskip)
from kru_triton.nonlinearity import NONLINEARITIES  # noqa: E402
from kru_triton.ops.arguments import How, Scan  # noqa: E402

# Relative L2 errors. "fp32": a product of bfloat16 pairs is exact to 2^-17, two of them a step, a
# few steps, and unitary factors keep the sum of errors from growing; gradients pass through it
# twice and through 1/|z|. "bf16", against a definition that rounds what the kernel rounds: h
# differs where a float32 sum in another order rounds to the other neighbour (2^-9); the adjoint
# rounds twice more in each step, starts from the rounded h and rounds its result.
LIMITS = {
    "fp32": {"h": 1e-5, "dx": 1e-4, "dh_0": 1e-4, "da": 1e-4, "db": 1e-4, "dbeta": 1e-4},
    "bf16": {"h": 4e-3, "dx": 1e-2, "dh_0": 1e-2, "da": 1e-2, "db": 1e-2, "dbeta": 1e-2},
}


@dataclasses.dataclass(frozen=True)
class Case:
    P: int
    Q: int
    act: str = "modrelu"
    B: int = 3
    T: int = 5
    H: int = 1
    field: str = "complex"
    precision: str = "fp32"
    dtype: torch.dtype = torch.float32
    h_0: bool = True
    reset: bool = False
    lengths: bool = False
    layout: str = "batch"  # batch first, time first or cut out of a larger buffer
    cotangent: str = "both"  # on h, on h_n or on both
    scale: float = 0.5  # of x_proj
    beta: float = 0.05  # bound of |beta|; both signs occur
    slack: float = 1.0  # times the limits

    def __str__(self):
        base = f"B{self.B}-T{self.T}-H{self.H}-{self.P}x{self.Q}-{self.act}-{self.precision}"
        shown = {"P", "Q", "act", "B", "T", "H", "precision"}
        rest = [
            f"{f.name}={getattr(self, f.name)}"
            for f in dataclasses.fields(self)
            if f.name not in shown and getattr(self, f.name) != f.default
        ]
        return "-".join([base, *rest])


BF16 = {"precision": "bf16", "dtype": torch.bfloat16}
CASES = [
    # every nonlinearity, both fields, both precisions
    *(Case(16, 16, act) for act in NONLINEARITIES),
    *(Case(16, 16, act, field="real") for act in NONLINEARITIES),
    *(Case(16, 16, act, **BF16) for act in NONLINEARITIES),
    *(Case(16, 16, act, field="real", **BF16) for act in ("modrelu", "modtanh")),
    Case(16, 16, dtype=torch.bfloat16),
    Case(16, 16, precision="bf16"),
    # shapes: packed block-diagonally, one tile, long sides, padded
    *(Case(P, Q, T=3) for P, Q in [(8, 8), (8, 16), (16, 8), (4, 16), (2, 32), (64, 2), (1, 64)]),
    *(Case(P, Q, T=3, B=2) for P, Q in [(16, 32), (32, 16), (32, 32), (16, 64), (64, 16)]),
    *(Case(P, Q, T=2, B=1) for P, Q in [(32, 64), (64, 64)]),
    *(Case(P, Q, T=3) for P, Q in [(3, 11), (5, 5), (12, 12), (11, 24), (17, 3)]),
    *(Case(P, Q, T=3, **BF16) for P, Q in [(8, 8), (8, 16), (16, 32), (32, 32), (3, 11)]),
    Case(3, 11, "modtanh", field="real", T=4),
    Case(5, 20, layout="odd", T=3),
    Case(5, 20, B=3, T=2, **BF16),
    # one factor, and sides beyond 64
    *(Case(P, Q, T=2) for P, Q in [(64, 1), (1, 128)]),
    Case(128, 2, "tanh", T=2, B=9, reset=True, lengths=True),
    Case(4, 128, slack=2, T=2, B=2, **BF16),
    Case(256, 1, slack=2, T=2),
    Case(4, 256, "modtanh", T=2, B=2, reset=True, lengths=True),
    Case(256, 2, "relu", T=2, field="real", **BF16),
    # batch and time
    Case(16, 16, B=1, T=1),
    Case(16, 16, B=1, T=7),
    Case(16, 16, B=5, T=1, h_0=False),
    Case(8, 8, B=1, T=3),
    Case(8, 8, B=5, T=3),
    Case(8, 8, B=9, T=2, **BF16),
    # heads
    Case(16, 16, H=3),
    Case(8, 16, H=2, B=5),
    Case(8, 8, H=2, field="real"),
    # reset, lengths, h_0
    Case(16, 16, h_0=False),
    Case(16, 16, reset=True),
    Case(16, 16, lengths=True),
    Case(16, 16, reset=True, lengths=True, h_0=False),
    Case(8, 8, B=5, reset=True),
    Case(8, 8, B=5, lengths=True),
    Case(8, 8, "tanh", B=6, reset=True, lengths=True),
    Case(8, 8, "modtanh", B=5, reset=True, lengths=True, H=2),
    Case(16, 16, "modtanh", reset=True, lengths=True),
    Case(16, 16, "identity", reset=True, lengths=True, field="real"),
    Case(3, 11, "tanh", B=6, reset=True, lengths=True),
    Case(8, 8, B=5, reset=True, lengths=True, **BF16),
    # where the rows lie
    *(Case(16, 16, layout=layout) for layout in ("time", "cut", "odd")),
    *(Case(8, 8, "modtanh", B=5, layout=layout) for layout in ("time", "cut", "odd")),
    Case(3, 11, layout="cut"),
    Case(16, 16, layout="time", H=2, **BF16),
    # cotangents
    *(Case(16, 16, cotangent=cotangent) for cotangent in ("h", "h_n")),
    *(Case(8, 8, B=5, cotangent=c, lengths=True) for c in ("h", "h_n")),
    Case(16, 16, "modtanh", cotangent="h_n"),
    Case(16, 16, cotangent="h", h_0=False, reset=True),
    # far from and close to zero
    *(Case(16, 16, act, scale=50.0, T=3) for act in NONLINEARITIES),
    *(Case(16, 16, act, scale=50.0, T=3, **BF16) for act in ("modrelu", "modtanh", "tanh")),
    Case(
        16, 16, beta=0.5, slack=10
    ),  # |h| > 0.5 wherever beta = 0.5: phases of tiny z count in full
    Case(16, 16, "modtanh", scale=1e-3, T=2),
    Case(16, 16, "tanh", scale=1e-3, T=2),
]


GUARD = 512  # elements on either side of every buffer


def guarded(shape, dtype, device, value=float("nan")):
    """A tensor of `value` inside of a larger one that is NaN throughout, and the larger one."""
    size = math.prod(shape)
    whole = torch.full((size + 2 * GUARD,), float("nan"), dtype=dtype, device=device)
    tensor = whole[GUARD : GUARD + size].view(shape)
    return tensor.fill_(value), whole


def guarded_copy(x):
    """x in a buffer of its own: what a kernel reads beyond it is NaN, and comes out as NaN."""
    if x is None or not x.is_floating_point():
        return x
    return guarded(x.shape, x.dtype, x.device)[0].copy_(x)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """What the kernels do not write stays NaN, and so does all that lies around their buffers."""
    buffers = []

    def allocate(original, value):
        def allocated(self, shape, *rest, **options):
            dtype = options.get("dtype") or self.dtype
            if not isinstance(shape, tuple | torch.Size) or not dtype.is_floating_point:
                return original(self, shape, *rest, **options)  # the interpreter's, or of integers
            tensor, whole = guarded(shape, dtype, self.device, value)
            buffers.append((tensor, whole))
            return tensor

        return allocated

    monkeypatch.setattr(torch.Tensor, "new_empty", allocate(torch.Tensor.new_empty, float("nan")))
    monkeypatch.setattr(torch.Tensor, "new_zeros", allocate(torch.Tensor.new_zeros, 0.0))
    yield buffers
    for tensor, whole in buffers:
        outside = whole.isnan().sum() - whole[GUARD : GUARD + tensor.numel()].isnan().sum()
        assert outside == 2 * GUARD, f"written beyond a buffer of shape {tuple(tensor.shape)}"


def activate(z, beta, act):
    """The definition; at z = 0 modReLU has gradient 0 and modtanh gradient 1."""
    zero = z == 0
    m = torch.where(zero, 1.0, z).abs()
    if act == "modrelu":
        return z * torch.where(zero, 0.0, torch.relu(m + beta) / m)
    if act == "modtanh":
        return z * torch.where(zero, 1.0, torch.tanh(m) / m)
    function = {"tanh": torch.tanh, "relu": torch.relu, "identity": lambda x: x}[act]
    if not z.is_complex():
        return function(z)
    return torch.complex(function(z.real), function(z.imag))


def joined(x, parts, heads):
    """Planar (..., parts·H·N) to complex or real (..., H, N)."""
    x = x.unflatten(-1, (parts, heads, -1))
    return torch.complex(x[..., 0, :, :], x[..., 1, :, :]) if parts == 2 else x[..., 0, :, :]


def planar(z):
    """(..., H, N) to planar (..., parts·H·N)."""
    planes = (z.real, z.imag) if z.is_complex() else (z,)
    return torch.stack(planes, -3).flatten(-3)


def step(case, fa, fb, state):
    """(A ⊗ B) h for every row and head; for "bf16" with every operand of a product rounded."""
    if case.precision == "fp32":
        dense = torch.stack([torch.kron(fa[i], fb[i]) for i in range(case.H)])
        return torch.einsum("hmn,bhn->bhm", dense, state)
    x = state.unflatten(-1, (case.P, case.Q))
    return rounding.kron(fa, fb, x, narrow=True).flatten(-2)


def oracle(case, x_proj, a, b, beta, h_0, reset, lengths):
    """h (T, B, F) and h_n (B, F) of the definition."""
    parts = a.shape[0]
    fa = torch.complex(a[0], a[1]) if parts == 2 else a[0]
    fb = torch.complex(b[0], b[1]) if parts == 2 else b[0]
    u = joined(x_proj, parts, case.H)
    state = joined(h_0, parts, case.H) if h_0 is not None else torch.zeros_like(u[:, 0])
    states = []
    for t in range(case.T):
        if reset is not None:
            state = torch.where(reset[:, t, None, None], 0.0, state)
        z = step(case, fa, fb, state) + u[:, t]
        alive = (t < lengths)[:, None, None]
        state = torch.where(alive, activate(z, beta.view(case.H, -1), case.act), 0.0)
        states.append(state)
    h = planar(torch.stack(states))
    return h, h[lengths - 1, torch.arange(case.B)]


def arranged(x, layout):
    """The same values of (B, T, F) lying differently in memory."""
    B, T, F = x.shape
    if layout == "batch":
        return guarded_copy(x)
    if layout == "time":
        return guarded_copy(x.transpose(0, 1)).transpose(0, 1)
    extra = 16 if layout == "cut" else 3  # rows aligned to 16 bytes, or not
    buffer = torch.full((B + 1, T + 2, F + extra), float("nan"), dtype=x.dtype, device=x.device)
    view = buffer[1:, 1 : T + 1, :F]
    view.copy_(x)
    return view


def make(case):
    """Inputs, flags and cotangents of a case.

    modReLU with beta > 0 jumps at z = 0 and its gradient bends like 1/|z|. Inputs that take some
    |z| below 2.5e-3 are drawn again: they would measure the error of z, magnified, and nothing
    else.
    """
    for seed in range(100):
        arguments = draw(case, seed)
        if case.act != "modrelu" or case.slack > 1:
            return arguments
        h, _ = oracle(case, **doubles(arguments[0]), **arguments[1])
        beta = arguments[0]["beta"].double()
        m = joined(h, arguments[0]["a"].shape[0], case.H).abs().flatten(2)
        near = (m > 0) & (beta > 0) & (m - beta < 2.5e-3)
        if not near.any():
            return arguments
    raise AssertionError(f"no inputs for {case}")


def doubles(inputs):
    return {k: None if v is None else v.double() for k, v in inputs.items()}


def draw(case, seed):
    random = torch.Generator().manual_seed(seed)
    parts = 2 if case.field == "complex" else 1
    N = case.P * case.Q
    F = parts * case.H * N

    def normal(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64)

    def factor(side):
        w = normal(parts, case.H, side, side)
        w = torch.linalg.qr(torch.complex(w[0], w[1]) if parts == 2 else w[0])[0]
        return torch.stack((w.real, w.imag) if parts == 2 else (w,)).float()

    inputs = {
        "x_proj": (normal(case.B, case.T, F) * case.scale).to(case.dtype),
        "a": factor(case.P),
        "b": factor(case.Q),
        "beta": ((torch.rand(case.H * N, generator=random) * 2 - 1) * case.beta).float(),
        "h_0": (normal(case.B, F) * 0.5).float() if case.h_0 else None,
    }
    flags = {
        "reset": torch.rand(case.B, case.T, generator=random) < 0.3 if case.reset else None,
        "lengths": torch.full((case.B,), case.T),
    }
    if case.reset:
        flags["reset"][0, 0] = True
        flags["reset"][-1, -1] = True
    if case.lengths:
        flags["lengths"] = torch.arange(case.B) * 2 % case.T + 1
    cotangents = {
        "dh": normal(case.T, case.B, F).to(case.dtype) if case.cotangent != "h_n" else None,
        "dh_n": normal(case.B, F).to(case.dtype) if case.cotangent != "h" else None,
    }
    return inputs, flags, cotangents


def expected(case, inputs, flags, cotangents):
    leaves = doubles(inputs)
    for leaf in leaves.values():
        if leaf is not None:
            leaf.requires_grad_()
    h, h_n = oracle(case, **leaves, **flags)
    loss = 0.0
    if cotangents["dh"] is not None:
        alive = torch.arange(case.T)[:, None] < flags["lengths"]
        loss = loss + (h * cotangents["dh"].double() * alive[..., None]).sum()
    if cotangents["dh_n"] is not None:
        loss = loss + (h_n * cotangents["dh_n"].double()).sum()
    loss.backward()
    names = {"x_proj": "dx", "h_0": "dh_0", "a": "da", "b": "db", "beta": "dbeta"}
    gradients = {names[k]: v.grad for k, v in leaves.items() if v is not None}
    gradients["dx"] = gradients["dx"].transpose(0, 1)
    if case.act != "modrelu":
        del gradients["dbeta"]
    return {"h": h.detach(), **gradients}


def bag(case, x_proj, a, b, beta, h_0, reset, lengths):
    """What the launchers take, time first, with what the case has."""
    beta = beta if case.act == "modrelu" else None
    lengths = lengths if case.lengths else None
    reset = None if reset is None else reset.t()
    return Scan(x_proj.transpose(0, 1), a, b, beta, h_0, reset, lengths)


def computed(case, inputs, flags, cotangents, **tuning):
    def move(x):
        return None if x is None else guarded_copy(x.to(DEVICE))

    inputs = {k: move(v) for k, v in inputs.items()}
    flags = {k: move(v) for k, v in flags.items()}
    cotangents = {k: move(v) for k, v in cotangents.items()}
    inputs["x_proj"] = arranged(inputs["x_proj"], case.layout)
    given = bag(case, **inputs, **flags)
    how = How(case.act, precision=case.precision)
    words = {"nonlinearity": case.act, "precision": case.precision}
    assert why_not.why_not(given.x, given.a, given.b, **words) is None
    scans, grads = (
        {k: v for k, v in tuning.items() if (k == "SLICES") == w} for w in (False, True)
    )
    h = scan.scan_forward(given, how, **scans)
    if cotangents["dh"] is not None:
        dh = cotangents["dh"].transpose(0, 1)
        cotangents["dh"] = arranged(dh, case.layout).transpose(0, 1)
    dx, dh_0 = scan.scan_backward(**cotangents, h=h, scan=given, how=how, **scans)
    da, db, dbeta = weight_grad.weight_grad(dx, h, given, how, **grads)
    result = {"h": h, "dx": dx, "dh_0": dh_0, "da": da, "db": db, "dbeta": dbeta}
    return {k: v.double().cpu() for k, v in result.items() if v is not None}


def relative_error(got, want):
    return ((got - want).norm() / want.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_definition(case):
    arguments = make(case)
    want = expected(case, *arguments)
    got = computed(case, *arguments)
    errors = {name: relative_error(got[name], want[name]) for name in got}
    limits = {k: v * case.slack for k, v in LIMITS[case.precision].items()}
    if case.dtype == torch.bfloat16:  # rounded once more at the store
        limits = {k: max(v, LIMITS["bf16"][k]) for k, v in limits.items()}
    assert errors == {k: pytest.approx(0, abs=limits[k]) for k in errors}


STREAMED_CASES = [
    Case(32, 8, T=3, B=2, reset=True),
    Case(8, 32, B=3, T=3, lengths=True, reset=True, H=2),
    Case(24, 5, T=3, B=5, lengths=True, h_0=False),
    Case(5, 24, "modtanh", T=3, B=5, lengths=True, reset=True),
    Case(32, 1, "modtanh", T=3, h_0=False, field="real"),
    Case(32, 16, "tanh", T=3, layout="odd", cotangent="h_n"),
    Case(32, 4, T=3, layout="time", cotangent="h", **BF16),
    Case(32, 32, "identity", T=2, B=1),
]


@pytest.mark.parametrize("case", STREAMED_CASES, ids=str)
def test_streamed_factors(case, monkeypatch):
    """The kernels for large factors, on small ones."""
    monkeypatch.setattr(why_not, "MAX_HELD_SIDE", 16)
    test_against_the_definition(case)


def test_too_little_shared_memory_streams_the_factors(monkeypatch):
    """Where a device cannot hold 64 x 64 in float32, and for which shapes it can."""
    x_proj = torch.zeros(1, 1, 8192)
    how = ("modrelu", "fp32")
    assert not why_not.is_wide(*factors(64, 64), x_proj, *how)
    assert not why_not.is_wide(*factors(128, 8), x_proj, *how)
    assert why_not.is_wide(*factors(128, 32), x_proj, *how)
    monkeypatch.setattr(why_not, "SHARED_INTERPRETED", 101376)  # sm_89, sm_120
    assert why_not.is_wide(*factors(64, 64), x_proj, *how)
    assert not why_not.is_wide(*factors(32, 64), x_proj, *how)
    monkeypatch.setattr(why_not, "SHARED_INTERPRETED", 65536)
    assert not why_not.is_wide(*factors(32, 32), x_proj, *how)


def test_too_little_tensor_memory_streams_the_factors(monkeypatch):
    x_proj = torch.zeros(1, 1, 8192)
    assert not why_not.has_tensor_memory(x_proj.device)
    monkeypatch.setattr(why_not, "has_tensor_memory", lambda device: True)
    assert why_not.is_wide(*factors(64, 64), x_proj, "modrelu", "fp32")
    assert why_not.is_wide(*factors(40, 50), x_proj, "modrelu", "fp32")
    assert not why_not.is_wide(*factors(64, 64, parts=1), x_proj, "modrelu", "fp32")
    assert not why_not.is_wide(*factors(64, 64), x_proj, "modrelu", "bf16")
    assert not why_not.is_wide(*factors(32, 64), x_proj, "modrelu", "fp32")


def arguments_of_scan(case, **changed):
    """Arguments of scan_forward on the device."""
    inputs, flags, _ = make(case)
    values = {k: None if v is None else v.to(DEVICE) for k, v in {**inputs, **flags}.items()}
    return bag(case, **values)._replace(**changed), How(case.act, precision=case.precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("act", NONLINEARITIES)
def test_zero_pre_activations(act, precision):
    """z = 0 exactly, beta of both signs and zero: h = 0, gradients as the definition has them."""
    case = Case(16, 16, act, T=2, h_0=False, precision=precision)
    inputs, flags, cotangents = make(case)
    inputs["x_proj"].zero_()
    inputs["beta"][::3] = 0
    want = expected(case, inputs, flags, cotangents)
    got = computed(case, inputs, flags, cotangents)
    assert not got["h"].any()
    assert relative_error(got["dx"], want["dx"]) < (1e-5 if precision == "fp32" else 2e-2)
    assert not got["da"].any()
    assert not got["db"].any()


def test_gradient_near_the_jump_of_modrelu_is_bounded():
    """A bfloat16 h says |z| = |h| - beta to 2^-9 |h|: the gradient is not amplified beyond that."""
    case = Case(16, 16, B=4, T=1, h_0=False, slack=10, **BF16)
    z = torch.full((4, 1, 512), 1e-4)
    beta = torch.linspace(0.01, 1.0, 256)
    x = z.bfloat16().transpose(0, 1).to(DEVICE)
    given = arguments_of_scan(case, x=x, beta=beta.to(DEVICE))
    h = scan.scan_forward(*given)
    g = torch.ones_like(h)
    dx, _ = scan.scan_backward(g, None, h, *given)
    assert dx.isfinite().all()
    assert dx.abs().max() <= 2.0**9


@pytest.mark.parametrize("shape", [(8, 8), (16, 16)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_a_run_in_two_pieces_equals_one_run(shape):
    case = Case(*shape, B=3, T=6, reset=True)
    given, how = arguments_of_scan(case)
    whole = scan.scan_forward(given, how)
    pieces, state = [], given.h_0
    for part in (slice(0, 4), slice(4, 6)):
        piece = given._replace(x=given.x[part], reset=given.reset[part], h_0=state)
        piece = scan.scan_forward(piece, how)
        pieces.append(piece)
        state = piece[-1]
    assert torch.equal(torch.cat(pieces), whole)


def test_two_runs_are_bitwise_equal():
    case = Case(8, 16, B=5, T=9, slack=10)
    arguments = make(case)
    first, second = computed(case, *arguments), computed(case, *arguments)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_weight_gradient_of_several_chunks_of_time():
    """17 steps make two chunks; the second one starts from a state in the middle."""
    case = Case(16, 16, B=2, T=17, reset=True, slack=3)  # three times as many steps
    arguments = make(case)
    want, got = expected(case, *arguments), computed(case, *arguments)
    for name in ("da", "db", "dbeta"):
        assert relative_error(got[name], want[name]) < LIMITS["fp32"][name] * case.slack


TOKEN_CASES = [
    Case(16, 16, T=4, reset=True),
    Case(16, 16, T=4, H=2, lengths=True, **BF16),
    Case(32, 32, B=2, T=3),
    Case(8, 8, B=5, T=4),
    Case(8, 8, "modtanh", B=5, T=4, reset=True),
    Case(16, 16, "modtanh", T=4, lengths=True),
    Case(3, 11, "modtanh", B=5, T=3),
    Case(16, 16, T=1),
    Case(128, 1, "tanh", T=2),
]


@pytest.mark.parametrize("case", TOKEN_CASES, ids=str)
@pytest.mark.parametrize("layout", ["whole", "cut"])
def test_tokens_are_the_rows_they_stand_for(case, layout):
    """Reading rows of a table inside the kernel gives the very bits of reading gathered rows."""
    given, how = arguments_of_scan(case)
    random = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 7, (case.B, case.T), generator=random).t().to(DEVICE)
    features = given.x.shape[-1]
    table = (torch.randn(7, features, generator=random) * 0.5).to(DEVICE, case.dtype)
    if layout == "cut":
        table = arranged(table[None], "odd")[0]
    gathered = given._replace(x=table[tokens])
    given = given._replace(x=table, tokens=tokens)
    h = scan.scan_forward(given, how)
    assert torch.equal(h, scan.scan_forward(gathered, how))
    g = torch.randn(h.shape, generator=random).to(DEVICE, case.dtype)
    dx, _ = scan.scan_backward(g, None, h, given, how)
    assert torch.equal(dx, scan.scan_backward(g, None, h, gathered, how)[0])


@pytest.mark.skipif(DEVICE == "cuda", reason="a device assertion ends the process")
def test_a_token_outside_the_table_is_refused():
    given, how = arguments_of_scan(Case(16, 16, T=2), x=torch.zeros(7, 512))
    for wrong in (-1, 7):
        with pytest.raises(RuntimeError, match="outside the table's 7 rows"):
            scan.scan_forward(given._replace(tokens=torch.full((2, 3), wrong)), how)


@pytest.mark.parametrize(("B", "T"), [(0, 3), (3, 0), (0, 0)])
def test_empty(B, T):
    case = Case(16, 16)
    x, h_0 = torch.zeros(T, B, 512, device=DEVICE), torch.ones(B, 512, device=DEVICE)
    given, how = arguments_of_scan(case, x=x, h_0=h_0)
    h, h_n = scan.forward(given, how)
    assert h.shape == (T, B, 512)
    dh_n = torch.ones_like(h_0)
    dx, *gradients, dh_0 = scan.backward(torch.ones_like(h), dh_n, h, given, how)
    assert dx.shape == (T, B, 512)
    # without a step, the last state is h_0 itself
    assert torch.equal(h_n, h_0)
    assert torch.equal(dh_0, dh_n)
    assert [not g.any() for g in gradients] == [True, True, True]


def test_without_cotangents_the_gradient_is_zero():
    given = arguments_of_scan(Case(16, 16, T=2))
    h = scan.scan_forward(*given)
    dx, dh_0 = scan.scan_backward(None, None, h, *given)
    assert not dx.any()
    assert not dh_0.any()


# At real size on a device; without one the same code at toy size.
REAL = (
    {"B": 512, "T": 4096, "P": 32, "Q": 32}
    if DEVICE == "cuda"
    else {"B": 2, "T": 4, "P": 16, "Q": 16}
)
# Relative error of a state after t steps, each of which rounds two operands to bfloat16 (hi, or hi
# and lo without lo·lo) where the definition, with the same rounded factors, rounds none. The errors
# add up as a random walk under modReLU and are forgotten under tanh: c √t and c, with c measured in
# an emulation of the rounding (16 x 16, 1000 steps; constant to 5 %), here times 1.3.
ROUNDING = {
    ("modrelu", "bf16"): lambda t: 1.3 * 1.7e-3 * math.sqrt(t),
    ("modrelu", "fp32"): lambda t: 1.3 * 3.7e-6 * math.sqrt(t),
    ("tanh", "bf16"): lambda t: 1.3 * 3.1e-3,
    ("tanh", "fp32"): lambda t: 1.3 * 5.9e-6,
}


def complex_factor(w, precision):
    """(2, 1, side, side) as the complex128 matrix that the kernel multiplies by."""
    hi = w.bfloat16().double()
    lo = (w - hi.float()).bfloat16().double() if precision == "fp32" else 0.0
    return torch.complex(*(hi + lo)[:, 0])


def complex_states(h, P, Q):
    """(..., 2·N) as complex128 (..., P, Q)."""
    h = h.double().unflatten(-1, (2, P, Q))
    return torch.complex(h[..., 0, :, :], h[..., 1, :, :])


def pulled_back(g, h, beta, act, floor):
    """G = σ'(z)ᵀ g of modReLU or tanh, from h."""
    if act == "tanh":
        return torch.complex(g.real * (1 - h.real**2), g.imag * (1 - h.imag**2))
    k = h.abs()
    n = torch.sgn(h)
    s = torch.where(k > 0, k / torch.maximum(k - beta, k * floor).clamp_min(1e-30), 0.0)
    rho = (n.conj() * g).real
    return s * g + (1 - s) * rho * n


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("act", ["modrelu", "tanh"])
def test_long_sequences(act, precision):
    """Three rows against float64 step by step, all weight gradients, two runs, a run in pieces."""
    B, T, P, Q = REAL.values()
    case = Case(P, Q, act, B=1, T=1, beta=0.02, slack=2)
    given, _ = arguments_of_scan(case)
    a, b, beta = given.a, given.b, given.beta
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    random = torch.Generator(DEVICE).manual_seed(0)
    how = How(act, precision=precision)

    def normal(*shape):
        return torch.randn(*shape, generator=random, device=DEVICE, dtype=dtype).mul_(0.5)

    x, h_0 = normal(T, B, 2 * P * Q), normal(B, 2 * P * Q).float()
    given = Scan(x, a, b, beta, h_0)
    h = scan.scan_forward(given, how)
    rows = torch.tensor([0, B // 2, B - 1], device=DEVICE)
    fa, fb = complex_factor(a, precision), complex_factor(b, precision)
    bias = 0.0 if beta is None else beta.double().view(P, Q)
    state = complex_states(h_0[rows].to(dtype), P, Q)
    u, states = complex_states(x[:, rows], P, Q), complex_states(h[:, rows], P, Q)
    for t in range(T):
        state = activate(fa @ state @ fb.mT + u[t], bias, act)
        if t + 1 in (T // 64, T // 8, T):
            assert relative_error(states[t], state) < ROUNDING[act, precision](t + 1)

    assert torch.equal(h, scan.scan_forward(given, how))
    first = scan.scan_forward(given._replace(x=x[: T // 2]), how)
    assert torch.equal(h[: T // 2], first)
    second = scan.scan_forward(given._replace(x=x[T // 2 :], h_0=first[-1].float()), how)
    assert torch.equal(h[T // 2 :], second)
    given = given._replace(x=None)
    del x, u, first, second

    dh = normal(T, B, 2 * P * Q)
    dx, dh_0 = scan.scan_backward(dh, None, h, given, how)
    assert torch.equal(dx, scan.scan_backward(dh, None, h, given, how)[0])
    floor = 2.0**-8 if precision == "bf16" else 2.0**-20
    carried = torch.zeros_like(state)
    want = torch.empty_like(states)
    cotangents = complex_states(dh[:, rows], P, Q)
    for t in reversed(range(T)):
        want[t] = pulled_back(cotangents[t] + carried, states[t], bias, act, floor)
        carried = fa.mH @ want[t] @ fb.conj()
    limit = ROUNDING[act, precision](T) + (2.0**-9 if precision == "bf16" else 0)  # and its store
    assert relative_error(complex_states(dx[:, rows], P, Q), want) < limit
    limit += ROUNDING["modrelu", precision](1)  # the last product, to which no exact dh is added
    assert relative_error(complex_states(dh_0[rows], P, Q), carried) < limit
    del dh, want, cotangents

    gradients = weight_grad.weight_grad(dx, h, given, how)
    again = weight_grad.weight_grad(dx, h, given, how)
    assert all(torch.equal(x, y) for x, y in zip(gradients, again) if x is not None)
    da, db, dbeta = torch.zeros_like(fa), torch.zeros_like(fb), 0.0
    for t in range(T):
        g = complex_states(dx[t], P, Q)
        x = complex_states(h_0.to(dtype) if t == 0 else h[t - 1], P, Q)
        da += torch.einsum("bpq,bsq->ps", g @ fb.conj(), x.conj())
        db += torch.einsum("bpq,bpr->qr", fa.mH @ g, x.conj())
        dbeta += (torch.sgn(complex_states(h[t], P, Q)).conj() * g).real.sum(0)
    # a sum over all rows and steps of products whose two roundings average out
    limit = 4e-3 if precision == "bf16" else 1e-5
    assert relative_error(torch.complex(*gradients[0][:, 0].double()), da) < limit
    assert relative_error(torch.complex(*gradients[1][:, 0].double()), db) < limit
    if act == "modrelu":
        assert relative_error(gradients[2].double(), dbeta.flatten()) < limit


def test_a_scan_takes_the_memory_of_its_output(poisoned_memory):
    """Beyond in and out: nothing of the size of a sequence, forward and backward."""
    B, T, P, Q = REAL.values()
    values, _ = arguments_of_scan(Case(P, Q, B=1, T=1, slack=2))
    x = torch.randn(T, B, 2 * P * Q, device=DEVICE).bfloat16()
    given, how = Scan(x, values.a, values.b, values.beta), How("modrelu", precision="bf16")

    def peak(function):
        """Most bytes that the function held; without a device, all that it allocated."""
        if DEVICE == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            result = function()
            return result, torch.cuda.max_memory_allocated() - before
        poisoned_memory.clear()
        result = function()
        return result, sum(tensor.nbytes for tensor, _ in poisoned_memory)

    h, forward = peak(lambda: scan.scan_forward(given, how))
    small = 2**20 + 8 * GUARD
    assert h.nbytes <= forward < h.nbytes + small
    _, backward = peak(lambda: scan.scan_backward(x, None, h, given, how))
    assert h.nbytes <= backward < h.nbytes + small


def test_launchers_in_a_cuda_graph(monkeypatch):
    """Replayed on other inputs they give what a call gives; without a device, called again."""
    monkeypatch.undo()  # the guards would be allocations of the graph
    given, how = arguments_of_scan(Case(8, 8, B=5, T=2, slack=2, reset=True))

    def run():
        h = scan.scan_forward(given, how)
        return h, *scan.backward(h, None, h, given, how)

    captured = run()
    if DEVICE == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
    given.x.mul_(-0.5)
    given.reset.logical_not_()
    if DEVICE == "cuda":
        graph.replay()
    else:
        captured = run()
    replayed = [x.clone() for x in captured]
    assert all(torch.equal(x, y) for x, y in zip(replayed, run()))


TUNINGS = [
    {"AHEAD": False, "BETA_IN_LOOP": True},
    {"ANCHORED": False, "num_warps": 2, "num_stages": 2, "maxnreg": 128},
    {"SLICES": 1},
]


@pytest.mark.parametrize("tuning", TUNINGS, ids=lambda t: "-".join(t))
def test_tuning_changes_no_result(tuning):
    case = Case(16, 16, B=3, T=5, reset=True)
    arguments = make(case)
    want = expected(case, *arguments)
    got = computed(case, *arguments, **tuning)
    for name, limit in LIMITS["fp32"].items():
        assert relative_error(got[name], want[name]) < limit, name


def test_tuning_by_an_unknown_name_is_refused():
    given = arguments_of_scan(Case(16, 16, T=2))
    for name in ("P", "warps", "SLICES"):
        with pytest.raises(TypeError, match=f"tuning: '{name}' is no choice of this kernel"):
            scan.scan_forward(*given, **{name: 1})


def test_inputs_are_not_changed():
    case = Case(8, 8, B=5, lengths=True, reset=True)
    inputs, flags, cotangents = make(case)
    copies = [{k: None if v is None else v.clone() for k, v in d.items()} for d in
              (inputs, flags, cotangents)]  # fmt: skip
    computed(case, inputs, flags, cotangents)
    for given, copy in zip((inputs, flags, cotangents), copies):
        for name, value in given.items():
            assert value is None or torch.equal(value, copy[name]), name


def factors(P, Q, parts=2, heads=1):
    return torch.zeros(parts, heads, P, P), torch.zeros(parts, heads, Q, Q)


REFUSED = {
    "float16": (torch.zeros(1, 1, 512).half(), *factors(16, 16), {}, "torch.float16"),
    "features": (torch.zeros(1, 1, 500), *factors(16, 16), {}, "500 features"),
    "side": (torch.zeros(1, 1, 2 * 3 * 137), *factors(3, 137), {}, "137 x 137; beyond 64 x 64"),
    "units": (torch.zeros(1, 1, 2 * 8192), *factors(128, 64), {}, "exceed the 4096"),
    "few units": (torch.zeros(1, 1, 8), *factors(2, 2), {}, "pack 64 batch rows"),
    "rectangular": (
        torch.zeros(1, 1, 512),
        torch.zeros(2, 1, 16, 8),
        torch.zeros(2, 1, 16, 16),
        {},
        "shape (2, 1, 16, 8)",
    ),
    "double factor": (
        torch.zeros(1, 1, 512),
        *(w.double() for w in factors(16, 16)),
        {},
        "torch.float64",
    ),
    "heads": (
        torch.zeros(1, 1, 512),
        factors(16, 16)[0],
        factors(16, 16, heads=2)[1],
        {},
        "disagree",
    ),
    "nonlinearity": (torch.zeros(1, 1, 512), *factors(16, 16), {"nonlinearity": "gelu"}, "'gelu'"),
    "precision": (torch.zeros(1, 1, 512), *factors(16, 16), {"precision": "tf32"}, "'tf32'"),
    "devices": (
        torch.zeros(1, 1, 512, device="meta"),
        *factors(16, 16),
        {},
        "different devices (cpu, meta)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_why(name, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x_proj, a, b, how, words = REFUSED[name]
    assert words in why_not.why_not(x_proj, a, b, **how)


def test_refusals_of_the_environment(monkeypatch):
    arguments = (torch.zeros(1, 1, 512), *factors(16, 16))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert why_not.why_not(*arguments) is None
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "interpreter is off" in why_not.why_not(*arguments)
    monkeypatch.setattr(why_not, "triton_version", lambda: (3, 5))
    assert "triton 3.5 is older than 3.6" in why_not.why_not(*arguments)
    monkeypatch.setattr(why_not, "triton_version", lambda: None)
    assert why_not.why_not(*arguments) == "triton is not installed"


def test_the_package_imports_nothing():
    """Some libraries import whatever is called `kernels`; importing it must do nothing."""
    source = Path(why_not.__file__).with_name("__init__.py").read_text()
    assert [type(node) for node in ast.parse(source).body] == [ast.Expr]
