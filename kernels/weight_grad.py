"""Gradients of the two factors and of β from the states and the gradient of the pre-activations.

With G_t = dx_t of the backward scan, X_t = keep_t · h_{t-1} (h_0 before the first step), as
matrices of (P, Q), and sums over all steps and batch rows,

    dA = Σ (G conj(B)) Xᴴ      dB = Σ (Aᴴ G)ᵀ conj(X)      dβ = Σ Re(conj(h/|h|) G)

(the last because modReLU passes ρ = Re(conj(n) g) on: Re(conj(n) G) = s ρ + (1 - s) ρ).

Memory plan. Time does not order this sum, so programs share out blocks of rows and chunks of
steps, and a program walks its chunk upwards: the h_t that dβ needs is the X of the next step, so h
and dx_proj are read once. The sums stay in registers, in float32, and each program stores a private
partial sum; the partial sums are added on the host side. Nothing is atomic: results are bitwise
repeatable. Where the sums of dA and dB exceed the registers, each takes a launch of its own.

Limits: those of the scan kernels (`support.why_not`).

    B, T    batch rows, steps                    R       tiles stacked in a block
    H       pairs of factors (heads)             S1, S2  states side by side in a tile, PP, QP
    P, Q    sides of the two factors                     their padded sides, PE, QE its own (`tile`)
    N       P·Q, units of one state              PARTS   2 complex, 1 real
    STATES  states of one row, H or a divisor of it: pair k acts on state k mod STATES
"""

import torch
import triton
import triton.language as tl

from .scan import adjoint, device_guard, on_nvidia, row_words
from .support import Tile, weight_grad_options
from .tile import (
    dot,
    load,
    load_factor,
    negated,
    operand,
    pointers,
    product,
    row_bits,
    rsqrt,
    scale,
    zeros,
)


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
def turn_terms(x, ORDER: tl.constexpr, R: tl.constexpr, M: tl.constexpr, K: tl.constexpr):
    if len(x) == 2:
        return turn_plane(x[0], ORDER, R, M, K), turn_plane(x[1], ORDER, R, M, K)
    else:
        return (turn_plane(x[0], ORDER, R, M, K),)


@triton.jit
def turn_plane(x, ORDER: tl.constexpr, R: tl.constexpr, M: tl.constexpr, K: tl.constexpr):
    if ORDER == "side by side":  # (R·M, K) -> (M, R·K)
        return tl.reshape(tl.permute(tl.reshape(x, (R, M, K)), (1, 0, 2)), (M, R * K))
    elif ORDER == "transposed":  # (R·M, K) -> (R·K, M)
        return tl.reshape(tl.permute(tl.reshape(x, (R, M, K)), (0, 2, 1)), (R * K, M))
    else:  # "flipped": (M, R·K) -> (K, R·M)
        return tl.reshape(tl.permute(tl.reshape(x, (M, R, K)), (2, 1, 0)), (K, R * M))


@triton.jit
def turn(x, ORDER: tl.constexpr, R: tl.constexpr, M: tl.constexpr, K: tl.constexpr):
    """An operand of R matrices, laid out for the next product."""
    if len(x) == 2:
        return turn_terms(x[0], ORDER, R, M, K), turn_terms(x[1], ORDER, R, M, K)
    else:
        return (turn_terms(x[0], ORDER, R, M, K),)


@triton.jit
def in_float32(x):
    if len(x) == 2:
        return x[0].to(tl.float32), x[1].to(tl.float32)
    else:
        return (x[0].to(tl.float32),)


@triton.jit
def phase_part(h, g, NVIDIA: tl.constexpr):
    """Re(conj(h/|h|) G), 0 where h = 0."""
    if len(h) == 2:
        rk = rsqrt(tl.maximum(h[0] * h[0] + h[1] * h[1], 1e-30), NVIDIA)
        return (h[0] * g[0] + h[1] * g[1]) * rk
    else:
        return h[0] * g[0] * rsqrt(tl.maximum(h[0] * h[0], 1e-30), NVIDIA)


@triton.jit
def store_sum(p_sum, x, i_h, H: tl.constexpr, SIDE: tl.constexpr):
    """Store one program's sum of shape (PARTS, H, SIDE, SIDE)."""
    i = tl.arange(0, SIDE)
    p_plane = p_sum + i_h * SIDE * SIDE + i[:, None] * SIDE + i[None, :]
    tl.store(p_plane, x[0])
    if len(x) == 2:
        tl.store(p_plane + H * SIDE * SIDE, x[1])


@triton.jit(do_not_specialize=["B", "T", "blocks", "chunk"])
def weight_grad_kernel(
    p_dx,  # (T, B, PARTS·H·N)
    p_h,  # (T, B, PARTS·STATES·N)
    p_a_adjoint,  # (PARTS, H, P, P)
    p_b,  # (PARTS, H, Q, Q)
    p_h_0,  # (B, PARTS·STATES·N) or None
    p_keep,  # (T, blocks) words of row bits or None
    p_da,  # (programs, PARTS, H, PE, PE)
    p_db,  # (programs, PARTS, H, QE, QE)
    p_dbeta,  # (programs, H, R·S1·S2, N) or None
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
    R: tl.constexpr,
    VECTOR: tl.constexpr,
    PARTS: tl.constexpr,
    SPLIT: tl.constexpr,
    NVIDIA: tl.constexpr,
):
    """dA += (G conj(B)) Xᴴ,  dB += (Aᴴ G)ᵀ conj(X),  dβ += Re(conj(h/|h|) G)."""
    PE: tl.constexpr = S1 * PP
    QE: tl.constexpr = S2 * QP
    ROWS: tl.constexpr = R * S1 * S2
    N: tl.constexpr = P * Q
    F: tl.constexpr = PARTS * H * N
    IM: tl.constexpr = H * N
    H_F: tl.constexpr = PARTS * STATES * N
    H_IM: tl.constexpr = STATES * N
    first_block = tl.program_id(0)
    i_chunk = tl.program_id(1)
    i_h = tl.program_id(2)
    i_program = (i_chunk * tl.num_programs(0) + first_block).to(tl.int64)
    a_adjoint = load_factor(p_a_adjoint, i_h, H, P, PP, S1, 2, False, PARTS, SPLIT, False)
    b = load_factor(p_b, i_h, H, Q, QP, S2, 2, False, PARTS, SPLIT, False)
    row = tl.arange(0, R * PE)[:, None]
    column = tl.arange(0, QE)[None, :]
    i_s1 = row % PE // PP
    i_s2 = row // PE * S2 + column // QP
    i_row = i_s2 * S1 + i_s1
    o_unit = row % PP * Q + column % QP
    true_unit = (row % PP < P) & (column % QP < Q)
    da = zeros(PE, PE, PARTS)
    db = zeros(QE, QE, PARTS)
    dbeta = tl.zeros((R * PE, QE), tl.float32)
    begin = i_chunk * chunk
    end = tl.minimum(begin + chunk, T)
    stride_t = B.to(tl.int64) * F
    h_stride_t = B.to(tl.int64) * H_F
    i_b = first_block.to(tl.int64) * ROWS
    for _block in tl.range(first_block, blocks, tl.num_programs(0)):
        # rows past the batch read its last row, and G = 0
        o_g = tl.minimum(i_row, B - 1 - i_b) * F + o_unit
        o_h = tl.minimum(i_row, B - 1 - i_b) * H_F + o_unit
        mask = true_unit & (i_row < B - i_b)
        p_g = p_dx + (i_b * F + i_h * N + begin.to(tl.int64) * stride_t)
        start = i_b * H_F + i_h % STATES * N
        p_state = p_h + (start + begin.to(tl.int64) * h_stride_t)
        if begin > 0:
            x = in_float32(load(p_state - h_stride_t, o_h, true_unit, H_IM, PARTS, VECTOR))
        elif p_h_0 is not None:
            x = in_float32(load(p_h_0 + start, o_h, true_unit, H_IM, PARTS, VECTOR))
        else:
            x = in_float32(zeros(R * PE, QE, PARTS))
        if p_keep is not None:
            p_word = p_keep + i_b // ROWS + begin.to(tl.int64) * blocks
        for _t in tl.range(begin, end):
            g = in_float32(load(p_g, o_g, mask, IM, PARTS, VECTOR))
            h = in_float32(load(p_state, o_h, true_unit, H_IM, PARTS, VECTOR))
            p_g += stride_t
            p_state += h_stride_t
            if p_keep is not None:
                x = scale(x, row_bits(tl.load(p_word), i_s1, i_s2, S1))
                p_word += blocks
            x_in = operand(x, SPLIT)
            g_in = operand(g, SPLIT)
            if p_da is not None:
                s = operand(times_conj(g_in, b, zeros(R * PE, QE, PARTS)), SPLIT)
                s = turn(s, "side by side", R, PE, QE)
                da = times_conj(s, with_negated(turn(x_in, "transposed", R, PE, QE)), da)
            if p_db is not None:
                g_in = turn(g_in, "side by side", R, PE, QE)
                m = operand(product(a_adjoint, g_in, zeros(PE, R * QE, PARTS)), SPLIT)
                db = times_conj(turn(m, "flipped", R, PE, QE), with_negated(x_in), db)
            if p_dbeta is not None:
                dbeta += phase_part(h, g, NVIDIA)
            x = h
        i_b += tl.num_programs(0) * ROWS
    if p_da is not None:
        store_sum(p_da + i_program * (PARTS * H * PE * PE), da, i_h, H, PE)
    if p_db is not None:
        store_sum(p_db + i_program * (PARTS * H * QE * QE), db, i_h, H, QE)
    if p_dbeta is not None:
        p_sum = p_dbeta + (i_program * H + i_h) * (ROWS * N)
        tl.store(pointers(p_sum, i_row * N + o_unit, VECTOR), dbeta, mask=true_unit)


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


def weight_grad(
    dx_proj, h, a, b, h_0, reset, *, nonlinearity, precision, **tuning
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of the factors, and of β for modReLU, from the two scans.

    Args:
        dx_proj: (T, B, parts·H·N) contiguous, as `scan.scan_backward` returned it. It is zero
            beyond a row's length, so lengths do not matter here.
        h: (T, B, parts·S·N), as `scan.scan_forward` returned it. S is H, or divides it: factor k
            then acts on state k mod S (the gates of an LSTM).
        a, b, reset, nonlinearity, precision, tuning: as for `scan.scan_forward`.
        h_0: (B, parts·S·N) float32 or None.

    Returns:
        da: (parts, H, P, P) float32.
        db: (parts, H, Q, Q) float32.
        dbeta: (H·N,) float32, or None where the nonlinearity has no β.
    """
    T, B, _ = h.shape
    parts, heads, P, _ = a.shape
    Q = b.shape[-1]
    tile = Tile.of(P, Q, h.element_size())
    wants_beta = nonlinearity == "modrelu"
    if h.numel() == 0:
        dbeta = a.new_zeros(heads * P * Q) if wants_beta else None
        return torch.zeros_like(a), torch.zeros_like(b), dbeta
    constants, options, together = weight_grad_options(
        tile, heads, parts, precision, h.element_size(), nvidia=on_nvidia(), **tuning
    )
    constants["STATES"] = h.shape[-1] // (parts * P * Q)
    rows = constants["R"] * tile.rows
    blocks = triton.cdiv(B, rows)
    programs, chunk = partition(blocks, T, heads, h.device, options["num_warps"])
    chunks = triton.cdiv(T, chunk)
    PE, QE = tile.S1 * tile.PP, tile.S2 * tile.QP
    da = a.new_empty((programs * chunks, parts, heads, PE, PE))
    db = a.new_empty((programs * chunks, parts, heads, QE, QE))
    dbeta = a.new_empty((programs * chunks, heads, rows, P * Q)) if wants_beta else None
    launches = [(da, db, dbeta)]
    if not together:  # their sums do not fit the registers of one program
        launches = [(da, None, None), (None, db, None)]
        launches += [(None, None, dbeta)] if wants_beta else []
    keep = row_words(~reset, rows) if reset is not None else None
    with device_guard(h):
        for p_da, p_db, p_dbeta in launches:
            weight_grad_kernel[(programs, chunks, heads)](
                p_dx=dx_proj,
                p_h=h,
                p_a_adjoint=adjoint(a),
                p_b=b.contiguous(),
                p_h_0=h_0.contiguous() if h_0 is not None else None,
                p_keep=keep,
                p_da=p_da,
                p_db=p_db,
                p_dbeta=p_dbeta,
                B=B,
                T=T,
                blocks=blocks,
                chunk=chunk,
                **constants,
                **options,
            )
    da = diagonal_blocks(da, tile.S1, P)
    db = diagonal_blocks(db, tile.S2, Q)
    return da, db, dbeta.sum((0, 2)).flatten() if wants_beta else None
