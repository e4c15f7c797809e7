"""The five nonlinearities and their adjoints on values of a tile, and nothing that depends on it.

    modReLU   h = relu(|z| + β) z/|z|            tanh, relu   of every part by itself
    modtanh   h = tanh(|z|) z/|z|                identity

Neither direction tests for zero or can give NaN: at z = 0, h = 0 and G is finite. Of a sum of two
products `tl.fma` says which one is rounded: left to the compiler, it differs from register to
register, and with it the copies of a row (`tile.offsets`).
"""

import triton
import triton.language as tl

from .tile import INTERPRET, reciprocal, rounded_product, rsqrt, scale, tanh


@triton.jit
def norm2(z):
    # 1e-30 keeps the reciprocal root finite: no test for zero is needed, nor for denormals
    if len(z) == 2:
        return z[1] * z[1] + (z[0] * z[0] + 1e-30)
    else:
        return z[0] * z[0] + 1e-30


@triton.jit
def positive(x):
    """relu, of which a NaN comes out as NaN."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def scaled(z, factor, FAST: tl.constexpr, NVIDIA: tl.constexpr):
    """`scale`; without FAST the products are rounded (see `rounded_product`)."""
    if FAST:
        return scale(z, factor)
    elif len(z) == 2:
        return rounded_product(z[0], factor, NVIDIA), rounded_product(z[1], factor, NVIDIA)
    else:
        return (rounded_product(z[0], factor, NVIDIA),)


@triton.jit
def activate(z, beta, ACT: tl.constexpr, FAST: tl.constexpr, NVIDIA: tl.constexpr):
    """h = σ(z)."""
    if ACT == "modrelu":
        factor = tl.maximum(beta * rsqrt(norm2(z), NVIDIA) + 1.0, 0.0)
        return scaled(z, factor, FAST, NVIDIA)
    elif ACT == "modtanh":
        m2 = norm2(z)
        rm = rsqrt(m2, NVIDIA)
        return scaled(z, tanh(m2 * rm, FAST, NVIDIA) * rm, FAST, NVIDIA)
    elif ACT == "tanh":
        if len(z) == 2:
            return tanh(z[0], FAST, NVIDIA), tanh(z[1], FAST, NVIDIA)
        else:
            return (tanh(z[0], FAST, NVIDIA),)
    elif ACT == "relu":
        if len(z) == 2:
            return positive(z[0]), positive(z[1])
        else:
            return (positive(z[0]),)
    else:
        return z


@triton.jit
def radial(v, r2, across, along):
    """The derivative g ↦ across·g + (along - across) Re(conj(n) g) n, n = v/|v|, 1/|v|² = r2."""
    c = along * r2 - across * r2
    if len(v) == 2:
        return across, c, v[0], v[1]
    else:
        return across, c, v[0]


@triton.jit
def derivative(
    h, z, beta, ACT: tl.constexpr, FLOOR: tl.constexpr, FAST: tl.constexpr, NVIDIA: tl.constexpr
):
    """σ'(z) from h (modtanh: from z) as a tuple of tiles, for `vjp`."""
    if ACT == "modrelu":
        # across = |h|/|z| with |z| = |h| - β, known no better than h is rounded: FLOOR·|h| bounds
        # what an inexact difference can amplify. Where h = 0, rk is infinite and across is 0: of
        # 0·inf the maximum takes the other (the interpreter's takes the NaN).
        k2 = h[0] * h[0]
        if len(h) == 2:
            k2 = tl.fma(h[1], h[1], k2)
        rk = rsqrt(k2, NVIDIA)
        if INTERPRET:
            beta = tl.where(beta == 0.0, 1e-30, beta)
        across = reciprocal(tl.maximum(1.0 - beta * rk, rk * 1e-30 + FLOOR), NVIDIA)
        return radial(h, tl.minimum(rk * rk, 1e37), across, 1.0)
    elif ACT == "modtanh":
        m2 = norm2(z)
        rm = rsqrt(m2, NVIDIA)
        k = tanh(m2 * rm, FAST, NVIDIA)
        return radial(z, rm * rm, k * rm, 1.0 - k * k)
    elif ACT == "tanh":
        if len(h) == 2:
            return 1.0 - h[0] * h[0], 1.0 - h[1] * h[1]
        else:
            return (1.0 - h[0] * h[0],)
    else:
        return h


@triton.jit
def vjp(g, s, ACT: tl.constexpr):
    """G = σ'(z)ᵀ g from `derivative`; g and G stand for ∂L/∂Re + i ∂L/∂Im."""
    if (ACT == "modrelu") or (ACT == "modtanh"):
        if len(g) == 2:
            c = tl.fma(s[2], g[0], s[3] * g[1]) * s[1]
            return tl.fma(s[0], g[0], c * s[2]), tl.fma(s[0], g[1], c * s[3])
        else:
            return (tl.fma(s[0], g[0], s[2] * g[0] * s[1] * s[2]),)
    elif ACT == "tanh":
        if len(g) == 2:
            return g[0] * s[0], g[1] * s[1]
        else:
            return (g[0] * s[0],)
    elif ACT == "relu":
        if len(g) == 2:
            return tl.where(s[0] > 0, g[0], 0.0), tl.where(s[1] > 0, g[1], 0.0)
        else:
            return (tl.where(s[0] > 0, g[0], 0.0),)
    else:
        return g


@triton.jit
def activate_adjoint(
    g, h, z, beta, ACT: tl.constexpr, FLOOR: tl.constexpr, FAST: tl.constexpr, NVIDIA: tl.constexpr
):
    """G = σ'(z)ᵀ g."""
    return vjp(g, derivative(h, z, beta, ACT, FLOOR, FAST, NVIDIA), ACT)
