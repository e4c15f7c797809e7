"""`KRULSTM` against `torch.nn.LSTM` with dense recurrent matrices, and bad arguments of its op.

`kru_lstm_scan` itself is in test_conformance.py, with what holds for every op.
"""

import copy
import pickle
import re
from functools import reduce

import pytest
import torch
from cases import DEVICE, randn
from oracle import assert_same
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

from kru_triton import KRULSTM, diagnostics, kru_lstm_scan, unitarity_penalty
from kru_triton.layers.lstm import GATES

GPU = [pytest.mark.gpu] if DEVICE == "cuda" else []
BACKENDS = ["torch", pytest.param("triton", marks=GPU)]


def make(*args, seed=0, **kwargs):
    torch.manual_seed(seed)
    lstm = KRULSTM(*args, **kwargs, dtype=torch.float64)
    with torch.no_grad():  # mistakes in a bias that starts at 0 do not show
        for name, p in lstm.named_parameters():
            if "bias" in name:
                p.uniform_(-0.5, 0.5)
    return lstm


def dense_twin(lstm):
    """The torch.nn.LSTM that computes the same, from the names and shapes of the state_dict."""
    twin = nn.LSTM(
        lstm.input_size,
        lstm.hidden_size,
        lstm.num_layers,
        bias=lstm.has_bias,
        batch_first=lstm.batch_first,
        bidirectional=lstm.bidirectional,
        dtype=torch.float64,
    )
    weights, dense = lstm.state_dict(), {}
    for suffix in sorted(n.removeprefix("weight_ih") for n in weights if "weight_ih" in n):
        dense[f"weight_ih{suffix}"] = weights[f"weight_ih{suffix}"]
        if lstm.has_bias:
            dense[f"bias_ih{suffix}"] = weights[f"bias{suffix}"]
            dense[f"bias_hh{suffix}"] = torch.zeros_like(weights[f"bias{suffix}"])
        factors = [w for n, w in weights.items() if re.fullmatch(rf"factor\d+{suffix}", n)]
        blocks = [reduce(torch.kron, [w[0, k] for w in factors]) for k in range(4 * lstm.num_heads)]
        gates = (blocks[k * lstm.num_heads : (k + 1) * lstm.num_heads] for k in range(4))
        dense[f"weight_hh{suffix}"] = torch.cat([torch.block_diag(*g) for g in gates])
    twin.load_state_dict(dense)
    return twin


MODULES = {
    "plain": dict(factors=(3, 4)),
    "layers": dict(num_layers=3, factors=(3, 4)),
    "bidirectional": dict(num_layers=2, bidirectional=True, factors=(4, 3)),
    "heads": dict(num_heads=2, factors=(2, 3), num_layers=2),
    "one factor": dict(factors=(12,)),
    "rectangular": dict(factors=((2, 3), (3, 2), (2, 2))),
    "no bias": dict(bias=False, factors=(2, 2, 3)),
    "batch first": dict(batch_first=True, bidirectional=True),
}
modules = pytest.mark.parametrize("kwargs", MODULES.values(), ids=MODULES.keys())


def data_of(x):
    return x.data if isinstance(x, PackedSequence) else x


def outputs_of(lstm, x, hx):
    output, (h_n, c_n) = lstm(x, hx)
    outputs = (data_of(output), h_n, c_n)
    loss = sum((y * randn(*y.shape, seed=9 + i)).sum() for i, y in enumerate(outputs))
    return outputs, loss


@modules
def test_equals_nn_lstm(kwargs):
    """Batched, unbatched and packed input, with and without a start; results and gradients."""
    lstm = make(5, 12, **kwargs)
    twin = dense_twin(lstm)
    rows = lstm.num_layers * lstm.num_directions
    sequences = [randn(n, 5, seed=n + i) for i, n in enumerate((2, 6, 1, 6))]
    starts = tuple(randn(rows, 4, 12, seed=s) for s in (2, 3))
    for x, hx in (
        (randn(6, 4, 5) if not lstm.batch_first else randn(4, 6, 5), starts),
        (randn(6, 5), tuple(s[:, 0] for s in starts)),
        (pack_sequence(sequences, enforce_sorted=False), starts),
        (pack_sequence(sorted(sequences, key=len, reverse=True)), starts),
    ):
        for state in (hx, None):
            leaves = [t.requires_grad_() for t in (data_of(x), *(state or ()))]
            results = []
            for layers in (lstm, twin):
                outputs, loss = outputs_of(layers, x, state)
                results.append((outputs, torch.autograd.grad(loss, leaves)))
            assert_same(results[0][0], results[1][0])
            assert_same(results[0][1], results[1][1], 1e-11)


def test_packed_sequences_come_back_as_packed():
    lstm, twin = make(5, 12), nn.LSTM(5, 12, dtype=torch.float64)
    for sort in (True, False):
        packed = pack_sequence([randn(n, 5) for n in ((6, 4, 4, 1) if sort else (2, 4, 1))], sort)
        output, (h_n, _) = lstm(packed)
        expected, _ = twin(packed)
        for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
            got, want = getattr(output, name), getattr(expected, name)
            assert got is want is None or torch.equal(got, want)
        padded, lengths = pad_packed_sequence(output)
        last = padded[lengths - 1, torch.arange(len(lengths))]
        assert_same((last,), (h_n[0],), 0)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_reset_separates_documents(bidirectional):
    """A row of three documents equals the documents run alone, in both directions."""
    lstm = make(5, 12, num_layers=2, bidirectional=bidirectional)
    x = randn(9, 1, 5)
    reset = torch.zeros(1, 9, dtype=torch.bool)
    reset[0, [0, 4, 6]] = True
    output, last = lstm(x, reset=reset)
    documents = [lstm(x[a:b]) for a, b in ((0, 4), (4, 6), (6, 9))]
    assert_same((output,), (torch.cat([y for y, _ in documents]),))
    step = lstm.num_directions
    assert_same([s[::step] for s in last], [s[::step] for s in documents[-1][1]])
    if bidirectional:  # its last step is the first of the row
        assert_same([s[1::2] for s in last], [s[1::2] for s in documents[0][1]])


def test_pieces_recompute_and_tokens_change_nothing():
    lstm = make(5, 12, num_layers=2)
    x, state, pieces = randn(9, 3, 5).requires_grad_(), None, []
    expected, loss = outputs_of(lstm, x, None)
    (gradient,) = torch.autograd.grad(loss, x)
    for piece in x.split((2, 1, 6)):
        y, state = lstm(piece, state)
        pieces.append(y)
    assert_same((torch.cat(pieces), *state), expected)
    lstm.recompute = 4
    outputs, loss = outputs_of(lstm, x, None)
    assert_same((*outputs, *torch.autograd.grad(loss, x)), (*expected, gradient))
    tokens, embedding = torch.randint(7, (9, 3)), randn(7, 5)
    by_tokens, by_rows = lstm(tokens, embedding=embedding), lstm(embedding[tokens])
    assert_same((by_tokens[0], *by_tokens[1]), (by_rows[0], *by_rows[1]))


def test_dropout_acts_between_layers_and_in_training_only():
    lstm = make(5, 12, num_layers=2, dropout=0.5)
    plain = make(5, 12, num_layers=2)
    x = randn(6, 3, 5)
    torch.manual_seed(0)
    (dropped, dropped_n, _), _ = outputs_of(lstm, x, None)
    expected, _ = outputs_of(plain, x, None)
    assert_same((dropped_n[0],), (expected[1][0],))  # before the first layer nothing is dropped
    assert (dropped - expected[0]).abs().max() > 1e-3
    assert (dropped != 0).all()  # nor after the last
    assert_same(outputs_of(lstm.eval(), x, None)[0], expected)


# Precisions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_of_the_parameters(dtype):
    """Parameters rounded to 2^-9 (bfloat16) move the state by a few times that."""
    lstm = make(3, 24, num_layers=2)
    x = randn(4, 2, 3)
    exact, _ = lstm(x)
    output, last = lstm.to(dtype)(x.to(dtype))
    assert output.dtype == dtype
    assert last[0].dtype == last[1].dtype == torch.float32
    assert (output - exact).norm() <= (1e-6 if dtype == torch.float32 else 2e-2) * exact.norm()
    lstm(x.to(dtype), last)
    (output.sum() + last[1].sum()).backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == dtype for p in lstm.parameters())


def test_under_autocast():
    torch.manual_seed(0)
    lstm = KRULSTM(3, 24, num_layers=2)
    x = torch.randn(4, 2, 3)
    exact, exact_n = lstm(x)
    with torch.autocast("cpu"):
        output, last = lstm(x)
        again, _ = lstm(x, last)
        output.float().square().sum().backward()
    assert output.dtype == again.dtype == torch.bfloat16
    assert last[0].dtype == last[1].dtype == torch.float32
    # bfloat16 projections: 2^-9 per number, over four steps and two layers
    assert (output.float() - exact).norm() < 2e-2 * exact.norm()
    for got, want in zip(last, exact_n):
        assert (got - want).norm() < 2e-2 * want.norm()
    assert all(p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in lstm.parameters())


# Attributes


def test_parameters():
    lstm = KRULSTM(3, 24, 2, factors=(2, 3), num_heads=4, bidirectional=True)
    shapes = {n: tuple(p.shape) for n, p in lstm.named_parameters() if n.endswith("_l1_reverse")}
    assert shapes == {
        "weight_ih_l1_reverse": (96, 48),
        "bias_l1_reverse": (96,),
        "factor0_l1_reverse": (1, 16, 2, 2),
        "factor1_l1_reverse": (1, 16, 3, 3),
    }
    assert lstm.num_recurrent_parameters == 2 * 2 * 4 * 4 * (4 + 9)
    assert lstm.output_size == 24
    for bias in (p for n, p in lstm.named_parameters() if "bias" in n):
        assert bias.tolist() == [0.0] * 24 + [1.0] * 24 + [0.0] * 48
    assert (
        repr(lstm)
        == "KRULSTM(3, 24, factors=(2x2, 3x3), num_heads=4, num_layers=2, bidirectional=True)"
    )


def test_recurrent_matrices_are_those_of_the_dense_twin_and_orthogonal():
    lstm = make(3, 24, 2, factors=(3, 4), num_heads=2, bidirectional=True)
    twin = dense_twin(lstm)
    for layer in range(2):
        for direction in range(2):
            suffix = f"_l{layer}" + "_reverse" * direction
            weight = getattr(twin, f"weight_hh{suffix}").view(4, 2, 12, 2, 12)
            for k, gate in enumerate(GATES):
                for head in range(2):
                    w = lstm.recurrent_matrix(gate, layer, direction, head)
                    assert_same((w,), (weight[k, head, :, head],), 1e-15)
                    assert_same((w.T @ w,), (torch.eye(12, dtype=torch.float64),))
    assert lstm.unitarity_penalty().item() < 1e-25
    with torch.no_grad():
        lstm.factor0_l1_reverse.mul_(2)  # WᵀW = 4 I: eight 3×3 factors, 3·3² each
    assert unitarity_penalty(lstm).item() == pytest.approx(8 * 27)
    assert diagnostics.spectrum(lstm.recurrent_factors(0)).abs().sub(1).abs().max() < 1e-12
    with pytest.raises(ValueError, match="gate: must be one of 'i', 'f', 'g', 'o', got 'c'"):
        lstm.recurrent_matrix("c")
    for head in (lstm.num_heads, -1):  # of the next gate, of the last one
        with pytest.raises(IndexError, match=rf"head: must be from 0 to 1, got {head}"):
            lstm.recurrent_matrix("f", head=head)


def test_gradient_reaches_every_parameter():
    lstm = make(3, 24, 2, bidirectional=True, num_heads=2)
    lstm(randn(5, 2, 3))[0].square().sum().backward()
    for name, p in lstm.named_parameters():
        assert p.grad.count_nonzero() == p.numel(), name


def test_state_dict_round_trip_copy_and_pickle():
    lstm, other = KRULSTM(3, 24), KRULSTM(3, 24)
    x = torch.randn(2, 3)
    expected, _ = lstm(x)
    assert not torch.equal(other(x)[0], expected)
    other.load_state_dict(lstm.state_dict())
    for twin in (other, copy.deepcopy(lstm), pickle.loads(pickle.dumps(lstm))):
        assert torch.equal(twin(x)[0], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_module_trains(backend):
    if backend == "triton":
        pytest.importorskip("triton")
    torch.manual_seed(0)
    lstm = KRULSTM(5, 64, backend=backend).to(DEVICE)
    x, target = torch.randn(2, 2, 5, device=DEVICE), torch.randn(2, 2, 64, device=DEVICE).tanh()
    optimizer = torch.optim.Adam(lstm.parameters(), lr=3e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = (lstm(x)[0] - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


# Errors

X, W = torch.zeros(2, 3, 48), [torch.zeros(1, 4, 4, 4), torch.zeros(1, 4, 3, 3)]
META = torch.device("meta")
ERRORS = {
    "x_proj list": (TypeError, "x_proj: must be a tensor, got list", {"x_proj": [1.0]}),
    "x_proj complex": (
        TypeError,
        "x_proj: must be planar real",
        {"x_proj": torch.zeros(2, 3, 48, dtype=torch.complex64)},
    ),
    "x_proj int": (TypeError, "x_proj: .* got torch.int64", {"x_proj": X.long()}),
    "x_proj rank": (
        ValueError,
        r"x_proj: must be \(B, T, .* got shape \(3, 48\)",
        {"x_proj": X[0]},
    ),
    "x_proj width": (
        ValueError,
        r"x_proj: the last dimension must be 1·4·12 = 48 .* got 47",
        {"x_proj": X[..., 1:]},
    ),
    "factors tensor": (TypeError, "factors: expected a sequence", {"factors": W[0]}),
    "factors empty": (ValueError, "factors: expected at least one", {"factors": []}),
    "factors complex field": (
        ValueError,
        r"factors: must be real, \(1, 4·H, P, Q\) .* got \(2, 2, 4, 4\)",
        {"factors": [w.view(2, 2, *w.shape[2:]) for w in W]},
    ),
    "factors heads": (
        ValueError,
        r"factors: must be real, \(1, 4·H, P, Q\) .* got \(1, 2, 4, 4\)",
        {"factors": [w[:, :2] for w in W], "x_proj": X[..., :24]},
    ),
    "factors gates first": (
        ValueError,
        "factors.*expected planar",
        {"factors": [w.transpose(0, 1) for w in W]},
    ),
    "factors not square": (
        ValueError,
        "factors: rows multiply to 6 and columns to 4",
        {"factors": [torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 3, 2)]},
    ),
    "factors dtype": (
        TypeError,
        "factors: must be torch.float32",
        {"factors": [w.double() for w in W]},
    ),
    "h_0 kind": (TypeError, "h_0: must be a tensor, got tuple", {"h_0": (torch.zeros(2, 12),)}),
    "h_0 shape": (
        ValueError,
        r"h_0: must have shape \(2, 12\) \(\(B, H·N\)\), got \(1, 12\)",
        {"h_0": torch.zeros(1, 12)},
    ),
    "c_0 shape": (ValueError, r"c_0: must have shape \(2, 12\)", {"c_0": torch.zeros(2, 48)}),
    "c_0 dtype": (TypeError, "c_0: must be torch.float32", {"c_0": torch.zeros(2, 12).double()}),
    "c_0 complex": (
        TypeError,
        "c_0: must be planar real",
        {"c_0": torch.zeros(2, 12, dtype=torch.complex64)},
    ),
    "c_0 device": (ValueError, "c_0: is on meta", {"c_0": torch.zeros(2, 12, device=META)}),
    "reset shape": (
        ValueError,
        r"reset: must have shape \(2, 3\)",
        {"reset": torch.zeros(3, 2, dtype=torch.bool)},
    ),
    "reset dtype": (TypeError, "reset: must be a bool tensor", {"reset": torch.zeros(2, 3)}),
    "lengths shape": (
        ValueError,
        r"lengths: must have shape \(2,\)",
        {"lengths": torch.tensor([1, 2, 3])},
    ),
    "lengths dtype": (
        TypeError,
        "lengths: must be an int64 tensor, got torch.int32",
        {"lengths": torch.tensor([1, 2]).int()},
    ),
    "lengths long": (
        ValueError,
        "lengths: must be from 0 to 3 .* from 1 to 4",
        {"lengths": torch.tensor([1, 4])},
    ),
    "lengths negative": (
        ValueError,
        "lengths: must be from 0 to 3",
        {"lengths": torch.tensor([1, -1])},
    ),
    "backend": (ValueError, "backend: must be one of", {"backend": "cuda"}),
    "precision": (ValueError, "precision: must be one of", {"precision": "fp16"}),
}


@pytest.mark.parametrize(("kind", "match", "changed"), ERRORS.values(), ids=ERRORS.keys())
def test_errors_of_the_op(kind, match, changed):
    with pytest.raises(kind, match=match):
        kru_lstm_scan(**{"x_proj": X, "factors": W, **changed})


@pytest.mark.parametrize(
    ("kind", "match", "changed"),
    [
        (TypeError, "input_size: must be an int", dict(input_size="4")),
        (ValueError, "hidden_size: expected .* at least 1", dict(hidden_size=0)),
        (ValueError, "num_heads: must divide hidden_size", dict(num_heads=5)),
        (
            ValueError,
            r"factors: the row counts multiply to 16 .* hidden_size is 12",
            dict(factors=(4, 4)),
        ),
        (ValueError, "num_layers: must be at least 1, got 0", dict(num_layers=0)),
        (ValueError, r"dropout: must be in \[0, 1\), got 1", dict(dropout=1)),
        (ValueError, "backend: must be one of", dict(backend="cuda")),
        (ValueError, "precision: must be one of", dict(precision="fp8")),
        (TypeError, "dtype: must be a real float dtype", dict(dtype=torch.complex64)),
        (TypeError, "unexpected keyword argument 'proj_size'", dict(proj_size=3)),
    ],
)
def test_errors_when_built(kind, match, changed):
    with pytest.raises(kind, match=match):
        KRULSTM(**{"input_size": 4, "hidden_size": 12, **changed})


H = torch.zeros(2, 3, 12)


@pytest.mark.parametrize(
    ("kind", "match", "hx"),
    [
        (TypeError, r"hx: must be a tuple \(h_0, c_0\), got Tensor", H),
        (TypeError, r"hx: must be a tuple \(h_0, c_0\), got 1 entries", (H,)),
        (TypeError, "h_0: must be a tensor, got list", ([0.0], H)),
        (TypeError, "c_0: must be a tensor; leave out hx for zeros", (H, None)),
        (TypeError, "c_0: must be planar real", (H, H.to(torch.complex64))),
        (ValueError, r"c_0: must have the shape of h_0, .*\[2, 3, 12\]\), got", (H, H[:1])),
        (ValueError, "c_0: must have the dtype of h_0, torch.float32, got", (H, H.double())),
        (ValueError, "c_0: must have the device of h_0, cpu, got meta", (H, H.to(META))),
        (ValueError, "h_0: the last dimension must be hidden_size=12", (H[..., 1:],) * 2),
        (ValueError, r"h_0: must have shape \(2, 3, 12\) .* got \(1, 3, 12\)", (H[:1],) * 2),
        (TypeError, "h_0: must be torch.float32", (H.double(),) * 2),
    ],
)
def test_errors_of_hx(kind, match, hx):
    lstm, x = KRULSTM(4, 12, 2), torch.zeros(5, 3, 4)
    for given in (x, pack_sequence(list(x.unbind(1)))):
        with pytest.raises(kind, match=match):
            lstm(given, hx)


def test_backend_triton_raises_the_reason():
    lstm = KRULSTM(3, 12, backend="triton", dtype=torch.float64)
    with pytest.raises(RuntimeError, match='backend="triton" cannot run here: '):
        lstm(torch.zeros(2, 3).double())


def test_errors_of_calls():
    lstm, x = KRULSTM(4, 12), torch.zeros(5, 3, 4)
    with pytest.raises(TypeError, match="input: must be a tensor"):
        lstm([1.0])
    with pytest.raises(ValueError, match="input: the last dimension must be input_size=4, got 3"):
        lstm(x[..., 1:])
    with pytest.raises(ValueError, match=r"h_0: must have shape \(1, 12\) .* got \(2, 12\)"):
        lstm(x[:, 0], (H[:, 0], H[:, 0]))
    with pytest.raises(ValueError, match=r"reset: must have shape \(3, 5\)"):
        lstm(x, reset=torch.zeros(5, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="reset: not with a PackedSequence"):
        lstm(pack_sequence([x[:, 0]]), reset=torch.zeros(1, 5, dtype=torch.bool))
