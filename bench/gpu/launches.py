"""Launches of the recurrence kernels by themselves, and their check against float64.

    python -m bench.gpu.launches 16x16 32x32 --rows 1 --steps 256

launches forward, adjoint and weight gradients of these sizes once each, for the profiler and the
sanitizer. B batch rows, T steps, P, Q sides of the factors of each of `heads` heads.
"""

import argparse
import contextlib
import itertools
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import harness
from kru_triton import kru_scan, unitary_
from kru_triton.kernels import why_not
from kru_triton.ops.arguments import How, Scan

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "bf16x2": torch.bfloat16}  # by precision
KERNELS = ("forward", "backward", "weight_grad")


def why_no_kernels(device: torch.device) -> str | None:
    """Why no kernel can run on the device, in one sentence; None if they can."""
    w = torch.empty(2, 1, 16, 16, device=device)
    return why_not.why_not(torch.empty(1, 1, 512, device=device), w, w)


@contextlib.contextmanager
def stand_in() -> Iterator[None]:
    """With KRU_TARGET=sm_90, kernels take CPU tensors for those of a device of this target, and
    tests/machine executes their compiled code.

    Raises:
        AssertionError: its sanitizer has found something.
    """
    target = os.environ.get("KRU_TARGET")
    if not target:
        yield
        return
    sys.path.insert(0, str(harness.ROOT / "tests"))
    from machine.driver import active

    with active(target) as machine:
        yield
    if findings := machine.findings():
        raise AssertionError("; ".join(findings))


@dataclass
class Problem:
    """What the launchers take, for modReLU; B rows and T steps, time first."""

    scan: Scan
    how: How

    @classmethod
    def of(cls, B: int, T: int, P: int, Q: int, heads: int, dtype: str, device) -> "Problem":
        torch.manual_seed(0)
        units = heads * P * Q
        a, b = (unitary_(torch.empty(2, heads, side, side, device=device)) for side in (P, Q))
        x = torch.randn(T, B, 2 * units, device=device, dtype=DTYPES[dtype])
        beta = 0.02 * torch.randn(units, device=device)
        return cls(Scan(x, a, b, beta), How("modrelu", precision=dtype))

    def forward(self, **tuning) -> Tensor:
        from kru_triton.kernels import scan  # imports triton

        return scan.scan_forward(self.scan, self.how, **tuning)

    def backward(self, h: Tensor, dh: Tensor, **tuning) -> Tensor:
        from kru_triton.kernels import scan

        return scan.scan_backward(dh, None, h, self.scan, self.how, **tuning)[0]

    def weight_grad(self, dx: Tensor, h: Tensor, **tuning) -> tuple[Tensor, Tensor, Tensor]:
        from kru_triton.kernels import weight_grad

        return weight_grad.weight_grad(dx, h, self.scan, self.how, **tuning)

    def part(self, steps: int) -> "Problem":
        """The first steps."""
        return Problem(self.scan._replace(x=self.scan.x[:steps]), self.how)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-300)).item()


def checked(own: Problem) -> dict[str, float]:
    """Relative errors of h, dx and the weight gradients against float64, of three batch rows.

    The kernels run on all rows, with a cotangent on those three. Rounding the state is a random
    walk over the steps, of 5e-3 each in bfloat16 and 2e-5 in float32 (products of split numbers);
    modReLU's adjoint divides by |z| and flips at its kink: gradients are an order worse.

    Raises:
        AssertionError: an error is too large, or NaN.
    """
    x, a, b, beta = own.scan[:4]
    rows = sorted({0, x.shape[1] // 2, x.shape[1] - 1})
    h = own.forward()
    dh = torch.zeros_like(h)
    dh[:, rows] = torch.randn_like(dh[:, rows])
    dx = own.backward(h, dh)
    actual = [h[:, rows], dx[:, rows], *own.weight_grad(dx, h)]
    narrow = own.how.precision != "fp32"
    a, b = (w.bfloat16() if own.how.precision == "bf16" else w for w in (a, b))
    leaves = [w.double().requires_grad_() for w in (x[:, rows], a, b, beta)]
    exact = kru_scan(leaves[0].transpose(0, 1), leaves[1:3], leaves[3], backend="torch")[0]
    exact = exact.transpose(0, 1)
    grads = torch.autograd.grad(exact, leaves, dh[:, rows].double())
    names = ("h", "dx", "dA", "dB", "dbeta")
    errors = dict(zip(names, map(relative_error, actual, (exact.detach(), *grads))))
    state = (5e-3 if narrow else 2e-5) * math.sqrt(len(x) + 8)
    for name, error in errors.items():
        limit = state if name == "h" else (6 if narrow else 30) * state
        if not error <= limit:
            raise AssertionError(f"{name} is wrong: relative error {error:.2e}, limit {limit:.1e}")
    return errors


def launch_all(own: Problem) -> None:
    h = own.forward()
    own.weight_grad(own.backward(h, torch.randn_like(h)), h)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.launches", description=__doc__)
    parser.add_argument("sizes", nargs="+", help="PxQ")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--rows", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device = harness.device_for(options, parser)
    for size, dtype in itertools.product(options.sizes, options.dtypes):
        P, Q = map(int, size.split("x"))
        launch_all(Problem.of(options.rows, options.steps, P, Q, 1, dtype, device))
        harness.synchronize(device)


if __name__ == "__main__":
    main()
