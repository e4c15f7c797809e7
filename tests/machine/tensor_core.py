"""Instructions of whole warps: ldmatrix, stmatrix, mma.sync and wgmma."""

import re

import numpy as np

from .access import locate
from .lanes import SHARED_BASE, Operands, Step
from .memory import WARP
from .ptx import elements
from .scalar import bf16_to_f32

# Hopper's tensor core adds up to 16 products and the accumulator at once: the terms are aligned to
# the largest of their exponents and cut to 25 bits behind its point, and the sum is cut to float32;
# sm_80 takes 8 products at a time and keeps 24 bits (Xie et al., MMA-Sim, arXiv 2511.10909, whose
# code, github.com/microsoft/MMA-Sim, names these numbers). Assumed: that no exponent is below -126.
TERMS, BITS = {80: 8, 90: 16}, {80: 24, 90: 25}


def by_warp(values, warps):
    """Registers (lanes,) as (registers, warps, lanes of a warp)."""
    return np.stack([v.reshape(-1, WARP)[warps] for v in values])


def put_warps(s, puts, values, warps, m) -> None:
    """Write (registers, warps, lanes of a warp) to registers."""
    for put, value in zip(puts, values):
        full = np.zeros((s.L // WARP, WARP), value.dtype)
        full[warps] = value
        put(s, full.reshape(-1), m)


# ------------------------------------------------------------------------------------- products


def exponent(x):
    """e with 2^e <= |x| < 2^(e+1); that of zero is below all others."""
    return np.where(x == 0, -(2**20), np.frexp(x)[1] - 1)


def truncated(x, bits):
    """x cut to multiples of 2^bits."""
    return np.ldexp(np.trunc(np.ldexp(x, -bits)), bits)


def to_zero(x):
    """Float64 cut to float32, not rounded."""
    y = x.astype(np.float32)
    return np.where(np.abs(y.astype(np.float64)) > np.abs(x), np.nextafter(y, np.float32(0)), y)


def truncating_dot(x, y, c, capability: int):
    """The same as `dot`, added as the tensor cores of a device do."""
    terms, bits = TERMS[capability], BITS[capability]
    for k in range(0, 16, terms):
        u, v = x[..., :, None, k : k + terms], y[..., None, :, k : k + terms]
        products = np.concatenate((u * v, c.astype(np.float64)[..., None]), -1)
        exponents = np.concatenate((exponent(u) + exponent(v), exponent(c)[..., None]), -1)
        most = np.maximum(exponents.max(-1, keepdims=True), -126)
        c = to_zero(truncated(products, most - bits).sum(-1))
    return c


def dot(s, x, y, c):
    """x (..., M, 16) times y (..., N, 16) plus c (..., M, N), in float32."""
    if s.options.truncate:
        return truncating_dot(x, y, c, s.program.capability)
    return (x @ y.swapaxes(-1, -2) + c).astype(np.float32)


def fragment_a(values):
    """(4, warps, 32) registers of 16-bit pairs as (warps, 16, 16)."""
    x = values.view(np.uint16).reshape(2, 2, -1, 8, 4, 2)  # k half, row half, warp, g, j, e
    return x.transpose(2, 1, 3, 0, 4, 5).reshape(-1, 16, 16)


def to_float64(x, kind: str):
    return (bf16_to_f32(x) if kind == "bf16" else x.view(np.float16)).astype(np.float64)


def multiply(o: Operands) -> Step:
    """mma.sync m16n8k16 of bfloat16 or float16 into float32."""
    kind = o.mods[-3]
    shape = f"sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32"
    if ".".join(o.mods) != shape or kind not in ("bf16", "f16"):
        raise o.unknown()
    puts, a, b = o.writers(o.text[0], "f32"), *(o.readers(text, "u32") for text in o.text[1:3])
    c = o.readers(o.text[3], "f32")

    def step(s, m):
        warps = s.whole_warps(m)
        x = to_float64(fragment_a(by_warp([r(s, m) for r in a], warps)), kind)
        y = by_warp([r(s, m) for r in b], warps).view(np.uint16).reshape(2, -1, 8, 4, 2)
        y = to_float64(y.transpose(1, 2, 0, 3, 4).reshape(-1, 8, 16), kind)
        acc = by_warp([s.full(r(s, m)) for r in c], warps)
        acc = acc.reshape(2, 2, -1, 8, 4).transpose(2, 0, 3, 4, 1)  # warp, row half, g, j, e
        s.use(m, "operand")
        d = dot(s, x, y, acc.reshape(-1, 16, 8)).reshape(-1, 2, 8, 4, 2)
        put_warps(s, puts, d.transpose(1, 4, 0, 2, 3).reshape(4, -1, WARP), warps, m)

    return step


# --------------------------------------------------------------- matrices 8 x 8 in shared memory

MATRIX_WORDS = {"sync", "aligned", "m8n8", "shared", "shared::cta", "b16", "trans"}


def matrix_rows(s, address, warps, count, m, verb):
    """Memory, indices (warps x matrices x 8 rows, 16 bytes), and the lanes that give them."""
    lanes = (warps[:, None] * WARP + np.arange(8 * count)).reshape(-1)
    memory, i, good = locate(s, "shared", address(s, m), lanes, 16, verb)
    return memory, i if len(good) == len(lanes) else None, good


def load_matrix(o: Operands) -> Step:
    puts = o.writers(o.text[0], "u32")
    address, count = o.address(o.text[1], "shared"), len(puts)
    if set(o.mods) - MATRIX_WORDS != {f"x{count}"}:
        raise o.unknown()

    def step(s, m):
        warps = s.whole_warps(m)
        memory, i, lanes = matrix_rows(s, address, warps, count, m, "loads")
        x = np.full((len(warps), count, 8, 8), 0xFFFF, np.uint16)
        if i is not None:
            x = memory.read(s, i, lanes, collective=True).view(np.uint16).reshape(x.shape)
        if "trans" in o.mods:
            x = x.swapaxes(2, 3)
        x = np.ascontiguousarray(x).view(np.uint32).reshape(-1, count, WARP).swapaxes(0, 1)
        put_warps(s, puts, x, warps, m)
        s.whole_warps(m)

    return step


def store_matrix(o: Operands) -> Step:
    reads = o.readers(o.text[1], "u32")
    address, count = o.address(o.text[0], "shared"), len(reads)
    if set(o.mods) - MATRIX_WORDS != {f"x{count}"}:
        raise o.unknown()

    def step(s, m):
        warps = s.whole_warps(m)
        x = by_warp([r(s, m) for r in reads], warps).swapaxes(0, 1)
        s.use(m, "value")
        x = np.ascontiguousarray(x).view(np.uint16).reshape(-1, count, 8, 8)
        if "trans" in o.mods:
            x = np.ascontiguousarray(x.swapaxes(2, 3))
        memory, i, lanes = matrix_rows(s, address, warps, count, m, "stores")
        if i is not None:
            memory.write(s, i, lanes, x.view(np.uint8).reshape(-1, 16))

    return step


# --------------------------------------------------------------------------------------- wgmma

SWIZZLE = {0: 16, 1: 128, 2: 64, 3: 32}  # bytes of a row of an atom


def described(s, descriptor, rows, transposed, readers, o):
    """Operand (groups, rows, 16) of 16-bit elements that descriptors (groups,) point to."""

    def part(bit, n):
        return (descriptor >> np.uint64(bit) & np.uint64((1 << n) - 1)).astype(np.int64)

    start, leading, stride = (part(bit, 14) << 4 for bit in (0, 16, 32))
    mode = int(part(62, 2)[0])
    # it says where the pattern of a swizzle begins; Triton 3.9 sets it where there is none, too
    if (part(62, 2) != mode).any() or (mode and part(49, 3).any()):
        raise o.unknown("descriptor with a base offset")
    width = SWIZZLE[mode]
    r, k = np.arange(rows)[:, None], np.arange(16)[None, :]
    leading, stride = leading[:, None, None], stride[:, None, None]
    if not transposed and mode:
        offset = r // 8 * stride + r % 8 * width + 2 * k
    elif not transposed:
        offset = r // 8 * stride + r % 8 * 16 + k // 8 * leading + k % 8 * 2
    elif mode:
        atom = width // 2
        offset = r // atom * leading + r % atom * 2 + k // 8 * stride + k % 8 * width
    else:
        offset = r // 8 * stride + r % 8 * 2 + k // 8 * leading + k % 8 * 16
    at = start[:, None, None] + offset
    if mode:
        at ^= (at >> 7 & (width // 16 - 1)) << 4
    i = at - SHARED_BASE
    bad = ((i < 0) | (i + 2 > s.shared_size)).reshape(len(i), -1)
    s.find("outside", bad, "wgmma reads", readers[:, 0], None, i.reshape(len(i), -1))
    i = np.clip(i, 0, s.shared_size - 2) + (s.cta[readers[:, 0]] * s.shared_size)[:, None, None]
    i = (i[..., None] + np.arange(2)).reshape(len(i), -1)
    for n in range(readers.shape[1]):
        data = s.shared.read(s, i, readers[:, n], collective=True, proxy=True)
    s.shared.in_use[i] = True
    s.in_use.append((i, 0))
    return np.ascontiguousarray(data).view(np.uint16).reshape(len(i), rows, 16)


def group_multiply(o: Operands) -> Step:
    """wgmma.mma_async m64nNk16 of bfloat16 or float16 into float32."""
    shape, kind = re.fullmatch(r"m64n(\d+)k16", o.mods[3]), o.mods[-1]
    if not shape or o.mods[-3:] != ["f32", kind, kind] or kind not in ("bf16", "f16"):
        raise o.unknown()
    n, targets = int(shape[1]), elements(o.text[0])
    puts, reads = o.writers(o.text[0], "f32"), o.readers(o.text[0], "f32")
    under_way = [o.program.register(target) for target in targets]
    from_registers = o.text[1].startswith("{")
    if from_registers:
        a = o.readers(o.text[1], "u32")
        under_way += [o.program.register(register) for register in elements(o.text[1])]
    else:
        a = o.reader(o.text[1], "b64")
    b, accumulates = o.reader(o.text[2], "b64"), o.reader(o.text[3], "pred")
    sign = int(o.text[4], 0) * int(o.text[5], 0)
    transposed = [int(text, 0) for text in o.text[6:]]
    transposed_a, transposed_b = [0, 0, *transposed][-2:]

    def step(s, m):
        warps = s.whole_warps(m)
        readers = warps.reshape(-1, 4) * WARP  # first lanes of the four warps of each group
        for index in under_way:  # one wgmma after another is in order
            s.in_flight.pop(index, None)
        first = readers[:, 0]
        y = to_float64(described(s, s.full(b(s, m))[first], n, transposed_b, readers, o), kind)
        if from_registers:
            x = fragment_a(by_warp([r(s, m) for r in a], warps)).reshape(-1, 64, 16)
        else:
            x = described(s, s.full(a(s, m))[first], 64, transposed_a, readers, o)
        s.use(m, "operand")
        x, use = to_float64(x, kind) * sign, s.full(accumulates(s, m))[first]
        c = np.zeros((len(first), 64, n), np.float32)
        if use.any():
            c = by_warp([s.full(r(s, m)) for r in reads], warps)
            c = c.reshape(n // 8, 2, 2, -1, 4, 8, 4)  # n block, row half, e, group, warp, g, j
            c = c.transpose(3, 4, 1, 5, 0, 6, 2).reshape(-1, 64, n)
            c = np.where(use[:, None, None], c, np.float32(0))
        d = dot(s, x, y, c).reshape(-1, 4, 2, 8, n // 8, 4, 2).transpose(4, 2, 6, 0, 1, 3, 5)
        put_warps(s, puts, d.reshape(n // 2, len(warps), WARP), warps, m)
        s.in_flight |= dict.fromkeys(under_way, 0)

    return step


def group(o: Operands) -> Step:
    """wgmma and its groups."""
    if o.mods[0] == "mma_async":
        return group_multiply(o)
    if o.mods[0] == "commit_group":
        return group_commit
    if o.mods[0] == "wait_group":
        return group_wait(int(o.text[0], 0))
    if o.mods[0] == "fence":
        return lambda s, m: None
    raise o.unknown()


def group_commit(s, m) -> None:
    s.in_flight = {index: n + 1 for index, n in s.in_flight.items()}
    s.in_use = [(i, n + 1) for i, n in s.in_use]


def group_wait(count: int) -> Step:
    def step(s, m):
        s.in_flight = {index: n for index, n in s.in_flight.items() if n <= count}
        for i, _ in s.in_use:
            s.shared.in_use[i] = False
        s.in_use = [(i, n) for i, n in s.in_use if n <= count]
        for i, _ in s.in_use:
            s.shared.in_use[i] = True

    return step
