"""Where nothing but plain operations runs: torch.func's transforms, forward mode and ONNX.

The ops are the measure: their values and first gradients, and differences of those in float64.
"""

import copy
import functools
import logging

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)
from torch.nn.utils.rnn import pack_sequence

from kru_triton import (
    KRU,
    KRULSTM,
    KRUCell,
    kru_embedding_scan,
    kru_linear_scan,
    kru_lstm_scan,
    kru_scan,
    kru_step,
    unitary_,
    why_not_triton,
    why_not_triton_lstm,
)
from kru_triton.lm.model import LanguageModel, LanguageModelConfig
from kru_triton.nonlinearity import NONLINEARITIES
from kru_triton.ops import dispatch

# Relative: what a few hundred roundings of 1e-16 make of the same derivative, and a difference over
# 2e-6 in float64, whose truncation and rounding are 1e-12 and 1e-10 of it where σ is smooth.
EXACT, DIFFERENCE = 1e-12, 1e-7


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def weights(*sizes, heads=1, parts=2):
    return [unitary_(torch.empty(parts, heads, p, p, dtype=torch.float64)) for p in sizes]


RESET = torch.tensor([[False, False, True, False], [False, True, False, False]])
LENGTHS = torch.tensor([4, 2])
TOKENS = torch.tensor([[0, 3, 1, 3], [2, 2, 4, 0]])


def of_scan(act, parts=2):
    """kru_scan of x, two factors, h_0 and maybe β: two heads, with a cut and a shorter row."""

    def function(x, a, b, h_0, *beta):
        options = dict(nonlinearity=act, reset=RESET, lengths=LENGTHS)
        return kru_scan(x, [a, b], *beta or [None], h_0, **options)

    x, h_0 = randn(2, 4, parts * 12), randn(2, parts * 12)
    beta = [0.3 * randn(12)] if act == "modrelu" else []
    return function, (x, *weights(2, 3, heads=2, parts=parts), h_0, *beta)


def of_module(module, *inputs, **options):
    """A layer as a function of its inputs and parameters."""
    names, parameters = zip(*module.named_parameters())

    def function(*args):
        given, args = args[: len(inputs)], dict(zip(names, args[len(inputs) :]))
        result = functional_call(module, args, given, options)
        return tuple(torch.utils._pytree.tree_leaves(result))

    return function, (*inputs, *(p.detach().clone() for p in parameters))


def functions():
    torch.manual_seed(0)
    double = {"dtype": torch.float64}
    return {
        **{f"scan {act}": of_scan(act) for act in NONLINEARITIES},
        "scan real": of_scan("modrelu", parts=1),
        "embedding_scan": (
            lambda table, *w: kru_embedding_scan(TOKENS, table, w, reset=RESET),
            (randn(5, 12), *weights(2, 3)),
        ),
        "step": (
            lambda x, h_0, w: (kru_step(x, [w], h_0=h_0, nonlinearity="modtanh"),),
            (randn(2, 6), randn(2, 6), *weights(3)),
        ),
        "linear_scan": (
            lambda x, h_0, *w: kru_linear_scan(x, w, h_0, reset=RESET, lengths=LENGTHS, block=2),
            (randn(2, 4, 12), randn(2, 12), *weights(2, 3)),
        ),
        "lstm_scan": (
            lambda x, h_0, c_0, *w: torch.utils._pytree.tree_leaves(
                kru_lstm_scan(x, w, h_0, c_0, reset=RESET, lengths=LENGTHS)
            ),
            (randn(2, 4, 48), randn(2, 12), randn(2, 12), *weights(2, 3, heads=8, parts=1)),
        ),
        "KRU": of_module(
            KRU(3, 4, 2, bidirectional=True, recompute=2, **double), randn(4, 2, 3), reset=RESET
        ),
        "KRU time_parallel": of_module(
            KRU(3, 4, nonlinearity="identity", time_parallel=True, **double), randn(4, 2, 3)
        ),
        "KRU state_gate": of_module(
            KRU(3, 4, state_gate="modtanh", **double), randn(4, 2, 3), reset=RESET
        ),
        "KRUCell": of_module(KRUCell(3, 4, **double), randn(2, 3), randn(2, 8)),
        "KRULSTM": of_module(
            KRULSTM(3, 4, 2, recompute=2, **double),
            randn(4, 2, 3),
            reset=RESET,
        ),
    }


FUNCTIONS = functions()
of_all = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())


def loss_of(function):
    """A number that all results matter to, none linearly."""

    def loss(*args):
        return sum((i + 1) * y.sin().sum() for i, y in enumerate(function(*args)))

    return loss


def gradient(loss, args):
    """By the op."""
    args = [a.detach().clone().requires_grad_() for a in args]
    return torch.autograd.grad(loss(*args), args)


def flat(tensors):
    return torch.cat([t.flatten() for t in torch.utils._pytree.tree_leaves(tensors)])


def assert_near(actual, expected, limit=EXACT):
    actual, expected = flat(actual), flat(expected)
    assert actual.isfinite().all()
    assert expected.norm() > 0
    error = ((actual - expected).norm() / expected.norm()).item()
    assert error < limit, f"{error:.1e}"


# Every function under every transform


@of_all
def test_forward_mode_is_the_derivative(function):
    """The transpose of the op's gradient: ⟨u, J v⟩ = ⟨Jᵀ u, v⟩."""
    function, args = function
    torch.manual_seed(1)
    v = [torch.randn_like(a) for a in args]
    values, tangents = jvp(function, args, tuple(v))
    assert_near(values, function(*args), 1e-13)
    for u in (randn(flat(values).numel()) for _ in range(2)):
        transposed = gradient(lambda *a, u=u: flat(function(*a)) @ u, args)
        expected = flat(transposed) @ flat(v)
        assert abs(flat(tangents) @ u - expected) < EXACT * flat(transposed).norm() * flat(v).norm()
    with forward_ad.dual_level():
        duals = function(*(forward_ad.make_dual(*pair) for pair in zip(args, v)))
        assert_near([forward_ad.unpack_dual(d).tangent for d in duals], tangents)


@of_all
def test_reverse_mode_is_the_op_s(function):
    function, args = function
    loss = loss_of(function)
    expected = gradient(loss, args)
    everything = tuple(range(len(args)))
    assert_near(grad(loss, everything)(*args), expected)
    value, back = vjp(loss, *args)
    assert_near(back(torch.ones_like(value)), expected)
    assert_near(jacrev(loss, everything)(*args), expected)
    assert_near(jacfwd(loss, everything)(*args), expected)


@of_all
def test_gradients_per_sample(function):
    """Three samples of everything, weights included, one by one through the op."""
    function, args = function
    loss, everything = loss_of(function), tuple(range(len(args)))
    torch.manual_seed(2)
    samples = [a + 0.1 * torch.randn(3, *a.shape, dtype=a.dtype) for a in args]
    per_sample = vmap(grad(loss, everything))
    expected = zip(*(gradient(loss, sample) for sample in zip(*samples)))
    actual = per_sample(*samples)
    assert_near(actual, [torch.stack(g) for g in expected])
    nested = vmap(per_sample)(*(s[None] for s in samples))
    assert_near(nested, actual)


@of_all
def test_second_derivatives(function):
    """Forward over reverse and reverse over forward, against differences of the op's gradient."""
    function, args = function
    loss, everything = loss_of(function), tuple(range(len(args)))
    torch.manual_seed(3)
    v = tuple(torch.randn_like(a) for a in args)
    there, back = (
        flat(gradient(loss, [a + step * d for a, d in zip(args, v)])) for step in (1e-6, -1e-6)
    )
    expected = (there - back) / 2e-6
    assert_near(jvp(grad(loss, everything), args, v)[1], expected, DIFFERENCE)
    assert_near(grad(lambda *a: jvp(loss, a, v)[1], everything)(*args), expected, DIFFERENCE)


# Values and rules are those of the ops


@pytest.mark.parametrize("act", ["modrelu", "modtanh"])
@pytest.mark.parametrize("beta", [0.5, 0.0, -0.5])
def test_at_zero_all_derivatives_are_finite_and_the_op_s(act, beta):
    """The first states are exactly 0, where |z| has no derivative."""
    x = torch.zeros(2, 3, 12, dtype=torch.float64)
    x[:, 2, ::2] = 1
    w, betas = weights(2, 3), [torch.full((6,), beta, dtype=torch.float64)][: act == "modrelu"]

    def loss(x):
        return kru_scan(x, w, *betas, nonlinearity=act)[0].sin().sum()

    expected = gradient(loss, [x])
    for derivative in (grad, jacfwd):
        assert_near(derivative(loss)(x), expected)
    assert hessian(loss)(x).isfinite().all()


def test_dtypes_and_layout_are_those_of_the_op():
    torch.manual_seed(3)
    w = [v.float() for v in weights(2, 3)]
    for x, autocast in ((randn(2, 4, 12).bfloat16(), False), (randn(2, 4, 12).float(), True)):
        with torch.autocast("cpu", enabled=autocast):
            expected = kru_scan(x, w)
            actual, tangents = jvp(lambda x: kru_scan(x, w), (x,), (x,))
            g = grad(lambda x: kru_scan(x, w)[0].float().sum())(x)
        assert g.dtype == x.dtype
        for got, dot, want in zip(actual, tangents, expected):
            assert got.dtype == dot.dtype == want.dtype
            assert got.stride() == want.stride()
            assert (got - want).abs().max() <= want.abs().max() * torch.finfo(want.dtype).eps


def test_samples_may_have_lengths_resets_and_tokens_of_their_own():
    table, w = randn(5, 12), weights(2, 3)
    torch.manual_seed(4)
    samples = (
        torch.randint(5, (3, 2, 4)),
        torch.tensor([[4, 1], [0, 2], [3, 3]]),
        torch.rand(3, 2, 4) < 0.3,
    )

    def run(tokens, lengths, reset):
        return kru_embedding_scan(tokens, table, w, lengths=lengths, reset=reset)

    expected = zip(*(run(*sample) for sample in zip(*samples)))
    for got, want in zip(vmap(run)(*samples), expected):
        assert torch.allclose(got, torch.stack(want), rtol=0, atol=1e-14)
    tokens, lengths, reset = (s.clone() for s in samples)
    tokens[2, 1, 0] = -1
    with pytest.raises(ValueError, match=r"tokens: must be .* 4 .*, got values from -1 to"):
        vmap(run)(tokens, lengths, reset)
    lengths[1, 0] = 5
    with pytest.raises(ValueError, match=r"lengths: must be .* 4 .*, got values from 2 to 5"):
        grad(lambda x: kru_scan(x, w, lengths=lengths[1])[0].sum())(randn(2, 4, 12))


def test_beyond_a_length_and_before_a_cut_there_may_be_anything():
    """Neither values nor derivatives see it, of the factors too."""
    x, w = randn(2, 4, 12), weights(2, 3)

    def derivatives(function, x, w):
        loss = loss_of(lambda x, *w: torch.utils._pytree.tree_leaves(function(x, w)))
        return grad(loss, (0, 1, 2))(x, *w)

    lengths = torch.tensor([4, 2])
    cases = (
        (kru_scan, x, w),
        (kru_lstm_scan, x.repeat(1, 1, 2), weights(2, 3, heads=4, parts=1)),
    )
    for function, x, w in cases:
        broken = x.clone()
        broken[1, 2:] = float("nan")
        run = functools.partial(function, lengths=lengths)
        for got, want in zip(derivatives(run, broken, w), derivatives(run, x, w)):
            assert torch.equal(got, want)


# Layers


@pytest.mark.parametrize("cls", [KRU, KRULSTM])
def test_an_ensemble(cls):
    """As torch.func's tutorial has it: one forward of three layers' stacked weights."""
    models = [cls(3, 4, dtype=torch.float64) for _ in range(3)]
    parameters, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")
    x = randn(4, 2, 3)
    actual = vmap(lambda p, b: functional_call(base, (p, b), (x,))[0])(parameters, buffers)
    assert_near(actual, torch.stack([m(x)[0] for m in models]), 1e-14)


def test_no_samples():
    """What a Poisson sample may be: of rows, and of weights."""
    for module in (KRU(3, 4), KRULSTM(3, 4)):
        parameters = {name: p[None][:0] for name, p in module.named_parameters()}
        run = vmap(lambda p, x, m=module: functional_call(m, p, (x,))[0])
        assert run(parameters, torch.randn(0, 4, 2, 3)).shape == (0, 4, 2, module.output_size)


def test_recompute_with_weights_that_functional_call_lent():
    """The backward computes again with them, not with the module's own."""
    sizes = dict(d_model=4, hidden_size=4, vocab_size=5)
    modules = [
        (lambda n: KRU(3, 4, 2, recompute=n, dtype=torch.float64), randn(4, 2, 3)),
        (lambda n: LanguageModel(LanguageModelConfig(recompute=n, **sizes)).double(), TOKENS),
    ]
    for make, x in modules:
        lent = {k: p.detach().requires_grad_() for k, p in make(0).named_parameters()}
        kept, again = (
            torch.autograd.grad(
                functional_call(make(n), lent, (x,))[0].sin().sum(), list(lent.values())
            )
            for n in (0, 3)
        )
        assert_near(again, kept)


@pytest.mark.parametrize("cls", [KRU, KRULSTM])
def test_packed_sequences(cls):
    layer = cls(3, 4, 2, bidirectional=True, dtype=torch.float64)
    packed = pack_sequence([randn(n, 3) for n in (2, 4, 1)], enforce_sorted=False)

    def function(data):
        return layer(packed._replace(data=data))[0].data

    loss = loss_of(lambda data: (function(data),))
    assert_near(grad(loss)(packed.data), gradient(loss, [packed.data]))
    assert_near(jacfwd(loss)(packed.data), gradient(loss, [packed.data]))
    samples = torch.stack((packed.data, packed.data + 1))
    assert_near(vmap(function)(samples), [function(s) for s in samples], 1e-14)


def test_dropout_under_vmap_follows_its_rule():
    layer, x = KRU(3, 4, 2, dropout=0.5), torch.randn(4, 2, 3)
    samples = torch.stack((x, x))
    run = lambda x: layer(x)[0]  # noqa: E731
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(run)(samples)
    same = vmap(run, randomness="same")(samples)
    assert torch.equal(same[0], same[1])
    different = vmap(run, randomness="different")(samples)
    assert not torch.equal(different[0], different[1])


# Choice, refusals


def test_the_kernels_are_refused_in_words():
    x, w = randn(2, 4, 12), weights(2, 3)

    def run(x):
        return kru_scan(x, w, backend="triton")[0]

    for transform in (lambda x: vmap(run)(x[None]), grad(lambda x: run(x).sum())):
        with pytest.raises(RuntimeError, match=r'backend="triton" cannot run here: .*torch\.func'):
            transform(x)
    with pytest.raises(RuntimeError, match=r"cannot run here: .*torch\.func"):
        vmap(KRULSTM(3, 4, backend="triton"))(torch.randn(5, 4, 2, 3))
    with pytest.raises(RuntimeError, match=r"cannot run here: .*torch\.func"):
        vmap(lambda x: kru_linear_scan(x, w, backend="triton"))(x[None])
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        run(forward_ad.make_dual(x, x))


def test_the_reason_is_told(caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_said", set())
    x, w = torch.randn(2, 4, 128), [v.float() for v in weights(8, 8)]
    lstm = torch.randn(2, 4, 256), [v.float() for v in weights(8, 8, heads=4, parts=1)]
    told = []

    def run(x):
        told.append((why_not_triton(x, w), why_not_triton_lstm(*lstm)))
        return kru_scan(x, w)[0]

    with caplog.at_level(logging.INFO, "kru_triton"):
        for _ in range(2):
            vmap(run)(x[None])
    (line,) = caplog.messages
    assert line.startswith("kru_scan runs on the torch backend: a transform of torch.func")
    with forward_ad.dual_level():
        run(x)
    assert [reason.split()[0] for reasons in told for reason in reasons] == ["a"] * 4 + [
        "forward-mode"
    ] * 2


def ops():
    """By name: an op called as such, the function that calls it, and x."""
    torch.manual_seed(5)
    (a, b), gates = weights(2, 3), weights(2, 3, heads=4, parts=1)
    per_gate = [w.view(4, 1, *w.shape[2:]) for w in gates]
    ops, how = torch.ops.kru_triton, ("torch", "auto")

    def called(op, x, *rest):
        return op(x.transpose(0, 1), *rest)[0]

    return {
        "scan": (
            lambda x: called(ops.recurrence, x, a, b, *[None] * 5, "tanh", *how),
            lambda x: kru_scan(x, [a, b], nonlinearity="tanh")[0],
            randn(2, 4, 12),
        ),
        "linear_scan": (
            lambda x: called(ops.linear_recurrence, x, a, b, *[None] * 5, "identity", *how, 2),
            lambda x: kru_linear_scan(x, [a, b], block=2)[0],
            randn(2, 4, 12),
        ),
        "lstm_scan": (
            lambda x: called(ops.lstm_recurrence, x, *per_gate, *[None] * 4, "tanh", *how),
            lambda x: kru_lstm_scan(x, gates)[0],
            randn(2, 4, 24),
        ),
    }


OPS = ops()


def old_ops():
    """By name: an op as an ExportedProgram of before holds it, the function of today, and x."""
    torch.manual_seed(7)
    (a, b), gates = weights(2, 3), weights(2, 3, heads=4, parts=1)
    h_0, state = randn(2, 12), randn(2, 6)
    per_gate = [w.view(4, 1, *w.shape[2:]) for w in gates]
    ops, old, how = torch.ops.kru_triton, (RESET, LENGTHS), ("torch", "auto")
    new = {"reset": RESET, "lengths": LENGTHS}
    return {
        "scan": (
            lambda x: ops.scan(x, a, b, None, h_0, *old, None, "tanh", *how),
            lambda x: kru_scan(x, [a, b], None, h_0, nonlinearity="tanh", **new),
            randn(2, 4, 12),
        ),
        "tokens": (
            lambda x: ops.scan(x, a, b, None, h_0, *old, TOKENS, "tanh", *how),
            lambda x: kru_embedding_scan(TOKENS, x, [a, b], None, h_0, nonlinearity="tanh", **new),
            randn(5, 12),
        ),
        "linear_scan": (
            lambda x: ops.linear_scan(x, a, b, h_0, *old, 2, *how),
            lambda x: kru_linear_scan(x, [a, b], h_0, block=2, **new),
            randn(2, 4, 12),
        ),
        "lstm_scan": (
            lambda x: ops.lstm_scan(x, *per_gate, state, state, *old, *how),
            lambda x: kru_lstm_scan(x, gates, state, state, **new),
            randn(2, 4, 24),
        ),
    }


@pytest.mark.parametrize("name", ["scan", "tokens", "linear_scan", "lstm_scan"])
def test_ops_of_programs_exported_before(name):
    with torch.random.fork_rng():
        op, function, x = old_ops()[name]
    old, new = x.clone().requires_grad_(), x.clone().requires_grad_()
    h, expected = op(old)[0], function(new)[0].transpose(0, 1)
    assert torch.equal(h, expected)
    for y in (h, expected):
        y.sin().sum().backward()
    assert torch.equal(old.grad, new.grad)


@pytest.mark.parametrize(("op", "function", "x"), OPS.values(), ids=OPS.keys())
def test_an_op_refuses_the_tangents_that_it_would_drop(op, function, x):
    assert torch.equal(op(x), function(x).transpose(0, 1))
    refused = pytest.raises(RuntimeError, match="forward-mode differentiation does not go through")
    with refused:
        jvp(op, (x,), (x,))
    with forward_ad.dual_level(), refused:
        op(forward_ad.make_dual(x, x))

    leaf = x.clone().requires_grad_()
    y = function(leaf)

    def back(cotangent):
        return torch.autograd.grad(y, leaf, cotangent, retain_graph=True)[0]

    ones = torch.ones_like(y)
    with refused:
        jvp(back, (ones,), (ones,))
    with forward_ad.dual_level():
        with refused:
            back(forward_ad.make_dual(ones, ones))
        inside = back(ones)  # has nothing to drop
    assert torch.equal(inside, back(ones))
    assert_near(vmap(back)(torch.stack((ones, 2 * ones))), [back(ones), 2 * back(ones)])


def test_compiled_transforms():
    cell = KRUCell(3, 4)

    def loss(x, h):
        return cell(x, h).sin().sum()

    def per_sample(x, h):
        return vmap(grad(loss))(x, h)

    x, h = torch.randn(5, 3), torch.randn(5, 8)
    compiled = torch.compile(per_sample, backend="aot_eager", fullgraph=True)
    assert_near(compiled(x, h), per_sample(x, h), 1e-6)  # float32


class Both(nn.Module):
    """A KRU with a start and cuts, and a KRULSTM on top."""

    def __init__(self):
        super().__init__()
        self.kru = KRU(3, 4, state_gate="rotation", recompute=2)
        self.lstm = KRULSTM(8, 4, batch_first=True)

    def forward(self, x, h_0, reset):
        y, h_n = self.kru(x, h_0, reset=reset)
        y, (h, c) = self.lstm(y.transpose(0, 1))
        return y, h_n, h, c


def test_onnx_export():
    """Through plain operations, for T = 3 and any batch; torch.export itself keeps the ops."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")

    def inputs(batch):
        return torch.randn(3, batch, 3), torch.randn(1, batch, 8), torch.rand(batch, 3) < 0.4

    torch.manual_seed(6)
    model, batch = Both().eval(), torch.export.Dim.DYNAMIC
    dynamic = ({1: batch}, {1: batch}, {0: batch})
    program = torch.onnx.export(
        model, inputs(2), dynamic_shapes=dynamic, dynamo=True, verbose=False
    )
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    names = [i.name for i in session.get_inputs()]
    for args in (inputs(2), inputs(5)):
        actual = session.run(None, dict(zip(names, (a.numpy() for a in args))))
        for got, want in zip(actual, model(*args), strict=True):
            assert (torch.from_numpy(got) - want).abs().max() < 1e-5  # float32
    exported = torch.export.export(model, inputs(2))
    assert "kru_triton.recurrence" in str(exported.graph)
    assert "kru_triton.lstm_recurrence" in str(exported.graph)
