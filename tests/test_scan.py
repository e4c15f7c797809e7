"""`kru_scan` along the chain of trust: dense complex128 -> loop reference -> torch backend."""

import dataclasses
import logging
import math
import re
from collections import Counter
from functools import reduce

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from kru_triton import KRU, kru_scan, kru_step, unitary_, why_not_triton
from kru_triton.nonlinearity import NONLINEARITIES
from kru_triton.ops import dispatch
from kru_triton.ops.arguments import How, Scan
from kru_triton.reference import kru_scan_reference
from kru_triton.torch_backend import scan as torch_backend

pytestmark = pytest.mark.usefixtures("two_products")

# Largest error over the largest entry (at least 1). A run of a few steps is a few hundred roundings
# of 1e-16, and division by |z| magnifies them by at most 1e3 in these cases.
EXACT = 1e-10


@dataclasses.dataclass(frozen=True)
class Case:
    shapes: tuple
    act: str = "modrelu"
    B: int = 3
    T: int = 7
    H: int = 1
    field: str = "complex"
    h_0: bool = True
    reset: bool = False
    cotangent: str = "both"  # on h, on h_n or on both
    layout: str = "contiguous"  # or time-first memory, or sliced out of a larger buffer
    x: str = "normal"  # or large pre-activations (50), or exact zeros
    beta: float = 0.3  # bound of |beta|, both signs occur; 0: no beta is passed

    def __str__(self):
        sizes = "x".join(str(p) if p == q else f"({p},{q})" for p, q in self.shapes)
        if len(set(self.shapes)) == 1 and len(self.shapes) > 2:
            sizes = f"{len(self.shapes)}of{self.shapes[0][0]}"
        text = f"B{self.B}-T{self.T}-{sizes}-{self.act}"
        text += f"-H{self.H}" * (self.H > 1) + "-reset" * self.reset + "-no_h0" * (not self.h_0)
        for name in ("field", "cotangent", "layout", "x", "beta"):
            value = getattr(self, name)
            text += f"-{name}={value}" * (value != getattr(Case, name))
        return text


def square(*sizes):
    return tuple((p, p) for p in sizes)


CASES = [
    *(Case(square(4, 3), act) for act in NONLINEARITIES),
    *(Case(square(4, 4, 3), act, reset=True, H=2) for act in NONLINEARITIES),
    *(Case(square(2, 3), act, field="real", H=2, B=5) for act in NONLINEARITIES),
    *(Case(square(3, 4), act, x="zeros", h_0=False) for act in NONLINEARITIES),
    *(Case(square(3, 4), act, x="large") for act in NONLINEARITIES),
    *(Case(square(3, 2), act, cotangent="h", B=1, T=1) for act in NONLINEARITIES),
    *(Case(square(3, 2), act, cotangent="h_n", h_0=False, T=4) for act in NONLINEARITIES),
    Case(square(4, 3), B=1, T=1, h_0=False),
    Case(square(4, 3), B=1, T=2),
    Case(square(5)),
    Case(square(5), H=3, reset=True),
    Case(square(5), "modtanh", H=3, field="real"),
    Case(square(*[2] * 9), T=3, B=2),
    Case(square(*[2] * 9), "modtanh", T=3, B=2, reset=True),
    Case(square(1)),
    Case(square(1), "tanh", field="real", H=4),
    Case(square(1, 4)),
    Case(square(4, 1), "modtanh", H=2),
    Case(square(1, 3, 1, 2, 1)),
    Case(((2, 3), (3, 2), (2, 2)), reset=True),  # square cut after the first two
    Case(((2, 3), (3, 2), (4, 4)), "modtanh", H=2),
    Case(((2, 3), (4, 4), (3, 2))),  # square only all together
    Case(((1, 6), (6, 1)), "tanh", field="real"),
    Case(square(4, 3), layout="time_first"),
    Case(square(4, 3), layout="sliced"),
    Case(square(4, 3), "modtanh", layout="sliced", H=2, reset=True),
    Case(square(4, 3), "modtanh", layout="time_first"),
    Case(square(4, 3), beta=2.0),  # |z| < 2 often: many units dead, others far from |h| = |z|
    Case(square(4, 3), beta=2.0, field="real", reset=True),
    Case(square(4, 3), beta=0.0),
    Case(square(4, 3), beta=0.0, x="zeros", field="real"),
    Case(square(4, 3), reset=True, cotangent="h_n"),
    Case(square(4, 3), "relu", reset=True, cotangent="h", h_0=False),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)


def inputs(case, dtype=torch.float64, seed=0):
    """x_proj, factors, beta, h_0, reset, and cotangents of h and h_n."""
    generator = torch.Generator().manual_seed(seed)
    parts = 2 if case.field == "complex" else 1
    units = case.H * reduce(lambda n, s: n * s[0], case.shapes, 1)
    features = parts * units

    def draw(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = draw(case.B, case.T, features, scale=50.0 if case.x == "large" else 1.0)
    if case.x == "zeros":
        x[:, :2] = 0  # with h_0 = 0 the states before step 2 are exactly 0
        x[:, 2, ::2] = 0
    torch.manual_seed(seed)
    factors = [
        unitary_(torch.empty(parts, case.H, p, q, dtype=torch.float64)) for p, q in case.shapes
    ]
    factors = [w + draw(*w.shape, scale=0.02) for w in factors]  # unitary up to what training does
    beta = None
    if case.act == "modrelu" and case.beta:
        beta = draw(units).clamp(-1, 1) * case.beta
    h_0 = draw(case.B, features, scale=0.7) if case.h_0 else None
    reset = None
    if case.reset:
        reset = torch.rand(case.B, case.T, generator=generator) < 0.2
        reset[0, 0] = reset[-1, -1] = True
    dh = draw(case.B, case.T, features) if case.cotangent != "h_n" else None
    dh_n = draw(case.B, features) if case.cotangent != "h" else None
    cast = [t if t is None else t.to(dtype) for t in (x, beta, h_0, dh, dh_n)]
    x, beta, h_0, dh, dh_n = cast
    return x, [w.to(dtype) for w in factors], beta, h_0, reset, dh, dh_n


def with_layout(x, layout):
    """The values of `x (B, T, F)` in another memory."""
    if layout == "time_first":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "sliced":
        buffer = torch.full((x.shape[0] + 1, x.shape[1] + 3, 2 * x.shape[2] + 1), float("nan"))
        out = buffer.to(x.dtype)[1:, 2:-1, 1::2]
        out.copy_(x)
        assert not out.is_contiguous()
        return out
    return x


def run(function, case, dtype=torch.float64, x_dtype=None, seed=0, **kwargs):
    """Results and gradients of every argument, by name."""
    x, factors, beta, h_0, reset, dh, dh_n = inputs(case, dtype, seed)
    x = with_layout(x.to(x_dtype or dtype), case.layout)
    named = {"x_proj": x, "beta": beta, "h_0": h_0}
    named |= {f"factors[{f}]": w for f, w in enumerate(factors)}
    named = {k: v.detach().requires_grad_() for k, v in named.items() if v is not None}
    h, h_n = function(
        named["x_proj"],
        [named[f"factors[{f}]"] for f in range(len(factors))],
        named.get("beta"),
        named.get("h_0"),
        nonlinearity=case.act,
        reset=reset,
        **kwargs,
    )
    pairs = [(y, d.to(y.dtype)) for y, d in ((h, dh), (h_n, dh_n)) if d is not None]
    torch.autograd.backward(*zip(*pairs))
    grads = {f"d {k}": v.grad for k, v in named.items()}
    # An argument that cannot matter (a reset or cotangent away) may have a zero or no gradient.
    grads = {k: torch.zeros_like(named[k[2:]]) if g is None else g for k, g in grads.items()}
    return {"h": h.detach(), "h_n": h_n.detach(), **grads}


def naive_nonlinearity(z, nonlinearity, beta):
    """From the definition; at z = 0 modReLU is 0 with gradient 0, modtanh has slope 1."""
    if nonlinearity == "identity":
        return z
    if nonlinearity == "tanh":
        return torch.complex(z.real.tanh(), z.imag.tanh())
    if nonlinearity == "relu":
        return torch.complex(z.real.relu(), z.imag.relu())
    nonzero = z != 0
    safe = torch.where(nonzero, z, 1.0)
    r = safe.abs()
    if nonlinearity == "modrelu":
        return torch.where(nonzero, (r + beta).clamp(min=0) * (safe / r), 0.0)
    return torch.where(nonzero, torch.tanh(r) * (safe / r), z)


def dense_scan(x_proj, factors, beta=None, h_0=None, *, nonlinearity, reset=None):
    """The oracle: N×N matrices from torch.kron and a naive loop in complex128 under autograd."""
    parts, heads = factors[0].shape[:2]
    batch, time, features = x_proj.shape
    matrices = []
    for head in range(heads):
        small = [
            torch.complex(w[0, head], w[1, head] if parts == 2 else torch.zeros_like(w[0, head]))
            for w in factors
        ]
        matrices.append(reduce(torch.kron, small))
    units = features // parts
    w = torch.block_diag(*matrices)
    assert w.dtype == torch.complex128
    assert w.shape == (units, units)

    def from_planar(x):
        return torch.complex(x[:, :units], x[:, units:] if parts == 2 else torch.zeros_like(x))

    def to_planar(z):
        return torch.cat((z.real, z.imag), 1) if parts == 2 else z.real

    beta = x_proj.new_zeros(units) if beta is None else beta
    state = x_proj.new_zeros(batch, features) if h_0 is None else h_0
    outputs = []
    for t in range(time):
        if reset is not None:
            state = torch.where(reset[:, t, None], torch.zeros_like(state), state)
        z = from_planar(state) @ w.T + from_planar(x_proj[:, t])
        state = to_planar(naive_nonlinearity(z, nonlinearity, beta))
        outputs.append(state)
    return torch.stack(outputs, 1), state


def assert_close(actual, expected, limit):
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        got = actual[name]
        assert got.shape == want.shape, name
        assert got.isfinite().all(), f"{name} is not finite"
        error = ((got.double() - want.double()).abs().max() / want.abs().max().clamp(min=1)).item()
        assert error <= limit, f"{name}: {error:.2e} > {limit:.0e}"


def rms_errors(actual, expected):
    return {
        k: ((actual[k].double() - v).norm() / v.norm().clamp(min=1e-300)).item()
        for k, v in expected.items()
    }


# The chain


@cases
def test_reference_equals_dense_oracle(case):
    assert_close(run(kru_scan_reference, case), run(dense_scan, case), EXACT)


@cases
def test_torch_backend_equals_dense_oracle_and_reference(case, monkeypatch):
    expected, reference = run(dense_scan, case), run(kru_scan_reference, case)
    for units in (0, 64):  # heads of so many units are one product
        monkeypatch.setattr(torch_backend, "DENSE_UNITS", units)
        actual = run(kru_scan, case, backend="torch")
        assert_close(actual, expected, EXACT)
        assert_close(actual, reference, EXACT)


@pytest.mark.parametrize(("sizes", "products"), [((8, 8), 1), ((8, 9), 2)], ids=str)
def test_products_of_a_step(sizes, products, monkeypatch):
    """A small head takes one a step, forward and backward alike, and a large one two."""
    monkeypatch.setattr(torch_backend, "DENSE_UNITS", 64)

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls[func.overloadpacket] += 1
            return func(*args, **(kwargs or {}))

    def count(time):
        calls.clear()
        b, h = 2, 2 * math.prod(sizes)
        a = [unitary_(torch.empty(2, 1, p, p)) for p in sizes]
        scan, d_n = Scan(torch.randn(time, b, h), *a), torch.randn(b, h)
        with Count():
            out, _ = torch_backend.forward(scan, How("identity"))
            torch_backend.backward(None, d_n, out, scan._replace(x=None), How("identity"))
        return sum(calls[op] for op in (torch.ops.aten.bmm, torch.ops.aten.baddbmm_))

    calls = Counter()
    assert count(60) - count(50) == 2 * 10 * products  # in one chunk


def test_the_table_holds_what_it_claims():
    """Dead and alive units, exact zeros and saturation do occur in the cases named for them."""
    h = run(dense_scan, Case(square(4, 3), beta=2.0))["h"]
    modulus = torch.complex(*h.chunk(2, -1)).abs()
    assert 0.05 < (modulus == 0).double().mean() < 0.95
    assert (modulus > 1).any()
    assert (run(dense_scan, Case(square(3, 4), x="zeros", h_0=False))["h"][:, :2] == 0).all()
    saturated = run(dense_scan, Case(square(3, 4), "tanh", x="large"))["h"].abs()
    assert (saturated == 1).double().mean() > 0.5


SMALL = [
    *(Case(square(2, 3), act, B=2, T=3) for act in NONLINEARITIES),
    *(Case(square(2, 2), act, B=2, T=3, field="real", H=2) for act in NONLINEARITIES),
    Case(square(3), "modrelu", B=1, T=2, reset=True),
    Case(((2, 3), (3, 2)), "modtanh", B=1, T=2, H=2, reset=True),
]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradcheck(case):
    x, factors, beta, h_0, reset, _, _ = inputs(case)
    count = len(factors)
    optional = [] if beta is None else [beta]
    arguments = [t.requires_grad_() for t in (x, h_0, *factors, *optional)]

    def function(x, h_0, *rest):
        beta = rest[count] if len(rest) > count else None
        return kru_scan(x, rest[:count], beta, h_0, nonlinearity=case.act, reset=reset)

    assert torch.autograd.gradcheck(function, arguments)


@pytest.mark.parametrize("act", NONLINEARITIES)
def test_directional_finite_differences(act):
    """All arguments moved at once along a random direction, central differences, no autograd."""
    case = Case(square(4, 5), act, H=2, T=9, reset=True)
    gradient = run(kru_scan, case)
    x, factors, beta, h_0, reset, dh, dh_n = inputs(case)
    values = {"x_proj": x, "beta": beta, "h_0": h_0}
    values |= {f"factors[{f}]": w for f, w in enumerate(factors)}
    values = {k: v for k, v in values.items() if v is not None}
    generator = torch.Generator().manual_seed(5)
    direction = {k: torch.randn(v.shape, generator=generator).double() for k, v in values.items()}

    def loss(step):
        moved = {k: v + step * direction[k] for k, v in values.items()}
        w = [moved[f"factors[{f}]"] for f in range(len(factors))]
        h, h_n = kru_scan(
            moved["x_proj"], w, moved.get("beta"), moved["h_0"], nonlinearity=act, reset=reset
        )
        return (h * dh).sum() + (h_n * dh_n).sum()

    expected = sum((gradient[f"d {k}"] * v).sum() for k, v in direction.items()).item()
    # truncation is O(step²) and rounding 1e-16/step: both below 1e-9 of the derivative
    numeric = ((loss(1e-6) - loss(-1e-6)) / 2e-6).item()
    assert numeric == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["x_proj", "factors[0]", "factors[1]", "beta", "h_0"])
def test_one_argument_alone_gets_its_gradient(name):
    case = Case(square(4, 3))
    x, factors, beta, h_0, _, dh, dh_n = inputs(case)
    named = {"x_proj": x, "factors[0]": factors[0], "factors[1]": factors[1]}
    named |= {"beta": beta, "h_0": h_0}
    named[name].requires_grad_()
    h, h_n = kru_scan(x, factors, beta, h_0)
    torch.autograd.backward((h, h_n), (dh, dh_n))
    assert torch.equal(named[name].grad, run(kru_scan, case)[f"d {name}"])


def test_second_derivatives_raise():
    """Not supported, so never silently dropped."""
    x, factors, *_ = inputs(Case(square(4, 3)))
    x.requires_grad_()
    h, _ = kru_scan(x, factors)
    (first,) = torch.autograd.grad(h.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiable once; .* use torch\.func"):
        first.sum().backward()


def test_arguments_and_cotangents_are_left_alone():
    case = Case(square(4, 3), reset=True)
    x, factors, beta, h_0, reset, dh, dh_n = inputs(case)
    kept = [t.clone() for t in (x, *factors, beta, h_0, reset, dh, dh_n)]
    leaves = [x, *factors, beta, h_0]
    outputs = kru_scan(*[x.requires_grad_(), [w.requires_grad_() for w in factors]], beta, h_0)
    torch.autograd.grad(outputs, leaves[:3], (dh, dh_n))
    for before, after in zip(kept, (x, *factors, beta, h_0, reset, dh, dh_n)):
        assert torch.equal(before, after)


# Edges


@pytest.mark.parametrize("act", NONLINEARITIES)
@pytest.mark.parametrize(("B", "T"), [(3, 0), (0, 4), (0, 0)])
def test_empty(act, B, T):
    results = run(kru_scan, Case(square(3, 2), act, B=B, T=T))
    assert results["h"].shape == (B, T, 12)
    assert results["h_n"].shape == (B, 12)
    _, _, _, h_0, _, _, dh_n = inputs(Case(square(3, 2), act, B=B, T=T))
    if T == 0:
        assert torch.equal(results["h_n"], h_0)
        assert torch.equal(results["d h_0"], dh_n)
    assert results["d factors[0]"].count_nonzero() == 0


@pytest.mark.parametrize("act", NONLINEARITIES)
def test_a_reset_cuts_the_past(act):
    """A row with a cut at step 3 is a fresh run from there, for gradients too, even after NaN."""
    case = Case(square(3, 2), act, B=2, T=6)
    x, factors, beta, h_0, _, dh, dh_n = inputs(case)
    reset = torch.zeros(2, 6, dtype=torch.bool)
    reset[0, 3] = True
    dh[:, :3] = 0
    x.requires_grad_()
    h_0.requires_grad_()

    def gradients(x, h_0):
        outputs = kru_scan(x, factors, beta, h_0, nonlinearity=act, reset=reset)
        return outputs[0], *torch.autograd.grad(outputs, (x, h_0), (dh, dh_n))

    h, dx, dh_0 = gradients(x, h_0)
    assert dx[0, :3].count_nonzero() == dh_0[0].count_nonzero() == 0
    assert dx[1, 0].count_nonzero() > 0
    fresh, _ = kru_scan(x[:1, 3:], factors, beta, nonlinearity=act)
    assert (fresh[0] - h[0, 3:]).abs().max() < 1e-14

    broken = x.detach().clone()
    broken[0, 1] = float("nan")
    h_after, dx_after, _ = gradients(broken.requires_grad_(), h_0)
    assert h_after[0, 1].isnan().any()
    for after, before in ((h_after, h), (dx_after, dx)):
        assert torch.equal(after[0, 3:], before[0, 3:])
        assert torch.equal(after[1], before[1])


@pytest.mark.parametrize("act", ["modrelu", "modtanh"])
def test_tiny_pre_activations_keep_their_gradient(act):
    """|z| = 1e-17, whose square is below the floor under the root, where both slopes are 1."""
    torch.manual_seed(0)
    factors = [unitary_(torch.empty(2, 1, p, p)) for p in (2, 3)]
    x = (1e-17 * torch.randn(2, 4, 12)).requires_grad_()
    h, _ = kru_scan(x, factors, nonlinearity=act)
    (gradient,) = torch.autograd.grad(h[:, -1].sum(), x)
    expected = x.new_ones(2, 12)
    matrix = torch.kron(*(torch.complex(w[0, 0], w[1, 0]) for w in factors))
    for t in reversed(range(4)):  # float32 roundings
        assert (gradient[:, t] - expected).abs().max() < 1e-5
        g = torch.complex(*expected.chunk(2, 1)) @ matrix.conj()
        expected = torch.cat((g.real, g.imag), 1)


# Precisions


@pytest.mark.parametrize("act", NONLINEARITIES)
def test_float32_against_float64(act):
    """Relative RMS. Each step sums P + Q products with unit roundoff 6e-8 on a state that unitary
    factors keep from growing: 20 steps are a random walk below 1e-6. Gradients pass twice through
    it and, for modReLU, through 1/|z|, which magnifies the rounding of |h| − β."""
    case = Case(square(8, 6), act, H=2, T=20, B=5, reset=True)
    errors = rms_errors(run(kru_scan, case, torch.float32), run(kru_scan, case))
    assert max(errors["h"], errors["h_n"]) < 1e-6, errors
    assert max(v for k, v in errors.items() if k[0] == "d") < 5e-6, errors
    assert errors["h"] > 1e-9, "this was not float32"


@pytest.mark.parametrize("act", NONLINEARITIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_input_has_a_float32_state(dtype, act):
    """h is the float32 run rounded once, to the bit: rounded states are never fed back."""
    x, factors, beta, h_0, reset, _, _ = inputs(Case(square(4, 3), act, reset=True), torch.float32)
    x = x.to(dtype)
    h, h_n = kru_scan(x, factors, beta, h_0, nonlinearity=act, reset=reset)
    full, full_n = kru_scan(x.float(), factors, beta, h_0, nonlinearity=act, reset=reset)
    assert h.dtype == dtype
    assert h_n.dtype == torch.float32
    assert torch.equal(h, full.to(dtype))
    assert torch.equal(h_n, full_n)


@pytest.mark.parametrize("act", NONLINEARITIES)
def test_bfloat16_gradients(act):
    """Relative RMS of gradients from states rounded to 2^-9 each: a few of them add up. tanh' = 1 -
    h² loses its leading digits near |h| = 1, and modReLU's 1/(|h| - β) near |h| = β."""
    case = Case(square(4, 3), act, H=2, B=5, T=9, beta=0.1)
    actual = run(kru_scan, case, torch.float32, torch.bfloat16)
    assert actual["d x_proj"].dtype == torch.bfloat16
    assert actual["d factors[0]"].dtype == torch.float32
    errors = rms_errors(actual, run(kru_scan, case))
    assert max(errors.values()) < 1.5e-2, errors


def test_bfloat16_gradient_is_bounded_where_modulus_meets_beta():
    """|z| = |h| - β cancels when h is rounded; 1/|z| is held to what bfloat16 can tell: 2^8."""
    x = torch.full((1, 1, 8), 1e-3, dtype=torch.bfloat16, requires_grad=True)
    h, _ = kru_scan(x, [torch.zeros(2, 1, 4, 4)], torch.ones(4))
    h[..., :4].sum().backward()
    assert x.grad.isfinite().all()
    assert 0 < x.grad.abs().max() <= 256


def test_autocast_rounds_the_input_and_nothing_else():
    x, factors, beta, h_0, *_ = inputs(Case(square(4, 3)), torch.float32)
    with torch.autocast("cpu"):
        h, h_n = kru_scan(x, factors, beta, h_0)
    expected, expected_n = kru_scan(x.bfloat16(), factors, beta, h_0)
    assert h.dtype == torch.bfloat16
    assert torch.equal(h, expected)
    assert h_n.dtype == torch.float32
    assert torch.equal(h_n, expected_n)
    with torch.autocast("cpu"):  # float64 is left alone
        double, _ = kru_scan(x.double(), [w.double() for w in factors])
    assert double.dtype == torch.float64


@pytest.mark.parametrize("act", NONLINEARITIES)
def test_backward_under_autocast_equals_backward_outside(act):
    x, factors, _, h_0, *_ = inputs(Case(square(4, 3), act), torch.float32)
    leaves = [x.requires_grad_(), h_0.requires_grad_(), *(w.requires_grad_() for w in factors)]
    loss = kru_scan(x, factors, None, h_0, nonlinearity=act)[0].square().sum()
    outside = torch.autograd.grad(loss, leaves, retain_graph=True)
    with torch.autocast("cpu"):
        inside = torch.autograd.grad(loss, leaves)
    for a, b in zip(outside, inside):
        assert torch.equal(a, b)


def test_bfloat16_factors_are_multiplied_in_float32():
    x, factors, *_ = inputs(Case(square(2, 2, 2, 2, 2)), torch.bfloat16)
    _, h_n = kru_scan(x, factors)
    _, expected = kru_scan(x, [w.float() for w in factors])
    assert torch.equal(h_n, expected)


# Chunks, determinism, memory


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("act", NONLINEARITIES)
def test_small_chunks(monkeypatch, act, steps):
    """Seven steps in chunks of one or three against a single chunk. Not to the bit everywhere: the
    address of a slot and the length of a product over a chunk may change the order of a sum."""
    original, used = torch_backend._Step.chunks, []

    def chunks(step):
        used.append(original(step))
        return used[-1]

    monkeypatch.setattr(torch_backend._Step, "chunks", chunks)
    for case in (
        Case(square(4, 3), act, H=2, reset=True),
        Case(square(5), act, h_0=False, field="real", reset=True),
    ):
        one = run(kru_scan, case)
        with monkeypatch.context() as patch:
            state_bytes = one["h"][:, 0].numel() * 8
            patch.setattr(torch_backend, "CHUNK_BYTES", steps * state_bytes)
            many = run(kru_scan, case)
        assert [len(c) for c in used[-4:]] == [1, 1, -(-7 // steps), -(-7 // steps)]
        assert_close(many, one, 1e-13)


@pytest.mark.parametrize("act", NONLINEARITIES)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_run_in_pieces_equals_one_run(act, x_dtype):
    """To the bit: a step does the same products on operands of the same shape and alignment (slots
    of a multiple of 64 bytes), and the state handed over is not rounded, even for a bfloat16 h."""
    case = Case(square(4, 4), act, B=4, T=9)
    x, factors, beta, h_0, _, _, _ = inputs(case, torch.float32)
    x = x.to(x_dtype)
    whole, whole_n = kru_scan(x, factors, beta, h_0, nonlinearity=act)
    pieces, state = [], h_0
    for piece in x.split((1, 5, 3), dim=1):
        h, state = kru_scan(piece, factors, beta, state, nonlinearity=act)
        pieces.append(h)
    assert torch.equal(torch.cat(pieces, 1), whole)
    assert torch.equal(state, whole_n)


def test_gradients_pass_from_piece_to_piece():
    case = Case(square(4, 3), T=8)
    x, factors, beta, h_0, *_ = inputs(case)
    x.requires_grad_()
    h, state = kru_scan(x[:, :3], factors, beta, h_0)
    h_2, state = kru_scan(x[:, 3:], factors, beta, state)
    (pieces,) = torch.autograd.grad(torch.cat((h, h_2), 1).sin().sum() + state.sum(), x)
    h, h_n = kru_scan(x, factors, beta, h_0)
    (whole,) = torch.autograd.grad(h.sin().sum() + h_n.sum(), x)
    assert (pieces - whole).abs().max() < 1e-13


@pytest.mark.parametrize("act", NONLINEARITIES)
def test_two_runs_are_bitwise_equal(act):
    case = Case(square(8, 6), act, H=2, T=33, B=5, reset=True)
    first, second = (run(kru_scan, case, torch.float32) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("act", NONLINEARITIES)
def test_only_h_is_saved_for_backward(act):
    """Bytes autograd keeps per further step: h, and x_proj where σ cannot be inverted (modtanh)."""

    def saved_bytes(time):
        x, factors, beta, h_0, *_ = inputs(Case(square(4, 3), act, T=time))
        x.requires_grad_()
        kept = {}

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            h, _ = kru_scan(x, factors, beta, h_0, nonlinearity=act)
        assert h.requires_grad
        return sum(kept.values())

    per_step = 3 * 24 * 8
    growth = saved_bytes(40) - saved_bytes(30)
    assert growth == 10 * per_step * (2 if act == "modtanh" else 1)


# The op under torch.library and torch.compile


@pytest.mark.parametrize(
    ("act", "dtype"),
    [(act, torch.float32) for act in NONLINEARITIES]
    + [(act, torch.float64) for act in ("modrelu", "modtanh")],
)
@pytest.mark.parametrize("optional", [True, False], ids=["all", "no_optional"])
def test_opcheck(act, dtype, optional):
    case = Case(square(3, 2), act, H=2, T=4, B=2, reset=optional, h_0=optional)
    x, (a, b), beta, h_0, reset, dh, dh_n = inputs(case, dtype)
    x, dh, reset = x.transpose(0, 1), dh.transpose(0, 1), None if reset is None else reset.t()
    beta = x.new_zeros(12) if act == "modrelu" and beta is None else beta
    leaves = [t if t is None else t.requires_grad_() for t in (x, a, b, beta, h_0)]
    op, backward = (
        torch.ops.kru_triton.recurrence.default,
        torch.ops.kru_triton.recurrence_backward.default,
    )
    options = (None, None, act, "torch", "auto")  # no lengths, no tokens
    torch.library.opcheck(op, (*leaves, reset, *options))
    h, _ = op(*leaves, reset, *options)
    saved = [None if t is None else t.detach() for t in (h, x, a, b, beta, h_0, reset)]
    saved[1] = saved[1] if act == "modtanh" else None
    cotangents = (dh, dh_n) if optional else (dh, None)
    torch.library.opcheck(backward, (*cotangents, *saved, *options))


@pytest.mark.parametrize("shapes", [(5,), (1, 4)], ids=str)
@pytest.mark.parametrize("field", ["complex", "real"])
def test_opcheck_backward_of_one_matrix(shapes, field):
    x, factors, _, _, _, dh, _ = inputs(Case(square(*shapes), "tanh", field=field, B=2, T=3))
    b = reduce(lambda v, w: v * w, factors) if shapes[0] == 1 else factors[0]
    a = torch.eye(len(b), 1, dtype=b.dtype).view(-1, 1, 1, 1)
    options = (*[None] * 5, "tanh", "torch", "auto")
    h, _ = torch.ops.kru_triton.recurrence(x.transpose(0, 1), a, b, *options)
    arguments = (dh.transpose(0, 1), None, h, None, a, b, *options)
    torch.library.opcheck(torch.ops.kru_triton.recurrence_backward.default, arguments)


class Holder(torch.nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        torch.manual_seed(0)
        self.kru = KRU(5, 12, factors=(3, 4), **kwargs)
        self.head = torch.nn.Linear(self.kru.num_directions * 24, 3)

    def forward(self, x, h_0=None, reset=None):
        h, h_n = self.kru(x.tanh(), h_0, reset=reset)
        return self.head(h), h_n


def outputs_and_gradients(module, *arguments):
    module.zero_grad()
    y, h_n = module(*arguments)
    (y.square().sum() + h_n.sum()).backward()
    return {"y": y.detach(), "h_n": h_n.detach()} | {
        k: p.grad.clone() for k, p in module.named_parameters()
    }


@pytest.mark.parametrize("act", NONLINEARITIES)
def test_compile_fullgraph_aot_eager(act):
    module = Holder(nonlinearity=act).double()
    x = torch.randn(6, 3, 5, dtype=torch.float64)
    arguments = (x, torch.randn(1, 3, 24, dtype=torch.float64), torch.rand(3, 6) < 0.3)
    expected = outputs_and_gradients(module, *arguments)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_close(outputs_and_gradients(compiled, *arguments), prefixed(expected), 1e-13)


def prefixed(results):
    return {k if k in ("y", "h_n") else f"_orig_mod.{k}": v for k, v in results.items()}


def test_compile_fullgraph_inductor():
    module = Holder(bidirectional=True)
    x = torch.randn(6, 3, 5)
    expected = outputs_and_gradients(module, x)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="inductor")
    # inductor's own float32 code for the linear layers sums in another order
    assert_close(outputs_and_gradients(compiled, x), prefixed(expected), 1e-5)


def test_compile_makes_no_graph_per_length():
    module = Holder()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for time in (5, 6, 7, 32):
        x = torch.randn(time, 3, 5)
        y, _ = compiled(x)
        assert (y - module(x)[0]).abs().max() < 1e-6
        y.sum().backward()
    assert 1 <= counter.frame_count <= 2  # the first length, then any length


def test_compile_makes_one_graph_for_marked_batch_and_length():
    module = Holder()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for time, batch in ((5, 3), (6, 4), (7, 9), (32, 2)):
        x, reset = torch.randn(time, batch, 5), torch.rand(batch, time) < 0.2
        h_0 = torch.randn(1, batch, 24)
        for tensor, dims in ((x, (0, 1)), (reset, (0, 1)), (h_0, (1,))):
            for dim in dims:
                torch._dynamo.mark_dynamic(tensor, dim)
        y, _ = compiled(x, h_0, reset)
        assert (y - module(x, h_0, reset)[0]).abs().max() < 1e-6
        y.sum().backward()
    assert counter.frame_count == 1


# The other public functions


@pytest.mark.parametrize("act", NONLINEARITIES)
def test_step_is_one_step_of_the_scan(act):
    x, factors, beta, h_0, _, dh, _ = inputs(Case(square(4, 3), act, T=1))
    x, h_0 = x.requires_grad_(), h_0.requires_grad_()
    step = kru_step(x[:, 0], factors, beta, h_0, nonlinearity=act)
    h, h_n = dense_scan(x, factors, beta, h_0, nonlinearity=act)
    assert (step - h_n).abs().max() < 1e-12
    for got, want in zip(
        torch.autograd.grad(step, (x, h_0), dh[:, 0]), torch.autograd.grad(h, (x, h_0), dh)
    ):
        assert (got - want).abs().max() < 1e-12


def test_steps_make_a_sequence():
    x, factors, beta, h_0, *_ = inputs(Case(square(4, 3)))
    _, h_n = kru_scan(x, factors, beta, h_0)
    state = h_0
    for t in range(x.shape[1]):
        state = kru_step(x[:, t], factors, beta, state)
    assert (state - h_n).abs().max() < 1e-13


def test_backend_triton_raises_the_reason():
    """float64 runs on no fused kernel."""
    x, factors, *_ = inputs(Case(square(4, 3)))
    reason = why_not_triton(x, factors)
    assert re.fullmatch(r"\S[^\n]{10,}", reason)
    with pytest.raises(
        RuntimeError, match='backend="triton" cannot run here: ' + re.escape(reason)
    ):
        kru_scan(x, factors, backend="triton")
    with pytest.raises(RuntimeError, match=re.escape(reason)):
        kru_step(x[:, 0], factors, backend="triton")


def test_auto_says_once_which_backend_runs_and_why(caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_said", set())
    x, factors, *_ = inputs(Case(square(4, 3)))
    with caplog.at_level(logging.INFO, logger="kru_triton"):
        kru_scan(x, factors, backend="torch")
        assert caplog.text == ""
        kru_scan(x, factors)
        kru_scan(x, factors)
    assert caplog.text.count("torch backend") == 1
    assert why_not_triton(x, factors) in caplog.text


X, W = torch.zeros(2, 3, 24), [torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 3, 3)]
META = torch.device("meta")
ERRORS = {
    "x_proj list": (TypeError, "x_proj: must be a tensor, got list", {"x_proj": [1.0]}),
    "x_proj complex": (
        TypeError,
        r"x_proj: must be planar real .* got torch.complex64; convert with torch.cat",
        {"x_proj": torch.zeros(2, 3, 12, dtype=torch.complex64)},
    ),
    "x_proj int": (TypeError, r"x_proj: .* got torch.int64; convert", {"x_proj": X.long()}),
    "x_proj float8": (
        TypeError,
        "x_proj: must be float64, float32, bfloat16 or float16",
        {"x_proj": X.to(torch.float8_e4m3fn)},
    ),
    "x_proj rank": (
        ValueError,
        r"x_proj: must be \(B, T, .* got shape \(3, 24\)",
        {"x_proj": X[0]},
    ),
    "x_proj width": (
        ValueError,
        r"x_proj: the last dimension must be 2·1·12 = 24 .* got 23",
        {"x_proj": X[..., 1:]},
    ),
    "factors tensor": (TypeError, "factors: expected a sequence", {"factors": W[0]}),
    "factors empty": (ValueError, "factors: expected at least one", {"factors": []}),
    "factors list of lists": (TypeError, r"factors\[0\]: expected a tensor", {"factors": [[1.0]]}),
    "factors complex": (
        TypeError,
        r"factors\[0\]: must be planar real .* convert .* torch.stack\(\(w.real, w.imag\)\)",
        {"factors": [torch.zeros(1, 12, 12, dtype=torch.complex64)]},
    ),
    "factors complex planar": (
        ValueError,
        r"factors\[0\]: a complex tensor .* planar factors are real: torch.stack",
        {"factors": [w.to(torch.complex64) for w in W]},
    ),
    "factors not planar": (TypeError, r"factors\[0\]: must be planar", {"factors": [W[0][0]]}),
    "factors not square": (
        ValueError,
        r"factors: rows multiply to 6 and columns to 4 \(shapes \[\(2, 2\), \(3, 2\)\]\)",
        {"factors": [torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 3, 2)]},
    ),
    "factors heads": (
        ValueError,
        "factors: all must be of one kind",
        {"factors": [W[0], torch.zeros(2, 2, 3, 3)]},
    ),
    "factors dtype": (
        TypeError,
        "factors: must be torch.float32 with x_proj of torch.float32, got torch.float64",
        {"factors": [w.double() for w in W]},
    ),
    "factors dtype for bfloat16": (
        TypeError,
        "factors: must be torch.bfloat16 or torch.float32 with x_proj of torch.bfloat16",
        {"x_proj": X.bfloat16(), "factors": [w.double() for w in W]},
    ),
    "factors device": (
        ValueError,
        "factors: is on meta but x_proj is on cpu",
        {"factors": [w.to(META) for w in W]},
    ),
    "beta kind": (TypeError, "beta: must be a tensor, got float", {"beta": 0.5}),
    "beta shape": (
        ValueError,
        r"beta: must have shape \(12,\) \(one per unit, \(H·N,\)\), got \(24,\)",
        {"beta": torch.zeros(24)},
    ),
    "beta dtype": (TypeError, "beta: must be torch.float32", {"beta": torch.zeros(12).double()}),
    "beta device": (ValueError, "beta: is on meta", {"beta": torch.zeros(12, device=META)}),
    "beta refused": (
        ValueError,
        'beta: only "modrelu" has one; leave it out for "tanh"',
        {"beta": torch.zeros(12), "nonlinearity": "tanh"},
    ),
    "h_0 kind": (TypeError, "h_0: must be a tensor, got tuple", {"h_0": (torch.zeros(2, 24),)}),
    "h_0 shape": (ValueError, r"h_0: must have shape \(2, 24\)", {"h_0": torch.zeros(1, 24)}),
    "h_0 complex": (
        TypeError,
        "h_0: must be planar real, got torch.complex64; convert with torch.cat",
        {"h_0": torch.zeros(2, 12, dtype=torch.complex64)},
    ),
    "h_0 dtype": (TypeError, "h_0: must be torch.float32", {"h_0": torch.zeros(2, 24).half()}),
    "h_0 device": (ValueError, "h_0: is on meta", {"h_0": torch.zeros(2, 24, device=META)}),
    "reset kind": (TypeError, "reset: must be a tensor, got list", {"reset": [True]}),
    "reset shape": (
        ValueError,
        r"reset: must have shape \(2, 3\) \(\(B, T\)\), got \(3, 2\)",
        {"reset": torch.zeros(3, 2, dtype=torch.bool)},
    ),
    "reset dtype": (
        TypeError,
        r"reset: must be a bool tensor, got torch.int64; convert with .bool\(\)",
        {"reset": torch.zeros(2, 3, dtype=torch.int64)},
    ),
    "reset device": (
        ValueError,
        "reset: is on meta but x_proj is on cpu",
        {"reset": torch.zeros(2, 3, dtype=torch.bool, device=META)},
    ),
    "nonlinearity": (
        ValueError,
        "nonlinearity: must be one of 'modrelu', 'modtanh', 'tanh', 'relu', 'identity', got 'elu'",
        {"nonlinearity": "elu"},
    ),
    "backend": (
        ValueError,
        "backend: must be one of 'auto', 'triton', 'torch', got 'cuda'",
        {"backend": "cuda"},
    ),
    "precision": (
        ValueError,
        "precision: must be one of 'auto', 'fp32', 'bf16', got 'fp16'",
        {"precision": "fp16"},
    ),
}


@pytest.mark.parametrize(("kind", "match", "changed"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(kind, match, changed):
    with pytest.raises(kind, match=match):
        kru_scan(**{"x_proj": X, "factors": W, **changed})


def test_step_errors():
    with pytest.raises(ValueError, match=r"x_proj: one step takes .* got shape \(2, 3, 24\)"):
        kru_step(X, W)
