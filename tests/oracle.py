"""What every op is measured against: its formula, on dense matrices.

N×N matrices from torch.kron and a plain loop over time under autograd, in complex128, and in
float64 for the LSTM. Arguments, shapes and results are those of the ops. With `lengths` a row's
state is handed on beyond its last step, where h is 0 and x_proj and reset are not looked at.
"""

from functools import reduce

import rounding
import torch

# Largest error over the largest entry (at least 1). A run of a few steps is a few hundred roundings
# of 1e-16, and division by |z| magnifies them by at most 1e3 in the cases of the tests.
EXACT = 1e-10


def matrices(factors):
    """Planar factors (parts, H, P_f, Q_f) as complex128 matrices (H, P_f, Q_f)."""
    assert all(w.dtype == torch.float64 for w in factors)
    return [torch.complex(*(*w, torch.zeros_like(w[0]))[:2]) for w in factors]


def dense(factors):
    """A function of complex states (B, H·N): their products with the matrix of all factors."""
    blocks = [reduce(torch.kron, head) for head in zip(*matrices(factors))]
    matrix = torch.block_diag(*blocks)
    return lambda z: z @ matrix.T


def narrow(factors, pairs=False):
    """The same for two factors, with every operand of two products rounded to bfloat16; with
    `pairs` the factors are pairs of bfloat16."""
    a, b = matrices(factors)

    def product(z):
        x = z.unflatten(-1, (len(a), a.shape[-1], b.shape[-1]))
        return rounding.kron(a, b, x, narrow=True, pairs=pairs).flatten(1)

    return product


def activate(z, nonlinearity, beta=0.0):
    """σ of a complex z; at z = 0 modReLU is 0 with gradient 0, and modtanh has gradient 1."""
    if nonlinearity == "identity":
        return z
    if nonlinearity in ("tanh", "relu"):
        part = {"tanh": torch.tanh, "relu": torch.relu}[nonlinearity]
        return torch.complex(part(z.real), part(z.imag))
    nonzero = z != 0
    safe = torch.where(nonzero, z, 1.0)
    r = safe.abs()
    if nonlinearity == "modrelu":
        return torch.where(nonzero, (r + beta).clamp(min=0) * (safe / r), 0.0)
    return torch.where(nonzero, torch.tanh(r) * (safe / r), z)


def from_planar(x, parts):
    """(..., parts·H·N) to complex (..., H·N)."""
    re, im = (x, torch.zeros_like(x)) if parts == 1 else x.chunk(2, -1)
    return torch.complex(re, im)


def to_planar(z, parts):
    return torch.cat((z.real, z.imag)[:parts], -1)


def steps_of(x_proj, lengths):
    """(B, T, 1) bool, which steps a row takes, and x_proj with zeros at the others."""
    batch, time, _ = x_proj.shape
    lengths = torch.full((batch,), time) if lengths is None else lengths
    taken = (torch.arange(time) < lengths[:, None])[..., None]
    return taken, torch.where(taken, x_proj, 0.0)


def scan(
    x_proj,
    factors,
    beta=None,
    h_0=None,
    *,
    nonlinearity,
    reset=None,
    lengths=None,
    gate=None,
    product=dense,
):
    parts, multiply = factors[0].shape[0], product(factors)
    taken, x_proj = steps_of(x_proj, lengths)
    beta = 0.0 if beta is None else beta
    if gate is not None:
        real = gate.shape[-1] < x_proj.shape[-1]
        gate = from_planar(steps_of(gate, lengths)[1], 1 if real else parts)
    state = torch.zeros_like(x_proj[:, :1].sum(1)) if h_0 is None else h_0
    outputs = []
    for t in range(x_proj.shape[1]):
        before = state if reset is None else torch.where(reset[:, t, None], 0.0, state)
        before = from_planar(before, parts)
        before = before if gate is None else gate[:, t] * before
        z = multiply(before) + from_planar(x_proj[:, t], parts)
        h = to_planar(activate(z, nonlinearity, beta), parts)
        state = torch.where(taken[:, t], h, state)
        outputs.append(torch.where(taken[:, t], h, 0.0))
    return torch.stack(outputs, 1) if outputs else x_proj, state


def embedding_scan(tokens, table, *args, **kwargs):
    return scan(table[tokens], *args, **kwargs)


def step(x_proj, *args, gate=None, **kwargs):
    gate = None if gate is None else gate[:, None]
    return scan(x_proj[:, None], *args, gate=gate, **kwargs)[1]


def linear_scan(x_proj, factors, h_0=None, *, reset=None, lengths=None):
    return scan(x_proj, factors, None, h_0, nonlinearity="identity", reset=reset, lengths=lengths)


def lstm_scan(x_proj, factors, h_0=None, c_0=None, *, reset=None, lengths=None, product=dense):
    multiply = [product(gate) for gate in zip(*(w.chunk(4, 1) for w in factors))]
    taken, x_proj = steps_of(x_proj, lengths)
    empty = x_proj.unflatten(-1, (4, -1)).sum(2)
    zeros = torch.zeros_like(empty[:, :1].sum(1))
    h_n, c_n = (zeros if state is None else state for state in (h_0, c_0))
    outputs = []
    for t in range(x_proj.shape[1]):
        cut = x_proj.new_zeros(len(zeros), 1) > 0 if reset is None else reset[:, t, None]
        h, c = (torch.where(cut, 0.0, state) for state in (h_n, c_n))
        gates = zip(multiply, x_proj[:, t].chunk(4, -1))
        i, f, g, o = (gate(from_planar(h, 1)).real + u for gate, u in gates)
        c = c / (1 + torch.exp(-f)) + torch.tanh(g) / (1 + torch.exp(-i))
        h = torch.tanh(c) / (1 + torch.exp(-o))
        h_n, c_n = torch.where(taken[:, t], h, h_n), torch.where(taken[:, t], c, c_n)
        outputs.append(torch.where(taken[:, t], h, 0.0))
    return torch.stack(outputs, 1) if outputs else empty, (h_n, c_n)


def assert_close(actual, expected, limit):
    """Two dictionaries of results: the largest error over the largest entry, or 1."""
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        got = actual[name]
        assert got.shape == want.shape, name
        assert got.isfinite().all(), f"{name} is not finite"
        if got.numel():
            error = (got.double() - want.double()).abs().max() / want.abs().max().clamp(min=1)
            assert error.item() <= limit, f"{name}: {error.item():.2e} > {limit:.0e}"


def assert_same(actual, expected, limit=1e-12):
    """Two sequences of tensors: the largest error, for entries of order one."""
    for got, want in zip(actual, expected, strict=True):
        assert got.shape == want.shape
        assert (got - want).abs().max() <= limit


def relative_error(got, want):
    """Relative root mean square error."""
    dtype = torch.complex128 if want.is_complex() else torch.float64
    got, want = got.to(dtype), want.to(dtype)
    return ((got - want).norm() / want.norm().clamp(min=1e-300)).item()


def rms_errors(actual, expected):
    assert actual.keys() == expected.keys()
    return {k: relative_error(actual[k], v) for k, v in expected.items()}
