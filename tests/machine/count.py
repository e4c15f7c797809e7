"""What a step of compiled code does beyond what its text shows, from runs of T and T + 1 steps."""

from collections import Counter
from collections.abc import Callable

from .driver import active

CLASSES = {
    "tensor core": ("mma.", "wgmma."),
    "global load": ("ld.global",),
    "global store": ("st.global",),
    "shared": ("ld.shared", "st.shared", "ldmatrix", "stmatrix", "cp.async"),
    "barrier": ("bar.", "fence"),
    "shuffle": ("shfl",),
    "prefetch": ("prefetch",),
    "special function": ("rsqrt", "rcp", "tanh", "ex2", "lg2", "sqrt", "div"),
    "bf16 conversion": ("cvt.rn.bf16", "cvt.f32.bf16"),
    "bf16 arithmetic": ("fma.rn.bf16", "mul.bf16", "add.bf16", "neg.bf16"),
    "float arithmetic": (
        *("fma.rn.f32", "mul.f32", "add.f32", "sub.f32", "max.f32", "min.f32", "neg.f32"),
        *("setp.gt.f32", "setp.lt.f32", "selp.f32", "max.NaN", "abs.f32"),
    ),
    "move": ("mov.",),
    "branch": ("bra", "ret"),
}


def class_of(opcode: str) -> str:
    for name, starts in CLASSES.items():
        if opcode.startswith(starts):
            return name
    return "integer and predicate"


def per_step(call: Callable[[int], object], arch: str, steps: int = 12) -> dict[str, Counter]:
    """Counts of one step, of all warps of a launch together, for every kernel that is launched.

    Args:
        call: launches kernels for a sequence of so many steps, on CPU tensors.
        arch: "sm_80" or "sm_90".
        steps: long enough for the loop to have no first and last step in common.

    Returns:
        for every kernel by its name (of several launches of one, their sum) a Counter: instructions
        by the names in CLASSES; "wavefronts" of shared memory, and "conflicts" among them, which
        are there for its banks alone; "load" and "store" of global memory: "requests" (one a
        warp and instruction), "sectors" of 32 bytes and distinct "bytes".
    """
    table: dict[str, Counter] = {}
    with active(arch, traffic=True) as device:
        for length, sign in ((steps + 1, 1), (steps, -1)):
            call(length)
            for launch in device.launches:
                counts = table.setdefault(launch.kernel, Counter())
                for opcode, n in launch.report.executed.items():
                    counts[class_of(opcode)] += sign * n
                for name, n in launch.report.traffic.items():
                    counts[name] += sign * n
            if findings := device.findings():
                raise RuntimeError("counted code is not in order: " + "; ".join(findings))
    for counts in table.values():
        counts["conflicts"] = counts["wavefronts"] - counts.pop("wavefronts without conflicts", 0)
    return table
