"""Layers inside of torch.compile; the ops by themselves are in test_conformance.py."""

import pytest
import torch
from oracle import assert_close
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_leaves

from kru_triton import KRU, KRULSTM
from kru_triton.nonlinearity import NONLINEARITIES


class Holder(nn.Module):
    """Layers between other modules."""

    def __init__(self, make=KRU, **kwargs):
        super().__init__()
        torch.manual_seed(0)
        self.layers = make(5, 12, factors=(3, 4), **kwargs)
        self.head = nn.Linear(self.layers.num_directions * self.layers.output_size, 3)

    def forward(self, x, start=None, reset=None):
        h, last = self.layers(x.tanh(), start, reset=reset)
        return self.head(h), *tree_leaves(last)


def arguments_for(module, time, batch, dtype=torch.float32):
    layers = module.layers
    states = [
        torch.randn(layers.num_directions, batch, layers.output_size, dtype=dtype) for _ in range(2)
    ]
    start = tuple(states) if isinstance(layers, KRULSTM) else states[0]
    return torch.randn(time, batch, 5, dtype=dtype), start, torch.rand(batch, time) < 0.3


def outputs_and_gradients(module, *arguments):
    module.zero_grad()
    y, *last = module(*arguments)
    (y.square().sum() + sum(state.sum() for state in last)).backward()
    results = {"y": y.detach()} | {str(i): state.detach() for i, state in enumerate(last)}
    return results | {
        name.removeprefix("_orig_mod."): p.grad.clone() for name, p in module.named_parameters()
    }


@pytest.mark.parametrize(
    ("make", "options"),
    [*((KRU, {"nonlinearity": act}) for act in NONLINEARITIES), (KRULSTM, {"bidirectional": True})],
    ids=[*NONLINEARITIES, "lstm"],
)
def test_in_one_graph(make, options):
    module = Holder(make, **options).double()
    arguments = arguments_for(module, 6, 3, torch.float64)
    expected = outputs_and_gradients(module, *arguments)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_close(outputs_and_gradients(compiled, *arguments), expected, 1e-13)


def test_by_inductor():
    module = Holder(bidirectional=True)
    x = torch.randn(6, 3, 5)
    expected = outputs_and_gradients(module, x)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="inductor")
    # inductor's own float32 code for the linear layers sums in another order
    assert_close(outputs_and_gradients(compiled, x), expected, 1e-5)


def test_no_graph_per_length():
    module = Holder()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for time in (5, 6, 7, 32):
        x = torch.randn(time, 3, 5)
        y, _ = compiled(x)
        assert (y - module(x)[0]).abs().max() < 1e-6
        y.sum().backward()
    assert 1 <= counter.frame_count <= 2  # the first length, then any length


@pytest.mark.parametrize("make", [KRU, KRULSTM])
def test_one_graph_for_marked_batch_and_length(make):
    module = Holder(make)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for time, batch in ((5, 3), (6, 4), (7, 9), (32, 2)):
        x, start, reset = arguments_for(module, time, batch)
        for tensor, dims in (
            (x, (0, 1)),
            (reset, (0, 1)),
            *((s, (1,)) for s in tree_leaves(start)),
        ):
            for dim in dims:
                torch._dynamo.mark_dynamic(tensor, dim)
        results = compiled(x, start, reset)
        for got, want in zip(results, module(x, start, reset), strict=True):
            assert (got - want).abs().max() < 1e-6
        results[0].sum().backward()
    assert counter.frame_count == 1
