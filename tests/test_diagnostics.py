"""Diagnostics against dense complex128, and the figures against the numbers they draw."""

import doctest
import io
import subprocess
import sys

import pytest
import torch
from torch import nn

from kru_triton import diagnostics
from kru_triton.diagnostics import (
    gradient_norm_by_lag,
    gradient_norm_figure,
    singular_value_figure,
    singular_values,
    spectrum,
    spectrum_figure,
    unitarity_error,
    unitarity_figure,
)
from kru_triton.layers.kru import KRU, KRUCell
from kru_triton.layers.lstm import KRULSTM
from kru_triton.unitarity import unitarity_penalty, unitary_

SHAPES = {
    "one-5": [(5, 5)],
    "3x5": [(3, 3), (5, 5)],
    "seven-2x2": [(2, 2)] * 7,
    "rectangular-groups": [(2, 3), (3, 2), (4, 4)],
    "rectangular-dense": [(2, 4), (3, 3), (4, 2)],
}
shapes_table = pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())


def make(shapes, parts=2, heads=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(parts, heads, p, q, dtype=dtype, generator=generator) for p, q in shapes]


def dense(factors, head):
    """One head's matrix in complex128, by torch.kron."""
    W = torch.ones(1, 1, dtype=torch.complex128)
    for w in factors:
        W = torch.kron(W, w[0, head] + 1j * w[1, head] if len(w) == 2 else w[0, head])
    return W


def distance(a, b):
    """How far the multisets `a` and `b` of eigenvalues are apart: each point to its nearest."""
    gaps = (a[:, None] - b[None, :]).abs()
    return max(gaps.min(0).values.max(), gaps.min(1).values.max()).item()


# --- unitarity_error -----------------------------------------------------------------------------


def test_unitarity_error_is_per_factor_and_head():
    factors = make([(3, 3), (5, 2), (2, 5)])
    errors = unitarity_error(factors)
    assert list(errors) == ["factors[0]", "factors[1]", "factors[2]"]
    for w, error in zip(factors, errors.values()):
        assert error.shape == (2,)
        for head in range(2):
            W = w[0, head] + 1j * w[1, head]
            gram = W.mH @ W if len(W) >= W.shape[1] else W @ W.mH
            expected = torch.linalg.norm(gram - torch.eye(len(gram)))
            torch.testing.assert_close(error[head], expected.real)
    squares = sum(error.square().sum() for error in errors.values())
    torch.testing.assert_close(squares, unitarity_penalty(factors))


# --- spectrum and singular values ----------------------------------------------------------------


@shapes_table
@pytest.mark.parametrize("parts", [2, 1])
def test_spectrum_equals_dense(shapes, parts):
    factors = make(shapes, parts)
    eigenvalues = spectrum(factors)
    size = len(dense(factors, 0))
    assert eigenvalues.shape == (2, size)
    assert eigenvalues.dtype == torch.complex128
    for head in range(2):
        W = dense(factors, head)
        # The dense matrix is not normal: its own eigenvalues carry the larger rounding error.
        assert distance(eigenvalues[head], torch.linalg.eigvals(W)) < 1e-10 * W.norm()
        torch.testing.assert_close(eigenvalues[head].sum(), W.trace(), rtol=1e-10, atol=1e-10)


def test_spectrum_of_plain_matrices():
    a, b = (torch.randn(n, n, dtype=torch.complex64) for n in (2, 3))
    assert spectrum([a, b]).shape == (6,)
    assert spectrum([a[None], b[None]]).shape == (1, 6)
    W = torch.kron(a, b).to(torch.complex128)
    assert distance(spectrum([a, b]), torch.linalg.eigvals(W)) < 1e-5 * W.norm()


def test_spectrum_is_exact_at_any_size():
    factors = [unitary_(torch.empty(2, 1, 32, 32, dtype=torch.float64)) for _ in range(3)]
    moduli = spectrum(factors).abs()  # dense: 32768 x 32768
    torch.testing.assert_close(moduli, torch.ones_like(moduli), rtol=1e-12, atol=0)


@shapes_table
@pytest.mark.parametrize("parts", [2, 1])
def test_singular_values_equal_dense(shapes, parts):
    factors = make(shapes, parts)
    values = singular_values(factors)
    assert values.dtype == torch.float64
    for head in range(2):
        expected = torch.linalg.svdvals(dense(factors, head))
        torch.testing.assert_close(values[head], expected, rtol=1e-12, atol=1e-12 * expected[0])


def test_singular_values_of_a_matrix_that_is_not_square():
    factors = make([(2, 3), (5, 4)])
    for head in range(2):
        expected = torch.linalg.svdvals(dense(factors, head))
        torch.testing.assert_close(singular_values(factors)[head], expected, rtol=1e-12, atol=1e-12)
    assert singular_values([torch.ones(2, 3)]).shape == (2,)


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        ([(2, 3), (2, 2)], {}, r"4 x 6 \(shapes \(2, 3\), \(2, 2\)\); use singular_values"),
        (
            [(3, 3), (2, 4), (4, 2)],
            {"max_size": 7},
            r"shapes \(2, 4\), \(4, 2\) form a dense 8 x 8 matrix, above max_size=7; use smaller",
        ),
    ],
    ids=["not-square", "too-large"],
)
def test_spectrum_errors(shapes, options, message):
    with pytest.raises(ValueError, match=message):
        spectrum(make(shapes), **options)


# --- gradient norm -------------------------------------------------------------------------------


class OneLayer(nn.Module):
    """What `gradient_norm_by_lag` asks of a KRU, and nothing else."""

    def __init__(self, nonlinearity, features=2, shapes=((2, 2), (3, 3)), scale=0.6):
        super().__init__()
        self.nonlinearity, self.batch_first = nonlinearity, True
        self.factors = nn.ParameterList(scale * w for w in make(shapes))
        F = 2 * 2 * dense(self.factors, 0).shape[0]
        generator = torch.Generator().manual_seed(1)
        self.U = nn.Parameter(torch.randn(features, F, dtype=torch.float64, generator=generator))
        self.b = nn.Parameter(torch.randn(F // 2, dtype=torch.float64, generator=generator))

    def input_projection(self, x, layer=0, direction=0):
        return x @ self.U

    def gate_projection(self, x, layer=0, direction=0):
        return None

    def recurrent_factors(self, layer=0, direction=0):
        return list(self.factors)

    def beta(self, layer=0, direction=0):
        return self.b if self.nonlinearity == "modrelu" else None


def naive_norms(kru, x, h_0, cotangent):
    """Norms by lag, from a loop of dense complex128 steps under autograd."""
    x_proj = x @ kru.U.detach()
    B, T, F = x_proj.shape
    W = torch.block_diag(*(dense(kru.factors, head).detach() for head in range(2)))
    h = torch.zeros(B, F, dtype=torch.float64) if h_0 is None else h_0[0]
    h.requires_grad_()
    states = []
    for t in range(T):
        planar = h + 0  # the whole of h_t, so that its gradient is the total one
        z = torch.complex(*planar.chunk(2, -1)) @ W.T + torch.complex(*x_proj[:, t].chunk(2, -1))
        if kru.nonlinearity == "modrelu":
            z = torch.relu(z.abs() + kru.b.detach()) * z / z.abs()
        if kru.nonlinearity == "tanh":
            z = torch.complex(z.real.tanh(), z.imag.tanh())
        h = torch.cat([z.real, z.imag], -1)
        states.append(h)
    steps = cotangent.shape[1]
    loss = (torch.stack(states[-steps:], 1) * cotangent).sum()
    return torch.stack([g.norm() for g in reversed(torch.autograd.grad(loss, states))])


@pytest.mark.parametrize("nonlinearity", ["modrelu", "tanh", "identity"])
@pytest.mark.parametrize(("T", "steps"), [(1, 1), (7, 1), (7, 3), (7, 7)])
@pytest.mark.parametrize("with_h_0", [False, True], ids=["zero", "h_0"])
def test_gradient_norm_equals_naive(nonlinearity, T, steps, with_h_0):
    kru = OneLayer(nonlinearity)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, T, 2, dtype=torch.float64, generator=generator)
    h_0 = torch.randn(1, 3, 24, dtype=torch.float64, generator=generator) if with_h_0 else None
    cotangent = torch.randn(3, steps, 24, dtype=torch.float64, generator=generator)
    lags, norms = gradient_norm_by_lag(kru, x, h_0, readout_steps=steps, cotangent=cotangent)
    assert torch.equal(lags, torch.arange(T))
    expected = naive_norms(kru, x, h_0, cotangent)
    torch.testing.assert_close(norms, expected, rtol=1e-10, atol=0)
    _, relative = gradient_norm_by_lag(
        kru, x, h_0, readout_steps=steps, cotangent=cotangent, relative=True
    )
    torch.testing.assert_close(relative, expected / expected[0], rtol=1e-10, atol=0)
    assert all(p.grad is None for p in kru.parameters())


def test_gradient_norm_of_a_unitary_linear_recurrence_is_constant():
    kru = OneLayer("identity")
    for w in kru.factors:
        unitary_(w)
    with torch.no_grad():  # works where gradients are off, too
        _, norms = gradient_norm_by_lag(kru, torch.randn(2, 40, 2).double(), relative=True)
    torch.testing.assert_close(norms, torch.ones(40, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("field", ["complex", "real"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_gradient_norm_of_a_module(field, batch_first):
    kru = KRU(
        3, 12, factors=(2, 3), num_heads=2, field=field, nonlinearity="identity",
        batch_first=batch_first, dtype=torch.float64,
    )  # fmt: skip
    x = torch.randn(2, 9, 3, dtype=torch.float64)
    h_0 = torch.randn(1, 2, kru.output_size, dtype=torch.float64)
    lags, norms = gradient_norm_by_lag(kru, x if batch_first else x.transpose(0, 1), h_0)
    assert torch.equal(lags, torch.arange(9))
    torch.testing.assert_close(norms, norms[:1].expand(9), rtol=1e-12, atol=0)
    assert list(unitarity_error(kru)) == ["factor0_l0", "factor1_l0"]


@pytest.mark.parametrize("with_start", [False, True], ids=["zero", "h_0, c_0"])
def test_gradient_norm_of_an_lstm(with_start):
    """Against the Jacobian of the rest of the run in (h_t, c_t), as they enter it."""
    torch.manual_seed(0)
    lstm = KRULSTM(3, 12, factors=(3, 2), num_heads=2, batch_first=True, dtype=torch.float64)
    x, on_h = torch.randn(2, 6, 3, dtype=torch.float64), torch.randn(2, 2, 12, dtype=torch.float64)
    start = tuple(torch.randn(1, 2, 12, dtype=torch.float64) for _ in range(2))
    start = start if with_start else None
    lags, norms = gradient_norm_by_lag(lstm, x, start, readout_steps=2, cotangent=on_h)
    assert torch.equal(lags, torch.arange(6))
    assert all(p.grad is None for p in lstm.parameters())
    for t in range(6):
        with torch.no_grad():
            output, state = lstm(x[:, : t + 1], start)
        h, c = (s.requires_grad_() for s in state)
        rest = [h[0][:, None]]
        if t < 5:
            rest.append(lstm(x[:, t + 1 :], (h, c))[0])
        seen = torch.cat([output[:, :-1], *rest], 1)[:, -2:]
        gradient = torch.autograd.grad((seen * on_h).sum(), (h, c), materialize_grads=True)
        expected = torch.cat([g.flatten() for g in gradient]).norm()
        torch.testing.assert_close(norms[5 - t], expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("start", [torch.ones(1, 2, 12), (torch.ones(1, 2, 12),)])
def test_gradient_norm_of_an_lstm_wants_both_initial_states(start):
    with pytest.raises(TypeError, match=r"h_0: must be a tuple \(h_0, c_0\) for a KRULSTM"):
        gradient_norm_by_lag(KRULSTM(3, 12, batch_first=True), torch.ones(2, 5, 3), start)


def test_gradient_norm_depends_on_the_seed_only_through_the_cotangent():
    kru, x = OneLayer("tanh"), torch.randn(2, 5, 2, dtype=torch.float64)
    first, same, other = (gradient_norm_by_lag(kru, x, seed=seed)[1] for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": 1}, r"first layer's forward direction \(0, 0\) is supported, got \(1, 0\)"),
        ({"direction": 1}, r"got \(0, 1\)"),
        ({"x": torch.ones(5, 2)}, r"x: must have shape \(B, T, D\), got \(5, 2\)"),
        ({"readout_steps": 0}, "readout_steps: must be 1 … T = 5, got 0"),
        ({"readout_steps": 6}, "readout_steps: must be 1 … T = 5, got 6"),
        ({"h_0": torch.ones(3, 24)}, r"h_0: .* \(…, 3, 24\), got \(3, 24\)"),
        ({"h_0": torch.ones(1, 3, 12)}, r"h_0: .* \(…, 3, 24\), got \(1, 3, 12\)"),
        ({"cotangent": torch.ones(3, 24)}, r"cotangent: .* \(3, 1, 24\), got \(3, 24\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_gradient_norm_errors(arguments, message):
    arguments = {"x": torch.ones(3, 5, 2, dtype=torch.float64), **arguments}
    with pytest.raises(ValueError, match=message):
        gradient_norm_by_lag(OneLayer("tanh"), **arguments)


def test_what_is_no_layer_and_what_holds_no_factor():
    with pytest.raises(TypeError, match="kru: must be a KRU or a KRULSTM, got KRUCell"):
        gradient_norm_by_lag(KRUCell(3, 12), torch.ones(2, 5, 3))
    with pytest.raises(TypeError, match=r"got KRU; of a layer write kru\.recurrent_factors\(0\)"):
        spectrum(KRU(3, 12))
    with pytest.raises(ValueError, match="module_or_factors: must hold Kronecker factors"):
        unitarity_figure(nn.Linear(2, 2))


# --- figures -------------------------------------------------------------------------------------


def figures():
    factors = make([(3, 3), (5, 5)], heads=2)
    return {
        "unitarity": unitarity_figure(factors),
        "spectrum": spectrum_figure(factors),
        "singular values": singular_value_figure(factors),
        "gradient norm": gradient_norm_figure(torch.arange(9), 0.5 ** torch.arange(9)),
    }


def test_figures_are_titled_labelled_and_drawn():
    pytest.importorskip("matplotlib")
    for name, figure in figures().items():
        (axes,) = figure.axes
        assert axes.get_title(), name
        assert axes.get_xlabel(), name
        assert axes.get_ylabel() or name == "unitarity"  # its rows are named instead
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        assert buffer.getvalue().startswith(b"\x89PNG")


def test_figures_show_the_numbers():
    pytest.importorskip("matplotlib")
    factors = make([(3, 3), (5, 5)], heads=2)
    lines = unitarity_figure(factors).axes[0].lines
    for line, error in zip(lines, unitarity_error(factors).values(), strict=True):
        assert line.get_xdata().tolist() == error.tolist()

    circle, *heads = spectrum_figure(factors).axes[0].lines
    assert len(circle.get_xdata()) > 100
    for line, values in zip(heads, spectrum(factors), strict=True):
        assert torch.equal(torch.complex(*map(torch.as_tensor, line.get_data())), values)

    _, *heads = singular_value_figure(factors).axes[0].lines
    for line, values in zip(heads, singular_values(factors), strict=True):
        assert torch.equal(torch.as_tensor(line.get_ydata()), values)

    norms = torch.tensor([1.0, 0.1, 0.0], dtype=torch.float64)
    axes = gradient_norm_figure(torch.arange(3), norms).axes[0]
    drawn = torch.as_tensor(axes.lines[0].get_ydata())
    assert torch.equal(drawn[:2], norms[:2])
    assert drawn[2].isnan()
    assert axes.get_yscale() == "log"


def test_figures_of_plain_and_many_headed_factors():
    pytest.importorskip("matplotlib")
    for figure in (spectrum_figure, singular_value_figure):
        assert len(figure([torch.eye(3)]).axes[0].lines) == 2
        axes = figure(make([(2, 2)], heads=12)).axes[0]
        assert len(axes.lines) == 13
        assert axes.get_legend() is None


def test_figures_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RuntimeError, match=r"need matplotlib; .*pip install 'kru-triton\[plot\]'"):
        gradient_norm_figure(torch.arange(2), torch.ones(2))


def test_matplotlib_is_imported_late_and_pyplot_never():
    pytest.importorskip("matplotlib")
    code = (
        "import sys, torch, kru_triton.diagnostics as d\n"
        "assert 'matplotlib' not in sys.modules\n"
        "d.spectrum_figure([torch.eye(2)])\n"
        "assert 'matplotlib' in sys.modules\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_examples():
    pytest.importorskip("matplotlib")
    result = doctest.testmod(diagnostics)
    assert result.attempted
    assert not result.failed
