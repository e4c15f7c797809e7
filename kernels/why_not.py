"""What the kernels can run, in words; importable without triton."""

import functools
import importlib.metadata
import importlib.util
import os
import re

import torch

from kru_triton.nonlinearity import NONLINEARITIES

from .geometry import Tile, power_of_two

MAX_UNITS = 4096  # of a head
MAX_PADDED_SIDE = 64  # of a factor that is no power of two
MAX_HELD_SIDE = 128  # of a factor that a program holds; beyond, it is streamed (see `wide`)
MAX_ROWS = 32  # batch rows of a program: one bit each in the words of reset flags
SHARED_EVERYWHERE = 65536  # bytes of shared memory that any device grants a program
SHARED_INTERPRETED = 232448  # of the device that the interpreter stands for
MIN_TRITON = (3, 6)


def shared_bytes(tile: Tile, parts: int, precision: str, sets: int) -> int:
    """Upper bound of a program's shared memory with so many pairs of factors."""
    terms = 1 if precision == "bf16" else 2
    planes = 3 if parts == 2 else 1  # re, im, -im
    sides = (tile.S1 * tile.PP) ** 2 + (tile.S2 * tile.QP) ** 2
    # between the warps of one program; of float32 the packed intermediate is carried along
    exchange = tile.size * (12 if precision == "fp32" else 6) + 8192
    return sides * planes * terms * 2 * sets + exchange


def shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that the device grants a program."""
    if device.type != "cuda":
        return SHARED_INTERPRETED
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", SHARED_EVERYWHERE)


def has_tensor_memory(device: torch.device) -> bool:
    """Whether Triton keeps accumulators in the tensor memory of the device (sm_100 to sm_11x)."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] in (10, 11)


def is_wide(
    a: torch.Tensor, b: torch.Tensor, x: torch.Tensor, nonlinearity: str, precision: str
) -> bool:
    """Whether the kernels of `wide` run these factors, not those that hold them in a program.

    Args:
        a, b: (parts, H, P, P) and (parts, H, Q, Q).
        x: gives type and device.
    """
    P, Q = a.shape[-1], b.shape[-1]
    if max(P, Q) > MAX_HELD_SIDE:
        return True
    tile = Tile.of(P, Q, x.element_size())
    # 24 accumulators of 64 x 64 exceed the tensor memory, and Triton makes a kernel that traps
    if precision == "fp32" and a.shape[0] * tile.size > 4096 and has_tensor_memory(x.device):
        return True
    sets = 2 if nonlinearity == "modtanh" else 1
    needed = shared_bytes(tile, a.shape[0], precision, sets)
    return needed > max(SHARED_EVERYWHERE, shared_limit(x.device))


@functools.cache
def triton_version() -> tuple[int, ...] | None:
    """Version of the installed triton, None without one; triton itself is not imported."""
    if importlib.util.find_spec("triton") is None:
        return None
    return tuple(map(int, re.findall(r"\d+", importlib.metadata.version("triton"))[:3]))


def interpreted() -> bool:
    """Whether triton interprets kernels on the CPU (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


def why_not(
    x_proj: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *others: torch.Tensor | None,
    nonlinearity: str = "modrelu",
    precision: str = "fp32",
    lstm: bool = False,
    gate: torch.Tensor | None = None,
) -> str | None:
    """Why the kernels cannot run these arguments, in one sentence; None if they can.

    Args:
        x_proj: (T, B, parts·H·N), or any tensor of that last dimension, type and device.
        a, b: (parts, H, P, P) and (parts, H, Q, Q), the grouped factors; parts is 2 for the complex
            field, 1 for the real one and, with lstm, 4 for the gates.
        others: every other tensor of the call (beta, h_0, ...) or None; their device is checked.
        nonlinearity, precision: as in `scan.scan_forward`.
        lstm: asked for the kernels of `lstm`, not for those of `scan`.
        gate: as in `scan.scan_forward`.
    """
    version = triton_version()
    if version is None:
        return "triton is not installed"
    if version < MIN_TRITON:
        return (
            f"triton {version[0]}.{version[1]} is older than {MIN_TRITON[0]}.{MIN_TRITON[1]}, the "
            "oldest with which these kernels are checked"
        )
    devices = {t.device for t in (x_proj, a, b, gate, *others) if t is not None}
    if len(devices) > 1:
        return f"the arguments are on different devices ({', '.join(sorted(map(str, devices)))})"
    if x_proj.device.type == "cpu" and not interpreted():
        return "the tensors are on the CPU and triton's interpreter is off (TRITON_INTERPRET=1)"
    if x_proj.device.type not in ("cpu", "cuda"):
        return f"the kernels run on CUDA and ROCm devices, not on {x_proj.device.type!r}"
    if x_proj.dtype not in (torch.float32, torch.bfloat16):
        return f"x_proj is {x_proj.dtype}; the kernels take torch.float32 and torch.bfloat16"
    if nonlinearity not in NONLINEARITIES:
        return f"nonlinearity {nonlinearity!r} is not one of {', '.join(NONLINEARITIES)}"
    if precision not in ("fp32", "bf16x2", "bf16"):
        return f"precision {precision!r} is not one of fp32, bf16x2, bf16"
    for name, w in (("A", a), ("B", b)):
        if w.dtype != torch.float32:
            return f"factor {name} is {w.dtype}; the kernels take torch.float32 factors"
        if w.dim() != 4 or w.shape[-1] != w.shape[-2]:
            return f"factor {name} has shape {tuple(w.shape)}, not (parts, heads, side, side)"
        side = w.shape[-1]
        if side > MAX_PADDED_SIDE and (lstm or side != power_of_two(side)):
            return (
                f"factor {name} is {side} x {side}; beyond {MAX_PADDED_SIDE} x {MAX_PADDED_SIDE} "
                f"the kernels take {'none' if lstm else 'powers of two alone'}"
            )
    if a.shape[:2] != b.shape[:2]:
        return f"the factors disagree in parts and heads: {tuple(a.shape)}, {tuple(b.shape)}"
    parts, heads, P, _ = a.shape
    if parts not in ((4,) if lstm else (1, 2)):
        return f"the factors have {parts} planes, not {'4' if lstm else '1 or 2'}"
    Q = b.shape[-1]
    if x_proj.shape[-1] != parts * heads * P * Q:
        return (
            f"x_proj has {x_proj.shape[-1]} features, not {parts} x {heads} heads x {P}·{Q} units"
        )
    if P * Q > MAX_UNITS:
        return f"{P}·{Q} units a head exceed the {MAX_UNITS} that a program's step can take"
    if gate is not None and nonlinearity == "modtanh":
        return 'no kernel has a gate with "modtanh"'
    if gate is not None and is_wide(a, b, x_proj, nonlinearity, precision):
        return f"no kernel has a gate with factors of {P} x {P} and {Q} x {Q}, which are streamed"
    tile = Tile.of(P, Q, x_proj.element_size())
    if tile.rows > MAX_ROWS:
        return f"{P}·{Q} units are too few: a program would have to pack {tile.rows} batch rows"
    if lstm:  # backward, a program holds four pairs of factors and their adjoints
        needed = shared_bytes(tile, 1, precision, 8)
        limit = max(SHARED_EVERYWHERE, shared_limit(x_proj.device))
        if needed > limit:
            return (
                f"{P}·{Q} units in {precision} precision need {needed} bytes of shared memory and "
                f"the device grants {limit}"
            )
    if heads > 65535:
        return f"{heads} heads exceed the 65535 programs of a grid's second dimension"
    if x_proj.dim() == 3 and max(x_proj.shape[:2]) >= 2**31 - 65536:
        return f"x_proj of shape {tuple(x_proj.shape)} has more rows or steps than an int32 counts"
    return None
