"""The recurrence and its adjoint where a factor is too large for a program's registers and memory.

Same recurrence as `scan`, whose launchers come here for a side beyond 128, and for smaller ones
where a device has too little shared memory. With K the larger factor (W, W), S the smaller one
(n, n) and the state X as a matrix (W, n), a step is two products,

    Z = X Sᵀ,   X ← σ(K Z + x_t)        backwards  Z = G conj(S),   g ← dh + Kᴴ Z.

Memory plan. A program holds ROWS batch rows of one head side by side, E = ROWS·n columns. Nothing
stays in registers from step to step: Z lies in global memory, in L2 in practice, as the bfloat16
terms of an operand and twice, for the step that reads it and the step that writes it, so that one
barrier a step is enough. The tiles (BLOCK, BLOCK) of K come from L2 in every step, through
Triton's pipeline; a program needs shared memory for a few of them and no more, whatever W is.

    W, SIDE  side of K, padded to a multiple of BLOCK       E       columns, ROWS·PADDED
    n        side of S; PADDED a power of two               PLANES  planes of Z: parts x terms
    STRIDE_W, STRIDE_N  elements between units along W and n: Q, 1 for K = A and 1, Q for K = B

For all other letters see `tile` and `scan`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kru_triton.ops.arguments import How, Scan

from .activation import activate, activate_adjoint
from .geometry import Wide
from .launch import (
    adjoint,
    device_guard,
    floor_of,
    group_flags,
    input_arguments,
    on_nvidia,
    packed,
)
from .options import wide_options
from .tile import (
    INTERPRET,
    add,
    dot,
    operand,
    product,
    row_bits,
    select,
    select_operand,
    to_memory,
    zeros,
)


@triton.jit
def read_terms(p, TERM: tl.constexpr, SPLIT: tl.constexpr):
    """Stored bfloat16 terms; the interpreter computes with their values in float32."""
    hi = tl.load(p)
    if INTERPRET:
        hi = hi.to(tl.float32)
    if SPLIT:
        lo = tl.load(p + TERM)
        if INTERPRET:
            lo = lo.to(tl.float32)
        return hi, lo
    else:
        return (hi,)


@triton.jit
def read_operand(
    p, TERM: tl.constexpr, PLANE: tl.constexpr, PARTS: tl.constexpr, SPLIT: tl.constexpr
):
    """Stored operand: terms TERM and planes PLANE elements apart."""
    if PARTS == 2:
        return read_terms(p, TERM, SPLIT), read_terms(p + PLANE, TERM, SPLIT)
    else:
        return (read_terms(p, TERM, SPLIT),)


@triton.jit
def write_terms(p, x, TERM: tl.constexpr):
    tl.store(p, x[0].to(tl.bfloat16))
    if len(x) == 2:
        tl.store(p + TERM, x[1].to(tl.bfloat16))


@triton.jit
def write_operand(p, x, TERM: tl.constexpr, PLANE: tl.constexpr):
    write_terms(p, x[0], TERM)
    if len(x) == 2:
        write_terms(p + PLANE, x[1], TERM)


@triton.jit
def narrow_product(x, s):
    """x s."""
    if len(x) == 2:
        acc = tl.zeros((x[0][0].shape[0], s[0][0].shape[1]), tl.float32)
        re = dot(x[0], s[0], acc)
        re -= dot(x[1], s[1], acc)
        return re, dot(x[1], s[0], dot(x[0], s[1], acc))
    else:
        acc = tl.zeros((x[0][0].shape[0], s[0][0].shape[1]), tl.float32)
        return (dot(x[0], s[0], acc),)


@triton.jit
def narrow_factor(
    p_s,
    i_h,
    H: tl.constexpr,
    N_SIDE: tl.constexpr,
    PADDED: tl.constexpr,
    E: tl.constexpr,
    PARTS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """I ⊗ Sᵀ, (E, E), as operand 1."""
    e = tl.arange(0, E)
    n = e % PADDED
    inside = (e // PADDED)[:, None] == (e // PADDED)[None, :]
    inside = inside & (n < N_SIDE)[:, None] & (n < N_SIDE)[None, :]
    p = p_s + i_h * N_SIDE * N_SIDE + n[None, :] * N_SIDE + n[:, None]
    re = tl.load(p, mask=inside, other=0.0)
    if PARTS == 2:
        im = tl.load(p + H * N_SIDE * N_SIDE, mask=inside, other=0.0)
        return operand((re, im), SPLIT, False)
    else:
        return operand((re,), SPLIT, False)


@triton.jit
def load_block(p, offset, mask, IM: tl.constexpr, PARTS: tl.constexpr):
    """A block of a state in float32."""
    re = tl.load(p + offset, mask=mask, other=0.0).to(tl.float32)
    if PARTS == 2:
        return re, tl.load(p + IM + offset, mask=mask, other=0.0).to(tl.float32)
    else:
        return (re,)


@triton.jit
def store_block(p, offset, mask, x, IM: tl.constexpr):
    dtype: tl.constexpr = p.dtype.element_ty
    tl.store(p + offset, to_memory(x[0], dtype), mask=mask)
    if len(x) == 2:
        tl.store(p + IM + offset, to_memory(x[1], dtype), mask=mask)


@triton.jit
def streamed(
    p_k,
    p_z,
    acc,
    H: tl.constexpr,
    SIDE: tl.constexpr,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLIT_FACTORS: tl.constexpr,
):
    """acc + K Z for one block of K's rows, from the block's first element on."""
    K_TERM: tl.constexpr = H * SIDE * SIDE
    K_PLANE: tl.constexpr = 2 * K_TERM if SPLIT_FACTORS else K_TERM
    Z_TERM: tl.constexpr = SIDE * E
    Z_PLANE: tl.constexpr = 2 * Z_TERM if SPLIT else Z_TERM
    i = tl.arange(0, BLOCK)
    p_k += i[:, None] * SIDE + i[None, :]
    p_z += i[:, None] * E + tl.arange(0, E)[None, :]
    for _k in tl.range(0, SIDE, BLOCK):
        k = read_operand(p_k, K_TERM, K_PLANE, PARTS, SPLIT_FACTORS)
        z = read_operand(p_z, Z_TERM, Z_PLANE, PARTS, SPLIT)
        acc = product(k, z, acc)
        p_k += BLOCK
        p_z += BLOCK * E
    return acc


@triton.jit
def places(
    i_b,
    B,
    E: tl.constexpr,
    PADDED: tl.constexpr,
    STRIDE_N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Columns, their rows in the group and in the batch, their units along n; rows of a block."""
    e = tl.arange(0, E)[None, :]
    i_row = e // PADDED
    row = tl.minimum(i_row, B - 1 - i_b)
    return e, i_row, row, (e % PADDED) * STRIDE_N, tl.arange(0, BLOCK)[:, None]


@triton.jit(do_not_specialize=["B", "T", "x_stride_t", "x_stride_b"])
def wide_forward_kernel(
    p_x,  # (B, T, PARTS·H·N), any strides of B and T; with tokens (rows, PARTS·H·N)
    p_tokens,  # (T, B) int32 or None
    p_h,  # (T, B, PARTS·H·N)
    p_k,  # (PARTS, 1 or 2 terms, H, SIDE, SIDE) bfloat16
    p_s,  # (PARTS, H, n, n)
    p_z,  # (groups, H, 2, PARTS, TERMS, SIDE, E) bfloat16, zero
    p_beta,  # (H·N,) or None
    p_h_0,  # (B, PARTS·H·N) or None
    p_keep,  # (T, groups) words of row bits or None
    p_alive,  # (T, groups) words of row bits or None
    p_steps,  # (groups,) or None
    B,
    T,
    x_stride_t,
    x_stride_b,
    H: tl.constexpr,
    W: tl.constexpr,
    SIDE: tl.constexpr,
    N_SIDE: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    STRIDE_W: tl.constexpr,
    STRIDE_N: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLIT_FACTORS: tl.constexpr,
    ACT: tl.constexpr,
    NVIDIA: tl.constexpr,
):
    """h_t = σ(A h_{t-1} Bᵀ + x_t) for all t, one group of rows of one head."""
    E: tl.constexpr = ROWS * PADDED
    N: tl.constexpr = W * N_SIDE
    F: tl.constexpr = PARTS * H * N
    IM: tl.constexpr = H * N
    TERMS: tl.constexpr = 2 if SPLIT else 1
    HALF: tl.constexpr = PARTS * TERMS * SIDE * E
    i_g = tl.program_id(0)
    i_h = tl.program_id(1)
    groups = tl.num_programs(0)
    i_b = i_g.to(tl.int64) * ROWS
    e, i_row, row, unit, block = places(i_b, B, E, PADDED, STRIDE_N, BLOCK)
    p_k += i_h.to(tl.int64) * (SIDE * SIDE)
    p_z += (i_g.to(tl.int64) * H + i_h) * (2 * HALF)
    s = narrow_factor(p_s, i_h, H, N_SIDE, PADDED, E, PARTS, SPLIT_FACTORS)
    o_z = block * E + e
    o_row = row * F + unit
    steps = T
    if p_steps is not None:
        steps = tl.load(p_steps + i_g)
    if p_h_0 is not None:
        for m in tl.range(0, SIDE, BLOCK):
            w = m + block
            mask = (w < W) & (e % PADDED < N_SIDE)
            x = load_block(p_h_0 + (i_b * F + i_h * N), o_row + w * STRIDE_W, mask, IM, PARTS)
            x = operand(x, SPLIT, NVIDIA)
            if p_keep is not None:
                x = select_operand(x, row_bits(tl.load(p_keep + i_g), i_row), NVIDIA)
            x = narrow_product(x, s)
            write_operand(p_z + m * E + o_z, operand(x, SPLIT, NVIDIA), SIDE * E, TERMS * SIDE * E)
        tl.debug_barrier()
    p_u = p_x + i_h * N
    p_out = p_h + (i_b * F + i_h * N)
    for t in tl.range(0, steps):
        p_read = p_z + (t % 2) * HALF
        p_write = p_z + (1 - t % 2) * HALF
        if p_tokens is not None:
            token = tl.load(p_tokens + i_b + row)
            o_x = token.to(tl.int64) * x_stride_b + unit
            p_tokens += B
        else:
            o_x = (i_b + row) * x_stride_b + unit
        for m in tl.range(0, SIDE, BLOCK):
            w = m + block
            mask = (w < W) & (e % PADDED < N_SIDE)
            u = load_block(p_u, o_x + w * STRIDE_W, mask, IM, PARTS)
            z = streamed(p_k + m * SIDE, p_read, u, H, SIDE, E, BLOCK, PARTS, SPLIT, SPLIT_FACTORS)
            beta = None
            if ACT == "modrelu":
                beta = tl.load(p_beta + (i_h * N + w * STRIDE_W + unit), mask=mask, other=0.0)
            h = activate(z, beta, ACT, not SPLIT, NVIDIA)
            if p_alive is not None:
                h = select(h, row_bits(tl.load(p_alive + i_g), i_row))
            store_block(p_out, o_row + w * STRIDE_W, mask, h, IM)
            x = operand(h, SPLIT, NVIDIA)
            if p_keep is not None:
                following = tl.where(t + 1 < steps, groups, 0)
                word = tl.load(p_keep + following + i_g)
                x = select_operand(x, row_bits(word, i_row), NVIDIA)
            x = narrow_product(x, s)
            write_operand(
                p_write + m * E + o_z, operand(x, SPLIT, NVIDIA), SIDE * E, TERMS * SIDE * E
            )
        tl.debug_barrier()  # the next step reads what all warps have written
        p_u += x_stride_t
        p_out += B.to(tl.int64) * F
        if p_keep is not None:
            p_keep += tl.where(t + 1 < steps, groups, 0)
        if p_alive is not None:
            p_alive += groups


@triton.jit(do_not_specialize=["B", "T", "d_stride_t", "d_stride_b"])
def wide_backward_kernel(
    p_dh,  # (T, B, PARTS·H·N), any strides of T and B, or None
    p_dh_n,  # (B, PARTS·H·N) or None
    p_h,  # (T, B, PARTS·H·N); for modtanh the pre-activations in its place
    p_dx,  # (T, B, PARTS·H·N)
    p_dh_0,  # (B, PARTS·H·N) or None
    p_k,  # (PARTS, 1 or 2 terms, H, SIDE, SIDE) bfloat16, the adjoint
    p_s,  # (PARTS, H, n, n), the adjoint
    p_z,  # (groups, H, 2, PARTS, TERMS, SIDE, E) bfloat16, zero
    p_beta,  # (H·N,) or None
    p_keep,  # (T, groups) words of row bits or None
    p_alive,  # (T, groups) words of row bits or None
    p_steps,  # (groups,) or None
    B,
    T,
    d_stride_t,
    d_stride_b,
    H: tl.constexpr,
    W: tl.constexpr,
    SIDE: tl.constexpr,
    N_SIDE: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    STRIDE_W: tl.constexpr,
    STRIDE_N: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLIT_FACTORS: tl.constexpr,
    ACT: tl.constexpr,
    FLOOR: tl.constexpr,
    NVIDIA: tl.constexpr,
):
    """G_t = σ'(z_t)ᵀ g_t,  g_{t-1} = dh_{t-1} + Aᴴ G_t conj(B),  from last step to first."""
    E: tl.constexpr = ROWS * PADDED
    N: tl.constexpr = W * N_SIDE
    F: tl.constexpr = PARTS * H * N
    IM: tl.constexpr = H * N
    TERMS: tl.constexpr = 2 if SPLIT else 1
    HALF: tl.constexpr = PARTS * TERMS * SIDE * E
    i_g = tl.program_id(0)
    i_h = tl.program_id(1)
    groups = tl.num_programs(0)
    i_b = i_g.to(tl.int64) * ROWS
    e, i_row, row, unit, block = places(i_b, B, E, PADDED, STRIDE_N, BLOCK)
    p_k += i_h.to(tl.int64) * (SIDE * SIDE)
    p_z += (i_g.to(tl.int64) * H + i_h) * (2 * HALF)
    s = narrow_factor(p_s, i_h, H, N_SIDE, PADDED, E, PARTS, SPLIT_FACTORS)
    o_z = block * E + e
    o_row = row * F + unit
    steps = T
    if p_steps is not None:
        steps = tl.load(p_steps + i_g)
    last_t = tl.maximum(steps - 1, 0).to(tl.int64)
    h_stride_t = B.to(tl.int64) * F
    start = i_b * F + i_h * N
    p_state = p_h + (start + last_t * h_stride_t)
    p_out = p_dx + (start + last_t * h_stride_t)
    if p_dh is not None:
        p_d = p_dh + (i_h * N + last_t * d_stride_t)
        o_d = (i_b + row) * d_stride_b + unit
    if p_keep is not None:
        p_keep += i_g + last_t * groups
    if p_alive is not None:
        p_alive += i_g + last_t * groups
    for i in tl.range(0, steps):
        p_read = p_z + (i % 2) * HALF
        p_write = p_z + (1 - i % 2) * HALF
        for m in tl.range(0, SIDE, BLOCK):
            w = m + block
            mask = (w < W) & (e % PADDED < N_SIDE)
            if p_dh is not None:
                g = load_block(p_d, o_d + w * STRIDE_W, mask, IM, PARTS)
            else:
                g = zeros(BLOCK, E, PARTS)
            if p_dh_n is not None:
                d = load_block(p_dh_n + start, o_row + w * STRIDE_W, mask, IM, PARTS)
                g = add(g, select(d, i == 0))
            g = streamed(p_k + m * SIDE, p_read, g, H, SIDE, E, BLOCK, PARTS, SPLIT, SPLIT_FACTORS)
            if p_alive is not None:
                g = select(g, row_bits(tl.load(p_alive), i_row))
            h = load_block(p_state, o_row + w * STRIDE_W, mask, IM, PARTS)
            beta = None
            if ACT == "modrelu":
                beta = tl.load(p_beta + (i_h * N + w * STRIDE_W + unit), mask=mask, other=0.0)
            g = activate_adjoint(g, h, h, beta, ACT, FLOOR, not SPLIT, NVIDIA)
            store_block(p_out, o_row + w * STRIDE_W, mask, g, IM)
            g = operand(g, SPLIT, NVIDIA)
            if p_keep is not None:
                g = select_operand(g, row_bits(tl.load(p_keep), i_row), NVIDIA)
            g = narrow_product(g, s)
            write_operand(
                p_write + m * E + o_z, operand(g, SPLIT, NVIDIA), SIDE * E, TERMS * SIDE * E
            )
        tl.debug_barrier()  # the next step reads what all warps have written
        p_state -= h_stride_t
        p_out -= h_stride_t
        if p_dh is not None:
            p_d -= d_stride_t
        if p_keep is not None:
            p_keep -= groups
        if p_alive is not None:
            p_alive -= groups
    if p_dh_0 is not None:
        for m in tl.range(0, SIDE, BLOCK):
            w = m + block
            mask = (w < W) & (e % PADDED < N_SIDE)
            g = zeros(BLOCK, E, PARTS)
            p_read = p_z + (steps % 2) * HALF
            g = streamed(p_k + m * SIDE, p_read, g, H, SIDE, E, BLOCK, PARTS, SPLIT, SPLIT_FACTORS)
            store_block(p_dh_0 + start, o_row + w * STRIDE_W, mask, g, IM)


def terms(k, side, split) -> torch.Tensor:
    """Factors (parts, H, W, W) as (parts, terms, H, side, side) bfloat16, padded with zeros."""
    pad = side - k.shape[-1]
    k = torch.nn.functional.pad(k, (0, pad, 0, pad))
    hi = k.bfloat16()
    return torch.stack((hi, (k - hi.float()).bfloat16()) if split else (hi,), 1)


def constant_arguments(a, b, x, wide, constants) -> dict:
    """K, S and room for Z; x gives the device and the number of batch rows in x.shape[1]."""
    parts, heads = a.shape[:2]
    k, s = (a, b) if wide.left else (b, a)
    k = terms(k, wide.side, constants["SPLIT_FACTORS"])
    groups = triton.cdiv(x.shape[1], wide.rows)
    columns = wide.rows * wide.padded
    shape = (groups, heads, 2, parts, 1 + constants["SPLIT"], wide.side, columns)
    return {"p_k": k, "p_s": packed(s), "p_z": k.new_zeros(shape)}


def wide_forward(h: Tensor, scan: Scan, how: How, **tuning) -> None:
    """Fill h (T, B, parts·H·N); the other arguments are those of `scan.scan_forward`."""
    T, B, _ = h.shape
    parts, heads, P, _ = scan.a.shape
    wide = Wide.of(P, scan.b.shape[-1])
    constants, options = wide_options(
        wide, heads, parts, how.precision, how.nonlinearity, nvidia=on_nvidia(), **tuning
    )
    keep, alive, steps = group_flags(scan, T, wide.rows)
    with device_guard(h):
        wide_forward_kernel[(triton.cdiv(B, wide.rows), heads)](
            p_h=h,
            **constant_arguments(scan.a, scan.b, h, wide, constants),
            p_beta=packed(scan.beta) if how.nonlinearity == "modrelu" else None,
            p_h_0=packed(scan.h_0),
            p_keep=keep,
            p_alive=alive,
            p_steps=steps,
            B=B,
            T=T,
            **input_arguments(scan.x, scan.tokens, wide),
            **constants,
            **options,
        )


def wide_backward(
    dx: Tensor,
    dh_0: Tensor | None,
    dh: Tensor | None,
    dh_n: Tensor | None,
    source: Tensor,
    flags: tuple[Tensor | None, Tensor | None, Tensor | None],
    scan: Scan,
    how: How,
    **tuning,
) -> None:
    """Fill dx and dh_0.

    Args:
        source: (T, B, parts·H·N), the states, or the pre-activations for modtanh.
        flags: as `launch.group_flags` returns them.
        All others are those of `scan.scan_backward`.
    """
    T, B, _ = dx.shape
    a, b = scan.a, scan.b
    parts, heads, P, _ = a.shape
    wide = Wide.of(P, b.shape[-1])
    constants, options = wide_options(
        wide, heads, parts, how.precision, how.nonlinearity, nvidia=on_nvidia(), **tuning
    )
    keep, alive, steps = flags
    with device_guard(dx):
        wide_backward_kernel[(triton.cdiv(B, wide.rows), heads)](
            p_dh=dh,
            p_dh_n=packed(dh_n),
            p_h=packed(source),
            p_dx=dx,
            p_dh_0=dh_0,
            **constant_arguments(adjoint(a), adjoint(b), dx, wide, constants),
            p_beta=packed(scan.beta) if how.nonlinearity == "modrelu" else None,
            p_keep=keep,
            p_alive=alive,
            p_steps=steps,
            B=B,
            T=T,
            d_stride_t=dh.stride(0) if dh is not None else 0,
            d_stride_b=dh.stride(1) if dh is not None else 0,
            FLOOR=floor_of(dx.dtype),
            **constants,
            **options,
        )
