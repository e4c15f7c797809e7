"""`kru_scan`, `kru_embedding_scan` and `kru_step`: what is theirs alone, and bad arguments.

What holds for every op, its values and gradients first of all, is in test_conformance.py.
"""

import math
from collections import Counter

import pytest
import torch
from cases import UNSORTED, Case, draw, leaves_of, run, square, with_leaves
from torch.utils._python_dispatch import TorchDispatchMode

from kru_triton import kru_embedding_scan, kru_scan, kru_step, unitary_
from kru_triton.nonlinearity import NONLINEARITIES
from kru_triton.ops.arguments import How, Scan
from kru_triton.torch_backend import scan as torch_backend


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


@pytest.mark.parametrize("name", ["x_proj", "factors[0]", "factors[1]", "beta", "h_0"])
def test_one_argument_alone_gets_its_gradient(name):
    case = Case(square(4, 3))
    arguments, cotangents = draw(case)
    leaf = leaves_of(arguments)[name].detach().requires_grad_()
    h, h_n = kru_scan(**with_leaves(arguments, {name: leaf}))
    torch.autograd.backward((h, h_n), (cotangents["h"], cotangents["h_n"]))
    assert torch.equal(leaf.grad, run(kru_scan, case)[f"d {name}"])


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


def test_bfloat16_gradient_is_bounded_where_modulus_meets_beta():
    """|z| = |h| - β cancels when h is rounded; 1/|z| is held to what bfloat16 can tell: 2^8."""
    x = torch.full((1, 1, 8), 1e-3, dtype=torch.bfloat16, requires_grad=True)
    h, _ = kru_scan(x, [torch.zeros(2, 1, 4, 4)], torch.ones(4))
    h[..., :4].sum().backward()
    assert x.grad.isfinite().all()
    assert 0 < x.grad.abs().max() <= 256


def test_autocast_rounds_the_input_and_nothing_else():
    arguments, _ = draw(Case(square(4, 3)), torch.float32)
    with torch.autocast("cpu"):
        h, h_n = kru_scan(**arguments)
    expected, expected_n = kru_scan(**{**arguments, "x_proj": arguments["x_proj"].bfloat16()})
    assert h.dtype == torch.bfloat16
    assert torch.equal(h, expected)
    assert h_n.dtype == torch.float32
    assert torch.equal(h_n, expected_n)
    with torch.autocast("cpu"):  # float64 is left alone
        double, _ = kru_scan(**draw(Case(square(4, 3)))[0])
    assert double.dtype == torch.float64


@pytest.mark.parametrize("act", NONLINEARITIES)
def test_backward_under_autocast_equals_backward_outside(act):
    arguments, _ = draw(Case(square(4, 3), act), torch.float32)
    leaves = {k: v.requires_grad_() for k, v in leaves_of(arguments).items()}
    loss = kru_scan(**with_leaves(arguments, leaves))[0].square().sum()
    outside = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
    with torch.autocast("cpu"):
        inside = torch.autograd.grad(loss, list(leaves.values()))
    for a, b in zip(outside, inside):
        assert torch.equal(a, b)


def test_bfloat16_factors_are_multiplied_in_float32():
    arguments, _ = draw(Case(square(2, 2, 2, 2, 2)), torch.bfloat16)
    _, h_n = kru_scan(**arguments)
    _, expected = kru_scan(**{**arguments, "factors": [w.float() for w in arguments["factors"]]})
    assert torch.equal(h_n, expected)


def test_no_work_beyond_a_rows_length(monkeypatch):
    """What the time loop is given: the rows that still run."""
    seen = []
    original = torch_backend._forward

    def forward(out, *args):
        seen.append(out.shape[:2])
        return original(out, *args)

    monkeypatch.setattr(torch_backend, "_forward", forward)
    arguments, _ = draw(Case(square(4, 3), B=5, lengths=UNSORTED))
    kru_scan(**arguments)
    assert seen == [(2, 4), (3, 3), (2, 2)]
    assert sum(steps * rows for steps, rows in seen) == sum(UNSORTED)


# Bad arguments


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
        "precision: must be one of 'auto', 'fp32', 'bf16x2', 'bf16', got 'fp16'",
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


TOKENS, TABLE = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(5, 24)
TOKEN_ERRORS = {
    "tokens kind": (TypeError, "tokens: must be a tensor, got list", {"tokens": [[0]]}),
    "tokens None": (TypeError, "tokens: must be a tensor, got NoneType", {"tokens": None}),
    "tokens dtype": (
        TypeError,
        r"tokens: must be an int64 tensor, got torch.float32; convert with .long\(\)",
        {"tokens": TOKENS.float()},
    ),
    "tokens rank": (ValueError, r"tokens: must be \(B, T\), got .* \(3,\)", {"tokens": TOKENS[0]}),
    "tokens device": (
        ValueError,
        "tokens: is on meta but table is on cpu",
        {"tokens": TOKENS.to(META)},
    ),
    "token too large": (
        ValueError,
        r"tokens: must be from 0 to 4 \(rows of the table\), got values from 0 to 5",
        {"tokens": torch.tensor([[0, 5, 2], [1, 1, 1]])},
    ),
    "token below 0": (
        ValueError,
        "tokens: must be from 0 to 4 .* got values from -1 to 2",
        {"tokens": torch.tensor([[0, -1, 2], [1, 1, 1]])},
    ),
    "no row": (ValueError, "tokens: must be from 0 to -1", {"table": TABLE[:0]}),
    "table kind": (TypeError, "table: must be a tensor, got list", {"table": [1.0]}),
    "table rank": (
        ValueError,
        r"table: must be \(V, parts·H·N\), got shape \(1, 5, 24\)",
        {"table": TABLE[None]},
    ),
    "table width": (
        ValueError,
        r"table: the last dimension must be 2·1·12 = 24 .* got 23",
        {"table": TABLE[:, 1:]},
    ),
    "table int": (TypeError, "table: must be float64, .* got torch.int64", {"table": TABLE.long()}),
    "table complex": (
        TypeError,
        "table: must be planar real",
        {"table": torch.zeros(5, 12, dtype=torch.complex64)},
    ),
    "factors dtype": (
        TypeError,
        "factors: must be torch.float64 with table of torch.float64, got torch.float32",
        {"table": TABLE.double()},
    ),
    "h_0 shape": (ValueError, r"h_0: must have shape \(2, 24\)", {"h_0": torch.zeros(3, 24)}),
    "reset shape": (
        ValueError,
        r"reset: must have shape \(2, 3\)",
        {"reset": torch.zeros(3, 2, dtype=torch.bool)},
    ),
    "lengths kind": (TypeError, "lengths: must be a tensor, got list", {"lengths": [1, 2]}),
    "lengths shape": (
        ValueError,
        r"lengths: must have shape \(2,\) \(steps of each row, \(B,\)\), got \(3,\)",
        {"lengths": torch.tensor([1, 2, 3])},
    ),
    "lengths dtype": (
        TypeError,
        r"lengths: must be an int64 tensor, got torch.int32; convert with .long\(\)",
        {"lengths": torch.tensor([1, 2], dtype=torch.int32)},
    ),
    "lengths device": (
        ValueError,
        "lengths: is on meta but table is on cpu",
        {"lengths": torch.zeros(2, dtype=torch.int64, device=META)},
    ),
    "length too large": (
        ValueError,
        r"lengths: must be from 0 to 3 \(the steps of a row\), got values from 1 to 4",
        {"lengths": torch.tensor([4, 1])},
    ),
    "length below 0": (
        ValueError,
        "lengths: must be from 0 to 3 .* got values from -1 to 2",
        {"lengths": torch.tensor([-1, 2])},
    ),
}


@pytest.mark.parametrize(
    ("kind", "match", "changed"), TOKEN_ERRORS.values(), ids=TOKEN_ERRORS.keys()
)
def test_errors_of_tokens_and_lengths(kind, match, changed):
    arguments = {"tokens": TOKENS, "table": TABLE, "factors": W, **changed}
    with pytest.raises(kind, match=match):
        kru_embedding_scan(**arguments)
    if "lengths" in changed:
        match = match.replace("table is", "x_proj is")
        with pytest.raises(kind, match=match):
            kru_scan(X, W, **changed)
