"""Instructions that touch memory, each lane by itself: ld, st, cp.async, prefetch."""

import numpy as np

from .lanes import SHARED_BASE, Operands, Step
from .memory import UNWRITTEN, WARP, Arena
from .ptx import NUMPY, elements

BANKS = 32  # of shared memory, 4 bytes wide
SECTOR = 32  # bytes of global memory that are fetched together


def locate(s, space, addresses, lanes, size, verb):
    """Memory, indices (lanes, size) of the bytes at these addresses, lanes that have any."""
    memory, base = (s.memory, Arena.BASE) if space == "global" else (s.shared, SHARED_BASE)
    end = len(memory.data) if space == "global" else s.shared_size
    i = addresses[lanes].astype(np.int64) - base
    outside, misaligned = (i < 0) | (i > end - size), i % size != 0
    own = memory if space == "global" else None
    s.find("misaligned", misaligned, f"{verb} {size} bytes of {space}", lanes, own, i[:, None])
    s.find("outside", outside, f"{verb} {space}", lanes, own, i[:, None])
    keep = ~(outside | misaligned)
    i, lanes = i[keep], lanes[keep]
    if s.options.traffic:
        count_traffic(s, space, i, lanes, size, verb)
    if space == "shared":
        i = i + s.cta[lanes] * s.shared_size
    i = i[:, None] + np.arange(size)
    valid = memory.valid[i]
    if not valid.all():
        s.find("outside", ~valid, f"{verb} {space}", lanes, memory, i)
        keep = valid.all(1)
        i, lanes = i[keep], lanes[keep]
    return memory, i, lanes


def count_traffic(s, space, i, lanes, size, verb) -> None:
    """What one instruction moves, summed over the warps that execute it.

    Of global memory: requests (one a warp), sectors of 32 bytes and distinct bytes. Of shared
    memory: wavefronts, in each of which every bank serves one word of 4 bytes, and how many of
    them would do without a bank conflict. A warp's access of 8 or 16 bytes a lane is served in two
    or four parts, of 16 or 8 neighbouring lanes.
    """
    traffic = s.report.traffic
    warp = s.warp[lanes]
    if space == "global":
        unit = min(size, 4)
        bytes_ = np.unique(warp[:, None] * 2**40 + i[:, None] // unit + np.arange(size // unit))
        sectors = np.unique(bytes_ // (SECTOR // unit))  # 2^40 is a multiple of it
        traffic[f"{verb[:-1]} requests"] += len(np.unique(warp))
        traffic[f"{verb[:-1]} sectors"] += len(sectors)
        traffic[f"{verb[:-1]} bytes"] += len(bytes_) * unit
        return
    words = max(1, size // 4)
    part = (s.tid[lanes] % WARP).astype(np.int64) * words // WARP + warp * 4
    pairs = np.unique((part * 2**20)[:, None] + i[:, None] // 4 + np.arange(words))
    parts, part = np.unique(pairs // 2**20, return_inverse=True)
    banks = np.bincount(part * BANKS + pairs % BANKS, minlength=len(parts) * BANKS)
    banks = banks.reshape(-1, BANKS)
    traffic["wavefronts"] += int(banks.max(1).sum())
    traffic["wavefronts without conflicts"] += int((-(-banks.sum(1) // BANKS)).sum())


def access_kind(o: Operands) -> tuple[str, int, str]:
    """Space, vector length and type of ld and st."""
    space, *words, kind = o.mods
    known = {"relaxed", "gpu", "cta", "weak", "volatile", "ca", "cg", "nc"}
    count = 1
    for word in words:
        if word in ("v2", "v4", "v8"):
            count = int(word[1])
        elif "L1::" not in word and "L2::" not in word and word not in known:
            raise o.unknown(word)
    space = space.removesuffix("::cta")
    if space not in ("global", "shared", "param"):
        raise o.unknown(space)
    return space, count, kind


def load(o: Operands) -> Step:
    space, count, kind = access_kind(o)
    dtype, targets = NUMPY[kind], elements(o.text[0])
    if len(targets) != count:
        raise o.unknown(f"{len(targets)} registers")
    widths = [o.program.dtype(target).itemsize for target in targets]
    wider = [np.dtype(f"{'i' if dtype.kind == 'i' else 'u'}{width}") for width in widths]
    puts = [o.writer(target, f"u{width * 8}") for target, width in zip(targets, widths)]

    def put_all(s, values, m):
        for value, width, put in zip(values, wider, puts):
            put(s, value if width.itemsize == dtype.itemsize else value.astype(width), m)

    if space == "param":
        at = o.program.parameters.index(o.text[1].strip("[] "))
        return lambda s, m: put_all(s, [np.array([s.arguments[at]]).astype(dtype)], m)
    address, size = o.address(o.text[1], space), dtype.itemsize * count

    def step(s, m):
        at = address(s, m)
        s.use(m, "address")
        memory, i, good = locate(s, space, at, s.active(m), size, "loads")
        values = np.full((s.L, size), UNWRITTEN, np.uint8)
        values[good] = memory.read(s, i, good)
        put_all(s, np.ascontiguousarray(values.view(dtype).T), m)

    return step


def store(o: Operands) -> Step:
    space, count, kind = access_kind(o)
    dtype, sources = NUMPY[kind], elements(o.text[1])
    if len(sources) != count or space == "param":
        raise o.unknown(f"{len(sources)} registers")
    reads = []
    for source in sources:
        register = source.startswith("%")
        own = f"u{o.program.dtype(source).itemsize * 8}" if register else kind
        reads.append(o.reader(source, own))
    address, size = o.address(o.text[0], space), dtype.itemsize * count

    def step(s, m):
        values = np.empty((s.L, count), f"u{dtype.itemsize}")
        for n, read in enumerate(reads):
            values[:, n] = read(s, m)
        at = address(s, m)
        s.use(m, "value or address")
        memory, i, good = locate(s, space, at, s.active(m), size, "stores")
        memory.write(s, i, good, values.view(np.uint8)[good])

    return step


def prefetch(o: Operands) -> Step:
    if o.mods[0] != "global":
        raise o.unknown()
    address = o.address(o.text[0], "global")

    def step(s, m):
        lanes = s.active(m)
        i = address(s, m)[lanes].astype(np.int64) - Arena.BASE
        inside = (i >= 0) & (i < len(s.memory.data))
        inside &= s.memory.valid[np.where(inside, i, 0)]
        s.find("prefetch", ~inside, "prefetches", lanes, s.memory, i[:, None])

    return step


def copy_async(o: Operands) -> Step:
    """cp.async and its groups; the copy is made when it is waited for."""
    name = ".".join(o.mods[1:])
    if name == "commit_group":
        return copy_commit
    if name in ("wait_group", "wait_all"):
        return copy_wait(int(o.text[0], 0) if name == "wait_group" else -1)
    if name not in ("ca.shared.global", "cg.shared.global"):
        raise o.unknown()
    to, of, size = o.address(o.text[0], "shared"), o.address(o.text[1], "global"), int(o.text[2], 0)
    take = o.reader(o.text[3], "u32") if len(o.text) > 3 else None

    def step(s, m):
        at = to(s, m)
        real = s.full(np.array([size]) if take is None else take(s, m))
        s.use(m, "address or size")
        shared, i, good = locate(s, "shared", at, s.active(m), size, "stores")
        values = np.zeros((s.L, size), np.uint8)
        some = good[real[good] > 0]
        if (real[some] != size).any():
            raise o.unknown("a part of its bytes")
        memory, j, some = locate(s, "global", of(s, m), some, size, "loads")
        values[some] = memory.read(s, j, some)
        shared.check_write(s, i, good)
        shared.in_flight[i] = True
        s.copies.append((good, s.copy_group[good], i, values[good]))

    return step


def copy_commit(s, m) -> None:
    s.copy_group = s.copy_group + (1 if m is None else m)


def copy_wait(count: int) -> Step:
    def step(s, m):
        active = np.ones(s.L, bool) if m is None else m
        left = []
        for lanes, group, i, values in s.copies:
            done = active[lanes] & (group < s.copy_group[lanes] - count)
            s.shared.in_flight[i[done]] = False
            s.shared.put(s, i[done], lanes[done], values[done])
            if not done.all():
                left.append((lanes[~done], group[~done], i[~done], values[~done]))
        s.copies = left

    return step
