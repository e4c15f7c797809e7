"""The public operations on compiled kernels against a loop in float64, forward and gradients.

Every case goes through `kru_scan`, `kru_embedding_scan` or `kru_lstm_scan`, so launchers and
kernels run as they would on a device. Where products are of bfloat16, the reference rounds their
operands as the kernels do (see `rounding`).
"""

from dataclasses import dataclass, fields

import pytest
import rounding
import torch

import kru_triton
from kru_triton.kernels import why_not
from kru_triton.nonlinearity import NONLINEARITIES

# Relative L2 errors of results and of gradients. float32: products of bfloat16 pairs are exact to
# 2^-17, and gradients pass through them twice and through 1/|z|. bfloat16: the sum of a product may
# round to the other neighbour (2^-9), and memory rounds once more; the adjoint rounds in its own
# products too. Real modReLU jumps, and of some thousand units a few cross the jump even so.
LIMITS = {"fp32": (5e-5, 2e-4), "bf16": (6e-3, 1e-2), "bf16, real modReLU": (6e-3, 3e-2)}


@dataclass(frozen=True)
class Case:
    P: int
    Q: int
    dtype: str = "bf16"  # of memory
    act: str = "modrelu"
    op: str = "scan"  # scan, tokens or lstm
    field: str = "complex"
    H: int = 1
    B: int = 3
    T: int = 5
    h_0: bool = False
    reset: bool = False
    lengths: bool = False
    layout: str = "batch"  # batch, time, cut (rows of 16 bytes) or odd (rows of no alignment)
    precision: str = "auto"
    wide: bool = False  # the kernels for large factors, whatever the size

    @property
    def narrow(self) -> bool:
        """Whether products are of bfloat16."""
        return self.precision == "bf16" or (self.precision, self.dtype) == ("auto", "bf16")

    @property
    def parts(self) -> int:
        return 2 if self.field == "complex" and self.op != "lstm" else 1

    @property
    def gates(self) -> int:
        return 4 if self.op == "lstm" else 1

    @property
    def limits(self) -> tuple[float, float]:
        if not self.narrow and self.dtype == "fp32":
            walk = max(1, self.T / 16) ** 0.5  # errors of many steps add up as a random walk
            return tuple(limit * walk for limit in LIMITS["fp32"])
        real = (self.act, self.parts, self.op) == ("modrelu", 1, "scan")
        return LIMITS["bf16, real modReLU" if real else "bf16"]

    def __str__(self):
        shape = f"{self.op}-{self.P}x{self.Q}-{self.dtype}-B{self.B}-T{self.T}"
        words = []
        for f in fields(self):
            value = getattr(self, f.name)
            if value != f.default and f.name not in ("P", "Q", "op", "dtype", "B", "T"):
                words.append(f.name if value is True else f"{f.name}={value}")
        return "-".join([shape, *words])


FLAGS = {"h_0": True, "reset": True, "lengths": True}
DTYPES = ("bf16", "fp32")
SIZES = [(16, 16), (8, 8), (8, 16), (2, 32), (4, 16), (3, 11), (5, 20), (16, 32), (32, 32)]
SIZES += [(16, 64), (24, 24), (32, 64), (64, 64), (64, 1), (1, 64), (128, 8), (8, 128)]


def small(size, **small_shape):
    """B and T of a case, fewer where the kernel is large."""
    return {"T": 3, "B": 2} if size[0] * size[1] >= 1024 else small_shape


def table():
    for size in SIZES:
        for dtype in DTYPES:
            yield Case(*size, dtype, **small(size, T=6, B=5))
        yield Case(*size, H=2, **FLAGS, **small(size, T=5, B=5))
    for size in [(64, 16), (128, 32), (32, 128)]:
        yield Case(*size, T=3, B=1)
    for act in NONLINEARITIES[1:]:
        for size in [(16, 16), (32, 32), (8, 8)]:
            for dtype in DTYPES:
                yield Case(*size, dtype, act, B=5, T=4, **(FLAGS if size == (8, 8) else {}))
        yield Case(16, 16, "fp32", act, field="real", **FLAGS)
    for size in [(16, 16), (8, 8), (32, 32), (64, 64), (3, 11)]:
        for dtype in DTYPES:
            yield Case(*size, dtype, field="real", T=3)
    for B, T in [(1, 1), (1, 7), (5, 1), (33, 8)]:
        yield Case(16, 16, B=B, T=T)
        yield Case(8, 8, B=B, T=T, h_0=True)
        yield Case(3, 11, B=B, T=T)
    for layout in ("time", "cut", "odd"):
        for size in [(16, 16), (8, 8), (3, 11), (5, 20), (32, 32)]:
            for dtype in DTYPES:
                yield Case(*size, dtype, B=5, T=4, layout=layout)
        yield Case(8, 8, "bf16", "modtanh", B=5, T=4, H=2, layout=layout)
    for flag in FLAGS:
        for size in [(8, 8), (16, 16), (32, 32), (3, 11)]:
            yield Case(*size, B=5, H=3, **{flag: True})
    for size in [(8, 8), (16, 16), (32, 32), (3, 11), (64, 64)]:
        yield Case(*size, op="tokens", B=5, T=6)
        yield Case(*size, "fp32", "modtanh", op="tokens", B=5, T=4, **FLAGS)
    for size in [(16, 16), (8, 8)]:
        yield Case(*size, "bf16", precision="fp32")
        yield Case(*size, "fp32", precision="bf16")
    for size in [
        (8, 8),
        (8, 16),
        (16, 16),
        (16, 32),
        (32, 32),
        (32, 64),
        (64, 64),
        (3, 11),
        (5, 20),
    ]:
        for dtype in DTYPES:
            yield Case(*size, dtype, op="lstm", **small(size, T=5, B=5))
        yield Case(*size, op="lstm", T=3, B=5, H=1 if "B" in small(size) else 2, **FLAGS)
    for layout in ("time", "odd"):
        yield Case(16, 16, op="lstm", layout=layout)
        yield Case(3, 11, "fp32", op="lstm", layout=layout)
    for size in [(256, 16), (16, 256), (512, 1), (2, 512), (128, 32), (64, 64)]:
        for dtype in DTYPES:
            yield Case(*size, dtype, T=3, B=2, wide=True)
    for size in [(8, 32), (32, 8), (24, 5)]:
        for act in ("modrelu", "modtanh"):
            yield Case(*size, "bf16", act, T=4, B=5, H=2, wide=True, **FLAGS)
    yield Case(256, 4, op="tokens", T=3, wide=True)
    yield Case(2, 1024, T=2, B=1, wide=True)


CASES = list(dict.fromkeys(table()))


def arranged(x, layout):
    """The same values of (B, T, F) lying differently in memory."""
    if layout == "batch":
        return x
    if layout == "time":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    B, T, F = x.shape
    extra = 16 if layout == "cut" else 3
    buffer = torch.full((B + 1, T + 2, F + extra), float("nan"), dtype=x.dtype)
    return buffer[1:, 1 : T + 1, :F].copy_(x)


def draw(case, seed):
    """Tensors by name, all of them exact in bfloat16 where the case computes in it, and flags."""
    random = torch.Generator().manual_seed(seed)
    units = case.H * case.P * case.Q

    def normal(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64)

    def factor(side):
        w = normal(case.parts, case.gates * case.H, side, side)
        w = torch.linalg.qr(torch.complex(*w) if case.parts == 2 else w[0])[0]
        return torch.stack((w.real, w.imag) if case.parts == 2 else (w,))

    rows = (7,) if case.op == "tokens" else (case.B, case.T)
    tensors = {
        "x": normal(*rows, case.gates * case.parts * units) * 0.5,
        "a": factor(case.P),
        "b": factor(case.Q),
        "dh": normal(case.B, case.T, case.parts * units),
        "dh_n": normal(case.B, case.parts * units),
    }
    if case.act == "modrelu" and case.op != "lstm":
        tensors["beta"] = (torch.rand(units, generator=random).double() * 2 - 1) * 0.05
    if case.h_0:
        tensors["h_0"] = normal(case.B, case.parts * units) * 0.5
    if case.op == "lstm":
        tensors["dc_n"] = normal(case.B, units)
        if case.h_0:
            tensors["c_0"] = normal(case.B, units) * 0.5
    memory = torch.bfloat16 if case.dtype == "bf16" or case.narrow else torch.float32
    flags = {}
    if case.reset:
        flags["reset"] = torch.rand(case.B, case.T, generator=random) < 0.3
    if case.lengths:  # rows of every length, one of none
        flags["lengths"] = torch.arange(case.B) * 2 % (case.T + 1)
    if case.op == "tokens":
        flags["tokens"] = torch.randint(7, (case.B, case.T), generator=random)
    return {k: v.to(memory) for k, v in tensors.items()}, flags


GRADIENTS = {k: f"d{k}" for k in ("x", "a", "b", "beta", "h_0", "c_0")}


def gradients(outputs, leaves, tensors):
    cotangents = [tensors[name].to(outputs[name[1:]].dtype) for name in ("dh", "dh_n")]
    if "c_n" in outputs:
        cotangents.append(tensors["dc_n"].to(outputs["c_n"].dtype))
    found = torch.autograd.grad(list(outputs.values()), list(leaves.values()), cotangents)
    return {GRADIENTS[k]: g for k, g in zip(leaves, found)}


# ---------------------------------------------------------------------------------- the reference


def activate(z, beta, act):
    if act in ("modrelu", "modtanh"):
        m = z.abs().clamp_min(1e-15)
        return z * (torch.relu(m + beta) if act == "modrelu" else torch.tanh(m)) / m
    function = {"tanh": torch.tanh, "relu": torch.relu, "identity": lambda x: x}[act]
    return torch.complex(function(z.real), function(z.imag)) if z.is_complex() else function(z)


def joined(case, x):
    """Planar (..., parts·H·N) to complex or real (..., H, P, Q)."""
    x = x.unflatten(-1, (case.parts, case.H, case.P, case.Q)).movedim(-4, 0)
    return torch.complex(*x) if case.parts == 2 else x[0]


def planar(z):
    """(..., H, P, Q) to planar (..., parts·H·N)."""
    planes = torch.stack((z.real, z.imag) if z.is_complex() else (z,))
    return planes.movedim(0, -4).flatten(-4)


def recurrent(case, a, b, x):
    """A X Bᵀ as the kernels round it; of a factor beside a 1×1 one the op makes a single B."""
    if 1 in (case.P, case.Q):
        row = x.flatten(-2)[..., None, :]
        z = rounding.kron(torch.ones_like(a[..., :1, :1]), a * b, row, case.narrow, case.wide)
        return z.view_as(x)
    return rounding.kron(a, b, x, case.narrow, case.wide and case.Q > case.P)


def reference(case, tensors, flags):
    """Leaves and outputs of the definition in float64."""
    leaves = {k: tensors[k].double().requires_grad_() for k in GRADIENTS if k in tensors}
    x = leaves["x"][flags["tokens"]] if case.op == "tokens" else leaves["x"]
    u = [joined(case, gate) for gate in x.chunk(case.gates, -1)]
    a, b = (torch.complex(*w) if case.parts == 2 else w[0] for w in (leaves["a"], leaves["b"]))
    factors = list(zip(a.chunk(case.gates), b.chunk(case.gates)))
    beta = leaves.get("beta")
    beta = None if beta is None else beta.view(case.H, case.P, case.Q)
    zero = torch.zeros_like(u[0][:, 0])
    names = ("h_0", "c_0") if case.op == "lstm" else ("h_0",)
    last = state = [joined(case, leaves[k]) if k in leaves else zero for k in names]
    lengths = flags.get("lengths", torch.full((case.B,), case.T))
    states = []
    for t in range(case.T):
        if "reset" in flags:
            fresh = flags["reset"][:, t, None, None, None]
            state = [torch.where(fresh, 0.0, s) for s in state]
        z = [recurrent(case, *w, state[0]) + gate[:, t] for w, gate in zip(factors, u)]
        if case.op == "lstm":
            c = z[1].sigmoid() * state[1] + z[0].sigmoid() * z[2].tanh()
            state = [z[3].sigmoid() * c.tanh(), c]
        else:
            state = [activate(z[0], beta, case.act)]
        alive = (t < lengths)[:, None, None, None]
        state = [torch.where(alive, s, 0.0) for s in state]
        last = [torch.where(alive, s, before) for s, before in zip(state, last)]
        states.append(planar(state[0]))
    outputs = {"h": torch.stack(states, 1), "h_n": planar(last[0])}
    if case.op == "lstm":
        outputs["c_n"] = planar(last[1])
    return leaves, outputs


def near_a_jump(case, tensors, outputs) -> bool:
    """Whether some |z| of a unit with beta > 0 is small. There complex modReLU jumps, and its
    gradient is 1/|z| times an error of z: such an input measures nothing else."""
    if "beta" not in tensors or case.parts == 1:
        return False
    m = joined(case, outputs["h"].detach()).abs().flatten(2)
    beta = tensors["beta"].double()
    least = 2.5e-3 if case.narrow else 5e-3  # limits are a fiftieth of those of bfloat16
    return bool(((m > 0) & (beta > 0) & (m - beta < least)).any())


def expected(case):
    """Inputs, flags, and what the reference makes of them."""
    for seed in range(100):
        tensors, flags = draw(case, seed)
        leaves, outputs = reference(case, tensors, flags)
        if not near_a_jump(case, tensors, outputs):
            return tensors, flags, outputs, gradients(outputs, leaves, tensors)
    raise AssertionError(f"no inputs for {case}")


# ------------------------------------------------------------------------------------- the kernels


def computed(case, tensors, flags):
    memory = torch.bfloat16 if case.dtype == "bf16" else torch.float32

    def leaf(name):
        value = tensors[name].to(memory if name in ("x", "dh") else torch.float32)
        if name in ("x", "dh") and value.dim() == 3:
            value = arranged(value, case.layout)
        return value.detach().requires_grad_()

    leaves = {k: leaf(k) for k in GRADIENTS if k in tensors}
    x, factors, h_0 = leaves["x"], [leaves["a"], leaves["b"]], leaves.get("h_0")
    how = {"backend": "triton", "precision": case.precision, **flags}
    if case.op == "lstm":
        h, (h_n, c_n) = kru_triton.kru_lstm_scan(x, factors, h_0, leaves.get("c_0"), **how)
        outputs = {"h": h, "h_n": h_n, "c_n": c_n}
    else:
        how["nonlinearity"] = case.act
        rest = (x, factors, leaves.get("beta"), h_0)
        if case.op == "tokens":
            h, h_n = kru_triton.kru_embedding_scan(how.pop("tokens"), *rest, **how)
        else:
            h, h_n = kru_triton.kru_scan(*rest, **how)
        outputs = {"h": h, "h_n": h_n}
    cotangents = {k: leaf(k) for k in ("dh", "dh_n", "dc_n") if k in tensors}
    return outputs, gradients(outputs, leaves, cotangents)


def errors(got, want):
    def error(name):
        difference = got[name].double() - want[name]
        return (difference.norm() / want[name].norm().clamp_min(1e-30)).item()

    return {name: error(name) for name in got}


def why_no_lstm(case) -> str | None:
    """Why this target refuses an LSTM: it has no kernels that stream their factors."""
    if case.op != "lstm":
        return None
    a, b = (torch.empty(4, case.H, side, side) for side in (case.P, case.Q))
    memory = torch.bfloat16 if case.dtype == "bf16" else torch.float32
    x = torch.empty(4 * case.H * case.P * case.Q, dtype=memory)
    return why_not.why_not(x, a, b, lstm=True, precision="bf16" if case.narrow else "fp32")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_reference(case, monkeypatch):
    if reason := why_no_lstm(case):
        pytest.skip(reason)
    if case.wide:
        monkeypatch.setattr(why_not, "MAX_HELD_SIDE", 0)
    tensors, flags, *want = expected(case)
    got = computed(case, tensors, flags)
    for found, true, limit in zip(got, want, case.limits):
        found = errors(found, true)
        assert found == {k: pytest.approx(0, abs=limit) for k in found}


# Every nonlinearity and kernel where a device rounds as it may: approximate instructions are off by
# up to their documented error, and tensor cores cut what they add
ROUGH = [
    *(Case(16, 16, dtype, act, T=4) for act in NONLINEARITIES for dtype in DTYPES),
    *(Case(32, 32, dtype, T=2, B=1) for dtype in DTYPES),
    *(Case(16, 16, dtype, op="lstm", T=4) for dtype in DTYPES),
    *(Case(128, 32, dtype, T=2, B=1, wide=True) for dtype in DTYPES),
]


@pytest.mark.parametrize("case", ROUGH, ids=str)
def test_with_the_errors_of_a_device(case, monkeypatch, device):
    with device.under(approximate=1, truncate=True):
        test_against_the_reference(case, monkeypatch)


def test_longer_with_the_errors_of_a_device(device, monkeypatch):
    """Truncation is always towards zero: were its errors large, they would add up.

    Not in bfloat16: there the definition itself moves by 2e-2 in h_n where its z are disturbed by
    2^-22, because operands round to the other neighbour and the unitary factors carry that on.
    """
    case = Case(16, 16, "fp32", T=64, B=1)
    with device.under(approximate=2, truncate=True):
        test_against_the_reference(case, monkeypatch)
