"""The launchers of the kernels against a complex128 loop over dense Kronecker products.

Without a GPU they run in Triton's interpreter (see conftest.py). It computes a bfloat16 product as
float32 product of values rounded to bfloat16, which is what a tensor core does up to the order of a
float32 sum.
"""

import ast
import dataclasses
import functools
import math
from pathlib import Path

import oracle
import pytest
import torch
from cases import (
    BF16,
    DEVICE,
    KERNELS,
    STREAMED,
    draw,
    for_kernels,
    gradients,
    moved,
    of_lstm,
    with_layout,
)
from oracle import relative_error
from poison import GUARD, guarded_copy
from torch.utils._pytree import tree_map_only

pytest.importorskip("triton")

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # the interpreter computes exp(2x) of tanh in numpy, where infinity is reached with a warning
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
]
if DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)

from kru_triton.kernels import geometry, lstm, options, scan, weight_grad, why_not  # noqa: E402
from kru_triton.nonlinearity import NONLINEARITIES  # noqa: E402
from kru_triton.ops.arguments import How, LSTMScan, Scan  # noqa: E402

# Relative L2 errors of results, and of gradients. "fp32": a product of bfloat16 pairs is exact to
# 2^-17, two of them a step, a few steps, and unitary factors keep the sum of errors from growing;
# gradients pass through it twice and through 1/|z|. "bf16", against a definition that rounds what
# the kernel rounds: h differs where a float32 sum in another order rounds to the other neighbour
# (2^-9); the adjoint rounds twice more in each step, starts from the rounded h and rounds its
# result. The LSTM rounds c not at all, and the hardware's tanh is good to 2^-11. The last state has
# twice the error of all states.
LIMITS = {
    ("scan", "fp32"): {"h": 1e-5, "h_n": 2e-5, "d": 1e-4},
    ("scan", "bf16"): {"h": 4e-3, "h_n": 8e-3, "d": 1e-2},
    ("lstm_scan", "fp32"): {"h": 1e-5, "h_n": 2e-5, "c_n": 2e-5, "d": 1e-4},
    ("lstm_scan", "bf16"): {"h": 4e-3, "h_n": 8e-3, "c_n": 4e-3, "d": 6e-3},
}


def precision_of(case):
    return "fp32" if case.precision == "auto" else case.precision


def definition(case):
    """The oracle, which rounds what the kernels round."""
    function = {"scan": oracle.scan, "lstm_scan": oracle.lstm_scan}[case.op]
    pairs = functools.partial(oracle.narrow, pairs=True)
    product = {"fp32": oracle.dense, "bf16x2": pairs, "bf16": oracle.narrow}[precision_of(case)]
    return functools.partial(function, product=product)


def doubles(arguments):
    return tree_map_only(
        torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, arguments
    )


def make(case):
    """Arguments and cotangents of a case.

    modReLU with beta > 0 jumps at z = 0 and its gradient bends like 1/|z|. Inputs that take some
    |z| below 2.5e-3 are drawn again: they would measure the error of z, magnified, and nothing
    else.
    """
    for seed in range(100):
        arguments, cotangents = draw(case, torch.float32, seed)
        if "h" in cotangents:
            cotangents["h"] = cotangents["h"].to(arguments["x_proj"].dtype)
        if case.act != "modrelu" or case.op != "scan" or case.slack > 1:
            return arguments, cotangents
        h, _ = definition(case)(**doubles(arguments))
        beta = arguments["beta"].double()
        m = oracle.from_planar(h, arguments["factors"][0].shape[0]).abs()
        if not ((m > 0) & (beta > 0) & (m - beta < 2.5e-3)).any():
            return arguments, cotangents
    raise AssertionError(f"no inputs for {case}")


def bag(case, arguments):
    """What the launchers take, time first, each in a buffer of its own, and how."""
    arguments = moved(arguments, DEVICE)
    factors = [guarded_copy(w) for w in arguments["factors"]]
    x = guarded_copy(with_layout(arguments["x_proj"], case.layout)).transpose(0, 1)
    states = {k: arguments.get(k) for k in ("beta", "h_0", "c_0")}
    states = {k: None if v is None else guarded_copy(v) for k, v in states.items()}
    reset = None if arguments["reset"] is None else arguments["reset"].t()
    how = How(case.act, precision=precision_of(case))
    if case.op == "lstm_scan":
        factors = [w.view(4, case.H, *w.shape[2:]) for w in factors]
        del states["beta"]
        return LSTMScan(x, *factors, **states, reset=reset, lengths=arguments["lengths"]), how
    del states["c_0"]
    gate = arguments["gate"]
    if gate is not None:
        gate = guarded_copy(with_layout(gate, case.layout)).transpose(0, 1)
    lengths = arguments["lengths"]
    return Scan(x, *factors, **states, reset=reset, lengths=lengths, gate=gate), how


def launched(case, given, how, cotangents):
    """Results and gradients by name, as `gradients` has them."""
    words = {} if case.op == "lstm_scan" else {"nonlinearity": case.act}
    words |= {"precision": how.precision, "lstm": case.op == "lstm_scan"}
    words["gate"] = getattr(given, "gate", None)
    assert why_not.why_not(given.x, given.a, given.b, **words) is None
    d = [cotangents.get(k) for k in ("h", "h_n", "c_n")]
    if case.op == "lstm_scan":
        h, c, h_n, c_n = lstm.forward(given, how)
        dx, da, db, dh_0, dc_0 = lstm.backward(*d, h, c, given, how)
        da, db = (w.view(1, 4 * case.H, *w.shape[2:]) for w in (da, db))
        results = {"h": h, "h_n": h_n, "c_n": c_n, "d c_0": dc_0}
    else:
        h, h_n = scan.forward(given, how)
        dx, da, db, dbeta, dh_0, d_gate = scan.backward(*d[:2], h, given, how)
        results = {"h": h, "h_n": h_n, "d beta": dbeta, "d gate": d_gate}
    results |= {"d x_proj": dx, "d factors[0]": da, "d factors[1]": db, "d h_0": dh_0}
    absent = {f"d {k}" for k in ("beta", "h_0", "c_0", "gate") if getattr(given, k, None) is None}
    results = {k: v.cpu() for k, v in results.items() if k not in absent}
    by_time = [k for k in ("h", "d x_proj", "d gate") if k in results]
    return results | {k: results[k].transpose(0, 1) for k in by_time}


def on_device(case, cotangents):
    """Those of the launchers: that of h time first, as the layout has it."""
    cotangents = {k: guarded_copy(v) for k, v in moved(cotangents, DEVICE).items()}
    if "h" in cotangents:
        cotangents["h"] = with_layout(cotangents["h"], case.layout).transpose(0, 1)
    return cotangents


def computed(case, arguments, cotangents):
    return launched(case, *bag(case, arguments), on_device(case, cotangents))


def check(case):
    arguments, cotangents = make(case)
    want = gradients(definition(case), doubles(arguments), doubles(cotangents))
    got = computed(case, arguments, cotangents)
    assert got.keys() == want.keys()
    limits = dict(LIMITS[case.op, precision_of(case).removesuffix("x2")])
    if case.dtype == torch.bfloat16:  # rounded once more at the store
        limits = {k: max(v, LIMITS[case.op, "bf16"][k]) for k, v in limits.items()}
    errors = {k: relative_error(got[k], v) for k, v in want.items()}
    assert errors == {k: pytest.approx(0, abs=limits[k.split()[0]] * case.slack) for k in errors}
    return errors


@pytest.mark.parametrize("case", KERNELS, ids=str)
def test_against_the_definition(case, record_property):
    record_property("errors", check(case))


@pytest.mark.parametrize("case", STREAMED, ids=str)
def test_streamed_factors(case, monkeypatch):
    """The kernels for large factors, on small ones."""
    monkeypatch.setattr(why_not, "MAX_HELD_SIDE", 16)
    check(case)


def test_too_little_shared_memory_streams_the_factors(monkeypatch):
    """Where a device cannot hold 64 x 64 in float32, and for which shapes it can."""
    x_proj = torch.zeros(1, 1, 8192)
    how = ("modrelu", "fp32")
    monkeypatch.setattr(why_not, "SHARED_INTERPRETED", 232448)  # sm_90
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
    given, how = bag(case, make(case)[0])
    return given._replace(**changed), how


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("act", NONLINEARITIES)
def test_zero_pre_activations(act, precision):
    """z = 0 exactly, beta of both signs and zero: h = 0, gradients as the definition has them."""
    case = for_kernels(16, 16, act, T=2, starts="", precision=precision)
    arguments, cotangents = make(case)
    arguments["x_proj"].zero_()
    if act == "modrelu":
        arguments["beta"][::3] = 0
    want = gradients(definition(case), doubles(arguments), doubles(cotangents))
    got = computed(case, arguments, cotangents)
    assert not got["h"].any()
    limit = 1e-5 if precision == "fp32" else 2e-2
    assert relative_error(got["d x_proj"], want["d x_proj"]) < limit
    assert not got["d factors[0]"].any()
    assert not got["d factors[1]"].any()


def test_gradient_near_the_jump_of_modrelu_is_bounded():
    """A bfloat16 h says |z| = |h| - beta to 2^-9 |h|: the gradient is not amplified beyond that."""
    case = for_kernels(16, 16, B=4, T=1, starts="", slack=10, **BF16)
    z = torch.full((4, 1, 512), 1e-4)
    beta = torch.linspace(0.01, 1.0, 256)
    x = z.bfloat16().transpose(0, 1).to(DEVICE)
    given = arguments_of_scan(case, x=x, beta=beta.to(DEVICE))
    h = scan.scan_forward(*given)
    g = torch.ones_like(h)
    dx, *_ = scan.scan_backward(g, None, h, *given)
    assert dx.isfinite().all()
    assert dx.abs().max() <= 2.0**9


def test_gradient_near_the_jump_of_modrelu_is_that_of_the_state():
    """In float32 |h| - beta tells |z| to 2^-22 |h|, far better than products tell z itself (2^-17):
    what inverting h loses does not show beside the error of the step that made it."""
    modulus, beta = torch.logspace(-1, -4, 4, dtype=torch.float64)[:, None], 0.05
    random = torch.Generator().manual_seed(0)
    phase = 6.3 * torch.rand(2, 4, 256, generator=random).double()
    z, g = torch.polar(torch.ones_like(phase), phase)
    z = z * modulus
    want = oracle.to_planar(pulled_back(g, z * (1 + beta / modulus), beta, "modrelu", 0.0), 2)
    x, dh = (oracle.to_planar(v, 2)[None].float().to(DEVICE) for v in (z, g))
    case = for_kernels(16, 16, B=4, T=1, starts="", slack=10)
    given = arguments_of_scan(case, x=x, beta=torch.full((256,), beta, device=DEVICE))
    dx, *_ = scan.scan_backward(dh, None, scan.scan_forward(*given), *given)
    for got, true, m in zip(dx[0].cpu(), want, modulus):
        assert relative_error(got, true) < 2.0**-22 * (m + beta) / m


@pytest.mark.parametrize("shape", [(8, 8), (16, 16)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_a_run_in_two_pieces_equals_one_run(shape):
    case = for_kernels(*shape, B=3, T=6, reset=True)
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
    case = for_kernels(8, 16, B=5, T=9, slack=10)
    arguments = make(case)
    first, second = computed(case, *arguments), computed(case, *arguments)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_weight_gradient_of_several_chunks_of_time():
    """17 steps make two chunks; the second one starts from a state in the middle."""
    check(for_kernels(16, 16, B=2, T=17, reset=True, slack=3))  # three times as many steps


TOKEN_CASES = [
    for_kernels(16, 16, T=4, reset=True),
    for_kernels(16, 16, T=4, H=2, lengths=True, **BF16),
    for_kernels(32, 32, B=2, T=3),
    for_kernels(8, 8, B=5, T=4),
    for_kernels(8, 8, "modtanh", B=5, T=4, reset=True),
    for_kernels(16, 16, "modtanh", T=4, lengths=True),
    for_kernels(3, 11, "modtanh", B=5, T=3),
    for_kernels(16, 16, T=1),
    for_kernels(128, 1, "tanh", T=2),
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
        table = with_layout(table[None], "odd")[0]
    gathered = given._replace(x=table[tokens])
    given = given._replace(x=table, tokens=tokens)
    h = scan.scan_forward(given, how)
    assert torch.equal(h, scan.scan_forward(gathered, how))
    g = torch.randn(h.shape, generator=random).to(DEVICE, case.dtype)
    dx, *_ = scan.scan_backward(g, None, h, given, how)
    assert torch.equal(dx, scan.scan_backward(g, None, h, gathered, how)[0])


@pytest.mark.skipif(DEVICE == "cuda", reason="a device assertion ends the process")
def test_a_token_outside_the_table_is_refused():
    given, how = arguments_of_scan(for_kernels(16, 16, T=2), x=torch.zeros(7, 512))
    for wrong in (-1, 7):
        with pytest.raises(RuntimeError, match="outside the table's 7 rows"):
            scan.scan_forward(given._replace(tokens=torch.full((2, 3), wrong)), how)


def test_without_cotangents_the_gradient_is_zero():
    given = arguments_of_scan(for_kernels(16, 16, T=2))
    h = scan.scan_forward(*given)
    dx, dh_0, _ = scan.scan_backward(None, None, h, *given)
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
    lo = 0.0 if precision == "bf16" else (w - hi.float()).bfloat16().double()
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


@pytest.mark.parametrize("precision", ["bf16", "bf16x2", "fp32"])
@pytest.mark.parametrize("act", ["modrelu", "tanh"])
def test_long_sequences(act, precision):
    """Three rows against float64 step by step, all weight gradients, two runs, a run in pieces."""
    B, T, P, Q = REAL.values()
    case = for_kernels(P, Q, act, B=1, T=1, beta=0.02, slack=2)
    given, _ = arguments_of_scan(case)
    a, b, beta = given.a, given.b, given.beta
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    random = torch.Generator(DEVICE).manual_seed(0)
    how = How(act, precision=precision)

    def normal(*shape):
        return torch.randn(*shape, generator=random, device=DEVICE, dtype=dtype).mul_(0.5)

    x, h_0 = normal(T, B, 2 * P * Q), normal(B, 2 * P * Q).float()
    given = Scan(x, a, b, beta, h_0)
    h = scan.scan_forward(given, how)
    rows = torch.tensor([0, B // 2, B - 1], device=DEVICE)
    fa, fb = complex_factor(a, precision), complex_factor(b, precision)
    precision = precision.removesuffix("x2")  # the state is rounded alike
    bias = 0.0 if beta is None else beta.double().view(P, Q)
    state = complex_states(h_0[rows].to(dtype), P, Q)
    u, states = complex_states(x[:, rows], P, Q), complex_states(h[:, rows], P, Q)
    for t in range(T):
        state = oracle.activate(fa @ state @ fb.mT + u[t], act, bias)
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
    dx, dh_0, _ = scan.scan_backward(dh, None, h, given, how)
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


@pytest.mark.parametrize(
    ("op", "P", "Q"), [("scan", 16, 16), ("scan", 32, 4), ("lstm_scan", 16, 16)]
)
def test_pairs_of_factors_keep_what_rounding_loses(op, P, Q, monkeypatch):
    """Factors c·1 with c = 1 + 0.9·2⁻⁸, which bfloat16 rounds to 1: wrong alike in every step."""
    monkeypatch.setattr(why_not, "MAX_HELD_SIDE", 16)  # 32 is streamed
    case = for_kernels(P, Q, "identity", op=op, B=4, T=8, **BF16)
    arguments, cotangents = make(case)
    for w in arguments["factors"]:
        w.zero_()[0] = torch.eye(w.shape[-1]) * (1 + 0.9 * 2**-8)
    arguments["x_proj"] *= 0.1
    exact = definition(dataclasses.replace(case, precision="fp32"))
    want = gradients(exact, doubles(arguments), doubles(cotangents))
    rounded, pairs = (
        computed(dataclasses.replace(case, precision=precision), arguments, cotangents)
        for precision in ("bf16", "bf16x2")
    )
    for name, true in want.items():
        error = relative_error(pairs[name], true)
        assert 3 * error < relative_error(rounded[name], true), name
        assert error < 2e-2, name


def test_a_scan_takes_the_memory_of_its_output(poisoned_memory):
    """Beyond in and out: nothing of the size of a sequence, forward and backward."""
    B, T, P, Q = REAL.values()
    values, _ = arguments_of_scan(for_kernels(P, Q, B=1, T=1, slack=2))
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
    given, how = arguments_of_scan(for_kernels(8, 8, B=5, T=2, slack=2, reset=True))

    def run():
        h = scan.scan_forward(given, how)
        return h, *scan.backward(h, None, h, given, how)[:-1]  # no gate

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
    {"FRAGMENTS": False},
]
SUMS = ("SLICES", "FRAGMENTS")  # of the weight gradients alone


@pytest.mark.parametrize("tuning", TUNINGS, ids=lambda t: "-".join(t))
def test_tuning_changes_no_result(tuning):
    given, how = arguments_of_scan(for_kernels(16, 16, reset=True))
    scans, sums = ({k: v for k, v in tuning.items() if (k in SUMS) == w} for w in (False, True))

    def results(scans, sums):
        h = scan.scan_forward(given, how, **scans)
        dx, dh_0, _ = scan.scan_backward(h, None, h, given, how, **scans)
        return h, dx, dh_0, *weight_grad.weight_grad(dx, h, given, how, **sums)

    # without ANCHORED, dh_0 is a float32 product behind the kernel, not one of bfloat16 pairs
    limits = [1e-6, 1e-6, 2**-16 if "ANCHORED" in tuning else 1e-6, 1e-6, 1e-6]
    for got, want, limit in zip(results(scans, sums), results({}, {}), limits):
        assert relative_error(got, want) < limit


def test_tuning_by_an_unknown_name_is_refused():
    given = arguments_of_scan(for_kernels(16, 16, T=2))
    for name in ("P", "warps", "SLICES"):
        with pytest.raises(TypeError, match=f"tuning: '{name}' is no choice of this kernel"):
            scan.scan_forward(*given, **{name: 1})


def test_inputs_are_not_changed():
    for case in (
        for_kernels(8, 8, B=5, lengths=True, reset=True),
        of_lstm(8, 8, B=5, lengths=True, reset=True),
    ):
        arguments, cotangents = make(case)
        (given, how), cotangents = bag(case, arguments), on_device(case, cotangents)
        tensors = [t for t in (*given, *cotangents.values()) if t is not None]
        copies = [t.clone() for t in tensors]
        launched(case, given, how, cotangents)
        for before, after in zip(copies, tensors):
            assert torch.equal(before.nan_to_num(3.0), after.nan_to_num(3.0))


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
    assert reason.startswith("64·64 units in fp32 precision need 319488 bytes of shared memory and")
    assert why_not.why_not(x, w, w, lstm=True, precision="bf16") is None


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


@pytest.mark.parametrize(("version", "stages"), [((3, 6, 0), 1), ((3, 7, 0), 1), ((3, 7, 1), 3)])
def test_copies_that_triton_does_not_fence_are_not_made(version, stages, monkeypatch):
    """What `tests/machine` finds in the streamed factors where they are copied all the same."""
    monkeypatch.setattr(options, "triton_version", lambda: version)
    how = {"heads": 1, "parts": 2, "nonlinearity": "modrelu", "nvidia": True}
    wide = geometry.Wide.of(256, 16)
    assert options.wide_options(wide, precision="bf16", **how)[1]["num_stages"] == stages
    assert options.wide_options(wide, precision="fp32", **how)[1]["num_stages"] == 3


def test_the_package_imports_nothing():
    """Some libraries import whatever is called `kernels`; importing it must do nothing."""
    source = Path(why_not.__file__).with_name("__init__.py").read_text()
    assert [type(node) for node in ast.parse(source).body] == [ast.Expr]
