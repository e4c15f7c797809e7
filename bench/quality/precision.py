"""What each `precision` of the kernels costs: errors over many steps, and cycles of a step.

    python -m bench precision                 # without a GPU in Triton's interpreter: minutes
    python -m bench precision --table         # from the rows

One row of 16 x 16 units runs on the kernels, with unitary factors: without input from a random
state ("identity"), and with one (modReLU, beta = -0.02). Errors are relative, against the same in
float64: of the state after so many steps, and of the gradient of the last state so many steps
back. Cycles are those of `compiled_budget.json`, simulated for sm_90. Prints the table of
kernels/README.md; rows go to bench/results/precision.jsonl.
"""

import os

import torch

if not torch.cuda.is_available():  # before triton is imported
    os.environ["TRITON_INTERPRET"] = "1"

from bench import harness
from bench.static import model
from kru_triton import unitary_
from kru_triton.kernels import scan as kernels
from kru_triton.ops.arguments import How, Scan
from kru_triton.torch_backend import scan as torch_backend

MEMORY = {"bf16": torch.bfloat16, "bf16x2": torch.bfloat16, "fp32": torch.float32}
SIDE = 16


def errors(precision: str, nonlinearity: str, steps: list[int], device: str) -> dict[str, list]:
    """Errors of the states and of the gradients, for each of `steps`."""
    torch.manual_seed(0)
    time, units, dtype = max(steps), SIDE * SIDE, MEMORY[precision]
    factors = [unitary_(torch.empty(2, 1, SIDE, SIDE, device=device)) for _ in range(2)]
    h_0, cotangent = (torch.randn(1, 2 * units, device=device) for _ in range(2))
    free = nonlinearity == "identity"
    x = torch.randn(time, 1, 2 * units, device=device).mul(0.0 if free else 0.3).to(dtype)
    beta = None if free else torch.full((units,), -0.02, device=device)
    how = How(nonlinearity, precision=precision)
    given = Scan(x, *factors, beta, h_0)
    h = kernels.scan_forward(given, how)
    dx, *_ = kernels.scan_backward(None, cotangent, h, given, how)
    exact = Scan(*(None if y is None else y.double() for y in given))
    true_h, _ = torch_backend.forward(exact, how)
    true_dx = torch_backend.backward(None, cotangent.double(), true_h, exact, how)[0]
    return {
        "state": [float((h - true_h)[t - 1].norm() / true_h[t - 1].norm()) for t in steps],
        "gradient": [float((dx - true_dx)[-t].norm() / true_dx[-t].norm()) for t in steps],
    }


def print_table(rows: list[dict]) -> None:
    """The errors of the rows, beside the cycles of the budget."""
    budget = model.budget()
    shown = " / ".join(map(str, rows[-1]["steps"]))
    print(f"\n| nonlinearity | `precision` | state after {shown} steps | gradient {shown} back | "
          "cycles forward, 16x16 / 32x32 | backward |\n|---|---|---|---|---|---|")  # fmt: skip
    for row in harness.latest(rows):
        cells = [row["nonlinearity"], f"`{row['precision']}`"]
        cells += [" / ".join(f"{e:.1e}" for e in row[key]) for key in ("state", "gradient")]
        for kernel in ("forward", "backward"):
            names = (f"{kernel}-{size}-{row['precision']}" for size in ("16x16", "32x32"))
            cells.append(" / ".join(f"{budget[name]['step_cycles']:,}" for name in names))
        print(f"| {' | '.join(cells)} |")


def main(argv: list[str] | None = None) -> int:
    made = harness.parser(__doc__, "precision")
    made.add_argument("--steps", type=int, nargs="+", default=[16, 128, 1024])
    made.add_argument("--table", action="store_true", help="print the rows, run nothing")
    options = made.parse_args(argv)
    if options.table:
        print_table(harness.read_rows((options.out or harness.RESULTS) / "precision.jsonl"))
        return 0
    device = harness.pick_device("auto")
    steps = [1, 2] if options.quick else options.steps
    results = harness.Results(device, options, harness.command_line("precision", argv))
    results.path = results.folder / "precision.jsonl"
    for nonlinearity in ("identity", "modrelu"):
        for precision in MEMORY:
            row = {"precision": precision, "nonlinearity": nonlinearity, "steps": steps}
            row |= errors(precision, nonlinearity, steps, str(device))
            said = f"state {row['state']}, gradient {row['gradient']}"
            results.add("precision", f"{nonlinearity}-{precision}", said, **row)
    print_table(harness.read_rows(results.path))
    return results.finish()
