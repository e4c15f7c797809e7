"""What the kernels compile to, counted in machine code without a GPU.

    python -m bench compiled                          # every variant for every target
    python -m bench compiled --arch sm_90 --kernel forward
    python -m bench compiled --json compiled.json     # to this file, in place of bench/results
    python -m bench compiled --arch sm_90 --executed --match 16x16

Each variant is compiled ahead of time with the constants and options its launcher would use, its
machine code is disassembled with the tools that triton ships, and the instructions of the time
loop are counted: per step of one program, which holds `rows` batch rows of one head. The triton it
runs on is the installed one. Counts are no times: they say what a step issues, not how long it
waits. The loop counted is the longest innermost one; the kernels of `wide` spend a step in several,
and their figure is for one block of rows of the large factor. `access_bytes` is the widest access
to global memory of one thread, `compile_seconds` the processor time that the compilation took (none
where triton's cache had the kernel).

With --executed the kernels of modReLU also run, on tests/machine, and more is counted of a step:
instructions of all warps by kind, and what they move (see `count.per_step` there).
"""

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # the interpreter replaces what is compiled here

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench import harness
from bench.gpu.launches import Problem, launch_all
from kru_triton.kernels import geometry, launch, lstm, scan, weight_grad, wide
from kru_triton.kernels.options import (
    GIVEN,
    compile_options,
    lstm_options,
    weight_grad_options,
    wide_options,
)
from kru_triton.nonlinearity import NONLINEARITIES

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KERNELS = {
    "forward": scan.scan_forward_kernel,
    "backward": scan.scan_backward_kernel,
    "weight_grad": weight_grad.weight_grad_kernel,
    "wide_forward": wide.wide_forward_kernel,
    "wide_backward": wide.wide_backward_kernel,
    "lstm_forward": lstm.lstm_forward_kernel,
    "lstm_backward": lstm.lstm_backward_kernel,
}
ITEMSIZE = {"bf16": 2, "fp32": 4}
DTYPE = {"bf16": torch.bfloat16, "fp32": torch.float32}
MACHINE = ("sm_80", "sm_90")  # what tests/machine executes


@dataclass(frozen=True)
class Variant:
    kernel: str
    P: int
    Q: int
    dtype: str = "bf16"  # of memory
    nonlinearity: str = "modrelu"
    field: str = "complex"
    flags: tuple[str, ...] = ()  # of GIVEN; "real" of a complex state's gate
    part: str = "all"  # of the weight gradient: all, da, db or dbeta
    tuning: tuple[tuple[str, int | None], ...] = ()  # choices in place of the default ones
    products: str = ""  # their precision, where it is not that of memory

    @property
    def name(self) -> str:
        words = [self.kernel, f"{self.P}x{self.Q}", self.precision]
        words += [self.nonlinearity] if self.nonlinearity != "modrelu" else []
        words += [self.field] if self.field != "complex" else []
        words += [self.part] if self.part != "all" else []
        return "-".join([*words, *self.flags])

    @property
    def precision(self) -> str:
        return self.products or self.dtype

    @property
    def parts(self) -> int:
        return 2 if self.field == "complex" else 1

    @property
    def tile(self) -> geometry.Tile | geometry.Wide:
        if self.kernel.startswith("wide"):
            return geometry.Wide.of(self.P, self.Q)
        return geometry.Tile.of(self.P, self.Q, ITEMSIZE[self.dtype])

    def pointers(self) -> dict[str, str | None]:
        """Type of every pointer argument, None for those that the launcher would not pass."""
        adjoint, again = self.kernel == "backward", self.nonlinearity == "modtanh"
        fragments = self.kernel == "weight_grad" and self.options("sm_90")[0]["FRAGMENTS"]
        flag = {f: f in self.flags for f in GIVEN}
        given = {
            "p_tokens": flag["tokens"] and (again or not adjoint),
            "p_beta": self.nonlinearity == "modrelu",
            "p_h_0": fragments or (flag["h_0"] and (again or not adjoint)),
            "p_c_0": flag["h_0"],
            "p_keep": flag["reset"],
            "p_steps": flag["lengths"],
            **dict.fromkeys(("p_gate", "p_d_gate"), flag["gate"]),
            **dict.fromkeys(("p_alive", "p_ends"), flag["lengths"] and self.tile.rows > 1),
            **{f"p_d{part}": self.part in ("all", f"d{part}") for part in ("a", "b", "beta")},
        }
        if adjoint:
            given |= dict.fromkeys(("p_x", "p_a", "p_b"), again)
            in_kernel = self.options("sm_90")[0]["ANCHORED"] and not flag["gate"]
            given["p_dh_0"] = flag["h_0"] and in_kernel
        elif self.kernel == "wide_backward":
            given["p_dh_0"] = flag["h_0"]
        names = ("p_x", "p_h", "p_dx", "p_dh", "p_dh_n", "p_dc_n", "p_gate", "p_d_gate")
        kinds = dict.fromkeys(names, self.dtype)
        kinds |= dict.fromkeys(("p_tokens", "p_keep", "p_alive", "p_ends", "p_steps"), "i32")
        kinds |= dict.fromkeys(("p_k", "p_z"), "bf16")
        kinds["p_h_0"] = self.dtype if fragments else "fp32"
        if again and self.kernel == "wide_backward":
            kinds["p_h"] = "fp32"
        names = [name for name in KERNELS[self.kernel].arg_names if name.startswith("p_")]
        return {n: kinds.get(n, "fp32") if given.get(n, True) else None for n in names}

    def options(self, arch: str) -> tuple[dict, dict]:
        """Constants and launch options, from the functions that the launchers call."""
        target = TARGETS[arch]
        how = {"heads": 1, "parts": self.parts, "precision": self.precision}
        how["nvidia"] = target.backend == "cuda"
        how |= self.tuning
        if self.kernel == "weight_grad":
            constants, options, _ = weight_grad_options(
                self.tile, itemsize=ITEMSIZE[self.dtype], fragments=how["nvidia"], **how
            )
            if self.part not in ("da", "db") and not constants["FRAGMENTS"]:
                constants["SLICES"] = 1
            return {**constants, "STATES": 1}, options
        if self.kernel.startswith("lstm"):
            del how["parts"]
            if self.pointers().get("p_ends"):
                how = {"AHEAD": 0, **how}
            backward = "back" in self.kernel
            return lstm_options(self.tile, backward=backward, arch=target.arch, **how)
        how["nonlinearity"] = self.nonlinearity
        if self.kernel.startswith("wide"):
            constants, options = wide_options(self.tile, **how)
        else:
            how |= {"backward": self.kernel == "backward", "arch": target.arch}
            # the adjoint has no use of its own for them
            how["given"] = [f for f in self.flags if f == "gate" or not how["backward"]]
            how["gate_parts"] = 1 if "real" in self.flags else None
            constants, options = compile_options(self.tile, **how)
        if "backward" in self.kernel:
            constants["FLOOR"] = launch.floor_of(DTYPE[self.dtype])
        return constants, options


def variants() -> list[Variant]:
    """Every kernel at the sizes that KRU layers have, and each option at one or two of them."""
    table = []
    sizes = [(8, 8), (8, 16), (16, 16), (16, 32), (32, 32), (32, 64), (64, 64)]
    for kernel in ("forward", "backward", "weight_grad"):
        for dtype in ("bf16", "fp32"):
            for P, Q in sizes:
                whole = Variant(kernel, P, Q, dtype)
                apart = kernel == "weight_grad" and not whole.options("sm_90")[0]["FRAGMENTS"]
                parts = ("da", "db", "dbeta") if apart else ("all",)
                table += [replace(whole, part=part) for part in parts]
    for kernel in ("forward", "backward"):
        for nonlinearity in NONLINEARITIES[1:]:
            table.append(Variant(kernel, 16, 16, nonlinearity=nonlinearity))
            table.append(Variant(kernel, 32, 32, nonlinearity=nonlinearity))
        table.append(Variant(kernel, 16, 16, "fp32", nonlinearity="modtanh"))
        table.append(Variant(kernel, 16, 16, "fp32", nonlinearity="tanh"))
        table.append(Variant(kernel, 32, 32, field="real"))
        for P, Q in [(16, 64), (64, 16), (4, 16), (2, 32), (3, 11), (5, 20), (24, 24)]:
            table.append(Variant(kernel, P, Q))
        for P, Q in [(64, 1), (1, 64), (128, 8), (8, 128), (128, 32), (32, 128)]:
            table.append(Variant(kernel, P, Q))
        table.append(Variant(kernel, 128, 8, "fp32"))
        for P, Q in [(256, 16), (16, 256), (512, 1), (2, 1024), (4096, 1)]:
            table.append(Variant(f"wide_{kernel}", P, Q))
        for P, Q in [(256, 16), (1, 512), (128, 32), (64, 64)]:
            table.append(Variant(f"wide_{kernel}", P, Q, "fp32"))
        table.append(Variant(f"wide_{kernel}", 8, 256, nonlinearity="modtanh", flags=GIVEN[:3]))
        for flags in [("h_0",), ("reset",), ("lengths",), GIVEN[:3]]:
            table.append(Variant(kernel, 16, 16, flags=flags))
        table.append(Variant(kernel, 8, 8, flags=GIVEN[:3]))
        table.append(Variant(kernel, 32, 32, flags=GIVEN[:3]))
        for P, Q in [(8, 8), (16, 16), (32, 32)]:
            table.append(Variant(kernel, P, Q, flags=("gate",)))
            table.append(Variant(kernel, P, Q, flags=("gate", "real")))
        for P in (16, 32):
            table.append(Variant(kernel, P, P, "fp32", flags=("gate",)))
            table.append(Variant(kernel, P, P, "fp32", flags=("gate", "real")))
        for P in (8, 16):  # of the presets of language models
            flags = ("gate", "real")
            table.append(Variant(kernel, P, P, nonlinearity="identity", flags=flags))
        for dtype in ("bf16", "fp32"):  # of the preset that tracks states
            table.append(Variant(kernel, 2, 64, dtype, nonlinearity="tanh", flags=("gate",)))
    for P, Q in [(8, 8), (16, 16), (32, 32)]:
        table.append(Variant("forward", P, Q, flags=("tokens",)))
    table.append(Variant("backward", 16, 16, nonlinearity="modtanh", flags=("tokens",)))
    for kernel in ("lstm_forward", "lstm_backward"):
        for P, Q in sizes:
            table.append(Variant(kernel, P, Q))
        table.append(Variant(kernel, 16, 16, "fp32"))
        table.append(Variant(kernel, 32, 32, "fp32"))
        table.append(Variant(kernel, 8, 8, flags=GIVEN[:3]))
        table.append(Variant(kernel, 3, 11))
        table.append(Variant(kernel, 5, 20, "fp32", flags=GIVEN[:3]))
    for way in ("forward", "backward"):
        for P, Q in [(16, 16), (32, 32), (64, 64)]:
            table.append(Variant(way, P, Q, products="bf16x2"))
        for P, Q in [(8, 8), (16, 16), (32, 32)]:
            table.append(Variant(f"lstm_{way}", P, Q, products="bf16x2"))
        table.append(Variant(f"wide_{way}", 256, 16, products="bf16x2"))
    table.append(Variant("weight_grad", 32, 32, field="real"))
    table.append(Variant("weight_grad", 16, 16, flags=("h_0", "reset")))
    table.append(Variant("weight_grad", 3, 11, "fp32"))
    return table


@functools.lru_cache(1)
def build(variant: Variant, arch: str):
    """The compiled kernel."""
    target = TARGETS[arch]
    function = KERNELS[variant.kernel]
    constants, options = variant.options(arch)
    pointers = variant.pointers()
    signature, constexprs, attributes = {}, {}, {}
    for i, name in enumerate(function.arg_names):
        if pointers.get(name):
            signature[name] = "*" + pointers[name]
            attributes[(i,)] = [["tt.divisibility", 16]]  # the launchers see to it
        elif name in pointers or name in constants:
            signature[name] = "constexpr"
            constexprs[name] = constants.get(name)
        else:
            signature[name] = "i32"
    source = ASTSource(function, signature, constexprs=constexprs, attrs=attributes)
    return triton.compile(source, target=target, options=options)


def tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


@functools.lru_cache(1)
def disassemble(cubin: bytes) -> tuple[str, str]:
    """SASS with its encoding, and the resource usage of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        # -ndf: no analysis of data flow, more than a third of its time, which changes nothing here
        commands = ([tool("nvdisasm"), "-ndf", "-c", "-hex"], [tool("cuobjdump"), "-res-usage"])
        return tuple(
            subprocess.run([*c, file.name], capture_output=True, text=True, check=True).stdout
            for c in commands
        )


def time_loops(
    code: list[str], label: str, instruction: str, branch: str
) -> tuple[list[str], list[slice]]:
    """All opcodes and where among them the innermost loops are, the longest first; the patterns
    find labels, opcodes and jumps."""
    labels, opcodes, jumps = {}, [], []
    for line in code:
        if found := re.match(label, line):
            labels[found[1]] = len(opcodes)
        elif found := re.match(instruction, line):
            if (jump := re.search(branch, line)) and jump[1] in labels:
                jumps.append((labels[jump[1]], len(opcodes)))
            opcodes.append(found[1])
    spans = [s for s in jumps if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in jumps)]
    spans.sort(key=lambda s: s[0] - s[1])
    return opcodes, [slice(begin, end + 1) for begin, end in spans]


def nvidia_loops(sass: str) -> tuple[list[str], list[slice]]:
    instruction = r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ +)?([A-Z0-9_.]+)"
    branch = r"\bBRA.*`\((\.L_x_\d+)\)"
    return time_loops(sass.splitlines(), r"(\.L_x_\d+):", instruction, branch)


def access_bytes(opcode: str) -> int:
    """Bytes of one thread's access to global memory, from the opcode of either vendor."""
    sizes = {"128": 16, "dwordx4": 16, "dwordx3": 12, "64": 8, "dwordx2": 8}
    sizes |= {"U16": 2, "S16": 2, "short": 2, "ushort": 2, "U8": 1, "S8": 1, "byte": 1, "ubyte": 1}
    return next((sizes[word] for word in re.split("[._]", opcode) if word in sizes), 4)


# what is counted in a loop: opcodes that begin so, of NVIDIA and of AMD
COUNTED = {
    "barriers": (("BAR.",), ("s_barrier",)),
    "shuffles": (("SHFL.",), ("ds_bpermute", "ds_permute", "ds_swizzle", "v_permlane")),
    "instructions_per_step": (("",), ("",)),
    "tensor_core": (("HMMA", "HGMMA", "UTCHMMA"), ("v_mfma",)),
    "loads": (("LDG.",), ("global_load", "buffer_load")),
    "stores": (("STG.",), ("global_store", "buffer_store")),
    "access_bytes": (("LDG", "STG"), ("global_", "buffer_load", "buffer_store")),
    "shared_loads": (("LDS",), ("ds_read",)),
    "shared_stores": (("STS",), ("ds_write",)),
}


def counts(kernel, amd: bool) -> dict:
    if amd:
        code = kernel.asm["amdgcn"]
        instruction = r"\s+((?:[vs]_|ds_|global_|buffer_|flat_|scratch_)\w+)"
        branch = r"s_c?branch\w*\s+(\.LBB\d+_\d+)"
        lines = code.splitlines()
        opcodes, (where, *_) = time_loops(lines, r"(\.LBB\d+_\d+):", instruction, branch)
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", code)[1])
        spills = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", code)[1])
    else:
        code, usage = disassemble(kernel.asm["cubin"])
        opcodes, (where, *_) = nvidia_loops(code)
        registers = int(re.search(r"REG:(\d+)", usage)[1])
        spills = len(re.findall(r"\b(?:LDL|STL)\b", code))
    row = {"registers": registers, "spills": spills, "shared_bytes": kernel.metadata.shared}
    for name, starts in COUNTED.items():
        found = [o for o in opcodes[where] if o.startswith(starts[amd])]
        wide = name == "access_bytes"
        row[name] = max(map(access_bytes, found), default=0) if wide else len(found)
    return row


@functools.cache
def executed(P: int, Q: int, dtype: str, arch: str) -> dict[str, dict[str, int]]:
    """What one program executes in a step of modReLU, by the name of its kernel."""
    sys.path.insert(0, str(harness.ROOT / "tests"))
    from machine.count import per_step

    rows = geometry.Tile.of(P, Q, ITEMSIZE[dtype]).rows
    table = per_step(lambda T: launch_all(Problem.of(rows, T, P, Q, 1, dtype, "cpu")), arch)
    return {name: table[k.__name__] for name, k in KERNELS.items() if k.__name__ in table}


def measure(variant: Variant, arch: str) -> dict:
    """One row of the table."""
    before = os.times()
    kernel = build(variant, arch)
    seconds = sum(os.times()[:4]) - sum(before[:4])
    _, options = variant.options(arch)
    return {
        "variant": variant.name,
        "kernel": variant.kernel,
        "P": variant.P,
        "Q": variant.Q,
        "dtype": variant.dtype,
        "precision": variant.precision,
        "nonlinearity": variant.nonlinearity,
        "field": variant.field,
        "arch": arch,
        "triton": triton.__version__,
        "warps": options["num_warps"],
        "rows": variant.tile.rows,
        **counts(kernel, amd=TARGETS[arch].backend == "hip"),
        "compile_seconds": round(seconds, 2),
    }


def parser(doc: str, name: str, targets: Iterable[str]) -> argparse.ArgumentParser:
    """Flags that choose variants and where their rows go."""
    made = harness.parser(doc, name)
    made.add_argument("--arch", nargs="+", choices=targets, default=list(targets))
    made.add_argument("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS))
    made.add_argument("--variant", nargs="+", help="only the variants of these names")
    made.add_argument(
        "--match", nargs="+", default=[""], help="only variants named with one of them"
    )
    made.add_argument("--json", type=Path, help="write the rows to this file")
    return made


def report(
    made: argparse.ArgumentParser,
    args: argparse.Namespace,
    argv: list[str] | None,
    measure: Callable[[Variant, str], dict],
    name: str,
) -> int:
    """Measure what the flags choose; print it and write the rows."""
    if args.quick:  # the compiler has no toy sizes
        args.variant, args.arch = ["forward-16x16-bf16"], ["sm_90"]
    chosen = [
        v
        for v in variants()
        if v.kernel in args.kernel
        and any(word in v.name for word in args.match)
        and (args.variant is None or v.name in args.variant)
    ]
    if unknown := set(args.variant or ()) - {v.name for v in chosen}:
        made.error(f"no such variants: {', '.join(sorted(unknown))}")
    if not chosen:
        made.error(f"no variant of --kernel has --match {' '.join(args.match)} in its name")
    short = {
        "registers": "regs",
        "shared_bytes": "shared",
        "instructions_per_step": "instr",
        "tensor_core": "mma",
        "barriers": "bar",
        "shuffles": "shfl",
        "shared_loads": "lds",
        "shared_stores": "sts",
        "loads": "ldg",
        "stores": "stg",
        "access_bytes": "bytes",
        "compile_seconds": "cpu_s",
        "shared_wavefronts": "sh_wf",
    }
    print(f"triton {triton.__version__}")
    rows = []
    for variant in chosen:
        for arch in args.arch:
            row = measure(variant, arch)
            shown = [k for k in list(row)[list(row).index("warps") :] if k != "executed"]
            if not rows:
                heads = " ".join(f"{short.get(k, k)[:6]:>6}" for k in shown)
                print(f"{'variant':44} {'arch':7} {heads}")
            rows.append(row)
            numbers = " ".join(f"{row[k]:>6}" for k in shown)
            print(f"{variant.name:44} {arch:7} {numbers}", flush=True)
            if "executed" in row:
                print("   ", ", ".join(f"{n} {what}" for what, n in row["executed"].items()))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
        return 0
    args.again = True
    for arch in args.arch:
        results = harness.Results(arch, args, harness.command_line(name, argv))
        for row in rows:
            if row["arch"] == arch:
                line = f"{row['instructions_per_step']} instructions per step"
                results.add(name, row["variant"], line, **row)
        results.finish()
    return 0


def main(argv: list[str] | None = None) -> int:
    made = parser(__doc__, "compiled", TARGETS)
    made.add_argument("--executed", action="store_true", help="run them on tests/machine too")
    args = made.parse_args(argv)

    def measured(variant: Variant, arch: str) -> dict:
        row, plain = measure(variant, arch), Variant(variant.kernel, variant.P, variant.Q)
        runs = variant == replace(plain, dtype=variant.dtype) and arch in MACHINE
        if args.executed and runs and not variant.kernel.startswith("lstm"):
            row["executed"] = executed(variant.P, variant.Q, variant.dtype, arch)[variant.kernel]
        return row

    return report(made, args, argv, measured, "compiled")
