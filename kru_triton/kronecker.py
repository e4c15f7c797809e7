"""Kronecker algebra of the recurrent matrix W = W_0 ⊗ W_1 ⊗ … ⊗ W_{F-1}.

A factor comes in one of three kinds, and every function returns the kind it was given:

    planar   real (parts, H, P, Q); parts = 2 holds [real, imag], parts = 1 is the real field
    complex  complex (P, Q), or (H, P, Q) with heads
    real     real (P, Q), or (H, P, Q) with heads

H is the number of heads (independent diagonal blocks of the recurrent matrix), F the number of
factors, M = ∏P_f the rows and N = ∏Q_f the columns of one head's matrix. Planar input meets
real operations only, so it may be differentiated and compiled like any other real code.
"""

import math
from collections.abc import Iterable, Sequence
from functools import reduce

import torch
from torch import Tensor

__all__ = [
    "check_factors",
    "factor_shapes",
    "group_factors",
    "kron_dense",
    "kron_matvec",
    "nearest_kronecker",
]

Shape = tuple[int, int]


def check_factors(factors: Sequence[Tensor]) -> list[Tensor]:
    """Return `factors` as a list after checking that they are one family of one kind.

    Args:
        factors: non-empty sequence of tensors: all planar `(parts, H, P_f, Q_f)`, or all complex,
            or all real of shape `(P_f, Q_f)` or `(H, P_f, Q_f)`; one dtype and one device.

    Returns:
        The same tensors, in a list.

    Raises:
        TypeError: not a sequence of floating-point or complex tensors, or more than one dtype.
        ValueError: no factor, a shape of no kind, or parts, heads or devices that differ.

    Example:
        >>> import torch
        >>> len(check_factors([torch.ones(2, 1, 3, 3), torch.ones(2, 1, 4, 4)]))
        2
    """
    if isinstance(factors, Tensor):
        raise TypeError(
            "factors: expected a sequence of tensors, got one tensor of shape "
            f"{tuple(factors.shape)}; write [tensor] for a single factor"
        )
    if not isinstance(factors, Iterable):
        raise TypeError(
            f"factors: expected a sequence of tensors, got {type(factors).__name__}; of a layer "
            "write kru.recurrent_factors(0)"
        )
    factors = list(factors)
    if not factors:
        raise ValueError("factors: expected at least one factor, got an empty sequence")
    for f, w in enumerate(factors):
        if not isinstance(w, Tensor):
            raise TypeError(f"factors[{f}]: expected a tensor, got {type(w).__name__}")
        _check_kind(w, f"factors[{f}]")
    first = factors[0]
    for f, w in enumerate(factors):
        if w.dtype != first.dtype:
            raise TypeError(
                f"factors: all must have one dtype, got {first.dtype} (factor 0) and {w.dtype} "
                f"(factor {f}); convert them to one kind and dtype"
            )
        if w.device != first.device:
            raise ValueError(
                f"factors: all must be on one device, got {first.device} (factor 0) and "
                f"{w.device} (factor {f})"
            )
        if w.shape[:-2] != first.shape[:-2]:
            raise ValueError(
                "factors: all must be of one kind with the same dimensions before (P, Q), got "
                f"shapes {tuple(first.shape)} (factor 0) and {tuple(w.shape)} (factor {f})"
            )
    return factors


def _check_kind(w: Tensor, name: str) -> None:
    if not (w.is_floating_point() or w.is_complex()):
        raise TypeError(f"{name}: expected a floating-point or complex dtype, got {w.dtype}")
    if w.is_complex() and w.ndim == 4:
        raise ValueError(
            f"{name}: a complex tensor must have shape (P, Q) or (heads, P, Q), got "
            f"{tuple(w.shape)}; planar factors are real: torch.stack([w.real, w.imag])"
        )
    if w.ndim not in (2, 3, 4) or (w.ndim == 4 and w.shape[0] not in (1, 2)) or 0 in w.shape:
        raise ValueError(
            f"{name}: expected planar (2, heads, P, Q) or (1, heads, P, Q), or a matrix (P, Q) or "
            f"(heads, P, Q), every size positive, got shape {tuple(w.shape)}"
        )


def factor_shapes(
    factors: Sequence[int | Sequence[int]] | None, hidden_size: int, num_heads: int = 1
) -> tuple[Shape, ...]:
    """Normalise the `factors` argument of the modules to (P, Q) pairs with ∏P = ∏Q = N.

    N = hidden_size / num_heads is the size of one head's recurrent matrix.

    Args:
        factors: ints (square factors) or (P, Q) pairs. None takes the two most balanced square
            factors of N, the smaller first: 128 gives 8 and 16, a prime p gives p alone.
        hidden_size: units of the layer, heads together.
        num_heads: independent blocks of the recurrent matrix. Default 1.

    Returns:
        Tuple of (P_f, Q_f) pairs, leftmost factor first.

    Raises:
        TypeError: `factors` is not a sequence, or something that must be an int is not.
        ValueError: a size below 1, an empty sequence, a num_heads that does not divide
            hidden_size, or products that differ from N.

    Example:
        >>> factor_shapes(None, 128)
        ((8, 8), (16, 16))
        >>> factor_shapes((2, (3, 6), (6, 3)), 36)
        ((2, 2), (3, 6), (6, 3))
    """
    _check_size(hidden_size, "hidden_size")
    _check_size(num_heads, "num_heads")
    if hidden_size % num_heads:
        divisors = [d for d in range(1, hidden_size + 1) if hidden_size % d == 0]
        nearest = min(divisors, key=lambda d: abs(d - num_heads))
        raise ValueError(
            f"num_heads: must divide hidden_size, got num_heads {num_heads} and hidden_size "
            f"{hidden_size}; the nearest divisor is num_heads={nearest}"
        )
    size = hidden_size // num_heads
    small = next(d for d in range(math.isqrt(size), 0, -1) if size % d == 0)
    balanced = (size,) if small == 1 else (small, size // small)
    if factors is None:
        return tuple((p, p) for p in balanced)

    shapes = _as_shapes(factors, "factors", f"for example {balanced}")
    rows, columns = math.prod(p for p, _ in shapes), math.prod(q for _, q in shapes)
    if (rows, columns) != (size, size):
        target = f"hidden_size is {hidden_size}"
        if num_heads > 1:
            target = f"hidden_size / num_heads is {hidden_size} / {num_heads} = {size}"
        raise ValueError(
            f"factors: the row counts multiply to {rows} and the column counts to {columns} "
            f"(shapes {', '.join(map(str, shapes))}) but {target}; choose shapes whose products "
            f"are both {size}, for example factors={balanced}"
        )
    return shapes


def _as_shapes(factors, name: str, hint: str) -> tuple[Shape, ...]:
    """Ints and pairs to pairs; `hint` ends the message about a missing or empty sequence."""
    if not isinstance(factors, Sequence) or isinstance(factors, str):
        raise TypeError(
            f"{name}: expected a tuple of ints or (P, Q) pairs, got {factors!r}; write {hint}"
        )
    if not factors:
        raise ValueError(f"{name}: expected at least one shape, got none; write {hint}")
    shapes = []
    for f, shape in enumerate(factors):
        pair = tuple(shape) if isinstance(shape, tuple | list) else (shape, shape)
        if len(pair) != 2:
            raise ValueError(f"{name}[{f}]: expected an int or a (P, Q) pair, got {shape!r}")
        for size in pair:
            _check_size(size, f"{name}[{f}]")
        shapes.append(pair)
    return tuple(shapes)


def _check_size(size, name: str) -> None:
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"{name}: expected an int, got {size!r} ({type(size).__name__})")
    if size < 1:
        raise ValueError(f"{name}: expected an int of at least 1, got {size}")


def group_factors(factors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Regroup the factors exactly into two, W = A ⊗ B, both square.

    A = W_0 ⊗ … ⊗ W_{k-1} is (P, P) and B = W_k ⊗ … ⊗ W_{F-1} is (Q, Q), so that with the row-major
    X = h.reshape(P, Q) one step is (A ⊗ B) h = vec(A X Bᵀ) (Van Loan, J. Comput. Appl. Math. 123,
    2000). Of the cuts that leave both groups square the one with P and Q closest is taken, P <= Q
    on a tie. Where there is none (one factor, or rectangular factors that become square only all
    together) A is the full product and B the 1×1 identity. Differentiable in every factor.

    Args:
        factors: one kind of factor; see `check_factors`.

    Returns:
        A and B, of the kind, dtype and device of the factors.

    Raises:
        TypeError, ValueError: as `check_factors`.

    Example:
        >>> import torch
        >>> A, B = group_factors([torch.randn(2, 1, 2, 2) for _ in range(7)])
        >>> A.shape, B.shape
        (torch.Size([2, 1, 8, 8]), torch.Size([2, 1, 16, 16]))
    """
    factors = check_factors(factors)
    cuts = square_cuts(factors)
    if not cuts:
        A = reduce(_kron, factors)
        if A.ndim == 4:  # [1] or [1, 0]: the real and imaginary parts of one
            one = torch.eye(A.shape[0], 1, dtype=A.dtype, device=A.device)
            return A, one.view(-1, 1, 1, 1).repeat(1, A.shape[1], 1, 1)
        return A, A.new_ones((*A.shape[:-2], 1, 1))
    size = product_shape(factors)[0]
    candidates = [(product_shape(factors[:k])[0], k) for k in cuts]
    _, _, k = min([(max(P, size // P), P, k) for P, k in candidates])
    return reduce(_kron, factors[:k]), reduce(_kron, factors[k:])


def product_shape(factors: Sequence[Tensor]) -> Shape:
    """(∏P_f, ∏Q_f)."""
    rows, columns = 1, 1
    for w in factors:  # math.prod of a generator would break a compiled graph
        rows, columns = rows * w.shape[-2], columns * w.shape[-1]
    return rows, columns


def square_cuts(factors: Sequence[Tensor]) -> list[int]:
    """The inner cuts k for which the products of factors[:k] and factors[k:] are both square."""
    cuts = []
    for k in range(1, len(factors)):
        (a, b), (c, d) = product_shape(factors[:k]), product_shape(factors[k:])
        if a == b and c == d:
            cuts.append(k)
    return cuts


def kron_dense(factors: Sequence[Tensor]) -> Tensor:
    """The full matrix W = W_0 ⊗ W_1 ⊗ … ⊗ W_{F-1} of every head.

    (A ⊗ B)[i·R + k, j·S + l] = A[i, j] · B[k, l] for B of shape (R, S). Differentiable.

    Args:
        factors: one kind of factor; see `check_factors`.

    Returns:
        Planar `(parts, H, M, N)` for planar factors, else `(M, N)` or `(H, M, N)`.

    Raises:
        TypeError, ValueError: as `check_factors`.

    Example:
        >>> import torch
        >>> kron_dense([torch.randn(2, 1, 3, 2), torch.randn(2, 1, 4, 6)]).shape
        torch.Size([2, 1, 12, 12])
    """
    return reduce(_kron, check_factors(factors))


def as_one_matrix(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A 1×1 identity and A ⊗ B, in the place of planar square A and B. Differentiable."""
    one = torch.eye(a.shape[0], 1, dtype=a.dtype, device=a.device)  # [1], or [1, 0]
    return one.view(-1, 1, 1, 1).repeat(1, a.shape[1], 1, 1), _kron(a, b)


def adjoint(w: Tensor) -> Tensor:
    """wᴴ of a planar factor `(parts, H, P, Q)`: `(parts, H, Q, P)`, contiguous."""
    w = w.transpose(-1, -2)
    return torch.stack((w[0], -w[1])) if w.shape[0] == 2 else w.contiguous()


def planar_product(g: Tensor, h: Tensor, parts: int) -> Tensor:
    """g h, unit by unit, of planar `(…, parts·H·N)`; g may be real, `(…, H·N)`."""
    if g.shape[-1] != h.shape[-1]:
        g = torch.cat((g, g), -1)
    elif parts == 2:
        (a, b), (c, d) = g.chunk(2, -1), h.chunk(2, -1)
        return torch.cat((a * c - b * d, a * d + b * c), -1)
    return g * h


def planar_conj(g: Tensor, parts: int) -> Tensor:
    """The conjugate of planar `(…, parts·H·N)`."""
    if parts == 1:
        return g
    real, imag = g.chunk(2, -1)
    return torch.cat((real, -imag), -1)


def _kron(a: Tensor, b: Tensor) -> Tensor:
    rows, columns = a.shape[-2] * b.shape[-2], a.shape[-1] * b.shape[-1]
    if a.ndim == 4 and a.shape[0] == 2:
        product = a[:, None, :, :, None, :, None] * b[None, :, :, None, :, None, :]
        rr, ri, ir, ii = product.flatten(0, 1).unbind()
        product = torch.stack([rr - ii, ri + ir])
    else:
        product = a[..., :, None, :, None] * b[..., None, :, None, :]
    return product.reshape(*a.shape[:-2], rows, columns)


def kron_matvec(factors: Sequence[Tensor], x: Tensor) -> Tensor:
    """Multiply vectors by W = W_0 ⊗ … ⊗ W_{F-1} without forming W.

    x as a tensor with axes (Q_0, …, Q_{F-1}) meets one factor per axis: O(N Σ_f P_f) operations
    for square factors in place of N² (Van Loan, 2000). Differentiable in `factors` and `x`.

    Args:
        factors: one kind of factor; see `check_factors`. Rectangular factors are allowed.
        x: vectors of the factors' dtype. Planar factors: `(..., parts·H·N)`, all real parts, then
            all imaginary parts, unit index head·N + n. Otherwise `(..., N)`, or `(..., H, N)`
            for factors with heads.

    Returns:
        W x, shaped as `x` with M in place of N.

    Raises:
        TypeError: `x` is not a tensor of the factors' dtype; else as `check_factors`.
        ValueError: `x` is on another device or its last dimensions do not fit; else as
            `check_factors`.

    Example:
        >>> import torch
        >>> factors = [torch.randn(2, 1, 8, 8), torch.randn(2, 1, 16, 16)]
        >>> kron_matvec(factors, torch.randn(5, 256)).shape
        torch.Size([5, 256])
    """
    factors = check_factors(factors)
    first = factors[0]
    planar = first.ndim == 4
    parts = first.shape[0] if planar else 1
    heads = first.shape[-3] if first.ndim > 2 else 1
    N = product_shape(factors)[1]
    tail: tuple[int, ...]
    if planar:
        tail, meaning = (parts * heads * N,), "parts·heads·N"
    elif first.ndim == 3:
        tail, meaning = (heads, N), "heads, N"
    else:
        tail, meaning = (N,), "N"
    if not isinstance(x, Tensor) or x.dtype != first.dtype:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x: must be a tensor of the factors' dtype {first.dtype}, got {got}")
    if x.device != first.device:
        raise ValueError(f"x: must be on the factors' device {first.device}, got {x.device}")
    if tuple(x.shape[-len(tail) :]) != tail:
        raise ValueError(
            f"x: must have shape (..., {meaning}) = (..., {', '.join(map(str, tail))}) for these "
            f"factors, got {tuple(x.shape)}"
        )
    lead = x.shape[: -len(tail)]
    L = math.prod(lead)
    y = x.reshape(L, parts, heads, N).permute(2, 1, 3, 0)  # (H, parts, N, L)
    for w in factors:
        P, Q = w.shape[-2:]
        R = y.shape[2] // Q
        if parts == 2:  # the real matrix [[Re, -Im], [Im, Re]] acts on [Re x; Im x]
            re, im = w.unbind()
            w = torch.cat([torch.cat([re, -im], -1), torch.cat([im, re], -1)], -2)
        y = w.reshape(heads, parts * P, parts * Q) @ y.reshape(heads, parts * Q, R * L)
        y = y.view(heads, parts, P, R, L).transpose(2, 3).reshape(heads, parts, R * P, L)
    M = y.shape[2]
    y = y.permute(3, 1, 0, 2)  # (L, parts, H, M)
    return y.reshape(*lead, *((parts * heads * M,) if planar else (*tail[:-1], M)))


@torch.no_grad()
def nearest_kronecker(matrix: Tensor, factor_shapes: Sequence[int | Sequence[int]]) -> list[Tensor]:
    """Approximate a dense matrix by a Kronecker product: min ‖W − W_0 ⊗ … ⊗ W_{F-1}‖_F.

    Rearranged so that each factor's entries lie along one axis, the Kronecker product is a tensor
    of rank one. For two factors the leading singular pair is the global optimum (Van Loan and
    Pitsianis, 1993). For more, factors are split off one after another, and alternating
    least-squares sweeps follow until none improves the fit: a local optimum. An exact Kronecker
    product is recovered exactly, up to scalars of the factors whose product is one.

    The scale is shared so that all factors have the same root mean square gain
    ‖W_f‖_F / (P_f Q_f)^¼: where W is unitary, so is every factor of an exact product.
    Computed in double precision. Not differentiable.

    Args:
        matrix: planar `(parts, H, M, N)`, or complex or real `(M, N)` or `(H, M, N)`; finite.
        factor_shapes: ints (square factors) or (P, Q) pairs with ∏P = M and ∏Q = N.

    Returns:
        The factors, of the kind, dtype and device of `matrix`.

    Raises:
        TypeError: `matrix` is no floating-point or complex tensor, or a shape is no int.
        ValueError: shapes that do not multiply to M and N, or entries that are not finite.

    Example:
        >>> import torch
        >>> a, b = nearest_kronecker(torch.randn(12, 12), (3, 4))
        >>> a.shape, b.shape
        (torch.Size([3, 3]), torch.Size([4, 4]))
    """
    if not isinstance(matrix, Tensor):
        raise TypeError(f"matrix: expected a tensor, got {type(matrix).__name__}")
    _check_kind(matrix, "matrix")
    shapes = _as_shapes(factor_shapes, "factor_shapes", "for example (8, 16)")
    rows, columns = math.prod(p for p, _ in shapes), math.prod(q for _, q in shapes)
    if (rows, columns) != tuple(matrix.shape[-2:]):
        raise ValueError(
            f"factor_shapes: the shapes {', '.join(map(str, shapes))} multiply to {rows} rows and "
            f"{columns} columns but matrix is {matrix.shape[-2]} x {matrix.shape[-1]}; choose "
            "shapes whose products equal its sizes"
        )
    if not matrix.isfinite().all():
        raise ValueError("matrix: must be finite, got NaN or infinite entries")

    planar_complex = matrix.ndim == 4 and matrix.shape[0] == 2
    dense = torch.complex(*matrix.double().unbind()) if planar_complex else matrix
    dense = dense.to(torch.complex128 if dense.is_complex() else torch.float64)
    F, sizes = len(shapes), [p * q for p, q in shapes]
    pairs = dense.reshape(-1, *(p for p, _ in shapes), *(q for _, q in shapes))
    order = [0, *(axis for f in range(F) for axis in (1 + f, 1 + F + f))]
    tensor = pairs.permute(order).reshape(-1, *sizes)  # (H, P_0·Q_0, …, P_{F-1}·Q_{F-1})

    vectors, scale = _rank_one(tensor)  # unit vectors (H, P_f·Q_f), scale (H,)
    gain = (scale / (rows * columns) ** 0.25) ** (1 / F)
    factors = []
    for (p, q), v in zip(shapes, vectors):
        w = (v * (gain * (p * q) ** 0.25)[:, None]).reshape(-1, p, q)
        w = torch.stack([w.real, w.imag]) if planar_complex else w
        factors.append(w.reshape(*matrix.shape[:-2], p, q).to(matrix.dtype))
    return factors


def _rank_one(tensor: Tensor) -> tuple[list[Tensor], Tensor]:
    """Unit vectors and scale of a rank-one approximation of (H, s_0, …, s_{F-1}), head by head."""
    H, *sizes = tensor.shape
    F = len(sizes)
    vectors, rest = [], tensor
    for s in sizes[:-1]:
        U, S, Vh = torch.linalg.svd(rest.reshape(H, s, -1), full_matrices=False)
        vectors.append(U[:, :, 0])
        rest = S[:, :1] * Vh[:, 0]
    scale = rest.reshape(H, -1).norm(dim=1)
    vectors.append(_normalised(rest.reshape(H, -1), scale))

    eps = torch.finfo(torch.float64).eps
    for _ in range(1000 if F > 2 else 0):  # each sweep can only raise the scale
        previous = scale
        for f in range(F):
            v = tensor
            for g in range(F - 1, f, -1):
                v = v.reshape(H, -1, sizes[g]) @ vectors[g].conj()[:, :, None]
            for g in range(f):
                v = vectors[g].conj()[:, None, :] @ v.reshape(H, sizes[g], -1)
            v = v.reshape(H, -1)
            scale = v.norm(dim=1)
            vectors[f] = _normalised(v, scale)
        if (scale <= previous * (1 + 4 * eps)).all():
            break
    return vectors, scale


def _normalised(v: Tensor, norm: Tensor) -> Tensor:
    return v / torch.where(norm > 0, norm, 1.0)[:, None]
