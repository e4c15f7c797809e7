"""Gradients of the two factors and of β from the states and the gradient of the pre-activations.

With G_t = dx_t of the backward scan, X_t = keep_t · h_{t-1} (h_0 before the first step), as
matrices of (P, Q), and sums over all steps and batch rows,

    dA = Σ (G conj(B)) Xᴴ      dB = Σ (Aᴴ G)ᵀ conj(X)      dβ = Σ Re(conj(h/|h|) G)

(the last because modReLU passes ρ = Re(conj(n) g) on: Re(conj(n) G) = s ρ + (1 - s) ρ).

Memory plan. Time does not order this sum, so programs share out blocks of rows and chunks of
steps, and a program walks its chunk upwards: the h_t that dβ needs is the X of the next step. The
sums stay in registers, in float32, and each program stores a private partial sum; the partial sums
are added on the host side. Nothing is atomic: results are bitwise repeatable.

Of fragments (`fragment_sum`, sides of up to 32), a warp loads its rows as operands: with four lanes
along q for dA, which contracts q, and with eight for dB, which contracts p. The first product's
accumulators are then the second one's operand, and nothing but constants is in shared memory. dA,
16 rows of it a program and dβ with them, and dB are programs of one launch that read the same rows
at a time, so that memory is read once and L2 for the others.

Else (`tile_sums`) tiles go through shared memory to all warps of a program, which has all sums;
where those exceed the registers each takes a launch, and several programs may share its rows.

Limits: factors of up to 64 x 64. With a larger one, or too little shared memory, these are matrix
products of a size that torch's own are made for, in float32 (`contracted`).

    B, T    batch rows, steps                    SLICES  programs that share a sum's rows
    H       pairs of factors (heads)             S1, S2  states side by side in a tile, PP, QP
    P, Q    sides of the two factors                     their padded sides, PE, QE its own (`tile`)
    N       P·Q, units of one state              PARTS   2 complex, 1 real
    STATES  states of one row, H or a divisor of it: pair k acts on state k mod STATES
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kru_triton.ops.arguments import How, Scan

from .geometry import Tile
from .launch import adjoint, device_guard, on_nvidia, packed, row_words
from .options import weight_grad_options
from .tile import (
    dot,
    flip,
    flip_terms,
    load,
    load_factor,
    negated,
    operand,
    pointers,
    product,
    row_bits,
    rsqrt,
    select_operand,
    to_tile,
    zeros,
)
from .why_not import MAX_PADDED_SIDE, is_wide

CHUNK = 2**24  # values of h that `contracted` takes at a time


@triton.jit
def times(x, w, acc, E: tl.constexpr):
    """acc + x wᵀ of an operand x and a constant w, (E, E); a complex one is (re, im, -im)."""
    re = dot(x[0], flip_terms(w[0], E, E), acc[0])
    if len(x) == 2:
        re = dot(x[1], flip_terms(w[2], E, E), re)
        im = dot(x[0], flip_terms(w[1], E, E), acc[1])
        return re, dot(x[1], flip_terms(w[0], E, E), im)
    else:
        return (re,)


@triton.jit
def times_conj(x, w, acc):
    """acc + x conj(w); a complex constant w is (re, im, -im)."""
    if len(x) == 2:
        re = dot(x[1], w[1], dot(x[0], w[0], acc[0]))
        im = dot(x[0], w[2], dot(x[1], w[0], acc[1]))
        return re, im
    else:
        return (dot(x[0], w[0], acc[0]),)


@triton.jit
def with_negated(x):
    """An operand as a constant is: (re,) or (re, im, -im)."""
    if len(x) == 2:
        return x[0], x[1], negated(x[1])
    else:
        return x


@triton.jit
def outer(s, x, acc):
    """acc + s conj(x) of operands."""
    if len(s) == 2:
        re = dot(s[1], x[1], dot(s[0], x[0], acc[0]))
        return re, dot(negated(s[0]), x[1], dot(s[1], x[0], acc[1]))
    else:
        return (dot(s[0], x[0], acc[0]),)


@triton.jit
def in_float32(x):
    if len(x) == 2:
        return x[0].to(tl.float32), x[1].to(tl.float32)
    else:
        return (x[0].to(tl.float32),)


@triton.jit
def phase_part(h, g, NVIDIA: tl.constexpr):
    """Re(conj(h/|h|) G), 0 where h = 0."""
    size = h[0] * h[0] + 1e-30
    rho = h[0] * g[0]
    if len(h) == 2:
        size = h[1] * h[1] + size
        rho = h[1] * g[1] + rho
    return rho * rsqrt(size, NVIDIA)


@triton.jit
def units(
    p,
    q,
    P: tl.constexpr,
    Q: tl.constexpr,
    PP: tl.constexpr,
    QP: tl.constexpr,
    S1: tl.constexpr,
):
    """Batch row within the block, unit and truth (no padding) of elements (p, q) of a tile."""
    i_row = q // QP * S1 + p // PP
    return i_row, p % PP * Q + q % QP, (p % PP < P) & (q % QP < Q)


@triton.jit
def coordinates(first, PE: tl.constexpr, QE: tl.constexpr, V: tl.constexpr, TURNED: tl.constexpr):
    """p and q of every element of a loaded tile, PE rows of X from `first` on.

    A thread has V contiguous columns of a row. Four threads lie along q, (chunk, p) by (lane, v) as
    in `tile`; turned, eight do, (chunk, m, l, lane) by (j, v), and four along p = 8m + 2j + l.
    """
    row = tl.arange(0, PE * QE // (4 * V))
    column = tl.arange(0, 4 * V)
    if TURNED:
        p = (row // 16 % (PE // 8) * 8 + row // 8 % 2)[:, None] + (column // V * 2)[None, :]
        q = (row // (2 * PE) * (8 * V) + row % 8 * V)[:, None] + (column % V)[None, :]
    else:
        p = (first + row % PE)[:, None]
        q = (row // PE * (4 * V))[:, None] + column[None, :]
    return p, q


@triton.jit
def turned_plane(x, PE: tl.constexpr, QE: tl.constexpr, V: tl.constexpr):
    x = tl.reshape(x, (QE // (8 * V), PE // 8, 2, 8, 4, V))
    return tl.reshape(tl.permute(x, (0, 5, 3, 1, 4, 2)), (QE, PE)).to(tl.float32)


@triton.jit
def loaded_operand(
    x,
    PE: tl.constexpr,
    QE: tl.constexpr,
    V: tl.constexpr,
    TURNED: tl.constexpr,
    SPLIT: tl.constexpr,
    NVIDIA: tl.constexpr,
):
    """Loaded planes as an operand, (PE, QE) or turned (QE, PE), by renaming registers."""
    if TURNED:
        if len(x) == 2:
            x = turned_plane(x[0], PE, QE, V), turned_plane(x[1], PE, QE, V)
        else:
            x = (turned_plane(x[0], PE, QE, V),)
    else:
        x = to_tile(x, PE, QE, V, NVIDIA)
    return operand(x, SPLIT, NVIDIA)


@triton.jit
def store_sum(p_sum, x, i, j, SIDE: tl.constexpr, H: tl.constexpr):
    """Store rows i and columns j of one program's sum of shape (PARTS, H, SIDE, SIDE)."""
    p_plane = p_sum + i[:, None] * SIDE + j[None, :]
    tl.store(p_plane, x[0])
    if len(x) == 2:
        tl.store(p_plane + H * SIDE * SIDE, x[1])


@triton.jit
def fragment_sum(
    p_dx,
    p_h,
    p_h_0,
    p_keep,
    p_adjoint,
    p_sum,
    p_dbeta,
    i_h,
    i_slice,
    B,
    T,
    blocks,
    chunk,
    STATES: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    PP: tl.constexpr,
    QP: tl.constexpr,
    S1: tl.constexpr,
    S2: tl.constexpr,
    SLICES: tl.constexpr,
    V: tl.constexpr,
    PARTS: tl.constexpr,
    SPLIT: tl.constexpr,
    NVIDIA: tl.constexpr,
    TURNED: tl.constexpr,
):
    """Rows of dA and dβ, or, turned, of dB, from operands that are loaded as such."""
    PE: tl.constexpr = S1 * PP
    QE: tl.constexpr = S2 * QP
    ROWS: tl.constexpr = S1 * S2
    N: tl.constexpr = P * Q
    F: tl.constexpr = PARTS * H * N
    IM: tl.constexpr = H * N
    H_F: tl.constexpr = PARTS * STATES * N
    H_IM: tl.constexpr = STATES * N
    E: tl.constexpr = QE if TURNED else PE  # of the sum, (E, E), a program has M rows
    K: tl.constexpr = PE if TURNED else QE
    M: tl.constexpr = E // SLICES
    PG: tl.constexpr = PE // SLICES
    first_block = tl.program_id(1)
    begin = tl.program_id(2) * chunk
    end = tl.minimum(begin + chunk, T)
    first = i_slice * M
    i_g = first + tl.arange(0, M)
    i_x = tl.arange(0, E)
    i_k = tl.arange(0, K)
    if TURNED:
        w = load_factor(p_adjoint, i_h, H, P, PP, S1, V, False, PARTS, SPLIT, K == 16)
        i_x = i_x // (8 * V) * (8 * V) + i_x % 8 * V + i_x // 8 % V  # (chunk, v, lane) to q
        i_g = i_x
        x_row, _, _ = units(i_k[None, :], i_x[:, None], P, Q, PP, QP, S1)
    else:
        w = load_factor(p_adjoint, i_h, H, Q, QP, S2, V, True, PARTS, SPLIT, K == 16)
        x_row, _, _ = units(i_x[:, None], i_k[None, :], P, Q, PP, QP, S1)
    p, q = coordinates(0, PE, QE, V, TURNED)
    h_row, h_unit, h_true = units(p, q, P, Q, PP, QP, S1)
    p, q = coordinates(first, PG, QE, V, TURNED)
    g_row, g_unit, g_true = units(p, q, P, Q, PP, QP, S1)
    h_mask = None
    units_mask = None
    if ROWS > 1 or P < PP or Q < QP:
        h_mask = h_true
        units_mask = g_true
    sums = zeros(M, E, PARTS)
    dbeta = tl.zeros((PG * QE // (4 * V), 4 * V), tl.float32)
    stride_t = B.to(tl.int64) * F
    h_stride_t = B.to(tl.int64) * H_F
    i_b = first_block.to(tl.int64) * ROWS
    for _block in tl.range(first_block, blocks, tl.num_programs(1)):
        o_x = h_unit
        o_g = g_unit
        o_h = g_unit
        g_mask = units_mask
        if ROWS > 1:  # those past the batch read its last row, and G = 0
            last = B - 1 - i_b
            o_x = tl.minimum(h_row, last) * H_F + h_unit
            o_g = tl.minimum(g_row, last) * F + g_unit
            o_h = tl.minimum(g_row, last) * H_F + g_unit
            g_mask = g_true & (g_row <= last)
        p_g = p_dx + (i_b * F + i_h * N + begin.to(tl.int64) * stride_t)
        start = i_b * H_F + i_h % STATES * N
        p_state = p_h + (start + begin.to(tl.int64) * h_stride_t)
        p_before = p_h_0 + start
        if begin > 0:
            p_before = p_state - h_stride_t
        if p_keep is not None:
            p_word = p_keep + i_b // ROWS + begin.to(tl.int64) * blocks
        for _t in tl.range(begin, end):
            g = load(p_g, o_g, g_mask, IM, PARTS, V)
            if p_dbeta is not None:
                h = load(p_state, o_h, g_mask, H_IM, PARTS, V)
            x = load(p_before, o_x, h_mask, H_IM, PARTS, V)
            if p_dbeta is not None:
                dbeta += phase_part(in_float32(h), in_float32(g), NVIDIA)
            g = loaded_operand(g, PG, QE, V, TURNED, SPLIT, NVIDIA)
            s = operand(times(g, w, zeros(M, K, PARTS), K), SPLIT, NVIDIA)
            x = loaded_operand(x, PE, QE, V, TURNED, SPLIT, NVIDIA)
            if p_keep is not None:
                x = select_operand(x, row_bits(tl.load(p_word), x_row), NVIDIA)
                p_word += blocks
            sums = outer(s, flip(x, E, K), sums)
            p_before = p_state
            p_g += stride_t
            p_state += h_stride_t
        i_b += tl.num_programs(1) * ROWS
    i_program = (tl.program_id(2) * tl.num_programs(1) + first_block).to(tl.int64)
    store_sum(p_sum + (i_program * PARTS * H + i_h) * (E * E), sums, i_g, i_x, E, H)
    if p_dbeta is not None:
        p_units = p_dbeta + (i_program * H + i_h) * (ROWS * N)
        tl.store(pointers(p_units, g_row * N + g_unit, V), dbeta, mask=units_mask)


@triton.jit
def tile_sums(
    p_dx,
    p_h,
    p_a_adjoint,
    p_b,
    p_h_0,
    p_keep,
    p_da,
    p_db,
    p_dbeta,
    B,
    T,
    blocks,
    chunk,
    STATES: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    PP: tl.constexpr,
    QP: tl.constexpr,
    S1: tl.constexpr,
    S2: tl.constexpr,
    SLICES: tl.constexpr,
    VECTOR: tl.constexpr,
    PARTS: tl.constexpr,
    SPLIT: tl.constexpr,
    NVIDIA: tl.constexpr,
):
    """All sums, or one of them, from tiles that pass through shared memory."""
    PE: tl.constexpr = S1 * PP
    QE: tl.constexpr = S2 * QP
    ROWS: tl.constexpr = S1 * S2
    # with slices a program has one sum, and needs the rows or the columns of G for a slice of it
    PG: tl.constexpr = PE // SLICES if p_da is not None else PE
    QG: tl.constexpr = QE // SLICES if p_da is None else QE
    N: tl.constexpr = P * Q
    F: tl.constexpr = PARTS * H * N
    IM: tl.constexpr = H * N
    H_F: tl.constexpr = PARTS * STATES * N
    H_IM: tl.constexpr = STATES * N
    first_block = tl.program_id(1)
    i_chunk = tl.program_id(2)
    i_h = tl.program_id(0) // SLICES
    first_p = 0
    first_q = 0
    if PG < PE:
        first_p = tl.program_id(0) % SLICES * PG
    if QG < QE:
        first_q = tl.program_id(0) % SLICES * QG
    i_program = (i_chunk * tl.num_programs(1) + first_block).to(tl.int64)
    a_adjoint = load_factor(p_a_adjoint, i_h, H, P, PP, S1, 2, False, PARTS, SPLIT, False)
    b = load_factor(p_b, i_h, H, Q, QP, S2, 2, False, PARTS, SPLIT, False)
    p = tl.arange(0, PE)[:, None]
    q = tl.arange(0, QE)[None, :]
    i_row, o_unit, true_unit = units(p, q, P, Q, PP, QP, S1)
    i_p = first_p + tl.arange(0, PG)
    i_q = first_q + tl.arange(0, QG)
    g_row, g_unit, g_true = units(i_p[:, None], i_q[None, :], P, Q, PP, QP, S1)
    da = zeros(PG, PE, PARTS)
    db = zeros(QG, QE, PARTS)
    dbeta = tl.zeros((PE, QE), tl.float32)
    begin = i_chunk * chunk
    end = tl.minimum(begin + chunk, T)
    stride_t = B.to(tl.int64) * F
    h_stride_t = B.to(tl.int64) * H_F
    i_b = first_block.to(tl.int64) * ROWS
    for _block in tl.range(first_block, blocks, tl.num_programs(1)):
        # rows past the batch read its last row, and G = 0
        o_g = tl.minimum(g_row, B - 1 - i_b) * F + g_unit
        o_h = tl.minimum(i_row, B - 1 - i_b) * H_F + o_unit
        g_mask = g_true & (g_row < B - i_b)
        p_g = p_dx + (i_b * F + i_h * N + begin.to(tl.int64) * stride_t)
        start = i_b * H_F + i_h % STATES * N
        p_state = p_h + (start + begin.to(tl.int64) * h_stride_t)
        if begin > 0:
            x = in_float32(load(p_state - h_stride_t, o_h, true_unit, H_IM, PARTS, VECTOR))
        elif p_h_0 is not None:
            x = in_float32(load(p_h_0 + start, o_h, true_unit, H_IM, PARTS, VECTOR))
        else:
            x = in_float32(zeros(PE, QE, PARTS))
        if p_keep is not None:
            p_word = p_keep + i_b // ROWS + begin.to(tl.int64) * blocks
        for _t in tl.range(begin, end):
            g = in_float32(load(p_g, o_g, g_mask, IM, PARTS, VECTOR))
            h = in_float32(load(p_state, o_h, true_unit, H_IM, PARTS, VECTOR))
            p_g += stride_t
            p_state += h_stride_t
            x_in = operand(x, SPLIT, NVIDIA)
            if p_keep is not None:
                x_in = select_operand(x_in, row_bits(tl.load(p_word), i_row), NVIDIA)
                p_word += blocks
            g_in = operand(g, SPLIT, NVIDIA)
            if p_da is not None:
                s = operand(times_conj(g_in, b, zeros(PG, QE, PARTS)), SPLIT, NVIDIA)
                da = times_conj(s, with_negated(flip(x_in, PE, QE)), da)
            if p_db is not None:
                m = operand(product(a_adjoint, g_in, zeros(PE, QG, PARTS)), SPLIT, NVIDIA)
                db = times_conj(flip(m, PE, QG), with_negated(x_in), db)
            if p_dbeta is not None:
                dbeta += phase_part(h, g, NVIDIA)
            x = h
        i_b += tl.num_programs(1) * ROWS
    if p_da is not None:
        p_sum = p_da + (i_program * PARTS * H + i_h) * (PE * PE)
        store_sum(p_sum, da, i_p, tl.arange(0, PE), PE, H)
    if p_db is not None:
        p_sum = p_db + (i_program * PARTS * H + i_h) * (QE * QE)
        store_sum(p_sum, db, i_q, tl.arange(0, QE), QE, H)
    if p_dbeta is not None:
        p_sum = p_dbeta + (i_program * H + i_h) * (ROWS * N)
        tl.store(pointers(p_sum, i_row * N + o_unit, VECTOR), dbeta, mask=true_unit)


@triton.jit(do_not_specialize=["B", "T", "blocks", "chunk"])
def weight_grad_kernel(
    p_dx,  # (T, B, PARTS·H·N)
    p_h,  # (T, B, PARTS·STATES·N)
    p_a_adjoint,  # (PARTS, H, P, P)
    p_b,  # (PARTS, H, Q, Q); for fragments its adjoint
    p_h_0,  # (B, PARTS·STATES·N) or, but for fragments, None
    p_keep,  # (T, blocks) words of row bits or None
    p_da,  # (programs, PARTS, H, PE, PE) or None
    p_db,  # (programs, PARTS, H, QE, QE) or None
    p_dbeta,  # (programs, H, S1·S2, N) or None
    B,
    T,
    blocks,
    chunk,
    STATES: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    PP: tl.constexpr,
    QP: tl.constexpr,
    S1: tl.constexpr,
    S2: tl.constexpr,
    FRAGMENTS: tl.constexpr,
    SLICES: tl.constexpr,
    V: tl.constexpr,
    W: tl.constexpr,
    VECTOR: tl.constexpr,
    PARTS: tl.constexpr,
    SPLIT: tl.constexpr,
    NVIDIA: tl.constexpr,
):
    """dA += (G conj(B)) Xᴴ,  dB += (Aᴴ G)ᵀ conj(X),  dβ += Re(conj(h/|h|) G)."""
    if FRAGMENTS:
        i_h = tl.program_id(0) // (SLICES + 1)
        i_slice = tl.program_id(0) % (SLICES + 1)
        if i_slice < SLICES:
            fragment_sum(
                p_dx, p_h, p_h_0, p_keep, p_b, p_da, p_dbeta, i_h, i_slice, B, T, blocks, chunk,
                STATES, H, P, Q, PP, QP, S1, S2, SLICES, V, PARTS, SPLIT, NVIDIA, False,
            )  # fmt: skip
        else:
            fragment_sum(
                p_dx, p_h, p_h_0, p_keep, p_a_adjoint, p_db, None, i_h, 0, B, T, blocks, chunk,
                STATES, H, P, Q, PP, QP, S1, S2, 1, W, PARTS, SPLIT, NVIDIA, True,
            )  # fmt: skip
    else:
        tile_sums(
            p_dx, p_h, p_a_adjoint, p_b, p_h_0, p_keep, p_da, p_db, p_dbeta, B, T, blocks,
            chunk, STATES, H, P, Q, PP, QP, S1, S2, SLICES, VECTOR, PARTS, SPLIT, NVIDIA,
        )  # fmt: skip


def partition(blocks, T, heads, device, num_warps) -> tuple[int, int]:
    """Programs over blocks of rows and steps of a chunk, so that the device is filled evenly."""
    processors = 1
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = triton.cdiv(processors * (16 // num_warps), heads)
    programs = min(blocks, wanted)
    chunks = max(1, min(wanted // programs, T // 8))
    return programs, triton.cdiv(T, chunks)


def diagonal_blocks(x, S, side):
    """Sum over the programs, and over the states that lay side by side, of (…, S·PP, S·PP)."""
    x = x.sum(0).unflatten(-1, (S, -1)).unflatten(-3, (S, -1))
    return x.diagonal(dim1=-4, dim2=-2).sum(-1)[..., :side, :side].contiguous()


def joined(x):
    """Planes (2, ...) as one complex tensor, (1, ...) as a real one."""
    return torch.complex(x[0], x[1]) if x.shape[0] == 2 else x[0]


def planes(x):
    """What `joined` joined."""
    return torch.stack((x.real, x.imag)) if x.is_complex() else x[None]


def matrices(x, parts, heads, P, Q):
    """States (T, B, parts·H·P·Q) as (T, B, H, P, Q), complex or real."""
    return joined(x.float().unflatten(-1, (parts, heads, P, Q)).movedim(2, 0))


def contracted(
    dx: Tensor, h: Tensor, scan: Scan, wants_beta: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same gradients as matrix products of torch, a chunk of steps at a time."""
    T, B, F = h.shape
    h_0, reset = scan.h_0, scan.reset
    shape = (*scan.a.shape[:3], scan.b.shape[-1])
    a, b = joined(scan.a), joined(scan.b)
    da, db = torch.zeros_like(a), torch.zeros_like(b)
    dbeta = h.new_zeros(shape[1:], dtype=torch.float32)
    chunk = max(1, CHUNK // (B * F))
    before = torch.zeros_like(h[:1]) if h_0 is None else h_0[None].to(h.dtype)
    for t in range(0, T, chunk):
        g = matrices(dx[t : t + chunk], *shape)
        x = torch.cat((before, h[t : t + chunk]))
        before = x[-1:]
        if wants_beta:
            phase = matrices(x[1:], *shape).sgn()
            dbeta += (phase.conj() * g).real.sum((0, 1))
        x = x[:-1]
        if reset is not None:
            x.masked_fill_(reset[t : t + chunk, :, None], 0)
        x = matrices(x, *shape).conj()
        da += torch.einsum("tbhpq,tbhsq->hps", g @ b.conj(), x)
        db += torch.einsum("tbhpq,tbhpr->hqr", a.mH @ g, x)
    return planes(da), planes(db), dbeta.flatten() if wants_beta else None


def weight_grad(
    dx: Tensor, h: Tensor, scan: Scan, how: How, **tuning
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of the factors, and of β for modReLU, from the two scans.

    Args:
        dx: (T, B, parts·H·N) contiguous, as `scan.scan_backward` returned it. It is zero
            beyond a row's length, so lengths do not matter here.
        h: (T, B, parts·S·N), as `scan.scan_forward` returned it. S is H, or divides it: factor k
            then acts on state k mod S (the gates of an LSTM).
        scan, how, tuning: as for `scan.scan_forward`; of scan a, b, h_0 (B, parts·S·N) and reset
            are read.

    Returns:
        da: (parts, H, P, P) float32.
        db: (parts, H, Q, Q) float32.
        dbeta: (H·N,) float32, or None where the nonlinearity has no β.
    """
    T, B, _ = h.shape
    a, b, reset = scan.a, scan.b, scan.reset
    parts, heads, P, _ = a.shape
    Q = b.shape[-1]
    tile = Tile.of(P, Q, h.element_size())
    wants_beta = how.nonlinearity == "modrelu"
    if h.numel() == 0:
        dbeta = a.new_zeros(heads * P * Q) if wants_beta else None
        return torch.zeros_like(a), torch.zeros_like(b), dbeta
    if max(P, Q) > MAX_PADDED_SIDE or is_wide(a, b, h, "identity", how.precision):
        return contracted(dx, h, scan, wants_beta)
    constants, options, together = weight_grad_options(
        tile,
        heads,
        parts,
        how.precision,
        h.element_size(),
        nvidia=on_nvidia(),
        fragments=torch.version.hip is None,
        **tuning,
    )
    constants["STATES"] = h.shape[-1] // (parts * P * Q)
    rows = tile.rows
    blocks = triton.cdiv(B, rows)
    slices, fragments, h_0 = constants.pop("SLICES"), constants["FRAGMENTS"], scan.h_0
    if fragments:
        h_0 = torch.zeros_like(h[0]) if h_0 is None else h_0.to(h.dtype)
    kinds = slices + 1 if fragments else 1  # of programs, which share rows
    programs, chunk = partition(blocks, T, heads * kinds, h.device, options["num_warps"])
    chunks = triton.cdiv(T, chunk)
    PE, QE = tile.S1 * tile.PP, tile.S2 * tile.QP
    da = a.new_empty((programs * chunks, parts, heads, PE, PE))
    db = a.new_empty((programs * chunks, parts, heads, QE, QE))
    dbeta = a.new_empty((programs * chunks, heads, rows, P * Q)) if wants_beta else None
    launches = [(da, db, dbeta, slices if fragments else 1)]
    if not together:  # their sums do not fit the registers of one program
        launches = [(da, None, None, slices), (None, db, None, slices)]
        launches += [(None, None, dbeta, 1)] if wants_beta else []
    keep = row_words(~reset, rows) if reset is not None else None
    with device_guard(h):
        for p_da, p_db, p_dbeta, share in launches:
            weight_grad_kernel[(heads * (share + fragments), programs, chunks)](
                p_dx=packed(dx),
                p_h=packed(h),
                p_a_adjoint=adjoint(a),
                p_b=adjoint(b) if fragments else packed(b),
                p_h_0=packed(h_0),
                p_keep=keep,
                p_da=p_da,
                p_db=p_db,
                p_dbeta=p_dbeta,
                B=B,
                T=T,
                blocks=blocks,
                chunk=chunk,
                SLICES=share,
                **constants,
                **options,
            )
    da = diagonal_blocks(da, tile.S1, P)
    db = diagonal_blocks(db, tile.S2, Q)
    return da, db, dbeta.sum((0, 2)).flatten() if wants_beta else None
