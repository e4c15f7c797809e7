"""Machine code of the kernels against a committed budget: compiled ahead of time, without a GPU.

The compiler runs in a process of its own, where the interpreter is off, with an empty cache. After
a change that is meant to move the figures, `python -m bench schedule --json FILE` shows new ones.
"""

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kru_triton.kernels import geometry, why_not

triton = pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
BUDGET = json.loads((ROOT / "bench" / "static" / "compiled_budget.json").read_text())
LEAST_SHARED_LIMIT = 101376  # of NVIDIA devices from sm_80 on
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
# what is left out here is in `make test-compiled`: it is many minutes more of two processors
ALL = "KRU_ALL_TARGETS" in os.environ
TARGETS = [a for a in SHARED_LIMIT if a in ("sm_90", "gfx942") or ALL]
WORDS = {  # of the names of those that are compiled there; that of every kernel ends in d
    "sm_90": "d-8x8 d-8x16 d-16x16 d-16x32-bf16 d-32x32-bf16 d-3x11 d-5x20 d-256x16-bf16",
    "gfx942": "16x16 256x16 3x11 5x20",
}
# too large for that device's shared or tensor memory: `why_not.streams` chooses those of `wide`
STREAMED = {
    *((f"{kernel}-128x8-fp32", "sm_80") for kernel in ("forward", "backward")),
    *((f"{kernel}-64x64-fp32", "sm_100") for kernel in ("forward", "backward")),
}

SCANS = ("forward", "backward")
budgeted = pytest.mark.skipif(
    triton.__version__ != BUDGET["triton"],
    reason=f"other tritons compile other code than the {BUDGET['triton']} of the budget",
)
# The budget holds what was found; of figures that a small change moves, so much is let pass
MARGIN = {"step_cycles": 1.05, "row_cycles": 1.05, "load_slack": 0.8}
# Cycles of a step that the budget itself may not exceed, of one warp alone
CEILINGS = {
    "forward-8x8-bf16": 380,
    "forward-16x16-bf16": 300,
    "forward-16x32-bf16": 520,
    "forward-32x32-bf16": 1131,
    "backward-8x8-bf16": 500,
    "backward-16x16-bf16": 400,
    "backward-16x32-bf16": 720,
    "backward-32x32-bf16": 1600,
    "forward-16x16-bf16-gate": 370,
    "backward-16x16-bf16-gate": 580,
    "forward-16x16-fp32": 600,
    "forward-32x32-fp32": 3200,
    "lstm_forward-16x16-bf16": 520,
    "lstm_backward-16x16-bf16": 900,
}
# Those in which the memory of an H100 brings a processor a row of the weight gradients
ROW_CEILINGS = {
    "weight_grad-16x16-bf16": 158,
    "weight_grad-16x32-bf16": 316,
    "weight_grad-32x32-bf16": 632,
    "weight_grad-16x16-fp32": 316,
}


def without_interpreter(directory, *command):
    """Run a Python command where triton compiles, with a cache of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(directory / "cache")
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def words_of(arch):
    return [""] if ALL else WORDS[arch].split()


def looked_at(variants):
    """Those that are compiled for sm_90."""
    return [v for v in variants if any(word in v for word in words_of("sm_90"))]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Variants for every target, minutes of two processors: rows by variant and target."""
    directory = tmp_path_factory.mktemp("compiled")

    def rows(arch):
        file = directory / f"{arch}.json"
        command = ["schedule", "--brief"] if arch.startswith("sm") else ["compiled"]
        command += ["--json", file, "--arch", arch, "--match", *words_of(arch)]
        without_interpreter(directory, "-m", "bench", *command)
        return json.loads(file.read_text())

    with ThreadPoolExecutor(2) as pool:
        tables = pool.map(rows, TARGETS)
        return {(row["variant"], row["arch"]): row for table in tables for row in table}


@pytest.fixture(scope="module")
def hopper(compiled):
    return {variant: row for (variant, arch), row in compiled.items() if arch == "sm_90"}


def worse(row, budget):
    """What a row has more of than its budget, of slack less: what was found, and the budget."""

    def fails(name):
        bound = budget[name] * MARGIN.get(name, 1)
        return row[name] < bound if name == "load_slack" else row[name] > bound

    return {name: (row[name], budget[name]) for name in budget if fails(name)}


@budgeted
@pytest.mark.parametrize("variant", looked_at(BUDGET["sm_90"]))
def test_within_budget(variant, hopper):
    assert worse(hopper[variant], BUDGET["sm_90"][variant]) == {}


@pytest.mark.parametrize("variant", looked_at(BUDGET["versions"].get(triton.__version__, {})))
def test_within_budget_of_this_triton(variant, hopper):
    assert worse(hopper[variant], BUDGET["versions"][triton.__version__][variant]) == {}


@pytest.mark.parametrize("variant", CEILINGS)
def test_the_budget_itself_stays_low(variant):
    assert BUDGET["sm_90"][variant]["step_cycles"] <= CEILINGS[variant]
    assert BUDGET["sm_90"][variant]["spills"] == 0


@pytest.mark.parametrize("variant", ROW_CEILINGS)
def test_weight_gradients_wait_for_memory(variant):
    assert BUDGET["sm_90"][variant]["row_cycles"] <= ROW_CEILINGS[variant]
    assert BUDGET["sm_90"][variant]["spills"] == 0


@budgeted
def test_up_to_512_units_a_step_leaves_the_registers_alone(hopper):
    """No spill, and in the time loop no barrier, no shuffle and no shared memory."""
    rows = [
        row
        for row in hopper.values()
        if row["kernel"] in SCANS
        and row["P"] * row["Q"] in (64, 128, 256, 512)
        and max(row["P"], row["Q"]) <= 32  # a side of 64 is held in shared memory
    ]
    assert len(rows) >= 16
    columns = ("barriers", "shuffles", "shared_loads", "shared_stores")
    for row in rows:
        assert {k: row[k] for k in columns} == dict.fromkeys(columns, 0), row["variant"]


def test_the_scheduling_bits_are_decoded_right(compiled):
    """No result of variable latency is used before its scoreboard is waited for."""
    decoded = [row for (_, arch), row in compiled.items() if arch.startswith("sm")]
    assert {(r["variant"], r["arch"]): r["unready"] for r in decoded if r["unready"]} == {}
    assert all(row["step_cycles"] >= row["stall_cycles"] > 0 for row in decoded)
    assert not any(row["conversions"] for row in decoded if row["kernel"] in SCANS)


@budgeted
@pytest.mark.parametrize("arch", TARGETS)
def test_no_spills(arch, compiled):
    """But for what the budget names, with the count there as its bound."""
    most = BUDGET["spills"][arch]
    rows = [r for key, r in compiled.items() if key[1] == arch and key not in STREAMED]
    spills = {row["variant"]: row["spills"] for row in rows}
    assert {v: n for v, n in spills.items() if n > most.get(v, 0)} == {}


def test_accesses_are_no_wider_than_rows_are_aligned(compiled):
    """The hints of `tile.pointers` claim more alignment than padded rows have."""
    kernels = (*SCANS, "lstm_forward", "lstm_backward")
    rows = [r for r in compiled.values() if (r["P"], r["Q"]) in ((3, 11), (5, 20))]
    rows = [r for r in rows if r["kernel"] in kernels]
    assert len(rows) == len(TARGETS) * 8
    for row in rows:
        # the cells of an LSTM are float32
        itemsize = 2 if row["dtype"] == "bf16" and row["kernel"] in SCANS else 4
        tile = geometry.Tile.of(row["P"], row["Q"], 2 if row["dtype"] == "bf16" else 4)
        assert row["access_bytes"] <= tile.aligned * itemsize, (row["variant"], row["arch"])


def test_no_variant_compiles_far_longer_than_the_others(compiled):
    """A first call waits for as long. Seconds differ by machine and load, so counted in medians:
    one is about 1 s, the slowest variant took 7 of them."""
    seconds = {key: row["compile_seconds"] for key, row in compiled.items()}
    limit = 25 * statistics.median(seconds.values())
    assert min(seconds.values()) > 0
    assert {key: s for key, s in seconds.items() if s > limit} == {}


def test_shared_memory_is_foreseen(compiled):
    """By this bound `why_not.streams` chooses the kernels of `wide`, which need little anywhere."""
    for row in compiled.values():
        if row["kernel"].startswith("wide"):
            assert row["shared_bytes"] <= LEAST_SHARED_LIMIT, row["variant"]
            continue
        tile = geometry.Tile.of(row["P"], row["Q"], 2 if row["dtype"] == "bf16" else 4)
        parts, sets = 2 if row["field"] == "complex" else 1, 1
        if row["kernel"].startswith("lstm"):
            parts, sets = 1, 8
        elif row["nonlinearity"] == "modtanh":
            sets = 2
        bound = why_not.shared_bytes(tile, parts, row["precision"], sets)
        assert row["shared_bytes"] <= max(bound, why_not.SHARED_EVERYWHERE), row["variant"]


@pytest.mark.parametrize("arch", TARGETS)
def test_every_variant_compiles(arch, compiled):
    variants = {variant for variant, where in compiled if where == arch}
    assert len(variants) > 50
    assert variants >= {v for v in BUDGET["sm_90"] if any(word in v for word in words_of(arch))}
    for variant in variants:
        row = compiled[variant, arch]
        if (variant, arch) not in STREAMED:
            assert row["shared_bytes"] <= SHARED_LIMIT[arch], variant
            # without any, what compiled is a trap
            assert row["tensor_core"] > 0 or variant.endswith("dbeta"), variant


def test_another_batch_length_or_stride_compiles_nothing(tmp_path):
    """The launchers, on a target that compiles and does not run: one kernel each, and no second."""
    counts = json.loads(without_interpreter(tmp_path, __file__).splitlines()[-1])
    assert len(counts) == 13
    assert counts == [[1, 1, 1, 0, 0]] * 8 + [[1, 1, 1, 1, 1]] * 5


def count_compilations():
    """Print how many kernels exist (forward, backward, weight gradient) after each call."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    from kru_triton.kernels import scan, weight_grad, wide
    from kru_triton.ops.arguments import How, Scan

    class Absent:
        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    driver.set_active(Absent())
    JITFunction.run = compile_only
    kernels = (
        scan.scan_forward_kernel,
        scan.scan_backward_kernel,
        weight_grad.weight_grad_kernel,
        wide.wide_forward_kernel,
        wide.wide_backward_kernel,
    )
    how = How("modrelu", precision="bf16")
    counts = []
    for P, B, T, layout, extra in [
        (16, 3, 5, "batch", 0),
        (16, 1, 1, "batch", 0),
        (16, 16, 16, "batch", 0),
        (16, 2, 7, "time", 0),
        (16, 4, 32, "batch", 16),
        (16, 4, 32, "batch", 3),
        (16, 1, 64, "time", 8),
        (16, 64, 1, "batch", 0),
        (256, 3, 5, "batch", 0),
        (256, 1, 1, "batch", 0),
        (256, 16, 16, "time", 0),
        (256, 4, 32, "batch", 3),
        (256, 1, 64, "time", 8),
    ]:
        units = P * 16
        a, b, beta = torch.zeros(2, 1, P, P), torch.zeros(2, 1, 16, 16), torch.zeros(units)
        shape = (B, T) if layout == "batch" else (T, B)
        x_proj = torch.zeros(*shape, 2 * units + extra, dtype=torch.bfloat16)[..., : 2 * units]
        x = x_proj.transpose(0, 1) if layout == "batch" else x_proj
        h_0 = torch.zeros(B, 2 * units + 1)[:, 1:]  # not aligned to 16 bytes
        h_0 = h_0 if B % 2 else h_0.contiguous()
        given = Scan(x, a, b, beta, h_0)
        h = scan.scan_forward(given, how)
        dh = torch.zeros_like(h)
        dx, *_ = scan.scan_backward(dh, None, h, given, how)
        weight_grad.weight_grad(dx, h, given, how)
        counts.append([len(kernel.device_caches[0][0]) for kernel in kernels])
    print(json.dumps(counts))


if __name__ == "__main__":
    count_compilations()
