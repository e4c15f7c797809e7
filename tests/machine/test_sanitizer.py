"""Faults planted in small kernels, each of which has to be found, and nothing without it."""

import numpy as np
import pytest
import torch

from . import machine, ptx
from .memory import Arena
from .test_machine import add_kernel

MODULE = """
.version 8.4
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 memory[];
.visible .entry kernel(
.param .u64 .ptr .global .align 1 p_x
)
.reqntid 64
{{
.reg .pred %p<8>;
.reg .b32 %r<16>;
.reg .b64 %rd<8>;
ld.param.b64 %rd1, [p_x];
mov.u32 %r1, %tid.x;
shl.b32 %r2, %r1, 2;
cvt.u64.u32 %rd2, %r2;
add.s64 %rd3, %rd1, %rd2;
xor.b32 %r3, %r1, 63;
xor.b32 %r4, %r1, 31;
mov.u32 %r5, memory;
add.s32 %r6, %r5, %r2;
shl.b32 %r7, %r3, 2;
add.s32 %r7, %r5, %r7;
shl.b32 %r8, %r4, 2;
add.s32 %r8, %r5, %r8;
setp.lt.u32 %p1, %r1, 16;
setp.lt.u32 %p2, %r1, 32;
{body}
ret;
}}
"""
# Registers: r1 thread, rd3 address of its word of x (256 bytes), r6 of its word of shared memory,
# r7 of a word that a thread of the other warp has, r8 of one that another thread of its warp has.
# (kind of finding, body, what takes the place of FAULT where there is none)
FAULTS = {
    "beyond a buffer": (
        "outside",
        "ld.global.b32 %r9, [%rd3 + FAULT];",
        "4",
        "0",
    ),
    "beyond shared memory": ("outside", "st.shared.b32 [%r6 + FAULT], %r1;", "4", "0"),
    "misaligned": ("misaligned", "@%p2 st.global.v2.b32 [%rd3 + FAULT], {%r1, %r1};", "4", "_"),
    "undefined memory": (
        "undefined",
        "FAULT\nbar.sync 0;\nld.shared.b32 %r9, [%r6];",
        "",
        "st.shared.b32 [%r6], %r1;",
    ),
    "undefined register": (
        "undefined",
        "FAULT st.global.b32 [%rd3], %r9;",
        "",
        "mov.b32 %r9, 7;",
    ),
    "read between warps": (
        "race",
        "st.shared.b32 [%r6], %r1;\nFAULT\nld.shared.b32 %r9, [%r7];",
        "bar.warp.sync -1;",
        "bar.sync 0;",
    ),
    "write after read between warps": (
        "race",
        "st.shared.b32 [%r6], %r1;\nbar.sync 0;\nld.shared.b32 %r9, [%r7];\nFAULT\n"
        "st.shared.b32 [%r6], %r9;",
        "bar.warp.sync -1;",
        "bar.sync 0;",
    ),
    "read within a warp": (
        "race",
        "st.shared.b32 [%r6], %r1;\nFAULT\nld.shared.b32 %r9, [%r8];",
        "shfl.sync.bfly.b32 %r9, %r1, 1, 31, -1;",  # comes together, and orders no memory
        "bar.warp.sync -1;",
    ),
    "write after read within a warp": (
        "race",
        "st.shared.b32 [%r6], %r1;\nbar.sync 0;\nld.shared.b32 %r9, [%r8];\nFAULT\n"
        "st.shared.b32 [%r6], %r9;",
        "",
        "shfl.sync.bfly.b32 %r10, %r1, 1, 31, -1;",
    ),
    "two values for one word": ("race", "st.shared.b32 [%r5], FAULT;", "%r1", "7"),
    "lanes that miss a barrier": (
        "barrier",
        "FAULT bra $L__end;\nbar.sync 0;\n$L__end:",
        "@%p1",
        "_",
    ),
    "a warp that misses a barrier": (
        "barrier",
        "FAULT bra $L__end;\nbar.sync 0;\n$L__end:",
        "@%p2",
        "_",
    ),
    "lanes that miss a shuffle": (
        "barrier",
        "FAULT bra $L__end;\nshfl.sync.bfly.b32 %r9, %r1, 1, 31, -1;\n$L__end:",
        "@%p1",
        "_",
    ),
    "a copy not waited for": (
        "in flight",
        "cp.async.ca.shared.global [%r6], [%rd3], 4;\ncp.async.commit_group;\nFAULT\n"
        "ld.shared.b32 %r9, [%r6];",
        "cp.async.wait_group 1;",
        "cp.async.wait_group 0;",
    ),
    "a prefetch of nothing": ("prefetch", "prefetch.global.L2 [%rd3 + FAULT];", "4096", "0"),
}


def run(body: str, programs: int = 1):
    program = ptx.parse(MODULE.format(body=body))
    memory, x = Arena(), np.arange(256, dtype=np.uint8)
    return machine.run(program, (programs, 1, 1), [memory.add(x, "x")], memory, shared=256)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name):
    kind, body, fault, right = FAULTS[name]
    assert run(body.replace("FAULT", fault)).kinds == {kind}
    if right == "_":  # without the instruction
        body, right = "\n".join(x for x in body.splitlines() if "FAULT" not in x), ""
    assert run(body.replace("FAULT", right)).kinds == set()


def test_two_programs_that_write_one_byte():
    body = "mov.u32 %r9, %ctaid.x;\nst.global.b32 [%rd3], VALUE;"
    assert run(body.replace("VALUE", "%r9"), programs=2).kinds == {"race"}
    assert run(body.replace("VALUE", "%r1"), programs=2).kinds == set()  # the same value


def test_a_finding_names_the_instruction_the_thread_and_the_byte():
    report = run("st.global.b32 [%rd3 + 4], %r1;")
    (finding,) = report.findings.values()
    assert "st.global.b32 [%rd3 + 4], %r1" in finding.where
    assert "thread 63 stores global byte 256 of the 256 of x" in finding.first


def test_an_unknown_opcode_is_refused_by_name():
    with pytest.raises(NotImplementedError, match="does not execute opcode vote"):
        run("vote.sync.any.pred %p3, %p1, -1;")
    with pytest.raises(NotImplementedError, match=r"opcode add\.rz\.f32"):
        run("add.rz.f32 %r9, %r1, %r2;")


def test_tensors_of_a_launch(device):
    """A buffer that is too short, one that holds nothing, and one that stays without a value."""
    x, y, z = torch.randn(256), torch.randn(256), torch.empty(256)
    add_kernel[(1,)](x, y[:200], z, 256, BLOCK=256)
    assert device.launches[-1].report.kinds == {"outside"}
    add_kernel[(1,)](x, torch.empty(256), z, 256, BLOCK=256)
    assert device.launches[-1].report.kinds == {"undefined"}
    add_kernel[(1,)](x, torch.full((256,), float("nan")).bfloat16(), z, 256, BLOCK=256)
    assert device.launches[-1].report.kinds == set()  # a value as any other
    add_kernel[(1,)](x, y, torch.empty(300), 256, BLOCK=256)
    assert device.launches[-1].report.kinds == {"unwritten"}
    device.findings()
    add_kernel[(1,)](x, y, z, 256, BLOCK=256)
    assert device.findings() == []
