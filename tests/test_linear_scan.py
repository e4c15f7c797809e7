"""`kru_linear_scan` against the dense complex128 loop of `test_scan`, and as an operation."""

import pytest
import torch
from test_scan import EXACT, Case, assert_close, dense_scan, inputs, square
from torch._dynamo.testing import CompileCounterWithBackend

from kru_triton import KRU, kru_linear_scan, kru_scan, unitary_
from kru_triton.lm.model import LanguageModel, LanguageModelConfig

LENGTHS = (13, 0, 5, 12, 1)
# blocks that divide T, do not, hold one step, and hold all; T = 13
CASES = [
    *(
        Case(square(2, 3), "identity", B=5, T=13, H=2, reset=True, cotangent=c)
        for c in ("h", "h_n")
    ),
    Case(square(2, 3), "identity", B=5, T=13, H=2, h_0=False, layout="time_first"),
    Case(square(5), "identity", B=5, T=13, field="real", reset=True),
    Case(square(4, 3), "identity", B=5, T=12, layout="time_first"),
]


def leaves(case, dtype=torch.float64):
    """Named leaf arguments, the reset and the cotangents of h and h_n."""
    x, factors, _, h_0, reset, dh, dh_n = inputs(case, dtype)
    named = {"x": x, "h_0": h_0, **{f"w{f}": w for f, w in enumerate(factors)}}
    named = {k: v.requires_grad_() for k, v in named.items() if v is not None}
    return named, reset, dh, dh_n


def call(named, **kwargs):
    factors = [v for k, v in named.items() if k[0] == "w"]
    return kru_linear_scan(named["x"], factors, named.get("h_0"), **kwargs)


def with_gradients(named, h, h_n, dh, dh_n):
    outputs, cotangents = zip(*((y, d) for y, d in ((h, dh), (h_n, dh_n)) if d is not None))
    gradients = torch.autograd.grad(outputs, list(named.values()), cotangents)
    return {"h": h, "h_n": h_n, **dict(zip(named, gradients))}


def expected(case, named, reset, dh, dh_n, lengths=None):
    """By the dense loop; rows of different length by running each for its own steps."""
    factors = [v for k, v in named.items() if k[0] == "w"]
    h_0 = named.get("h_0")
    if lengths is None:
        h, h_n = dense_scan(named["x"], factors, None, h_0, nonlinearity="identity", reset=reset)
        return with_gradients(named, h, h_n, dh, dh_n)
    h, h_n = [], []
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        x, cut = named["x"][one, :length], None if reset is None else reset[one, :length]
        start = None if h_0 is None else h_0[one]
        if length:
            y, last = dense_scan(x, factors, None, start, nonlinearity="identity", reset=cut)
        else:
            y, last = x, x.new_zeros(1, x.shape[2]) if start is None else start
        h.append(torch.nn.functional.pad(y, (0, 0, 0, case.T - length)))
        h_n.append(last)
    return with_gradients(named, torch.cat(h), torch.cat(h_n), dh, dh_n)


@pytest.mark.parametrize("block", [None, 1, 3, 4, 12, 13, 40])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_are_those_of_the_dense_loop(case, block):
    named, reset, dh, dh_n = leaves(case)
    result = with_gradients(named, *call(named, reset=reset, block=block), dh, dh_n)
    assert_close(result, expected(case, named, reset, dh, dh_n), EXACT)


@pytest.mark.parametrize("block", [None, 3, 13])
@pytest.mark.parametrize("h_0", [True, False])
def test_rows_of_different_length(block, h_0):
    case = Case(square(2, 3), "identity", B=5, T=13, H=2, reset=True, h_0=h_0)
    named, reset, dh, dh_n = leaves(case)
    want = expected(case, named, reset, dh, dh_n, LENGTHS)
    lengths = torch.tensor(LENGTHS)
    with torch.no_grad():  # what lies behind a row's end is not looked at
        named["x"][torch.arange(case.T) >= lengths[:, None]] = torch.nan
    h, h_n = call(named, reset=reset, block=block, lengths=lengths)
    assert_close(with_gradients(named, h, h_n, dh, dh_n), want, EXACT)


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

    def run(scan, dtype, **kwargs):
        named = {"x": x, "w0": a, "w1": b}
        named = {k: v.to(dtype).requires_grad_() for k, v in named.items()}
        h, h_n = scan(named["x"], [named["w0"], named["w1"]], **kwargs)
        return with_gradients(named, h, h_n, dh.to(dtype), None)

    exact = run(kru_scan, torch.float64, nonlinearity="identity")
    loop = run(kru_scan, torch.float32, nonlinearity="identity")
    blocks = run(kru_linear_scan, torch.float32)
    for name, want in exact.items():
        errors = [((r[name].double() - want).norm() / want.norm()).item() for r in (blocks, loop)]
        assert errors[0] <= 2 * errors[1] + 1e-6, (name, errors)


def test_on_the_kernels():
    """Interpreted: each pass is the kernel of `kru_scan`, which is tested by itself."""
    pytest.importorskip("triton")
    case = Case(square(8, 8), "identity", B=3, T=9, reset=True)
    named, reset, dh, dh_n = leaves(case, torch.float32)
    lengths = torch.tensor([9, 4, 0])
    results = [
        with_gradients(
            named,
            *call(named, reset=reset, lengths=lengths, block=4, backend=backend),
            *(dh, dh_n),
        )
        for backend in ("triton", "torch")
    ]
    assert_close(*results, 1e-4)  # products of bfloat16 pairs, as in test_kernels


def test_bfloat16_rounds_once_per_pass():
    case = Case(square(4, 4), "identity", B=2, T=64)
    named, _, dh, dh_n = leaves(case, torch.float32)
    want = with_gradients(named, *call(named), dh, dh_n)
    with torch.autocast("cpu", torch.bfloat16):
        h, h_n = call(named)
    assert h.dtype == torch.bfloat16
    assert h_n.dtype == torch.float32
    assert_close(with_gradients(named, h.float(), h_n, dh, dh_n), want, 2e-2)


@pytest.mark.parametrize("block", [0, 4])
def test_opcheck(block):
    case = Case(square(2, 3), "identity", B=2, T=9, reset=True)
    named, reset, _, _ = leaves(case)
    x, h_0, *factors = named.values()
    x, ops = x.transpose(0, 1), torch.ops.kru_triton
    rest = (reset.t(), torch.tensor([9, 4]), None, "identity", "auto", "auto", block)
    torch.library.opcheck(ops.linear_recurrence.default, (x, *factors, None, h_0, *rest))
    with torch.no_grad():
        h, h_n = ops.linear_recurrence(x, *factors, None, h_0, *rest)
        cotangents = torch.randn_like(h), torch.randn_like(h_n)
        a, b, h_0 = (w.detach() for w in (*factors, h_0))
        saved = (h, None, a, b, None, h_0)
        torch.library.opcheck(ops.linear_recurrence_backward.default, (*cotangents, *saved, *rest))


def test_compile_makes_one_graph_for_any_length():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for batch, time in ((3, 20), (2, 50), (4, 333)):
        x = torch.randn(batch, time, 12, requires_grad=True)
        for size in (0, 1):
            torch._dynamo.mark_dynamic(x, size)
        named = {"x": x, "w0": torch.randn(2, 1, 2, 2) / 3, "w1": torch.randn(2, 1, 3, 3) / 3}
        for got, want in zip(compiled(named), call(named)):
            torch.testing.assert_close(got, want)
    assert counter.frame_count == 1


@pytest.mark.parametrize(("batch", "time"), [(0, 9), (3, 0), (3, 1)])
def test_empty_and_short(batch, time):
    x = torch.randn(batch, time, 12, requires_grad=True)
    w, h_0 = unitary_(torch.empty(2, 1, 6, 6)), torch.ones(batch, 12, requires_grad=True)
    results = []
    for scan, options in ((kru_linear_scan, {}), (kru_scan, {"nonlinearity": "identity"})):
        h, h_n = scan(x, [w], h_0=h_0, **options)
        results += [(h, h_n, *torch.autograd.grad(h.sum() + h_n.sum(), (x, h_0)))]
    for got, want in zip(*results):
        torch.testing.assert_close(got, want)


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


def test_second_derivatives_raise():
    x, *w = (torch.randn(s).double() for s in ((2, 6, 12), (2, 1, 2, 2), (2, 1, 3, 3)))
    h, _ = kru_linear_scan(x.requires_grad_(), w)
    (first,) = torch.autograd.grad(h.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"kru_linear_scan: .* once; .* use torch\.func"):
        first.sum().backward()


def test_only_a_linear_recurrence_runs_in_parallel_over_time():
    with pytest.raises(ValueError, match=r"time_parallel: only .* got 'modrelu'"):
        KRU(4, 4, time_parallel=True)
    with pytest.raises(TypeError, match="time_parallel: must be a bool, got int"):
        KRU(4, 4, nonlinearity="identity", time_parallel=1)
