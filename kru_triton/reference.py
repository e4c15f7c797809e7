"""The recurrences as they are defined: plain loops over time under autograd.

    z_t = (W_0 ⊗ … ⊗ W_{F-1}) (gate_t ⊙ h_{t-1}) + x_proj_t        h_t = σ(z_t)

Source: Jose, Cissé and Fleuret, "Kronecker Recurrent Units", ICML 2018, where there is no gate.
Everything fast is tested against this file, which is slow and stores every intermediate of every
step. It is also what runs where nothing but plain operations can: under torch.func's transforms, in
forward-mode differentiation and while torch.onnx exports.

A complex number is two real ones, its parts, and a matrix that multiplies it [[Re, −Im], [Im, Re]].

B batch, T time steps, H heads, c parts, P and Q sizes of the two grouped factors, N = P·Q units per
head, F = c·H·N features.
"""

import torch
import torch.nn.functional as nnf
from torch import Tensor

from kru_triton.kronecker import group_factors, planar_product
from kru_triton.nonlinearity import NONLINEARITIES
from kru_triton.ops.arguments import How, LSTMScan, Scan, check_choice
from kru_triton.torch_backend.rows import last_state, past_end
from kru_triton.torch_backend.scan import left_block, right_block


def apply_nonlinearity(
    z: Tensor, nonlinearity: str, beta: Tensor | None = None, dim: int = -2
) -> Tensor:
    """σ(z) for a real `z` with its parts along `dim`; `beta` broadcasts against it.

    Differentiable any number of times, also at z = 0, where modReLU is 0 with derivative 0 and
    modtanh has the derivative 1.
    """
    if nonlinearity == "identity":
        return z
    if nonlinearity in ("relu", "tanh"):
        return torch.relu(z) if nonlinearity == "relu" else torch.tanh(z)
    squared = z.square().sum(dim, keepdim=True)
    is_zero = squared == 0
    modulus = squared.masked_fill(is_zero, 1).sqrt()
    if nonlinearity == "modrelu":  # z + β z/|z|: without a β the derivatives are those of z
        return (z + beta * (z / modulus)).masked_fill(is_zero | (modulus + beta <= 0), 0)
    return torch.where(is_zero, z, torch.tanh(modulus) / modulus * z)


def scan_forward(scan: Scan, how: How, states: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """As `torch_backend.scan.forward`: h `(T, B, F)` in the dtype of x, h_n in that of a; to the
    list `states` the T states `(B, F)` are added."""
    a, b, beta = scan.a, scan.b, scan.beta
    x = (scan.x if scan.tokens is None else nnf.embedding(scan.tokens, scan.x)).to(a.dtype)
    batch, (parts, heads, p), q = x.shape[1], a.shape[:3], b.shape[-1]
    left, right = left_block(a), right_block(b)
    beta = None if beta is None else beta.view(heads, p, 1, q)
    x, cut = _cut(x, scan.reset, scan.lengths)
    gates = None
    if scan.gate is not None:
        gates = _cut(scan.gate.to(a.dtype), None, scan.lengths)[0].unbind(0)
    h = x.new_zeros(batch, x.shape[2]) if scan.h_0 is None else scan.h_0
    states = [] if states is None else states
    for t, u in enumerate(x.unbind(0)):  # slicing would make the backward quadratic in T
        if cut is not None:
            h = h.masked_fill(cut[t, :, None], 0)
        if gates is not None:
            h = planar_product(gates[t], h, parts)
        h, u = (v.reshape(batch, parts, heads, p, q).movedim(1, -2) for v in (h, u))
        z = h.flatten(-2) @ right  # X Bᵀ on rows (p) and columns (part, q)
        z = left @ z.view(batch, heads, p * parts, q)  # on rows (p, part) and columns (q)
        z = z.view(u.shape) + u
        h = apply_nonlinearity(z, how.nonlinearity, beta).movedim(-2, 1).flatten(1)
        states.append(h)
    out = torch.stack(states) if states else h.new_zeros(0, *h.shape)
    out = out.to(scan.x.dtype)
    return out, last_state(out, a.dtype, scan.h_0, scan.lengths)


def lstm_forward(scan: LSTMScan, how: How) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `torch_backend.lstm.forward`: h `(T, B, F)` in the dtype of x; c alike, h_n and c_n
    `(B, F)` in that of a."""
    x, a, b, h_0, c_0, reset, lengths = scan
    batch, heads, p, q = x.shape[1], *a.shape[1:3], b.shape[-1]
    x, cut = _cut(x.to(a.dtype), reset, lengths)
    h, c = (x.new_zeros(batch, x.shape[2] // 4) if s is None else s for s in (h_0, c_0))
    states, cells = [], []
    for t, u in enumerate(x.unbind(0)):
        if cut is not None:
            h, c = (s.masked_fill(cut[t, :, None], 0) for s in (h, c))
        z = a @ h.reshape(batch, 1, heads, p, q) @ b.transpose(-1, -2)
        i, f, g, o = (z + u.reshape(z.shape)).flatten(2).unbind(1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        states.append(h)
        cells.append(c)
    h, c = (torch.stack(s) if s else h.new_zeros(0, *h.shape) for s in (states, cells))
    h = h.to(scan.x.dtype)
    firsts = ((h, h_0), (c, c_0))
    h_n, c_n = (last_state(s, a.dtype, first, lengths) for s, first in firsts)
    return h, c, h_n, c_n


def _cut(x: Tensor, reset: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`x (T, B, F)`, and `(T, B)` where the state is cut. Beyond a row's length both are zero, and
    with them every step."""
    if lengths is None:
        return x, reset
    beyond = past_end(x.shape[0], lengths)
    return x.masked_fill(beyond[..., None], 0), beyond if reset is None else beyond | reset


def kru_scan_reference(
    x_proj: Tensor,
    factors,
    beta: Tensor | None = None,
    h_0: Tensor | None = None,
    *,
    nonlinearity: str = "modrelu",
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
    gate: Tensor | None = None,
    return_states: bool = False,
):
    """The loop that defines `kru_triton.kru_scan`; same arguments, shapes and results.

    With `return_states` the T planar states `(B, parts·H·N)` that the recurrence really used come
    third, each a part of the autograd graph.
    """
    check_choice("nonlinearity", nonlinearity, NONLINEARITIES)
    a, b = group_factors(factors)
    if nonlinearity == "modrelu" and beta is None:
        beta = a.new_zeros(a.shape[1] * a.shape[2] * b.shape[2])
    reset = None if reset is None else reset.t()
    gate = None if gate is None else gate.transpose(0, 1)
    scan = Scan(x_proj.transpose(0, 1), a, b, beta, h_0, reset, lengths, gate=gate)
    states: list[Tensor] = []
    h, h_n = scan_forward(scan, How(nonlinearity), states)
    h = h.transpose(0, 1)
    return (h, h_n, states) if return_states else (h, h_n)


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
    a, b = (w.view(4, w.shape[1] // 4, *w.shape[2:]) for w in group_factors(factors))
    reset = None if reset is None else reset.t()
    scan = LSTMScan(x_proj.transpose(0, 1), a, b, h_0, c_0, reset, lengths)
    h, _, h_n, c_n = lstm_forward(scan, How("tanh"))
    return h.transpose(0, 1), (h_n, c_n)
