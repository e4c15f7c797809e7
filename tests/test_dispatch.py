"""The choice of a backend: layers on the kernels, autocast, CUDA graphs, and errors of the kernels.

Without a GPU the kernels run in Triton's interpreter (see conftest.py).
"""

import pytest
import torch
from cases import DEVICE, OPS, VOCABULARY, Case, draw, leaves_of, moved, square, with_leaves
from oracle import relative_error

from kru_triton import KRU
from kru_triton.lm.model import LanguageModel, LanguageModelConfig

pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

FORMS = {
    "plain": Case(square(8, 8), B=5, T=2, reset=True),
    "lengths": Case(square(8, 8), B=5, T=2, reset=True, lengths=(2, 0, 1, 2, 1)),
    "tokens": Case(square(8, 8), op="embedding_scan", B=5, T=2, reset=True),
}
forms = pytest.mark.parametrize("case", FORMS.values(), ids=FORMS.keys())


def call_of(case, backend):
    """A function of leaves, which runs the case on a backend, and the leaves."""
    arguments = moved(draw(case, torch.float32)[0], DEVICE)
    leaves = {k: v.requires_grad_() for k, v in leaves_of(arguments).items()}

    def call(leaves):
        return OPS[case.op][0](**with_leaves(arguments, leaves), backend=backend)

    return call, leaves, arguments


def test_a_module_trains_on_the_kernels():
    torch.manual_seed(0)
    kru = KRU(5, 64, num_heads=1, nonlinearity="relu", backend="triton").to(DEVICE)
    x = torch.randn(7, 2, 5, device=DEVICE)
    target = torch.randn(7, 2, 128, device=DEVICE)
    optimizer = torch.optim.Adam(kru.parameters(), lr=1e-2)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = (kru(x)[0] - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]


@pytest.mark.skipif(DEVICE != "cpu", reason="says what auto does on a CPU")
def test_auto_leaves_the_interpreter_alone():
    kru = KRU(5, 64).to(DEVICE)
    x = torch.randn(3, 2, 5)
    assert torch.equal(kru(x)[0], KRU.forward(_with_backend(kru, "torch"), x)[0])


def _with_backend(kru, backend):
    kru.backend = backend
    return kru


@pytest.mark.parametrize("backend", ["torch", "triton"])
@forms
def test_autocast_gives_bfloat16_in_and_out_and_a_float32_state(case, backend):
    call, leaves, _ = call_of(case, backend)
    with torch.autocast(DEVICE, torch.bfloat16):
        h, h_n = call(leaves)
    assert h.dtype == torch.bfloat16
    assert h_n.dtype == torch.float32
    name = "table" if "table" in leaves else "x_proj"
    expected, expected_n = call({**leaves, name: leaves[name].bfloat16()})
    assert torch.equal(h, expected)
    assert torch.equal(h_n, expected_n)
    loss = h.float().square().sum() + h_n.square().sum()
    for name, gradient in zip(leaves, torch.autograd.grad(loss, list(leaves.values()))):
        assert gradient.dtype == torch.float32, name
        assert gradient.isfinite().all(), name


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs are made of launches on a GPU")
@pytest.mark.parametrize("op", ["scan", "embedding_scan", "lstm_scan"])
def test_a_cuda_graph_replays_forward_and_backward(op):
    """Nothing in a call waits for the device, and new inputs give new results."""
    lengths = tuple(range(17)) * 2
    case = Case(square(16, 16), op=op, B=34, T=17, reset=True, lengths=lengths)
    call, leaves, arguments = call_of(case, "triton")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    cotangents = [torch.randn_like(y) for y in torch.utils._pytree.tree_leaves(call(leaves))]

    def step():
        results = torch.utils._pytree.tree_leaves(call(leaves))
        return torch.autograd.grad(results, list(leaves.values()), cotangents)

    with torch.cuda.stream(side):  # compiles the kernels and warms the allocator
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (5, 6):
        torch.manual_seed(seed)
        with torch.no_grad():
            for leaf in leaves.values():
                leaf.add_(0.1 * torch.randn_like(leaf))
            if "tokens" in arguments:
                arguments["tokens"].copy_(torch.randint_like(arguments["tokens"], VOCABULARY))
        graph.replay()
        for got, want in zip(captured, step()):
            assert torch.equal(got, want)


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs are made of launches on a GPU")
@pytest.mark.parametrize("model", ["kru", "krulstm"])
@pytest.mark.parametrize("reset", [False, True])
def test_decoding_replays_a_graph(model, reset):
    config = LanguageModelConfig(model=model, d_model=64, hidden_size=256, precision="fp32")
    network = LanguageModel(config).eval().to(DEVICE)
    tokens = torch.randint(257, (2, 8), device=DEVICE)
    cut = torch.zeros(2, 8, dtype=torch.bool, device=DEVICE)
    cut[0, 5] = reset
    with torch.no_grad():
        expected, _ = network(tokens, None, cut)
        with network.decoding():
            _, state = network(tokens[:, :3], None, cut[:, :3])
            for t in range(3, 8):
                at = slice(t, t + 1)
                logits, state = network(tokens[:, at], state, cut[:, at] if reset else None)
                assert (logits[:, 0] - expected[:, t]).abs().max() < 1e-3
            assert len(network.graphs) == 1


def test_an_error_of_the_kernels_names_the_way_out(monkeypatch):
    """As one that the compiler raises on a device that nobody tried."""
    from kru_triton.kernels import scan

    def broken(*args, **kwargs):
        raise RuntimeError("PassManager::run failed")

    call, leaves, _ = call_of(FORMS["plain"], "triton")
    h, _ = call(leaves)
    monkeypatch.setattr(scan, "scan_forward", broken)
    monkeypatch.setattr(scan, "scan_backward", broken)
    for run in (lambda: call(leaves), lambda: torch.autograd.grad(h.sum(), leaves["x_proj"])):
        with pytest.raises(RuntimeError, match="PassManager::run failed") as caught:
            run()
        assert 'backend="torch"' in "".join(caught.value.__notes__)
    call_of(FORMS["plain"], "torch")[0](leaves)


def test_packed_sequences_and_tokens_of_a_module_on_the_kernels():
    """Two layers, both directions: the numbers of the torch backend, gradients too."""
    torch.manual_seed(0)
    kru = KRU(5, 64, 2, bidirectional=True, nonlinearity="relu").to(DEVICE)
    embedding = torch.randn(VOCABULARY, 5, device=DEVICE, requires_grad=True)
    rows = [torch.randint(VOCABULARY, (n,), device=DEVICE) for n in (2, 4, 1)]
    packed = torch.nn.utils.rnn.pack_sequence(rows, enforce_sorted=False)
    results = {}
    for backend in ("torch", "triton"):
        kru.backend = backend
        output, h_n = kru(packed, embedding=embedding)
        loss = output.data.sin().sum() + h_n.square().sum()
        grads = torch.autograd.grad(loss, [embedding, *kru.parameters()])
        results[backend] = [output.data, h_n, *grads]
    for index, (got, want) in enumerate(zip(results["triton"], results["torch"])):
        assert relative_error(got, want) < (5e-5 if index < 2 else 5e-4), index
