"""Instructions that compute registers from registers, each lane by itself."""

import functools

import numpy as np

from .lanes import Operands, Step
from .memory import WARP
from .ptx import NUMPY, elements

# ------------------------------------------------------------------------------- 16-bit floats


def bf16_to_f32(x):
    return (x.astype(np.uint32) << 16).view(np.float32)


def f32_to_bf16(x):
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def halves(x, kind: str):
    """Values (lanes, 1 or 2) in float32 of registers of 16-bit floats, the low one first."""
    x = x.view(np.uint16).reshape(len(x), -1)
    return bf16_to_f32(x) if kind.startswith("bf16") else x.view(np.float16).astype(np.float32)


def flushed(x):
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


# ------------------------------------------------------------------------------------ functions


def shift(x, n, left: bool):
    bits = x.dtype.itemsize * 8
    most = np.minimum(n, bits - 1).astype(x.dtype)
    y = x << most if left else x >> most
    return y if not left and x.dtype.kind == "i" else np.where(n >= bits, x.dtype.type(0), y)


def low_bits(n):
    """Masks of the n lowest of 64 bits."""
    n = n.astype(np.uint64) & np.uint64(0xFF)
    return np.where(
        n >= 64, ~np.uint64(0), (np.uint64(1) << np.minimum(n, np.uint64(63))) - np.uint64(1)
    )


def bit_field(x, position, length):
    bits = x.dtype.itemsize * 8
    position, length = position & 0xFF, length & 0xFF
    if x.dtype.kind == "u":
        return shift(x, position, False) & low_bits(length).astype(x.dtype)
    up = np.clip(bits - position.astype(np.int64) - length, 0, bits)
    y = shift(shift(x, up.astype(np.uint32), True), (up + position).astype(np.uint32), False)
    return np.where(length == 0, x.dtype.type(0), y)


def insert_field(a, b, position, length):
    mask = (low_bits(length) << (position & 0xFF).astype(np.uint64)).astype(b.dtype)
    return (b & ~mask) | (shift(a, position & 0xFF, True) & mask)


def permute_bytes(a, b, selector):
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.uint64(0)
    for n in range(4):
        pick = (selector >> np.uint32(4 * n)).astype(np.uint64) & np.uint64(15)
        byte = both >> ((pick & np.uint64(7)) * np.uint64(8)) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        result = result | np.where(pick & np.uint64(8), sign, byte) << np.uint64(8 * n)
    return result.astype(np.uint32)


def logic3(a, b, c, table):
    result = np.zeros_like(a | b | c)
    for n in range(8):
        if int(table[0]) >> n & 1:
            result |= (a if n & 4 else ~a) & (b if n & 2 else ~b) & (c if n & 1 else ~c)
    return result


def high_product(a, b):
    return ((a.astype(object) * b.astype(object)) >> (8 * a.dtype.itemsize)).astype(a.dtype)


def funnel(a, b, c, left: bool, wrap: bool):
    n = (c & 31 if wrap else np.minimum(c, 32)).astype(np.uint64)
    both = b.astype(np.uint64) << np.uint64(32) | a.astype(np.uint64)
    return (both << n >> np.uint64(32) if left else both >> n).astype(np.uint32)


def fused(a, b, c):
    if a.dtype.kind == "f":
        return (a.astype(np.float64) * b + c).astype(a.dtype)
    return a * b + c


COMPARE = {
    **{name: getattr(np, f) for name, f in (("eq", "equal"), ("ne", "not_equal"))},
    **dict.fromkeys(("lt", "lo"), np.less),
    **dict.fromkeys(("le", "ls"), np.less_equal),
    **dict.fromkeys(("gt", "hi"), np.greater),
    **dict.fromkeys(("ge", "hs"), np.greater_equal),
}


def compare(name: str, a, b):
    if a.dtype.kind != "f":
        return COMPARE[name](a, b)
    unordered = np.isnan(a) | np.isnan(b)
    if name in ("nan", "num"):
        return unordered if name == "nan" else ~unordered
    if name.endswith("u"):
        return COMPARE[name[:-1]](a, b) | unordered
    return COMPARE[name](a, b) & ~unordered


FLOAT = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "fma": fused,
    "min": np.fmin,
    "max": np.fmax,
    "min.NaN": np.minimum,
    "max.NaN": np.maximum,
    "neg": np.negative,
    "abs": np.abs,
    "div": np.divide,
    "sqrt": np.sqrt,
    "rcp": lambda x: np.float32(1) / x,
    "rsqrt": lambda x: (1 / np.sqrt(x.astype(np.float64))).astype(np.float32),
    "tanh": np.tanh,
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
}
INTEGER = {
    "add": np.add,
    "sub": np.subtract,
    "mul.lo": np.multiply,
    "mul.hi": high_product,
    "mad.lo": fused,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.bitwise_not,
    "neg": np.negative,
    "abs": np.abs,
    "rem": np.fmod,
    "lop3": logic3,
    "prmt": permute_bytes,
    "popc": lambda x: np.bitwise_count(x).astype(np.uint32),
}
ROUNDING = {"rn", "approx", "full"}  # rz, rm and rp are not executed
# Largest error of instructions of .f32: units in the last place, a share of the result, and
# absolute; the largest of the three holds. As in section 9.7.3 of PTX ISA 9.1; those of rcp, div,
# sqrt, sin and cos are assumed
APPROXIMATE = {
    "rcp.approx": (1, 0.0, 0.0),
    "div.full": (2, 0.0, 0.0),
    "ex2.approx": (2, 0.0, 0.0),
    "rsqrt.approx": (0, 2.0**-22.9, 0.0),
    "sqrt.approx": (0, 2.0**-23, 0.0),
    "lg2.approx": (0, 2.0**-22, 2.0**-22),
    "tanh.approx": (0, 2.0**-11, 0.0),
    "sin.approx": (0, 0.0, 2.0**-20.5),
    "cos.approx": (0, 0.0, 2.0**-20.5),
}


def noise(seed: int, *inputs):
    """Uniform in (-1, 1), and as on a device always the same for the same inputs."""
    h = np.uint64(seed)
    for x in inputs:
        h = (h ^ x.view(np.uint32).astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        h = (h ^ (h >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        h = h ^ (h >> np.uint64(32))
    return (h >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1


def disturbed(function, limits, seed: int):
    """The function with an error drawn from what is allowed."""
    ulps, relative, absolute = limits

    def approximate(*inputs):
        y = function(*inputs)
        bound = np.maximum(ulps * np.abs(np.spacing(y)), np.maximum(relative * np.abs(y), absolute))
        error = np.where(np.isfinite(y), bound, 0) * noise(seed, *inputs)
        return (y.astype(np.float64) + error).astype(np.float32)

    return approximate


# --------------------------------------------------------------------------------- instructions


def apply(o: Operands, function, kinds: list[str], result: str) -> Step:
    """Step of `result register = function(operands)`."""
    reads = [o.reader(text, kind) for text, kind in zip(o.text[1:], kinds, strict=True)]
    put = o.writer(o.text[0], result)
    return lambda s, m: put(s, function(*(r(s, m) for r in reads)), m)


def arithmetic(o: Operands) -> Step:
    kind, base, n = o.mods[-1] if o.mods else "", o.base, len(o.text) - 1
    if kind not in NUMPY or kind == "f16x2":
        raise o.unknown()
    words = [w for w in o.mods[:-1] if w not in ROUNDING and w != "ftz"]
    name = ".".join([base, *words])
    if name in ("shl", "shr"):
        return apply(o, functools.partial(shift, left=base == "shl"), [kind, "u32"], kind)
    if name == "bfe":
        return apply(o, bit_field, [kind, "u32", "u32"], kind)
    if name == "bfi":
        return apply(o, insert_field, [kind, kind, "u32", "u32"], kind)
    if base == "shf" and len(words) == 2:
        function = functools.partial(funnel, left=words[0] == "l", wrap=words[1] == "wrap")
        return apply(o, function, [kind] * 3, kind)
    if name in ("mul.wide", "mad.wide"):
        wide = f"{kind[0]}{int(kind[1:]) * 2}"

        def product(a, b):
            return a.astype(NUMPY[wide]) * b.astype(NUMPY[wide])

        if base == "mad":
            return apply(o, lambda a, b, c: product(a, b) + c, [kind, kind, wide], wide)
        return apply(o, product, [kind, kind], wide)
    if name == "popc":
        return apply(o, INTEGER[name], [kind], "u32")
    if kind.startswith("bf16"):
        return bf16_arithmetic(o, name, kind, n)
    functions = FLOAT if kind[0] == "f" else INTEGER
    if name not in functions:
        raise o.unknown()
    function, limits = functions[name], APPROXIMATE.get(f"{base}.{o.mods[0]}")
    if "ftz" in o.mods:
        plain = function
        function = lambda *v: flushed(plain(*map(flushed, v)))  # noqa: E731
    exact = apply(o, function, [kind] * n, kind)
    if not limits:
        if "approx" in o.mods or "full" in o.mods:
            raise o.unknown("its error is not in scalar.APPROXIMATE")
        return exact

    def approximate(s, m):
        seed = s.options.approximate
        if seed is None:
            return exact(s, m)
        return apply(o, disturbed(function, limits, seed), [kind] * n, kind)(s, m)

    return approximate


def bf16_arithmetic(o: Operands, name: str, kind: str, n: int) -> Step:
    """In float32, rounded once."""
    if name not in FLOAT:
        raise o.unknown()
    function = FLOAT[name]
    if name == "neg":  # a sign bit, of NaN too
        sign = NUMPY[kind].type(0x8000 if kind == "bf16" else 0x80008000)
        return apply(o, lambda x: x ^ sign, [kind], kind)

    def in_float32(*values):
        result = f32_to_bf16(function(*(halves(v, kind) for v in values)))
        return np.ascontiguousarray(result).view(NUMPY[kind])[:, 0]

    return apply(o, in_float32, [kind] * n, kind)


def select(o: Operands) -> Step:
    kind = o.mods[-1]
    a, b = (o.reader(text, kind) for text in o.text[1:3])
    p, put = o.reader(o.text[3], "pred"), o.writer(o.text[0], kind)

    def taken(s, read, m):
        """A value, and its lanes that were never written; the lanes that choose the other do not
        care."""
        before, s.tainted = s.tainted, None
        value = read(s, m)
        undefined, s.tainted = s.tainted, before
        return value, np.zeros(1, bool) if undefined is None else undefined

    def step(s, m):
        choice = p(s, m)
        (x, x_undefined), (y, y_undefined) = taken(s, a, m), taken(s, b, m)
        undefined = np.where(choice, x_undefined, y_undefined)
        if undefined.any():
            s.tainted = s.full(undefined) | (False if s.tainted is None else s.tainted)
        put(s, np.where(choice, x, y), m)

    return step


def set_predicate(o: Operands) -> Step:
    kind = o.mods[-1]
    name, *combine = (w for w in o.mods[:-1] if w != "ftz")
    puts = [o.writer(text.strip(), "pred") for text in o.text[0].split("|")]
    a, b = (o.reader(text, kind) for text in o.text[1:3])
    other = o.reader(o.text[3], "pred") if combine else None
    joins = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
    join = joins[combine[0]] if combine else None

    def step(s, m):
        x, y = a(s, m), b(s, m)
        if kind in ("bf16", "bf16x2", "f16x2"):  # a predicate for the low half, one for the high
            values = compare(name, halves(x, kind), halves(y, kind)).T
        else:
            first = compare(name, x, y)
            values = (first, ~first)
        for put, value in zip(puts, values):
            put(s, join(value, other(s, m)) if join else value, m)

    return step


def convert(o: Operands) -> Step:
    to, of = o.mods[-2:]
    words = set(o.mods[:-2])
    put = o.writer(o.text[0], to)
    if (to, of, words) == ("bf16x2", "f32", {"rn"}):
        high, low = (o.reader(text, of) for text in o.text[1:])

        def pair(s, m):
            hi, lo = (f32_to_bf16(r(s, m)).astype(np.uint32) for r in (high, low))
            put(s, hi << np.uint32(16) | lo, m)

        return pair
    floats = {"f16", "f32", "f64"}
    if (to, of, words) == ("bf16", "f32", {"rn"}):
        function = f32_to_bf16
    elif (to, of) == ("f32", "bf16") and not words - {"ftz"}:
        function = bf16_to_f32
    elif to in floats and (of in floats or of[0] in "us") and not words - {"rn"}:
        function = lambda x: x.astype(NUMPY[to])  # noqa: E731
    elif of in floats and to[0] in "us" and words in ({"rzi"}, {"rni"}):
        limits = np.iinfo(NUMPY[to])
        whole = np.trunc if words == {"rzi"} else np.rint

        def function(x):  # saturates; NaN becomes 0
            x = np.nan_to_num(whole(x.astype(np.float64)))
            return np.clip(x, limits.min, limits.max).astype(NUMPY[to])

    elif of[0] in "us" and to[0] in "us" and not words:
        function = lambda x: x.astype(NUMPY[to])  # noqa: E731
    else:
        raise o.unknown()
    return apply(o, function, [of], to)


def move(o: Operands) -> Step:
    """Of a value, or between one register and the parts of which it consists."""
    kind, (to, of) = o.mods[-1], o.text
    parts = max(len(elements(to)), len(elements(of)))
    part = f"u{NUMPY[kind].itemsize // parts * 8}"
    if parts == 1:
        return apply(o, lambda x: x, [kind], kind)
    if len(elements(to)) > 1:
        read, puts = o.reader(of, kind), o.writers(to, part)

        def unpack(s, m):
            x = s.full(read(s, m)).copy().view(NUMPY[part]).reshape(-1, parts)
            for i, put in enumerate(puts):
                put(s, np.ascontiguousarray(x[:, i]), m)

        return unpack
    put, reads = o.writer(to, kind), o.readers(of, part)

    def pack(s, m):
        x = np.stack([s.full(r(s, m)) for r in reads], 1)
        put(s, np.ascontiguousarray(x).view(NUMPY[kind])[:, 0], m)

    return pack


def shuffle(o: Operands) -> Step:
    how, (target, *inside) = o.mods[1], (t.strip() for t in o.text[0].split("|"))
    put = o.writer(target, "u32")
    put_inside = o.writer(inside[0], "pred") if inside else None
    x, n, c, members = (o.reader(text, "u32") for text in o.text[1:5])

    def step(s, m):
        if (members(s, m) == 0xFFFFFFFF).all():
            s.whole_warps(m)
        lane = (s.tid % WARP).astype(np.int64)
        b, clamp = (n(s, m) & 31).astype(np.int64), c(s, m).astype(np.int64)
        segment, clamp = clamp >> 8 & 31, clamp & 31
        least, most = lane & segment, (lane & segment) | (clamp & ~segment)
        if how == "up":
            j = lane - b
            inside = j >= most
        else:
            j = {"down": lane + b, "bfly": lane ^ b, "idx": least | (b & ~segment)}[how]
            inside = j <= most
        j = np.where(inside, j, lane) + s.every // WARP * WARP
        value = s.full(x(s, m))
        s.tainted = None if s.tainted is None else s.tainted[j]
        put(s, value[j], m)
        if m is not None:
            s.find("undefined", m & ~m[j], "reads an inactive lane")
        if put_inside:
            put_inside(s, inside, m)

    return step
