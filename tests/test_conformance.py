"""Every op on every backend with every option, along the chain of trust.

The dense oracle in complex128 -> the loop reference and the torch backend, to 1e-10 in float64 ->
the kernels, whose cells make the table of kernels/README.md; and what else holds for every op.
"""

import logging
import math
import re

import conformance
import pytest
import torch
from cases import (
    DEVICE,
    EXACT_CASES,
    OPS,
    UNSORTED,
    Case,
    draw,
    each_op,
    gradients,
    leaves_of,
    moved,
    run,
    run_oracle,
    square,
    with_leaves,
)
from oracle import EXACT, assert_close, relative_error, rms_errors
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kru_triton import why_not_triton, why_not_triton_lstm
from kru_triton.kernels import why_not
from kru_triton.layers.mingru import MinGRU
from kru_triton.nonlinearity import NONLINEARITIES
from kru_triton.ops import dispatch
from kru_triton.reference import kru_lstm_scan_reference, kru_scan_reference
from kru_triton.torch_backend import lstm as lstm_torch_backend
from kru_triton.torch_backend import scan as torch_backend

REFERENCES = {"scan": kru_scan_reference, "lstm_scan": kru_lstm_scan_reference}
pytestmark = pytest.mark.usefixtures("two_products")  # also where small heads would take one
GPU = [pytest.mark.gpu] if DEVICE == "cuda" else []
BACKENDS = ["torch", pytest.param("triton", marks=GPU)]


def cases(*given):
    return pytest.mark.parametrize("case", given, ids=str)


# Values and gradients


@cases(*EXACT_CASES)
def test_reference_and_torch_backend_equal_the_dense_oracle(case, monkeypatch):
    expected, op = run_oracle(case), OPS[case.op][0]
    if case.op in REFERENCES and case.T:
        assert_close(run(REFERENCES[case.op], case), expected, EXACT)
    for units in (0, 64) if case.op != "lstm_scan" else (0,):  # heads of so many are one product
        monkeypatch.setattr(torch_backend, "DENSE_UNITS", units)
        actual = run(op, case, backend="torch")
        assert_close(actual, expected, EXACT)
    if case.op == "embedding_scan":
        assert not actual["d table"][-1].any()  # no token stands for it
    elif case.lengths:
        beyond = torch.arange(case.T) >= torch.tensor(case.lengths)[:, None]
        assert not actual["h"][beyond].any()
        assert not actual["d x_proj"][beyond].any()
    if case.op == "linear_scan":  # of blocks that divide T, do not, hold one step, and hold all
        for block in (1, 3, 4, 12, 13, 40):
            assert_close(run(op, case, backend="torch", block=block), expected, EXACT)


def test_the_cases_hold_what_they_claim():
    """Dead and alive units, exact zeros and saturation do occur in the cases named for them."""
    h = run_oracle(Case(square(4, 3), beta=2.0))["h"]
    modulus = torch.complex(*h.chunk(2, -1)).abs()
    assert 0.05 < (modulus == 0).double().mean() < 0.95
    assert (modulus > 1).any()
    assert (run_oracle(Case(square(3, 4), zeros=True, starts=""))["h"][:, :2] == 0).all()
    saturated = run_oracle(Case(square(3, 4), "tanh", scale=50.0))["h"].abs()
    assert (saturated == 1).double().mean() > 0.5


CELLS = [
    pytest.param(op, option, marks=GPU, id=f"{op}-{option.replace('`', '')}")
    for option in conformance.OPTIONS
    for op in OPS
    if conformance.applies(op, conformance.OPTIONS[option])
]


@pytest.mark.parametrize(("op", "option"), CELLS)
def test_both_backends_equal_the_oracle_or_say_why_not(op, option):
    pytest.importorskip("triton")
    for backend in ("torch", "triton"):
        reason = conformance.refusal(op, option, backend)
        assert reason is None or f"{reason}\n" in f"{conformance.written()}\n"


@pytest.mark.skipif(DEVICE == "cuda", reason="some refusals name the device")
def test_the_table_in_kernels_readme_is_what_the_command_prints():
    pytest.importorskip("triton")
    assert conformance.written() == conformance.table()


@cases(
    *(Case(square(2, 3), act, B=2, T=3) for act in NONLINEARITIES),
    *(Case(square(2, 2), act, B=2, T=3, field="real", H=2) for act in NONLINEARITIES),
    *(
        Case(square(2, 2), act, op, B=3, T=3, lengths=(1, 3, 0))
        for op in ("scan", "embedding_scan")
        for act in NONLINEARITIES
    ),
    Case(square(3), B=1, T=2, reset=True),
    *(Case(square(2, 3), act, B=2, T=3, reset=True, gate=True) for act in ("modrelu", "modtanh")),
    Case(((2, 3), (3, 2)), "modtanh", B=1, T=2, H=2, reset=True),
    Case(square(2, 2), "identity", "linear_scan", B=2, T=4, reset=True),
    Case(square(2, 3), op="lstm_scan", B=2, T=3),
    Case(square(3), op="lstm_scan", B=1, T=2, H=2, reset=True),
    Case(((2, 3), (3, 2)), op="lstm_scan", B=3, T=2, lengths=(0, 1, 2)),
)
def test_gradcheck(case):
    arguments, _ = draw(case)
    leaves = {k: v.detach().requires_grad_() for k, v in leaves_of(arguments).items()}

    def function(*values):
        results = OPS[case.op][0](**with_leaves(arguments, dict(zip(leaves, values))))
        return tuple(tree_leaves(results))

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


# What is left alone, and what is the same twice


@cases(
    Case(square(4, 3), B=5, reset=True, lengths=UNSORTED, gate=True),
    Case(square(4, 3), "modtanh", "embedding_scan", B=5, reset=True, lengths=UNSORTED),
    Case(square(4, 3), "identity", "linear_scan", B=5, reset=True, lengths=UNSORTED),
    Case(square(4, 3), op="lstm_scan", H=2, B=5, reset=True, lengths=UNSORTED),
)
def test_arguments_and_cotangents_are_left_alone(case):
    arguments, cotangents = draw(case)
    given = [t for t in tree_leaves((arguments, cotangents)) if isinstance(t, torch.Tensor)]
    kept = [t.clone() for t in given]
    gradients(OPS[case.op][0], arguments, cotangents)
    for before, after in zip(kept, given):
        assert torch.equal(before.nan_to_num(3.0), after.nan_to_num(3.0))


@cases(*each_op(8, 6, H=2, B=5, T=33, reset=True, lengths=(33, 7, 20, 33, 1)))
def test_two_runs_are_bitwise_equal(case):
    first, second = (run(OPS[case.op][0], case, torch.float32) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@cases(*each_op(4, 4, ops=("scan", "embedding_scan", "lstm_scan"), B=4, T=9))
@pytest.mark.parametrize(("x_dtype", "limit"), [(torch.float32, 0), (torch.bfloat16, 2**-7)])
def test_run_in_pieces_equals_one_run(case, x_dtype, limit):
    """To the bit: a step does the same products on operands of the same shape and alignment (slots
    of a multiple of 64 bytes). In bfloat16 the state handed over is rounded to 2^-9, as h is."""
    op, (arguments, _) = OPS[case.op][0], draw(case, torch.float32, x_dtype=x_dtype)
    name = "tokens" if case.op == "embedding_scan" else "x_proj"
    whole, *last = tree_leaves(op(**arguments))
    pieces = []
    for piece in arguments[name].split((1, 5, 3), dim=1):
        h, *state = tree_leaves(op(**{**arguments, name: piece}))
        arguments |= zip(("h_0", "c_0"), state)
        pieces.append(h)
    assert whole.dtype == x_dtype
    for got, want in zip((torch.cat(pieces, 1), *state), (whole, *last), strict=True):
        assert relative_error(got, want) <= limit


@pytest.mark.parametrize("backend", BACKENDS)
@cases(*each_op(4, 4, B=5, T=3, lengths=(2, 0, 1, 3, 1)))
def test_the_last_state_is_that_of_the_last_step(case, backend):
    """Also in bfloat16, where no backend returns a state that h does not show."""
    arguments = moved(draw(case, torch.float32, x_dtype=torch.bfloat16)[0], DEVICE)
    h, h_n, *_ = tree_leaves(OPS[case.op][0](**arguments, backend=backend))
    ends = h[torch.arange(5), arguments["lengths"].cpu() - 1].float()
    assert h_n.dtype == torch.float32
    assert torch.equal(h_n, torch.where(arguments["lengths"][:, None] > 0, ends, arguments["h_0"]))


@cases(Case(square(4, 3), T=8), Case(square(4, 3), op="lstm_scan", T=8))
def test_gradients_pass_from_piece_to_piece(case):
    op, (arguments, cotangents) = OPS[case.op][0], draw(case)

    def in_pieces(x_proj, h_0, c_0=None, **rest):
        starts = {"h_0": h_0} if c_0 is None else {"h_0": h_0, "c_0": c_0}
        h, *state = tree_leaves(op(x_proj[:, :3], **starts, **rest))
        more, *state = tree_leaves(op(x_proj[:, 3:], **dict(zip(starts, state)), **rest))
        return torch.cat((h, more), 1), *state

    assert_close(gradients(in_pieces, arguments, cotangents), run(op, case), 1e-13)


@pytest.mark.parametrize("steps", [1, 3])
@cases(
    *(Case(square(4, 3), act, H=2, reset=True) for act in NONLINEARITIES),
    *(Case(square(5), act, starts="", field="real", reset=True) for act in NONLINEARITIES),
    *(Case(square(4, 3), act, B=5, reset=True, lengths=UNSORTED) for act in NONLINEARITIES),
    *(
        Case(square(4, 3), act, "embedding_scan", B=5, lengths=UNSORTED)
        for act in ("modrelu", "modtanh")
    ),
    Case(square(4, 3), op="lstm_scan", H=2, B=5, reset=True, lengths=UNSORTED),
    Case(square(3, 3), op="lstm_scan", B=4),
)
def test_chunks_do_not_show(case, steps, monkeypatch):
    """Whatever part of the time the torch backend's buffers hold. Not to the bit everywhere: the
    address of a slot and the length of a product over a chunk may change the order of a sum."""
    backend = lstm_torch_backend if case.op == "lstm_scan" else torch_backend
    layout = lstm_torch_backend._Layout if case.op == "lstm_scan" else torch_backend._Step
    original, used = layout.chunks, []

    def chunks(self, *args):
        used.append(len(original(self, *args)))
        return original(self, *args)

    monkeypatch.setattr(torch_backend, "DENSE_UNITS", 0)
    monkeypatch.setattr(layout, "chunks", chunks)
    whole = run(OPS[case.op][0], case)
    assert set(used) == {1}
    used.clear()
    numbers = case.B * case.units * {"real": 1, "complex": 2}[case.field]
    numbers = 4 * case.B * case.units if case.op == "lstm_scan" else numbers
    monkeypatch.setattr(backend, "CHUNK_BYTES", 8 * numbers * steps)
    assert_close(run(OPS[case.op][0], case), whole, 1e-13)
    if case.lengths is None:
        assert set(used) == {-(-case.T // steps)}
    else:  # of every interval between two lengths
        assert max(used) > 1 or steps > 1


# A cut


STREAMED = [
    Case(square(32, 8), T=4, B=3, beta=-0.05),
    Case(square(8, 32), "modtanh", T=4, B=3),
]
RESETS = [
    *(("torch", case) for case in each_op(3, 2, B=5, T=4)),
    *(("torch", case) for case in each_op(3, 11, ops=("lstm_scan",), B=5, T=4)),
    ("triton", Case(square(8, 8), T=4, B=5, beta=-0.05)),
    ("triton", Case(square(8, 8), "modtanh", T=4, B=5)),
    ("triton", Case(square(3, 11), "modtanh", T=4)),
    ("triton", Case(square(8, 8), op="lstm_scan", B=4, T=4)),
    ("triton", Case(square(3, 11), op="lstm_scan", B=4, T=4)),
    *(("streamed", case) for case in STREAMED),
]


@pytest.mark.parametrize(
    ("backend", "case"),
    [
        pytest.param(backend, case, id=f"{backend}-{case}", marks=GPU * (backend != "torch"))
        for backend, case in RESETS
    ],
)
def test_after_a_reset_the_past_does_not_matter_were_it_nan(backend, case, monkeypatch):
    """Bit by bit what the same past gives where it is finite; nothing flows back into it, and the
    row is a fresh run from there."""
    if backend != "torch":
        pytest.importorskip("triton")
        monkeypatch.setattr(why_not, "MAX_HELD_SIDE", 16 if backend == "streamed" else 128)
    op = OPS[case.op][0]
    arguments, cotangents = draw(case, torch.float32)
    arguments["reset"] = torch.zeros(case.B, case.T, dtype=torch.bool)
    arguments["reset"][1, [0, 2, 3]] = True  # its start, and step 2 by itself
    arguments["backend"] = backend.replace("streamed", "triton")
    arguments, cotangents = moved((arguments, cotangents), DEVICE)
    starts = [k for k in ("h_0", "c_0") if k in arguments]
    sane = gradients(op, arguments, cotangents)
    for name in starts:
        arguments[name][1, ::2], arguments[name][1, 1::2] = math.nan, math.inf
    again = gradients(op, arguments, cotangents)
    assert all(torch.equal(again[name], sane[name]) for name in sane)
    assert not any(again[f"d {name}"][1].any() for name in starts)
    if case.op == "embedding_scan":  # a row of the table may stand elsewhere, too
        return
    if backend == "torch":
        fresh = {k: v[1:2, 3:] for k, v in arguments.items() if k in ("x_proj", "reset")}
        fresh = op(**{**arguments, **dict.fromkeys(starts), **fresh})
        assert (tree_leaves(fresh)[0][0] - sane["h"][1, 3:]).abs().max() < 1e-5  # of float32
    arguments["x_proj"][1, 2] = math.nan
    got = gradients(op, arguments, cotangents)
    assert got["h"][1, 2].isnan().any()
    for name in ("h", "d x_proj"):
        got[name][1, 2] = sane[name][1, 2]
    for name in (k for k in sane if "factors" not in k and "beta" not in k):
        assert torch.equal(got[name], sane[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_passes_a_reset_were_it_infinite(backend):
    if backend == "triton":
        pytest.importorskip("triton")
    arguments, _ = draw(Case(square(8, 8), T=2, B=5), torch.float32)
    arguments = moved({**arguments, "reset": torch.tensor([[True, False]] * 5)}, DEVICE)
    h, _ = OPS["scan"][0](
        **{**arguments, "h_0": arguments["h_0"].requires_grad_()}, backend=backend
    )
    h.backward(torch.full_like(h, math.inf))
    assert not arguments["h_0"].grad.any()


# Precisions


@cases(*each_op(8, 6, H=2, B=5, T=20, reset=True, lengths=(20, 20, 3, 0, 11)))
def test_float32_against_float64(case):
    """Relative RMS. Each step sums P + Q products with unit roundoff 6e-8 on a state that unitary
    factors keep from growing: 20 steps are a random walk below 1e-6. Gradients pass twice through
    it and, for modReLU, through 1/|z|, which magnifies the rounding of |h| − β."""
    op = OPS[case.op][0]
    errors = rms_errors(run(op, case, torch.float32), run(op, case))
    assert max(v for k, v in errors.items() if k[0] != "d") < 1e-6, errors
    assert max(v for k, v in errors.items() if k[0] == "d") < 5e-6, errors
    assert errors["h"] > 1e-9, "this was not float32"


@cases(*each_op(4, 3, ops=("scan", "embedding_scan", "lstm_scan"), H=2, B=5, reset=True, beta=0.1))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_input_has_a_float32_state(case, dtype):
    """h is the float32 run rounded once, to the bit: within a run rounded states are never fed
    back. h_n is rounded as h is. Gradients know h to 2^-9, a few of which add up: tanh' = 1 - h²
    loses its leading digits near |h| = 1, and modReLU's 1/(|h| - β) near |h| = β."""
    op, name = OPS[case.op][0], "table" if case.op == "embedding_scan" else "x_proj"
    arguments, _ = draw(case, torch.float32, x_dtype=dtype)
    h, *last = tree_leaves(op(**arguments))
    full, *full_last = tree_leaves(op(**{**arguments, name: arguments[name].float()}))
    assert h.dtype == dtype
    assert torch.equal(h, full.to(dtype))
    h_n, *c_n = full_last
    for got, want in zip(last, (h_n.to(dtype).float(), *c_n), strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, want)
    exact, cotangents = draw(case)
    expected = gradients(op, {**exact, name: exact[name].to(dtype).double()}, cotangents)
    results = run(op, case, torch.float32, x_dtype=dtype)
    assert {v.dtype for k, v in results.items() if k in (f"d {name}", "h")} == {dtype}
    assert {v.dtype for k, v in results.items() if k not in (f"d {name}", "h")} == {torch.float32}
    errors = rms_errors(results, expected)
    assert max(errors.values()) < 2e-2, errors


# torch.library and torch.compile


class Calls(TorchDispatchMode):
    """The calls of the library's own operations."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "kru_triton":
            self.seen.append((func, args))
        return func(*args, **(kwargs or {}))


OPTIONAL = {"B": 2, "T": 2, "reset": True, "lengths": (2, 1)}
OPCHECKS = [
    *(("torch", case) for case in each_op(3, 2, H=2, **OPTIONAL)),
    *(("torch", Case(square(3, 2), act, B=2, T=4, starts="")) for act in ("modrelu", "modtanh")),
    ("torch", Case(square(5), "tanh", B=2, T=3)),
    ("torch", Case(square(1, 4), "tanh", field="real", B=2, T=3, cotangents="h")),
    ("torch", Case(square(2, 3), "identity", "linear_scan", B=2, T=9, cotangents="h_n")),
    ("torch", Case(square(2, 3), op="lstm_scan", B=2, T=3, starts="", cotangents="c_n")),
    *((backend, Case(square(8, 8), gate=True, **OPTIONAL)) for backend in ("torch", "triton")),
    *(
        ("triton", Case(square(8, 8), act, op, **OPTIONAL))
        for act, op in (
            ("tanh", "scan"),
            ("modtanh", "embedding_scan"),
            ("identity", "linear_scan"),
            ("identity", "lstm_scan"),
        )
    ),
]


@pytest.mark.parametrize(
    ("backend", "case"),
    [
        pytest.param(backend, case, id=f"{backend}-{case}", marks=GPU * (backend != "torch"))
        for backend, case in OPCHECKS
    ],
)
def test_opcheck(backend, case):
    if backend == "triton":
        pytest.importorskip("triton")
    with Calls() as calls:
        run(OPS[case.op][0], case, torch.float32, device=DEVICE, backend=backend)
    forward, backward = calls.seen
    for op, args in (forward, backward):
        args = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]
        for a in args if op is forward[0] else ():
            if isinstance(a, torch.Tensor):
                a.requires_grad_(a.is_floating_point())
        torch.library.opcheck(op, tuple(args))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["scan", "embedding_scan", "linear_scan", "lstm_scan"])
def test_compiled_once_for_marked_batch_and_length(op, backend):
    if backend == "triton":
        pytest.importorskip("triton")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(OPS[op][0], fullgraph=True, backend=counter)

    def marked(**arguments):
        for name, value in arguments.items():
            dims = {"x_proj": 2, "tokens": 2, "reset": 2, "lengths": 1, "h_0": 1, "c_0": 1}
            for dim in range(dims.get(name, 0)):
                torch._dynamo.mark_dynamic(value, dim)
        return compiled(**arguments)

    for B, T in ((3, 5), (4, 6), (9, 7), (2, 32)) if backend == "torch" else ((3, 2), (2, 3)):
        lengths = tuple(n % (T + 1) for n in range(1, B + 1))
        case = Case(square(8, 8), "identity", op, B=B, T=T, reset=True, lengths=lengths)
        how = {"device": DEVICE, "backend": backend}
        expected = run(OPS[op][0], case, torch.float32, **how)
        assert_close(run(marked, case, torch.float32, **how), expected, 1e-6)
    assert counter.frame_count == 1


def test_min_gru_in_one_graph():
    """Long enough that steps between the joined ones follow from them."""
    torch._dynamo.reset()
    layers, x = MinGRU(3, 4, num_layers=2), torch.randn(5, 2, 3)
    compiled, results = torch.compile(layers, fullgraph=True, backend="aot_eager"), []
    reset = torch.arange(10).view(2, 5) % 4 == 0
    for run_layers in (layers, compiled):
        output, h_n = run_layers(x, reset=reset)
        gradients = torch.autograd.grad(output.square().sum() + h_n.sum(), layers.parameters())
        results.append([output, h_n, *gradients])
    torch.testing.assert_close(*results)


# Memory


ROW = 24 * 8  # bytes of a row of one step in float64, 4 x 3 complex units


@pytest.mark.parametrize(
    ("case", "kept"),
    [
        *((Case(square(4, 3), act), ROW) for act in NONLINEARITIES if act != "modtanh"),
        (Case(square(4, 3), "modtanh"), 2 * ROW),  # x_proj where σ cannot be inverted
        *((Case(square(4, 3), act, "embedding_scan"), ROW + 8) for act in NONLINEARITIES),
        (Case(square(4, 3), gate=True), 2 * ROW),
        (Case(square(4, 3), "identity", "linear_scan"), ROW),
        (Case(square(4, 3), op="lstm_scan"), (4 + 1 + 1) * ROW // 2),  # x_proj, h and c
    ],
    ids=lambda value: str(value) if isinstance(value, Case) else "",
)
def test_what_autograd_keeps_of_a_further_step(case, kept):
    """h alone, or its argument and little else: bytes a row."""

    def saved_bytes(time):
        arguments, _ = draw(Case(**{**vars(case), "T": time}))
        leaves = {k: v.requires_grad_() for k, v in leaves_of(arguments).items()}
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            results = OPS[case.op][0](**with_leaves(arguments, leaves))
        assert tree_leaves(results)[0].requires_grad
        return sum(storages.values())

    assert saved_bytes(48) - saved_bytes(32) == 16 * 3 * kept


# The choice of backend, in words


@pytest.mark.parametrize(
    ("op", "reason_of"), [("scan", why_not_triton), ("lstm_scan", why_not_triton_lstm)]
)
def test_the_reason_is_that_of_the_predicate(op, reason_of):
    """float64 runs on no fused kernel."""
    arguments, _ = draw(Case(square(4, 3), op=op))
    reason = reason_of(**arguments)
    assert re.fullmatch(r"\S[^\n]{10,}", reason)
    refusal = 'backend="triton" cannot run here: ' + re.escape(reason)
    with pytest.raises(RuntimeError, match=refusal):
        OPS[op][0](**arguments, backend="triton")


@pytest.mark.parametrize("op", ["scan", "lstm_scan"])
def test_auto_says_once_which_backend_runs_and_why(op, caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_said", set())
    function, (arguments, _) = OPS[op][0], draw(Case(square(4, 3), op=op))
    reason = {"scan": why_not_triton, "lstm_scan": why_not_triton_lstm}[op](**arguments)
    with caplog.at_level(logging.INFO, logger="kru_triton"):
        function(**arguments, backend="torch")
        assert caplog.text == ""
        function(**arguments)
        function(**arguments)
    assert caplog.messages == [f"kru_{op} runs on the torch backend: {reason}"]
