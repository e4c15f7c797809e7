"""Single steps: prepared ones, those of layers by themselves, and as CUDA graphs."""

import contextlib
import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kru_triton import KRU, KRULSTM
from kru_triton.layers.decoding import LSTMStep, Step
from kru_triton.lm.model import LanguageModel, LanguageModelConfig

STEPS = {
    "modrelu": {},
    "modtanh-4x2x3": {"nonlinearity": "modtanh", "factors": (4, 2, 3), "num_heads": 1},
    "tanh-heads": {"nonlinearity": "tanh", "num_heads": 3},
    "relu-one-factor": {"nonlinearity": "relu", "factors": (24,), "num_heads": 1},
    "identity-real": {"nonlinearity": "identity", "field": "real"},
    "rotation": {"state_gate": "rotation"},
    "sigmoid": {"state_gate": "sigmoid"},
    "modtanh-gate-real": {"state_gate": "modtanh", "field": "real", "nonlinearity": "tanh"},
    "modrelu-real-heads": {"nonlinearity": "modrelu", "field": "real", "num_heads": 4},
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", STEPS)
def test_a_prepared_step_equals_the_layer(name, batch):
    torch.manual_seed(0)
    options = {"num_heads": 2, **STEPS[name]}
    kru = KRU(5, 24, **options).double()
    if kru.beta() is not None:
        torch.nn.init.uniform_(kru.beta(), -0.5, 0.5)
    x = torch.randn(4, batch, 5, dtype=torch.float64)
    with torch.no_grad():
        expected, h_n = kru(x)
        step = Step(kru)
        h = torch.zeros_like(h_n[0])
        for t in range(4):
            gate = kru.gate_projection(x[t : t + 1])
            (h,) = step(
                kru.input_projection(x[t : t + 1])[:, 0], h, None if gate is None else gate[:, 0]
            )
            assert (h - expected[t]).abs().max() < 1e-13


@pytest.mark.parametrize("factors", [(3, 4), (12,), (2, 2, 3)])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_prepared_step_equals_the_lstm(factors, batch):
    torch.manual_seed(0)
    lstm = KRULSTM(5, 24, num_heads=2, factors=factors).double()
    x = torch.randn(4, batch, 5, dtype=torch.float64)
    with torch.no_grad():
        expected, (_, c_n) = lstm(x)
        step = LSTMStep(lstm)
        h, c = torch.zeros_like(expected[0]), torch.zeros_like(c_n[0])
        for t in range(4):
            h, c = step(lstm.input_projection(x[t : t + 1])[:, 0], h, c)
            assert (h - expected[t]).abs().max() < 1e-13
        assert (c - c_n[0]).abs().max() < 1e-13


@pytest.mark.parametrize("model", ["kru", "krulstm"])
@pytest.mark.parametrize("batch", [1, 2])
def test_decoding_takes_the_prepared_steps_and_no_others(model, batch, monkeypatch):
    config = LanguageModelConfig(model=model, d_model=16, hidden_size=12)
    network = LanguageModel(config).eval()
    tokens, used = torch.randint(257, (batch, 6)), []
    for kind in (Step, LSTMStep):
        call = kind.__call__
        monkeypatch.setattr(kind, "__call__", lambda *args, f=call: used.append(1) or f(*args))
    with torch.no_grad():
        expected, _ = network(tokens)
        with network.decoding():
            logits, state = network(tokens[:, :3])
            assert not used
            for t in range(3, 6):
                logits, state = network(tokens[:, t : t + 1], state)
                assert (logits[:, 0] - expected[:, t]).abs().max() < 1e-5
            assert len(used) == 6
            network(tokens[:, :1], state, torch.ones(batch, 1, dtype=torch.bool))
            assert len(used) == 6
            with torch.enable_grad():
                network(tokens[:, :1], state)[0].sum().backward()
            assert len(used) == 6
        network(tokens[:, :1], state)
    assert len(used) == 6


@pytest.mark.parametrize("make_layers", [KRU, KRULSTM])
@pytest.mark.parametrize("batch_first", [False, True])
def test_layers_decode_by_themselves(make_layers, batch_first, monkeypatch):
    torch.manual_seed(0)
    layers = make_layers(5, 12, 3, batch_first=batch_first, dropout=0.5).eval()
    used, kind = [], layers.step_type
    call = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda *args: used.append(1) or call(*args))
    x = torch.randn(6, 2, 5)
    with torch.no_grad():
        expected, last = layers(x.transpose(0, 1) if batch_first else x)
        with layers.decoding():
            state = None
            for t in range(6):
                step = x[t : t + 1]
                output, state = layers(step.transpose(0, 1) if batch_first else step, state)
                wanted = expected[:, t : t + 1] if batch_first else expected[t : t + 1]
                assert output.shape == wanted.shape
                assert (output - wanted).abs().max() < 1e-5
            assert len(used) == 5 * 3
            with pytest.raises(TypeError, match=r"input: must be torch\.float32"):
                layers(step.double(), state)
            short = state[:2] if make_layers is KRU else tuple(s[:2] for s in state)
            with pytest.raises(ValueError, match="h_0: "):
                layers(step, short)
            for dtype in (torch.long, torch.float64):
                other = state.to(dtype) if make_layers is KRU else [s.to(dtype) for s in state]
                with pytest.raises(TypeError, match=r"h_0: must be torch\.float32"):
                    layers(step.transpose(0, 1) if batch_first else step, other)
    for a, b in zip(
        [last] if make_layers is KRU else last, [state] if make_layers is KRU else state
    ):
        assert (a - b).abs().max() < 1e-5


@pytest.mark.parametrize("make_layers", [KRU, KRULSTM])
def test_a_copy_is_not_decoding(make_layers):
    torch.manual_seed(0)
    layers, x = make_layers(5, 12).eval(), torch.randn(1, 2, 5)
    with torch.no_grad():
        with layers.decoding():
            _, state = layers(x)
            layers(x, state)
            assert layers.steps
            copies = copy.copy(layers), copy.deepcopy(layers), pickle.loads(pickle.dumps(layers))
        for twin in copies:
            assert twin.steps is None
            for weight in twin.parameters():
                weight.mul_(0.5)
            output, _ = twin(x, state)
            with twin.decoding():
                assert torch.allclose(output, twin(x, state)[0], atol=1e-6)


class Recording(TorchDispatchMode):
    """What a CUDA graph does, on a CPU: what runs is noted, and runs again on the same memory."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, results))
        return results

    def replay(self):
        for function, args, kwargs, results in self.calls:
            again = function(*args, **kwargs)
            for place, result in zip(tree_leaves(results), tree_leaves(again)):
                if isinstance(place, Tensor) and place.data_ptr() != result.data_ptr():
                    place.copy_(result)


@pytest.fixture
def graphs_on_a_cpu(monkeypatch):
    """`torch.cuda` as far as capturing goes; the list of recordings."""
    made = []
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, stand_in in {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": lambda: made.append(Recording()) or made[-1],
        "graph": lambda graph: graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return made


@pytest.mark.parametrize("model", ["kru", "krulstm"])
@pytest.mark.parametrize("reset", [False, True])
def test_steps_as_graphs(model, reset, graphs_on_a_cpu):
    """Each kind of call is captured once, and replays read what they are given."""
    torch.manual_seed(0)
    network = LanguageModel(LanguageModelConfig(model=model, d_model=16, hidden_size=12)).eval()
    tokens = torch.randint(257, (2, 8))
    cut = torch.zeros(2, 8, dtype=torch.bool)
    cut[0, 5] = reset
    with torch.no_grad():
        expected, _ = network(tokens, None, cut)
        with network.decoding():
            assert network.graphs is None  # on a CPU
            network.graphs = {}
            logits, state = network(tokens[:, :3], None, cut[:, :3])
            assert not graphs_on_a_cpu
            kept = []
            for t in range(3, 8):
                at = slice(t, t + 1)
                kept.append(state)
                logits, state = network(tokens[:, at], state, cut[:, at] if reset else None)
                assert (logits[:, 0] - expected[:, t]).abs().max() < 1e-5
            assert len(graphs_on_a_cpu) == 1
            again, _ = network(tokens[:, 5:6], kept[2], cut[:, 5:6] if reset else None)
            assert (again[:, 0] - expected[:, 5]).abs().max() < 1e-5  # kept states are copies
            network(tokens[:1, :1], [s[:1] for s in state])  # one row
            assert len(graphs_on_a_cpu) == 2
            with torch.enable_grad():
                network(tokens[:, :1], state)[0].sum().backward()
            network.train()(tokens[:, :1], state)
            assert len(graphs_on_a_cpu) == 2
        assert network.graphs is None
