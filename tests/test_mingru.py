"""minGRU against the plain loop over time, in float64."""

import pytest
import torch
import torch.nn.functional as nnf
from torch.nn.utils.rnn import pack_sequence

from kru_triton.layers import mingru
from kru_triton.layers.mingru import MinGRU, diagonal_scan
from kru_triton.lm.model import LanguageModel, LanguageModelConfig

scans = pytest.mark.parametrize("scan", [mingru._in_turn, mingru._in_pairs])


def by_steps(layers, x, h_0, reset):
    """The definition, one step after another: outputs of the last layer, and the last states."""
    last = []
    for layer in range(layers.num_layers):
        weight, bias = (getattr(layers, f"{kind}_ih_l{layer}") for kind in ("weight", "bias"))
        h, outputs = h_0[layer], []
        for t, x_t in enumerate(x.unbind(0)):
            h = torch.where(reset[:, t, None], 0, h)
            gate, v = nnf.linear(x_t, weight, bias).chunk(2, -1)
            z = gate.sigmoid()
            h = (1 - z) * h + z * torch.where(v >= 0, v + 0.5, v.sigmoid())
            outputs.append(h)
        x = torch.stack(outputs)
        last.append(h)
    return x, torch.stack(last)


@scans
@pytest.mark.parametrize("time", [1, 2, 3, 7, 8, 21])
def test_layers_equal_the_loop_with_every_gradient(scan, time, monkeypatch):
    monkeypatch.setattr(mingru, "_scan", scan)
    torch.manual_seed(time)
    layers = MinGRU(3, 4, num_layers=2).double()
    x = torch.randn(time, 2, 3, dtype=torch.float64, requires_grad=True)
    h_0 = torch.randn(2, 2, 4, dtype=torch.float64, requires_grad=True)
    reset = torch.rand(2, time) < 0.3
    reset[1, 0] = True
    leaves = [x, h_0, *layers.parameters()]
    results = []
    for run in (layers, lambda *arguments: by_steps(layers, *arguments)):
        output, h_n = run(x, h_0, reset)
        weights = (torch.linspace(-1, 2, t.numel()).view_as(t) for t in (output, h_n))
        loss = sum((w * t).sum() for w, t in zip(weights, (output, h_n)))
        results.append([output, h_n, *torch.autograd.grad(loss, leaves)])
    for got, expected in zip(*results, strict=True):
        assert (got - expected).abs().max() < 1e-12 * (1 + expected.abs().max())


@scans
def test_a_scan_holds_where_products_of_gates_vanish(scan, monkeypatch):
    """Float32 over steps whose product is far below what it can hold, and gates that are shut."""
    monkeypatch.setattr(mingru, "_scan", scan)
    torch.manual_seed(0)
    a = torch.rand(1000, 5) ** 4
    a[100::70] = 0
    b, h = torch.randn(1000, 5), torch.full((5,), 1e30, dtype=torch.float64)
    got, expected = diagonal_scan(a, b, h.float()), []
    for a_t, b_t in zip(a.double(), b.double()):
        h = a_t * h + b_t
        expected.append(h)
    torch.testing.assert_close(got.double(), torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_the_candidate_of_the_paper_is_positive_and_continuous():
    torch.manual_seed(0)
    layers = MinGRU(1, 1).double()
    with torch.no_grad():
        layers.weight_ih_l0[:] = torch.tensor([[0.0], [1.0]])
        layers.bias_ih_l0[:] = torch.tensor([50.0, 0.0])  # z = 1: h is the candidate
    v = torch.tensor([-30.0, -1e-9, 0.0, 2.0], dtype=torch.float64)
    output, _ = layers(v[:, None, None])
    expected = torch.tensor([9.357622968839299e-14, 0.5, 0.5, 2.5], dtype=torch.float64)
    torch.testing.assert_close(output.flatten(), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layers_in_half_precision(dtype):
    torch.manual_seed(0)
    layers, x, h_0 = MinGRU(3, 8, num_layers=2), torch.randn(9, 2, 3), torch.rand(2, 2, 8)
    exact, exact_n = layers(x, h_0)
    output, h_n = layers.to(dtype)(x.to(dtype), h_0)
    assert output.dtype == h_n.dtype == torch.float32
    # weights, inputs and gates rounded to 2^-9, in two layers
    assert (output - exact).norm() < 2e-2 * exact.norm()
    assert (h_n - exact_n).norm() < 2e-2 * exact_n.norm()


@pytest.mark.parametrize(
    ("match", "x", "options"),
    [
        (r"input: must be \(T, B, D\) .* got shape \(5, 4\)", torch.ones(5, 4), {}),
        (r"input: must be .* at least one step, got shape \(0, 3, 4\)", torch.ones(0, 3, 4), {}),
        ("input: the last dimension must be input_size=4, got 3", torch.ones(5, 3, 3), {}),
        (r"h_0: must have shape \(2, 3, 6\)", torch.ones(5, 3, 4), {"h_0": torch.ones(1, 1, 6)}),
        (r"reset: must have shape \(3, 5\)", torch.ones(5, 3, 4), {"reset": torch.ones(5, 3) < 0}),
    ],
    ids=["unbatched", "no step", "width", "h_0", "reset"],
)
def test_errors_of_shapes(match, x, options):
    with pytest.raises(ValueError, match=match):
        MinGRU(4, 6, num_layers=2)(x, **options)


@pytest.mark.parametrize(
    ("match", "x", "options"),
    [
        ("input: must be a tensor, got PackedSequence", pack_sequence([torch.ones(5, 4)]), {}),
        (r"input: must be torch\.float32 like the parameters", torch.ones(5, 3, 4).double(), {}),
        (r"h_0: must be torch\.float32", torch.ones(5, 3, 4), {"h_0": torch.ones(1, 3, 6).long()}),
        ("reset: must be a bool tensor", torch.ones(5, 3, 4), {"reset": torch.ones(3, 5)}),
    ],
    ids=["packed", "dtype", "h_0", "reset"],
)
def test_errors_of_kinds(match, x, options):
    with pytest.raises(TypeError, match=match):
        MinGRU(4, 6)(x, **options)


def test_errors_when_built():
    for name in ("input_size", "hidden_size", "num_layers"):
        with pytest.raises(ValueError, match=f"{name}: must be at least 1, got 0"):
            MinGRU(**{"input_size": 4, "hidden_size": 6, name: 0})


def test_single_steps_of_a_model_equal_one_pass():
    torch.manual_seed(0)
    config = LanguageModelConfig(model="mingru", vocab_size=11, d_model=8, hidden_size=6)
    lm = LanguageModel(config).double().eval()
    tokens = torch.randint(11, (2, 9))
    whole, state = lm(tokens)
    step, logits = None, []
    with torch.no_grad(), lm.decoding():
        for t in range(9):
            out, step = lm(tokens[:, t : t + 1], step)
            logits.append(out)
    assert (torch.cat(logits, 1) - whole).abs().max() < 1e-12
    for a, b in zip(state, step, strict=True):
        assert (a - b).abs().max() < 1e-12
        assert a.untyped_storage().nbytes() <= 2 * a.numel() * 8  # no sequence behind it
