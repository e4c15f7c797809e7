"""The recurrence as it is defined: a plain loop over time under autograd, in complex numbers.

    z_t = (W_0 ⊗ … ⊗ W_{F-1}) h_{t-1} + x_proj_t        h_t = σ(z_t)

Source: Jose, Cissé and Fleuret, "Kronecker Recurrent Units", ICML 2018. Everything fast is tested
against this file; it is slow and it stores every intermediate of every step.

B batch, T time steps, H heads, P and Q sizes of the two grouped factors, N = P·Q units per head.
"""

import torch
from torch import Tensor

from kru_triton.kronecker import group_factors
from kru_triton.nonlinearity import check_nonlinearity


def apply_nonlinearity(z: Tensor, nonlinearity: str, beta: Tensor | None = None) -> Tensor:
    """σ(z) for a complex or real tensor `z`; `beta` broadcasts against it. NaN-free at z = 0."""
    if nonlinearity == "identity":
        return z
    if nonlinearity in ("relu", "tanh"):
        function = torch.relu if nonlinearity == "relu" else torch.tanh
        if not z.is_complex():
            return function(z)
        return torch.complex(function(z.real), function(z.imag))
    is_zero = z == 0
    safe = torch.where(is_zero, torch.ones_like(z), z)
    modulus = safe.abs()
    if nonlinearity == "modrelu":
        scaled = torch.relu(modulus + beta) / modulus * safe
        return torch.where(is_zero, torch.zeros_like(z), scaled)
    return torch.where(is_zero, z, torch.tanh(modulus) / modulus * safe)


def kru_scan_reference(
    x_proj: Tensor,
    factors,
    beta: Tensor | None = None,
    h_0: Tensor | None = None,
    *,
    nonlinearity: str = "modrelu",
    reset: Tensor | None = None,
    return_states: bool = False,
):
    """The loop that defines `kru_triton.kru_scan`; same arguments, shapes and results.

    With `return_states` the T planar states `(B, parts·H·N)` that the recurrence really used come
    third, each a part of the autograd graph.
    """
    check_nonlinearity(nonlinearity)
    a, b = group_factors(factors)
    parts, heads, p, q = a.shape[0], a.shape[1], a.shape[-1], b.shape[-1]
    batch, time = x_proj.shape[:2]
    shape = (batch, parts, heads, p, q)
    a, b = (torch.complex(w[0], w[1]) if parts == 2 else w[0] for w in (a, b))
    if nonlinearity == "modrelu":
        beta = (x_proj.new_zeros(heads * p * q) if beta is None else beta).view(heads, p, q)
    h = x_proj.new_zeros(batch, parts * heads * p * q) if h_0 is None else h_0
    states = []
    inputs = x_proj.unbind(1)  # once: slicing inside the loop makes its backward quadratic in T
    for t in range(time):
        if reset is not None:
            h = h.masked_fill(reset[:, t, None], 0)
        x, u = _from_planar(h, shape), _from_planar(inputs[t], shape)
        z = a @ x @ b.transpose(-1, -2) + u
        h = _to_planar(apply_nonlinearity(z, nonlinearity, beta))
        states.append(h)
    out = torch.stack(states, 1) if states else torch.zeros_like(x_proj)
    return (out, h, states) if return_states else (out, h)


def _from_planar(x: Tensor, shape) -> Tensor:
    x = x.reshape(shape)  # (B, parts, H, P, Q)
    return torch.complex(x[:, 0], x[:, 1]) if shape[1] == 2 else x[:, 0]


def _to_planar(x: Tensor) -> Tensor:
    x = torch.stack((x.real, x.imag), 1) if x.is_complex() else x
    return x.flatten(1)


def kru_lstm_scan_reference(
    x_proj: Tensor,
    factors,
    h_0: Tensor | None = None,
    c_0: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
):
    """The loop that defines `kru_triton.kru_lstm_scan`; same arguments, shapes and results.

    z_k = A_k X_{t-1} B_kᵀ + x_k for the gates k = i, f, g, o;
    c_t = σ(z_f) c_{t-1} + σ(z_i) tanh(z_g);  h_t = σ(z_o) tanh(c_t).
    """
    a, b = group_factors(factors)
    p, q = a.shape[-1], b.shape[-1]
    a, b = (w.view(4, -1, *w.shape[2:]) for w in (a, b))
    batch = x_proj.shape[0]
    h = x_proj.new_zeros(batch, x_proj.shape[2] // 4) if h_0 is None else h_0
    c = torch.zeros_like(h) if c_0 is None else c_0
    states = []
    for t, u in enumerate(x_proj.unbind(1)):
        last = before, c_before = h, c
        if reset is not None:
            before, c_before = (v.masked_fill(reset[:, t, None], 0) for v in last)
        x = before.view(batch, 1, -1, p, q)
        z = a @ x @ b.transpose(-1, -2) + u.reshape(batch, 4, -1, p, q)
        i, f, g, o = z.flatten(2).unbind(1)
        c = f.sigmoid() * c_before + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        out = h
        if lengths is not None:
            alive = (t < lengths)[:, None]
            h, c = torch.where(alive, h, last[0]), torch.where(alive, c, last[1])
            out = h.masked_fill(~alive, 0)
        states.append(out)
    out = torch.stack(states, 1) if states else x_proj.new_zeros(batch, 0, h.shape[1])
    return out, (h, c)
