"""Counts that are known, and those of the kernels against their budget."""

import json
import os

import pytest
import torch
import triton

from bench import harness
from bench.static import compiled
from kru_triton.kernels import scan
from kru_triton.ops.arguments import How, Scan

from . import machine, ptx
from .count import per_step
from .lanes import Options
from .memory import Arena
from .test_sanitizer import MODULE


def test_a_step_of_256_units():
    """Every byte of a row is moved once, in whole sectors, and shared memory is left alone."""
    a, b = (torch.eye(16).expand(2, 1, 16, 16).contiguous() for _ in range(2))

    def call(T):
        x = torch.ones(T, 1, 512, dtype=torch.bfloat16)
        scan.scan_forward(Scan(x, a, b, torch.zeros(256)), How("modrelu", precision="bf16"))

    counts = per_step(call, "sm_90")["scan_forward_kernel"]
    assert counts["load bytes"] == counts["store bytes"] == 512 * 2
    assert counts["load sectors"] == counts["store sectors"] == 512 * 2 / 32
    assert counts["load requests"] == counts["global load"] == 4  # 8 units of a plane a thread
    assert counts["tensor core"] == 4 * 2 * 2  # real products, each of two halves, twice
    assert counts["wavefronts"] == counts["barrier"] == counts["shuffle"] == 0


BUDGET = json.loads((harness.ROOT / "bench/static/compiled_budget.json").read_text())


@pytest.mark.skipif(os.environ["KRU_TARGET"] != "sm_90", reason="the budget is one of sm_90")
@pytest.mark.skipif(
    triton.__version__ != BUDGET["triton"],
    reason=f"other tritons compile other code than the {BUDGET['triton']} of the budget",
)
@pytest.mark.parametrize("size", BUDGET["executed"])
def test_a_step_within_its_budget(size):
    """Instructions by kind, bank conflicts and sectors; `bench compiled --executed` shows them."""
    shape, dtype = size.split("-")
    found = compiled.executed(*map(int, shape.split("x")), dtype, "sm_90")
    over = [
        f"{kernel}: {n} {name}, not {budget.get(name, 0)}"
        for kernel, budget in BUDGET["executed"][size].items()
        for name, n in found[kernel].items()
        if n > budget.get(name, 0)
    ]
    assert not over


def traffic(body):
    memory = Arena()
    address = memory.add(torch.zeros(8192, dtype=torch.uint8).numpy())
    program = ptx.parse(MODULE.format(body=body))
    report = machine.run(program, (1, 1, 1), [address], memory, 8192, Options(traffic=True))
    assert report.kinds == set()
    return report.traffic


def test_bank_conflicts():
    """Neighbouring words and one word take a wavefront a warp, words of one bank take 32."""
    plain = traffic("st.shared.b32 [%r6], %r1;")
    assert plain == {"wavefronts": 2, "wavefronts without conflicts": 2}
    assert traffic("st.shared.b32 [%r5], 7;") == plain
    strided = "mad.lo.s32 %r9, %r1, 128, %r5;\nst.shared.b32 [%r9], %r1;"
    assert traffic(strided) == {"wavefronts": 64, "wavefronts without conflicts": 2}
    wide = "mad.lo.s32 %r9, %r1, 16, %r5;\nst.shared.v4.b32 [%r9], {%r1, %r1, %r1, %r1};"
    assert traffic(wide) == {"wavefronts": 8, "wavefronts without conflicts": 8}


def test_sectors():
    plain = traffic("ld.global.b32 %r9, [%rd3];")
    assert plain == {"load requests": 2, "load sectors": 8, "load bytes": 256}
    strided = "mad.wide.u32 %rd4, %r1, 64, %rd1;\nst.global.b32 [%rd4], %r1;"
    assert traffic(strided) == {"store requests": 2, "store sectors": 64, "store bytes": 256}
