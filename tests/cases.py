"""The cases of the ops: what is asked, arguments drawn for it, and results with all gradients."""

import dataclasses
import inspect
import math

import oracle
import torch
from torch.utils._pytree import tree_leaves

from kru_triton import (
    kru_embedding_scan,
    kru_linear_scan,
    kru_lstm_scan,
    kru_scan,
    kru_step,
    unitary_,
)
from kru_triton.nonlinearity import NONLINEARITIES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCABULARY = 6  # rows of the table of embedding_scan; no token stands for the last
OPS = {
    "scan": (kru_scan, oracle.scan),
    "embedding_scan": (kru_embedding_scan, oracle.embedding_scan),
    "linear_scan": (kru_linear_scan, oracle.linear_scan),
    "step": (kru_step, oracle.step),
    "lstm_scan": (kru_lstm_scan, oracle.lstm_scan),
}


@dataclasses.dataclass(frozen=True)
class Case:
    shapes: tuple  # of the factors, as of `square`
    act: str = "modrelu"
    op: str = "scan"
    B: int = 3
    T: int = 7
    H: int = 1
    field: str = "complex"  # or real, as the LSTM always is
    starts: str = "h_0 c_0"  # those of its initial states that an op is given
    reset: bool = False
    lengths: tuple | None = None
    cotangents: str = "h h_n c_n"  # those of its results that matter
    layout: str = "contiguous"  # see `with_layout`
    scale: float = 1.0  # of the input
    zeros: bool = False  # exact ones in the input
    gate: bool | str = False  # "real": of a complex state
    beta: float = 0.3  # bound of both signs, or of the sign of a negative one; 0: none is passed
    noise: float = 0.02  # added to unitary factors, as training does
    dtype: torch.dtype | None = None  # of the input, where it is not that of all arguments
    precision: str = "auto"
    slack: float = 1.0  # times the limits of the kernels' errors

    def __str__(self):
        sizes = "x".join(str(p) if p == q else f"({p},{q})" for p, q in self.shapes)
        if len(set(self.shapes)) == 1 and len(self.shapes) > 2:
            sizes = f"{len(self.shapes)}of{self.shapes[0][0]}"
        words = [f"{self.op}-B{self.B}-T{self.T}-{sizes}"]
        if self.op not in ("linear_scan", "lstm_scan"):
            words.append(self.act)
        for field in dataclasses.fields(self)[5:]:
            value = getattr(self, field.name)
            if value != field.default:
                word = "+".join(map(str, value)) if isinstance(value, tuple) else value
                words.append(field.name if value is True else f"{field.name}={word}".strip())
        return "-".join(words).replace(" ", "+")

    @property
    def units(self):
        return self.H * math.prod(p for p, _ in self.shapes)


def square(*sizes):
    return tuple((p, p) for p in sizes)


UNSORTED = (2, 7, 0, 5, 7)
LENGTHS = (UNSORTED, (7, 6, 6, 1, 0), (4, 4, 4, 4, 4), (0, 0, 0, 0, 0))
LINEAR = {"act": "identity", "op": "linear_scan", "B": 5, "T": 13}
SCANS = [
    *(Case(square(4, 3), act) for act in NONLINEARITIES),
    *(Case(square(4, 4, 3), act, reset=True, H=2) for act in NONLINEARITIES),
    *(Case(square(2, 3), act, field="real", H=2, B=5) for act in NONLINEARITIES),
    *(Case(square(3, 4), act, zeros=True, starts="") for act in NONLINEARITIES),
    *(Case(square(3, 4), act, scale=50.0) for act in NONLINEARITIES),
    *(Case(square(3, 2), act, cotangents="h", B=1, T=1) for act in NONLINEARITIES),
    *(Case(square(3, 2), act, cotangents="h_n", starts="", T=4) for act in NONLINEARITIES),
    Case(square(4, 3), B=1, T=1, starts=""),
    Case(square(4, 3), B=1, T=2),
    Case(square(5)),
    Case(square(5), H=3, reset=True),
    Case(square(5), "modtanh", H=3, field="real"),
    Case(square(*[2] * 9), T=3, B=2),
    Case(square(*[2] * 9), "modtanh", T=3, B=2, reset=True),
    Case(square(1)),
    Case(square(1), "tanh", field="real", H=4),
    Case(square(1, 4)),
    Case(square(4, 1), "modtanh", H=2),
    Case(square(1, 3, 1, 2, 1)),
    Case(((2, 3), (3, 2), (2, 2)), reset=True),  # square cut after the first two
    Case(((2, 3), (3, 2), (4, 4)), "modtanh", H=2),
    Case(((2, 3), (4, 4), (3, 2))),  # square only all together
    Case(((1, 6), (6, 1)), "tanh", field="real"),
    Case(square(4, 3), layout="time_first"),
    Case(square(4, 3), layout="sliced"),
    Case(square(4, 3), "modtanh", layout="sliced", H=2, reset=True),
    Case(square(4, 3), "modtanh", layout="time_first"),
    Case(square(4, 3), beta=2.0),  # |z| < 2 often: many units dead, others far from |h| = |z|
    Case(square(4, 3), beta=2.0, field="real", reset=True),
    Case(square(4, 3), beta=0.0),
    Case(square(4, 3), beta=0.0, zeros=True, field="real"),
    Case(square(4, 3), reset=True, cotangents="h_n"),
    Case(square(4, 3), "relu", reset=True, cotangents="h", starts=""),
]
WITH_LENGTHS = [
    *(Case(square(4, 3), act, B=5, lengths=UNSORTED) for act in NONLINEARITIES),
    *(Case(square(2, 3), act, B=5, reset=True, H=2, lengths=UNSORTED) for act in NONLINEARITIES),
    *(Case(square(3, 2), act, B=5, lengths=n) for n in LENGTHS[1:] for act in ("relu", "modtanh")),
    Case(square(5), B=5, starts="", field="real", reset=True, lengths=UNSORTED),
    Case(square(5), "modtanh", B=5, starts="", lengths=UNSORTED),
    Case(square(4, 3), B=5, cotangents="h", lengths=UNSORTED),
    Case(square(4, 3), B=5, cotangents="h_n", lengths=UNSORTED),
    Case(square(4, 3), "modtanh", B=5, layout="time_first", reset=True, lengths=UNSORTED),
]
GATED = [
    *(Case(square(4, 3), act, gate=True) for act in NONLINEARITIES),
    *(Case(square(2, 3), act, field="real", H=2, gate=True) for act in NONLINEARITIES),
    *(
        Case(square(2, 3), act, B=5, H=2, reset=True, lengths=UNSORTED, gate=True)
        for act in NONLINEARITIES
    ),
    *(Case(square(4, 3), act, B=5, reset=True, gate="real") for act in NONLINEARITIES),
    Case(square(5), B=5, starts="", lengths=UNSORTED, gate=True),
    Case(square(5), B=5, H=2, reset=True, lengths=UNSORTED, gate="real"),
    Case(square(4, 3), layout="sliced", cotangents="h_n", gate=True),
    *(
        Case(square(4, 3), act, "embedding_scan", B=5, reset=True, gate=True)
        for act in ("modrelu", "modtanh")
    ),
    *(Case(square(4, 3), act, "step", gate=True) for act in ("modrelu", "tanh")),
    *(Case(square(4, 3), "tanh", op, gate="real") for op in ("step", "embedding_scan")),
]
STEPS = [Case(square(4, 3), act, "step") for act in NONLINEARITIES]
LINEAR_SCANS = [
    *(Case(square(2, 3), **LINEAR, H=2, reset=True, cotangents=c) for c in ("h", "h_n")),
    Case(square(2, 3), **LINEAR, H=2, starts="", layout="time_first"),
    Case(square(5), **LINEAR, field="real", reset=True),
    Case(square(4, 3), **{**LINEAR, "T": 12}, layout="time_first"),
    Case(square(6), **{**LINEAR, "T": 1}),
    Case(square(2, 3), **LINEAR, H=2, reset=True, lengths=(13, 0, 5, 12, 1)),
    Case(square(2, 3), **LINEAR, H=2, reset=True, starts="", lengths=(13, 0, 5, 12, 1)),
]
LSTM_SCANS = [
    dataclasses.replace(case, op="lstm_scan")
    for case in (
        Case(square(4, 3)),
        Case(square(4, 4, 3), H=2, reset=True),
        Case(square(2, 3), H=2, B=5, lengths=UNSORTED),
        Case(square(3, 4), H=3, B=5, reset=True, lengths=UNSORTED),
        Case(square(4, 3), B=1, T=1),
        Case(square(4, 3), B=1, T=2, starts=""),
        Case(square(5)),
        Case(square(5), H=2, reset=True, lengths=(0, 3, 7)),
        Case(square(*[2] * 6), T=3, B=2),
        Case(square(1)),
        Case(square(1, 4), H=2),
        Case(((2, 3), (3, 2), (2, 2)), reset=True),  # square cut after the first two
        Case(((2, 3), (4, 4), (3, 2)), lengths=(0, 3, 6)),  # square only all together
        Case(square(4, 3), starts="h_0", reset=True),
        Case(square(4, 3), starts="c_0", lengths=(0, 3, 6)),
        Case(square(4, 3), starts="", lengths=(0, 3, 6), reset=True),
        Case(square(4, 3), cotangents="h"),
        Case(square(4, 3), cotangents="h_n", lengths=(0, 3, 6)),
        Case(square(4, 3), cotangents="c_n", reset=True),
        Case(square(4, 3), layout="time_first"),
        Case(square(4, 3), H=2, layout="sliced", reset=True),
        Case(square(4, 3), scale=50.0),
    )
]
EMBEDDING_SCANS = [
    *(dataclasses.replace(case, op="embedding_scan") for case in WITH_LENGTHS),
    *(Case(square(4, 3), act, "embedding_scan", B=5, reset=True) for act in NONLINEARITIES),
]


def for_kernels(P, Q, act="modrelu", lengths=False, **changed):
    sizes = {"T": 5, "scale": 0.5, "beta": 0.05, "noise": 0.0, **changed}
    case = Case(square(P, Q), act, **sizes)
    rows = tuple(2 * n % (case.T + 1) for n in range(case.B))  # the first has no step
    return dataclasses.replace(case, lengths=rows if lengths else None)


def of_lstm(P, Q, **changed):
    return for_kernels(P, Q, **{"T": 4, "op": "lstm_scan", "scale": 1.0, **changed})


BF16 = {"precision": "bf16", "dtype": torch.bfloat16}
BF16X2 = {**BF16, "precision": "bf16x2"}
KERNELS = [
    # every nonlinearity, both fields, both precisions
    *(for_kernels(16, 16, act) for act in NONLINEARITIES),
    *(for_kernels(16, 16, act, field="real") for act in NONLINEARITIES),
    *(for_kernels(16, 16, act, **BF16) for act in NONLINEARITIES),
    *(for_kernels(16, 16, act, field="real", **BF16) for act in ("modrelu", "modtanh")),
    for_kernels(16, 16, dtype=torch.bfloat16, precision="fp32"),
    for_kernels(16, 16, precision="bf16"),
    # factors as pairs
    *(for_kernels(16, 16, act, **BF16X2) for act in ("modrelu", "modtanh", "identity")),
    *(for_kernels(P, Q, T=3, B=2, **BF16X2) for P, Q in [(16, 32), (32, 32), (256, 2)]),
    for_kernels(8, 8, B=5, reset=True, lengths=True, field="real", **BF16X2),
    for_kernels(16, 16, precision="bf16x2"),
    # shapes: packed block-diagonally, one tile, long sides, padded
    *(
        for_kernels(P, Q, T=3)
        for P, Q in [(8, 8), (8, 16), (16, 8), (4, 16), (2, 32), (64, 2), (1, 64)]
    ),
    *(for_kernels(P, Q, T=3, B=2) for P, Q in [(16, 32), (32, 16), (32, 32), (16, 64), (64, 16)]),
    *(for_kernels(P, Q, T=2, B=1) for P, Q in [(32, 64), (64, 64)]),
    *(for_kernels(P, Q, T=3) for P, Q in [(3, 11), (5, 5), (12, 12), (11, 24), (17, 3)]),
    *(for_kernels(P, Q, T=3, **BF16) for P, Q in [(8, 8), (8, 16), (16, 32), (32, 32), (3, 11)]),
    for_kernels(3, 11, "modtanh", field="real", T=4),
    for_kernels(5, 20, layout="odd", T=3),
    for_kernels(5, 20, B=3, T=2, **BF16),
    # one factor, and sides beyond 64
    *(for_kernels(P, Q, T=2) for P, Q in [(64, 1), (1, 128)]),
    for_kernels(128, 2, "tanh", T=2, B=9, reset=True, lengths=True),
    for_kernels(4, 128, slack=2, T=2, B=2, **BF16),
    for_kernels(256, 1, slack=2, T=2),
    for_kernels(4, 256, "modtanh", T=2, B=2, reset=True, lengths=True),
    for_kernels(256, 2, "relu", T=2, field="real", **BF16),
    # batch and time
    for_kernels(16, 16, B=1, T=1),
    for_kernels(16, 16, B=1, T=7),
    for_kernels(16, 16, B=5, T=1, starts=""),
    for_kernels(8, 8, B=1, T=3),
    for_kernels(8, 8, B=5, T=3),
    for_kernels(8, 8, B=9, T=2, **BF16),
    *(for_kernels(16, 16, B=B, T=T) for B, T in [(0, 3), (3, 0), (0, 0)]),
    # heads
    for_kernels(16, 16, H=3),
    for_kernels(8, 16, H=2, B=5),
    for_kernels(8, 8, H=2, field="real"),
    # reset, lengths, h_0
    for_kernels(16, 16, starts=""),
    for_kernels(16, 16, reset=True),
    for_kernels(16, 16, lengths=True),
    for_kernels(16, 16, reset=True, lengths=True, starts=""),
    for_kernels(8, 8, B=5, reset=True),
    for_kernels(8, 8, B=5, lengths=True),
    for_kernels(8, 8, "tanh", B=6, reset=True, lengths=True),
    for_kernels(8, 8, "modtanh", B=5, reset=True, lengths=True, H=2),
    for_kernels(16, 16, "modtanh", reset=True, lengths=True),
    for_kernels(16, 16, "identity", reset=True, lengths=True, field="real"),
    for_kernels(3, 11, "tanh", B=6, reset=True, lengths=True),
    for_kernels(8, 8, B=5, reset=True, lengths=True, **BF16),
    # where the rows lie
    *(for_kernels(16, 16, layout=layout) for layout in ("time_first", "cut", "odd")),
    *(for_kernels(8, 8, "modtanh", B=5, layout=layout) for layout in ("time_first", "cut", "odd")),
    for_kernels(3, 11, layout="cut"),
    for_kernels(16, 16, layout="time_first", H=2, **BF16),
    # cotangents
    *(for_kernels(16, 16, cotangents=c) for c in ("h", "h_n")),
    *(for_kernels(8, 8, B=5, cotangents=c, lengths=True) for c in ("h", "h_n")),
    for_kernels(16, 16, "modtanh", cotangents="h_n"),
    for_kernels(16, 16, cotangents="h", starts="", reset=True),
    # a gate
    *(for_kernels(16, 16, act, gate=True) for act in ("modrelu", "tanh", "identity")),
    for_kernels(16, 16, gate=True, starts="", **BF16),
    for_kernels(16, 16, "tanh", field="real", gate=True, cotangents="h_n"),
    for_kernels(8, 8, B=5, reset=True, lengths=True, gate=True),
    for_kernels(8, 8, B=5, H=2, reset=True, lengths=True, gate=True, **BF16),
    for_kernels(3, 11, "relu", B=5, T=3, reset=True, lengths=True, gate=True),
    for_kernels(32, 32, T=3, B=2, gate=True, layout="odd"),
    for_kernels(64, 2, T=2, B=3, gate=True),
    for_kernels(16, 16, gate="real"),
    for_kernels(16, 16, "identity", gate="real", starts="", **BF16),
    for_kernels(8, 8, B=5, H=2, reset=True, lengths=True, gate="real"),
    for_kernels(3, 11, "tanh", B=5, T=3, H=2, reset=True, lengths=True, gate="real", **BF16),
    for_kernels(32, 32, "identity", T=3, B=2, gate="real", layout="odd", **BF16),
    # far from and close to zero
    *(for_kernels(16, 16, act, scale=50.0, T=3) for act in NONLINEARITIES),
    *(for_kernels(16, 16, act, scale=50.0, T=3, **BF16) for act in ("modrelu", "modtanh", "tanh")),
    for_kernels(16, 16, beta=0.5, slack=10),  # where β = 0.5 phases of tiny z count in full
    for_kernels(16, 16, "modtanh", scale=1e-3, T=2),
    for_kernels(16, 16, "tanh", scale=1e-3, T=2),
    # the LSTM
    of_lstm(16, 16),
    of_lstm(16, 16, **BF16),
    of_lstm(16, 16, **BF16X2),
    of_lstm(8, 8, B=5, T=3, reset=True, lengths=True, **BF16X2),
    *(of_lstm(16, 16, B=B, T=T) for B, T in [(1, 1), (0, 2), (2, 0)]),
    of_lstm(16, 16, starts="", layout="time_first"),
    of_lstm(16, 16, reset=True),
    of_lstm(16, 16, lengths=True, H=2),
    of_lstm(16, 16, T=3, scale=50.0),
    of_lstm(8, 8, B=5, reset=True, lengths=True),
    of_lstm(8, 16, B=5, T=3, lengths=True, **BF16),
    of_lstm(8, 8, B=5, starts="", lengths=True, cotangents="h"),
    of_lstm(8, 8, B=5, lengths=True, cotangents="c_n"),
    of_lstm(3, 11, B=5, T=3, reset=True),
    of_lstm(32, 1, T=2),
    of_lstm(16, 32, B=2, T=2),
    of_lstm(32, 32, B=1, T=2),
    of_lstm(16, 16, cotangents="h_n"),
    of_lstm(16, 16, cotangents="c_n", starts=""),
]
STREAMED = [  # where the kernels take a side of 16 for a large one
    for_kernels(32, 8, T=3, B=2, reset=True),
    for_kernels(8, 32, B=3, T=3, lengths=True, reset=True, H=2),
    for_kernels(24, 5, T=3, B=5, lengths=True, starts=""),
    for_kernels(5, 24, "modtanh", T=3, B=5, lengths=True, reset=True),
    for_kernels(32, 1, "modtanh", T=3, starts="", field="real"),
    for_kernels(32, 16, "tanh", T=3, layout="odd", cotangents="h_n"),
    for_kernels(32, 4, T=3, layout="time_first", cotangents="h", **BF16),
    for_kernels(32, 32, "identity", T=2, B=1),
]


def each_op(*sizes, ops=("scan", "embedding_scan", "linear_scan", "lstm_scan"), **kwargs):
    """The same case for every op, with every nonlinearity that it has."""
    for op in ops:
        acts = ("identity",) if op in ("linear_scan", "lstm_scan") else NONLINEARITIES
        yield from (Case(square(*sizes), act, op, **kwargs) for act in acts)


EXACT_CASES = [
    *(*SCANS, *WITH_LENGTHS, *GATED, *EMBEDDING_SCANS, *STEPS, *LINEAR_SCANS, *LSTM_SCANS),
    *(case for B, T in ((3, 0), (0, 4), (0, 0)) for case in each_op(3, 2, B=B, T=T)),
    *each_op(3, 2, B=3, T=0, reset=True, lengths=(0, 0, 0)),
]


def draw(case, dtype=torch.float64, seed=0, x_dtype=None):
    """The arguments of a case's op by name, and cotangents of its results by name.

    Factors are unitary up to what training does to them. Beyond a row's length x_proj is NaN,
    reset is True and the cotangent of h is 7: none of it may be looked at.
    """
    generator = torch.Generator().manual_seed(seed)
    gates = 4 if case.op == "lstm_scan" else 1
    parts = 1 if gates == 4 or case.field == "real" else 2
    B, T, features = case.B, case.T, parts * case.units

    def normal(*shape, scale=1.0):
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (scale * drawn).to(dtype)

    x_dtype = x_dtype or case.dtype or dtype
    x = normal(B, T, gates * features, scale=case.scale).to(x_dtype)
    if case.zeros:  # where h_0 is 0 the states before step 2 are exactly 0
        x[:, :2] = 0
        x[:, 2, ::2] = 0
    torch.manual_seed(seed)
    factors = [
        unitary_(torch.empty(parts, gates * case.H, p, q, dtype=torch.float64))
        for p, q in case.shapes
    ]
    beta = torch.rand(case.units, generator=generator, dtype=torch.float64) * 2 - 1
    reset = torch.rand(B, T, generator=generator) < 0.2
    reset[:1, :1] = reset[-1:, -1:] = True
    shapes = {"h": (B, T, features), "h_n": (B, features), "c_n": (B, features)}
    numbers = case.units if case.gate == "real" else features
    gate = normal(B, T, numbers, scale=0.7).to(x_dtype) if case.gate else None
    if case.op == "step":
        x, shapes = x[:, 0], {"h": shapes["h_n"]}
        gate = None if gate is None else gate[:, 0]
    cotangents = {k: normal(*shape) for k, shape in shapes.items() if k in case.cotangents.split()}
    if gates == 1:
        cotangents.pop("c_n", None)
    lengths = None if case.lengths is None else torch.tensor(case.lengths).long()
    if lengths is not None and case.op != "step":
        beyond = torch.arange(T) >= lengths[:, None]
        x.masked_fill_(beyond[..., None], math.nan)
        if gate is not None:
            gate.masked_fill_(beyond[..., None], math.nan)
        reset |= beyond
        if "h" in cotangents:
            cotangents["h"].masked_fill_(beyond[..., None], 7.0)
    drawn = {
        "tokens": torch.randint(VOCABULARY - 1, (B, T), generator=generator),
        "table": normal(VOCABULARY, features, scale=case.scale).to(x_dtype),
        "x_proj": with_layout(x, case.layout),
        "factors": [w.to(dtype) + normal(*w.shape, scale=case.noise) for w in factors],
        "beta": (case.beta * (beta if case.beta > 0 else beta.abs())).to(dtype),
        "h_0": normal(B, features, scale=0.5) if "h_0" in case.starts else None,
        "c_0": normal(B, features) if "c_0" in case.starts else None,
        "nonlinearity": case.act,
        "reset": reset if case.reset else None,
        "lengths": lengths,
        "gate": None if gate is None else with_layout(gate, case.layout),
    }
    if case.act != "modrelu" or not case.beta:
        drawn["beta"] = None
    taken = inspect.signature(OPS[case.op][0]).parameters
    return {k: v for k, v in drawn.items() if k in taken}, cotangents


def with_layout(x, layout):
    """The values of `x (B, T, F)` in another memory: "time_first", "sliced" with strides in every
    dimension, or rows "cut" out of a larger buffer, aligned to 16 bytes, or "odd" ones."""
    if layout == "time_first":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "sliced" and x.dim() == 3:
        shape = (x.shape[0] + 1, x.shape[1] + 3, 2 * x.shape[2] + 1)
        out = torch.full(shape, math.nan, dtype=x.dtype)[1:, 2:-1, 1::2]
        out.copy_(x)
        assert not out.is_contiguous()
        return out
    if layout in ("cut", "odd"):
        B, T, F = x.shape
        shape = (B + 1, T + 2, F + {"cut": 16, "odd": 3}[layout])
        out = torch.full(shape, math.nan, dtype=x.dtype, device=x.device)[1:, 1 : T + 1, :F]
        return out.copy_(x)
    return x


def leaves_of(arguments):
    """The tensors that have gradients, by name."""
    leaves = {f"factors[{i}]": w for i, w in enumerate(arguments["factors"])}
    leaves |= {k: v for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    return {k: v for k, v in leaves.items() if v.is_floating_point()}


def with_leaves(arguments, leaves):
    """The arguments with other tensors in place of some."""
    factors = [leaves.get(f"factors[{i}]", w) for i, w in enumerate(arguments["factors"])]
    rest = {k: v for k, v in leaves.items() if "[" not in k}
    return {**arguments, **rest, "factors": factors}


def gradients(function, arguments, cotangents):
    """The results of a function of named arguments, and the gradients of all, by name."""
    leaves = {k: v.detach().requires_grad_() for k, v in leaves_of(arguments).items()}
    results = tree_leaves(function(**with_leaves(arguments, leaves)))
    results = dict(zip(("h", "h_n", "c_n"), results))
    outputs, given = zip(*((results[k], d.to(results[k].dtype)) for k, d in cotangents.items()))
    found = torch.autograd.grad(outputs, list(leaves.values()), given, allow_unused=True)
    # An argument that cannot matter (a reset or cotangent away) may have a zero or no gradient.
    found = {
        f"d {k}": torch.zeros_like(v) if g is None else g
        for (k, v), g in zip(leaves.items(), found)
    }
    return {k: v.detach() for k, v in results.items()} | found


def moved(values, device):
    """A dictionary of arguments, with its tensors on a device."""
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), values)


def run(function, case, dtype=torch.float64, *, seed=0, x_dtype=None, device="cpu", **options):
    """Results and gradients of every argument of a case, by name, on the CPU."""
    arguments, cotangents = draw(case, dtype, seed, x_dtype)
    arguments, cotangents = moved((arguments, cotangents), device)
    results = gradients(lambda **kwargs: function(**kwargs, **options), arguments, cotangents)
    return {k: v.cpu() for k, v in results.items()}


def run_oracle(case):
    return run(OPS[case.op][1], case)


def randn(*shape, seed=1):
    """float64 numbers, the same whatever was drawn before."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)
