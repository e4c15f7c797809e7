"""Haar initialisation and the unitarity penalty against complex128 written out matrix by matrix."""

import doctest

import pytest
import torch
from torch import nn

from kru_triton import unitarity
from kru_triton.unitarity import named_factors, unitarity_penalty, unitary_

SHAPES = {
    "real-1x2x2": (1, 1, 2, 2),
    "2x3x5x5": (2, 3, 5, 5),
    "tall": (2, 2, 7, 3),
    "wide": (2, 2, 3, 7),
    "wide-real": (1, 2, 3, 4),
    "1x1": (2, 5, 1, 1),
}
shapes_table = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def complex_heads(w):
    w = w.detach()
    w = w if w.is_complex() else w.double()
    if w.ndim == 4:
        w = w[0] + 1j * w[1] if w.shape[0] == 2 else w[0]
    return (w if w.ndim == 3 else w[None]).to(torch.complex128)


def naive_penalty(factors):
    total = 0.0
    for factor in factors:
        for w in complex_heads(factor):
            gram = w.conj().T @ w if w.shape[0] >= w.shape[1] else w @ w.conj().T
            total += (gram - torch.eye(len(gram))).abs().square().sum().item()
    return total


def random_factors(*shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, dtype=dtype, generator=generator) for shape in shapes]


class Layer(nn.Module):
    """Two directions of two factors, offered as the recurrent modules offer them."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weights = nn.ParameterList(
            torch.randn(2, 2, p, q, dtype=torch.float64, generator=generator)
            for p, q in [(3, 3), (2, 2), (3, 2), (2, 3)]
        )

    def recurrent_factors(self):
        yield [self.weights[0], self.weights[1]]
        yield [self.weights[2], 2 * self.weights[3]]

    def factors(self):
        return [*self.weights[:3], 2 * self.weights[3]]


# --- unitary_ ------------------------------------------------------------------------------------


@shapes_table
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_init_is_unitary(shape, dtype):
    tensor = torch.full(shape, torch.nan, dtype=dtype)
    assert unitary_(tensor) is tensor
    for w in complex_heads(tensor):
        gram = w.mH @ w if w.shape[0] >= w.shape[1] else w @ w.mH
        # Rounding the entries of a unitary matrix perturbs its Gram matrix by a few ulps.
        error = (gram - torch.eye(len(gram))).abs().max()
        assert error < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(4, 4), (3, 4, 2)], ids=str)
def test_init_of_plain_matrices(shape, dtype):
    w = complex_heads(unitary_(torch.empty(shape, dtype=dtype)))
    torch.testing.assert_close(
        w.mH @ w, torch.eye(shape[-1], dtype=w.dtype).expand(len(w), -1, -1), rtol=0, atol=1e-6
    )


def test_init_is_haar():
    """For Haar U: E tr U = 0, E |tr U|² = 1 and E |tr U²|² = 2 (Diaconis and Evans, 2001).

    Plain QR fixes the signs of R instead, and fails the first by far: E tr U is then about -1.
    """
    torch.manual_seed(0)
    n = 20000
    U = complex_heads(unitary_(torch.empty(2, n, 3, 3)))
    trace, trace_of_square = (m.diagonal(dim1=1, dim2=2).sum(1) for m in (U, U @ U))
    # Six standard errors: the variances of the three are 1, about 1 and about 4.
    assert trace.mean().abs() < 6 / n**0.5
    assert abs(trace.abs().square().mean() - 1) < 6 / n**0.5
    assert abs(trace_of_square.abs().square().mean() - 2) < 12 / n**0.5


@pytest.mark.parametrize("parts", [1, 2])
def test_a_narrow_init_is_unitary_with_angles_in_its_share_of_the_circle(parts):
    torch.manual_seed(0)
    for spread in (0.0, 0.01, 0.5):
        w = unitary_(torch.empty(parts, 2, 100, 100, dtype=torch.float64), spread)
        assert unitarity_penalty([w]) < 1e-18
        angles = torch.linalg.eigvals(complex_heads(w)).angle().abs()
        assert angles.max() <= spread * torch.pi * 1.1 + 1e-9
        assert angles.max() >= spread * torch.pi * 0.9
        # Wigner's semicircle: the median of |x| on the unit circle's half is 0.404
        assert angles.median() == pytest.approx(0.404 * spread * torch.pi, abs=0.08 * spread + 1e-9)
    for spread in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"spread: must be in \[0, 1\]"):
            unitary_(w, spread)
    with pytest.raises(ValueError, match=r"square matrices, got 0\.5 for 3 x 2"):
        unitary_(torch.empty(1, 1, 3, 2), 0.5)


def test_init_follows_the_global_seed_whatever_the_dtype():
    torch.manual_seed(3)
    double = unitary_(torch.empty(2, 2, 4, 4, dtype=torch.float64))
    assert not torch.equal(double, unitary_(torch.empty_like(double)))
    torch.manual_seed(3)
    assert torch.equal(unitary_(torch.empty(2, 2, 4, 4)), double.float())


def test_init_of_a_parameter_records_no_gradient():
    parameter = nn.Parameter(torch.empty(2, 1, 3, 3))
    assert unitary_(parameter) is parameter
    assert parameter.is_leaf


@pytest.mark.parametrize(
    ("tensor", "error", "message"),
    [
        (torch.ones(2, 2, dtype=torch.long), TypeError, "floating-point or complex .* torch.int64"),
        (torch.ones(3), ValueError, r"expected planar .* shape \(3,\)"),
        (torch.ones(3, 1, 2, 2), ValueError, r"shape \(3, 1, 2, 2\)"),
        ("w", TypeError, "expected a tensor, got str"),
    ],
    ids=["int", "vector", "three-parts", "string"],
)
def test_init_errors(tensor, error, message):
    with pytest.raises(error, match=message):
        unitary_(tensor)


# --- unitarity_penalty ---------------------------------------------------------------------------


@shapes_table
def test_penalty_equals_naive(shape):
    factors = random_factors(shape)
    assert unitarity_penalty(factors).item() == pytest.approx(naive_penalty(factors), rel=1e-13)


def test_penalty_is_a_sum_over_factors_of_any_shapes():
    factors = random_factors(*SHAPES.values(), (2, 1, 5, 5), (1, 4, 2, 2), (2, 1, 2, 2))
    penalty = unitarity_penalty(factors)
    assert penalty.shape == ()
    assert penalty.item() == pytest.approx(naive_penalty(factors), rel=1e-13)
    nested = [factors[:4], [factors[4:6], factors[6:]]]
    assert unitarity_penalty(nested).item() == pytest.approx(penalty.item(), rel=1e-14)


@shapes_table
def test_penalty_of_a_unitary_factor_is_zero(shape):
    factor = unitary_(torch.empty(shape, dtype=torch.float64))
    assert unitarity_penalty([factor]) < 1e-28
    assert unitarity_penalty([2 * factor]).item() == pytest.approx(
        9 * shape[1] * min(shape[2:]), rel=1e-12
    )


@shapes_table
def test_penalty_gradient(shape):
    factors = [w.requires_grad_() for w in random_factors(shape, (2, 1, 2, 2), shape)]
    assert torch.autograd.gradcheck(lambda *w: unitarity_penalty(w), factors)


def test_penalty_on_the_meta_device():
    penalty = unitarity_penalty([torch.empty(2, 1, 3, 3, device="meta")])
    assert penalty.is_meta
    assert penalty.shape == ()


def test_penalty_of_modules():
    layers = [Layer(0), Layer(1)]
    model = nn.Sequential(nn.Linear(2, 2), layers[0], nn.Sequential(layers[1]), layers[0])
    expected = naive_penalty(layers[0].factors()) + naive_penalty(layers[1].factors())
    assert unitarity_penalty(model).item() == pytest.approx(expected, rel=1e-13)
    assert unitarity_penalty(torch.compile(model)).item() == pytest.approx(expected, rel=1e-13)
    one = naive_penalty(layers[1].factors())
    assert unitarity_penalty(torch.compile(layers[1])).item() == pytest.approx(one, rel=1e-13)
    unitarity_penalty(model).backward()
    assert all(w.grad.norm() > 0 for layer in layers for w in layer.weights)


def test_names_are_unique_and_those_of_the_parameters():
    model = nn.Sequential(Layer(0), Layer(1))
    assert [name for name, _ in named_factors(model)] == [
        f"{layer}.{name}"
        for layer in (0, 1)
        for name in ("weights.0", "weights.1", "weights.2", "recurrent_factors[1][1]")
    ]
    assert [name for name, _ in named_factors(Layer(0))][-1] == "recurrent_factors[1][1]"


@pytest.mark.parametrize("nothing", [nn.Linear(2, 2), [], [[]]], ids=["module", "list", "nested"])
def test_penalty_of_nothing_is_zero(nothing):
    assert torch.equal(unitarity_penalty(nothing), torch.zeros(()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_penalty_is_float32_even_under_autocast(dtype):
    factors = random_factors((2, 1, 8, 8), dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        penalty = unitarity_penalty(factors)
    assert penalty.dtype == torch.float32
    assert penalty.item() == pytest.approx(naive_penalty(factors), rel=1e-6)


@pytest.mark.parametrize(
    ("factors", "error", "message"),
    [
        (torch.ones(2, 1, 2, 2), TypeError, "factors: expected a list of factors, got Tensor"),
        (["ab"], TypeError, r"factors\[0\]: expected a list of factors, got str"),
        (3, TypeError, "factors: expected a list of factors, got int"),
        (
            [torch.ones(2, 2, dtype=torch.complex64)],
            ValueError,
            r"factors\[0\]: .* planar factor .* torch.complex64 of shape \(2, 2\); .*torch.stack",
        ),
        ([[torch.ones(2, 2, 2)]], ValueError, r"factors\[0\]\[0\]: expected a planar factor"),
        ([torch.ones(2, 1, 2, 2).int()], TypeError, "floating-point"),
    ],
    ids=["tensor", "string", "int", "complex", "nested-real", "dtype"],
)
def test_penalty_errors(factors, error, message):
    with pytest.raises(error, match=message):
        unitarity_penalty(factors)


def test_examples():
    result = doctest.testmod(unitarity)
    assert result.attempted
    assert not result.failed
