"""Kronecker algebra against a naive product written entry by entry in complex128."""

import doctest
import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kru_triton import kronecker
from kru_triton.kronecker import (
    check_factors,
    factor_shapes,
    group_factors,
    kron_dense,
    kron_matvec,
    nearest_kronecker,
)

KINDS = ("planar", "planar-real", "complex", "complex-heads", "real", "real-heads")
SHAPES = {
    "one-5": [(5, 5)],
    "3x5": [(3, 3), (5, 5)],
    "5x3": [(5, 5), (3, 3)],
    "nine-2x2": [(2, 2)] * 9,
    "1-7-2": [(1, 1), (7, 7), (2, 2)],
    "rectangular": [(2, 3), (4, 4), (3, 2)],
    "rectangular-non-square": [(2, 3), (5, 1)],
}


def make(shapes, kind, heads=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, dtype=dtype, generator=generator) / size[-1] ** 0.5

    factors = []
    for p, q in shapes:
        if kind.startswith("planar"):
            factors.append(draw(1 if kind == "planar-real" else 2, heads, p, q))
        else:
            size = (heads, p, q) if kind.endswith("heads") else (p, q)
            is_complex = kind.startswith("complex")
            factors.append(torch.complex(draw(*size), draw(*size)) if is_complex else draw(*size))
    return factors


def complex_heads(w):
    """Any kind to complex128 (H, P, Q)."""
    if w.ndim == 4:
        w = torch.complex(w[0].double(), w[1].double()) if w.shape[0] == 2 else w[0]
    return (w if w.ndim == 3 else w[None]).to(torch.complex128)


def naive_kron(factors):
    """(H, M, N) from the definition: entry [i, j] is ∏_f W_f[i_f, j_f], i_f the digits of i."""
    heads = [complex_heads(w) for w in factors]
    rows = torch.cartesian_prod(*(torch.arange(w.shape[1]) for w in heads)).view(-1, len(heads))
    columns = torch.cartesian_prod(*(torch.arange(w.shape[2]) for w in heads)).view(-1, len(heads))
    product = 1
    for f, w in enumerate(heads):
        product = product * w[:, rows[:, None, f], columns[None, :, f]]
    return product


def relative_error(actual, expected):
    assert actual.shape == expected.shape
    return ((actual - expected).norm() / expected.norm()).item()


# Products and short sums of doubles: a few ulps.
EXACT = 1e-14

shapes_table = pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
kinds_table = pytest.mark.parametrize("kind", KINDS)


def test_naive_kron_is_torch_kron():
    a, b = make([(2, 3), (4, 5)], "complex")
    torch.testing.assert_close(naive_kron([a, b])[0], torch.kron(a, b), rtol=1e-14, atol=1e-15)


@shapes_table
@kinds_table
def test_dense_equals_naive(shapes, kind):
    factors = make(shapes, kind)
    dense = kron_dense(factors)
    size = (math.prod(p for p, _ in shapes), math.prod(q for _, q in shapes))
    assert dense.shape == (*factors[0].shape[:-2], *size)
    assert dense.dtype == factors[0].dtype
    assert relative_error(complex_heads(dense), naive_kron(factors)) < EXACT


@shapes_table
@kinds_table
def test_grouping_keeps_the_product(shapes, kind):
    factors = make(shapes, kind)
    groups = group_factors(factors)
    for group in groups:
        assert group.dtype == factors[0].dtype
        assert group.shape[:-2] == factors[0].shape[:-2]
    assert relative_error(naive_kron(groups), naive_kron(factors)) < EXACT


@pytest.mark.parametrize(
    ("shapes", "P", "Q"),
    [
        pytest.param([2] * 7, 8, 16, id="seven-2x2"),
        pytest.param([2] * 3, 2, 4, id="tie-takes-the-smaller-first"),
        pytest.param([16, 8], 16, 8, id="16x8-keeps-its-order"),
        pytest.param([3, 5, 7], 15, 7, id="3x5x7"),
        pytest.param([1, 5], 1, 5, id="1x5"),
        pytest.param([31], 31, 1, id="one-factor"),
        pytest.param([(2, 3), (3, 2), (4, 4)], 6, 4, id="rectangular-with-a-cut"),
        pytest.param([(2, 4), (3, 3), (4, 2)], 24, 1, id="rectangular-without-a-cut"),
    ],
)
def test_grouping_is_as_equal_as_possible(shapes, P, Q):
    pairs = [(s, s) if isinstance(s, int) else s for s in shapes]
    A, B = group_factors(make(pairs, "planar"))
    assert A.shape[-2:] == (P, P)
    assert B.shape[-2:] == (Q, Q)


def test_planar_input_compiles_as_one_graph_of_real_operations():
    class NoComplex(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                assert not (isinstance(tensor, torch.Tensor) and tensor.is_complex()), function
            return out

    compiled = torch.compile(group_factors, fullgraph=True, backend="eager")
    for shapes in ([(2, 2)] * 7, [(2, 3), (3, 2)]):
        factors = [w.requires_grad_() for w in make(shapes, "planar")]
        for A, B in zip(compiled(factors), group_factors(factors)):
            assert torch.equal(A, B)
        x = torch.randn(5, 2 * 2 * kron_dense(factors).shape[-1], dtype=torch.float64)
        matvec = torch.compile(kron_matvec, fullgraph=True, backend="eager")
        assert torch.equal(matvec(factors, x), kron_matvec(factors, x))
        with NoComplex():
            sum(group.sum() for group in group_factors(factors)).backward()
            kron_matvec(factors, x).sum().backward()
        with pytest.raises(AssertionError), NoComplex():  # the detector detects
            torch.complex(*factors[0].detach())


@shapes_table
@kinds_table
def test_matvec_equals_naive(shapes, kind):
    factors = make(shapes, kind)
    dense = naive_kron(factors)  # (H, M, N)
    H, _, N = dense.shape
    parts = 2 if kind == "planar" else 1
    for lead in [(), (1,), (3,), (2, 3)]:
        v = torch.randn(*lead, H, N, dtype=torch.complex128)
        if parts == 1 and not factors[0].is_complex():
            v = v.real.to(torch.complex128)
        expected = torch.einsum("hmn,...hn->...hm", dense, v)
        if kind == "planar":
            x, expected = (
                torch.cat([t.real.flatten(-2), t.imag.flatten(-2)], -1) for t in (v, expected)
            )
        else:
            tail = {"planar-real": (H, -1), "complex": (-1,), "real": (-1,)}.get(kind, (H, -1))
            x, expected = (t.reshape(*lead, *tail) for t in (v, expected))
            if kind == "planar-real":
                x, expected = x.flatten(-2), expected.flatten(-2)
            if not factors[0].is_complex():
                x, expected = x.real, expected.real
        assert relative_error(kron_matvec(factors, x), expected) < EXACT
    empty = kron_matvec(factors, x[:0])
    assert empty.shape == expected[:0].shape


def test_matvec_takes_non_contiguous_vectors():
    factors = make([(3, 3), (2, 2)], "planar")
    x = torch.randn(24, 5, dtype=torch.float64).mT
    assert not x.is_contiguous()
    assert torch.equal(kron_matvec(factors, x), kron_matvec(factors, x.contiguous()))


def test_matvec_does_not_form_the_matrix():
    factors = make([(2, 2)] * 20, "real")  # dense: 2^40 numbers
    x = torch.randn(2**20, dtype=torch.float64)
    back = kron_matvec([w.inverse() for w in factors], kron_matvec(factors, x))
    condition = math.prod(torch.linalg.cond(w).item() for w in factors)
    assert relative_error(back, x) < 1e-15 * condition


@pytest.mark.parametrize("shapes", [[(3, 3)], [(2, 3), (3, 2)], [(2, 2)] * 3], ids=str)
@pytest.mark.parametrize("kind", ["planar", "planar-real", "complex"])
def test_gradients(shapes, kind):
    factors = [w.requires_grad_() for w in make(shapes, kind, heads=2)]
    N = math.prod(q for _, q in shapes)
    features = N if kind == "complex" else factors[0].shape[0] * 2 * N
    x = torch.randn(2, features, dtype=factors[0].dtype).requires_grad_()
    assert torch.autograd.gradcheck(lambda *w: group_factors(w), factors)
    assert torch.autograd.gradcheck(lambda *w: kron_dense(w), factors)
    assert torch.autograd.gradcheck(lambda x, *w: kron_matvec(w, x), (x, *factors))


# --- nearest_kronecker ---------------------------------------------------------------------------


@shapes_table
@kinds_table
def test_nearest_recovers_an_exact_product(shapes, kind):
    factors = make(shapes, kind)
    found = nearest_kronecker(kron_dense(factors), shapes)
    assert [w.shape for w in found] == [w.shape for w in factors]
    assert [w.dtype for w in found] == [w.dtype for w in factors]
    # SVD of a matrix of rank one: backward stable, so ulps times a modest dimension factor.
    assert relative_error(naive_kron(found), naive_kron(factors)) < 1e-13
    gains = [
        complex_heads(w).norm(dim=(1, 2)) / (p * q) ** 0.25 for w, (p, q) in zip(found, shapes)
    ]
    for gain in gains:  # evenly balanced
        torch.testing.assert_close(gain, gains[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["planar", "planar-real", "complex", "real"])
def test_nearest_is_the_optimum_for_two_factors(kind):
    (p, q), (r, s) = shapes = [(3, 2), (2, 5)]
    matrix = make([(p * r, q * s)], kind)[0]
    found = nearest_kronecker(matrix, shapes)
    for w, approximation in zip(complex_heads(matrix), naive_kron(found)):
        rearranged = torch.stack(
            [
                w[i * r : (i + 1) * r, j * s : (j + 1) * s].flatten()
                for i, j in itertools.product(range(p), range(q))
            ]
        )
        missed = torch.linalg.svdvals(rearranged)[1:].norm()  # Eckart-Young
        torch.testing.assert_close((w - approximation).norm(), missed, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["planar", "complex-heads", "real"])
def test_nearest_is_stationary_for_more_factors(kind):
    shapes = [(2, 3), (3, 2), (2, 2)]
    matrix = make([(12, 12)], kind)[0]
    found = [w.requires_grad_() for w in nearest_kronecker(matrix, shapes)]
    loss = (kron_dense(found) - matrix).abs().square().sum()
    assert loss < matrix.abs().square().sum()
    gradients = torch.autograd.grad(loss, found)
    # Sweeps end when the fit gains less than 4 ulps; the gradient then is about sqrt(1e-15).
    assert max(g.abs().max() for g in gradients) < 1e-6 * matrix.norm()
    first, other = nearest_kronecker(matrix, [shapes[0], (6, 4)])
    split = [first, *nearest_kronecker(other, shapes[1:])]
    assert loss < (kron_dense(split) - matrix).abs().square().sum()


def test_nearest_of_a_unitary_product_is_unitary():
    unitary = [torch.linalg.qr(w)[0] for w in make([(3, 3), (5, 5), (2, 2)], "complex")]
    for w in nearest_kronecker(kron_dense(unitary), (3, 5, 2)):
        torch.testing.assert_close(w.mH @ w, torch.eye(len(w), dtype=w.dtype))


def test_nearest_of_zero_is_zero():
    for w in nearest_kronecker(torch.zeros(2, 1, 8, 8), (2, 2, 2)):
        assert torch.equal(w, torch.zeros(2, 1, 2, 2))


def test_nearest_keeps_half_precision():
    factors = make([(3, 3), (4, 4)], "planar", dtype=torch.bfloat16)
    found = nearest_kronecker(kron_dense(factors), (3, 4))
    assert {w.dtype for w in found} == {torch.bfloat16}
    # bfloat16 keeps 8 bits: 2^-9 relative for the dense entries and for each factor's.
    assert relative_error(naive_kron(found), naive_kron(factors)) < 3 * 2**-9


# --- factor_shapes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factors", "hidden_size", "num_heads", "expected"),
    [
        (None, 128, 1, ((8, 8), (16, 16))),
        (None, 1024, 1, ((32, 32), (32, 32))),
        (None, 128, 8, ((4, 4), (4, 4))),
        (None, 13, 1, ((13, 13),)),
        (None, 1, 1, ((1, 1),)),
        ((2, 3), 6, 1, ((2, 2), (3, 3))),
        ([2, [3, 6], (6, 3)], 72, 2, ((2, 2), (3, 6), (6, 3))),
    ],
    ids=str,
)
def test_factor_shapes(factors, hidden_size, num_heads, expected):
    assert factor_shapes(factors, hidden_size, num_heads) == expected


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            ((4, 6), 32),
            ValueError,
            r"factors: the row counts multiply to 24 and the column counts to 24 \(shapes "
            r"\(4, 4\), \(6, 6\)\) but hidden_size is 32; .* are both 32, .* factors=\(4, 8\)",
        ),
        (
            (((2, 3), 4), 8, 1),
            ValueError,
            r"row counts multiply to 8 and the column counts to 12 .* factors=\(2, 4\)",
        ),
        (((4, 6), 32, 2), ValueError, r"hidden_size / num_heads is 32 / 2 = 16; .*=\(4, 4\)"),
        (((), 32), ValueError, r"factors: expected at least one shape, .* example \(4, 8\)"),
        ((8, 64), TypeError, r"factors: expected a tuple .*got 8; write for example \(8, 8\)"),
        (("88", 64), TypeError, r"factors: expected a tuple of ints .*got '88'"),
        (((8, 8.0), 64), TypeError, r"factors\[1\]: expected an int, got 8.0 \(float\)"),
        (((True, 64), 64), TypeError, r"factors\[0\]: expected an int, got True \(bool\)"),
        (((8, -8), 64), ValueError, r"factors\[1\]: expected an int of at least 1, got -8"),
        ((((8, 0), 8), 64), ValueError, r"factors\[0\]: expected an int of at least 1, got 0"),
        ((((2, 2, 2), 8), 64), ValueError, r"factors\[0\]: expected an int or a \(P, Q\) pair"),
        ((None, 0), ValueError, r"hidden_size: expected an int of at least 1, got 0"),
        ((None, 64.0), TypeError, r"hidden_size: expected an int, got 64.0"),
        ((None, 64, 0), ValueError, r"num_heads: expected an int of at least 1, got 0"),
        ((None, 64, 6), ValueError, r"num_heads: must divide .* 6 .* 64; .* num_heads=4"),
    ],
    ids=str,
)
def test_factor_shapes_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        factor_shapes(*arguments)


# --- errors --------------------------------------------------------------------------------------

PLANAR, COMPLEX = torch.ones(2, 1, 3, 3), torch.ones(3, 3, dtype=torch.complex64)


@pytest.mark.parametrize(
    ("factors", "error", "message"),
    [
        (PLANAR, TypeError, r"expected a sequence of tensors, got one tensor .*\[tensor\]"),
        ([], ValueError, "at least one factor, got an empty sequence"),
        ([PLANAR, 3], TypeError, r"factors\[1\]: expected a tensor, got int"),
        ([PLANAR.int()], TypeError, r"factors\[0\]: expected a floating-point .* torch.int32"),
        ([PLANAR[:, :, 0, 0]], None, None),  # a real matrix: legal
        ([torch.ones(3)], ValueError, r"factors\[0\]: expected planar .* shape \(3,\)"),
        ([torch.ones(3, 1, 2, 2)], ValueError, r"expected planar .* shape \(3, 1, 2, 2\)"),
        ([torch.ones(2, 1, 0, 2)], ValueError, r"every size positive, .* \(2, 1, 0, 2\)"),
        ([COMPLEX[None, None]], ValueError, r"\(1, 1, 3, 3\); planar .*torch.stack"),
        ([PLANAR, COMPLEX], TypeError, "one dtype, got torch.float32 .* torch.complex64"),
        ([PLANAR, PLANAR.double()], TypeError, "one dtype, got torch.float32 .* torch.float64"),
        ([PLANAR, PLANAR[0]], ValueError, r"one kind .* \(2, 1, 3, 3\) .* \(1, 3, 3\)"),
        ([PLANAR, PLANAR[:1]], ValueError, r"one kind .* \(2, 1, 3, 3\) .* \(1, 1, 3, 3\)"),
        ([PLANAR, torch.ones(2, 4, 3, 3)], ValueError, r"one kind .* \(2, 4, 3, 3\)"),
        ([PLANAR, PLANAR.to("meta")], ValueError, "one device, got cpu .* meta"),
    ],
    ids=[
        "bare-tensor", "empty", "no-tensor", "int", "legal", "vector", "three-parts", "size-0",
        "complex-4d", "mixed-kinds", "mixed-dtypes", "mixed-ranks", "mixed-parts", "mixed-heads",
        "mixed-devices",
    ],
)  # fmt: skip
def test_factor_errors(factors, error, message):
    if error is None:
        assert len(check_factors(factors)) == len(factors)
        return
    for function in (check_factors, group_factors, kron_dense, lambda w: kron_matvec(w, PLANAR)):
        with pytest.raises(error, match=message):
            function(factors)


@pytest.mark.parametrize(
    ("factors", "x", "error", "message"),
    [
        ([PLANAR], torch.ones(5, 3), ValueError, r"\(..., parts·heads·N\) = \(..., 6\).*\(5, 3\)"),
        ([PLANAR], torch.ones(()), ValueError, r"\(..., 6\) .* got \(\)"),
        ([COMPLEX], COMPLEX[0, :2], ValueError, r"\(..., N\) = \(..., 3\) .* got \(2,\)"),
        ([COMPLEX[None]], COMPLEX[0], ValueError, r"\(..., heads, N\) = \(..., 1, 3\).*\(3,\)"),
        ([COMPLEX], torch.ones(3), TypeError, "dtype torch.complex64, got torch.float32"),
        ([PLANAR], [1.0] * 6, TypeError, "x: must be a tensor .* got list"),
        ([PLANAR], torch.ones(6, device="meta"), ValueError, "device cpu, got meta"),
    ],
    ids=["planar", "scalar", "complex", "complex-heads", "dtype", "list", "device"],
)
def test_matvec_errors(factors, x, error, message):
    with pytest.raises(error, match=message):
        kron_matvec(factors, x)


@pytest.mark.parametrize(
    ("matrix", "shapes", "error", "message"),
    [
        ([[1.0]], (1,), TypeError, "matrix: expected a tensor, got list"),
        (PLANAR.int(), (3,), TypeError, "matrix: expected a floating-point"),
        (torch.ones(3), (3,), ValueError, r"matrix: expected planar .*\(3,\)"),
        (torch.ones(6, 6), (2, 2), ValueError, r"\(2, 2\), \(2, 2\) multiply to 4 .* 6 x 6"),
        (torch.ones(6, 6), (), ValueError, "factor_shapes: expected at least one shape"),
        (torch.ones(6, 6), (2, 3.0), TypeError, r"factor_shapes\[1\]: expected an int, got 3.0"),
        (torch.full((6, 6), torch.nan), (2, 3), ValueError, "matrix: must be finite"),
    ],
    ids=["list", "int", "vector", "products", "empty", "float", "nan"],
)
def test_nearest_errors(matrix, shapes, error, message):
    with pytest.raises(error, match=message):
        nearest_kronecker(matrix, shapes)


def test_examples():
    result = doctest.testmod(kronecker)
    assert result.attempted
    assert not result.failed
