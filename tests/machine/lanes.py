"""The lanes of some CTAs that run together, their registers, and the operands of instructions.

A builder in `scalar`, `access` and `tensor_core` takes an `Operands` and returns the closure
(state, mask) that executes one instruction for the lanes of the mask, all of them where it is None.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .memory import UNWRITTEN, WARP, Memory
from .ptx import NUMPY, Instruction, Program, elements

SHARED_BASE = 1024  # address of a CTA's first byte of shared memory


@dataclass(frozen=True)
class Options:
    """What differs between devices, and what costs time.

    approximate: seed of errors drawn for approximate instructions, None: they are exact.
    truncate: tensor cores add as published for Hopper (see `tensor_core`), else exactly.
    traffic: count wavefronts of shared memory and sectors of global memory.
    """

    approximate: int | None = None
    truncate: bool = False
    traffic: bool = False


class Lanes:
    """State of L lanes; registers are arrays with one element a lane."""

    def __init__(self, program, ctas, first_cta, grid, memory, shared, arguments, report, options):
        self.program, self.ctas, self.grid = program, ctas, grid
        self.memory, self.arguments = memory, arguments
        self.report, self.options = report, options
        self.threads = program.threads
        self.L = len(ctas) * self.threads
        self.shared_size = shared
        self.shared = Memory(len(ctas) * shared)
        self.every = np.arange(self.L)
        self.tid = (self.every % self.threads).astype(np.uint32)
        self.cta = self.every // self.threads  # of those that run together
        self.number = self.cta + first_cta  # of the grid
        self.thread = self.every + first_cta * self.threads
        self.warp = self.thread // WARP
        # barriers of a CTA and of a warp; meetings: instructions at which a whole warp comes
        # together, barriers or not; fences: fence.proxy.async
        self.cta_epoch, self.warp_epoch, self.meetings, self.fences = (
            np.zeros(self.L, np.int32) for _ in range(4)
        )
        self.regs = [None] * len(program.types)
        self.undefined = dict.fromkeys(range(len(program.types)), np.ones(self.L, bool))
        self.tainted = None  # lanes of the instruction under way that read an undefined register
        self.in_flight = {}  # register of a wgmma under way: groups committed since
        self.in_use = []  # shared memory that a wgmma reads: indices, groups committed since
        self.copies = []  # cp.async under way: lanes, group, indices, values
        self.copy_group = np.zeros(self.L, np.int64)
        self.at = 0  # instruction under way

    def find(self, kind, bad, words, lanes=None, memory=None, i=None) -> None:
        """Report the lanes (or bytes i of lanes) that are `bad`, the first one in detail."""
        if not bad.any():
            return
        row, *column = np.argwhere(bad)[0]
        lane = row if lanes is None else lanes[row]
        if i is not None:
            byte = int(i[row, column[0] if column else 0])
            words += " " + (memory.name(self, byte) if memory else f"address {byte:#x}")
            if memory and 0 <= byte < len(memory.data):
                words += f" (last writer thread {memory.writer[byte]})"
        who = f"CTA {self.ctas[self.cta[lane]]} thread {self.tid[lane]} {words}"
        self.report.add(kind, str(self.program.code[self.at]), who, int(bad.sum()))

    def use(self, m, what: str) -> None:
        """What was read so far decides what happens: it must be defined."""
        if self.tainted is not None:
            bad = self.tainted if m is None else self.tainted & m
            self.find("undefined", bad, f"uses as {what} a register never written")
            self.tainted = None

    def read(self, index: int) -> np.ndarray:
        if index in self.undefined:
            if self.regs[index] is None:
                kind = NUMPY[self.program.types[index]]
                self.regs[index] = np.full(self.L * kind.itemsize, UNWRITTEN, np.uint8).view(kind)
            bad = self.undefined[index]
            self.tainted = bad if self.tainted is None else self.tainted | bad
        if index in self.in_flight:
            self.early(index, "reads")
        return self.regs[index]

    def write(self, index: int, bits: np.ndarray, m) -> None:
        """Write a register; what was computed from undefined ones is undefined."""
        if len(bits) != self.L:
            bits = np.repeat(bits, self.L)
        bad = self.tainted
        if m is not None:
            old = self.regs[index]
            if old is not None:
                bits = np.where(m, bits, old)
            if index in self.undefined:
                bad = np.where(m, False if bad is None else bad, self.undefined[index])
            elif bad is not None:
                bad = bad & m
        if index in self.in_flight:
            self.early(index, "writes")
        self.regs[index] = bits
        if bad is not None and bad.any():
            self.undefined[index] = bad
        else:
            self.undefined.pop(index, None)

    def early(self, index: int, verb: str) -> None:
        name = next(n for n, i in self.program.registers.items() if i == index)
        bad = np.ones(self.L, bool)
        self.find("in flight", bad, f"{verb} {name} before wgmma is waited for")

    def active(self, m) -> np.ndarray:
        """Indices of the lanes of a mask."""
        return self.every if m is None else np.nonzero(m)[0]

    def whole_warps(self, m) -> np.ndarray:
        """Warps that are active, each of which must be so with all lanes; they meet here."""
        by_warp = np.ones((self.L // WARP, WARP), bool) if m is None else m.reshape(-1, WARP)
        some, every = by_warp.any(1), by_warp.all(1)
        first = self.every[::WARP]
        self.find("barrier", some & ~every, "misses a part of its warp", first)
        self.meetings = self.meetings + np.repeat(some, WARP)
        return np.nonzero(some)[0]

    def full(self, value: np.ndarray) -> np.ndarray:
        """A value of every lane, which may have been one for all."""
        return np.broadcast_to(value, (self.L,))


Reader = Callable[[Lanes, "np.ndarray | None"], np.ndarray]
Step = Callable[[Lanes, "np.ndarray | None"], None]


def immediate(text: str, dtype: np.dtype) -> np.ndarray | None:
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return np.array([int(text[2:], 16)], np.uint32).view(dtype)
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
        return np.array([int(text[2:], 16)], np.uint64).view(dtype)
    if not re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        return None
    value = int(text.rstrip("U"), 0)
    if dtype.kind == "b":
        return np.array([value != 0])
    bits = value & ((1 << 8 * dtype.itemsize) - 1)
    return np.array([bits], f"u{dtype.itemsize}").view(dtype)


def special(name: str) -> Callable[[Lanes], np.ndarray] | None:
    """Reader of a special register, None if it is none."""
    axis = {"x": 0, "y": 1, "z": 2}.get(name[-1])
    if name == "%tid.x":
        return lambda s: s.tid
    if name in ("%tid.y", "%tid.z"):
        return lambda s: np.zeros(1, np.uint32)
    if name.startswith("%ctaid."):
        return lambda s: np.array([c[axis] for c in s.ctas], np.uint32)[s.cta]
    if name.startswith("%nctaid."):
        return lambda s: np.array([s.grid[axis]], np.uint32)
    if name.startswith("%ntid."):
        return lambda s: np.array([s.threads if axis == 0 else 1], np.uint32)
    if name == "%laneid":
        return lambda s: s.tid % np.uint32(WARP)
    return None


class Operands:
    """One instruction, taken apart, and how to read and write what it names."""

    def __init__(self, program: Program, ins: Instruction):
        self.program, self.ins, self.text = program, ins, ins.operands
        self.base, *self.mods = ins.opcode.split(".")

    def unknown(self, why: str = "") -> NotImplementedError:
        return NotImplementedError(
            f"the machine does not execute opcode {self.ins.opcode}{why and f' ({why})'}: "
            f"{self.ins}; build it where `machine.BUILDERS` says"
        )

    def reader(self, text: str, kind: str) -> Reader:
        """Function of (state, mask) that returns an operand as an array of this PTX type."""
        dtype = NUMPY[kind]
        if (constant := immediate(text, dtype)) is not None:
            return lambda s, m: constant
        if text in self.program.symbols:
            address = np.array([self.program.symbols[text] + SHARED_BASE]).astype(dtype)
            return lambda s, m: address
        if read_special := special(text):
            return lambda s, m: read_special(s).astype(dtype)
        index = self.program.register(text.lstrip("!"))
        if self.program.dtype(text.lstrip("!")).itemsize != dtype.itemsize:
            raise self.unknown(f"{text} is no {kind}")
        if text.startswith("!"):
            return lambda s, m: ~s.read(index)
        return lambda s, m: s.read(index).view(dtype)

    def readers(self, text: str, kind: str) -> list[Reader]:
        return [self.reader(element, kind) for element in elements(text)]

    def writer(self, text: str, kind: str) -> Callable:
        """Function of (state, value, mask)."""
        if text == "_":
            return lambda s, value, m: None
        index, dtype = self.program.register(text), self.program.dtype(text)
        if dtype.itemsize != NUMPY[kind].itemsize:
            raise self.unknown(f"{text} is no {kind}")
        return lambda s, value, m: s.write(index, value.view(dtype), m)

    def writers(self, text: str, kind: str) -> list[Callable]:
        return [self.writer(element, kind) for element in elements(text)]

    def address(self, text: str, space: str) -> Reader:
        base, _, offset = text.strip("[] ").replace(" ", "").partition("+")
        kind = "b64" if space == "global" else "b32"
        read, step = self.reader(base, kind), np.array([int(offset or "0", 0)]).astype(NUMPY[kind])
        return lambda s, m: s.full(read(s, m) + step)
