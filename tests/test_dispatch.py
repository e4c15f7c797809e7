"""One operation, two backends: `backend="triton"` against `backend="torch"` through the public op.

Without a GPU the kernels run in Triton's interpreter (see conftest.py).
"""

import pytest
import torch

from kru_triton import KRU, kru_scan, unitary_, why_not_triton

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
