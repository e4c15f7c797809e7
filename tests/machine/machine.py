"""Executes PTX, as Triton emits it, with numpy on the CPU, and checks what it does to memory.

    program = parse(ptx)
    memory = Arena(); address = memory.add(array); ...
    report = run(program, grid=(x, y, z), arguments=[address, 5, ...], memory=memory, shared=bytes)

All lanes of many CTAs execute one instruction at once: registers are arrays with one element per
lane. Every lane has its own program counter; the least one runs first, so that lanes that parted
meet again. What a GPU would do in any order is checked, not simulated (see `memory`). A `Finding`
is anything that a correct program would not do:

    outside     access to global or shared memory that is in no buffer
    misaligned  access at an address that is no multiple of its size
    undefined   read of a byte or a register that nothing was written to
    race        two threads touch one byte, one of them writes, and nothing lies between: bar.sync
                between warps; within a warp at least bar.warp.sync, and for a write after a read
                any instruction at which the warp comes together; between CTAs nothing helps. Two
                writes of the same value are no race
    in flight   shared memory is touched before the cp.async that fills it was waited for, or
                written before the wgmma that reads it was; a register of a wgmma is touched before
                it was waited for
    prefetch    of an address in no buffer: harmless, and useless
    proxy       wgmma reads shared memory that was written without fence.proxy.async since
    barrier     bar.sync, or another .aligned instruction, that not all lanes of a warp reach, or
                not all warps of a CTA

What differs between devices is exact here unless `Options` say otherwise: approximate instructions
and the sums of tensor cores. Not seen: what ptxas makes of the PTX, sm_100's tcgen05, AMD.
"""

import numpy as np

from . import access, scalar, tensor_core
from .lanes import Lanes, Operands, Options, Step
from .memory import WARP, Arena, Report
from .ptx import Program

MAX_LANES = 4096  # that run at once
CONTROL = {"bra", "ret", "exit", "bar", "barrier"}
BUILDERS = {
    "mov": scalar.move,
    "cvt": scalar.convert,
    "selp": scalar.select,
    "setp": scalar.set_predicate,
    "shfl": scalar.shuffle,
    "ld": access.load,
    "st": access.store,
    "cp": access.copy_async,
    "prefetch": access.prefetch,
    "mma": tensor_core.multiply,
    "ldmatrix": tensor_core.load_matrix,
    "stmatrix": tensor_core.store_matrix,
    "wgmma": tensor_core.group,
    "bar": lambda o: warp_barrier(o),
    "fence": lambda o: proxy_fence if "proxy" in o.mods else nothing,
    "membar": lambda o: nothing,
}  # all others: scalar.arithmetic


def nothing(s, m) -> None:
    pass


def proxy_fence(s, m) -> None:
    s.fences = s.fences + (1 if m is None else m)


def warp_barrier(o: Operands) -> Step:
    if o.mods != ["warp", "sync"]:
        raise o.unknown()
    members = o.reader(o.text[0], "u32")

    def step(s, m):
        if (members(s, m) == 0xFFFFFFFF).all():
            s.whole_warps(m)
        s.warp_epoch = s.warp_epoch + (1 if m is None else m)

    return step


def is_control(ins) -> bool:
    return ins.opcode.split(".")[0] in CONTROL and ins.opcode != "bar.warp.sync"


def built(program: Program, ins) -> Step | None:
    """Closure of an instruction, None for one that changes the flow of control."""
    if is_control(ins):
        return None
    o = Operands(program, ins)
    step = BUILDERS.get(o.base, scalar.arithmetic)(o)
    if ins.predicate is None:
        return step
    holds = o.reader(ins.predicate, "pred")

    def predicated(s, m):
        p = s.full(holds(s, m))
        s.use(m, "predicate")
        p = p if m is None else p & m
        if p.all():
            step(s, None)
        elif p.any():
            step(s, p)

    return predicated


def flow(program: Program, s: Lanes, pc, waiting, mask) -> None:
    """The control instruction at s.at for the lanes of `mask`."""
    ins = program.code[s.at]
    base = ins.opcode.split(".")[0]
    taken = mask
    if ins.predicate:
        holds = s.read(program.register(ins.predicate.lstrip("!")))
        s.use(mask, "predicate")
        taken = mask & (holds != ins.predicate.startswith("!"))
    pc[mask] = s.at + 1
    if base == "bra":
        pc[taken] = program.labels[ins.operands[0]]
    elif base in ("ret", "exit"):
        pc[taken] = len(program.code)
    elif ins.opcode in ("bar.sync", "barrier.sync") and ins.operands == ["0"] and taken is mask:
        s.whole_warps(None if mask.all() else mask)
        waiting |= taken
        by_cta = waiting.reshape(-1, s.threads)
        ended = (pc == len(program.code)).reshape(-1, s.threads) & ~by_cta
        ready = (by_cta | ended).all(1) & by_cta.any(1)
        late = ready & ended.any(1)
        s.find("barrier", late, "and others: some have exited", s.every[:: s.threads])
        release = np.repeat(ready, s.threads)
        waiting &= ~release
        s.cta_epoch, s.warp_epoch = s.cta_epoch + release, s.warp_epoch + release
        s.last_barrier = s.at
    else:
        raise Operands(program, ins).unknown()


def run_together(program: Program, s: Lanes, executed) -> None:
    pc, waiting = np.zeros(s.L, np.int64), np.zeros(s.L, bool)
    end, labels = len(program.code), set(program.labels.values())
    while True:
        runnable = np.where(waiting, end, pc)
        s.at = first = int(runnable.min())
        if first == end:
            if waiting.any():
                s.at = s.last_barrier
                s.find("barrier", waiting, "waits forever")
            return
        mask = runnable == first
        m = None if mask.all() else mask
        while s.at < end and program.steps[s.at] and (s.at == first or s.at not in labels):
            program.steps[s.at](s, m)
            s.tainted = None
            s.at += 1
        pc[mask] = s.at
        if s.at < end and not program.steps[s.at] and (s.at == first or s.at not in labels):
            flow(program, s, pc, waiting, mask)
            s.at += 1
        executed[first : s.at] += mask.reshape(-1, WARP).any(1).sum()


def run(
    program: Program,
    grid: tuple[int, int, int],
    arguments: list[int],
    memory: Arena,
    shared: int = 0,
    options: Options = Options(),  # noqa: B008 (frozen)
) -> Report:
    """Run a grid of CTAs; `arguments` are the kernel's parameters in order.

    Raises:
        NotImplementedError: for an opcode that the machine does not know, by its name.
    """
    report = Report()
    if not program.steps:
        for ins in program.code:  # branches have no operands that would name theirs
            if ins.predicate:
                program.register(ins.predicate.lstrip("!"))
        program.steps = [built(program, ins) for ins in program.code]
    ctas = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
    memory.open()
    executed = np.zeros(len(program.code), np.int64)
    at_once = max(1, MAX_LANES // program.threads)
    size = program.static_shared + shared
    with np.errstate(all="ignore"):
        for first in range(0, len(ctas), at_once):
            some = ctas[first : first + at_once]
            s = Lanes(program, some, first, grid, memory, size, arguments, report, options)
            run_together(program, s, executed)
    for ins, n in zip(program.code, executed.tolist()):
        report.executed[ins.opcode] += n
    return report
