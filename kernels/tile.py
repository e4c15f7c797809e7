"""What the kernels share: a tile of hidden states that never leaves the registers of its warp.

A tile holds the states of ROWS = S1·S2 batch rows as one matrix X, (PE, QE) = (S1·PP, S2·QP): the
matrices of several rows side by side where one is smaller than a tensor core wants. PP and QP are P
and Q rounded up to a power of two, and what they add is zero. The factors become block-diagonal,
I ⊗ A and I ⊗ B, and the step keeps its form, X ← A X Bᵀ.

Memory plan. A product is taken as `B flip(X)` and then `A flip(Z)`: `flip` turns an accumulator
(M, K) into the second operand (K, M) of the next product, which for mma fragments renames registers
and moves nothing. A thread (g, j) of the warp owns the accumulator columns {8m+2j, 8m+2j+1},
whereas a vector load gives it V contiguous ones, so the columns are re-indexed once, in the
constant B:

    memory column  q  = (chunk, h: 4, m: V/2, l: 2)
    tile column    q' = (chunk, m: V/2, h: 4, l: 2)

and `to_tile`, `from_tile` are register renames too. Loads are rank-2 tiles [(chunk, row), 4V] with
`max_contiguous` and `multiple_of` V: the only form for which every supported Triton splits a warp
8 × 4. Padded tiles get the same hints, and masks that keep their accesses narrow enough.

A complex value is a tuple (re, im) of planes, a real one is (re,). An mma operand holds for each
plane a tuple (hi,) of bfloat16, or (hi, lo) with hi + lo ≈ float32. Products are taken term by
term, small ones first and without lo·lo: three where both operands are pairs, in "fp32" precision
(relative error 2⁻¹⁷ of a product); two in "bf16x2", whose factors alone are pairs; one in "bf16".

    P, Q    shape of one hidden state            S1, S2  states side by side down and across
    PP, QP  the same, powers of two              PE, QE  shape of the tile
    N       P·Q, units of one head               V       columns of a thread in one load
    H       heads                                PARTS   2 complex, 1 real
"""

import os

import triton
import triton.language as tl

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on"))


@triton.jit
def round_bf16(x):
    """Float32 rounded to the nearest bfloat16; in the interpreter, whose bfloat16 arithmetic is
    wrong, the rounded value stays float32."""
    if INTERPRET:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return bits.to(tl.float32, bitcast=True)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def to_memory(x, dtype: tl.constexpr):
    """Float32 in the type of memory (the interpreter's own cast truncates)."""
    if dtype == tl.bfloat16:
        return round_bf16(x).to(tl.bfloat16)
    else:
        return x.to(dtype)


@triton.jit
def split(x, SPLIT: tl.constexpr, NVIDIA: tl.constexpr):
    """Float32 to the bfloat16 terms of an operand: (hi, lo) or (hi,)."""
    if SPLIT:
        if NVIDIA:  # two at once: a rounding of which the value goes on takes the slow converter
            hi = tl.inline_asm_elementwise(
                "cvt.rn.bf16x2.f32 $0, $2, $1;",
                "=r,r,r",
                [x],
                dtype=tl.bfloat16,
                is_pure=True,
                pack=2,
            )
        else:
            hi = round_bf16(x)
        return hi, round_bf16(x - hi.to(tl.float32))
    else:
        return (round_bf16(x),)


@triton.jit
def operand(x, SPLIT: tl.constexpr, NVIDIA: tl.constexpr):
    """A value's planes to operand planes."""
    if len(x) == 2:
        return split(x[0], SPLIT, NVIDIA), split(x[1], SPLIT, NVIDIA)
    else:
        return (split(x[0], SPLIT, NVIDIA),)


@triton.jit
def flip_terms(x, M: tl.constexpr, K: tl.constexpr):
    # rank 3, never tl.trans: Triton 3.6 would take dot(trans(accumulator)) through shared memory
    if len(x) == 2:
        return (
            tl.reshape(tl.permute(tl.reshape(x[0], (M, 1, K)), (2, 1, 0)), (K, M)),
            tl.reshape(tl.permute(tl.reshape(x[1], (M, 1, K)), (2, 1, 0)), (K, M)),
        )
    else:
        return (tl.reshape(tl.permute(tl.reshape(x[0], (M, 1, K)), (2, 1, 0)), (K, M)),)


@triton.jit
def flip(x, M: tl.constexpr, K: tl.constexpr):
    """Transpose of an operand (M, K)."""
    if len(x) == 2:
        return flip_terms(x[0], M, K), flip_terms(x[1], M, K)
    else:
        return (flip_terms(x[0], M, K),)


@triton.jit
def dot(w, x, acc):
    """acc + w x for the terms of two real operands."""
    if len(w) == 2:
        acc = tl.dot(w[1], x[0], acc)
    if len(x) == 2:
        acc = tl.dot(w[0], x[1], acc)
    return tl.dot(w[0], x[0], acc)


@triton.jit
def product(w, x, acc):
    """acc + w x; a complex constant w is (re, im, -im), or (re, im) and then x is negated."""
    if len(w) == 3:
        re = dot(w[2], x[1], dot(w[0], x[0], acc[0]))
        return re, dot(w[1], x[0], dot(w[0], x[1], acc[1]))
    elif len(w) == 2:
        re = dot(w[1], negated(x[1]), dot(w[0], x[0], acc[0]))
        return re, dot(w[1], x[0], dot(w[0], x[1], acc[1]))
    else:
        return (dot(w[0], x[0], acc[0]),)


@triton.jit
def zeros(M: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr):
    if PARTS == 2:
        return tl.zeros((M, K), tl.float32), tl.zeros((M, K), tl.float32)
    else:
        return (tl.zeros((M, K), tl.float32),)


@triton.jit
def first_product(
    b,
    x,
    PE: tl.constexpr,
    QE: tl.constexpr,
    PARTS: tl.constexpr,
    SPLIT: tl.constexpr,
    NVIDIA: tl.constexpr,
):
    """The operand Z = (X Bᵀ)ᵀ, (QE, PE), of an operand X."""
    return operand(product(b, flip(x, PE, QE), zeros(QE, PE, PARTS)), SPLIT, NVIDIA)


@triton.jit
def second_product(a, z, acc, PE: tl.constexpr, QE: tl.constexpr):
    """acc + A Zᵀ, with Z of `first_product` acc + A X Bᵀ."""
    return product(a, flip(z, QE, PE), acc)


@triton.jit
def kron(
    a,
    b,
    x,
    acc,
    PE: tl.constexpr,
    QE: tl.constexpr,
    PARTS: tl.constexpr,
    SPLIT: tl.constexpr,
    NVIDIA: tl.constexpr,
):
    """acc + A X Bᵀ."""
    z = first_product(b, x, PE, QE, PARTS, SPLIT, NVIDIA)
    return second_product(a, z, acc, PE, QE)


@triton.jit
def row_bits(word, i_row):
    """Bit of each element's batch row in a word that holds one bit a row."""
    return ((word >> i_row) & 1) > 0


@triton.jit
def tile_bits(
    word,
    PE: tl.constexpr,
    QE: tl.constexpr,
    PP: tl.constexpr,
    QP: tl.constexpr,
    S1: tl.constexpr,
):
    """The same for the elements of a tile (PE, QE)."""
    i_s1 = tl.arange(0, PE)[:, None] // PP
    i_s2 = tl.arange(0, QE)[None, :] // QP
    return row_bits(word, i_s2 * S1 + i_s1)


@triton.jit
def scale(x, factor):
    if len(x) == 2:
        return x[0] * factor, x[1] * factor
    else:
        return (x[0] * factor,)


@triton.jit
def select(x, condition):
    """x where the condition holds; else 0, were x infinite or NaN."""
    if len(x) == 2:
        return tl.where(condition, x[0], 0.0), tl.where(condition, x[1], 0.0)
    else:
        return (tl.where(condition, x[0], 0.0),)


@triton.jit
def select_term(x, condition, NVIDIA: tl.constexpr):
    if NVIDIA:  # two values at once; LLVM would take apart what `split` packed in pairs
        return tl.inline_asm_elementwise(
            "and.b32 $0, $1, $2;",
            "=r,r,r",
            [x, tl.where(condition, -1, 0).to(tl.int16)],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    else:
        return tl.where(condition, x, 0.0)


@triton.jit
def select_terms(x, condition, NVIDIA: tl.constexpr):
    if len(x) == 2:
        return select_term(x[0], condition, NVIDIA), select_term(x[1], condition, NVIDIA)
    else:
        return (select_term(x[0], condition, NVIDIA),)


@triton.jit
def select_operand(x, condition, NVIDIA: tl.constexpr):
    """`select` for an operand."""
    if len(x) == 2:
        return select_terms(x[0], condition, NVIDIA), select_terms(x[1], condition, NVIDIA)
    else:
        return (select_terms(x[0], condition, NVIDIA),)


@triton.jit
def choose(condition, x, y):
    """x where the condition holds, else y."""
    if len(x) == 2:
        return tl.where(condition, x[0], y[0]), tl.where(condition, x[1], y[1])
    else:
        return (tl.where(condition, x[0], y[0]),)


@triton.jit
def no_value(x):
    """Zeros in the place of loaded planes."""
    if len(x) == 2:
        return tl.zeros_like(x[0]), tl.zeros_like(x[1])
    else:
        return (tl.zeros_like(x[0]),)


@triton.jit
def rounded_product(x, y, NVIDIA: tl.constexpr):
    """x y, rounded even where it is subtracted from next.

    `operand` takes h apart into hi + lo. Fused into lo = x y - hi, the product would keep bits that
    the h in memory does not have, and a run that goes on from there would differ from one that was
    never cut."""
    if NVIDIA:
        return tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=r,r,r", [x, y], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return x * y


@triton.jit
def multiply(g, x, NVIDIA: tl.constexpr):
    """g x, element by element; g may be real where x is complex."""
    if len(g) < len(x):
        return rounded_product(g[0], x[0], NVIDIA), rounded_product(g[0], x[1], NVIDIA)
    elif len(x) == 2:
        re = tl.fma(g[0], x[0], -g[1] * x[1])
        return re, tl.fma(g[0], x[1], g[1] * x[0])
    else:
        return (rounded_product(g[0], x[0], NVIDIA),)


@triton.jit
def multiply_conj(g, x, NVIDIA: tl.constexpr):
    """conj(g) x, element by element; g may be real where x is complex."""
    if len(g) < len(x):
        return g[0] * x[0], g[0] * x[1]
    elif len(x) == 2:
        re = tl.fma(g[0], x[0], g[1] * x[1])
        return re, tl.fma(g[0], x[1], -g[1] * x[0])
    else:
        return (rounded_product(g[0], x[0], NVIDIA),)


@triton.jit
def real_of_multiply_conj(g, x):
    """The real part of conj(g) x, element by element, of complex g and x."""
    return (tl.fma(g[0], x[0], g[1] * x[1]),)


@triton.jit
def add(x, y):
    if len(x) == 2:
        return x[0] + y[0], x[1] + y[1]
    else:
        return (x[0] + y[0],)


@triton.jit
def memory_column(j, V: tl.constexpr):
    """Tile column (chunk, m, h, l) to memory column (chunk, h, m, l)."""
    return (j // (4 * V)) * (4 * V) + ((j // 2) % 4) * V + ((j // 8) % (V // 2)) * 2 + j % 2


@triton.jit
def factor_plane(
    p_factor,
    SIDE: tl.constexpr,
    PADDED: tl.constexpr,
    S: tl.constexpr,
    V: tl.constexpr,
    MAPPED: tl.constexpr,
):
    """I_S ⊗ factor in float32, (S·PADDED, S·PADDED), its columns and rows re-indexed if MAPPED."""
    E: tl.constexpr = S * PADDED
    i = tl.arange(0, E)
    if MAPPED:
        i = memory_column(i, V)
    s = i // PADDED
    k = i % PADDED
    inside = (s[:, None] == s[None, :]) & (k < SIDE)[:, None] & (k < SIDE)[None, :]
    return tl.load(p_factor + k[:, None] * SIDE + k[None, :], mask=inside, other=0.0)


@triton.jit
def anchor(w, E: tl.constexpr, ANCHORED: tl.constexpr):
    """A constant operand, passed through an identity product if ANCHORED.

    It then lives in the accumulator layout, from which operand 0 is a register rename; without it
    Triton converts the constant again in every step.
    """
    if ANCHORED:
        i = tl.arange(0, E)
        eye = round_bf16((i[:, None] == i[None, :]).to(tl.float32))
        if len(w) == 2:
            return round_bf16(tl.dot(eye, w[0])), round_bf16(tl.dot(eye, w[1]))
        else:
            return (round_bf16(tl.dot(eye, w[0])),)
    else:
        return w


@triton.jit
def negated(w):
    if len(w) == 2:
        return -w[0], -w[1]
    else:
        return (-w[0],)


@triton.jit
def load_factor(
    p_factor,
    i_h,
    H: tl.constexpr,
    SIDE: tl.constexpr,
    PADDED: tl.constexpr,
    S: tl.constexpr,
    V: tl.constexpr,
    MAPPED: tl.constexpr,
    PARTS: tl.constexpr,
    SPLIT: tl.constexpr,
    ANCHORED: tl.constexpr,
):
    """Constant operand of head i_h from factors (PARTS, H, SIDE, SIDE): (re,) or (re, im, -im)."""
    p_re = p_factor + i_h * SIDE * SIDE
    re = anchor(
        split(factor_plane(p_re, SIDE, PADDED, S, V, MAPPED), SPLIT, False), S * PADDED, ANCHORED
    )
    if PARTS == 2:
        p_im = p_re + H * SIDE * SIDE
        im = split(factor_plane(p_im, SIDE, PADDED, S, V, MAPPED), SPLIT, False)
        im = anchor(im, S * PADDED, ANCHORED)
        return re, im, negated(im)
    else:
        return (re,)


@triton.jit
def coordinates(
    PP: tl.constexpr, QP: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr, V: tl.constexpr
):
    """Batch row within the group, p and q of every element of a loaded tile [(chunk, row), 4V]."""
    PE: tl.constexpr = S1 * PP
    CHUNKS: tl.constexpr = S2 * QP // (4 * V)
    row = tl.arange(0, CHUNKS * PE)
    column = (row // PE * (4 * V))[:, None] + tl.arange(0, 4 * V)[None, :]
    i_row = column // QP * S1 + (row % PE // PP)[:, None]
    return i_row, (row % PP)[:, None], column % QP


@triton.jit
def offsets(
    last_row,
    stride_b,
    P: tl.constexpr,
    Q: tl.constexpr,
    PP: tl.constexpr,
    QP: tl.constexpr,
    S1: tl.constexpr,
    S2: tl.constexpr,
    V: tl.constexpr,
):
    """Element offsets of a loaded tile whose batch rows lie stride_b elements apart.

    Rows past last_row repeat it: they compute and store the very same values, so the end of the
    batch needs no mask.
    """
    i_row, p, q = coordinates(PP, QP, S1, S2, V)
    if S1 * PP * S2 * QP <= 512:  # widened before the base is added, distances become immediates
        p = p.to(tl.int64)
    offset = p * Q + q
    if S1 * S2 > 1:
        offset = tl.minimum(i_row, last_row).to(tl.int64) * stride_b + offset
    return offset


@triton.jit
def inside(
    P: tl.constexpr,
    Q: tl.constexpr,
    PP: tl.constexpr,
    QP: tl.constexpr,
    S1: tl.constexpr,
    S2: tl.constexpr,
    V: tl.constexpr,
):
    """Mask of a loaded tile's elements that are not padding."""
    _, p, q = coordinates(PP, QP, S1, S2, V)
    return (p < P) & (q < Q)


@triton.jit
def pointers(p_tile, offset, VECTOR: tl.constexpr):
    """Pointers of a tile of which a thread holds VECTOR neighbours.

    The hints, not the analysis, choose the layout. Where rows are not aligned to VECTOR elements
    they claim too much, and the mask of the padded columns, constant over gcd(Q, VECTOR) of them,
    keeps each single access as narrow as it has to be.
    """
    BYTES: tl.constexpr = VECTOR * p_tile.dtype.element_ty.primitive_bitwidth // 8
    # of one alone, Triton 3.6 would have lanes follow each other down a column
    RUN: tl.constexpr = VECTOR if VECTOR > 1 else 2
    return tl.multiple_of(tl.max_contiguous(p_tile + offset, [1, RUN]), [1, BYTES])


@triton.jit
def load(p_tile, offset, mask, IMAGINARY: tl.constexpr, PARTS: tl.constexpr, VECTOR: tl.constexpr):
    """Planes of a tile as they lie in memory; the imaginary ones IMAGINARY elements further on."""
    other = None
    if mask is not None:
        other = 0.0
    re = tl.load(pointers(p_tile, offset, VECTOR), mask=mask, other=other)
    if PARTS == 2:
        p_im = p_tile + IMAGINARY
        return re, tl.load(pointers(p_im, offset, VECTOR), mask=mask, other=other)
    else:
        return (re,)


@triton.jit
def store(
    p_tile,
    offset,
    mask,
    x,
    IMAGINARY: tl.constexpr,
    PE: tl.constexpr,
    QE: tl.constexpr,
    V: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Store a value's planes in the type of memory."""
    dtype: tl.constexpr = p_tile.dtype.element_ty
    tl.store(
        pointers(p_tile, offset, VECTOR), from_tile(to_memory(x[0], dtype), PE, QE, V), mask=mask
    )
    if len(x) == 2:
        p_im = pointers(p_tile + IMAGINARY, offset, VECTOR)
        tl.store(p_im, from_tile(to_memory(x[1], dtype), PE, QE, V), mask=mask)


@triton.jit
def words_of(p_tile, WORD: tl.constexpr):
    """Pointer to the words of WORD elements."""
    if WORD == 2:
        return p_tile.to(tl.pointer_type(tl.int32))
    else:
        return p_tile


@triton.jit
def from_words(x, NVIDIA: tl.constexpr):
    """Words of two bfloat16 values in float32, (..., 2)."""
    lo = (x << 16).to(tl.float32, bitcast=True)
    hi = (x & -65536).to(tl.float32, bitcast=True)
    x = tl.join(lo, hi)
    if NVIDIA:  # not pure: were the join seen in an operand's history, Triton would shuffle it
        x = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=False, pack=1
        )
    return x


@triton.jit
def plane_to_tile(x, PE: tl.constexpr, QE: tl.constexpr, V: tl.constexpr, NVIDIA: tl.constexpr):
    if x.dtype == tl.int32:
        x = from_words(x, NVIDIA)
    x = tl.reshape(x, (QE // (4 * V), PE, 4, V // 2, 2))
    return tl.reshape(tl.permute(x, (1, 0, 3, 2, 4)), (PE, QE)).to(tl.float32)


@triton.jit
def from_tile(x, PE: tl.constexpr, QE: tl.constexpr, V: tl.constexpr):
    x = tl.reshape(x, (PE, QE // (4 * V), V // 2, 4, 2))
    return tl.reshape(tl.permute(x, (1, 0, 3, 2, 4)), (QE // (4 * V) * PE, 4 * V))


@triton.jit
def to_tile(x, PE: tl.constexpr, QE: tl.constexpr, V: tl.constexpr, NVIDIA: tl.constexpr):
    """Loaded planes, of elements or of words, as a float32 value of shape (PE, QE)."""
    if len(x) == 2:
        return plane_to_tile(x[0], PE, QE, V, NVIDIA), plane_to_tile(x[1], PE, QE, V, NVIDIA)
    else:
        return (plane_to_tile(x[0], PE, QE, V, NVIDIA),)


@triton.jit
def reciprocal(x, NVIDIA: tl.constexpr):
    if NVIDIA:  # a plain division is a slow one; 1 ulp is enough
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def rsqrt(x, NVIDIA: tl.constexpr):
    if NVIDIA:  # what tl.rsqrt compiles to, but opaque to LLVM: 10 % fewer instructions around it
        return tl.inline_asm_elementwise(
            "rsqrt.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.rsqrt(x)


@triton.jit
def tanh(x, FAST: tl.constexpr, NVIDIA: tl.constexpr):
    """tanh; with FAST the hardware's (relative error 2⁻¹¹), else to float32 rounding."""
    if FAST and NVIDIA:
        return tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        # 1 - 2/(e^2x + 1) goes to ±1 where e^2x is inf or 0; near 0 it cancels, so a series there
        x2 = x * x
        series = x + x * x2 * (-1 / 3 + x2 * (2 / 15 + x2 * (-17 / 315 + x2 * (62 / 2835))))
        return tl.where(x2 < 0.0625, series, 1.0 - 2.0 * reciprocal(tl.exp(2.0 * x) + 1.0, NVIDIA))
