"""What every op runs on which backend: each cell is a call whose results and gradients are checked.

python tests/conformance.py             print the table of kernels/README.md
python tests/conformance.py --write     and put it there, between its marks
"""

import argparse
import dataclasses
import functools
import inspect
import os
import re
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():  # before triton is imported
    os.environ["TRITON_INTERPRET"] = "1"

from cases import DEVICE, OPS, Case, run, run_oracle, square
from oracle import rms_errors
from torch.autograd import forward_ad

README = Path(__file__).parents[1] / "kernels" / "README.md"
MARKS = "<!-- conformance -->", "<!-- /conformance -->"
REFUSALS = (RuntimeError, TypeError, ValueError)
PREFIX = r'^(backend="triton" cannot run here|kru_\w+): '

# Relative errors of results and of gradients against the oracle in float64. A product of bfloat16
# pairs is exact to 2^-17, and gradients pass through it twice; one of bfloat16 to 2^-9, several of
# which add up, and modReLU magnifies them by 1/|z|.
LIMITS = {"fp32": (2e-5, 3e-4), "bf16": (2e-2, 8e-2)}


def compiled(op):
    torch._dynamo.reset()
    return torch.compile(op, fullgraph=True, backend="aot_eager")


def input_of(arguments):
    return "table" if "table" in arguments else "x_proj"


def per_sample(op):
    """One sample of the input under vmap."""

    def function(**arguments):
        name = input_of(arguments)
        call = torch.func.vmap(lambda x: op(**{**arguments, name: x}))
        return torch.utils._pytree.tree_map(lambda y: y[0], call(arguments[name][None]))

    return function


def with_tangents(op):
    """In forward mode; what comes back are the results."""

    def function(**arguments):
        name = input_of(arguments)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(arguments[name], arguments[name].detach())
            results = op(**{**arguments, name: dual})
            return torch.utils._pytree.tree_map(lambda y: forward_ad.unpack_dual(y).primal, results)

    return function


def gradient_of(op):
    """h and the gradient of the input, which is then differentiated once more."""

    def function(**arguments):
        h = torch.utils._pytree.tree_leaves(op(**arguments))[0]
        x = arguments[input_of(arguments)]
        return h + torch.autograd.grad(h.square().sum(), x, create_graph=True)[0].sum()

    return function


def under_autocast(op):
    def function(**arguments):
        with torch.autocast(DEVICE, torch.bfloat16):
            return op(**arguments)

    return function


@dataclasses.dataclass(frozen=True)
class Option:
    """A row of the table: what it changes in the case of every op, in its types and in the call."""

    case: dict[str, Any] = dataclasses.field(default_factory=dict)
    of: str = "x_proj table"  # only ops that take one of these arguments have it
    dtype: torch.dtype = torch.float32  # of all arguments
    x_dtype: torch.dtype | None = None  # of the input, where it is another one
    precision: str = "auto"
    wrapped: Any = None  # the op in a transform
    limits: str = "fp32"


def nonlinearity(name):
    return Option({"act": name}, of="nonlinearity")


ROWS = (2, 0, 1, 2, 1)
BF16, F16, F64 = torch.bfloat16, torch.float16, torch.float64
OPTIONS = {
    "complex field": Option(of="nonlinearity block"),
    "real field": Option({"field": "real"}),
    '`nonlinearity="modrelu"`': nonlinearity("modrelu"),
    '`nonlinearity="modtanh"`': nonlinearity("modtanh"),
    '`nonlinearity="tanh"`': nonlinearity("tanh"),
    '`nonlinearity="relu"`': nonlinearity("relu"),
    '`nonlinearity="identity"`': nonlinearity("identity"),
    "without `beta`": Option({"beta": 0.0}, of="beta"),
    "without an initial state": Option({"starts": ""}),
    "without `c_0`": Option({"starts": "h_0"}, of="c_0"),
    "`gate`": Option({"gate": True}, of="gate"),
    '`gate`, `nonlinearity="modtanh"`': Option({"gate": True, "act": "modtanh"}, of="gate"),
    "`gate`, `reset` and `lengths`": Option(
        {"gate": True, "reset": True, "lengths": ROWS, "B": 5}, of="gate"
    ),
    "`reset`": Option({"reset": True, "B": 5}, of="reset"),
    "`lengths`": Option({"lengths": ROWS, "B": 5}, of="lengths"),
    "`reset` and `lengths`": Option({"reset": True, "lengths": ROWS, "B": 5}, of="lengths"),
    "time-first memory": Option({"layout": "time_first"}, of="reset"),
    "any strides": Option({"layout": "sliced"}, of="reset"),
    "gradient through `h` alone": Option({"cotangents": "h"}),
    "gradient through `h_n` alone": Option({"cotangents": "h_n"}, of="reset"),
    "gradient through `c_n` alone": Option({"cotangents": "c_n"}, of="c_0"),
    "no row": Option({"B": 0, "reset": True, "lengths": ()}),
    "no step": Option({"T": 0, "reset": True, "lengths": (0, 0, 0)}, of="reset"),
    "2 heads": Option({"H": 2}),
    "factors 2x2, six of them": Option({"shapes": square(*[2] * 6)}),
    "factors (4, 8) and (8, 4)": Option({"shapes": ((4, 8), (8, 4)), "B": 1}),
    "one factor 64": Option({"shapes": square(64), "B": 1}),
    "factors 3 and 11 (padded)": Option({"shapes": square(3, 11)}),
    "factors 2 and 128": Option({"shapes": square(2, 128), "B": 1}),
    "factors 2 and 256 (streamed)": Option({"shapes": square(2, 256), "B": 1}),
    "factors 2 and 2": Option({"shapes": square(2, 2)}),
    "factors 2 and 65": Option({"shapes": square(2, 65), "B": 1}),
    "float64": Option(dtype=F64),
    "float32": Option(),
    "bfloat16 input": Option(x_dtype=BF16, limits="bf16"),
    "float16 input": Option(x_dtype=F16, limits="bf16"),
    "bfloat16 input and factors": Option(dtype=BF16, limits="bf16"),
    '`precision="bf16x2"`': Option(precision="bf16x2", limits="bf16"),
    '`precision="bf16"`': Option(precision="bf16", limits="bf16"),
    "autocast": Option(wrapped=under_autocast, limits="bf16"),
    "`torch.compile(fullgraph=True)`": Option(wrapped=compiled),
    "`torch.func.vmap`": Option(wrapped=per_sample),
    "forward mode": Option(wrapped=with_tangents),
    "second derivatives by autograd": Option({"cotangents": "h"}, wrapped=gradient_of),
}


def applies(op, option):
    names = inspect.signature(OPS[op][0]).parameters
    return any(name in names for name in option.of.split())


@functools.cache
def refusal(op, name, backend):
    """Why a backend does not run an option of an op, in its own words; None: it does, rightly."""
    option = OPTIONS[name]
    act = "identity" if op == "linear_scan" else "modrelu"
    case = Case(**{"shapes": square(8, 8), "act": act, "T": 2, "beta": -0.05, **option.case}, op=op)
    function = option.wrapped(OPS[op][0]) if option.wrapped else OPS[op][0]
    how = {"x_dtype": option.x_dtype, "backend": backend, "precision": option.precision}
    try:
        results = run(function, case, option.dtype, device=DEVICE, **how)
    except REFUSALS as error:
        return re.sub(PREFIX, "", str(error))
    for key, error in rms_errors(results, run_oracle(case)).items():
        limit = LIMITS[option.limits][key.startswith("d ")]
        assert error <= limit, f"{op}, {name}, {backend}: {key} {error:.1e} > {limit:.0e}"
    return None


def table():
    """The table in Markdown, and the refusals under it."""
    lines = [
        "| option | " + " | ".join(f"`{OPS[op][0].__name__}`" for op in OPS) + " |",
        "|---|" + "---|" * len(OPS),
    ]
    reasons = {}
    for name, option in OPTIONS.items():
        cells = []
        for op in OPS:
            if not applies(op, option):
                cells.append("–")
                continue
            why = {backend: refusal(op, name, backend) for backend in ("torch", "triton")}
            runs = [backend for backend, reason in why.items() if reason is None]
            words = "both" if len(runs) == 2 else runs[0] if runs else "none"
            marks = [f"[{reasons.setdefault(r, len(reasons) + 1)}]" for r in why.values() if r]
            cells.append(" ".join([words, *dict.fromkeys(marks)]))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", *(f"{number}. {reason}" for reason, number in reasons.items())]
    return "\n".join(lines)


def written():
    """The table that stands in kernels/README.md."""
    return README.read_text().split(MARKS[0])[1].split(MARKS[1])[0].strip()


def main():
    parser = argparse.ArgumentParser(description=table.__doc__)
    parser.add_argument("--write", action="store_true", help="into kernels/README.md, too")
    options = parser.parse_args()
    text = table()
    print(text)
    if options.write:
        README.write_text(README.read_text().replace(written(), text))


if __name__ == "__main__":
    main()
