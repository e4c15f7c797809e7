"""`kru_lstm_scan` and `KRULSTM` along the chain of trust, and against `torch.nn.LSTM`.

A dense loop over torch.kron in float64 -> the loop reference -> the written-out adjoint -> the
kernels through the public op; `torch.nn.LSTM` with dense recurrent matrices for whole layers.
"""

import copy
import dataclasses
import logging
import math
import pickle
import re
from functools import reduce

import pytest
import torch
from test_modules import assert_same, randn
from test_scan import assert_close, rms_errors, square, with_layout
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

from kru_triton import (
    KRULSTM,
    diagnostics,
    kru_lstm_scan,
    unitarity_penalty,
    unitary_,
    why_not_triton_lstm,
)
from kru_triton.layers.lstm import GATES
from kru_triton.ops import dispatch
from kru_triton.reference import kru_lstm_scan_reference
from kru_triton.torch_backend import lstm as lstm_torch_backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU = [pytest.mark.gpu] if DEVICE == "cuda" else []
BACKENDS = ["torch", pytest.param("triton", marks=GPU)]

# Largest error over the largest entry (at least 1): a few hundred roundings of 1e-16.
EXACT = 1e-10


@dataclasses.dataclass(frozen=True)
class Case:
    shapes: tuple
    B: int = 3
    T: int = 7
    H: int = 1
    states: str = "both"  # h_0 and c_0, one of them or none
    reset: bool = False
    lengths: bool = False
    cotangents: str = "h h_n c_n"
    layout: str = "contiguous"  # or time-first memory, or sliced out of a larger buffer
    scale: float = 1.0  # of x_proj

    def __str__(self):
        sizes = "x".join(str(p) if p == q else f"({p},{q})" for p, q in self.shapes)
        text = f"B{self.B}-T{self.T}-{sizes}" + "-reset" * self.reset + "-lengths" * self.lengths
        for name in ("H", "states", "cotangents", "layout", "scale"):
            value = getattr(self, name)
            text += f"-{name}={value}" * (value != getattr(Case, name))
        return text

    @property
    def units(self):
        return self.H * math.prod(p for p, _ in self.shapes)


CASES = [
    Case(square(4, 3)),
    Case(square(4, 4, 3), H=2, reset=True),
    Case(square(2, 3), H=2, B=5, lengths=True),
    Case(square(3, 4), H=3, B=5, reset=True, lengths=True),
    Case(square(4, 3), B=1, T=1),
    Case(square(4, 3), B=1, T=2, states="none"),
    Case(square(5)),
    Case(square(5), H=2, reset=True, lengths=True),
    Case(square(*[2] * 6), T=3, B=2),
    Case(square(1)),
    Case(square(1, 4), H=2),
    Case(((2, 3), (3, 2), (2, 2)), reset=True),  # square cut after the first two
    Case(((2, 3), (4, 4), (3, 2)), lengths=True),  # square only all together
    Case(square(4, 3), states="h_0", reset=True),
    Case(square(4, 3), states="c_0", lengths=True),
    Case(square(4, 3), states="none", lengths=True, reset=True),
    Case(square(4, 3), cotangents="h"),
    Case(square(4, 3), cotangents="h_n", lengths=True),
    Case(square(4, 3), cotangents="c_n", reset=True),
    Case(square(4, 3), layout="time_first"),
    Case(square(4, 3), H=2, layout="sliced", reset=True),
    Case(square(4, 3), scale=50.0),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)


def inputs(case, dtype=torch.float64, seed=0):
    """The arguments of kru_lstm_scan by name, and cotangents of h, h_n and c_n."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    torch.manual_seed(seed)
    factors = [
        unitary_(torch.empty(1, 4 * case.H, p, q, dtype=dtype)) + draw(p, q, scale=0.05)
        for p, q in case.shapes
    ]
    states = {"h_0": draw(case.B, case.units, scale=0.7), "c_0": draw(case.B, case.units)}
    arguments = {
        "x_proj": draw(case.B, case.T, 4 * case.units, scale=case.scale),
        "factors": factors,
        **{k: v if case.states in (k, "both") else None for k, v in states.items()},
        "reset": None,
        "lengths": None,
    }
    if case.reset:
        arguments["reset"] = torch.rand(case.B, case.T, generator=generator) < 0.2
        arguments["reset"][0, 0] = arguments["reset"][-1, -1] = True
    if case.lengths:  # every length from 0 to T occurs where there are rows enough
        arguments["lengths"] = torch.arange(case.B) * 3 % (case.T + 1)
    shapes = {"h": (case.B, case.T, case.units)} | dict.fromkeys(
        ("h_n", "c_n"), (case.B, case.units)
    )
    cotangents = {k: draw(*shape) for k, shape in shapes.items() if k in case.cotangents.split()}
    return arguments, cotangents


def run(function, case, dtype=torch.float64, x_dtype=None, **kwargs):
    """Results and gradients of every argument, by name."""
    arguments, cotangents = inputs(case, dtype)
    x = arguments["x_proj"].to(x_dtype or dtype)
    arguments["x_proj"] = with_layout(x, case.layout)
    leaves = {k: arguments[k] for k in ("x_proj", "h_0", "c_0") if arguments[k] is not None}
    leaves |= {f"factors[{f}]": w for f, w in enumerate(arguments["factors"])}
    leaves = {k: v.detach().requires_grad_() for k, v in leaves.items()}
    arguments |= {k: v for k, v in leaves.items() if k in arguments}
    arguments["factors"] = [v for k, v in leaves.items() if k.startswith("factors")]
    h, (h_n, c_n) = function(**arguments, **kwargs)
    results = {"h": h, "h_n": h_n, "c_n": c_n}
    pairs = [(results[k], d.to(results[k].dtype)) for k, d in cotangents.items()]
    torch.autograd.backward(*zip(*pairs))
    # An argument that cannot matter (a reset or cotangent away) may have a zero or no gradient.
    grads = {f"d {k}": torch.zeros_like(v) if v.grad is None else v.grad for k, v in leaves.items()}
    return {k: v.detach() for k, v in results.items()} | grads


def dense_scan(x_proj, factors, h_0, c_0, *, reset, lengths):
    """The oracle: a row at a time, F×F matrices from torch.kron, and the formulas as they stand."""
    heads = factors[0].shape[1] // 4
    blocks = [reduce(torch.kron, [w[0, k] for w in factors]) for k in range(4 * heads)]
    i_, f_, g_, o_ = (torch.block_diag(*blocks[k * heads : (k + 1) * heads]) for k in range(4))
    batch, time, features = x_proj.shape
    size = features // 4
    outputs, last_h, last_c = [], [], []
    for row in range(batch):
        h = x_proj.new_zeros(size) if h_0 is None else h_0[row]
        c = x_proj.new_zeros(size) if c_0 is None else c_0[row]
        steps = time if lengths is None else lengths[row].item()
        states = []
        for t in range(steps):
            if reset is not None and reset[row, t]:
                h, c = torch.zeros_like(h), torch.zeros_like(c)
            i, f, g, o = (w @ h + u for w, u in zip((i_, f_, g_, o_), x_proj[row, t].split(size)))
            c = c / (1 + torch.exp(-f)) + torch.tanh(g) / (1 + torch.exp(-i))
            h = torch.tanh(c) / (1 + torch.exp(-o))
            states.append(h)
        outputs.append(torch.stack(states + [torch.zeros_like(h)] * (time - steps)))
        last_h.append(h)
        last_c.append(c)
    return torch.stack(outputs), (torch.stack(last_h), torch.stack(last_c))


# The chain


@cases
def test_reference_and_torch_backend_equal_the_dense_oracle(case):
    expected = run(dense_scan, case)
    assert_close(run(kru_lstm_scan_reference, case), expected, EXACT)
    assert_close(run(kru_lstm_scan, case, backend="torch"), expected, EXACT)


@pytest.mark.parametrize(
    "case",
    [
        Case(square(2, 3), B=2, T=3),
        Case(square(3), B=1, T=2, H=2, reset=True),
        Case(((2, 3), (3, 2)), B=3, T=2, lengths=True),
    ],
    ids=str,
)
def test_gradcheck(case):
    arguments, _ = inputs(case)
    leaves = [arguments[k].requires_grad_() for k in ("x_proj", "h_0", "c_0")]
    factors = [w.requires_grad_() for w in arguments["factors"]]

    def function(x_proj, h_0, c_0, *factors):
        kept = {k: arguments[k] for k in ("reset", "lengths")}
        h, last = kru_lstm_scan(x_proj, factors, h_0, c_0, **kept)
        return h, *last

    assert torch.autograd.gradcheck(function, [*leaves, *factors])


def test_second_derivatives_raise():
    """Not supported, so never silently dropped."""
    arguments, _ = inputs(Case(square(4, 3)))
    x = arguments["x_proj"].requires_grad_()
    h, _ = kru_lstm_scan(**arguments)
    (first,) = torch.autograd.grad(h.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiable once; .* use torch\.func"):
        first.sum().backward()


def test_arguments_are_left_alone():
    case = Case(square(4, 3), H=2, B=5, reset=True, lengths=True)
    arguments, cotangents = inputs(case)
    tensors = [*(v for k, v in arguments.items() if k != "factors"), *arguments["factors"]]
    kept = [t.clone() for t in (*tensors, *cotangents.values())]
    leaves = [t.requires_grad_() for t in tensors if t.is_floating_point()]
    h, last = kru_lstm_scan(**arguments)
    torch.autograd.grad((h, *last), leaves, list(cotangents.values()))
    for before, after in zip(kept, (*tensors, *cotangents.values())):
        assert torch.equal(before, after)


# Edges


@pytest.mark.parametrize(("B", "T"), [(3, 0), (0, 4), (0, 0)])
@pytest.mark.parametrize("options", [{}, {"reset": True, "lengths": True}], ids=["", "flags"])
def test_empty(B, T, options):
    case = Case(square(3, 2), B=B, T=T, **{k: v for k, v in options.items() if B and T})
    results = run(kru_lstm_scan, case)
    assert results["h"].shape == (B, T, 6)
    arguments, cotangents = inputs(case)
    for name, first in (("h_n", "h_0"), ("c_n", "c_0")):
        assert torch.equal(results[name], arguments[first])
        assert torch.equal(results[f"d {first}"], cotangents[name])
    assert results["d factors[0]"].count_nonzero() == 0
    empty = {"reset": torch.zeros(B, T).bool(), "lengths": torch.zeros(B).long()}
    h, (h_n, _) = kru_lstm_scan(**{**arguments, **(empty if options else {})})
    assert h.shape == (B, T, 6)
    assert torch.equal(h_n, arguments["h_0"])


def test_a_reset_cuts_the_past():
    """A row with a cut at step 3 is a fresh run from there, for gradients too, even after NaN."""
    arguments, cotangents = inputs(Case(square(3, 2), B=2, T=6))
    reset = torch.zeros(2, 6, dtype=torch.bool)
    reset[0, 3] = True
    cotangents["h"][:, :3] = 0

    def gradients(x_proj):
        leaves = [x_proj.requires_grad_(), arguments["h_0"], arguments["c_0"]]
        h, last = kru_lstm_scan(x_proj, arguments["factors"], *leaves[1:], reset=reset)
        return h, *torch.autograd.grad((h, *last), leaves, list(cotangents.values()))

    for state in ("h_0", "c_0"):
        arguments[state].requires_grad_()
    h, dx, dh_0, dc_0 = gradients(arguments["x_proj"])
    assert dx[0, :3].count_nonzero() == dh_0[0].count_nonzero() == dc_0[0].count_nonzero() == 0
    assert dx[1, 0].count_nonzero() > 0
    fresh, _ = kru_lstm_scan(arguments["x_proj"][:1, 3:], arguments["factors"])
    assert (fresh[0] - h[0, 3:]).abs().max() < 1e-14

    broken = arguments["x_proj"].detach().clone()
    broken[0, 1] = float("nan")
    h_after, dx_after, _, _ = gradients(broken)
    assert h_after[0, 1].isnan().any()
    for after, before in ((h_after, h), (dx_after, dx)):
        assert torch.equal(after[0, 3:], before[0, 3:])
        assert torch.equal(after[1], before[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shapes", [(8, 8), (3, 11)], ids=str)
def test_after_a_reset_the_past_does_not_matter_were_it_nan(backend, shapes):
    """Bit by bit what the same past gives where it is finite; nothing flows back into it."""
    if backend == "triton":
        pytest.importorskip("triton")
    case = Case(square(*shapes), B=4, T=5)

    def results(poisoned_states, poisoned_input):
        def call(x_proj, factors, h_0, c_0, reset, lengths):
            reset = torch.zeros(case.B, case.T, dtype=torch.bool)
            reset[1, [0, 2, 3]] = True  # its start, and step 2 by itself
            h_0, c_0 = (
                torch.where(reset[:, :1] & poisoned_states, float("nan"), v) for v in (h_0, c_0)
            )
            poison = torch.zeros(case.B, case.T, 1, dtype=torch.bool)
            poison[1, 2] = poisoned_input
            x_proj = torch.where(poison, float("nan"), x_proj)
            return _on_device(x_proj, factors, h_0, c_0, reset=reset, lengths=None, backend=backend)

        return run(call, case, torch.float32)

    sane, again = results(False, False), results(True, False)
    assert_close(again, sane, 0)
    assert not again["d h_0"][1].any()
    assert not again["d c_0"][1].any()
    got = results(False, True)
    assert got["h"][1, 2].isnan().all()
    for name in ("h", "d x_proj"):
        got[name][1, 2] = sane[name][1, 2]
    for name in ("h", "h_n", "c_n", "d x_proj", "d h_0", "d c_0"):
        assert torch.equal(got[name], sane[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_lies_beyond_a_length_is_not_used(backend):
    """Not even where it is NaN, and resets there cut nothing."""
    if backend == "triton":
        pytest.importorskip("triton")
    case = Case(square(8, 8), B=4, T=3, lengths=True)
    expected = run(_on_device, case, torch.float32, backend=backend)

    def with_rubbish(x_proj, **arguments):
        beyond = torch.arange(case.T) >= arguments["lengths"][:, None]
        x_proj = torch.where(beyond[..., None], float("nan"), x_proj)
        return _on_device(x_proj, **{**arguments, "reset": beyond}, backend=backend)

    assert_close(run(with_rubbish, case, torch.float32), expected, 0)
    assert (expected["h"][0] == 0).all()


@pytest.mark.parametrize("steps", [1, 3])
def test_chunks_do_not_show(steps, monkeypatch):
    """The same numbers whatever part of the time the chunk buffers hold."""
    for case in (Case(square(4, 3), H=2, B=5, reset=True, lengths=True), Case(square(3, 3), B=4)):
        one = run(kru_lstm_scan, case)
        with monkeypatch.context() as patch:
            step_bytes = case.B * 4 * case.units * 8
            patch.setattr(lstm_torch_backend, "CHUNK_BYTES", steps * step_bytes)
            arguments, _ = inputs(case)
            a, b = (w[0].view(4, case.H, *w.shape[2:]) for w in arguments["factors"])
            layout = lstm_torch_backend._Layout(case.T, case.B, a, b)
            assert layout.chunks()[0] == (0, steps)
            many = run(kru_lstm_scan, case)
        assert_close(many, one, 1e-13)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_run_in_pieces_equals_one_run(x_dtype):
    """To the bit: the state handed over is not rounded, even for a bfloat16 h."""
    arguments, _ = inputs(Case(square(4, 4), B=4, T=9), torch.float32)
    x, factors = arguments["x_proj"].to(x_dtype), arguments["factors"]
    state = arguments["h_0"], arguments["c_0"]
    whole, last = kru_lstm_scan(x, factors, *state)
    assert whole.dtype == x_dtype
    assert last[0].dtype == last[1].dtype == torch.float32
    pieces = []
    for piece in x.split((1, 5, 3), dim=1):
        h, state = kru_lstm_scan(piece, factors, *state)
        pieces.append(h)
    assert torch.equal(torch.cat(pieces, 1), whole)
    for got, want in zip(state, last):
        assert torch.equal(got, want)


def test_gradients_pass_from_piece_to_piece():
    arguments, _ = inputs(Case(square(4, 3), T=8))
    x, factors = arguments["x_proj"].requires_grad_(), arguments["factors"]
    state = arguments["h_0"], arguments["c_0"]
    h, last = kru_lstm_scan(x, factors, *state)
    (whole,) = torch.autograd.grad(h.sin().sum() + sum(s.sum() for s in last), x)
    h_1, state = kru_lstm_scan(x[:, :3], factors, *state)
    h_2, state = kru_lstm_scan(x[:, 3:], factors, *state)
    loss = torch.cat((h_1, h_2), 1).sin().sum() + sum(s.sum() for s in state)
    (pieces,) = torch.autograd.grad(loss, x)
    assert (pieces - whole).abs().max() < 1e-13


def test_two_runs_are_bitwise_equal():
    case = Case(square(8, 6), H=2, T=33, B=5, reset=True, lengths=True)
    first, second = (run(kru_lstm_scan, case, torch.float32) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


# Precisions


def test_float32_against_float64():
    """Relative RMS. A step sums P + Q products with unit roundoff 6e-8, and gates keep a rounding
    from growing: 20 steps stay below 1e-6, gradients, which pass twice, below 3e-6."""
    case = Case(square(8, 6), H=2, T=20, B=5, reset=True, lengths=True)
    errors = rms_errors(run(kru_lstm_scan, case, torch.float32), run(kru_lstm_scan, case))
    assert max(errors[k] for k in ("h", "h_n", "c_n")) < 1e-6, errors
    assert max(errors.values()) < 3e-6, errors
    assert errors["h"] > 1e-9, "this was not float32"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_input_has_a_float32_state(dtype):
    """h is the float32 run rounded once, to the bit; gradients know h to 2^-9 (2^-12)."""
    case = Case(square(4, 3), B=5, reset=True, lengths=True)
    arguments, _ = inputs(case, torch.float32)
    x = arguments.pop("x_proj").to(dtype)
    h, last = kru_lstm_scan(x, **arguments)
    full, full_last = kru_lstm_scan(x.float(), **arguments)
    assert torch.equal(h, full.to(dtype))
    for got, want in zip(last, full_last):
        assert torch.equal(got, want)
    rounded = run(kru_lstm_scan, case, torch.float32, dtype)
    errors = rms_errors(rounded, run(kru_lstm_scan, case))
    assert max(errors.values()) < 2e-2, errors
    assert rounded["d x_proj"].dtype == dtype


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.parametrize("backend", BACKENDS)
def test_large_inputs_stay_finite(backend):
    case = Case(square(8, 8), T=3, scale=50.0, cotangents="h c_n")
    if backend == "triton":
        pytest.importorskip("triton")
    results = run(_on_device, case, torch.float32, backend=backend)
    assert all(v.isfinite().all() for v in results.values())
    errors = rms_errors(results, run(dense_scan, case))
    assert errors["h"] < 1e-5, errors


def test_h_and_c_alone_are_saved_for_backward():
    """Bytes autograd keeps per further step: x_proj (the argument itself), h and c."""

    def saved_bytes(time):
        arguments, _ = inputs(Case(square(4, 3), T=time))
        arguments["x_proj"].requires_grad_()
        kept = {}

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            h, _ = kru_lstm_scan(**arguments)
        assert h.requires_grad
        return sum(kept.values())

    assert saved_bytes(40) - saved_bytes(30) == 10 * (4 + 1 + 1) * (3 * 12 * 8)


# The kernels through the public op


def _on_device(x_proj, factors, h_0, c_0, *, reset, lengths, **kwargs):
    arguments = (None if v is None else v.to(DEVICE) for v in (x_proj, h_0, c_0, reset, lengths))
    x_proj, h_0, c_0, reset, lengths = arguments
    factors = [w.to(DEVICE) for w in factors]
    h, last = kru_lstm_scan(x_proj, factors, h_0, c_0, reset=reset, lengths=lengths, **kwargs)
    return h.cpu(), tuple(s.cpu() for s in last)


ON_KERNELS = [
    Case(square(2, 4, 8), T=4, reset=True),
    Case(square(8, 8), B=5, T=3, reset=True, lengths=True),
    Case(square(3, 11), B=1, T=2, states="none", cotangents="h"),
    Case(square(16), B=2, T=3, lengths=True, cotangents="c_n"),
    Case(square(4, 4), B=3, T=0),
]


@pytest.mark.parametrize("case", [pytest.param(c, id=str(c), marks=GPU) for c in ON_KERNELS])
def test_both_backends_give_the_same_numbers(case):
    """float32 h and c to 1e-5, gradients to 1e-4: products of bfloat16 pairs are exact to 2^-17."""
    pytest.importorskip("triton")
    got = run(_on_device, case, torch.float32, backend="triton")
    want = run(kru_lstm_scan, case)
    errors = rms_errors(got, want)
    assert max(errors[k] for k in ("h", "h_n", "c_n")) < 1e-5, errors
    assert max(errors.values()) < 1e-4, errors
    again = run(kru_lstm_scan, case, torch.float32, backend="torch")
    assert {k: (v.shape, v.dtype) for k, v in got.items()} == {
        k: (v.shape, v.dtype) for k, v in again.items()
    }


def test_backend_triton_raises_the_reason():
    """float64 runs on no fused kernel."""
    arguments, _ = inputs(Case(square(4, 3)))
    reason = why_not_triton_lstm(**arguments)
    assert re.fullmatch(r"\S[^\n]{10,}", reason)
    refusal = 'backend="triton" cannot run here: ' + re.escape(reason)
    with pytest.raises(RuntimeError, match=refusal):
        kru_lstm_scan(**arguments, backend="triton")
    with pytest.raises(RuntimeError, match='backend="triton" cannot run here: '):
        KRULSTM(3, 12, backend="triton", dtype=torch.float64)(torch.zeros(2, 3).double())


def test_auto_says_once_which_backend_runs_and_why(caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_said", set())
    arguments, _ = inputs(Case(square(4, 3)))
    with caplog.at_level(logging.INFO, logger="kru_triton"):
        kru_lstm_scan(**arguments, backend="torch")
        assert caplog.text == ""
        kru_lstm_scan(**arguments)
        kru_lstm_scan(**arguments)
    assert caplog.text.count("kru_lstm_scan runs on the torch backend") == 1
    assert why_not_triton_lstm(**arguments) in caplog.text


# The op under torch.library and torch.compile


@pytest.mark.parametrize(
    ("backend", "optional"),
    [("torch", True), ("torch", False), pytest.param("triton", True, marks=GPU)],
)
def test_opcheck(backend, optional):
    if backend == "triton":
        pytest.importorskip("triton")
    sides = (8, 8) if backend == "triton" else (2, 3)
    states = "both" if optional else "none"
    case = Case(square(*sides), T=2, B=3, states=states, reset=optional, lengths=optional)
    arguments, cotangents = inputs(case, torch.float32)
    a, b = (w[0].view(4, 1, *w.shape[2:]).clone() for w in arguments.pop("factors"))
    x, h_0, c_0, reset, lengths = arguments.values()
    rest = (h_0, c_0, None if reset is None else reset.t(), lengths)
    leaves = [t if t is None else t.to(DEVICE) for t in (x.transpose(0, 1), a, b, *rest)]
    leaves = [
        t.requires_grad_() if t is not None and t.dtype.is_floating_point else t for t in leaves
    ]
    how = ("tanh", backend, "auto")
    op = torch.ops.kru_triton.lstm_recurrence
    torch.library.opcheck(op.default, (*leaves, *how))
    h, c, _, _ = op(*leaves, *how)
    saved = [None if t is None else t.detach() for t in (h, c, *leaves)]
    dh, dh_n, dc_n = (d.to(DEVICE) for d in cotangents.values())
    given = (dh.transpose(0, 1), dh_n, dc_n) if optional else (None, None, dc_n)
    torch.library.opcheck(
        torch.ops.kru_triton.lstm_recurrence_backward.default, (*given, *saved, *how)
    )


class Holder(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        torch.manual_seed(0)
        self.lstm = KRULSTM(5, 12, factors=(3, 4), **kwargs)
        self.head = nn.Linear(self.lstm.num_directions * 12, 3)

    def forward(self, x, hx=None, reset=None):
        h, (h_n, c_n) = self.lstm(x.tanh(), hx, reset=reset)
        return self.head(h), h_n, c_n


def outputs_and_gradients(module, *arguments):
    module.zero_grad()
    y, h_n, c_n = module(*arguments)
    (y.square().sum() + h_n.sum() + c_n.sum()).backward()
    results = {"y": y.detach(), "h_n": h_n.detach(), "c_n": c_n.detach()}
    return results | {
        k.removeprefix("_orig_mod."): p.grad.clone() for k, p in module.named_parameters()
    }


def test_compile_fullgraph():
    module = Holder(bidirectional=True)
    hx = torch.randn(2, 3, 12), torch.randn(2, 3, 12)
    arguments = (torch.randn(6, 3, 5), hx, torch.rand(3, 6) < 0.3)
    expected = outputs_and_gradients(module, *arguments)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_close(outputs_and_gradients(compiled, *arguments), expected, 1e-6)


def test_compile_makes_one_graph_for_any_batch_and_length():
    module = Holder()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for time, batch in ((5, 3), (6, 4), (7, 9), (32, 2)):
        x, reset = torch.randn(time, batch, 5), torch.rand(batch, time) < 0.2
        hx = torch.randn(1, batch, 12), torch.randn(1, batch, 12)
        for tensor, dims in ((x, (0, 1)), (reset, (0, 1)), (hx[0], (1,)), (hx[1], (1,))):
            for dim in dims:
                torch._dynamo.mark_dynamic(tensor, dim)
        outputs = compiled(x, hx, reset)
        for got, want in zip(outputs, module(x, hx, reset)):
            assert (got - want).abs().max() < 1e-6
        outputs[0].sum().backward()
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_of_the_parameters(dtype):
    """Parameters rounded to 2^-9 (bfloat16) move the state by a few times that."""
    lstm = make(3, 24, num_layers=2)
    x = randn(4, 2, 3)
    exact, _ = lstm(x)
    output, last = lstm.to(dtype)(x.to(dtype))
    assert output.dtype == dtype
    assert last[0].dtype == last[1].dtype == torch.float32
    assert (output - exact).norm() <= (1e-6 if dtype == torch.float32 else 2e-2) * exact.norm()
    lstm(x.to(dtype), last)
    (output.sum() + last[1].sum()).backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == dtype for p in lstm.parameters())


def test_under_autocast():
    torch.manual_seed(0)
    lstm = KRULSTM(3, 24, num_layers=2)
    x = torch.randn(4, 2, 3)
    exact, exact_n = lstm(x)
    with torch.autocast("cpu"):
        output, last = lstm(x)
        again, _ = lstm(x, last)
        output.float().square().sum().backward()
    assert output.dtype == again.dtype == torch.bfloat16
    assert last[0].dtype == last[1].dtype == torch.float32
    # bfloat16 projections: 2^-9 per number, over four steps and two layers
    assert (output.float() - exact).norm() < 2e-2 * exact.norm()
    for got, want in zip(last, exact_n):
        assert (got - want).norm() < 2e-2 * want.norm()
    assert all(p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in lstm.parameters())


# The module against torch.nn.LSTM with dense recurrent matrices


def make(*args, seed=0, **kwargs):
    torch.manual_seed(seed)
    lstm = KRULSTM(*args, **kwargs, dtype=torch.float64)
    with torch.no_grad():  # mistakes in a bias that starts at 0 do not show
        for name, p in lstm.named_parameters():
            if "bias" in name:
                p.uniform_(-0.5, 0.5)
    return lstm


def dense_twin(lstm):
    """The torch.nn.LSTM that computes the same, from the names and shapes of the state_dict."""
    twin = nn.LSTM(
        lstm.input_size,
        lstm.hidden_size,
        lstm.num_layers,
        bias=lstm.has_bias,
        batch_first=lstm.batch_first,
        bidirectional=lstm.bidirectional,
        dtype=torch.float64,
    )
    weights, dense = lstm.state_dict(), {}
    for suffix in sorted(n.removeprefix("weight_ih") for n in weights if "weight_ih" in n):
        dense[f"weight_ih{suffix}"] = weights[f"weight_ih{suffix}"]
        if lstm.has_bias:
            dense[f"bias_ih{suffix}"] = weights[f"bias{suffix}"]
            dense[f"bias_hh{suffix}"] = torch.zeros_like(weights[f"bias{suffix}"])
        factors = [w for n, w in weights.items() if re.fullmatch(rf"factor\d+{suffix}", n)]
        blocks = [reduce(torch.kron, [w[0, k] for w in factors]) for k in range(4 * lstm.num_heads)]
        gates = (blocks[k * lstm.num_heads : (k + 1) * lstm.num_heads] for k in range(4))
        dense[f"weight_hh{suffix}"] = torch.cat([torch.block_diag(*g) for g in gates])
    twin.load_state_dict(dense)
    return twin


MODULES = {
    "plain": dict(factors=(3, 4)),
    "layers": dict(num_layers=3, factors=(3, 4)),
    "bidirectional": dict(num_layers=2, bidirectional=True, factors=(4, 3)),
    "heads": dict(num_heads=2, factors=(2, 3), num_layers=2),
    "one factor": dict(factors=(12,)),
    "rectangular": dict(factors=((2, 3), (3, 2), (2, 2))),
    "no bias": dict(bias=False, factors=(2, 2, 3)),
    "batch first": dict(batch_first=True, bidirectional=True),
}
modules = pytest.mark.parametrize("kwargs", MODULES.values(), ids=MODULES.keys())


def data_of(x):
    return x.data if isinstance(x, PackedSequence) else x


def outputs_of(lstm, x, hx):
    output, (h_n, c_n) = lstm(x, hx)
    outputs = (data_of(output), h_n, c_n)
    loss = sum((y * randn(*y.shape, seed=9 + i)).sum() for i, y in enumerate(outputs))
    return outputs, loss


@modules
def test_equals_nn_lstm(kwargs):
    """Batched, unbatched and packed input, with and without a start; results and gradients."""
    lstm = make(5, 12, **kwargs)
    twin = dense_twin(lstm)
    rows = lstm.num_layers * lstm.num_directions
    sequences = [randn(n, 5, seed=n + i) for i, n in enumerate((2, 6, 1, 6))]
    starts = tuple(randn(rows, 4, 12, seed=s) for s in (2, 3))
    for x, hx in (
        (randn(6, 4, 5) if not lstm.batch_first else randn(4, 6, 5), starts),
        (randn(6, 5), tuple(s[:, 0] for s in starts)),
        (pack_sequence(sequences, enforce_sorted=False), starts),
        (pack_sequence(sorted(sequences, key=len, reverse=True)), starts),
    ):
        for state in (hx, None):
            leaves = [t.requires_grad_() for t in (data_of(x), *(state or ()))]
            results = []
            for layers in (lstm, twin):
                outputs, loss = outputs_of(layers, x, state)
                results.append((outputs, torch.autograd.grad(loss, leaves)))
            assert_same(results[0][0], results[1][0])
            assert_same(results[0][1], results[1][1], 1e-11)


def test_packed_sequences_come_back_as_packed():
    lstm, twin = make(5, 12), nn.LSTM(5, 12, dtype=torch.float64)
    for sort in (True, False):
        packed = pack_sequence([randn(n, 5) for n in ((6, 4, 4, 1) if sort else (2, 4, 1))], sort)
        output, (h_n, _) = lstm(packed)
        expected, _ = twin(packed)
        for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
            got, want = getattr(output, name), getattr(expected, name)
            assert got is want is None or torch.equal(got, want)
        padded, lengths = pad_packed_sequence(output)
        last = padded[lengths - 1, torch.arange(len(lengths))]
        assert_same((last,), (h_n[0],), 0)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_reset_separates_documents(bidirectional):
    """A row of three documents equals the documents run alone, in both directions."""
    lstm = make(5, 12, num_layers=2, bidirectional=bidirectional)
    x = randn(9, 1, 5)
    reset = torch.zeros(1, 9, dtype=torch.bool)
    reset[0, [0, 4, 6]] = True
    output, last = lstm(x, reset=reset)
    documents = [lstm(x[a:b]) for a, b in ((0, 4), (4, 6), (6, 9))]
    assert_same((output,), (torch.cat([y for y, _ in documents]),))
    step = lstm.num_directions
    assert_same([s[::step] for s in last], [s[::step] for s in documents[-1][1]])
    if bidirectional:  # its last step is the first of the row
        assert_same([s[1::2] for s in last], [s[1::2] for s in documents[0][1]])


def test_pieces_recompute_and_tokens_change_nothing():
    lstm = make(5, 12, num_layers=2)
    x, state, pieces = randn(9, 3, 5).requires_grad_(), None, []
    expected, loss = outputs_of(lstm, x, None)
    (gradient,) = torch.autograd.grad(loss, x)
    for piece in x.split((2, 1, 6)):
        y, state = lstm(piece, state)
        pieces.append(y)
    assert_same((torch.cat(pieces), *state), expected)
    lstm.recompute = 4
    outputs, loss = outputs_of(lstm, x, None)
    assert_same((*outputs, *torch.autograd.grad(loss, x)), (*expected, gradient))
    tokens, embedding = torch.randint(7, (9, 3)), randn(7, 5)
    by_tokens, by_rows = lstm(tokens, embedding=embedding), lstm(embedding[tokens])
    assert_same((by_tokens[0], *by_tokens[1]), (by_rows[0], *by_rows[1]))


def test_dropout_acts_between_layers_and_in_training_only():
    lstm = make(5, 12, num_layers=2, dropout=0.5)
    plain = make(5, 12, num_layers=2)
    x = randn(6, 3, 5)
    torch.manual_seed(0)
    (dropped, dropped_n, _), _ = outputs_of(lstm, x, None)
    expected, _ = outputs_of(plain, x, None)
    assert_same((dropped_n[0],), (expected[1][0],))  # before the first layer nothing is dropped
    assert (dropped - expected[0]).abs().max() > 1e-3
    assert (dropped != 0).all()  # nor after the last
    assert_same(outputs_of(lstm.eval(), x, None)[0], expected)


# Attributes


def test_parameters():
    lstm = KRULSTM(3, 24, 2, factors=(2, 3), num_heads=4, bidirectional=True)
    shapes = {n: tuple(p.shape) for n, p in lstm.named_parameters() if n.endswith("_l1_reverse")}
    assert shapes == {
        "weight_ih_l1_reverse": (96, 48),
        "bias_l1_reverse": (96,),
        "factor0_l1_reverse": (1, 16, 2, 2),
        "factor1_l1_reverse": (1, 16, 3, 3),
    }
    assert lstm.num_recurrent_parameters == 2 * 2 * 4 * 4 * (4 + 9)
    assert lstm.output_size == 24
    for bias in (p for n, p in lstm.named_parameters() if "bias" in n):
        assert bias.tolist() == [0.0] * 24 + [1.0] * 24 + [0.0] * 48
    assert repr(lstm) == "KRULSTM(3, 24, factors=(2x2, 3x3), num_heads=4)"


def test_recurrent_matrices_are_those_of_the_dense_twin_and_orthogonal():
    lstm = make(3, 24, 2, factors=(3, 4), num_heads=2, bidirectional=True)
    twin = dense_twin(lstm)
    for layer in range(2):
        for direction in range(2):
            suffix = f"_l{layer}" + "_reverse" * direction
            weight = getattr(twin, f"weight_hh{suffix}").view(4, 2, 12, 2, 12)
            for k, gate in enumerate(GATES):
                for head in range(2):
                    w = lstm.recurrent_matrix(gate, layer, direction, head)
                    assert_same((w,), (weight[k, head, :, head],), 1e-15)
                    assert_same((w.T @ w,), (torch.eye(12, dtype=torch.float64),))
    assert lstm.unitarity_penalty().item() < 1e-25
    with torch.no_grad():
        lstm.factor0_l1_reverse.mul_(2)  # WᵀW = 4 I: eight 3×3 factors, 3·3² each
    assert unitarity_penalty(lstm).item() == pytest.approx(8 * 27)
    assert diagnostics.spectrum(lstm.recurrent_factors(0)).abs().sub(1).abs().max() < 1e-12
    with pytest.raises(ValueError, match="gate: must be one of 'i', 'f', 'g', 'o', got 'c'"):
        lstm.recurrent_matrix("c")


def test_gradient_reaches_every_parameter():
    lstm = make(3, 24, 2, bidirectional=True, num_heads=2)
    lstm(randn(5, 2, 3))[0].square().sum().backward()
    for name, p in lstm.named_parameters():
        assert p.grad.count_nonzero() == p.numel(), name


def test_state_dict_round_trip_copy_and_pickle():
    lstm, other = KRULSTM(3, 24), KRULSTM(3, 24)
    x = torch.randn(2, 3)
    expected, _ = lstm(x)
    assert not torch.equal(other(x)[0], expected)
    other.load_state_dict(lstm.state_dict())
    for twin in (other, copy.deepcopy(lstm), pickle.loads(pickle.dumps(lstm))):
        assert torch.equal(twin(x)[0], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_module_trains(backend):
    if backend == "triton":
        pytest.importorskip("triton")
    torch.manual_seed(0)
    lstm = KRULSTM(5, 64, backend=backend).to(DEVICE)
    x, target = torch.randn(2, 2, 5, device=DEVICE), torch.randn(2, 2, 64, device=DEVICE).tanh()
    optimizer = torch.optim.Adam(lstm.parameters(), lr=3e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = (lstm(x)[0] - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


# Errors

X, W = torch.zeros(2, 3, 48), [torch.zeros(1, 4, 4, 4), torch.zeros(1, 4, 3, 3)]
META = torch.device("meta")
ERRORS = {
    "x_proj list": (TypeError, "x_proj: must be a tensor, got list", {"x_proj": [1.0]}),
    "x_proj complex": (
        TypeError,
        "x_proj: must be planar real",
        {"x_proj": torch.zeros(2, 3, 48, dtype=torch.complex64)},
    ),
    "x_proj int": (TypeError, "x_proj: .* got torch.int64", {"x_proj": X.long()}),
    "x_proj rank": (
        ValueError,
        r"x_proj: must be \(B, T, .* got shape \(3, 48\)",
        {"x_proj": X[0]},
    ),
    "x_proj width": (
        ValueError,
        r"x_proj: the last dimension must be 1·4·12 = 48 .* got 47",
        {"x_proj": X[..., 1:]},
    ),
    "factors tensor": (TypeError, "factors: expected a sequence", {"factors": W[0]}),
    "factors empty": (ValueError, "factors: expected at least one", {"factors": []}),
    "factors complex field": (
        ValueError,
        r"factors: must be real, \(1, 4·H, P, Q\) .* got \(2, 2, 4, 4\)",
        {"factors": [w.view(2, 2, *w.shape[2:]) for w in W]},
    ),
    "factors heads": (
        ValueError,
        r"factors: must be real, \(1, 4·H, P, Q\) .* got \(1, 2, 4, 4\)",
        {"factors": [w[:, :2] for w in W], "x_proj": X[..., :24]},
    ),
    "factors gates first": (
        ValueError,
        "factors.*expected planar",
        {"factors": [w.transpose(0, 1) for w in W]},
    ),
    "factors not square": (
        ValueError,
        "factors: rows multiply to 6 and columns to 4",
        {"factors": [torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 3, 2)]},
    ),
    "factors dtype": (
        TypeError,
        "factors: must be torch.float32",
        {"factors": [w.double() for w in W]},
    ),
    "h_0 kind": (TypeError, "h_0: must be a tensor, got tuple", {"h_0": (torch.zeros(2, 12),)}),
    "h_0 shape": (
        ValueError,
        r"h_0: must have shape \(2, 12\) \(\(B, H·N\)\), got \(1, 12\)",
        {"h_0": torch.zeros(1, 12)},
    ),
    "c_0 shape": (ValueError, r"c_0: must have shape \(2, 12\)", {"c_0": torch.zeros(2, 48)}),
    "c_0 dtype": (TypeError, "c_0: must be torch.float32", {"c_0": torch.zeros(2, 12).double()}),
    "c_0 complex": (
        TypeError,
        "c_0: must be planar real",
        {"c_0": torch.zeros(2, 12, dtype=torch.complex64)},
    ),
    "c_0 device": (ValueError, "c_0: is on meta", {"c_0": torch.zeros(2, 12, device=META)}),
    "reset shape": (
        ValueError,
        r"reset: must have shape \(2, 3\)",
        {"reset": torch.zeros(3, 2, dtype=torch.bool)},
    ),
    "reset dtype": (TypeError, "reset: must be a bool tensor", {"reset": torch.zeros(2, 3)}),
    "lengths shape": (
        ValueError,
        r"lengths: must have shape \(2,\)",
        {"lengths": torch.tensor([1, 2, 3])},
    ),
    "lengths dtype": (
        TypeError,
        "lengths: must be an int64 tensor, got torch.int32",
        {"lengths": torch.tensor([1, 2]).int()},
    ),
    "lengths long": (
        ValueError,
        "lengths: must be from 0 to 3 .* from 1 to 4",
        {"lengths": torch.tensor([1, 4])},
    ),
    "lengths negative": (
        ValueError,
        "lengths: must be from 0 to 3",
        {"lengths": torch.tensor([1, -1])},
    ),
    "backend": (ValueError, "backend: must be one of", {"backend": "cuda"}),
    "precision": (ValueError, "precision: must be one of", {"precision": "fp16"}),
}


@pytest.mark.parametrize(("kind", "match", "changed"), ERRORS.values(), ids=ERRORS.keys())
def test_errors_of_the_op(kind, match, changed):
    with pytest.raises(kind, match=match):
        kru_lstm_scan(**{"x_proj": X, "factors": W, **changed})


@pytest.mark.parametrize(
    ("kind", "match", "changed"),
    [
        (TypeError, "input_size: must be an int", dict(input_size="4")),
        (ValueError, "hidden_size: expected .* at least 1", dict(hidden_size=0)),
        (ValueError, "num_heads: must divide hidden_size", dict(num_heads=5)),
        (
            ValueError,
            r"factors: the row counts multiply to 16 .* hidden_size is 12",
            dict(factors=(4, 4)),
        ),
        (ValueError, "num_layers: must be at least 1, got 0", dict(num_layers=0)),
        (ValueError, r"dropout: must be in \[0, 1\), got 1", dict(dropout=1)),
        (ValueError, "backend: must be one of", dict(backend="cuda")),
        (ValueError, "precision: must be one of", dict(precision="fp8")),
        (TypeError, "dtype: must be a real float dtype", dict(dtype=torch.complex64)),
        (TypeError, "unexpected keyword argument 'proj_size'", dict(proj_size=3)),
    ],
)
def test_errors_when_built(kind, match, changed):
    with pytest.raises(kind, match=match):
        KRULSTM(**{"input_size": 4, "hidden_size": 12, **changed})


H = torch.zeros(2, 3, 12)


@pytest.mark.parametrize(
    ("kind", "match", "hx"),
    [
        (TypeError, r"hx: must be a tuple \(h_0, c_0\), got Tensor", H),
        (TypeError, r"hx: must be a tuple \(h_0, c_0\), got 1 entries", (H,)),
        (TypeError, "h_0: must be a tensor, got list", ([0.0], H)),
        (TypeError, "c_0: must be a tensor; leave out hx for zeros", (H, None)),
        (TypeError, "c_0: must be planar real", (H, H.to(torch.complex64))),
        (ValueError, r"c_0: must have the shape of h_0, .*\[2, 3, 12\]\), got", (H, H[:1])),
        (ValueError, "c_0: must have the dtype of h_0, torch.float32, got", (H, H.double())),
        (ValueError, "c_0: must have the device of h_0, cpu, got meta", (H, H.to(META))),
        (ValueError, "h_0: the last dimension must be hidden_size=12", (H[..., 1:],) * 2),
        (ValueError, r"h_0: must have shape \(2, 3, 12\) .* got \(1, 3, 12\)", (H[:1],) * 2),
        (TypeError, "h_0: must be torch.float32", (H.double(),) * 2),
    ],
)
def test_errors_of_hx(kind, match, hx):
    lstm, x = KRULSTM(4, 12, 2), torch.zeros(5, 3, 4)
    for given in (x, pack_sequence(list(x.unbind(1)))):
        with pytest.raises(kind, match=match):
            lstm(given, hx)


def test_errors_of_calls():
    lstm, x = KRULSTM(4, 12), torch.zeros(5, 3, 4)
    with pytest.raises(TypeError, match="input: must be a tensor"):
        lstm([1.0])
    with pytest.raises(ValueError, match="input: the last dimension must be input_size=4, got 3"):
        lstm(x[..., 1:])
    with pytest.raises(ValueError, match=r"h_0: must have shape \(1, 12\) .* got \(2, 12\)"):
        lstm(x[:, 0], (H[:, 0], H[:, 0]))
    with pytest.raises(ValueError, match=r"reset: must have shape \(3, 5\)"):
        lstm(x, reset=torch.zeros(5, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="reset: not with a PackedSequence"):
        lstm(pack_sequence([x[:, 0]]), reset=torch.zeros(1, 5, dtype=torch.bool))
