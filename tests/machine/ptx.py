"""PTX as Triton emits it, as a list of instructions."""

import functools
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# numpy's type of every PTX type; the bits of bfloat16 and of pairs are kept as integers
NUMPY = {
    f"{letter}{bits}": np.dtype(f"{kind}{bits // 8}")
    for letter, kind in (("b", "u"), ("u", "u"), ("s", "i"), ("f", "f"))
    for bits in (8, 16, 32, 64)
    if (letter, bits) != ("f", 8)
}
NUMPY |= {"pred": np.dtype(bool), "bf16": np.dtype("u2")}
NUMPY |= {"bf16x2": np.dtype("u4"), "f16x2": np.dtype("u4")}


@dataclass
class Instruction:
    text: str
    opcode: str
    predicate: str | None
    operands: list[str]
    source: str  # file and line of the kernel

    def __str__(self) -> str:
        return f"{self.text}  // {self.source}"


@dataclass
class Program:
    name: str
    parameters: list[str]
    threads: int
    capability: int  # 80 for sm_80
    symbols: dict[str, int]  # offset of every variable in shared memory
    static_shared: int
    declared: dict[str, str] = field(default_factory=dict)  # type by register name or its prefix
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, int] = field(default_factory=dict)  # index of every register in use
    types: list[str] = field(default_factory=list)  # of those
    steps: list[Any] = field(default_factory=list)  # what `machine` makes of the instructions

    def register(self, name: str) -> int:
        if name not in self.registers:
            prefix = re.match(r"%?[A-Za-z_$.]+", name)
            kind = self.declared.get(name) or self.declared.get(prefix[0] if prefix else "")
            if kind is None:
                raise NotImplementedError(f"operand {name!r} is no declared register")
            self.registers[name] = len(self.types)
            self.types.append(kind)
        return self.registers[name]

    def dtype(self, name: str) -> np.dtype:
        return NUMPY[self.types[self.register(name)]]


def operands_of(text: str) -> list[str]:
    """The parts between the commas that are in no bracket."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text)]


def elements(operand: str) -> list[str]:
    """The registers of a vector {a, b}, or the single one."""
    return operands_of(operand.strip("{} ")) if operand.startswith("{") else [operand]


def instruction(text: str, source: str) -> Instruction:
    predicate, rest = re.match(r"(?:@(!?%?[\w$]+)\s+)?(.*)", text).groups()
    opcode, _, operands = rest.partition(" ")
    return Instruction(text, opcode, predicate, operands_of(operands), source)


ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{(.*?)^\}", re.DOTALL | re.MULTILINE)
PARAMETER = re.compile(r"\.param\s+\.\w+\s+(?:\.ptr[^,]*?)?([\w$]+)\s*(?:,|$)")
SHARED = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]")


@functools.lru_cache(maxsize=64)
def parse(text: str) -> Program:
    """The one kernel of a module."""
    name, parameters, directives, body = ENTRY.search(text).groups()
    threads = int(re.search(r"\.reqntid\s+(\d+)", directives)[1])
    capability = int(re.search(r"\.target\s+sm_(\d+)", text)[1])
    symbols, shared = {}, 0
    for align, symbol, size in SHARED.findall(text):
        symbols[symbol] = shared = -(-shared // int(align)) * int(align)
        shared += int(size or 0)
    parameters = PARAMETER.findall(parameters.strip())
    program = Program(name, parameters, threads, capability, symbols, shared)
    rest, source = "", ""
    for line in body.splitlines():
        if location := re.match(r"\s*\.loc\b[^/]*//\s*(.*)", line):
            source = location[1]
            continue
        rest = f"{rest} {line.split('//')[0]}".strip()
        while rest:
            if label := re.match(r"([\w$]+):(?!:)", rest):
                program.labels[label[1]] = len(program.code)
                rest = rest[label.end() :].strip()
            elif rest[0] in "{}":  # a scope of inline assembly
                rest = rest[1:].strip()
            elif ";" in rest:
                statement, rest = (" ".join(part.split()) for part in rest.split(";", 1))
                if declaration := re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement):
                    for register in declaration[2].split(","):
                        program.declared[re.sub(r"<\d+>", "", register.strip())] = declaration[1]
                elif statement and not statement.startswith(".pragma"):
                    program.code.append(instruction(statement, source))
            else:
                break
    return program
