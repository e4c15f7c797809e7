"""`kru_linear_scan`: what is its own; see test_conformance.py for what holds for every op."""

import pytest
import torch
from cases import DEVICE, Case, gradients, run, square
from oracle import assert_close, relative_error

from kru_triton import KRU, kru_linear_scan, kru_scan, unitary_
from kru_triton.lm.model import LanguageModel, LanguageModelConfig


@pytest.mark.parametrize(
    "kind", ["unitary", "shrinking", "growing", "defective", "nilpotent", "unbalanced"]
)
def test_float32_is_as_near_to_float64_as_the_loop_is(kind):
    """Eigenvectors would not do for the defective ones: A has a single one."""
    torch.manual_seed(0)
    jordan = torch.diag_embed(torch.ones(3), 1)
    a, b = unitary_(torch.empty(1, 1, 4, 4)), unitary_(torch.empty(1, 1, 5, 5))
    a, b = {
        "unitary": (a, b),
        "shrinking": (0.3 * a, 0.3 * b),  # W^64 underflows
        "growing": (1.06 * a, b),  # by 1e13 in 512 steps
        "defective": (0.9 * torch.eye(4) + 0.1 * jordan, b),
        "nilpotent": (jordan, b),
        "unbalanced": (1e4 * a, 1e-4 * b),  # A^16 alone overflows
    }[kind]
    a = a.view(1, 1, 4, 4)
    x = torch.randn(2, 512, 20)
    dh = torch.randn_like(x)

    def results(scan, dtype, **options):
        arguments = {"x_proj": x.to(dtype), "factors": [a.to(dtype), b.to(dtype)]}
        return gradients(lambda **kwargs: scan(**kwargs, **options), arguments, {"h": dh})

    exact = results(kru_scan, torch.float64, nonlinearity="identity")
    loop = results(kru_scan, torch.float32, nonlinearity="identity")
    blocks = results(kru_linear_scan, torch.float32)
    for name, want in exact.items():
        errors = [relative_error(r[name], want) for r in (blocks, loop)]
        assert errors[0] <= 2 * errors[1] + 1e-6, (name, errors)


@pytest.mark.parametrize("block", [None, 4])
def test_blocks_of_several_steps_on_the_kernels(block):
    """Each pass is the kernel of `kru_scan`; products of bfloat16 pairs, as in test_kernels."""
    pytest.importorskip("triton")
    case = Case(square(8, 8), "identity", "linear_scan", T=9, reset=True, lengths=(9, 4, 0))
    options = {"device": DEVICE, "block": block, "backend": "triton"}
    results = run(kru_linear_scan, case, torch.float32, **options)
    assert_close(results, run(kru_linear_scan, case), 1e-4)


def test_bfloat16_rounds_once_per_pass():
    case = Case(square(4, 4), "identity", "linear_scan", B=2, T=64)

    def under_autocast(**arguments):
        with torch.autocast("cpu", torch.bfloat16):
            h, h_n = kru_linear_scan(**arguments)
        assert h.dtype == torch.bfloat16
        assert h_n.dtype == torch.float32
        return h.float(), h_n

    actual, expected = (run(f, case, torch.float32) for f in (under_autocast, kru_linear_scan))
    assert_close(actual, expected, 2e-2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"block": 0}, ValueError, "at least 1 step, got 0"),
        ({"block": 2.0}, TypeError, "must be an int or None, got float"),
        ({"h_0": torch.zeros(2, 5)}, ValueError, "h_0: must have shape"),
        ({"lengths": torch.tensor([1, 99])}, ValueError, "from 0 to 9"),
    ],
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        kru_linear_scan(torch.zeros(2, 9, 8), [torch.zeros(2, 1, 4, 4)], **change)


def test_a_layer_in_parallel_over_time_is_the_same_layer():
    torch.manual_seed(0)
    options = {"num_layers": 2, "bidirectional": True, "nonlinearity": "identity"}
    layer = KRU(5, 6, **options).double()
    parallel = KRU(5, 6, **options, time_parallel=True).double()
    parallel.load_state_dict(layer.state_dict())
    x = torch.randn(21, 3, 5, dtype=torch.float64)
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor([21, 8, 3]))
    reset = torch.rand(3, 21) < 0.2
    table, tokens = torch.randn(7, 5, dtype=torch.float64), torch.randint(7, (21, 3))
    for arguments, kwargs in (
        ((x,), {"reset": reset}),
        ((packed,), {}),
        ((tokens,), {"embedding": table}),
    ):
        (got, got_n), (want, want_n) = (m(*arguments, **kwargs) for m in (parallel, layer))
        got, want = (getattr(y, "data", y) for y in (got, want))
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(got_n, want_n)


def test_a_language_model_in_parallel_over_time_is_the_same_model():
    torch.manual_seed(0)
    config = {"d_model": 8, "hidden_size": 6, "nonlinearity": "identity", "radius": 0.95}
    models = [
        LanguageModel(LanguageModelConfig(**config, time_parallel=t)).double()
        for t in (True, False)
    ]
    models[0].load_state_dict(models[1].state_dict())
    tokens, reset = torch.randint(257, (2, 33)), torch.rand(2, 33) < 0.1
    gradients = []
    for model in models:
        logits, state = model(tokens, reset=reset)
        loss = logits.logsumexp(-1).sum() + sum(s.square().sum() for s in state)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for got, want in zip(*gradients):
        torch.testing.assert_close(got, want)


def test_only_a_linear_recurrence_runs_in_parallel_over_time():
    with pytest.raises(ValueError, match=r"time_parallel: only .* got 'modrelu'"):
        KRU(4, 4, time_parallel=True)
    with pytest.raises(ValueError, match=r"time_parallel: only .* got 'rotation'"):
        KRU(4, 4, nonlinearity="identity", state_gate="rotation", time_parallel=True)
    with pytest.raises(TypeError, match="time_parallel: must be a bool, got int"):
        KRU(4, 4, nonlinearity="identity", time_parallel=1)
