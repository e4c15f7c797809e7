"""Rows of different length, and inputs read from a table, along the chain of trust of `test_scan`.

Rows of different length are checked against each row run alone, tokens against the rows they stand
for, both against the dense complex128 oracle.
"""

import pytest
import torch
from test_scan import EXACT, Case, assert_close, dense_scan, inputs, square
from torch._dynamo.testing import CompileCounterWithBackend

from kru_triton import kru_embedding_scan, kru_scan
from kru_triton.nonlinearity import NONLINEARITIES
from kru_triton.torch_backend import scan as torch_backend

LENGTHS = {
    "unsorted": (2, 7, 0, 5, 7),
    "sorted": (7, 6, 6, 1, 0),
    "equal": (4, 4, 4, 4, 4),
    "none": (0, 0, 0, 0, 0),
}
VOCABULARY = 6
CASES = [
    *(Case(square(4, 3), act, B=5) for act in NONLINEARITIES),
    *(Case(square(2, 3), act, B=5, reset=True, H=2) for act in NONLINEARITIES),
    Case(square(5), B=5, h_0=False, field="real", reset=True),
    Case(square(5), "modtanh", B=5, h_0=False),
    Case(square(4, 3), B=5, cotangent="h"),
    Case(square(4, 3), B=5, cotangent="h_n"),
    Case(square(4, 3), "modtanh", B=5, layout="time_first", reset=True),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)


def tokens_of(case, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY - 1, (case.B, case.T), generator=generator)  # the last: unused


def leaves_of(case, table=False, dtype=torch.float64):
    """Named leaf arguments, the reset, and cotangents of h and h_n; with `table` for its rows."""
    x, factors, beta, h_0, reset, dh, dh_n = inputs(case, dtype)
    if table:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(VOCABULARY, x.shape[2], generator=generator, dtype=torch.float64).to(dtype)
    named = {"x": x, "beta": beta, "h_0": h_0, **{f"w{f}": w for f, w in enumerate(factors)}}
    named = {k: v.requires_grad_() for k, v in named.items() if v is not None}
    return named, reset, dh, dh_n


def call(scan, case, named, x, reset, rows=slice(None), **kwargs):
    """(h, h_n) of some rows."""
    factors = [v for k, v in named.items() if k[0] == "w"]
    h_0 = named["h_0"][rows] if "h_0" in named else None
    reset = None if reset is None else reset[rows]
    kwargs = {"nonlinearity": case.act, "reset": reset, **kwargs}
    return scan(*x, factors, named.get("beta"), h_0, **kwargs)


def results(named, h, h_n, dh, dh_n):
    """h, h_n and the gradients of all leaves."""
    loss = sum((y * d.to(y.dtype)).sum() for y, d in ((h, dh), (h_n, dh_n)) if d is not None)
    grads = torch.autograd.grad(loss, named.values(), allow_unused=True)
    grads = {
        f"d {k}": torch.zeros_like(v) if g is None else g for (k, v), g in zip(named.items(), grads)
    }
    return {"h": h.detach(), "h_n": h_n.detach(), **grads}


def each_alone(case, lengths, table=False):
    """Every row by itself, cut to its length, on the dense oracle; beyond it h is 0."""
    named, reset, dh, dh_n = leaves_of(case, table)
    tokens = tokens_of(case)
    h, h_n = [], []
    for i, n in enumerate(lengths):
        row = slice(i, i + 1)
        x = named["x"][tokens[row, :n]] if table else named["x"][row, :n]
        cut = None if reset is None else reset[:, :n]
        if n:
            y, last = call(dense_scan, case, named, (x,), cut, row)
        else:
            y, last = x, named["h_0"][row] if "h_0" in named else x.new_zeros(1, x.shape[2])
        h.append(torch.cat((y, y.new_zeros(1, case.T - n, y.shape[2])), 1))
        h_n.append(last)
    return results(named, torch.cat(h), torch.cat(h_n), dh, dh_n)


def beyond(lengths, case):
    return torch.arange(case.T) >= torch.tensor(lengths)[:, None]


@pytest.mark.usefixtures("two_products")  # the test of tokens leaves small heads in one
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@cases
def test_rows_of_different_length_equal_each_row_alone(case, lengths):
    """Whatever is in the padding, and in the gradient of its zeros."""
    named, reset, dh, dh_n = leaves_of(case)
    padding = beyond(lengths, case)
    x = named["x"].masked_fill(padding[..., None], float("nan"))
    if reset is not None:
        reset = reset | padding
    if dh is not None:
        dh = dh.masked_fill(padding[..., None], 7.0)
    expected = each_alone(case, lengths)
    h, h_n = call(kru_scan, case, named, (x,), reset, lengths=torch.tensor(lengths))
    actual = results(named, h, h_n, dh, dh_n)
    assert_close(actual, expected, EXACT)
    assert not actual["h"][padding].any()
    assert not actual["d x"][padding].any()


@pytest.mark.parametrize("lengths", [None, *LENGTHS.values()], ids=["all", *LENGTHS.keys()])
@cases
def test_tokens_are_the_rows_they_stand_for(case, lengths):
    expected = each_alone(case, lengths or (case.T,) * case.B, table=True)
    named, reset, dh, dh_n = leaves_of(case, table=True)
    lengths = None if lengths is None else torch.tensor(lengths)
    x = (tokens_of(case), named["x"])
    h, h_n = call(kru_embedding_scan, case, named, x, reset, lengths=lengths)
    actual = results(named, h, h_n, dh, dh_n)
    assert_close(actual, expected, EXACT)
    assert not actual["d x"][-1].any()  # of a token that does not occur


@pytest.mark.usefixtures("two_products")
@pytest.mark.parametrize("act", NONLINEARITIES)
def test_chunks_of_one_step(act, monkeypatch):
    """The torch backend's own chunks, in every interval between two lengths."""
    monkeypatch.setattr(torch_backend, "CHUNK_BYTES", 1)
    case = Case(square(4, 3), act, B=5, reset=True)
    for table in (False, True):
        named, reset, dh, dh_n = leaves_of(case, table)
        x = (tokens_of(case), named["x"]) if table else (named["x"],)
        scan = kru_embedding_scan if table else kru_scan
        h, h_n = call(scan, case, named, x, reset, lengths=torch.tensor(LENGTHS["unsorted"]))
        expected = each_alone(case, LENGTHS["unsorted"], table)
        assert_close(results(named, h, h_n, dh, dh_n), expected, EXACT)


@pytest.mark.parametrize("table", [False, True], ids=["lengths", "tokens"])
@pytest.mark.parametrize("act", NONLINEARITIES)
def test_gradcheck(act, table):
    case = Case(square(2, 2), act, B=3, T=3)
    named, *_ = leaves_of(case, table)
    lengths = torch.tensor([1, 3, 0])

    def function(*leaves):
        given = dict(zip(named, leaves))
        x = (tokens_of(case), given["x"]) if table else (given["x"],)
        return call(
            kru_embedding_scan if table else kru_scan, case, given, x, None, lengths=lengths
        )

    assert torch.autograd.gradcheck(function, tuple(named.values()))


def test_a_half_precision_table_has_a_float32_state():
    case = Case(square(4, 3), B=5, reset=True)
    named, reset, dh, dh_n = leaves_of(case, table=True, dtype=torch.float32)
    half = {**named, "x": named["x"].detach().bfloat16().requires_grad_()}
    full = {**named, "x": half["x"].detach().float().requires_grad_()}
    tokens = tokens_of(case)
    h, h_n = call(kru_embedding_scan, case, half, (tokens, half["x"]), reset)
    exact, exact_n = call(kru_embedding_scan, case, full, (tokens, full["x"]), reset)
    assert h.dtype == torch.bfloat16
    assert torch.equal(h, exact.bfloat16())
    assert torch.equal(h_n, exact_n)
    gradient = results(half, h, h_n, dh, dh_n)["d x"]
    assert gradient.dtype == torch.bfloat16
    expected = results(full, exact, exact_n, dh, dh_n)["d x"]
    # each term of a sum, and the sum, is rounded to 2^-9, and so is each h that it comes from
    assert (gradient - expected).norm() < 1.5e-2 * expected.norm()


@pytest.mark.parametrize("act", NONLINEARITIES)
def test_two_runs_are_bitwise_equal(act):
    case = Case(square(8, 6), act, B=5, T=33)
    runs = []
    for _ in range(2):
        named, reset, dh, dh_n = leaves_of(case, table=True, dtype=torch.float32)
        lengths = torch.tensor([33, 7, 20, 33, 1])
        x = (tokens_of(case), named["x"])
        h, h_n = call(kru_embedding_scan, case, named, x, reset, lengths=lengths)
        runs.append(results(named, h, h_n, dh, dh_n))
    assert all(torch.equal(runs[0][k], runs[1][k]) for k in runs[0])


@pytest.mark.parametrize("act", NONLINEARITIES)
def test_of_a_further_token_only_h_is_kept(act):
    def saved_bytes(time):
        case = Case(square(4, 3), act, T=time)
        named, reset, *_ = leaves_of(case, table=True)
        kept = {}

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = (tokens_of(case), named["x"])
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            h, _ = call(kru_embedding_scan, case, named, x, reset)
        assert h.requires_grad
        return sum(kept.values())

    assert saved_bytes(40) - saved_bytes(30) == 10 * 3 * (24 * 8 + 8)  # a row of h and its token


def test_no_work_beyond_a_rows_length(monkeypatch):
    """What the time loop is given: the rows that still run."""
    seen = []
    original = torch_backend._forward

    def forward(out, *args):
        seen.append(out.shape[:2])
        return original(out, *args)

    monkeypatch.setattr(torch_backend, "_forward", forward)
    x, factors, *_ = inputs(Case(square(4, 3), B=5))
    kru_scan(x, factors, lengths=torch.tensor(LENGTHS["unsorted"]))
    assert seen == [(2, 4), (3, 3), (2, 2)]
    assert sum(steps * rows for steps, rows in seen) == sum(LENGTHS["unsorted"])


def test_compile_makes_one_graph_for_marked_batch_and_length():
    _, factors, beta, *_ = inputs(Case(square(4, 3)), torch.float32)
    table = torch.randn(VOCABULARY, 24, requires_grad=True)

    def function(tokens, table, lengths, h_0):
        h, h_n = kru_embedding_scan(tokens, table.tanh(), factors, beta, h_0, lengths=lengths)
        h_2, h_n = kru_scan(h.sin(), factors, beta, h_n, lengths=lengths)
        return h_2, h_n

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for time, batch in ((5, 3), (6, 4), (7, 9), (32, 2)):
        tokens = torch.randint(VOCABULARY, (batch, time))
        lengths, h_0 = torch.randint(time + 1, (batch,)), torch.randn(batch, 24)
        for tensor, dims in ((tokens, (0, 1)), (lengths, (0,)), (h_0, (0,))):
            for dim in dims:
                torch._dynamo.mark_dynamic(tensor, dim)
        outputs = []
        for f in (compiled, function):
            h, h_n = f(tokens, table, lengths, h_0)
            (gradient,) = torch.autograd.grad(h.square().sum() + h_n.sum(), table)
            outputs.append((h, h_n, gradient))
        for got, want in zip(*outputs):
            assert (got - want).abs().max() < 1e-5
    assert counter.frame_count == 1


W = [torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 3, 3)]
TOKENS, TABLE = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(5, 24)
META = torch.device("meta")
ERRORS = {
    "tokens kind": (TypeError, "tokens: must be a tensor, got list", {"tokens": [[0]]}),
    "tokens None": (TypeError, "tokens: must be a tensor, got NoneType", {"tokens": None}),
    "tokens dtype": (
        TypeError,
        r"tokens: must be an int64 tensor, got torch.float32; convert with .long\(\)",
        {"tokens": TOKENS.float()},
    ),
    "tokens rank": (ValueError, r"tokens: must be \(B, T\), got .* \(3,\)", {"tokens": TOKENS[0]}),
    "tokens device": (
        ValueError,
        "tokens: is on meta but table is on cpu",
        {"tokens": TOKENS.to(META)},
    ),
    "token too large": (
        ValueError,
        r"tokens: must be from 0 to 4 \(rows of the table\), got values from 0 to 5",
        {"tokens": torch.tensor([[0, 5, 2], [1, 1, 1]])},
    ),
    "token below 0": (
        ValueError,
        "tokens: must be from 0 to 4 .* got values from -1 to 2",
        {"tokens": torch.tensor([[0, -1, 2], [1, 1, 1]])},
    ),
    "no row": (ValueError, "tokens: must be from 0 to -1", {"table": TABLE[:0]}),
    "table kind": (TypeError, "table: must be a tensor, got list", {"table": [1.0]}),
    "table rank": (
        ValueError,
        r"table: must be \(V, parts·H·N\), got shape \(1, 5, 24\)",
        {"table": TABLE[None]},
    ),
    "table width": (
        ValueError,
        r"table: the last dimension must be 2·1·12 = 24 .* got 23",
        {"table": TABLE[:, 1:]},
    ),
    "table int": (TypeError, "table: must be float64, .* got torch.int64", {"table": TABLE.long()}),
    "table complex": (
        TypeError,
        "table: must be planar real",
        {"table": torch.zeros(5, 12, dtype=torch.complex64)},
    ),
    "factors dtype": (
        TypeError,
        "factors: must be torch.float64 with table of torch.float64, got torch.float32",
        {"table": TABLE.double()},
    ),
    "h_0 shape": (ValueError, r"h_0: must have shape \(2, 24\)", {"h_0": torch.zeros(3, 24)}),
    "reset shape": (
        ValueError,
        r"reset: must have shape \(2, 3\)",
        {"reset": torch.zeros(3, 2, dtype=torch.bool)},
    ),
    "lengths kind": (TypeError, "lengths: must be a tensor, got list", {"lengths": [1, 2]}),
    "lengths shape": (
        ValueError,
        r"lengths: must have shape \(2,\) \(steps of each row, \(B,\)\), got \(3,\)",
        {"lengths": torch.tensor([1, 2, 3])},
    ),
    "lengths dtype": (
        TypeError,
        r"lengths: must be an int64 tensor, got torch.int32; convert with .long\(\)",
        {"lengths": torch.tensor([1, 2], dtype=torch.int32)},
    ),
    "lengths device": (
        ValueError,
        "lengths: is on meta but table is on cpu",
        {"lengths": torch.zeros(2, dtype=torch.int64, device=META)},
    ),
    "length too large": (
        ValueError,
        r"lengths: must be from 0 to 3 \(the steps of a row\), got values from 1 to 4",
        {"lengths": torch.tensor([4, 1])},
    ),
    "length below 0": (
        ValueError,
        "lengths: must be from 0 to 3 .* got values from -1 to 2",
        {"lengths": torch.tensor([-1, 2])},
    ),
}


@pytest.mark.parametrize(("kind", "match", "changed"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(kind, match, changed):
    arguments = {"tokens": TOKENS, "table": TABLE, "factors": W, **changed}
    with pytest.raises(kind, match=match):
        kru_embedding_scan(**arguments)
    if "lengths" in changed:
        match = match.replace("table is", "x_proj is")
        with pytest.raises(kind, match=match):
            kru_scan(torch.zeros(2, 3, 24), W, **changed)
