"""Memory that knows of every byte who wrote it and who has read it since, and what was found."""

import functools
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

WARP = 32
GUARD = 4096  # bytes between the buffers of global memory
UNWRITTEN = 0xFF  # every byte of memory that holds nothing yet: a NaN in every float type
NOBODY, SEVERAL = -1, -2


@dataclass
class Finding:
    """What a correct program would not do; the kinds are listed in `machine`."""

    kind: str
    where: str  # instruction and source line
    first: str  # details of the first occurrence
    count: int = 0

    def __str__(self) -> str:
        return f"{self.kind}: {self.where}: {self.first} ({self.count} times)"


@dataclass
class Report:
    """What a launch did."""

    findings: dict[tuple[str, str], Finding] = field(default_factory=dict)
    executed: Counter = field(default_factory=Counter)  # opcode: instructions, counted per warp
    traffic: Counter = field(default_factory=Counter)  # see `access.count_traffic`

    def add(self, kind: str, where: str, detail: str, count: int) -> None:
        self.findings.setdefault((kind, where), Finding(kind, where, detail)).count += count

    @property
    def kinds(self) -> set[str]:
        return {kind for kind, _ in self.findings}


class Memory:
    """Bytes, with their last writer and their readers since the last barrier.

    Threads, warps and CTAs are numbered through the whole grid. `s` is the state of the lanes that
    run (see `lanes`); it counts the barriers of each CTA and warp, and the instructions at which a
    warp came together. Methods take indices of bytes (lanes, width) and the lanes they belong to.
    """

    def __init__(self, size: int):
        def full(value, dtype):
            return np.full(size, value, dtype)

        self.data = full(UNWRITTEN, np.uint8)
        self.valid = full(True, bool)
        self.defined = full(False, bool)
        self.in_flight = full(False, bool)  # cp.async writes it
        self.in_use = full(False, bool)  # wgmma reads it
        self.writer = full(NOBODY, np.int32)  # thread
        self.write_cta_epoch, self.write_warp_epoch, self.write_fence = (
            full(0, np.int32) for _ in range(3)
        )
        self.reader_cta, self.reader_warp, self.reader = (full(NOBODY, np.int32) for _ in range(3))
        self.read_cta_epoch, self.read_meeting = (full(0, np.int32) for _ in range(2))

    def name(self, s, i: int) -> str:
        return f"shared byte {i % s.shared_size}"

    def unordered_writes(self, s, i, lanes):
        """Whether a byte was written by another thread, with no barrier since."""
        writer = self.writer[i]
        other = (writer >= 0) & (writer != s.thread[lanes][:, None])
        if not other.any():
            return other
        same_cta = writer // s.threads == s.number[lanes][:, None]
        no_barrier = self.write_cta_epoch[i] == s.cta_epoch[lanes][:, None]
        same_warp = writer // WARP == s.warp[lanes][:, None]
        no_warp_barrier = self.write_warp_epoch[i] == s.warp_epoch[lanes][:, None]
        return other & (~same_cta | no_barrier & (~same_warp | no_warp_barrier))

    def unordered_reads(self, s, i, lanes):
        """Whether a byte was read by another thread, and nothing has made sure that it is done."""
        cta, warp, thread = (x[lanes][:, None] for x in (s.number, s.warp, s.thread))
        reader_cta, reader_warp = self.reader_cta[i], self.reader_warp[i]
        elsewhere = (reader_cta == SEVERAL) | ((reader_cta >= 0) & (reader_cta != cta))
        here = (reader_cta == cta) & (self.read_cta_epoch[i] == s.cta_epoch[lanes][:, None])
        apart = self.read_meeting[i] == s.meetings[lanes][:, None]  # not met since
        beside = (reader_warp == warp) & apart & (self.reader[i] != thread)
        return elsewhere | here & ((reader_warp != warp) | beside)

    def read(self, s, i, lanes, collective: bool = False, proxy: bool = False):
        """Bytes at these indices. Collective: by an instruction at which the whole warp meets;
        proxy: by wgmma, which sees no write that was not fenced."""
        find = functools.partial(s.find, lanes=lanes, memory=self, i=i)
        find("undefined", ~(self.defined[i] | self.in_flight[i]), "reads what was never written")
        find("in flight", self.in_flight[i], "reads before cp.async is waited for")
        find("race", self.unordered_writes(s, i, lanes), "reads unordered")
        if proxy:  # the writers of shared memory are in the same CTA
            writer = self.writer[i]
            fences = s.fences[np.clip(writer - s.thread[0], 0, s.L - 1)]
            find("proxy", (writer >= 0) & (self.write_fence[i] == fences), "reads unfenced")
        cta, warp, thread = (x[lanes][:, None] for x in (s.number, s.warp, s.thread))
        epoch, meeting = s.cta_epoch[lanes][:, None], s.meetings[lanes][:, None] - collective
        anew = (self.reader_cta[i] == NOBODY) | (self.read_cta_epoch[i] != epoch)
        apart = ~anew & (self.read_meeting[i] == meeting)
        self.reader[i] = np.where(apart & (self.reader[i] != thread), SEVERAL, thread)
        self.reader_warp[i] = np.where(anew | (self.reader_warp[i] == warp), warp, SEVERAL)
        same = (self.reader_cta[i] == NOBODY) | (self.reader_cta[i] == cta)
        self.reader_cta[i] = np.where(same, cta, SEVERAL)
        self.read_cta_epoch[i], self.read_meeting[i] = epoch, meeting
        # several lanes read one byte in this very instruction: one of them is on record
        for record, own in (
            (self.reader, thread),
            (self.reader_warp, warp),
            (self.reader_cta, cta),
        ):
            differs = (record[i] >= 0) & (record[i] != own)
            if differs.any():
                record[i[differs]] = SEVERAL
        return self.data[i]

    def check_write(self, s, i, lanes, values=None) -> None:
        """Findings of a write; equal values may be written in any order. None: not known yet."""
        find = functools.partial(s.find, lanes=lanes, memory=self, i=i)
        changes = np.ones(i.shape, bool) if values is None else self.data[i] != values
        find("race", changes & self.unordered_writes(s, i, lanes), "overwrites unordered")
        find("race", changes & self.unordered_reads(s, i, lanes), "overwrites what others read")
        find("in flight", self.in_flight[i], "writes before cp.async is waited for")
        find("in flight", self.in_use[i], "writes before wgmma is waited for")

    def write(self, s, i, lanes, values) -> None:
        """Write bytes (lanes, width)."""
        self.check_write(s, i, lanes, values)
        self.put(s, i, lanes, values)
        torn = self.data[i] != values
        s.find("race", torn, "lanes write different values to", lanes, self, i)

    def put(self, s, i, lanes, values) -> None:
        self.data[i] = values
        self.defined[i] = True
        self.writer[i] = s.thread[lanes][:, None]
        self.write_cta_epoch[i] = s.cta_epoch[lanes][:, None]
        self.write_warp_epoch[i] = s.warp_epoch[lanes][:, None]
        self.write_fence[i] = s.fences[lanes][:, None]


@dataclass
class Buffer:
    name: str
    start: int
    data: np.ndarray  # bytes
    valid: np.ndarray | bool  # those that a kernel may touch
    defined: np.ndarray | bool  # those that hold a value

    def __contains__(self, i: int) -> bool:
        return -GUARD // 2 <= i - self.start < len(self.data) + GUARD // 2


class Arena(Memory):
    """Global memory: buffers with gaps between them, at addresses of its own."""

    BASE = 1 << 40

    def __init__(self):
        self.buffers: list[Buffer] = []
        self.end = GUARD

    def add(self, data, name: str = "", offset: int = 0, valid=True, defined=True) -> int:
        """Register bytes (uint8); returns their address, which is `offset` modulo 256."""
        start = -(-self.end // 256) * 256 + offset % 256
        self.buffers.append(Buffer(name, start, data, valid, defined))
        self.end = start + len(data) + GUARD
        return self.BASE + start

    def open(self) -> None:
        super().__init__(self.end)
        self.valid[:] = False
        for b in self.buffers:
            here = slice(b.start, b.start + len(b.data))
            self.data[here], self.valid[here], self.defined[here] = b.data, b.valid, b.defined

    def close(self) -> dict[str, np.ndarray]:
        """Write the buffers back; returns, for each of them, which bytes were written."""
        written = {}
        for b in self.buffers:
            here = slice(b.start, b.start + len(b.data))
            written[b.name] = touched = self.writer[here] >= 0
            b.data[touched] = self.data[here][touched]
        return written

    def name(self, s, i: int) -> str:
        for b in self.buffers:
            if i in b:
                return f"byte {i - b.start} of the {len(b.data)} of {b.name}"
        return f"address {self.BASE + i:#x}, near no buffer"
