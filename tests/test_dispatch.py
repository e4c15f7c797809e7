"""One operation, two backends: `backend="triton"` against `backend="torch"` through the public op.

Without a GPU the kernels run in Triton's interpreter (see conftest.py).
"""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from kru_triton import KRU, kru_embedding_scan, kru_scan, unitary_, why_not_triton
from kru_triton.kernels import why_not
from kru_triton.lm.model import LanguageModel, LanguageModelConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize(
    ("nonlinearity", "parts", "heads", "shapes"),
    [
        ("modrelu", 2, 1, (2,) * 7),
        ("modtanh", 2, 2, (8, 16)),
        ("relu", 1, 3, (8, 8)),
        ("tanh", 2, 1, (3, 11)),
        ("identity", 2, 1, (64,)),
    ],
)
def test_both_backends_give_the_same_numbers(nonlinearity, parts, heads, shapes):
    """float32: products of bfloat16 pairs are exact to 2^-17; gradients pass through them twice."""
    torch.manual_seed(0)
    units = heads * torch.Size(shapes).numel()
    batch, time, features = 3, 6, parts * units

    def randn(*shape):
        return torch.randn(*shape, device=DEVICE, requires_grad=True)

    x, h_0 = randn(batch, time, features), randn(batch, features)
    factors = [unitary_(torch.empty(parts, heads, p, p, device=DEVICE)) for p in shapes]
    beta = (0.05 * torch.randn(units, device=DEVICE)) if nonlinearity == "modrelu" else None
    reset = torch.rand(batch, time, device=DEVICE) < 0.3
    reset[0] = False  # one row keeps its initial state, or nothing of its gradient would be seen
    inputs = [x, h_0, *(w.requires_grad_() for w in factors)]
    inputs += [] if beta is None else [beta.requires_grad_()]
    on_h, on_h_n = torch.randn_like(x), torch.randn_like(h_0)
    options = {"nonlinearity": nonlinearity, "reset": reset}
    assert why_not_triton(x, factors, beta, h_0, **options) is None
    results = {}
    for backend in ("torch", "triton"):
        h, h_n = kru_scan(x, factors, beta, h_0, backend=backend, **options)
        loss = (h * on_h).sum() + (h_n * on_h_n).sum()
        results[backend] = [h, h_n, *torch.autograd.grad(loss, inputs)]
    for index, (got, want) in enumerate(zip(results["triton"], results["torch"])):
        assert got.dtype == want.dtype
        assert relative_error(got, want) < (2e-5 if index < 2 else 3e-4), index


def test_kernels_without_a_start_or_a_cut():
    """No h_0, no reset, a cotangent on h_n alone."""
    x = torch.randn(2, 5, 128, device=DEVICE, requires_grad=True)
    factors = [unitary_(torch.empty(2, 1, 8, 8, device=DEVICE)) for _ in range(2)]
    grads = [
        torch.autograd.grad(kru_scan(x, factors, backend=backend)[1].square().sum(), x)[0]
        for backend in ("triton", "torch")
    ]
    assert relative_error(*grads) < 3e-4


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


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"dtype": torch.float16}, "float16"),
        ({"shape": (65,)}, "65 x 65"),
        ({"shape": (2, 2)}, "too few"),
    ],
)
def test_what_the_kernels_refuse(change, reason):
    shape, dtype = change.get("shape", (8, 8)), change.get("dtype", torch.float32)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    factors = [torch.zeros(2, 1, p, p, dtype=state, device=DEVICE) for p in shape]
    x = torch.zeros(1, 2, 2 * torch.Size(shape).numel(), dtype=dtype, device=DEVICE)
    assert reason in why_not_triton(x, factors)
    with pytest.raises(RuntimeError, match=f'backend="triton" cannot run here: .*{reason}'):
        kru_scan(x, factors, backend="triton")


# Every form of the call: a sequence, rows of different length, rows of a table


VOCABULARY = 7
FORMS = ("plain", "lengths", "tokens", "tokens and lengths")
forms = pytest.mark.parametrize("form", FORMS)
backends = pytest.mark.parametrize("backend", ["torch", "triton"])


def arguments(form, batch=5, time=4, act="modrelu", shapes=(8, 8), heads=1, dtype=torch.float32):
    """(scan, leaves by name, keyword arguments): all that the form takes, and reset and h_0."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    units = heads * torch.Size(shapes).numel()

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE)

    rows = (VOCABULARY,) if "tokens" in form else (batch, time)
    leaves = {"x": randn(*rows, 2 * units).to(dtype), "h_0": randn(batch, 2 * units)}
    leaves |= {f"w{i}": unitary_(torch.empty(2, heads, p, p)) for i, p in enumerate(shapes)}
    if act == "modrelu":
        leaves["beta"] = -0.05 * randn(units).abs()  # β > 0 magnifies the errors of tiny |z|
    leaves = {k: v.to(DEVICE).requires_grad_() for k, v in leaves.items()}
    reset = torch.rand(batch, time, generator=generator) < 0.3
    reset[: batch // 2] = False
    options = {"reset": reset.to(DEVICE), "nonlinearity": act}
    if "lengths" in form:
        options["lengths"] = (time - torch.arange(batch) % (time + 1)).flip(0).to(DEVICE)
    if "tokens" in form:
        tokens = torch.randint(VOCABULARY, (batch, time), generator=generator)
        options["tokens"] = tokens.to(DEVICE)
    return leaves, options


def call(leaves, options):
    factors = [v for k, v in leaves.items() if k[0] == "w"]
    rest = (factors, leaves.get("beta"), leaves["h_0"])
    options = dict(options)
    if "tokens" in options:
        return kru_embedding_scan(options.pop("tokens"), leaves["x"], *rest, **options)
    return kru_scan(leaves["x"], *rest, **options)


def outputs_and_gradients(leaves, options):
    h, h_n = call(leaves, options)
    generator = torch.Generator().manual_seed(1)
    loss = sum((y * torch.randn(y.shape, generator=generator).to(y)).sum() for y in (h, h_n))
    return [h, h_n, *torch.autograd.grad(loss, list(leaves.values()))]


@pytest.mark.parametrize("act", ["modrelu", "modtanh"])
@pytest.mark.parametrize(("shapes", "batch"), [((8, 8), 5), ((16, 16), 3)], ids=["packed", "alone"])
@pytest.mark.parametrize("form", FORMS[1:])
def test_both_backends_give_the_same_numbers_for(form, act, shapes, batch):
    """Lengths from 0 to T, cotangents on the zeros beyond them, NaN in the padding."""
    leaves, options = arguments(form, batch, 3, act=act, shapes=shapes)
    if form == "lengths":
        padding = torch.arange(3, device=DEVICE) >= options["lengths"][:, None]
        x = leaves["x"].detach().masked_fill(padding[..., None], float("nan"))
        leaves["x"] = x.requires_grad_()
    want = outputs_and_gradients(leaves, {**options, "backend": "torch"})
    got = outputs_and_gradients(leaves, {**options, "backend": "triton"})
    for index, (g, w) in enumerate(zip(got, want)):
        assert g.dtype == w.dtype
        assert relative_error(g, w) < (2e-5 if index < 2 else 3e-4), index


RESETS = [
    ("torch", "modrelu", (8, 8), 5),
    ("torch", "modtanh", (3, 11), 3),
    ("triton", "modrelu", (8, 8), 5),
    ("triton", "modtanh", (8, 8), 5),
    ("triton", "modtanh", (3, 11), 3),
    ("triton", "relu", (16, 16), 2),
    ("streamed", "modrelu", (32, 8), 3),
    ("streamed", "modtanh", (8, 32), 3),
]


@pytest.mark.parametrize(("backend", "act", "shapes", "batch"), RESETS)
def test_after_a_reset_the_past_does_not_matter_were_it_nan(
    backend, act, shapes, batch, monkeypatch
):
    """Bit by bit what the same past gives where it is finite; nothing flows back into it."""
    if backend == "streamed":
        monkeypatch.setattr(why_not, "MAX_HELD_SIDE", 16)
    leaves, options = arguments("plain", batch=batch, act=act, shapes=shapes)
    options |= {
        "reset": torch.zeros_like(options["reset"]),
        "backend": backend.replace("streamed", "triton"),
    }
    options["reset"][1, [0, 2, 3]] = True  # its start, and step 2 by itself
    sane = outputs_and_gradients(leaves, options)
    with torch.no_grad():
        leaves["h_0"][1, ::2], leaves["h_0"][1, 1::2] = float("nan"), float("inf")
    again = outputs_and_gradients(leaves, options)
    assert all(torch.equal(x, y) for x, y in zip(again, sane))
    assert not again[3][1].any()  # of h_0
    with torch.no_grad():
        leaves["x"][1, 2] = float("nan")
    h, h_n, dx, dh_0 = outputs_and_gradients(leaves, options)[:4]
    assert h[1, 2].isnan().any()
    for got, want in ((h, sane[0]), (dx, sane[2])):
        got[1, 2] = want[1, 2]
        assert torch.equal(got, want)
    assert torch.equal(h_n, sane[1])
    assert torch.equal(dh_0, sane[3])


@backends
def test_no_gradient_passes_a_reset_were_it_infinite(backend):
    leaves, options = arguments("plain", time=2)
    options["reset"][:] = torch.tensor([True, False])
    h, _ = call(leaves, {**options, "backend": backend})
    h.backward(torch.full_like(h, float("inf")))
    assert not leaves["h_0"].grad.any()


@backends
@forms
@pytest.mark.parametrize(("batch", "time"), [(0, 4), (3, 0), (0, 0)])
def test_empty(form, backend, batch, time):
    leaves, options = arguments(form, batch, time)
    results = outputs_and_gradients(leaves, {**options, "backend": backend})
    h, h_n, dx, dh_0, *d_weights = results
    assert h.shape == (batch, time, 128)
    assert torch.equal(h_n, leaves["h_0"])
    assert dx.shape == leaves["x"].shape
    assert dh_0.shape == (batch, 128)
    assert not any(d.any() for d in (dx, *d_weights))
    assert dh_0.all()  # of h_n, which is h_0


@backends
@forms
def test_opcheck(form, backend):
    leaves, options = arguments(form, batch=2, time=2, act="tanh")
    x, a, b, h_0 = (leaves[k] for k in ("x", "w0", "w1", "h_0"))
    x = x if "tokens" in form else x.transpose(0, 1)
    flags = (options["reset"], options.get("lengths"), options.get("tokens"))
    flags = [v if v is None else v.t() for v in flags]
    how = ("tanh", backend, "auto")
    ops = torch.ops.kru_triton
    torch.library.opcheck(ops.recurrence.default, (x, a, b, None, h_0, *flags, *how))
    x, a, b, h_0 = (v.detach() for v in (x, a, b, h_0))
    h, h_n = ops.recurrence(x, a, b, None, h_0, *flags, *how)
    source = x if "tokens" in form else None
    saved = (h, source, a, b, None, h_0, *flags, *how)
    cotangents = torch.randn_like(h), torch.randn_like(h_n)
    torch.library.opcheck(ops.recurrence_backward.default, (*cotangents, *saved))


@backends
@forms
def test_autocast_gives_bfloat16_in_and_out_and_a_float32_state(form, backend):
    leaves, options = arguments(form, time=2)
    options["backend"] = backend
    with torch.autocast(DEVICE, torch.bfloat16):
        h, h_n = call(leaves, options)
    assert h.dtype == torch.bfloat16
    assert h_n.dtype == torch.float32
    rounded = {**leaves, "x": leaves["x"].bfloat16()}
    expected, expected_n = call(rounded, options)
    assert torch.equal(h, expected)
    assert torch.equal(h_n, expected_n)
    loss = h.float().square().sum() + h_n.square().sum()
    for name, gradient in zip(leaves, torch.autograd.grad(loss, list(leaves.values()))):
        assert gradient.dtype == torch.float32, name
        assert gradient.isfinite().all(), name


@forms
def test_compile_makes_one_graph_for_marked_batch_and_length(form):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for time, batch in ((2, 3), (3, 2), (2, 5)):
        leaves, options = arguments(form, batch, time)
        options["backend"] = "triton"
        dynamic = [(options["reset"], (0, 1)), (leaves["h_0"], (0,))]
        dynamic += [] if "tokens" in form else [(leaves["x"], (0, 1))]
        dynamic += [(options[k], range(options[k].dim())) for k in form.split() if k in options]
        for tensor, dims in dynamic:
            for dim in dims:
                torch._dynamo.mark_dynamic(tensor, dim)
        for got, want in zip(compiled(leaves, options), call(leaves, options)):
            assert torch.equal(got, want)
    assert counter.frame_count == 1


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs are made of launches on a GPU")
@forms
def test_a_cuda_graph_replays_forward_and_backward(form):
    """Nothing in a call waits for the device, and new inputs give new results."""
    leaves, options = arguments(form, batch=33, time=17, shapes=(16, 16))
    options["backend"] = "triton"
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    cotangents = [torch.randn_like(y) for y in call(leaves, options)]

    def step():
        return torch.autograd.grad(call(leaves, options), list(leaves.values()), cotangents)

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
            if "tokens" in options:
                options["tokens"].copy_(torch.randint_like(options["tokens"], VOCABULARY))
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

    leaves, options = arguments("plain")
    h, _ = call(leaves, {**options, "backend": "triton"})
    monkeypatch.setattr(scan, "scan_forward", broken)
    monkeypatch.setattr(scan, "scan_backward", broken)
    for run in (
        lambda: call(leaves, {**options, "backend": "triton"}),
        lambda: torch.autograd.grad(h.sum(), leaves["x"]),
    ):
        with pytest.raises(RuntimeError, match="PassManager::run failed") as caught:
            run()
        assert 'backend="torch"' in "".join(caught.value.__notes__)
    call(leaves, {**options, "backend": "torch"})


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
