"""The machine against torch on kernels that are not the project's."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from kru_triton.kernels.options import FENCES_COPIES
from kru_triton.kernels.why_not import triton_version

from . import scalar, tensor_core


@triton.jit
def add_kernel(p_x, p_y, p_z, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    tl.store(p_z + i, tl.load(p_x + i, mask=inside) + tl.load(p_y + i, mask=inside), mask=inside)


@triton.jit
def softmax_kernel(p_x, p_y, n, BLOCK: tl.constexpr):
    i_row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    x = tl.load(p_x + i_row * n + i, mask=i < n, other=float("-inf"))
    e = tl.exp(x - tl.max(x, 0))
    tl.store(p_y + i_row * n + i, e / tl.sum(e, 0), mask=i < n)


@triton.jit
def matmul_kernel(
    p_x,  # (M, K)
    p_y,  # (K, N), or (N, K) with TRANS
    p_z,  # (M, N)
    K,
    N,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    TRANS: tl.constexpr,
):
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in tl.range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        x = tl.load(p_x + i[:, None] * K + k[None, :])
        if TRANS:
            y = tl.trans(tl.load(p_y + j[:, None] * K + k[None, :]))
        else:
            y = tl.load(p_y + k[:, None] * N + j[None, :])
        acc = tl.dot(x, y, acc)
    tl.store(p_z + i[:, None] * N + j[None, :], acc)


@triton.jit
def transpose_kernel(p_x, p_y, M: tl.constexpr, N: tl.constexpr):
    i, j = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(p_x + i[:, None] * N + j[None, :])
    tl.store(p_y + j[:, None] * M + i[None, :], tl.trans(x))


@triton.jit
def math_kernel(p_x, p_y, n: tl.constexpr):
    i = tl.arange(0, n)
    x = tl.load(p_x + i)
    y = tl.rsqrt(tl.abs(x) + 0.5) + tl.exp2(x) + tl.log2(tl.abs(x) + 1.0) + tl.sqrt(tl.abs(x))
    q = (x * 100).to(tl.int32)
    y += (q // 7 + q % 5 + (q >> 2) + (q << 3)).to(tl.float32)
    y += (x.to(tl.bfloat16) * 3.0).to(tl.float32) + tl.where(x > 0, x, -x) + tl.cumsum(x, 0)
    tl.store(p_y + i, y)


def close(got, want, limit=1e-6):
    error = ((got.double() - want.double()).norm() / want.double().norm()).item()
    assert error < limit


@pytest.mark.parametrize("n", [1000, 77])
def test_masked_sum(n):
    x, y, z = torch.randn(n), torch.randn(n), torch.empty(n)
    add_kernel[(triton.cdiv(n, 256),)](x, y, z, n, BLOCK=256)
    assert torch.equal(z, x + y)


@pytest.mark.parametrize("warps", [1, 4])
def test_softmax(warps):
    x, y = torch.randn(5, 300), torch.empty(5, 300)
    softmax_kernel[(5,)](x, y, 300, BLOCK=512, num_warps=warps)
    close(y, x.softmax(-1))


def test_arithmetic():
    x, y = torch.randn(256), torch.empty(256)
    math_kernel[(1,)](x, y, 256)
    q = (x * 100).int()
    want = (x.abs() + 0.5).rsqrt() + x.exp2() + (x.abs() + 1).log2() + x.abs().sqrt()
    want += torch.div(q, 7, rounding_mode="trunc") + torch.fmod(q, 5) + (q >> 2) + (q << 3)
    want += (x.bfloat16() * 3).float() + x.abs() + x.cumsum(0)
    close(y, want)


SHAPES = [(16, 16, 16), (32, 32, 32), (64, 32, 64), (64, 64, 128), (128, 64, 64)]


def matmul(dtype, shape, warps, trans=False):
    """A product of 2 x 2 blocks of this shape, by the machine and in float64."""
    BM, BK, BN = shape
    M, K, N = 2 * BM, 2 * BK, 2 * BN
    random = torch.Generator().manual_seed(0)
    x, y = (torch.randn(s, generator=random).to(dtype) for s in ((M, K), (K, N)))
    z, given = torch.empty(M, N), y.T.contiguous() if trans else y
    stages = 2 if triton_version() >= FENCES_COPIES else 1  # there is a finding with two
    matmul_kernel[(2, 2)](x, given, z, K, N, BM, BK, BN, trans, num_warps=warps, num_stages=stages)
    return z, x.double() @ y.double()


@pytest.mark.parametrize("trans", [False, True], ids=["plain", "trans"])
@pytest.mark.parametrize("warps", [1, 4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_matmul(dtype, shape, warps, trans):
    """mma.sync, wgmma, ldmatrix and cp.async, with and without transposition."""
    close(*matmul(dtype, shape, warps, trans), 1e-7)


def test_matmul_with_truncation(device):
    """Sums of cut terms differ from exact ones, by no more than the cuts."""
    exact, _ = matmul(torch.bfloat16, (64, 64, 128), 4)
    with device.under(truncate=True):
        cut, want = matmul(torch.bfloat16, (64, 64, 128), 4)
    close(cut, want, 1e-6)
    assert not torch.equal(cut, exact)


@pytest.mark.parametrize("warps", [1, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_transpose(dtype, warps):
    x, y = torch.randn(32, 64).to(dtype), torch.empty(64, 32, dtype=dtype)
    transpose_kernel[(1,)](x, y, 32, 64, num_warps=warps)
    assert torch.equal(y, x.T)


@pytest.mark.parametrize("capability", [80, 90])
def test_what_a_tensor_core_cuts_off(capability):
    """Terms below the last kept bit of the largest one are lost, however many there are."""
    terms, bits = tensor_core.TERMS[capability], tensor_core.BITS[capability]

    def dot(small):
        y = np.full((1, 16), small)
        y[0, 0] = 1.0
        zero = np.zeros((1, 1), np.float32)
        return tensor_core.truncating_dot(np.ones((1, 16)), y, zero, capability).item()

    assert dot(2.0 ** -(bits + 1)) == 1
    want = 1.0  # of the last kept bit all count, and after each block float32 keeps 23 of the bits
    for first in range(0, 16, terms):
        want = np.floor((want + (terms - (first == 0)) * 2.0**-bits) * 2**23) / 2**23
    assert dot(2.0**-bits) == want > 1
    assert dot(-(2.0**-bits)) < 1


@pytest.mark.parametrize("name", scalar.APPROXIMATE)
def test_errors_of_approximate_instructions(name):
    """Within what the PTX ISA allows, in both directions, and the same for the same input."""
    function = scalar.FLOAT[name.split(".")[0]]
    inputs = [np.linspace(0.6, 1.9, 1000, dtype=np.float32)] * (2 if name[:3] == "div" else 1)
    ulps, relative, absolute = scalar.APPROXIMATE[name]
    y = function(*inputs)
    error = scalar.disturbed(function, (ulps, relative, absolute), 1)(*inputs) - y.astype(float)
    bound = np.maximum(ulps * np.spacing(np.abs(y)), np.maximum(relative * np.abs(y), absolute))
    assert (np.abs(error) <= bound + 0.5 * np.spacing(np.abs(y))).all()
    assert error.min() < 0 < error.max()
    again = scalar.disturbed(function, (ulps, relative, absolute), 1)(*inputs) - y.astype(float)
    assert (again == error).all()
