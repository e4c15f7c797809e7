"""An LSTM whose four recurrent matrices are real Kronecker products: a sequence in one launch.

    z_k = A_k X_{t-1} B_kᵀ + x_k   for the gates k = i, f, g, o,   X = h.reshape(P, Q)
    c_t = σ(z_f) c_{t-1} + σ(z_i) tanh(z_g),   h_t = σ(z_o) tanh(c_t)

and backwards, with dh, dc the gradients of h_t and c_t,

    dc += dh σ(z_o) (1 - tanh² c_t),
    dz_i = dc g i',   dz_f = dc c_{t-1} f',   dz_g = dc i g',   dz_o = dh tanh(c_t) o',
    dh_{t-1} += Σ_k A_kᵀ dz_k B_k,     dc_{t-1} = dc f

Each program runs all steps of one group of batch rows of one head (see `tile`). Memory plan: h as
mma operand and c in float32 stay in registers, with the factors where they fit; x_t is streamed in,
h_t and c_t out. Backward the gates are computed again from h_{t-1} and x_t: only h and c are saved.

Limits: those of the scan kernels (`why_not`). The gradients of the factors come from the
weight-gradient kernel, to which the four gates of a head are four pairs of factors on one state.

    B, T    batch rows, steps                    F       H·N, features of a state
    H       heads                                4·F     features of x_proj: i, f, g, o
    P, Q    sides of the factors                 N       P·Q, units of one head
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kru_triton.ops.arguments import How, LSTMScan, Scan
from kru_triton.torch_backend.rows import handed_on, last_state

from .geometry import Tile
from .launch import aligned_rows, device_guard, group_flags, on_nvidia, packed, row_words
from .options import lstm_options
from .tile import (
    add,
    choose,
    inside,
    kron,
    load,
    load_factor,
    offsets,
    operand,
    select,
    select_operand,
    store,
    tanh,
    tile_bits,
    to_tile,
    zeros,
)
from .weight_grad import weight_grad


@triton.jit
def sigmoid(x, FAST: tl.constexpr, NVIDIA: tl.constexpr):
    return 0.5 * tanh(0.5 * x, FAST, NVIDIA) + 0.5


@triton.jit
def load_gates(
    p_factor,
    i_h,
    H: tl.constexpr,
    SIDE: tl.constexpr,
    PADDED: tl.constexpr,
    S: tl.constexpr,
    V: tl.constexpr,
    MAPPED: tl.constexpr,
    SPLIT: tl.constexpr,
    ANCHORED: tl.constexpr,
):
    """The factors (4, H, SIDE, SIDE) of the gates of one head."""
    return (
        load_factor(p_factor, i_h, H, SIDE, PADDED, S, V, MAPPED, 1, SPLIT, ANCHORED),
        load_factor(p_factor, i_h + H, H, SIDE, PADDED, S, V, MAPPED, 1, SPLIT, ANCHORED),
        load_factor(p_factor, i_h + 2 * H, H, SIDE, PADDED, S, V, MAPPED, 1, SPLIT, ANCHORED),
        load_factor(p_factor, i_h + 3 * H, H, SIDE, PADDED, S, V, MAPPED, 1, SPLIT, ANCHORED),
    )


@triton.jit
def read(p_tile, offset, mask, PE: tl.constexpr, QE: tl.constexpr, V: tl.constexpr):
    """A tile of one plane in float32."""
    return to_tile(load(p_tile, offset, mask, 0, 1, V), PE, QE, V)


@triton.jit
def gates(
    a,
    b,
    x,
    p_u,
    o_u,
    mask,
    F: tl.constexpr,
    PE: tl.constexpr,
    QE: tl.constexpr,
    V: tl.constexpr,
    SPLIT: tl.constexpr,
    NVIDIA: tl.constexpr,
):
    """i, f, g, o of one step."""
    u = read(p_u, o_u, mask, PE, QE, V)
    i = sigmoid(kron(a[0], b[0], x, u, PE, QE, 1, SPLIT)[0], not SPLIT, NVIDIA)
    u = read(p_u + F, o_u, mask, PE, QE, V)
    f = sigmoid(kron(a[1], b[1], x, u, PE, QE, 1, SPLIT)[0], not SPLIT, NVIDIA)
    u = read(p_u + 2 * F, o_u, mask, PE, QE, V)
    g = tanh(kron(a[2], b[2], x, u, PE, QE, 1, SPLIT)[0], not SPLIT, NVIDIA)
    u = read(p_u + 3 * F, o_u, mask, PE, QE, V)
    o = sigmoid(kron(a[3], b[3], x, u, PE, QE, 1, SPLIT)[0], not SPLIT, NVIDIA)
    return i, f, g, o


@triton.jit(do_not_specialize=["B", "T", "x_stride_t", "x_stride_b"])
def lstm_forward_kernel(
    p_x,  # (B, T, 4·H·N), any strides of B and T
    p_h,  # (T, B, H·N)
    p_c,  # (T, B, H·N) float32
    p_a,  # (4, H, P, P)
    p_b,  # (4, H, Q, Q)
    p_h_0,  # (B, H·N) or None
    p_c_0,  # (B, H·N) or None
    p_keep,  # (T, groups) words of row bits or None
    p_alive,  # (T, groups) words of row bits or None
    p_steps,  # (groups,) or None
    B,
    T,
    x_stride_t,
    x_stride_b,
    H: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    PP: tl.constexpr,
    QP: tl.constexpr,
    S1: tl.constexpr,
    S2: tl.constexpr,
    V: tl.constexpr,
    ALIGNED: tl.constexpr,
    SPLIT: tl.constexpr,
    NVIDIA: tl.constexpr,
    ANCHORED: tl.constexpr,
):
    """c_t = σ(z_f) c_{t-1} + σ(z_i) tanh(z_g),  h_t = σ(z_o) tanh(c_t)."""
    PE: tl.constexpr = S1 * PP
    QE: tl.constexpr = S2 * QP
    N: tl.constexpr = P * Q
    F: tl.constexpr = H * N
    i_g = tl.program_id(0)
    i_h = tl.program_id(1)
    groups = tl.num_programs(0)
    x_stride_t *= ALIGNED
    x_stride_b *= ALIGNED
    i_b = i_g.to(tl.int64) * (S1 * S2)
    a = load_gates(p_a, i_h, H, P, PP, S1, V, False, SPLIT, ANCHORED)
    b = load_gates(p_b, i_h, H, Q, QP, S2, V, True, SPLIT, ANCHORED)
    last = B - 1 - i_b
    mask = None
    if (P != PP) or (Q != QP):
        mask = inside(P, Q, PP, QP, S1, S2, V)
    o_x = offsets(last, x_stride_b, P, Q, PP, QP, S1, S2, V)
    o_h = offsets(last, F, P, Q, PP, QP, S1, S2, V)
    start = i_b * F + i_h * N
    h = zeros(PE, QE, 1)
    if p_h_0 is not None:
        h = read(p_h_0 + start, o_h, mask, PE, QE, V)
    c = zeros(PE, QE, 1)
    if p_c_0 is not None:
        c = read(p_c_0 + start, o_h, mask, PE, QE, V)
    x = operand(h, SPLIT)
    if p_keep is not None:
        p_keep += i_g
        bits = tile_bits(tl.load(p_keep), PE, QE, PP, QP, S1)
        x = select_operand(x, bits, NVIDIA)
        c = select(c, bits)
    steps = T
    if p_steps is not None:
        steps = tl.load(p_steps + i_g)
    p_u = p_x + (i_b * x_stride_b + i_h * N)
    p_out = p_h + start
    p_cell = p_c + start
    h_stride_t = B.to(tl.int64) * F
    if p_alive is not None:
        p_alive += i_g
    for t in tl.range(0, steps):
        if p_keep is not None:  # of the step that this state goes into
            p_keep += tl.where(t + 1 < steps, groups, 0)
            keep = tl.load(p_keep)
        if p_alive is not None:
            alive = tl.load(p_alive)
            p_alive += groups
        i, f, g, o = gates(a, b, x, p_u, o_x, mask, F, PE, QE, V, SPLIT, NVIDIA)
        p_u += x_stride_t
        c = (f * c[0] + i * g,)
        h = (o * tanh(c[0], not SPLIT, NVIDIA),)
        if p_alive is not None:
            bits = tile_bits(alive, PE, QE, PP, QP, S1)
            c = select(c, bits)
            h = select(h, bits)
        store(p_out, o_h, mask, h, 0, PE, QE, V, V)
        store(p_cell, o_h, mask, c, 0, PE, QE, V, V)
        p_out += h_stride_t
        p_cell += h_stride_t
        x = operand(h, SPLIT)
        if p_keep is not None:
            bits = tile_bits(keep, PE, QE, PP, QP, S1)
            x = select_operand(x, bits, NVIDIA)
            c = select(c, bits)


@triton.jit(do_not_specialize=["B", "T", "d_stride_t", "d_stride_b", "x_stride_t", "x_stride_b"])
def lstm_backward_kernel(
    p_dh,  # (T, B, H·N), any strides of T and B, or None
    p_dh_n,  # (B, H·N) or None
    p_dc_n,  # (B, H·N) or None
    p_h,  # (T, B, H·N)
    p_c,  # (T, B, H·N) float32
    p_x,  # (B, T, 4·H·N), any strides of B and T
    p_dx,  # (T, B, 4·H·N)
    p_dh_0,  # (B, H·N)
    p_dc_0,  # (B, H·N)
    p_a_adjoint,  # (4, H, P, P)
    p_b_adjoint,  # (4, H, Q, Q)
    p_a,  # (4, H, P, P)
    p_b,  # (4, H, Q, Q)
    p_h_0,  # (B, H·N) or None
    p_c_0,  # (B, H·N) or None
    p_keep,  # (T, groups) words of row bits or None
    p_ends,  # (T, groups) words of row bits, set at each row's last step, or None
    p_steps,  # (groups,) or None
    B,
    T,
    d_stride_t,
    d_stride_b,
    x_stride_t,
    x_stride_b,
    H: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    PP: tl.constexpr,
    QP: tl.constexpr,
    S1: tl.constexpr,
    S2: tl.constexpr,
    V: tl.constexpr,
    ALIGNED: tl.constexpr,
    SPLIT: tl.constexpr,
    NVIDIA: tl.constexpr,
    ANCHORED: tl.constexpr,
):
    """dz_k of every gate from last step to first; dh_{t-1} = dh + Σ_k A_kᵀ dz_k B_k, dc = dc f."""
    PE: tl.constexpr = S1 * PP
    QE: tl.constexpr = S2 * QP
    N: tl.constexpr = P * Q
    F: tl.constexpr = H * N
    i_g = tl.program_id(0)
    i_h = tl.program_id(1)
    groups = tl.num_programs(0)
    x_stride_t *= ALIGNED
    x_stride_b *= ALIGNED
    d_stride_t *= ALIGNED
    d_stride_b *= ALIGNED
    i_b = i_g.to(tl.int64) * (S1 * S2)
    steps = T
    if p_steps is not None:
        steps = tl.load(p_steps + i_g)
    last_t = tl.maximum(steps - 1, 0).to(tl.int64)
    a_adjoint = load_gates(p_a_adjoint, i_h, H, P, PP, S1, V, False, SPLIT, ANCHORED)
    b_adjoint = load_gates(p_b_adjoint, i_h, H, Q, QP, S2, V, True, SPLIT, ANCHORED)
    a = load_gates(p_a, i_h, H, P, PP, S1, V, False, SPLIT, ANCHORED)
    b = load_gates(p_b, i_h, H, Q, QP, S2, V, True, SPLIT, ANCHORED)
    last = B - 1 - i_b
    mask = None
    if (P != PP) or (Q != QP):
        mask = inside(P, Q, PP, QP, S1, S2, V)
    o_x = offsets(last, x_stride_b, P, Q, PP, QP, S1, S2, V)
    o_d = offsets(last, d_stride_b, P, Q, PP, QP, S1, S2, V)
    o_h = offsets(last, F, P, Q, PP, QP, S1, S2, V)
    o_dx = offsets(last, 4 * F, P, Q, PP, QP, S1, S2, V)
    start = i_b * F + i_h * N
    h_stride_t = B.to(tl.int64) * F
    p_state = p_h + (start + last_t * h_stride_t)
    p_cell = p_c + (start + last_t * h_stride_t)
    p_u = p_x + (i_b * x_stride_b + i_h * N + last_t * x_stride_t)
    p_out = p_dx + (i_b * (4 * F) + i_h * N + last_t * (4 * h_stride_t))
    if p_dh is not None:
        p_d = p_dh + (i_b * d_stride_b + i_h * N + last_t * d_stride_t)
    if p_keep is not None:
        p_word = p_keep + i_g + last_t * groups
    if p_ends is not None:
        p_end = p_ends + i_g + last_t * groups
        live = tl.zeros((PE, QE), tl.int1)
    dh = zeros(PE, QE, 1)
    dc = zeros(PE, QE, 1)
    if p_ends is None:
        if p_dh_n is not None:
            dh = read(p_dh_n + start, o_h, mask, PE, QE, V)
        if p_dc_n is not None:
            dc = read(p_dc_n + start, o_h, mask, PE, QE, V)
    for n in tl.range(0, steps):
        first = n + 1 >= steps
        c = read(p_cell, o_h, mask, PE, QE, V)
        p_state -= tl.where(first, 0, h_stride_t)
        p_cell -= tl.where(first, 0, h_stride_t)
        # the first step reads its own row in place of one before it
        h = read(p_state, o_h, mask, PE, QE, V)
        c_before = read(p_cell, o_h, mask, PE, QE, V)
        h_0 = zeros(PE, QE, 1)
        if p_h_0 is not None:
            h_0 = read(p_h_0 + start, o_h, mask, PE, QE, V)
        c_0 = zeros(PE, QE, 1)
        if p_c_0 is not None:
            c_0 = read(p_c_0 + start, o_h, mask, PE, QE, V)
        h = choose(first, h_0, h)
        c_before = choose(first, c_0, c_before)
        x = operand(h, SPLIT)
        if p_keep is not None:
            keep = tile_bits(tl.load(p_word), PE, QE, PP, QP, S1)
            p_word -= groups
            x = select_operand(x, keep, NVIDIA)
            c_before = select(c_before, keep)
        i, f, g, o = gates(a, b, x, p_u, o_x, mask, F, PE, QE, V, SPLIT, NVIDIA)
        p_u -= x_stride_t
        if p_ends is not None:
            end = tile_bits(tl.load(p_end), PE, QE, PP, QP, S1)
            p_end -= groups
            live = live | end
            i, f = select((i, f), live)
            g, o = select((g, o), live)
        if p_dh is not None:
            d = read(p_d, o_d, mask, PE, QE, V)
            p_d -= d_stride_t
        else:
            d = zeros(PE, QE, 1)
        if p_ends is not None:
            d = select(d, live)
            if p_dh_n is not None:
                d = add(d, select(read(p_dh_n + start, o_h, mask, PE, QE, V), end))
            if p_dc_n is not None:
                dc = add(dc, select(read(p_dc_n + start, o_h, mask, PE, QE, V), end))
        dh = add(dh, d)
        tc = tanh(c[0], not SPLIT, NVIDIA)
        total = dc[0] + dh[0] * o * (1.0 - tc * tc)
        d_i = (total * g * i * (1.0 - i),)
        d_f = (total * c_before[0] * f * (1.0 - f),)
        d_g = (total * i * (1.0 - g * g),)
        d_o = (dh[0] * tc * o * (1.0 - o),)
        store(p_out, o_dx, mask, d_i, 0, PE, QE, V, V)
        store(p_out + F, o_dx, mask, d_f, 0, PE, QE, V, V)
        store(p_out + 2 * F, o_dx, mask, d_g, 0, PE, QE, V, V)
        store(p_out + 3 * F, o_dx, mask, d_o, 0, PE, QE, V, V)
        p_out -= 4 * h_stride_t
        dc = (total * f,)
        dh = zeros(PE, QE, 1)
        d_i = operand(d_i, SPLIT)
        d_f = operand(d_f, SPLIT)
        d_g = operand(d_g, SPLIT)
        d_o = operand(d_o, SPLIT)
        if p_keep is not None:
            d_i = select_operand(d_i, keep, NVIDIA)
            d_f = select_operand(d_f, keep, NVIDIA)
            d_g = select_operand(d_g, keep, NVIDIA)
            d_o = select_operand(d_o, keep, NVIDIA)
            dc = select(dc, keep)
        dh = kron(a_adjoint[0], b_adjoint[0], d_i, dh, PE, QE, 1, SPLIT)
        dh = kron(a_adjoint[1], b_adjoint[1], d_f, dh, PE, QE, 1, SPLIT)
        dh = kron(a_adjoint[2], b_adjoint[2], d_g, dh, PE, QE, 1, SPLIT)
        dh = kron(a_adjoint[3], b_adjoint[3], d_o, dh, PE, QE, 1, SPLIT)
    store(p_dh_0 + start, o_h, mask, dh, 0, PE, QE, V, V)
    store(p_dc_0 + start, o_h, mask, dc, 0, PE, QE, V, V)


def forward(scan: LSTMScan, how: How) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `torch_backend.lstm.forward`, of arguments that `why_not` lets pass."""
    h, c = lstm_forward(scan, how)
    firsts, lengths = ((h, scan.h_0), (c, scan.c_0)), scan.lengths
    return h, c, *(last_state(s, torch.float32, first, lengths) for s, first in firsts)


def backward(
    dh: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    h: Tensor,
    c: Tensor,
    scan: LSTMScan,
    how: How,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `torch_backend.lstm.backward`."""
    dx, *firsts = lstm_backward(dh, dh_n, dc_n, h, c, scan, how)
    lasts = zip(firsts, (dh_n, dc_n))
    dh_0, dc_0 = (handed_on(d, last, scan.lengths, h.shape[0]) for d, last in lasts)
    return dx, *lstm_weight_grad(dx, h, scan, how), dh_0, dc_0


def lstm_forward(scan: LSTMScan, how: How) -> tuple[Tensor, Tensor]:
    """States and cells of all steps; beyond a row's length both are zero.

    Args:
        scan: x float32 or bfloat16, all others float32.
        how: precision is "fp32" or "bf16", of the products.

    Returns:
        h: (T, B, H·N) contiguous, in the dtype of x.
        c: (T, B, H·N) contiguous, float32.
    """
    T, B, F = scan.x.shape
    x, a, b = scan.x, scan.a, scan.b
    _, heads, P, _ = a.shape
    tile = Tile.of(P, b.shape[-1], x.element_size())
    allocate = x.new_zeros if scan.lengths is not None else x.new_empty
    shape = (T, B, F // 4)
    h, c = allocate(shape), allocate(shape, dtype=torch.float32)
    if h.numel() == 0:
        return h, c
    constants, options = lstm_options(
        tile, heads, how.precision, backward=False, nvidia=on_nvidia()
    )
    x = aligned_rows(x, tile)
    keep, alive, steps = group_flags(scan, T, tile.rows)
    with device_guard(x):
        lstm_forward_kernel[(triton.cdiv(B, tile.rows), heads)](
            p_x=x,
            p_h=h,
            p_c=c,
            p_a=a.contiguous(),
            p_b=b.contiguous(),
            p_h_0=packed(scan.h_0),
            p_c_0=packed(scan.c_0),
            p_keep=keep,
            p_alive=alive,
            p_steps=steps,
            B=B,
            T=T,
            x_stride_t=x.stride(0) // tile.aligned,
            x_stride_b=x.stride(1) // tile.aligned,
            **constants,
            **options,
        )
    return h, c


def lstm_backward(
    dh: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    h: Tensor,
    c: Tensor,
    scan: LSTMScan,
    how: How,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of `lstm_forward` in x, h_0 and c_0.

    Args:
        dh: (T, B, H·N) gradient of all states, any strides of T and B, or None.
        dh_n, dc_n: (B, H·N) gradients of each row's last state and cell, or None.
        h, c: what lstm_forward returned.
        scan, how: as for lstm_forward.

    Returns:
        dx: (T, B, 4·H·N) contiguous, in the dtype of x; zero beyond a row's length.
        dh_0, dc_0: (B, H·N) float32; for a row without a step see `backward`.
    """
    T, B, F = h.shape
    x, a, b, lengths = scan.x, scan.a, scan.b, scan.lengths
    _, heads, P, _ = a.shape
    tile = Tile.of(P, b.shape[-1], h.element_size())
    allocate = h.new_zeros if lengths is not None else h.new_empty
    dx = allocate((T, B, 4 * F))
    if h.numel() == 0:
        return dx, *(a.new_zeros(B, F) for _ in range(2))
    dh_0, dc_0 = (a.new_empty(B, F) for _ in range(2))
    constants, options = lstm_options(tile, heads, how.precision, backward=True, nvidia=on_nvidia())
    x = aligned_rows(x, tile)
    dh = aligned_rows(dh.to(h.dtype), tile) if dh is not None else None
    keep, alive, steps = group_flags(scan, T, tile.rows)
    ends = None
    if alive is not None:
        ends = row_words(torch.arange(T, device=h.device)[:, None] == lengths - 1, tile.rows)
    with device_guard(h):
        lstm_backward_kernel[(triton.cdiv(B, tile.rows), heads)](
            p_dh=dh,
            p_dh_n=packed(dh_n),
            p_dc_n=packed(dc_n),
            p_h=h,
            p_c=c,
            p_x=x,
            p_dx=dx,
            p_dh_0=dh_0,
            p_dc_0=dc_0,
            p_a_adjoint=a.transpose(-1, -2).contiguous(),
            p_b_adjoint=b.transpose(-1, -2).contiguous(),
            p_a=a.contiguous(),
            p_b=b.contiguous(),
            p_h_0=packed(scan.h_0),
            p_c_0=packed(scan.c_0),
            p_keep=keep,
            p_ends=ends,
            p_steps=steps,
            B=B,
            T=T,
            d_stride_t=dh.stride(0) // tile.aligned if dh is not None else 0,
            d_stride_b=dh.stride(1) // tile.aligned if dh is not None else 0,
            x_stride_t=x.stride(0) // tile.aligned,
            x_stride_b=x.stride(1) // tile.aligned,
            **constants,
            **options,
        )
    return dx, dh_0, dc_0


def lstm_weight_grad(dx: Tensor, h: Tensor, scan: LSTMScan, how: How) -> tuple[Tensor, Tensor]:
    """Gradients (da, db) of the factors of all gates, shaped like a and b.

    Args:
        dx: (T, B, 4·H·N), as `lstm_backward` returned it.
        h: (T, B, H·N), as `lstm_forward` returned it.
        scan, how: as for `lstm_forward`.
    """
    a, b = (w.flatten(0, 1)[None] for w in (scan.a, scan.b))
    pairs = Scan(dx, a, b, h_0=scan.h_0, reset=scan.reset)
    da, db, _ = weight_grad(dx, h, pairs, how._replace(nonlinearity="identity"))
    return da.view_as(scan.a), db.view_as(scan.b)
