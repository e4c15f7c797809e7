"""Constants and launch options of every kernel; importable without triton.

Nothing here depends on B, T or strides: those never compile a kernel again.
"""

import math
from collections.abc import Collection

from .geometry import Tile, Wide
from .why_not import triton_version

GIVEN = ("h_0", "reset", "lengths", "tokens", "gate")  # what a call of a scan may have
FENCES_COPIES = (3, 7, 1)  # the first triton with a fence between cp.async and wgmma

# Choices that never change a result beyond rounding, and that only a device can settle: keyword
# arguments of `compile_options`, `weight_grad_options` and of the launchers of `scan` and
# `weight_grad`
TUNABLE = {
    "ANCHORED": "factors in registers for the whole sequence, not in shared memory",
    "AHEAD": "steps whose rows are in registers before they are used; 0: and a step begins with X",
    "PREFETCH": "steps by which a row is fetched into L2 before it is read; 0: not at all",
    "BETA_IN_LOOP": "beta from L1 in every step, not in registers",
    "BLOCK": "side of the blocks of a streamed factor",
    "FRAGMENTS": "weight gradients from rows loaded as operands, not through shared memory",
    "SLICES": "programs that share the rows of one weight gradient, where dA and dB are apart",
    "num_warps": "warps of a program",
    "num_stages": "depth of Triton's own pipelining",
    "maxnreg": "most registers of a thread, None: ptxas decides",
}


def overridden(constants: dict, options: dict, tuning: dict) -> tuple[dict, dict]:
    """Constants and launch options with the choices of `tuning` in place of the default ones.

    Raises:
        TypeError: for a name in TUNABLE that this kernel does not have, or one that is not there.
    """
    for name in tuning:
        if name not in TUNABLE or (name.isupper() and name not in constants):
            can = [n for n in TUNABLE if n.islower() or n in constants]
            raise TypeError(f"tuning: {name!r} is no choice of this kernel; it has {can}")
    constants = {k: tuning.get(k, v) for k, v in constants.items()}
    return constants, options | {k: v for k, v in tuning.items() if k.islower()}


def split_operands(precision: str) -> dict[str, bool]:
    """Which operands of a product are pairs of bfloat16, by the names in the kernels."""
    return {"SPLIT": precision == "fp32", "SPLIT_FACTORS": precision != "bf16"}


def compile_options(
    tile: Tile,
    heads: int,
    parts: int,
    precision: str,
    nonlinearity: str,
    *,
    nvidia: bool,
    backward: bool = False,
    given: Collection[str] = (),
    gate_parts: int | None = None,
    arch: int = 90,
    **tuning,
) -> tuple[dict, dict]:
    """Constants of a scan kernel that depend on shape, type and device alone, and launch options.

    Nothing here depends on B, T or strides: those never compile a kernel again. The choices are
    those with the fewest cycles and no spills in compiled code (`python -m bench schedule`);
    a device may want others, which `tuning` puts in their place (names in TUNABLE).

    Args:
        given: which of GIVEN the call has; of an adjoint, gate alone matters.
        gate_parts: parts of the gate, 1 where it is real; None: those of a state.
        arch: as `launch.architecture` says.
    """
    values = tile.size * parts
    split, pairs = precision == "fp32", precision != "bf16"
    one = values <= 512
    # Z in place of X from step to step, and with it the next step's row, or the next two where a
    # step is shorter than the way to L2 and values are not read one by one
    two = one and nvidia and not (split or backward) and tile.aligned > 1
    real_gate = nvidia and gate_parts == 1 and parts == 2
    of_256_units = real_gate and values == 512 and tile.rows == 1
    if of_256_units and arch < 100:
        two = False  # its load would sink to where it is used
    ahead = 2 if two else int(one if split else values <= 4096)
    if not nvidia and (nonlinearity == "modtanh" or not (one or backward)):
        ahead = 0  # fewer instructions of AMD's devices
    if "tokens" in given:  # they are read ahead themselves
        ahead = min(ahead, int(one))
    # a table of tokens is in L2, or soon will be
    fetched = nvidia and tile.lines and "tokens" not in given
    constants = {
        "H": heads,
        **tile.constants,
        "V": tile.V,
        "ALIGNED": tile.aligned,
        "PARTS": parts,
        "GATE_PARTS": gate_parts or parts,
        **split_operands(precision),
        "ACT": nonlinearity,
        "NVIDIA": nvidia,
        # constants in registers, while they fit
        "ANCHORED": values <= 1024 and max(tile.PP, tile.QP) <= 32,
        "AHEAD": ahead,
        # steps by which rows are fetched into L2, about a microsecond of them
        "PREFETCH": max(2, min(8, 4096 // tile.size)) if fetched else 0,
        "BETA_IN_LOOP": values > (4096 if not split else 512 if backward else 2048),
    }
    options = {
        "num_warps": 1 if values <= 2048 else 4,
        "num_stages": 1,
        "enable_fp_fusion": True,  # the default of Triton 3.10 is another
    }
    if nvidia and values > 4096 and (pairs or max(tile.PP, tile.QP) == 128):
        options["num_warps"] = 8  # of AMD's, a thread would have half the registers, and spill
    spills = backward or split or (real_gate and arch >= 100)
    if nvidia and spills and "gate" in given and values == 2048:
        options["num_warps"] = 4  # one would spill
    if nvidia and options["num_warps"] == 1:
        # without it ptxas would stop at 128 or 168 and spill
        options["maxnreg"] = 255
    # what is an exception to the rules above has fewer cycles, or does not spill
    if nvidia and split and backward and tile.lines and values == (8192 if arch < 90 else 4096):
        constants["BETA_IN_LOOP"] = False
    bf16_on_nvidia = nvidia and precision == "bf16"
    if bf16_on_nvidia and not backward and values == 8192 and arch >= 90:
        constants["BETA_IN_LOOP"] = False
    narrow = one and tile.V == 2 and arch != 90 and "gate" not in given
    if bf16_on_nvidia and not backward and narrow:
        # with more registers its loads sink to their uses
        options["maxnreg"] = 128 if given or arch >= 100 else 100
    if bf16_on_nvidia and backward and values == 4096 and tile.PP == 128 and arch < 90:
        options["num_warps"] = 8
    if bf16_on_nvidia and backward and values == 2048 and arch >= 100:
        constants["BETA_IN_LOOP"] = True
    if bf16_on_nvidia and backward and tile.lines and values == 4096 and arch >= 100:
        options["maxnreg"] = 184  # ptxas would stop at 168 and spill
    if bf16_on_nvidia and backward and values == 8192 and arch < 90:
        constants["BETA_IN_LOOP"], options["num_warps"] = tile.PP == 128, 8
    if bf16_on_nvidia and backward and of_256_units and arch == 90:
        options["maxnreg"] = 168  # with more registers the gate's load sinks to its use
    if bf16_on_nvidia and backward and values == 1024:
        # with more registers it waits longer
        few = nonlinearity == "modrelu" and tile.lines and arch >= 90
        options["maxnreg"] = 200 if few else 232
    if (
        bf16_on_nvidia
        and not backward
        and values == 2048
        and (tile.P, tile.Q) == (32, 32)
        and not {"h_0", "reset", "tokens", "gate"}.intersection(given)
    ):  # what has no selection and no rows of its own to follow has registers for more
        if arch == 90 and nonlinearity == "modrelu":
            constants |= {"ANCHORED": True, "BETA_IN_LOOP": True}
        elif nonlinearity == "modrelu":
            constants["AHEAD"] = 2
        elif "tanh" in nonlinearity:
            constants["ANCHORED"] = True
    return overridden(constants, options, tuning)


def wide_options(
    wide: Wide,
    heads: int,
    parts: int,
    precision: str,
    nonlinearity: str,
    nvidia: bool,
    **tuning,
) -> tuple[dict, dict]:
    """The same for the kernels of `wide`."""
    columns, terms = wide.rows * wide.padded, 1 if precision == "bf16" else 2
    block = 64 if columns * terms <= 16 else 32
    constants = {
        "H": heads,
        "W": wide.W,
        "SIDE": wide.side,
        "N_SIDE": wide.n,
        "PADDED": wide.padded,
        "ROWS": wide.rows,
        "STRIDE_W": wide.n if wide.left else 1,
        "STRIDE_N": 1 if wide.left else wide.W,
        "BLOCK": block,
        "PARTS": parts,
        **split_operands(precision),
        "ACT": nonlinearity,
        "NVIDIA": nvidia,
    }
    warps = 4 if columns * terms <= 32 else 8
    fenced = not nvidia or block < 64 or triton_version() >= FENCES_COPIES
    # one stage: through registers, behind which every triton has a fence
    options = {"num_warps": warps, "num_stages": 3 if fenced else 1, "enable_fp_fusion": True}
    return overridden(constants, options, tuning)


def weight_grad_options(
    tile: Tile,
    heads: int,
    parts: int,
    precision: str,
    itemsize: int,
    *,
    nvidia: bool,
    fragments: bool,
    **tuning,
) -> tuple[dict, dict, bool]:
    """The same for the weight-gradient kernel, and whether its sums fit one launch.

    Args:
        fragments: whether a warp's accumulators are, register by register, an operand of its next
            product (on AMD's devices they are not).
    """
    split = precision == "fp32"
    terms = 2 if split else 1
    values = tile.size * parts * terms
    PE, QE = tile.S1 * tile.PP, tile.S2 * tile.QP
    # longer sides spill, and rows whose values are read one by one are faster without
    fragments &= max(PE, QE) * terms <= 32 and (split or tile.aligned > 1)
    fragments = bool(tuning.get("FRAGMENTS", fragments))
    together = fragments or (PE * PE + QE * QE) * parts * terms <= 4096
    slices = 4 if values >= 16384 else 2 if values >= 4096 else 1
    constants = {
        "H": heads,
        **tile.constants,
        "FRAGMENTS": fragments,
        "SLICES": PE // 16 if fragments else slices,
        "V": tile.V,
        "W": min(16 // itemsize, QE // 8),
        "VECTOR": math.gcd(tile.Q, 16 // itemsize),
        "PARTS": parts,
        "SPLIT": split,
        "NVIDIA": nvidia,
    }
    warps = 1 if values <= 512 or fragments else 2 if values <= 1024 else 4 if values <= 4096 else 8
    options = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}
    if nvidia and warps == 1:
        options["maxnreg"] = 255
    return *overridden(constants, options, tuning), together


def lstm_options(
    tile: Tile,
    heads: int,
    precision: str,
    backward: bool,
    nvidia: bool,
    arch: int = 90,
    **tuning,
) -> tuple[dict, dict]:
    """The same for the LSTM kernels, which hold four pairs of factors, backward eight."""
    split, pairs = precision == "fp32", precision != "bf16"
    constants = {
        "H": heads,
        **tile.constants,
        "V": tile.V,
        "ALIGNED": tile.aligned,
        **split_operands(precision),
        "NVIDIA": nvidia,
        # all eight as pairs leave the state of an adjoint no registers
        "ANCHORED": tile.size * (2 if backward or pairs else 1) <= 512
        and not (backward and precision == "bf16x2"),
        "AHEAD": int(tile.size == 256 and nvidia and not (backward and split)),
    }
    work = tile.size * (2 if backward else 1) * (2 if pairs else 1)
    most = 4096 if precision == "bf16x2" else 2048  # of four warps
    options = {
        "num_warps": 1 if work <= 1024 else 4 if work <= most or not nvidia else 8,
        "num_stages": 1,
        "enable_fp_fusion": True,
    }
    if nvidia and options["num_warps"] == 1:
        # in the one case with more it waits longer
        short = (tile.P, tile.Q) == (16, 16) and not backward and not pairs and arch == 90
        options["maxnreg"] = 128 if short else 248 if arch < 90 and split and not backward else 255
    elif nvidia and tile.size == 4096 and not backward and arch < 90:
        options["maxnreg"] = 246
    return overridden(constants, options, tuning)
