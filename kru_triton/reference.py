"""The recurrences as they are defined: plain loops over time under autograd.

    z_t = (W_0 ⊗ … ⊗ W_{F-1}) h_{t-1} + x_proj_t        h_t = σ(z_t)

Source: Jose, Cissé and Fleuret, "Kronecker Recurrent Units", ICML 2018. Everything fast is tested
against this file, which is slow and stores every intermediate of every step. It is also what runs
where nothing but plain operations can: under torch.func's transforms, in forward-mode
differentiation and while torch.onnx exports.

A complex number is two real ones, its parts, and a matrix that multiplies it [[Re, −Im], [Im, Re]].

B batch, T time steps, H heads, c parts, P and Q sizes of the two grouped factors, N = P·Q units per
head, F = c·H·N features.
"""

import torch
import torch.nn.functional as nnf
from torch import Tensor

from kru_triton.kronecker import group_factors
from kru_triton.nonlinearity import check_nonlinearity
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


def scan_forward(
    x_proj: Tensor,  # (B, T, F), or with tokens the table (V, F)
    a: Tensor,  # (c, H, P, P)
    b: Tensor,  # (c, H, Q, Q)
    beta: Tensor | None,  # (H·N,)
    h_0: Tensor | None,  # (B, F)
    reset: Tensor | None,  # (B, T) bool
    nonlinearity: str,
    lengths: Tensor | None = None,  # (B,) int64, from 0 to T
    tokens: Tensor | None = None,  # (B, T) int64
    states: list[Tensor] | None = None,  # a list that the T states (B, F) are added to
) -> tuple[Tensor, Tensor]:
    """As `torch_backend.scan_forward`: h `(T, B, F)` in the dtype of x_proj, h_n in that of a."""
    x = (x_proj if tokens is None else nnf.embedding(tokens, x_proj)).to(a.dtype)
    batch, (parts, heads, p), q = x.shape[0], a.shape[:3], b.shape[-1]
    left, right = left_block(a), right_block(b)
    beta = None if beta is None else beta.view(heads, p, 1, q)
    x, cut = _cut(x, reset, lengths)
    h = x.new_zeros(batch, x.shape[2]) if h_0 is None else h_0
    states = [] if states is None else states
    for t, u in enumerate(x.unbind(1)):  # slicing would make the backward quadratic in T
        if cut is not None:
            h = h.masked_fill(cut[:, t, None], 0)
        h, u = (v.reshape(batch, parts, heads, p, q).movedim(1, -2) for v in (h, u))
        z = h.flatten(-2) @ right  # X Bᵀ on rows (p) and columns (part, q)
        z = left @ z.view(batch, heads, p * parts, q)  # on rows (p, part) and columns (q)
        h = apply_nonlinearity(z.view(u.shape) + u, nonlinearity, beta).movedim(-2, 1).flatten(1)
        states.append(h)
    out = torch.stack(states) if states else h.new_zeros(0, *h.shape)
    return out.to(x_proj.dtype), last_state(out, a.dtype, h_0, lengths)


def lstm_forward(
    x_proj: Tensor,  # (B, T, 4·F)
    a: Tensor,  # (4, H, P, P)
    b: Tensor,  # (4, H, Q, Q)
    h_0: Tensor | None,  # (B, F)
    c_0: Tensor | None,  # (B, F)
    reset: Tensor | None,  # (B, T) bool
    lengths: Tensor | None,  # (B,) int64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `lstm_torch_backend.lstm_forward`: h `(T, B, F)` in the dtype of x_proj; c alike, h_n and
    c_n `(B, F)` in that of a."""
    batch, heads, p, q = x_proj.shape[0], *a.shape[1:3], b.shape[-1]
    x, cut = _cut(x_proj.to(a.dtype), reset, lengths)
    h, c = (x.new_zeros(batch, x.shape[2] // 4) if s is None else s for s in (h_0, c_0))
    states, cells = [], []
    for t, u in enumerate(x.unbind(1)):
        if cut is not None:
            h, c = (s.masked_fill(cut[:, t, None], 0) for s in (h, c))
        z = a @ h.reshape(batch, 1, heads, p, q) @ b.transpose(-1, -2)
        i, f, g, o = (z + u.reshape(z.shape)).flatten(2).unbind(1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        states.append(h)
        cells.append(c)
    h, c = (torch.stack(s) if s else h.new_zeros(0, *h.shape) for s in (states, cells))
    h_n, c_n = (last_state(s, a.dtype, *start, lengths) for s, *start in ((h, h_0), (c, c_0)))
    return h.to(x_proj.dtype), c, h_n, c_n


def _cut(x: Tensor, reset: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`x (B, T, F)`, and `(B, T)` where the state is cut. Beyond a row's length both are zero, and
    with them every step."""
    if lengths is None:
        return x, reset
    beyond = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
    return x.masked_fill(beyond[..., None], 0), beyond if reset is None else beyond | reset


def last_state(h: Tensor, dtype: torch.dtype, h_0: Tensor | None, lengths: Tensor | None) -> Tensor:
    """The last of each row's states `h (T, B, F)` in a dtype; h_0 for a row without a step."""
    time, batch, features = h.shape
    start = h.new_zeros(batch, features, dtype=dtype) if h_0 is None else h_0
    if time == 0:
        return start.clone()
    if lengths is None:
        return h[-1].to(dtype, copy=True)
    ends = h[(lengths - 1).clamp_min(0), torch.arange(batch, device=h.device)].to(dtype)
    return torch.where(lengths[:, None] > 0, ends, start)


def kru_scan_reference(
    x_proj: Tensor,
    factors,
    beta: Tensor | None = None,
    h_0: Tensor | None = None,
    *,
    nonlinearity: str = "modrelu",
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
    return_states: bool = False,
):
    """The loop that defines `kru_triton.kru_scan`; same arguments, shapes and results.

    With `return_states` the T planar states `(B, parts·H·N)` that the recurrence really used come
    third, each a part of the autograd graph.
    """
    check_nonlinearity(nonlinearity)
    a, b = group_factors(factors)
    if nonlinearity == "modrelu" and beta is None:
        beta = a.new_zeros(a.shape[1] * a.shape[2] * b.shape[2])
    states = []
    h, h_n = scan_forward(x_proj, a, b, beta, h_0, reset, nonlinearity, lengths, states=states)
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
    h, _, h_n, c_n = lstm_forward(x_proj, a, b, h_0, c_0, reset, lengths)
    return h.transpose(0, 1), (h_n, c_n)
