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
from .launch import (
    aligned_rows,
    architecture,
    device_guard,
    group_flags,
    last_rows,
    on_nvidia,
    packed,
    row_words,
)
from .options import lstm_options
from .tile import (
    add,
    choose,
    first_product,
    inside,
    kron,
    load,
    load_factor,
    no_value,
    offsets,
    operand,
    second_product,
    select,
    select_operand,
    store,
    tanh,
    tile_bits,
    to_tile,
    words_of,
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
    return to_tile(load(p_tile, offset, mask, 0, 1, V), PE, QE, V, False)


@triton.jit
def load_rows(p_u, offset, mask, F: tl.constexpr, V: tl.constexpr):
    """Tiles of the four gates' inputs as they lie in memory."""
    return (
        load(p_u, offset, mask, 0, 1, V),
        load(p_u + F, offset, mask, 0, 1, V),
        load(p_u + 2 * F, offset, mask, 0, 1, V),
        load(p_u + 3 * F, offset, mask, 0, 1, V),
    )


@triton.jit
def to_tiles(rows, PE: tl.constexpr, QE: tl.constexpr, V: tl.constexpr, NVIDIA: tl.constexpr):
    return (
        to_tile(rows[0], PE, QE, V, NVIDIA),
        to_tile(rows[1], PE, QE, V, NVIDIA),
        to_tile(rows[2], PE, QE, V, NVIDIA),
        to_tile(rows[3], PE, QE, V, NVIDIA),
    )


@triton.jit
def first_products(
    b, x, PE: tl.constexpr, QE: tl.constexpr, SPLIT: tl.constexpr, NVIDIA: tl.constexpr
):
    """Z of one state for the four gates."""
    return (
        first_product(b[0], x, PE, QE, 1, SPLIT, NVIDIA),
        first_product(b[1], x, PE, QE, 1, SPLIT, NVIDIA),
        first_product(b[2], x, PE, QE, 1, SPLIT, NVIDIA),
        first_product(b[3], x, PE, QE, 1, SPLIT, NVIDIA),
    )


@triton.jit
def second_products(a, z, acc, PE: tl.constexpr, QE: tl.constexpr):
    """acc + Σ_k A_k Z_kᵀ."""
    acc = second_product(a[0], z[0], acc, PE, QE)
    acc = second_product(a[1], z[1], acc, PE, QE)
    acc = second_product(a[2], z[2], acc, PE, QE)
    return second_product(a[3], z[3], acc, PE, QE)


@triton.jit
def gates(
    a,
    b,
    x,
    u,
    PE: tl.constexpr,
    QE: tl.constexpr,
    SPLIT: tl.constexpr,
    NVIDIA: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """i, f, g, o of one step from the state, with AHEAD from Z of it, and the input."""
    if AHEAD:
        i = second_product(a[0], x[0], u[0], PE, QE)
        f = second_product(a[1], x[1], u[1], PE, QE)
        g = second_product(a[2], x[2], u[2], PE, QE)
        o = second_product(a[3], x[3], u[3], PE, QE)
    else:  # one after the other: fewer registers
        i = kron(a[0], b[0], x, u[0], PE, QE, 1, SPLIT, NVIDIA)
        f = kron(a[1], b[1], x, u[1], PE, QE, 1, SPLIT, NVIDIA)
        g = kron(a[2], b[2], x, u[2], PE, QE, 1, SPLIT, NVIDIA)
        o = kron(a[3], b[3], x, u[3], PE, QE, 1, SPLIT, NVIDIA)
    return (
        sigmoid(i[0], not SPLIT, NVIDIA),
        sigmoid(f[0], not SPLIT, NVIDIA),
        tanh(g[0], not SPLIT, NVIDIA),
        sigmoid(o[0], not SPLIT, NVIDIA),
    )


@triton.jit
def gates_in_turn(
    a,
    b,
    x,
    p_u,
    offset,
    mask,
    F: tl.constexpr,
    PE: tl.constexpr,
    QE: tl.constexpr,
    V: tl.constexpr,
    VW: tl.constexpr,
    SPLIT: tl.constexpr,
    NVIDIA: tl.constexpr,
):
    """`gates` of a state, each row read where it is used: the fewest registers."""
    u = to_tile(load(p_u, offset, mask, 0, 1, VW), PE, QE, V, NVIDIA)
    i = sigmoid(kron(a[0], b[0], x, u, PE, QE, 1, SPLIT, NVIDIA)[0], not SPLIT, NVIDIA)
    u = to_tile(load(p_u + F, offset, mask, 0, 1, VW), PE, QE, V, NVIDIA)
    f = sigmoid(kron(a[1], b[1], x, u, PE, QE, 1, SPLIT, NVIDIA)[0], not SPLIT, NVIDIA)
    u = to_tile(load(p_u + 2 * F, offset, mask, 0, 1, VW), PE, QE, V, NVIDIA)
    g = tanh(kron(a[2], b[2], x, u, PE, QE, 1, SPLIT, NVIDIA)[0], not SPLIT, NVIDIA)
    u = to_tile(load(p_u + 3 * F, offset, mask, 0, 1, VW), PE, QE, V, NVIDIA)
    o = sigmoid(kron(a[3], b[3], x, u, PE, QE, 1, SPLIT, NVIDIA)[0], not SPLIT, NVIDIA)
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
    SPLIT_FACTORS: tl.constexpr,
    NVIDIA: tl.constexpr,
    ANCHORED: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """c_t = σ(z_f) c_{t-1} + σ(z_i) tanh(z_g),  h_t = σ(z_o) tanh(c_t)."""
    PE: tl.constexpr = S1 * PP
    QE: tl.constexpr = S2 * QP
    N: tl.constexpr = P * Q
    F: tl.constexpr = H * N
    WORD: tl.constexpr = (
        2 if NVIDIA and (p_x.dtype.element_ty == tl.bfloat16) and (Q % 2 == 0) else 1
    )
    VW: tl.constexpr = V // WORD
    i_g = tl.program_id(0)
    i_h = tl.program_id(1)
    groups = tl.num_programs(0)
    x_stride_t *= ALIGNED // WORD
    x_stride_b *= ALIGNED // WORD
    i_b = i_g.to(tl.int64) * (S1 * S2)
    a = load_gates(p_a, i_h, H, P, PP, S1, V, False, SPLIT_FACTORS, ANCHORED)
    b = load_gates(p_b, i_h, H, Q, QP, S2, V, True, SPLIT_FACTORS, ANCHORED)
    last = B - 1 - i_b
    mask = None
    x_mask = None
    if (P != PP) or (Q != QP):
        mask = inside(P, Q, PP, QP, S1, S2, V)
        x_mask = inside(P, Q // WORD, PP, QP // WORD, S1, S2, VW)
    o_x = offsets(last, x_stride_b, P, Q // WORD, PP, QP // WORD, S1, S2, VW)
    o_h = offsets(last, F, P, Q, PP, QP, S1, S2, V)
    start = i_b * F + i_h * N
    c = zeros(PE, QE, 1)
    if p_c_0 is not None:
        c = read(p_c_0 + start, o_h, mask, PE, QE, V)
    if p_h_0 is not None:
        x = operand(read(p_h_0 + start, o_h, mask, PE, QE, V), SPLIT, NVIDIA)
    else:
        x = operand(zeros(PE, QE, 1), SPLIT, False)
    if p_keep is not None:
        p_keep += i_g
        bits = tile_bits(tl.load(p_keep), PE, QE, PP, QP, S1)
        x = select_operand(x, bits, NVIDIA)
        c = select(c, bits)
    steps = T
    if p_steps is not None:
        steps = tl.load(p_steps + i_g)
    p_u = words_of(p_x + i_h * N, WORD) + i_b * x_stride_b
    p_out = p_h + start
    p_cell = p_c + start
    h_stride_t = B.to(tl.int64) * F
    if p_alive is not None:
        p_alive += i_g
    if AHEAD:
        u = to_tiles(load_rows(p_u, o_x, x_mask, F // WORD, VW), PE, QE, V, NVIDIA)
        p_u += tl.where(steps > 1, x_stride_t, 0)
        x = first_products(b, x, PE, QE, SPLIT, NVIDIA)
    for t in tl.range(0, steps):
        if p_keep is not None:  # of the step that this state goes into
            p_keep += tl.where(t + 1 < steps, groups, 0)
            keep = tl.load(p_keep)
        if p_alive is not None:
            alive = tl.load(p_alive)
            p_alive += groups
        rows = load_rows(p_u, o_x, x_mask, F // WORD, VW)
        p_u += tl.where(t + 1 + AHEAD < steps, x_stride_t, 0)
        if not AHEAD:
            u = to_tiles(rows, PE, QE, V, NVIDIA)
        i, f, g, o = gates(a, b, x, u, PE, QE, SPLIT, NVIDIA, AHEAD)
        c = (tl.fma(f, c[0], i * g),)
        h = (o * tanh(c[0], not SPLIT, NVIDIA),)
        if p_alive is not None:
            bits = tile_bits(alive, PE, QE, PP, QP, S1)
            c = select(c, bits)
            h = select(h, bits)
        store(p_out, o_h, mask, h, 0, PE, QE, V, V)
        store(p_cell, o_h, mask, c, 0, PE, QE, V, V)
        p_out += h_stride_t
        p_cell += h_stride_t
        x = operand(h, SPLIT, NVIDIA)
        if p_keep is not None:
            bits = tile_bits(keep, PE, QE, PP, QP, S1)
            x = select_operand(x, bits, NVIDIA)
            c = select(c, bits)
        if AHEAD:
            x = first_products(b, x, PE, QE, SPLIT, NVIDIA)
            u = to_tiles(rows, PE, QE, V, NVIDIA)  # used here, the loads do not sink to the stores


@triton.jit(do_not_specialize=["B", "T", "d_stride_t", "d_stride_b", "x_stride_t", "x_stride_b"])
def lstm_backward_kernel(
    p_dh,  # (T, B, H·N), any strides of T and B, or None
    p_dh_n,  # (B, H·N) of the last states, with AHEAD dh of their step in it, or None
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
    SPLIT_FACTORS: tl.constexpr,
    NVIDIA: tl.constexpr,
    ANCHORED: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """dz_k of every gate from last step to first; dh_{t-1} = dh + Σ_k A_kᵀ dz_k B_k, dc = dc f."""
    PE: tl.constexpr = S1 * PP
    QE: tl.constexpr = S2 * QP
    N: tl.constexpr = P * Q
    F: tl.constexpr = H * N
    WORD: tl.constexpr = (
        2 if NVIDIA and (p_x.dtype.element_ty == tl.bfloat16) and (Q % 2 == 0) else 1
    )
    QW: tl.constexpr = Q // WORD
    VW: tl.constexpr = V // WORD
    FW: tl.constexpr = F // WORD
    # all rows at the begin of a turn, where registers suffice
    EARLY: tl.constexpr = NVIDIA and not SPLIT
    i_g = tl.program_id(0)
    i_h = tl.program_id(1)
    groups = tl.num_programs(0)
    x_stride_t *= ALIGNED // WORD
    x_stride_b *= ALIGNED // WORD
    d_stride_t *= ALIGNED // WORD
    d_stride_b *= ALIGNED // WORD
    i_b = i_g.to(tl.int64) * (S1 * S2)
    steps = T
    if p_steps is not None:
        steps = tl.load(p_steps + i_g)
    last_t = tl.maximum(steps - 1, 0).to(tl.int64)
    before_t = tl.maximum(steps - 2, 0).to(tl.int64)
    a_adjoint = load_gates(p_a_adjoint, i_h, H, P, PP, S1, V, False, SPLIT_FACTORS, ANCHORED)
    b_adjoint = load_gates(p_b_adjoint, i_h, H, Q, QP, S2, V, True, SPLIT_FACTORS, ANCHORED)
    a = load_gates(p_a, i_h, H, P, PP, S1, V, False, SPLIT_FACTORS, ANCHORED)
    b = load_gates(p_b, i_h, H, Q, QP, S2, V, True, SPLIT_FACTORS, ANCHORED)
    last = B - 1 - i_b
    mask = None
    word_mask = None
    if (P != PP) or (Q != QP):
        mask = inside(P, Q, PP, QP, S1, S2, V)
        word_mask = inside(P, QW, PP, QP // WORD, S1, S2, VW)
    o_x = offsets(last, x_stride_b, P, QW, PP, QP // WORD, S1, S2, VW)
    o_d = offsets(last, d_stride_b, P, QW, PP, QP // WORD, S1, S2, VW)
    o_s = offsets(last, FW, P, QW, PP, QP // WORD, S1, S2, VW)
    o_h = offsets(last, F, P, Q, PP, QP, S1, S2, V)
    o_dx = offsets(last, 4 * F, P, Q, PP, QP, S1, S2, V)
    start = i_b * F + i_h * N
    h_stride_t = B.to(tl.int64) * F
    p_state = words_of(p_h + start, WORD) + before_t * B * FW
    p_cell = p_c + (start + before_t * h_stride_t)
    p_u = words_of(p_x + i_h * N, WORD) + (i_b * x_stride_b + last_t * x_stride_t)
    p_out = p_dx + (i_b * (4 * F) + i_h * N + last_t * (4 * h_stride_t))
    if p_keep is not None:
        p_word = p_keep + i_g + last_t * groups
    if p_ends is not None:
        p_end = p_ends + i_g + last_t * groups
        live = tl.zeros((PE, QE), tl.int1)
    dc = zeros(PE, QE, 1)
    if (p_dc_n is not None) and (p_ends is None):
        dc = read(p_dc_n + start, o_h, mask, PE, QE, V)
    if p_dh is not None:
        p_d = words_of(p_dh + i_h * N, WORD) + (i_b * d_stride_b + last_t * d_stride_t)
    p_own = p_c + (start + last_t * h_stride_t)
    dh = zeros(PE, QE, 1)
    if AHEAD:  # rows of the step to come; those of h and c are of the step before it
        if p_dh_n is not None:
            d = load(words_of(p_dh_n + start, WORD), o_s, word_mask, 0, 1, VW)
        elif p_dh is not None:
            d = load(p_d, o_d, word_mask, 0, 1, VW)
        rows = load_rows(p_u, o_x, word_mask, FW, VW)
        state = load(p_state, o_s, word_mask, 0, 1, VW)
        cell = read(p_cell, o_h, mask, PE, QE, V)
        c = read(p_own, o_h, mask, PE, QE, V)
        z = operand(zeros(QE, PE, 1), SPLIT, False)
        z = (z, z, z, z)
    elif (p_dh_n is not None) and (p_ends is None):
        dh = read(p_dh_n + start, o_h, mask, PE, QE, V)
    for n in tl.range(0, steps):
        further = n + 1 < steps
        if not AHEAD:
            if EARLY:
                rows = load_rows(p_u, o_x, word_mask, FW, VW)
            state = load(p_state, o_s, word_mask, 0, 1, VW)
            cell = read(p_cell, o_h, mask, PE, QE, V)
            c = read(p_own, o_h, mask, PE, QE, V)
            p_own = p_cell
            if (p_dh is not None) and EARLY:
                d = load(p_d, o_d, word_mask, 0, 1, VW)
        h = to_tile(state, PE, QE, V, NVIDIA)
        c_before = cell
        h_0 = zeros(PE, QE, 1)
        if p_h_0 is not None:
            h_0 = read(p_h_0 + start, o_h, mask, PE, QE, V)
        c_0 = zeros(PE, QE, 1)
        if p_c_0 is not None:
            c_0 = read(p_c_0 + start, o_h, mask, PE, QE, V)
        h = choose(further, h, h_0)
        c_before = choose(further, c_before, c_0)
        x = operand(h, SPLIT, NVIDIA)
        if p_keep is not None:
            keep = tile_bits(tl.load(p_word), PE, QE, PP, QP, S1)
            p_word -= groups
            x = select_operand(x, keep, NVIDIA)
            c_before = select(c_before, keep)
        if AHEAD or EARLY:
            u = to_tiles(rows, PE, QE, V, NVIDIA)
            if AHEAD:
                x = first_products(b, x, PE, QE, SPLIT, NVIDIA)
            i, f, g, o = gates(a, b, x, u, PE, QE, SPLIT, NVIDIA, AHEAD)
        else:
            i, f, g, o = gates_in_turn(
                a, b, x, p_u, o_x, word_mask, FW, PE, QE, V, VW, SPLIT, NVIDIA
            )
            if p_dh is not None:
                d = load(p_d, o_d, word_mask, 0, 1, VW)
        if p_ends is not None:
            end = tile_bits(tl.load(p_end), PE, QE, PP, QP, S1)
            p_end -= groups
            live = live | end
            i, f = select((i, f), live)
            g, o = select((g, o), live)
        g_t = zeros(PE, QE, 1)
        if (p_dh is not None) or (AHEAD and (p_dh_n is not None)):
            g_t = to_tile(d, PE, QE, V, NVIDIA)
        if p_ends is not None:
            g_t = select(g_t, live)
            if p_dh_n is not None:
                g_t = add(g_t, select(read(p_dh_n + start, o_h, mask, PE, QE, V), end))
            if p_dc_n is not None:
                dc = add(dc, select(read(p_dc_n + start, o_h, mask, PE, QE, V), end))
        dh = second_products(a_adjoint, z, g_t, PE, QE) if AHEAD else add(dh, g_t)
        # the next rows, before the stores
        step = tl.where(n + 2 < steps, -B, 0).to(tl.int64)
        p_state += step * FW
        p_cell += step * F
        p_u += tl.where(further, -x_stride_t, 0)
        if p_dh is not None:
            p_d += tl.where(further, -d_stride_t, 0)
        if AHEAD:
            rows = load_rows(p_u, o_x, word_mask, FW, VW)
            state = load(p_state, o_s, word_mask, 0, 1, VW)
            if p_dh is not None:
                d = load(p_d, o_d, word_mask, 0, 1, VW)
            elif p_dh_n is not None:
                d = no_value(d)
        tc = tanh(c[0], not SPLIT, NVIDIA)
        if AHEAD:
            c = cell
            cell = read(p_cell, o_h, mask, PE, QE, V)
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
        d_i = operand(d_i, SPLIT, NVIDIA)
        d_f = operand(d_f, SPLIT, NVIDIA)
        d_g = operand(d_g, SPLIT, NVIDIA)
        d_o = operand(d_o, SPLIT, NVIDIA)
        if p_keep is not None:
            d_i = select_operand(d_i, keep, NVIDIA)
            d_f = select_operand(d_f, keep, NVIDIA)
            d_g = select_operand(d_g, keep, NVIDIA)
            d_o = select_operand(d_o, keep, NVIDIA)
            dc = select(dc, keep)
        if AHEAD:
            z = (
                first_product(b_adjoint[0], d_i, PE, QE, 1, SPLIT, NVIDIA),
                first_product(b_adjoint[1], d_f, PE, QE, 1, SPLIT, NVIDIA),
                first_product(b_adjoint[2], d_g, PE, QE, 1, SPLIT, NVIDIA),
                first_product(b_adjoint[3], d_o, PE, QE, 1, SPLIT, NVIDIA),
            )
        else:
            dh = zeros(PE, QE, 1)
            dh = kron(a_adjoint[0], b_adjoint[0], d_i, dh, PE, QE, 1, SPLIT, NVIDIA)
            dh = kron(a_adjoint[1], b_adjoint[1], d_f, dh, PE, QE, 1, SPLIT, NVIDIA)
            dh = kron(a_adjoint[2], b_adjoint[2], d_g, dh, PE, QE, 1, SPLIT, NVIDIA)
            dh = kron(a_adjoint[3], b_adjoint[3], d_o, dh, PE, QE, 1, SPLIT, NVIDIA)
    if AHEAD:
        dh = second_products(a_adjoint, z, zeros(PE, QE, 1), PE, QE)
    store(p_dh_0 + start, o_h, mask, dh, 0, PE, QE, V, V)
    store(p_dc_0 + start, o_h, mask, dc, 0, PE, QE, V, V)


def forward(scan: LSTMScan, how: How) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `torch_backend.lstm.forward`, of arguments that `why_not` lets pass."""
    h, c = lstm_forward(scan, how)
    firsts, lengths = ((h, scan.h_0), (c, scan.c_0)), scan.lengths
    h_n, c_n = (last_state(s, torch.float32, first, lengths) for s, first in firsts)
    return h, c, h_n, c_n


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
        tile, heads, how.precision, backward=False, nvidia=on_nvidia(), arch=architecture()
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
        return dx, a.new_zeros(B, F), a.new_zeros(B, F)
    dh_0, dc_0 = (a.new_empty(B, F) for _ in range(2))
    x = aligned_rows(x, tile)
    dh = aligned_rows(dh.to(h.dtype), tile) if dh is not None else None
    keep, alive, steps = group_flags(scan, T, tile.rows)
    ends = None
    if alive is not None:
        ends = row_words(torch.arange(T, device=h.device)[:, None] == lengths - 1, tile.rows)
    tuning = {} if ends is None else {"AHEAD": 0}  # where rows end apart, registers are short
    constants, options = lstm_options(
        tile,
        heads,
        how.precision,
        backward=True,
        nvidia=on_nvidia(),
        arch=architecture(),
        **tuning,
    )
    if dh_n is not None and constants["AHEAD"]:
        dh_n = dh_n.to(h.dtype)
        if dh is not None:
            dh_n = dh_n + last_rows(dh, lengths)
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
