"""`KRU` and `KRUCell` against a loop over layers, directions and time on dense matrices."""

import copy
import pickle
import re
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch
from cases import randn
from oracle import assert_same
from torch import nn
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
)

from kru_triton import KRU, KRULSTM, KRUCell, kru_step, unitarity_penalty
from kru_triton.layers import kru as modules
from kru_triton.layers.mingru import MinGRU
from kru_triton.nonlinearity import NONLINEARITIES


def make(*args, seed=0, **kwargs):
    torch.manual_seed(seed)
    kru = KRU(*args, **kwargs).double()
    with torch.no_grad():  # beta and bias start at 0, where mistakes in them do not show
        for name, p in kru.named_parameters():
            if "beta" in name or "bias" in name:
                p.uniform_(-0.3, 0.3)
    return kru


def slow(kru, x, h_0=None, reset=None):
    """What `KRU` computes for `x (T, B, D)`, in eval mode, from its state_dict names alone."""
    parameters = dict(kru.named_parameters())
    time, batch, _ = x.shape
    h_n = []
    for layer in range(kru.num_layers):
        outputs = []
        for direction in range(1 + kru.bidirectional):
            suffix = f"_l{layer}" + "_reverse" * direction
            factors, f = [], 0
            while (name := f"factor{f}{suffix}") in parameters:
                factors.append(parameters[name])
                f += 1
            u = x @ parameters[f"weight_ih{suffix}"].T + parameters.get(f"bias{suffix}", 0.0)
            gate = slow_gate(kru, x, suffix, parameters)
            cut = torch.zeros(batch, time, dtype=torch.bool) if reset is None else reset
            if direction:  # backwards, the state that comes from t + 1 into t is cut if t + 1 is
                u = u[range(time - 1, -1, -1)]
                gate = None if gate is None else gate[range(time - 1, -1, -1)]
                cut = torch.stack(
                    [cut[:, t + 1] if t + 1 < time else cut[:, 0] & False for t in range(time)], 1
                )[:, range(time - 1, -1, -1)]
            start = None if h_0 is None else h_0[len(h_n)]
            y, last = oracle.scan(
                u.transpose(0, 1),
                factors,
                parameters.get(f"beta{suffix}"),
                start,
                nonlinearity=kru.nonlinearity,
                reset=cut,
                gate=None if gate is None else gate.transpose(0, 1),
            )
            y = y.transpose(0, 1)
            outputs.append(y[range(time - 1, -1, -1)] if direction else y)
            h_n.append(last)
        x = torch.cat(outputs, -1)
    return x, torch.stack(h_n)


def slow_gate(kru, x, suffix, parameters):
    """By what a state is multiplied, planar."""
    if kru.state_gate == "none":
        return None
    z = x @ parameters[f"weight_gate{suffix}"].T + parameters[f"bias_gate{suffix}"]
    if kru.state_gate == "sigmoid":
        return z.sigmoid()
    if kru.state_gate == "rotation":
        return oracle.to_planar(torch.exp(1j * z), 2)
    z = oracle.from_planar(z, kru.parts)
    return oracle.to_planar(oracle.activate(z, "modtanh"), kru.parts)


def gradients(kru, outputs, *leaves):
    loss = sum((y * randn(*y.shape, seed=9 + i)).sum() for i, y in enumerate(outputs))
    return torch.autograd.grad(loss, [*kru.parameters(), *leaves])


MODULES = {
    "plain": dict(factors=(3, 4)),
    "layers": dict(num_layers=3, factors=(3, 4)),
    "bidirectional": dict(num_layers=2, bidirectional=True, factors=(4, 3)),
    "heads": dict(num_heads=2, factors=(2, 3), num_layers=2),
    "real": dict(field="real", factors=(3, 4), bidirectional=True),
    "one factor": dict(factors=(12,)),
    "rectangular": dict(factors=((2, 3), (3, 2), (2, 2))),
    "no bias": dict(bias=False, factors=(2, 2, 3)),
    "rotation": dict(state_gate="rotation", num_layers=2, bidirectional=True),
    "sigmoid gate": dict(state_gate="sigmoid", num_heads=2, bidirectional=True),
    "real sigmoid gate": dict(state_gate="sigmoid", field="real", nonlinearity="identity"),
    "modtanh gate": dict(state_gate="modtanh", num_heads=2, nonlinearity="identity"),
    "real gate": dict(state_gate="modtanh", field="real", nonlinearity="tanh"),
    **{act: dict(nonlinearity=act, num_layers=2) for act in NONLINEARITIES},
}


@pytest.mark.parametrize("with_reset", [False, True], ids=["", "reset"])
@pytest.mark.parametrize("with_h_0", [False, True], ids=["", "h_0"])
@pytest.mark.parametrize("kwargs", MODULES.values(), ids=MODULES.keys())
def test_equals_the_slow_loop(kwargs, with_h_0, with_reset):
    kru = make(5, 12, **kwargs)
    x = randn(6, 3, 5).requires_grad_()
    leaves = [x]
    h_0 = reset = None
    if with_h_0:
        h_0 = randn(kru.num_layers * kru.num_directions, 3, kru.output_size, seed=2)
        leaves.append(h_0.requires_grad_())
    if with_reset:
        reset = torch.rand(3, 6, generator=torch.Generator().manual_seed(4)) < 0.3
        reset[0, 0] = reset[2, 5] = True
    actual, expected = kru(x, h_0, reset=reset), slow(kru, x, h_0, reset)
    assert_same(actual, expected)
    assert_same(gradients(kru, actual, *leaves), gradients(kru, expected, *leaves), 1e-10)


def test_a_rotation_keeps_a_parity_and_the_norm():
    """Which no recurrence that is linear in its state does with one matrix for all inputs."""
    kru = KRU(1, 1, factors=(1,), state_gate="rotation", nonlinearity="identity", bias=False)
    kru = kru.double()
    with torch.no_grad():
        for name, p in kru.named_parameters():
            p.fill_(torch.pi if name.startswith("weight_gate") else 0.0)
        kru.factor0_l0[0] = 1.0
    bits = torch.randint(2, (5000, 3, 1), generator=torch.Generator().manual_seed(0))
    h, _ = kru(bits.double(), torch.tensor([1.0, 0.0], dtype=torch.float64).expand(1, 3, 2))
    assert torch.equal(h[..., 0].round(), 1.0 - 2 * (bits[..., 0].cumsum(0) % 2))
    assert (h.square().sum(-1) - 1).abs().max() < 1e-10


# The calling convention of torch.nn.RNN


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_shapes_are_those_of_nn_rnn(layers, bidirectional, batch_first):
    """nn.RNN with as many features as the planar state."""
    options = dict(num_layers=layers, bidirectional=bidirectional, batch_first=batch_first)
    kru, rnn = KRU(5, 6, **options), nn.RNN(5, 12, **options)
    for shape in ((4, 3, 5), (4, 1, 5), (4, 5)):
        x = torch.randn(shape)
        output, h_n = kru(x)
        expected, expected_n = rnn(x)
        assert output.shape == expected.shape
        assert h_n.shape == expected_n.shape
        again, _ = kru(x, h_n)
        assert again.shape == expected.shape
    packed = pack_sequence([torch.randn(n, 5) for n in (2, 4, 1)], enforce_sorted=False)
    output, h_n = kru(packed)
    expected, expected_n = rnn(packed)
    assert output.data.shape == expected.data.shape
    assert h_n.shape == expected_n.shape
    for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        assert torch.equal(getattr(output, name), getattr(expected, name))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_batch_first_and_unbatched_are_the_same_numbers(bidirectional):
    kru = make(5, 12, num_layers=2, bidirectional=bidirectional)
    x, h_0 = randn(6, 3, 5), randn(2 * kru.num_directions, 3, 24, seed=2)
    reset = torch.rand(3, 6, generator=torch.Generator().manual_seed(0)) < 0.3
    output, h_n = kru(x, h_0, reset=reset)
    kru.batch_first = True
    swapped, swapped_n = kru(x.transpose(0, 1), h_0, reset=reset)
    assert_same((swapped.transpose(0, 1), swapped_n), (output, h_n))
    for batch_first in (False, True):
        kru.batch_first = batch_first
        single = kru(x[:, 1], h_0[:, 1], reset=reset[1])
        assert_same(single, (output[:, 1], h_n[:, 1]))


@pytest.mark.parametrize("lengths", [(6, 4, 4, 1), (2, 6, 1, 6)], ids=["sorted", "unsorted"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("with_h_0", [False, True])
def test_packed_sequences_equal_each_run_alone(lengths, bidirectional, with_h_0):
    kru = make(5, 12, num_layers=2, bidirectional=bidirectional)
    sequences = [randn(n, 5, seed=n + i).requires_grad_() for i, n in enumerate(lengths)]
    h_0 = randn(2 * kru.num_directions, 4, 24, seed=2).requires_grad_() if with_h_0 else None
    leaves = sequences + ([h_0] if with_h_0 else [])
    packed = pack_sequence(sequences, enforce_sorted=lengths[0] == max(lengths))
    output, h_n = kru(packed, h_0)
    assert isinstance(output, PackedSequence)
    assert torch.equal(output.batch_sizes, packed.batch_sizes)
    if packed.sorted_indices is None:
        assert output.sorted_indices is None
    else:
        assert torch.equal(output.sorted_indices, packed.sorted_indices)
    padded, out_lengths = pad_packed_sequence(output)
    assert out_lengths.tolist() == list(lengths)

    alone = [kru(x, None if h_0 is None else h_0[:, i]) for i, x in enumerate(sequences)]
    for i, (y, last) in enumerate(alone):
        assert_same((padded[: lengths[i], i], h_n[:, i]), (y, last))
    weights = [randn(*y.shape, seed=i) for i, (y, _) in enumerate(alone)]
    weights_n = randn(*h_n.shape, seed=99)
    loss = sum((padded[:n, i] * weights[i]).sum() for i, n in enumerate(lengths))
    loss = loss + (h_n * weights_n).sum()
    loss_alone = sum(
        (y * weights[i]).sum() + (last * weights_n[:, i]).sum() for i, (y, last) in enumerate(alone)
    )
    assert_same(
        torch.autograd.grad(loss, [*kru.parameters(), *leaves]),
        torch.autograd.grad(loss_alone, [*kru.parameters(), *leaves]),
        1e-10,
    )


def test_padding_is_never_read():
    kru = make(5, 12, bidirectional=True)
    x = randn(6, 2, 5)
    lengths = torch.tensor([6, 3])
    output, h_n = kru(pack_padded_sequence(x, lengths))
    x[3:, 1] = 1e6
    again, again_n = kru(pack_padded_sequence(x, lengths))
    assert torch.equal(output.data, again.data)
    assert torch.equal(h_n, again_n)


def test_packed_rows_run_longest_first_and_no_further(monkeypatch):
    """What reaches the operation: lengths in descending order, whatever order was packed."""
    seen = []
    original = modules.run_scan

    def spy(scan, how):
        seen.append(scan.lengths.tolist())
        return original(scan, how)

    monkeypatch.setattr(modules, "run_scan", spy)
    kru = make(5, 12, 2)
    kru(pack_sequence([randn(n, 5) for n in (2, 6, 1, 6)], enforce_sorted=False))
    assert seen == [[6, 6, 2, 1]] * 2


# Tokens


TOKEN_MODULES = {
    "plain": dict(factors=(3, 4)),
    "layers": dict(num_layers=2, num_heads=2, nonlinearity="modtanh"),
    "bidirectional": dict(num_layers=2, bidirectional=True, bias=False),
    "gate": dict(state_gate="rotation", bidirectional=True),
    "recompute": dict(num_layers=2, recompute=4),
    "recompute bidirectional": dict(bidirectional=True, recompute=4),
}
tokens_of = torch.tensor([[4, 0, 6], [1, 1, 3], [6, 4, 0], [5, 5, 5], [0, 4, 1], [3, 3, 3]])
token_modules = pytest.mark.parametrize("kwargs", TOKEN_MODULES.values(), ids=TOKEN_MODULES.keys())


@token_modules
@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("rest", [False, True], ids=["", "h_0_and_reset"])
def test_tokens_are_their_rows_of_the_embedding(kwargs, rest, packed):
    kru = make(5, 12, **kwargs)
    embedding = randn(7, 5, seed=3).requires_grad_()
    h_0 = reset = None
    if rest:
        h_0 = randn(kru.num_layers * kru.num_directions, 3, 24, seed=2).requires_grad_()
    if rest and not packed:
        reset = torch.rand(3, 6, generator=torch.Generator().manual_seed(4)) < 0.3
    results = []
    for tokens in (True, False):
        x = tokens_of if tokens else embedding[tokens_of]
        if packed:
            x = pack_padded_sequence(x, torch.tensor([2, 6, 1]), enforce_sorted=False)
        output, h_n = kru(x, h_0, reset=reset, embedding=embedding if tokens else None)
        outputs = (output.data if packed else output, h_n)
        leaves = [embedding] + ([] if h_0 is None else [h_0])
        results.append((outputs, gradients(kru, outputs, *leaves)))
    assert_same(results[0][0], results[1][0])
    assert_same(results[0][1], results[1][1], 1e-10)
    unused = embedding.new_zeros(5)
    assert torch.equal(results[0][1][len(list(kru.parameters()))][2], unused)  # 2 never occurs


def test_tokens_batch_first_and_unbatched():
    kru = make(5, 12, num_layers=2)
    embedding = randn(7, 5, seed=3)
    output, h_n = kru(tokens_of, embedding=embedding)
    assert_same(kru(tokens_of[:, 1], embedding=embedding), (output[:, 1], h_n[:, 1]))
    kru.batch_first = True
    swapped, swapped_n = kru(tokens_of.t(), embedding=embedding)
    assert_same((swapped.transpose(0, 1), swapped_n), (output, h_n))


def test_tokens_under_autocast():
    torch.manual_seed(0)
    kru = KRU(5, 12, num_layers=2)
    embedding = torch.randn(7, 5)
    exact, _ = kru(embedding[tokens_of])
    with torch.autocast("cpu"):
        output, h_n = kru(tokens_of, embedding=embedding)
    assert output.dtype == torch.bfloat16
    assert h_n.dtype == torch.float32
    # bfloat16 projections: 2^-9 per number, over six steps and two layers
    assert (output.float() - exact).norm() < 2e-2 * exact.norm()


# Recompute


@pytest.mark.parametrize("kwargs", MODULES.values(), ids=MODULES.keys())
@pytest.mark.parametrize("steps", [1, 3])
def test_recompute_changes_nothing_but_the_order_of_sums(kwargs, steps):
    x = randn(7, 3, 5).requires_grad_()
    reset = torch.rand(3, 7, generator=torch.Generator().manual_seed(4)) < 0.3
    results = []
    for recompute in (0, steps):
        kru = make(5, 12, recompute=recompute, **kwargs)
        h_0 = randn(kru.num_layers * kru.num_directions, 3, kru.output_size, seed=2)
        h_0.requires_grad_()
        outputs = kru(x, h_0, reset=reset)
        results.append((outputs, gradients(kru, outputs, x, h_0)))
    assert_same(results[1][0], results[0][0], 1e-13)
    assert_same(results[1][1], results[0][1], 1e-12)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_recompute_of_packed_sequences(bidirectional):
    sequences = [randn(n, 5, seed=n).requires_grad_() for n in (2, 7, 1, 5)]
    results = []
    for recompute in (0, 3):
        kru = make(5, 12, num_layers=2, bidirectional=bidirectional, recompute=recompute)
        output, h_n = kru(pack_sequence(sequences, enforce_sorted=False))
        outputs = (output.data, h_n)
        results.append((outputs, gradients(kru, outputs, *sequences)))
    assert_same(results[1][0], results[0][0], 1e-13)
    assert_same(results[1][1], results[0][1], 1e-12)


def test_recompute_draws_the_same_dropout_again():
    """The masks of the forward, or the gradient would not be that of the output."""
    kru = make(5, 12, num_layers=2, dropout=0.5, recompute=3)
    x = randn(7, 3, 5).requires_grad_()

    def run(x):
        torch.manual_seed(1)
        output, h_n = kru(x)
        return output.sum() + h_n.sum()

    assert torch.autograd.gradcheck(run, x, fast_mode=True)


@pytest.mark.parametrize("kwargs", [{}, dict(recompute=3), dict(bidirectional=True, recompute=3)])
@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
def test_h_n_only(kwargs, packed):
    kru = make(5, 12, num_layers=2, **kwargs)
    x = randn(7, 3, 5)
    x = pack_padded_sequence(x, torch.tensor([2, 7, 3]), enforce_sorted=False) if packed else x
    output, h_n = kru(x, h_n_only=True)
    assert output is None
    _, expected = kru(x)
    assert torch.equal(h_n, expected)
    assert_same(gradients(kru, (h_n,)), gradients(kru, (expected,)), 0)


MEMORY = """
import ctypes, gc
from pathlib import Path
import torch
from kru_triton import KRU

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key + ":"))

def growth(steps, x):
    kru.recompute = steps
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    kru(x, h_n_only=True)[1].sum().backward()
    return status("VmHWM") - before

kru = KRU(8, 128, 3)
x = torch.randn(512, 64, 8)
growth(4, x[:8])
print(growth(16, x), growth(0, x))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's VmHWM")
def test_recompute_takes_a_fraction_of_the_memory():
    """Growth of the resident set in a fresh process, the smaller one first. All states of three
    layers are 96 MiB, which are kept without recompute; a chunk of 16 steps has 3 MiB of them."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    chunks, whole = map(int, done.stdout.split())
    assert whole > 96 << 20
    assert chunks < whole / 2


# Reset, dropout, chunks, cell


@pytest.mark.parametrize("bidirectional", [False, True])
def test_reset_separates_documents(bidirectional):
    """A row of three documents equals the documents run alone, in both directions."""
    kru = make(5, 12, num_layers=2, bidirectional=bidirectional)
    x = randn(9, 1, 5)
    reset = torch.zeros(1, 9, dtype=torch.bool)
    reset[0, [0, 4, 6]] = True
    output, h_n = kru(x, reset=reset)
    documents = [kru(x[a:b]) for a, b in ((0, 4), (4, 6), (6, 9))]
    assert_same((output,), (torch.cat([y for y, _ in documents]),))
    directions = 2 if bidirectional else 1
    assert_same((h_n[::directions],), (documents[-1][1][::directions],))
    if bidirectional:  # its last step is the first of the row
        assert_same((h_n[1::2],), (documents[0][1][1::2],))


def test_reset_cuts_h_0_of_the_forward_direction():
    kru = make(5, 12)
    x, h_0 = randn(4, 2, 5), randn(1, 2, 24, seed=2)
    reset = torch.zeros(2, 4, dtype=torch.bool)
    reset[0, 0] = True
    output, _ = kru(x, h_0, reset=reset)
    assert_same((output[:, 0], output[:, 1]), (kru(x)[0][:, 0], kru(x, h_0)[0][:, 1]))


def test_dropout_acts_between_layers_and_in_training_only():
    kru = make(5, 12, num_layers=2, dropout=0.5)
    plain = make(5, 12, num_layers=2)
    plain.load_state_dict(kru.state_dict())
    x = randn(6, 3, 5)
    torch.manual_seed(0)
    dropped, dropped_n = kru(x)
    expected, expected_n = plain(x)
    assert_same((dropped_n[0],), (expected_n[0],))  # before the first layer nothing is dropped
    assert (dropped - expected).abs().max() > 1e-3
    assert (dropped == 0).double().mean() < 0.2  # nor after the last: only modReLU makes zeros
    assert_same(kru.eval()(x), (expected, expected_n))
    one_layer = make(5, 12, dropout=0.5)
    assert_same(one_layer(x), one_layer.eval()(x), 0)


@pytest.mark.parametrize("kwargs", MODULES.values(), ids=MODULES.keys())
def test_chunks_with_the_state_handed_over_equal_one_run(kwargs):
    if kwargs.get("bidirectional"):
        kwargs = {**kwargs, "bidirectional": False}
    kru = make(5, 12, **kwargs)
    x, state, pieces = randn(9, 3, 5), None, []
    for piece in x.split((2, 1, 6)):
        y, state = kru(piece, state)
        pieces.append(y)
    assert_same((torch.cat(pieces), state), kru(x))


@pytest.mark.parametrize("kwargs", MODULES.values(), ids=MODULES.keys())
def test_cell_is_a_layer_of_one_step(kwargs):
    kwargs = {k: v for k, v in kwargs.items() if k not in ("num_layers", "bidirectional")}
    kru = make(5, 12, **kwargs)
    cell = KRUCell(5, 12, **kwargs).double()
    weights = {k.removesuffix("_l0"): v for k, v in kru.state_dict().items()}
    cell.load_state_dict(weights)
    x, h_0 = randn(6, 3, 5), randn(1, 3, kru.output_size, seed=2)
    output, h_n = kru(x, h_0)
    h = h_0[0]
    for t in range(6):
        h = cell(x[t], h)
        assert_same((h,), (output[t],))
    assert_same((h,), (h_n[0],))
    assert_same((cell(x[0]),), (kru(x[:1])[0][0],))
    assert_same((cell(x[0, 1]), cell(x[0, 1], h[1])), (cell(x[0])[1], cell(x[0], h)[1]))


# Attributes


@pytest.mark.parametrize(
    ("cls", "options", "mode"),
    [
        (KRU, dict(num_layers=2, bidirectional=True, batch_first=True), "RNN_MODRELU"),
        (KRU, dict(bias=False, nonlinearity="relu", factors=(2, 3, 1)), "RNN_RELU"),
        (KRU, dict(nonlinearity="tanh", field="real", num_heads=2), "RNN_TANH"),
        (KRULSTM, dict(num_layers=2, bidirectional=True), "LSTM"),
    ],
    ids=str,
)
def test_code_for_nn_rnn_finds_what_it_reads(cls, options, mode):
    """Attributes that such code asks for: how to start and initialize, what the state is."""
    layers = cls(5, 6, **options)
    rnn = {"LSTM": nn.LSTM}.get(mode, nn.RNN)(
        5, layers.output_size, **{k: v for k, v in options.items() if hasattr(nn.RNN(1, 1), k)}
    )
    for name in ("input_size", "num_layers", "bias", "batch_first", "bidirectional", "proj_size"):
        assert getattr(layers, name) == getattr(rnn, name), name
    assert layers.mode == mode
    assert layers.has_bias == layers.bias
    assert layers.flatten_parameters() is None
    x = torch.randn(3, 4, 5)
    shape = layers.get_expected_hidden_size(x, None)
    assert shape == rnn.get_expected_hidden_size(x, None)
    h = torch.zeros(shape)
    layers(x, (h, h) if layers.mode == "LSTM" else h)
    packed = pack_sequence([torch.randn(n, 5) for n in (3, 1)])
    assert layers.get_expected_hidden_size(packed.data, packed.batch_sizes)[1] == 2

    assert len(layers.all_weights) == len(rnn.all_weights)
    everything = [p for weights in layers.all_weights for p in weights]
    assert {id(p) for p in everything} == {id(p) for p in layers.parameters()}
    assert len(everything) == len(list(layers.parameters()))
    factors = len(layers.factor_shapes)
    for names, weights in zip(layers._all_weights, layers.all_weights):
        assert all(getattr(layers, n) is w for n, w in zip(names, weights, strict=True))
        kinds = ["weight_ih", *["factor"] * factors, "bias"][: 1 + factors + layers.bias]
        assert [n[: len(k)] for n, k in zip(names, kinds)] == kinds


def test_recurrent_parameters_are_counted_as_in_the_paper():
    """Seven complex 2×2 factors: 7·4·2 = 56 real numbers."""
    assert KRU(1, 128, factors=(2,) * 7).num_recurrent_parameters == 56
    assert KRU(1, 128, factors=(2,) * 7, field="real").num_recurrent_parameters == 28
    assert KRU(1, 128, 3, factors=(8, 16), bidirectional=True).num_recurrent_parameters == 6 * 640
    assert KRU(1, 128, num_heads=4).num_recurrent_parameters == 4 * 2 * (16 + 64)
    assert KRUCell(1, 128, factors=(2,) * 7).num_recurrent_parameters == 56


@pytest.mark.parametrize("field", ["complex", "real"])
def test_recurrent_matrix_is_the_kron_of_the_factors_and_unitary(field):
    options = dict(factors=(3, 4), num_heads=2, field=field, bidirectional=True)
    kru = KRU(3, 24, 2, **options, dtype=torch.float64)
    seen = set()
    for layer in range(2):
        for direction in range(2):
            for head in range(2):
                w = kru.recurrent_matrix(layer, direction, head)
                suffix = f"_l{layer}" + "_reverse" * direction
                a, b = (getattr(kru, f"factor{f}{suffix}")[:, head] for f in (0, 1))
                if field == "complex":
                    a, b = torch.complex(*a), torch.complex(*b)
                    assert w.dtype == torch.complex128
                else:
                    a, b = a[0], b[0]
                assert (w - torch.kron(a, b)).abs().max() < 1e-15
                assert (w.mH @ w - torch.eye(12)).abs().max() < 1e-13
                seen.add(round(w[0, 0].real.item(), 12))
    assert len(seen) == 8  # eight different matrices
    assert kru.unitarity_penalty().item() < 1e-25
    with torch.no_grad():
        kru.factor0_l1_reverse.mul_(2)  # W^H W = 4 I: two heads of 3·3²
    assert kru.unitarity_penalty().item() == pytest.approx(54)
    assert unitarity_penalty(kru).item() == pytest.approx(54)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("field", "kind"), [("complex", torch.complex64), ("real", torch.float32)])
def test_recurrent_matrix_of_half_precision_is_that_of_its_numbers(field, kind, dtype):
    kru = KRU(3, 24, factors=(4, 6), field=field).to(dtype)
    w = kru.recurrent_matrix()
    assert w.dtype == kind
    assert torch.equal(w, kru.float().recurrent_matrix())


def test_a_layer_direction_or_head_that_is_not_there():
    kru = KRU(3, 24, 2)
    for name, got, rule in (("layer", 2, 1), ("layer", -1, 1), ("direction", 1, 0)):
        match = f"{name}: must be from 0 to {rule}, got {got}"
        where = {"layer": 0, name: got}
        for ask in (kru.recurrent_matrix, kru.recurrent_factors, kru.beta):
            with pytest.raises(IndexError, match=match):
                ask(**where)
        for project in (kru.input_projection, kru.gate_projection):
            with pytest.raises(IndexError, match=match):
                project(torch.zeros(5, 1, 3), **where)
    with pytest.raises(IndexError, match="head: must be from 0 to 0, got 1"):
        kru.recurrent_matrix(head=1)


def test_output_size_and_repr():
    assert KRU(3, 24).output_size == 48
    assert KRU(3, 24, field="real").output_size == 24
    assert re.search(r"3, 24, factors=\(4x4, 6x6\), num_heads=1, field='complex'", repr(KRU(3, 24)))


def test_repr_shows_what_differs_from_the_default():
    options = "num_layers=2, bias=False, batch_first=True, dropout=0.5, bidirectional=True"
    given = dict(num_layers=2, bias=False, batch_first=True, dropout=0.5, bidirectional=True)
    for cls in (KRU, KRULSTM):
        assert options not in repr(cls(3, 4))
        assert repr(cls(3, 4, **given)).endswith(f", {options})")
    assert repr(KRUCell(3, 4, bias=False)).endswith("nonlinearity='modrelu', bias=False)")
    assert repr(MinGRU(3, 4)).startswith("MinGRU(\n  3, 4\n")
    assert "3, 4, num_layers=2" in repr(MinGRU(3, 4, 2))


@pytest.mark.parametrize("cls", [KRU, KRUCell])
def test_no_complex_dtype_is_stored(cls):
    module = cls(3, 24, factors=(2, 3, 4))
    stored = [*module.parameters(), *module.buffers()]
    assert stored
    assert not any(t.is_complex() for t in stored)
    assert all(t.requires_grad for t in module.parameters())


@pytest.mark.parametrize("cls", [KRU, KRUCell])
def test_state_dict_round_trip_copy_and_pickle(cls):
    module, other = cls(3, 24, factors=(2, 3, 4)), cls(3, 24, factors=(2, 3, 4))
    x = torch.randn(2, 3)
    first = module(x)
    assert not torch.equal(torch.as_tensor(other(x)[0]), torch.as_tensor(first[0]))
    other.load_state_dict(module.state_dict())
    for twin in (other, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        for got, want in zip(twin(x), first, strict=True):
            assert torch.equal(got, want)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        next(twin.parameters()).add_(1)
    for got, want in zip(module(x), first, strict=True):
        assert torch.equal(got, want)


def test_the_seed_decides_the_parameters():
    kru, same, other = (make(3, 24, seed=s) for s in (0, 0, 1))
    assert torch.equal(kru.factor0_l0, same.factor0_l0)
    assert not torch.equal(kru.factor0_l0, other.factor0_l0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    """The state is float32 or better; a half-precision h has the error of its own rounding, and
    parameters rounded to 2^-9 move the state by a few times that over four steps."""
    kru = make(3, 24, num_layers=2)
    x = randn(4, 2, 3)
    exact, _ = kru(x)
    output, h_n = kru.to(dtype)(x.to(dtype))
    assert output.dtype == dtype
    assert h_n.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    error = (output.double() - exact).norm() / exact.norm()
    assert error <= {torch.float64: 0, torch.float32: 1e-6}.get(dtype, 3e-2)
    kru(x.to(dtype), h_n)
    (output.sum() + h_n.sum()).backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == dtype for p in kru.parameters())


def test_under_autocast():
    torch.manual_seed(0)
    kru = KRU(3, 24, num_layers=2)
    x = torch.randn(4, 2, 3)
    exact, exact_n = kru(x)
    with torch.autocast("cpu"):
        output, h_n = kru(x)
        again, _ = kru(x, h_n)
        loss = output.float().square().sum()
        loss.backward()
    assert output.dtype == again.dtype == torch.bfloat16
    assert h_n.dtype == torch.float32
    # bfloat16 projections: 2^-9 per number, over four steps and two layers
    assert (output.float() - exact).norm() < 2e-2 * exact.norm()
    assert (h_n - exact_n).norm() < 2e-2 * exact_n.norm()
    assert all(p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in kru.parameters())


def test_gradient_reaches_every_parameter():
    kru = make(3, 24, 2, bidirectional=True, num_heads=2)
    kru(randn(5, 2, 3))[0].square().sum().backward()
    for name, p in kru.named_parameters():
        assert p.grad.count_nonzero() == p.numel(), name


# Errors

BUILD_ERRORS = {
    "input_size str": (TypeError, "input_size: must be an int, got str '4'", dict(input_size="4")),
    "input_size bool": (TypeError, "input_size: must be an int, got bool", dict(input_size=True)),
    "input_size 0": (ValueError, "input_size: must be at least 1, got 0", dict(input_size=0)),
    "hidden_size float": (TypeError, "hidden_size: expected an int", dict(hidden_size=12.0)),
    "hidden_size bool": (TypeError, "hidden_size: expected an int", dict(hidden_size=True)),
    "hidden_size -1": (ValueError, "hidden_size: expected .* at least 1", dict(hidden_size=-1)),
    "num_heads": (
        ValueError,
        "num_heads: must divide hidden_size, got num_heads 5 and hidden_size 12; .* num_heads=4",
        dict(num_heads=5),
    ),
    "num_heads str": (TypeError, "num_heads: expected an int", dict(num_heads="2")),
    "factors": (
        ValueError,
        r"factors: the row counts multiply to 16 .* hidden_size is 12; .* factors=\(3, 4\)",
        dict(factors=(4, 4)),
    ),
    "factors int": (TypeError, "factors: expected a tuple of ints", dict(factors=12)),
    "factors str": (TypeError, "factors: expected a tuple of ints", dict(factors="34")),
    "factors floats": (TypeError, r"factors\[0\]: expected an int", dict(factors=(3.0, 4))),
    "factors empty": (ValueError, "factors: expected at least one shape", dict(factors=())),
    "field": (ValueError, "field: must be one of 'complex', 'real'", dict(field="quaternion")),
    "nonlinearity": (ValueError, "nonlinearity: must be one of", dict(nonlinearity="sigmoid")),
    "gate": (
        ValueError,
        "state_gate: must be one of 'none', 'sigmoid', 'rotation'",
        dict(state_gate="tanh"),
    ),
    "gate real": (
        ValueError,
        'state_gate: "rotation" turns complex numbers',
        dict(state_gate="rotation", field="real"),
    ),
    "backend": (ValueError, "backend: must be one of", dict(backend="cuda")),
    "precision": (ValueError, "precision: must be one of", dict(precision="fp8")),
    "dtype": (TypeError, "dtype: must be a real float dtype", dict(dtype=torch.complex64)),
    "dtype str": (
        TypeError,
        "dtype: must be a real float dtype, got 'float32'",
        dict(dtype="float32"),
    ),
}


@pytest.mark.parametrize("cls", [KRU, KRUCell])
@pytest.mark.parametrize(
    ("kind", "match", "changed"), BUILD_ERRORS.values(), ids=BUILD_ERRORS.keys()
)
def test_errors_when_built(cls, kind, match, changed):
    with pytest.raises(kind, match=match):
        cls(**{"input_size": 4, "hidden_size": 12, **changed})


@pytest.mark.parametrize(
    ("kind", "match", "changed"),
    [
        (TypeError, "num_layers: must be an int, got str '2'", dict(num_layers="2")),
        (TypeError, "num_layers: must be an int, got bool", dict(num_layers=True)),
        (ValueError, "num_layers: must be at least 1, got 0", dict(num_layers=0)),
        (ValueError, r"dropout: must be in \[0, 1\), got 1.5", dict(dropout=1.5)),
        (ValueError, r"dropout: must be in \[0, 1\), got nan", dict(dropout=float("nan"))),
        (TypeError, "dropout: must be a number, got str", dict(dropout="0.5")),
        (TypeError, "dropout: must be a number, got bool", dict(dropout=True)),
        (TypeError, "recompute: must be an int, got float", dict(recompute=2.0)),
        (TypeError, "recompute: must be an int, got bool", dict(recompute=True)),
        (ValueError, "recompute: must be a number of steps, or 0", dict(recompute=-1)),
    ],
)
def test_errors_of_kru_when_built(kind, match, changed):
    with pytest.raises(kind, match=match):
        KRU(4, 12, **changed)


INPUT_ERRORS = {
    "list": (TypeError, "input: must be a tensor", [[1.0] * 4]),
    "scalar": (ValueError, r"input: must .* got shape \(\)", torch.tensor(1.0)),
    "rank": (ValueError, r"input: must .* got shape \(1, 2, 3, 4\)", torch.zeros(1, 2, 3, 4)),
    "width": (ValueError, "input: the last dimension must be input_size=4, got 5", (3, 5)),
    "complex": (
        TypeError,
        "input: must be real, got torch.complex64; convert with torch.cat",
        torch.zeros(2, 4, dtype=torch.complex64),
    ),
    "int": (
        TypeError,
        "input: must be torch.float32 like the parameters, got torch.int64",
        torch.zeros(2, 4, dtype=torch.int64),
    ),
    "double": (
        TypeError,
        "input: must be torch.float32 like the parameters, got torch.float64",
        torch.zeros(2, 4, dtype=torch.float64),
    ),
    "device": (
        ValueError,
        "input: is on meta but the parameters are on cpu",
        torch.zeros(2, 4, device="meta"),
    ),
}
TOKENS = torch.zeros(5, 3, dtype=torch.int64)
TOKEN_ERRORS = {
    "no embedding": (
        TypeError,
        "input: must be torch.float32 .* got torch.int64",
        torch.zeros(5, 4, dtype=torch.int64),
        None,
    ),
    "float": (
        TypeError,
        "input: must be int64 tokens with an embedding, got torch.float32",
        TOKENS.float(),
        torch.zeros(7, 4),
    ),
    "rank": (
        ValueError,
        r"input: must have 1 \(unbatched\) or 2 dimensions, got shape \(1, 5, 3\)",
        TOKENS[None],
        torch.zeros(7, 4),
    ),
    "packed rank": (
        ValueError,
        r"input: must have 1 \(unbatched\) or 2 dimensions, got shape \(2, 3\)",
        pack_sequence([TOKENS[:2]]),
        torch.zeros(7, 4),
    ),
    "outside": (ValueError, "tokens: must be from 0 to 6", TOKENS + 7, torch.zeros(7, 4)),
    "width": (
        ValueError,
        "embedding: the last dimension must be input_size=4, got 5",
        TOKENS,
        torch.zeros(7, 5),
    ),
    "embedding rank": (
        ValueError,
        r"embedding: must be \(V, input_size\), .* got shape \(4,\)",
        TOKENS,
        torch.zeros(4),
    ),
    "embedding kind": (
        TypeError,
        "embedding: must be a tensor, got Embedding",
        TOKENS,
        nn.Embedding(7, 4),
    ),
    "embedding dtype": (
        TypeError,
        "embedding: must be torch.float32 like the parameters, got torch.float64",
        TOKENS,
        torch.zeros(7, 4).double(),
    ),
    "device": (
        ValueError,
        "input: is on meta but the parameters are on cpu",
        TOKENS.to("meta"),
        torch.zeros(7, 4),
    ),
}


@pytest.mark.parametrize(
    ("kind", "match", "x", "embedding"), TOKEN_ERRORS.values(), ids=TOKEN_ERRORS.keys()
)
def test_errors_of_tokens(kind, match, x, embedding):
    with pytest.raises(kind, match=match):
        KRU(4, 12)(x, embedding=embedding)


@pytest.mark.parametrize("token", [7, -1])
def test_a_token_outside_the_embedding(token):
    plain = KRU(4, 12)
    parallel = KRU(4, 12, time_parallel=True, nonlinearity="identity")
    for layers in (plain, parallel, KRU(4, 12, state_gate="rotation"), KRULSTM(4, 12)):
        match = rf"tokens: must be from 0 to 6 \(rows of the table\), got .* {max(token, 0)}"
        with pytest.raises(ValueError, match=match):
            layers(torch.tensor([[0], [token]]), embedding=torch.zeros(7, 4))
        layers.to("meta")(TOKENS.to("meta") + token, embedding=torch.zeros(7, 4, device="meta"))


@pytest.mark.parametrize("cls", [KRU, KRUCell])
@pytest.mark.parametrize(("kind", "match", "x"), INPUT_ERRORS.values(), ids=INPUT_ERRORS.keys())
def test_errors_of_input(cls, kind, match, x):
    x = torch.zeros(x) if isinstance(x, tuple) else x
    with pytest.raises(kind, match=match):
        cls(4, 12)(x)


STATE_ERRORS = {
    "tuple": (TypeError, "h_0: must be a tensor, got tuple", (torch.zeros(2, 3, 24),)),
    "layers": (
        ValueError,
        r"h_0: must have shape \(2, 3, 24\) .* got \(1, 3, 24\)",
        torch.zeros(1, 3, 24),
    ),
    "complex": (
        TypeError,
        "h_0: must be planar real, got torch.complex64; convert with torch.cat",
        torch.zeros(2, 3, 12, dtype=torch.complex64),
    ),
    "dtype": (TypeError, "h_0: must be torch.float32", torch.zeros(2, 3, 24, dtype=torch.float64)),
}


@pytest.mark.parametrize(("kind", "match", "h_0"), STATE_ERRORS.values(), ids=STATE_ERRORS.keys())
def test_errors_of_h_0(kind, match, h_0):
    kru = KRU(4, 12, 2)
    with pytest.raises(kind, match=match):
        kru(torch.zeros(5, 3, 4), h_0)
    packed = pack_padded_sequence(torch.zeros(5, 3, 4), torch.tensor([5, 4, 3]))
    with pytest.raises(kind, match=match):
        kru(packed, h_0)


def test_errors_of_a_step():
    with pytest.raises(TypeError, match="x_proj: must be a tensor, got list"):
        kru_step([0], [])
    with pytest.raises(TypeError, match="gate: must be a tensor, got list"):
        kru_step(torch.zeros(3, 8), [], gate=[0])


def test_errors_of_unbatched_and_cell_states():
    with pytest.raises(ValueError, match=r"h_0: must have shape \(2, 24\) .* got \(1, 24\)"):
        KRU(4, 12, 2)(torch.zeros(5, 4), torch.zeros(1, 24))
    with pytest.raises(ValueError, match=r"h_0: must have shape \(1, 24\) .* got \(1,\)"):
        KRU(4, 12)(torch.zeros(5, 4), torch.zeros(()))
    with pytest.raises(ValueError, match=r"h: must have shape \(3, 24\)"):
        KRUCell(4, 12)(torch.zeros(3, 4), torch.zeros(2, 24))
    with pytest.raises(ValueError, match=r"h: must have shape \(24,\) .* got \(1, 24\)"):
        KRUCell(4, 12)(torch.zeros(4), torch.zeros(1, 24))
    with pytest.raises(TypeError, match="h: must be a tensor, got list"):
        KRUCell(4, 12)(torch.zeros(3, 4), [0.0])
    with pytest.raises(TypeError, match=r"h: must be planar real, got torch\.complex64"):
        KRUCell(4, 12)(torch.zeros(3, 4), torch.zeros(3, 12, dtype=torch.complex64))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_errors_of_reset(bidirectional):
    kru = KRU(4, 12, bidirectional=bidirectional)
    x = torch.zeros(5, 3, 4)
    for recompute in (0, 2):
        kru.recompute = recompute
        for shape in ((5, 3), (3, 6)):
            match = rf"reset: must have shape \(3, 5\) .* got \({shape[0]}, {shape[1]}\)"
            with pytest.raises(ValueError, match=match):
                kru(x, reset=torch.zeros(shape, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"reset: must be a bool tensor, got torch\.float32"):
        kru(x, reset=torch.zeros(3, 5))
    for given in (x, x[:, 0]):
        with pytest.raises(TypeError, match="reset: must be a bool tensor, got list"):
            kru(given, reset=[True] * 5)
    packed = pack_padded_sequence(x, torch.tensor([5, 4, 3]))
    with pytest.raises(ValueError, match="reset: not with a PackedSequence; pad the batch"):
        kru(packed, reset=torch.zeros(3, 5, dtype=torch.bool))


def test_backend_triton_raises_with_the_reason():
    kru = KRU(4, 12, backend="triton").double()  # float64 runs on no fused kernel
    with pytest.raises(RuntimeError, match='backend="triton" cannot run here: '):
        kru(torch.zeros(5, 3, 4, dtype=torch.float64))


def test_the_layers_say_why_no_kernel_runs_them():
    assert KRU(4, 6, backend="torch").why_not_triton() == 'backend="torch"'
    assert "'meta'" in KRU(4, 64, device="meta").why_not_triton()
    assert "float64" in KRU(4, 64, dtype=torch.float64).why_not_triton()
    assert KRU(4, 64, 2).why_not_triton() is None  # interpreted
    assert KRULSTM(4, 64, bidirectional=True).why_not_triton() is None
    assert KRUCell(4, 64).why_not_triton() is None
    assert "backend" in KRUCell(4, 64, backend="torch").why_not_triton()


def test_parametrized_factors_count_and_are_not_drawn_anew():
    kru = KRU(4, 6, factors=(2, 3))
    count = kru.num_recurrent_parameters
    orthogonal = torch.nn.utils.parametrizations.orthogonal
    orthogonal(kru, "factor0_l0")
    assert kru.num_recurrent_parameters == count == 2 * (4 + 9)
    before = [w.detach().clone() for w in kru.recurrent_factors(0)]
    kru.reset_parameters()
    after = kru.recurrent_factors(0)
    assert torch.equal(after[0], before[0])  # as torch.nn's layers leave a parametrized weight
    assert not torch.equal(after[1], before[1])
