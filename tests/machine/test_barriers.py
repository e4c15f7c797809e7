"""Barriers, fences and waits deleted from the project's own kernels, one at a time.

A deletion has to be noticed, by a finding of the sanitizer or by a wrong result: a machine that
sees nothing there would see nothing in a kernel that lacks one. Those that stay silent are
redundant, for one of these reasons: Triton orders whole buffers, and does not look at which bytes,
warps or proxies are concerned.

    other bytes     one side of the barrier reads a buffer, or writes one, and the other side writes
                    another one
    one warp        the CTA is one warp, or the barrier a warp's, and the write after the read comes
                    after an instruction at which the warp meets (ldmatrix, mma)
    nothing new     a fence with no write to shared memory since the last one
    nothing read    a fence with no wgmma before the next one
    another one     the barrier that ends a turn of a loop, whose next turn touches no shared
                    memory and nothing that this one wrote before it comes to a barrier
    waits again     a wait for wgmma whose results the next wgmma takes, which is in order after it,
                    and the next wait covers
"""

import re
from collections import Counter

import pytest

from . import test_operations as operations
from .test_operations import Case

KINDS = ("bar.sync", "bar.warp.sync", "fence.proxy", "cp.async.wait_group", "wgmma.wait_group")
PATTERN = re.compile(rf"^\s*((?:{'|'.join(map(re.escape, KINDS))})[^;]*;)", re.MULTILINE)
MOST = 8  # deletions that are tried in one kernel, spread evenly over it
CASES = [
    Case(16, 16, T=3, B=2, h_0=True),
    Case(8, 8, T=3, B=5, h_0=True),
    Case(32, 64, T=2, B=1, h_0=True),
    Case(64, 16, "fp32", T=2, B=1),
    Case(256, 16, T=2, B=2, h_0=True),
    Case(16, 16, op="lstm", T=2, B=2),
    Case(32, 32, op="lstm", T=2, B=1),
]
WRITES, READS = r"\b(?:st\.shared|stmatrix|cp\.async\.c[ag])", r"\b(?:ld\.shared|ldmatrix)"


def why_redundant(text: str, found: list[re.Match], n: int) -> str | None:
    """One of the reasons above for synchronisation n, None if there is none."""
    before = text[found[n - 1].end() if n else 0 : found[n].start()]
    after = text[found[n].end() : found[n + 1].start() if n + 1 < len(found) else len(text)]
    kind, following = found[n][1], found[n + 1][1] if n + 1 < len(found) else ""
    if kind.startswith("fence"):
        until = text[found[n].end() :].partition("fence.proxy")[0]
        if not re.search(WRITES, before):
            return "nothing new"
        return None if "wgmma" in until else "nothing read"
    if kind.startswith("wgmma"):
        return "waits again" if "wgmma" in after or following.startswith("fence") else None
    reads, writes = re.search(READS, before), re.search(WRITES, before)
    if kind.startswith("bar.warp"):
        return "one warp" if reads and not writes else None
    if kind.startswith("bar.sync") and re.search(WRITES, after):
        if reads and not writes and ".reqntid 32\n" in text:
            return "one warp"
        return "other bytes"
    if kind.startswith("bar.sync") and (turn := re.search(r"bra\s+(\$\w+);", after)):
        following = text[text.index(f"{turn[1]}:") :].partition("bar.sync")[0]
        touched = re.search(f"{WRITES}|{READS}|st\\.", after[: turn.start()] + following)
        return None if touched else "another one"
    return None


def spread(n: int) -> list[int]:
    """At most MOST of n, the first and the last among them."""
    return sorted({round(i * (n - 1) / max(1, MOST - 1)) for i in range(MOST)}) if n else []


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_deleted_barrier_is_noticed(case, device):
    tensors, flags, *want = operations.expected(case)

    def noticed():
        got = operations.computed(case, tensors, flags)
        errors = [operations.errors(g, w) for g, w in zip(got, want)]
        right = all(max(e.values()) <= limit for e, limit in zip(errors, case.limits))
        return device.findings() or not right

    operations.computed(case, tensors, flags)
    texts = dict.fromkeys(launch.ptx for launch in device.launches)
    assert not noticed()
    seen = Counter()
    for text in texts:
        found = list(PATTERN.finditer(text))
        for n in spread(len(found)):
            mutant = text[: found[n].start(1)] + text[found[n].end(1) :]
            device.replaced = {text: mutant}
            seen["noticed" if noticed() else why_redundant(text, found, n)] += 1
    assert None not in seen, seen
    silent = seen["other bytes"] + seen["another one"]  # the other reasons are sure by themselves
    assert seen["noticed"] >= 0.6 * (seen["noticed"] + silent), seen
