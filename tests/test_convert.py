"""`from_torch`: Kronecker weights come over exactly, others as their nearest product."""

import pytest
import torch
from torch import nn

from kru_triton import KRU, KRULSTM, from_torch, kron_dense, nearest_kronecker, unitary_

KINDS = {nn.RNN: (KRU, 1), nn.LSTM: (KRULSTM, 4)}


def kronecker_rnn(kind, factors=(2, 3), heads=1, **options):
    """An rnn whose recurrent matrices are block-diagonal with Kronecker products."""
    torch.manual_seed(0)
    size = heads * torch.Size(factors).numel()
    rnn = kind(5, size, dtype=torch.float64, **options)
    for name, weight in rnn.named_parameters():
        if name.startswith("weight_hh"):
            gates = [
                torch.block_diag(
                    *(kron_dense([torch.randn(p, p) / p for p in factors]) for _ in range(heads))
                )
                for _ in range(KINDS[kind][1])
            ]
            weight.data.copy_(torch.cat(gates))
    return rnn


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("heads", "options"),
    [
        (1, {}),
        (2, {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.5}),
        (3, {"bias": False}),
    ],
)
def test_kronecker_weights_come_over_exactly(kind, heads, options):
    rnn = kronecker_rnn(kind, heads=heads, **options).eval()
    layers = from_torch(rnn, (2, 3), num_heads=heads)
    assert type(layers) is KINDS[kind][0]
    assert not layers.training
    x = torch.randn(4, 7, 5, dtype=torch.float64)
    start = torch.randn(rnn(x)[0].shape[-1] // rnn.hidden_size * rnn.num_layers, 1, 1)
    start = start.expand(-1, 4 if rnn.batch_first else 7, rnn.hidden_size).double()
    hx = (start, -start) if kind is nn.LSTM else start
    for got, want in zip(_flat(layers(x, hx)), _flat(rnn(x, hx))):
        torch.testing.assert_close(got, want)


def _flat(results):
    output, last = results
    return [output, *(last if isinstance(last, tuple) else (last,))]


def test_relu_and_packed_input():
    rnn = kronecker_rnn(nn.RNN, nonlinearity="relu")
    x = torch.randn(6, 3, 5, dtype=torch.float64)
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([6, 4, 1]))
    torch.testing.assert_close(from_torch(rnn, (2, 3))(packed)[0].data, rnn(packed)[0].data)


def test_a_dense_matrix_comes_over_as_its_nearest_product():
    rnn = nn.RNN(5, 12)
    unitary_(rnn.weight_hh_l0.data.view(1, 1, 12, 12))
    kru = from_torch(rnn, (3, 4))
    nearest = kron_dense(nearest_kronecker(rnn.weight_hh_l0.data, (3, 4)))
    torch.testing.assert_close(kru.recurrent_matrix(), nearest)
    left = ((kru.recurrent_matrix() - rnn.weight_hh_l0).norm() / rnn.weight_hh_l0.norm()).item()
    assert 0.5 < left < 0.999  # a random orthogonal matrix is far from any product
    kru(torch.randn(4, 2, 5))[0].square().sum().backward()
    assert all(p.grad is not None for p in kru.parameters())
    assert rnn.weight_hh_l0.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_weights_stay_frozen(kind):
    rnn = kind(5, 12, 2, bidirectional=True).requires_grad_(False)
    assert not any(p.requires_grad for p in from_torch(rnn).parameters())
    for name in ("weight_ih_l0", "weight_hh_l1", "bias_ih_l0_reverse", "bias_hh_l1_reverse"):
        getattr(rnn, name).requires_grad_()
    trainable = [n for n, p in from_torch(rnn).named_parameters() if p.requires_grad]
    assert sorted(trainable) == sorted(
        ["weight_ih_l0", "factor0_l1", "factor1_l1", "bias_l0_reverse", "bias_l1_reverse"]
    )


def test_a_parametrized_weight_is_as_trainable_as_what_makes_it():
    rnn = nn.utils.parametrizations.weight_norm(nn.RNN(5, 12), "weight_hh_l0")
    assert all(p.requires_grad for p in from_torch(rnn).parameters())
    rnn.parametrizations.weight_hh_l0.requires_grad_(False)
    frozen = [n for n, p in from_torch(rnn).named_parameters() if not p.requires_grad]
    assert frozen == ["factor0_l0", "factor1_l0"]


@pytest.mark.parametrize(
    ("rnn", "options", "error", "message"),
    [
        (nn.GRU(4, 6), {}, TypeError, "got GRU"),
        (nn.LSTM(4, 6, proj_size=2), {}, ValueError, "proj_size=2"),
        (nn.RNN(4, 6), {"factors": (2, 2)}, ValueError, "choose shapes whose products"),
        (nn.RNN(4, 6), {"num_heads": 4}, ValueError, "must divide hidden_size"),
    ],
)
def test_what_cannot_be_converted(rnn, options, error, message):
    with pytest.raises(error, match=message):
        from_torch(rnn, **options)
