"""The Kronecker recurrence over a whole sequence in one launch, and its adjoint.

    z_t = A X_{t-1} Bᵀ + x_t,   X_t = σ(z_t),   X = h.reshape(P, Q)    (Kronecker Recurrent Units,
                                                    Jose, Cissé and Fleuret, ICML 2018)

and backwards, with g_t = ∂L/∂Re h_t + i ∂L/∂Im h_t and G_t the same for z_t,

    G_t = σ'(z_t)ᵀ g_t,   g_{t-1} = dh_{t-1} + Aᴴ G_t conj(B),   dx_t = G_t.

With a gate, X_{t-1} is gate_t ⊙ h_{t-1}; backwards, with Y_t = Aᴴ G_t conj(B),

    g_{t-1} = dh_{t-1} + conj(gate_t) ⊙ Y_t,   dgate_t = Y_t ⊙ conj(h_{t-1}).

Each program runs all steps of one group of batch rows of one head (see `tile`). Memory plan:

    in registers for the whole sequence   the state (backward: its gradient), as mma fragments; the
                                          factors too, up to 512 complex units; beyond, they are in
                                          shared memory and, in float32, β comes from L1. From
                                          2048 units on several warps share a program and exchange
                                          operands through shared memory
    streamed                              x_t in and h_t out; backward h_t, dh_t in and G_t out, the
                                          row of some steps ahead on its way to L2; and the gate in,
                                          backward its gradient out
    from step to step                     with AHEAD not X but Z = (X Bᵀ)ᵀ, packed, and the next
                                          rows as they were read: a turn of the loop is the second
                                          product, activation, store and first product
    recomputed backward                   |z_t| = |h_t| - β for modReLU; for modtanh, whose h says
                                          nothing of z where it saturates, z_t from h_{t-1} and x_t

Limits: 8 to 4096 units a head, factors of up to 64 x 64, zero-padded to powers of two, or powers of
two up to 128; float32 or bfloat16 in memory (`why_not`). Larger powers of two, and factors
that the device's memories cannot hold, go to the kernels of `wide` (`why_not.is_wide`). Rows and
planes are read 16 bytes at a time where P and Q allow: an input whose rows are not aligned to that
is copied first. Offsets are 64 bit. Results are bitwise repeatable: nothing is accumulated across
programs. A reset forgets even NaN; without one, a row that is not finite spoils the rows that share
its tile, at most 31 and none from 256 units on.

    B, T    batch rows, steps                    PARTS   2 complex (all real parts, then all
    H       heads                                        imaginary ones), 1 real
    P, Q    sides of the two factors             F       PARTS·H·N, features of one row
    N       P·Q, units of one head               groups  ⌈B / rows of a program⌉
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kru_triton.kronecker import planar_conj, planar_product
from kru_triton.ops.arguments import How, Scan, steps_and_rows
from kru_triton.torch_backend.rows import handed_on, last_state, past_end

from .activation import activate, derivative, vjp
from .geometry import Tile, Wide
from .launch import (
    adjoint,
    aligned_rows,
    architecture,
    device_guard,
    floor_of,
    group_flags,
    input_arguments,
    last_rows,
    on_nvidia,
    packed,
)
from .options import GIVEN, compile_options
from .tile import (
    add,
    choose,
    coordinates,
    first_product,
    inside,
    kron,
    load,
    load_factor,
    multiply,
    multiply_conj,
    no_value,
    offsets,
    operand,
    plane_to_tile,
    pointers,
    real_of_multiply_conj,
    second_product,
    select,
    select_operand,
    store,
    tile_bits,
    to_tile,
    words_of,
    zeros,
)
from .weight_grad import joined, matrices, planes, weight_grad
from .why_not import is_wide
from .wide import wide_backward, wide_forward


@triton.jit
def load_beta(
    p_beta,
    P: tl.constexpr,
    Q: tl.constexpr,
    PP: tl.constexpr,
    QP: tl.constexpr,
    S1: tl.constexpr,
    S2: tl.constexpr,
    V: tl.constexpr,
):
    offset = offsets(0, 0, P, Q, PP, QP, S1, S2, V)
    mask = None
    if (P != PP) or (Q != QP):
        mask = inside(P, Q, PP, QP, S1, S2, V)
    beta = load(p_beta, offset, mask, 0, 1, V)
    return plane_to_tile(beta[0], S1 * PP, S2 * QP, V, False)


@triton.jit
def prefetch(p_row):
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [p_row.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def lines(p_row, N: tl.constexpr, IM: tl.constexpr, PARTS: tl.constexpr):
    """Pointers to the cache lines (128 bytes) of a state."""
    LINE: tl.constexpr = 1024 // p_row.dtype.element_ty.primitive_bitwidth
    LINES: tl.constexpr = N // LINE
    line = tl.arange(0, PARTS * LINES)
    return p_row + (line // LINES * IM + line % LINES * LINE)


@triton.jit
def token_pointers(
    p_tokens,
    i_b,
    last_row,
    PP: tl.constexpr,
    QP: tl.constexpr,
    S1: tl.constexpr,
    S2: tl.constexpr,
    V: tl.constexpr,
):
    """Pointers to a step's tokens: one, or one for every element of a tile of several rows."""
    if S1 * S2 > 1:
        i_row, _, _ = coordinates(PP, QP, S1, S2, V)
        return pointers(p_tokens, i_b + tl.minimum(i_row, last_row), 1)
    else:
        return p_tokens + i_b


@triton.jit
def read_row(
    p_u,
    p_token,
    token,
    more,
    stride_t,
    stride_b,
    B,
    offset,
    mask,
    IM: tl.constexpr,
    PARTS: tl.constexpr,
    V: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Planes of a step's tile of the input, and p_u, p_token, token of the step after it.

    Without more steps they stay: pointers are clamped, not predicated.
    """
    if TOKENS:
        row = load(p_u + token.to(tl.int64) * stride_b, offset, mask, IM, PARTS, V)
        p_token += tl.where(more, B, 0)
        token = tl.load(p_token)
    else:
        row = load(p_u, offset, mask, IM, PARTS, V)
        p_u += tl.where(more, stride_t, 0)
    return row, p_u, p_token, token


@triton.jit(do_not_specialize=["B", "T", "x_stride_t", "x_stride_b"])
def scan_forward_kernel(
    p_x,  # (B, T, PARTS·H·N), any strides of B and T; with tokens (rows, PARTS·H·N)
    p_tokens,  # (T, B) int32 or None
    p_h,  # (T, B, PARTS·H·N)
    p_a,  # (PARTS, H, P, P)
    p_b,  # (PARTS, H, Q, Q)
    p_beta,  # (H·N,) or None
    p_h_0,  # (B, PARTS·H·N) or None
    p_keep,  # (T, groups) words of row bits or None
    p_alive,  # (T, groups) words of row bits or None
    p_steps,  # (groups,) or None
    p_gate,  # (T, B, GATE_PARTS·H·N) or None
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
    PARTS: tl.constexpr,
    GATE_PARTS: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLIT_FACTORS: tl.constexpr,
    ACT: tl.constexpr,
    NVIDIA: tl.constexpr,
    ANCHORED: tl.constexpr,
    AHEAD: tl.constexpr,
    PREFETCH: tl.constexpr,
    BETA_IN_LOOP: tl.constexpr,
):
    """h_t = σ(A h_{t-1} Bᵀ + x_t) for all t, one group of rows of one head."""
    PE: tl.constexpr = S1 * PP
    QE: tl.constexpr = S2 * QP
    ROWS: tl.constexpr = S1 * S2
    N: tl.constexpr = P * Q
    F: tl.constexpr = PARTS * H * N
    IM: tl.constexpr = H * N
    # a product of h_0 before the loop would have unanchored constants moved into registers
    ROWS_AHEAD: tl.constexpr = AHEAD if (p_h_0 is None) or ANCHORED else 0
    TOKENS: tl.constexpr = p_tokens is not None
    # a step of a small tile is shorter than the way to L2
    GATE_AHEAD: tl.constexpr = (p_gate is not None) and (PE * QE * PARTS <= 512)
    # what is streamed in is read as words of two bfloat16, and stays so until its step: bfloat16
    # values that live across steps are taken apart by LLVM
    WORD: tl.constexpr = (
        2 if NVIDIA and (p_x.dtype.element_ty == tl.bfloat16) and (Q % 2 == 0) else 1
    )
    QW: tl.constexpr = Q // WORD
    VW: tl.constexpr = V // WORD
    IW: tl.constexpr = IM // WORD
    i_g = tl.program_id(0)
    i_h = tl.program_id(1)
    groups = tl.num_programs(0)
    x_stride_t *= ALIGNED // WORD
    x_stride_b *= ALIGNED // WORD
    i_b = i_g.to(tl.int64) * ROWS
    a = load_factor(p_a, i_h, H, P, PP, S1, V, False, PARTS, SPLIT_FACTORS, ANCHORED)
    b = load_factor(p_b, i_h, H, Q, QP, S2, V, True, PARTS, SPLIT_FACTORS, ANCHORED)
    last = B - 1 - i_b
    mask = None
    x_mask = None
    if (P != PP) or (Q != QP):
        mask = inside(P, Q, PP, QP, S1, S2, V)
        x_mask = inside(P, QW, PP, QP // WORD, S1, S2, VW)
    o_h = offsets(last, F, P, Q, PP, QP, S1, S2, V)
    beta = None
    if ACT == "modrelu":
        p_beta += i_h * N
        if not BETA_IN_LOOP:
            beta = load_beta(p_beta, P, Q, PP, QP, S1, S2, V)
    steps = T
    if p_steps is not None:
        steps = tl.load(p_steps + i_g)
    p_u = words_of(p_x + i_h * N, WORD)
    p_token = p_u
    token = 0
    if TOKENS:
        o_x = offsets(last, 0, P, QW, PP, QP // WORD, S1, S2, VW)
        p_token = token_pointers(p_tokens, i_b, last, PP, QP // WORD, S1, S2, VW)
        token = tl.load(p_token)
    else:
        o_x = offsets(last, x_stride_b, P, QW, PP, QP // WORD, S1, S2, VW)
        p_u += i_b * x_stride_b
    p_out = p_h + (i_b * F + i_h * N)
    h_stride_t = B.to(tl.int64) * F
    if PREFETCH:
        p_line = p_u + tl.minimum(PREFETCH, steps - 1).to(tl.int64) * x_stride_t
    if p_keep is not None:
        p_keep += i_g
    if p_alive is not None:
        p_alive += i_g
    if p_gate is not None:
        G: tl.constexpr = GATE_PARTS * H * N
        o_g = offsets(last, G // WORD, P, QW, PP, QP // WORD, S1, S2, VW)
        p_turn = words_of(p_gate + (i_b * G + i_h * N), WORD)
        g_stride_t = B.to(tl.int64) * (G // WORD)
        if PREFETCH:
            p_turn_line = p_turn + tl.minimum(PREFETCH, steps - 1).to(tl.int64) * g_stride_t
    # what goes from step to step: with ROWS_AHEAD Z of the first product, else X
    if p_h_0 is not None:
        h_0 = load(p_h_0 + i_b * F + i_h * N, o_h, mask, IM, PARTS, V)
        h_0 = to_tile(h_0, PE, QE, V, False)
        if p_gate is not None:
            first = to_tile(load(p_turn, o_g, x_mask, IW, GATE_PARTS, VW), PE, QE, V, NVIDIA)
            h_0 = multiply(first, h_0, NVIDIA)
        x = operand(h_0, SPLIT, NVIDIA)
        if p_keep is not None:
            x = select_operand(x, tile_bits(tl.load(p_keep), PE, QE, PP, QP, S1), NVIDIA)
    else:
        x = operand(zeros(PE, QE, PARTS), SPLIT, False)
    if ROWS_AHEAD:
        # a product before the loop has constants moved out of it, which shortens the step of
        # anchored 32 x 32 tiles
        if (p_h_0 is not None) or (ANCHORED and (PE * QE > 512)):
            x = first_product(b, x, PE, QE, PARTS, SPLIT, NVIDIA)
        else:
            x = operand(zeros(QE, PE, PARTS), SPLIT, False)
    if ROWS_AHEAD:
        more = steps > 1
        row, p_u, p_token, token = read_row(
            p_u, p_token, token, more, x_stride_t, x_stride_b, B, o_x, x_mask, IW, PARTS, VW, TOKENS
        )
    if ROWS_AHEAD == 2:
        u = to_tile(row, PE, QE, V, NVIDIA)
        more = steps > 2
        row, p_u, p_token, token = read_row(
            p_u, p_token, token, more, x_stride_t, x_stride_b, B, o_x, x_mask, IW, PARTS, VW, TOKENS
        )
    if GATE_AHEAD:
        p_turn += tl.where(steps > 1, g_stride_t, 0)
        turn = load(p_turn, o_g, x_mask, IW, GATE_PARTS, VW)
    for t in tl.range(0, steps):
        if p_keep is not None:  # of the step that this state goes into
            p_keep += tl.where(t + 1 < steps, groups, 0)
            keep = tl.load(p_keep)
        if p_alive is not None:
            alive = tl.load(p_alive)
            p_alive += groups
        if GATE_AHEAD:
            gate = to_tile(turn, PE, QE, V, NVIDIA)
            p_turn += tl.where(t + 2 < steps, g_stride_t, 0)
            turn = load(p_turn, o_g, x_mask, IW, GATE_PARTS, VW)
        elif p_gate is not None:  # likewise
            p_turn += tl.where(t + 1 < steps, g_stride_t, 0)
            turn = load(p_turn, o_g, x_mask, IW, GATE_PARTS, VW)
        if not ROWS_AHEAD:
            more = t + 1 < steps
            row, p_u, p_token, token = read_row(
                p_u,
                p_token,
                token,
                more,
                x_stride_t,
                x_stride_b,
                B,
                o_x,
                x_mask,
                IW,
                PARTS,
                VW,
                TOKENS,
            )
            x = first_product(b, x, PE, QE, PARTS, SPLIT, NVIDIA)
        if ROWS_AHEAD != 2:
            u = to_tile(row, PE, QE, V, NVIDIA)
        z = second_product(a, x, u, PE, QE)
        if ROWS_AHEAD == 2:
            u = to_tile(row, PE, QE, V, NVIDIA)
        # into the registers just read, and before the stores: ptxas moves no load above one
        if ROWS_AHEAD:
            more = t + 1 + ROWS_AHEAD < steps
            row, p_u, p_token, token = read_row(
                p_u,
                p_token,
                token,
                more,
                x_stride_t,
                x_stride_b,
                B,
                o_x,
                x_mask,
                IW,
                PARTS,
                VW,
                TOKENS,
            )
        if ACT == "modrelu" and BETA_IN_LOOP:
            h = activate(z, load_beta(p_beta, P, Q, PP, QP, S1, S2, V), ACT, not SPLIT, NVIDIA)
        else:
            h = activate(z, beta, ACT, not SPLIT, NVIDIA)
        if p_alive is not None:
            h = select(h, tile_bits(alive, PE, QE, PP, QP, S1))
        store(p_out, o_h, mask, h, IM, PE, QE, V, V)
        p_out += h_stride_t
        if p_gate is not None:
            if not GATE_AHEAD:
                gate = to_tile(turn, PE, QE, V, NVIDIA)
            h = multiply(gate, h, NVIDIA)
        x = operand(h, SPLIT, NVIDIA)
        if PREFETCH:
            prefetch(lines(p_line, N // WORD, IW, PARTS))
            p_line += tl.where(t + 1 + PREFETCH < steps, x_stride_t, 0)
            if p_gate is not None:
                prefetch(lines(p_turn_line, N // WORD, IW, GATE_PARTS))
                p_turn_line += tl.where(t + 1 + PREFETCH < steps, g_stride_t, 0)
        if p_keep is not None:
            x = select_operand(x, tile_bits(keep, PE, QE, PP, QP, S1), NVIDIA)
        if ROWS_AHEAD:
            x = first_product(b, x, PE, QE, PARTS, SPLIT, NVIDIA)


@triton.jit(do_not_specialize=["B", "T", "d_stride_t", "d_stride_b", "x_stride_t", "x_stride_b"])
def scan_backward_kernel(
    p_dh,  # (T, B, PARTS·H·N), any strides of T and B, or None
    p_dh_n,  # (B, PARTS·H·N) of the last states, dh of their step in it, or None
    p_h,  # (T, B, PARTS·H·N)
    p_x,  # (B, T, PARTS·H·N), any strides of B and T; with tokens (rows, PARTS·H·N); or None
    p_tokens,  # (T, B) int32 or None
    p_dx,  # (T, B, PARTS·H·N)
    p_dh_0,  # (B, PARTS·H·N) or None
    p_a_adjoint,  # (PARTS, H, P, P)
    p_b_adjoint,  # (PARTS, H, Q, Q)
    p_a,  # (PARTS, H, P, P) or None
    p_b,  # (PARTS, H, Q, Q) or None
    p_beta,  # (H·N,) or None
    p_h_0,  # (B, PARTS·H·N) or None
    p_keep,  # (T, groups) words of row bits or None
    p_alive,  # (T, groups) words of row bits or None
    p_steps,  # (groups,) or None
    p_gate,  # (T, B, GATE_PARTS·H·N) or None
    p_d_gate,  # (T + 1, B, GATE_PARTS·H·N) or None; of the first step nothing is written
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
    PARTS: tl.constexpr,
    GATE_PARTS: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLIT_FACTORS: tl.constexpr,
    ACT: tl.constexpr,
    FLOOR: tl.constexpr,
    NVIDIA: tl.constexpr,
    ANCHORED: tl.constexpr,
    AHEAD: tl.constexpr,
    PREFETCH: tl.constexpr,
    BETA_IN_LOOP: tl.constexpr,
):
    """G_t = σ'(z_t)ᵀ g_t,  g_{t-1} = dh_{t-1} + Aᴴ G_t conj(B),  from last step to first."""
    PE: tl.constexpr = S1 * PP
    QE: tl.constexpr = S2 * QP
    ROWS: tl.constexpr = S1 * S2
    N: tl.constexpr = P * Q
    F: tl.constexpr = PARTS * H * N
    IM: tl.constexpr = H * N
    FROM_Z: tl.constexpr = ACT == "modtanh"
    TOKENS: tl.constexpr = p_tokens is not None
    WORD: tl.constexpr = (
        2 if NVIDIA and (p_h.dtype.element_ty == tl.bfloat16) and (Q % 2 == 0) else 1
    )
    QW: tl.constexpr = Q // WORD
    VW: tl.constexpr = V // WORD
    IW: tl.constexpr = IM // WORD
    i_g = tl.program_id(0)
    i_h = tl.program_id(1)
    groups = tl.num_programs(0)
    i_b = i_g.to(tl.int64) * ROWS
    steps = T
    if p_steps is not None:
        steps = tl.load(p_steps + i_g)
    last_t = tl.maximum(steps - 1, 0).to(tl.int64)
    a_adjoint = load_factor(
        p_a_adjoint, i_h, H, P, PP, S1, V, False, PARTS, SPLIT_FACTORS, ANCHORED
    )
    b_adjoint = load_factor(p_b_adjoint, i_h, H, Q, QP, S2, V, True, PARTS, SPLIT_FACTORS, ANCHORED)
    last = B - 1 - i_b
    mask = None
    w_mask = None
    if (P != PP) or (Q != QP):
        mask = inside(P, Q, PP, QP, S1, S2, V)
        w_mask = inside(P, QW, PP, QP // WORD, S1, S2, VW)
    o_h = offsets(last, F, P, Q, PP, QP, S1, S2, V)
    o_s = offsets(last, F // WORD, P, QW, PP, QP // WORD, S1, S2, VW)
    start = i_b * F + i_h * N
    h_stride_t = B.to(tl.int64) * F
    s_stride_t = B.to(tl.int64) * (F // WORD)
    p_out = p_dx + (start + last_t * h_stride_t)
    p_state = words_of(p_h + start, WORD) + last_t * s_stride_t
    if FROM_Z:
        p_state -= tl.where(steps > 1, s_stride_t, 0)
    beta = None
    if ACT == "modrelu":
        p_beta += i_h * N
        if not BETA_IN_LOOP:
            beta = load_beta(p_beta, P, Q, PP, QP, S1, S2, V)
    if p_keep is not None:
        p_word = p_keep + i_g + last_t * groups
    if p_alive is not None:
        p_live = p_alive + i_g + last_t * groups
    if p_dh is not None:
        d_stride_t *= ALIGNED // WORD
        d_stride_b *= ALIGNED // WORD
        o_d = offsets(last, d_stride_b, P, QW, PP, QP // WORD, S1, S2, VW)
        p_d = words_of(p_dh + i_h * N, WORD) + (i_b * d_stride_b + last_t * d_stride_t)
    if p_dh_n is not None:
        p_d_last = words_of(p_dh_n + start, WORD)
        d = load(p_d_last, o_s, w_mask, IW, PARTS, VW)
    else:
        d = load(p_d, o_d, w_mask, IW, PARTS, VW)
    if FROM_Z:
        a = load_factor(p_a, i_h, H, P, PP, S1, V, False, PARTS, SPLIT_FACTORS, ANCHORED)
        b = load_factor(p_b, i_h, H, Q, QP, S2, V, True, PARTS, SPLIT_FACTORS, ANCHORED)
        x_stride_t *= ALIGNED // WORD
        x_stride_b *= ALIGNED // WORD
        p_u = words_of(p_x + i_h * N, WORD)
        p_token = p_u
        token = 0
        if TOKENS:
            o_x = offsets(last, 0, P, QW, PP, QP // WORD, S1, S2, VW)
            p_token = token_pointers(p_tokens, i_b, last, PP, QP // WORD, S1, S2, VW) + last_t * B
            token = tl.load(p_token)
        else:
            o_x = offsets(last, x_stride_b, P, QW, PP, QP // WORD, S1, S2, VW)
            p_u += i_b * x_stride_b + last_t * x_stride_t
    if p_gate is not None:
        G: tl.constexpr = GATE_PARTS * H * N
        o_g = offsets(last, G // WORD, P, QW, PP, QP // WORD, S1, S2, VW)
        o_d_g = offsets(last, G, P, Q, PP, QP, S1, S2, V)
        g_start = i_b * G + i_h * N
        g_stride_t = B.to(tl.int64) * G
        p_turn = words_of(p_gate + g_start, WORD) + last_t * (g_stride_t // WORD)
        p_d_turn = p_d_gate + (g_start + (last_t + 1) * g_stride_t)
        turn = no_value(load(p_turn, o_g, w_mask, IW, GATE_PARTS, VW))  # behind the last step
    if PREFETCH:
        ahead = tl.minimum(last_t, PREFETCH)
        p_line = words_of(p_h + start, WORD) + (last_t - ahead) * s_stride_t
        if p_dh is not None:
            p_d_line = p_d - ahead * d_stride_t
        if p_gate is not None:
            p_turn_line = p_turn - ahead * (g_stride_t // WORD)
    if AHEAD:
        h = load(p_state, o_s, w_mask, IW, PARTS, VW)
        if FROM_Z:
            more = steps > 1
            u, p_u, p_token, token = read_row(
                p_u,
                p_token,
                token,
                more,
                -x_stride_t,
                x_stride_b,
                -B,
                o_x,
                w_mask,
                IW,
                PARTS,
                VW,
                TOKENS,
            )
        x = operand(zeros(QE, PE, PARTS), SPLIT, False)
    else:
        x = operand(zeros(PE, QE, PARTS), SPLIT, False)
    for i in tl.range(0, steps):
        further = i + 1 < steps
        if p_keep is not None:
            keep = tl.load(p_word)
            p_word -= tl.where(further, groups, 0)
        if p_alive is not None:
            alive = tl.load(p_live)
            p_live -= groups
        if not AHEAD:
            x = first_product(b_adjoint, x, PE, QE, PARTS, SPLIT, NVIDIA)
            h = load(p_state, o_s, w_mask, IW, PARTS, VW)
            if FROM_Z:
                more = further
                u, p_u, p_token, token = read_row(
                    p_u,
                    p_token,
                    token,
                    more,
                    -x_stride_t,
                    x_stride_b,
                    -B,
                    o_x,
                    w_mask,
                    IW,
                    PARTS,
                    VW,
                    TOKENS,
                )
        if p_gate is not None:
            v = to_tile(h, PE, QE, V, NVIDIA)
            y = second_product(a_adjoint, x, zeros(PE, QE, PARTS), PE, QE)
            if GATE_PARTS < PARTS:
                d_turn = real_of_multiply_conj(v, y)
            else:
                d_turn = multiply_conj(v, y, NVIDIA)
            y = multiply_conj(to_tile(turn, PE, QE, V, NVIDIA), y, NVIDIA)
            g = add(y, to_tile(d, PE, QE, V, NVIDIA))
            turn = load(p_turn, o_g, w_mask, IW, GATE_PARTS, VW)
            p_turn -= g_stride_t // WORD
        else:
            g = second_product(a_adjoint, x, to_tile(d, PE, QE, V, NVIDIA), PE, QE)
            v = to_tile(h, PE, QE, V, NVIDIA)
        if FROM_Z:
            if p_h_0 is not None:
                h_0 = to_tile(load(p_h_0 + start, o_h, mask, IM, PARTS, V), PE, QE, V, False)
                v = choose(further, v, h_0)
            else:
                v = select(v, further)
            before = operand(v, SPLIT, NVIDIA)
            if p_keep is not None:
                before = select_operand(before, tile_bits(keep, PE, QE, PP, QP, S1), NVIDIA)
            z = to_tile(u, PE, QE, V, NVIDIA)
            z = kron(a, b, before, z, PE, QE, PARTS, SPLIT, NVIDIA)
            p_state += tl.where(i + 2 < steps, -B, 0).to(tl.int64) * (F // WORD)
            if AHEAD:
                more = i + 2 < steps
                u, p_u, p_token, token = read_row(
                    p_u,
                    p_token,
                    token,
                    more,
                    -x_stride_t,
                    x_stride_b,
                    -B,
                    o_x,
                    w_mask,
                    IW,
                    PARTS,
                    VW,
                    TOKENS,
                )
        else:
            z = v
        if ACT == "modrelu" and BETA_IN_LOOP:
            beta_t = load_beta(p_beta, P, Q, PP, QP, S1, S2, V)
            w = derivative(v, z, beta_t, ACT, FLOOR, not SPLIT, NVIDIA)
        else:
            w = derivative(v, z, beta, ACT, FLOOR, not SPLIT, NVIDIA)
        # the next rows, into the registers just read and before the stores: ptxas moves no load up
        if not FROM_Z:
            p_state += tl.where(further, -B, 0).to(tl.int64) * (F // WORD)
        if AHEAD:
            h = load(p_state, o_s, w_mask, IW, PARTS, VW)
        if p_dh is not None:
            p_d += tl.where(further, -d_stride_t, 0)
        if (p_dh is not None) and AHEAD:
            d = load(p_d, o_d, w_mask, IW, PARTS, VW)
        g = vjp(g, w, ACT)
        if p_alive is not None:
            g = select(g, tile_bits(alive, PE, QE, PP, QP, S1))
        if p_gate is not None:
            store(p_d_turn, o_d_g, mask, d_turn, IM, PE, QE, V, V)
            p_d_turn -= g_stride_t
        store(p_out, o_h, mask, g, IM, PE, QE, V, V)
        p_out -= h_stride_t
        x = operand(g, SPLIT, NVIDIA)
        if PREFETCH:
            beyond = i + 1 + PREFETCH < steps
            prefetch(lines(p_line, N // WORD, IW, PARTS))
            p_line += tl.where(beyond, -B, 0).to(tl.int64) * (F // WORD)
            if p_dh is not None:
                prefetch(lines(p_d_line, N // WORD, IW, PARTS))
                p_d_line += tl.where(beyond, -d_stride_t, 0)
            if p_gate is not None:
                prefetch(lines(p_turn_line, N // WORD, IW, GATE_PARTS))
                p_turn_line += tl.where(beyond, -(g_stride_t // WORD), 0)
        if p_keep is not None:
            x = select_operand(x, tile_bits(keep, PE, QE, PP, QP, S1), NVIDIA)
        if p_dh is None:
            d = no_value(d)
        elif not AHEAD:  # behind the product that is to come
            d = load(p_d, o_d, w_mask, IW, PARTS, VW)
        if AHEAD:
            x = first_product(b_adjoint, x, PE, QE, PARTS, SPLIT, NVIDIA)
    if p_dh_0 is not None:
        if not AHEAD:
            x = first_product(b_adjoint, x, PE, QE, PARTS, SPLIT, NVIDIA)
        g = second_product(a_adjoint, x, zeros(PE, QE, PARTS), PE, QE)
        store(p_dh_0 + start, o_h, mask, g, IM, PE, QE, V, V)


def forward(scan: Scan, how: How) -> tuple[Tensor, Tensor]:
    """As `torch_backend.scan.forward`, of arguments that `why_not` lets pass."""
    h = scan_forward(with_gate(scan, scan.x.dtype), how)
    return h, last_state(h, scan.a.dtype, scan.h_0, scan.lengths)


def backward(
    dh: Tensor | None, dh_n: Tensor | None, h: Tensor, scan: Scan, how: How
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """As `torch_backend.scan.backward`."""
    scan = with_gate(scan, h.dtype)
    dx, dh_0, d_gate = scan_backward(dh, dh_n, h, scan, how)
    if scan.gate is None:
        da, db, d_beta = weight_grad(dx, h, scan, how)
    else:  # a single step of T·B rows
        before = planar_product(scan.gate, states_before(h, scan), scan.a.shape[0])
        step = Scan(dx, scan.a, scan.b, h_0=before.flatten(0, 1))
        da, db, d_beta = weight_grad(dx.flatten(0, 1)[None], h.flatten(0, 1)[None], step, how)
    d_beta = scan.a.new_zeros(h.shape[2] // scan.a.shape[0]) if d_beta is None else d_beta
    dh_0 = scan.a.new_zeros(h.shape[1:]) if dh_0 is None else dh_0
    return dx, da, db, d_beta, handed_on(dh_0, dh_n, scan.lengths, h.shape[0]), d_gate


def scan_forward(scan: Scan, how: How, **tuning) -> Tensor:
    """States of the recurrence for all steps.

    Args:
        scan: x float32 or bfloat16, a, b, beta and h_0 float32, the gate as `with_gate` has it;
            lengths at least 1.
        how: precision is "fp32" (products of bfloat16 pairs, three per product) or "bf16".
        tuning: choices in place of the default ones, by their names in `options.TUNABLE`.

    Returns:
        h: (T, B, parts·H·N) contiguous, in the dtype of x; zero beyond a row's length.
    """
    x, a, b, tokens = scan.x, scan.a, scan.b, scan.tokens
    T, B = steps_and_rows(scan)
    F = x.shape[-1]
    parts, heads, P, _ = a.shape
    tile = Tile.of(P, b.shape[-1], x.element_size())
    allocate = x.new_zeros if scan.lengths is not None else x.new_empty
    h = allocate((T, B, F))
    if h.numel() == 0:
        return h
    if is_wide(a, b, x, how.nonlinearity, how.precision):
        wide_forward(h, scan, how, **tuning)
        return h
    constants, options = compile_options(
        tile,
        heads,
        parts,
        how.precision,
        how.nonlinearity,
        nvidia=on_nvidia(),
        given=[name for name in GIVEN if getattr(scan, name) is not None],
        gate_parts=gate_parts(scan),
        arch=architecture(),
        **tuning,
    )
    keep, alive, steps = group_flags(scan, T, tile.rows)
    with device_guard(x):
        scan_forward_kernel[(triton.cdiv(B, tile.rows), heads)](
            p_h=h,
            p_a=packed(a),
            p_b=packed(b),
            p_beta=packed(scan.beta) if how.nonlinearity == "modrelu" else None,
            p_h_0=packed(scan.h_0),
            p_keep=keep,
            p_alive=alive,
            p_steps=steps,
            p_gate=scan.gate,
            B=B,
            T=T,
            **input_arguments(x, tokens, tile),
            **constants,
            **options,
        )
    return h


def with_gate(scan: Scan, dtype: torch.dtype) -> Scan:
    """The gate as the kernels read it: contiguous, in the dtype of the states, zero beyond a row's
    length, where anything may be and would reach the rows that share its tile."""
    if scan.gate is None:
        return scan
    gate = scan.gate.to(dtype)
    if scan.lengths is not None:
        gate = gate.masked_fill(past_end(len(gate), scan.lengths)[..., None], 0)
    return scan._replace(gate=packed(gate))


def gate_parts(scan: Scan) -> int | None:
    """Parts of the gate: those of a state, or 1 where it is real; None: there is no gate."""
    if scan.gate is None:
        return None
    return scan.gate.shape[2] // (scan.a.shape[1] * scan.a.shape[2] * scan.b.shape[2])


def states_before(h: Tensor, scan: Scan) -> Tensor:
    """keep_t · h_{t-1} for all steps, (T, B, parts·H·N) in h's dtype."""
    first = torch.zeros_like(h[:1]) if scan.h_0 is None else scan.h_0[None].to(h.dtype)
    before = torch.cat((first, h[:-1]))
    return before if scan.reset is None else before.masked_fill_(scan.reset[..., None], 0)


def pre_activations(h: Tensor, scan: Scan, how: How) -> Tensor:
    """z_t of all steps from their states, in float32: a single step of T·B rows."""
    x = scan.x if scan.tokens is None else scan.x[scan.tokens.long()]
    if scan.lengths is not None:  # what is behind a row's end may be anything
        x = x.masked_fill(past_end(len(h), scan.lengths)[..., None], 0)
    before = states_before(h, scan).flatten(0, 1)
    step = Scan(x.float().flatten(0, 1)[None], scan.a, scan.b, h_0=before)
    return scan_forward(step, how._replace(nonlinearity="identity")).view(h.shape)


def gradient_before(g: Tensor, scan: Scan) -> Tensor:
    """keep_0 · Aᴴ G_0 conj(B), (B, parts·H·N), from G_0 of the first step; with a gate Y_0."""
    parts, heads, P, _ = scan.a.shape
    a, b = joined(scan.a), joined(scan.b)
    g = a.mH @ matrices(g[None], parts, heads, P, b.shape[-1])[0] @ b.conj()
    g = planes(g).movedim(0, 1).flatten(1)
    return g if scan.reset is None else g.masked_fill(scan.reset[0][:, None], 0)


def scan_backward(
    dh: Tensor | None, dh_n: Tensor | None, h: Tensor, scan: Scan, how: How, **tuning
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradient of `scan_forward` in x, h_0 and gate.

    Args:
        dh: (T, B, parts·H·N) gradient of all states, any strides of T and B, or None.
        dh_n: (B, parts·H·N) gradient of each row's last state, or None.
        h: (T, B, parts·H·N), what scan_forward returned.
        scan: as for scan_forward; x and tokens are read for modtanh alone, else they may be None.
        how, tuning: as for scan_forward.

    Returns:
        dx: (T, B, parts·H·N) contiguous, in h's dtype; zero beyond a row's length.
        dh_0: (B, parts·H·N) float32, or None where h_0 is None.
        d_gate: as the gate, in h's dtype, or None where gate is None.
    """
    T, B, F = h.shape
    a, b, h_0, lengths = scan.a, scan.b, scan.h_0, scan.lengths
    parts, heads, P, _ = a.shape
    tile = Tile.of(P, b.shape[-1], h.element_size())
    allocate = h.new_zeros if lengths is not None else h.new_empty
    dx = allocate((T, B, F))
    dh_0 = h_0.new_zeros(h_0.shape) if h_0 is not None else None
    gate = scan.gate
    d_gate = None if gate is None else allocate((T + 1, *gate.shape[1:]))
    if h.numel() == 0:
        return dx, dh_0, None if d_gate is None else d_gate[1:]
    if dh is None and dh_n is None:
        return dx.zero_(), dh_0, None if d_gate is None else d_gate[1:].zero_()
    streamed = is_wide(a, b, h, how.nonlinearity, how.precision)
    rows = Wide.of(P, b.shape[-1]).rows if streamed else tile.rows
    keep, alive, steps = group_flags(scan, T, rows)
    if alive is not None and dh_n is not None:
        # rows of one program end at different steps: their last gradients go in through dh
        dh = torch.zeros_like(h) if dh is None else dh.to(h.dtype, copy=True)
        ends = (lengths - 1, torch.arange(B, device=h.device))
        dh[ends] += dh_n.to(h.dtype)
        dh_n = None
    if dh_n is not None and not streamed:
        dh_n = dh_n.to(h.dtype)
        if dh is not None:
            dh_n = dh_n + last_rows(dh, lengths).to(h.dtype)
    if dh is not None:
        dh = aligned_rows(dh.to(h.dtype), tile)
    recompute = how.nonlinearity == "modtanh"
    if streamed:
        states = pre_activations(h, scan, how) if recompute else h
        flags = (keep, alive, steps)
        wide_backward(dx, dh_0, dh, dh_n, states, flags, scan, how, **tuning)
        return dx, dh_0, None
    constants, options = compile_options(
        tile,
        heads,
        parts,
        how.precision,
        how.nonlinearity,
        nvidia=on_nvidia(),
        backward=True,
        given=[] if gate is None else ["gate"],
        gate_parts=gate_parts(scan),
        arch=architecture(),
        **tuning,
    )
    source = {"p_x": None, "p_tokens": None, "x_stride_t": 0, "x_stride_b": 0}
    if recompute:
        source = input_arguments(scan.x, scan.tokens, tile)
    # else its product would fill the registers of the loop
    in_kernel = constants["ANCHORED"] and gate is None
    with device_guard(h):
        scan_backward_kernel[(triton.cdiv(B, tile.rows), heads)](
            p_dh=dh,
            p_dh_n=packed(dh_n),
            p_h=packed(h),
            p_dx=dx,
            p_dh_0=dh_0 if in_kernel else None,
            p_a_adjoint=adjoint(a),
            p_b_adjoint=adjoint(b),
            p_a=packed(a) if recompute else None,
            p_b=packed(b) if recompute else None,
            p_beta=packed(scan.beta) if how.nonlinearity == "modrelu" else None,
            p_h_0=packed(h_0) if recompute else None,
            p_keep=keep,
            p_alive=alive,
            p_steps=steps,
            p_gate=gate,
            p_d_gate=d_gate,
            B=B,
            T=T,
            d_stride_t=dh.stride(0) // tile.aligned if dh is not None else 0,
            d_stride_b=dh.stride(1) // tile.aligned if dh is not None else 0,
            **source,
            FLOOR=floor_of(h.dtype),
            **constants,
            **options,
        )
    if gate is None:
        if dh_0 is not None and not in_kernel:
            dh_0.copy_(gradient_before(dx[0], scan))
        return dx, dh_0, None
    d_gate[0].zero_()
    if h_0 is not None:
        y = gradient_before(dx[0], scan)
        dh_0.copy_(planar_product(planar_conj(gate[0], gate_parts(scan)), y, parts))
        first = planar_product(y, planar_conj(states_before(h, scan)[0], parts), parts)
        d_gate[0].copy_(first[:, : gate.shape[2]])
    return dx, dh_0, d_gate[:T]
