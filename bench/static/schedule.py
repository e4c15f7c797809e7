"""Cycles of a time step, from the scheduling bits of the compiled kernels; no GPU is needed.

    python -m bench schedule --arch sm_90 --match 16x16
    python -m bench schedule --variant forward-16x16-bf16 --arch sm_90 --listing
    python -m bench schedule --match 32x32 --set AHEAD=1 BETA_IN_LOOP=0 --latency l2=600

Since Volta every 128-bit instruction says what its warp has to wait for: bits 105-108 the cycles
until the warp's next instruction, 110-112 the scoreboard that is free once the result is there,
113-115 that once the operands are read (7: none), 116-121 the scoreboards that have to be free
before it issues. Instructions of fixed latency, HMMA among them, are covered by the cycles alone,
so the timing of a loop can be read off but for what is waited for by scoreboard. `simulate` takes
those latencies from LATENCY and the pipes' cycles from PIPES. It knows of no misses of the
instruction cache, bank conflicts or DRAM, and no HGMMA (64 x 64): there its cycles are too few.

Beside the columns of `python -m bench compiled`: `stall_cycles`, the sum of the cycles above, which
a warp takes that never waits; `load_slack`, the least of them from a load of a stream to the wait
for it, hence the latency that is hidden; `conversions` F2F, which take the slow pipe;
`shared_wavefronts`, 128 bytes each that a warp moves from or to shared memory; `unready`, results
used without a wait for their scoreboard (0, or the decoding is wrong); cycles of a step of one warp
alone on its processor, `step_cycles`, and with 1, 2, 4 warps on each of the four subpartitions,
`full_1`, `full_2`, `full_4`; `row_cycles` of weight gradients, those of a processor for a step of a
batch row; `tensor` to `uniform`, the cycles of each pipe per warp, of which W warps on each
subpartition take W times as many (that to memory, `lsu`, all four share).
"""

import dataclasses
import re
from collections import Counter
from dataclasses import dataclass, field

from bench.static import compiled

NONE = 7  # no scoreboard
STEPS = 14  # simulated
# cycles for which a warp's instruction occupies its pipe of the subpartition: tensor, the distance
# at which ptxas issues independent HMMA.16816.F32.BF16; the others, 32 / lanes of the throughput
# table in the CUDA programming guide
PIPES = {
    "sm_80": {"tensor": 8, "fma": 2, "imad": 2, "alu": 2, "xu": 8, "uniform": 2},
    "sm_90": {"tensor": 6, "fma": 1, "imad": 2, "alu": 2, "xu": 8, "uniform": 2},
    "sm_100": {"tensor": 8, "fma": 1, "imad": 2, "alu": 2, "xu": 8, "uniform": 2},
}
HELD = ("tensor", "fma", "imad", "alu", "uniform")  # busy, they hold the warp; others have a queue
# from the begin in the pipe to the release of the scoreboard; only a GPU can tell
LATENCY = {
    "l2": 260,  # a streamed load
    "l1": 40,
    "shared": 30,
    "xu": 23,
    "shuffle": 25,
    "barrier": 20,
    "read": 14,  # operands of a store, load or MUFU
    "other": 12,
    "branch": 10,  # a taken jump, at least
}
ROLES = {
    "product": ("HMMA", "HGMMA"),
    "pack": ("F2FP", "F2F"),
    "activation": ("FFMA", "FMUL", "FADD", "FMNMX", "FSEL", "MUFU"),
    "unpack": ("PRMT", "LOP3", "IMAD.U32", "IMAD.SHL", "SHF"),
    "memory": ("LDG", "STG", "CCTL"),
    "shared memory": ("LDS", "LDSM", "STS", "STSM", "BAR"),
    "spill": ("LDL", "STL"),
    "branch": ("BRA",),
}
WORD = r"/\* 0x(\w{16}) \*/"  # half of an instruction
INSTRUCTION = rf"\s+/\*[0-9a-f]{{4,}}\*/\s+(@!?U?P\w+ +)?([A-Z0-9_.]+)\s*(.*?)\s*;\s*{WORD}"


@dataclass
class Instruction:
    predicate: str
    opcode: str
    operands: str
    bits: int
    writes: frozenset = frozenset()  # names of registers and predicates
    reads: frozenset = frozenset()

    def __post_init__(self):
        self.base = self.opcode.split(".")[0]
        self.stall = max(1, self.bits >> 105 & 15)
        self.sets = self.bits >> 110 & 7
        self.frees = self.bits >> 113 & 7
        self.waits = [b for b in range(6) if self.bits >> 116 + b & 1]
        self.pipe = self._pipe()
        self.writes, self.reads = self._registers()

    def _pipe(self) -> str:
        starts = self.base.startswith
        if self.base in ("HMMA", "HGMMA"):
            return "tensor"
        if self.base in ("MUFU", "I2F", "F2I", "F2F", "FRND", "POPC", "FLO"):
            return "xu"
        if self.base in ("LDC", "BRA", "EXIT", "NOP", "WARPSYNC", "BSSY", "BSYNC", "DEPBAR"):
            return "control"
        if starts(("LD", "ST", "ATOM", "RED", "CCTL", "SHFL", "BAR", "MEMBAR", "MOVM")):
            return "lsu"
        if starts(("FFMA", "FMUL", "FADD", "HFMA2", "HADD2", "HMUL2")):
            return "fma"
        if self.base == "IMAD":
            return "imad"
        return "uniform" if starts("U") or self.base in ("R2UR", "S2UR") else "alu"

    def width(self, operand: int) -> int:
        """Registers of an operand."""
        if self.base == "HMMA":
            return (4, 4, 2, 4)[operand] if operand < 4 else 1
        if self.base in ("LDSM", "STSM"):
            found = re.search(r"\.([124])(?:\.|$)", self.opcode)
            return int(found[1]) if found else 1
        if self.base.startswith(("LD", "ST")):
            return 4 if ".128" in self.opcode else 2 if ".64" in self.opcode else 1
        if self.base == "IMAD" and ".WIDE" in self.opcode:
            return 2 if operand in (0, 3) else 1
        return 2 if self.base in ("FFMA2", "FADD2", "FMUL2", "CS2R") else 1

    def _registers(self) -> tuple[frozenset, frozenset]:
        writes, reads = set(), set(re.findall(r"U?P\d", self.predicate))
        targets = 2 if self.base in ("ISETP", "FSETP", "PLOP3", "UISETP", "HSETP2") else 1
        if self.base.startswith(("ST", "RED", "CCTL", "BRA", "BAR")):
            targets = 0
        carries = self.base in ("IADD3", "LEA", "IMAD", "SHFL")
        parts = re.findall(r"(?:\[[^\]]*\]|[^,\[])+", self.operands)
        for n, part in enumerate(p.strip() for p in parts):
            if "[" in part:
                for kind, first, wide in re.findall(r"\b(U?R)(\d+)(\.64)?", part):
                    reads |= {f"{kind}{int(first) + k}" for k in range(2 if wide else 1)}
                continue
            target = n < targets or (carries and 0 < n <= 2 and re.fullmatch(r"P\d", part))
            # one register stands for both halves of a pair where it says .F32
            width = 1 if part.endswith(".F32") else self.width(n)
            for kind, first in re.findall(r"\b(U?[RP])(\d+)\b", part):
                count = width if kind == "R" else 1
                (writes if target else reads).update(
                    f"{kind}{int(first) + k}" for k in range(count)
                )
        return frozenset(writes), frozenset(reads)

    @property
    def wavefronts(self) -> int:
        return self.width(0) if self.pipe == "lsu" else 0

    @property
    def control(self) -> str:
        """The scheduling bits: boards waited for, freed by the read, set by the result; stall."""
        names = ["-" if b == NONE else str(b) for b in (self.frees, self.sets)]
        waits = "".join(str(b) if b in self.waits else "-" for b in range(6))
        return f"B{waits} R{names[0]} W{names[1]} S{self.stall:02d}"

    @property
    def role(self) -> str:
        for role, opcodes in ROLES.items():
            if self.base in opcodes or self.opcode.startswith(
                tuple(o for o in opcodes if "." in o)
            ):
                return role
        return "addresses, copies"


def loops_of(sass: str) -> list[list[Instruction]]:
    """The instructions of the innermost loops, the time loop or the longest of them first, from
    what `compiled.disassemble` returns."""
    code = []
    for line in sass.splitlines():
        if found := re.match(INSTRUCTION, line):
            predicate, opcode, operands, low = found.groups()
            code.append([predicate or "", opcode, operands, int(low, 16)])
        elif code and (found := re.match(rf"\s+{WORD}", line)):
            code[-1][3] |= int(found[1], 16) << 64
    opcodes, loops = compiled.nvidia_loops(sass)
    assert [c[1] for c in code] == opcodes, "an instruction was not decoded"
    return [[Instruction(*c) for c in code[loop]] for loop in loops]


def written(body: list[Instruction]) -> set[str]:
    """Registers that the loop writes: a load of a stream takes its address from one."""
    return {r for i in body for r in i.writes if r.startswith("R")}


def occupancy(i: Instruction, arch: str, sharing: int) -> int:
    """Cycles in its pipe; `sharing` subpartitions use the one to memory alike."""
    return sharing * i.wavefronts if i.pipe == "lsu" else PIPES[arch].get(i.pipe, 1)


def delay(i: Instruction, streams: set[str], latency: dict) -> int:
    if i.pipe == "xu":
        return latency["xu"]
    if i.base in ("LDG", "LDL"):
        return latency["l2" if i.base == "LDG" and i.reads & streams else "l1"]
    names = {"LDS": "shared", "LDSM": "shared", "SHFL": "shuffle", "BAR": "barrier"}
    return latency[names.get(i.base, "other")]


@dataclass
class Warp:
    ready: float
    next: int = 0
    boards: list = field(default_factory=lambda: [[] for _ in range(6)])
    begins: list = field(default_factory=list)  # of its steps
    trace: list = field(default_factory=list)  # of all instructions: cycle, waited for, how long


def simulate(
    body: list[Instruction], arch: str, warps: int = 1, sharing: int = 4, latency: dict = LATENCY
) -> tuple[float, list]:
    """Cycles between two steps of a warp, with `warps` of them on each of `sharing` subpartitions.

    Returns those, and the trace of a late step of one warp, its cycles from the step's begin.
    """
    streams = written(body)
    facts = [(i.pipe, occupancy(i, arch, sharing), delay(i, streams, latency)) for i in body]
    free, cycle = Counter(), -1.0
    crew = [Warp(ready=29.0 * k) for k in range(warps)]
    while any(len(w.begins) <= STEPS for w in crew):
        first = None
        for w in crew:
            i, (pipe, _, _) = body[w.next], facts[w.next]
            earliest, cause = w.ready, ""
            for done, kind in (entry for b in i.waits for entry in w.boards[b]):
                if done > earliest:
                    earliest, cause = done, kind
            if pipe in HELD and free[pipe] > earliest:
                earliest, cause = free[pipe], pipe
            if first is None or earliest < first[0]:
                first = (earliest, cause, w)
        earliest, cause, w = first
        crew.remove(w)  # of warps that are ready, the one that waits longest goes first
        crew.append(w)
        i, (pipe, busy, late) = body[w.next], facts[w.next]
        cycle = max(cycle + 1, earliest)
        if w.next == 0:
            w.begins.append(cycle)
        w.trace.append((cycle, cause, earliest - w.ready))
        for b in i.waits:
            w.boards[b] = []
        begin = max(free[pipe], cycle)
        free[pipe] = begin + busy
        kind = i.base if pipe in ("xu", "lsu") else pipe
        if i.sets != NONE:
            w.boards[i.sets].append((begin + late, kind))
        if i.frees != NONE:
            w.boards[i.frees].append((begin + latency["read"], kind + " operands"))
        w.next = (w.next + 1) % len(body)
        w.ready = cycle + (i.stall if w.next else max(i.stall, latency["branch"]))
    w = min(crew, key=lambda w: len(w.begins))
    last, n = len(w.begins) - 1, len(body)
    step = w.trace[(last - 1) * n : last * n]
    trace = [(cycle - w.begins[last - 1], cause, waited) for cycle, cause, waited in step]
    return (w.begins[last] - w.begins[3]) / (last - 3), trace


def load_slack(body: list[Instruction]) -> int:
    """Least cycles from a load of a stream to the first wait for it, by the stalls alone."""
    streams, n, least = written(body), len(body), []
    for a, i in enumerate(body):
        if i.base != "LDG" or not i.reads & streams:
            continue
        cycles = 0
        for d in range(1, n + 1):
            cycles += body[(a + d - 1) % n].stall
            if i.sets in body[(a + d) % n].waits:
                least.append(cycles)
                break
    return min(least, default=0)


def unready(body: list[Instruction]) -> list[str]:
    """Uses of a result of variable latency that no wait for its scoreboard comes before."""
    found, n = [], len(body)
    for a, i in enumerate(body):
        left = set(i.writes) if i.sets != NONE else set()
        for d in range(1, n + 1):
            j = body[(a + d) % n]
            if i.sets in j.waits:
                break
            if left & j.reads:
                found.append(f"{a} {i.opcode} -> {(a + d) % n} {j.opcode}")
            left -= j.writes
            if not left:
                break
    return found


def statistics(body: list[Instruction], arch: str, latency: dict = LATENCY) -> dict:
    """The columns of one variant that need one simulation, of a warp alone."""
    shared = ("LDS", "LDSM", "STS", "STSM")
    return {
        "stall_cycles": sum(i.stall for i in body),
        "load_slack": load_slack(body),
        "conversions": sum(i.base == "F2F" for i in body),
        "shared_wavefronts": sum(i.wavefronts for i in body if i.base in shared),
        "unready": len(unready(body)),
        "step_cycles": round(simulate(body, arch, sharing=1, latency=latency)[0]),
    }


def occupied(body: list[Instruction], arch: str, latency: dict) -> dict:
    """Cycles of a step with 1, 2 and 4 warps on each subpartition, and those of every pipe."""
    use = Counter()
    for i in body:
        use["fma" if i.pipe == "imad" else i.pipe] += occupancy(i, arch, sharing=4)
    return {
        **{f"full_{w}": round(simulate(body, arch, w, latency=latency)[0]) for w in (1, 2, 4)},
        **{pipe: use[pipe] for pipe in ("tensor", "fma", "alu", "xu", "lsu", "uniform")},
    }


def row_cycles(bodies: list[list[Instruction]], variant, row: dict, latency: dict) -> float:
    """Cycles of a processor for a step of a batch row, all programs of a weight gradient together,
    with as many warps on each subpartition as have registers."""
    slices = variant.options(row["arch"])[0]["SLICES"]
    warps = max(1, min(4, 65536 // (256 * -(-row["registers"] // 8)) // 4))
    cycles = 0.0
    for body in bodies:  # one of dA, which is in slices and has dβ with it, and one of dB
        share = slices if len(bodies) == 1 or any(i.base == "MUFU" for i in body) else 1
        cycles += share * simulate(body, row["arch"], warps, latency=latency)[0]
    return round(cycles * row["warps"] / (4 * warps * row["rows"]), 1)


def listing(body: list[Instruction], arch: str, latency: dict) -> list[str]:
    """The loop with the cycle of every instruction, its role and what it waited for; the cycles of
    each role."""
    cycles, trace = simulate(body, arch, sharing=1, latency=latency)
    held, lines = Counter(), []
    for i, (cycle, cause, waited), following in zip(
        body, trace, [*trace[1:], (cycles, "", 0.0)], strict=True
    ):
        wait = f"{cause} {waited:.0f}" if cause and waited else ""
        text = f"{i.predicate}{i.opcode} {i.operands}"
        lines.append(f"{cycle:6.0f} {wait:18} {i.control} {i.role:17} {text}")
        held[f"wait for {cause}"] += waited if wait else 0
        held[i.role] += following[0] - cycle - (following[2] if following[1] else 0)
    total = ", ".join(f"{role} {n:.0f}" for role, n in held.most_common())
    return [*lines, f"cycles: {total}"]


def pairs(words: list[str]) -> dict[str, int | None]:
    """NAME=VALUE as a dict."""
    split = (w.split("=") for w in words)
    return {k: None if v == "None" else int(v) for k, v in split}


def main(argv: list[str] | None = None) -> int:
    parser = compiled.parser(__doc__, "schedule", PIPES)
    parser.add_argument("--set", nargs="+", default=[], help="choices of options.TUNABLE")
    parser.add_argument("--latency", nargs="+", default=[], help=f"NAME=cycles of {[*LATENCY]}")
    parser.add_argument("--listing", action="store_true", help="the loop, its cycles and roles")
    parser.add_argument("--brief", action="store_true", help="one warp alone, nothing else")
    args = parser.parse_args(argv)
    latency = {**LATENCY, **pairs(args.latency)}

    def measure(variant, arch):
        variant = dataclasses.replace(variant, tuning=tuple(pairs(args.set).items()))
        row = compiled.measure(variant, arch)
        bodies = loops_of(compiled.disassemble(compiled.build(variant, arch).asm["cubin"])[0])
        body = bodies[0]
        row |= statistics(body, arch, latency)
        if variant.kernel == "weight_grad":
            bodies = [body for body in bodies if len(body) > 1]  # a trap jumps to itself
            row["row_cycles"] = row_cycles(bodies, variant, row, latency)
        if not args.brief:
            row |= occupied(body, arch, latency)
        if args.listing:
            print(*listing(body, arch, latency), *unready(body), sep="\n")
        return row

    return compiled.report(parser, args, argv, measure, "schedule")
