"""How the states of a program lie in its tile; importable without triton."""

import math
from dataclasses import dataclass

TENSOR_CORE = 16  # least side of a tile


def power_of_two(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class Tile:
    """How states of shape (P, Q) lie in a tile (see `tile`)."""

    P: int
    Q: int
    PP: int
    QP: int
    S1: int
    S2: int
    V: int

    @classmethod
    def of(cls, P: int, Q: int, itemsize: int) -> "Tile":
        PP, QP = power_of_two(P), max(2, power_of_two(Q))  # a thread has columns in pairs
        S1, S2 = max(1, TENSOR_CORE // PP), max(1, TENSOR_CORE // QP)
        return cls(P, Q, PP, QP, S1, S2, V=max(2, min(16 // itemsize, QP // 4)))

    @property
    def rows(self) -> int:
        return self.S1 * self.S2

    @property
    def size(self) -> int:
        return self.S1 * self.PP * self.S2 * self.QP

    @property
    def lines(self) -> bool:
        """Whether one state fills whole cache lines, a power of two of them."""
        return self.rows == 1 and (self.P, self.Q) == (self.PP, self.QP)

    @property
    def aligned(self) -> int:
        """Elements to which the start of every row must be aligned."""
        return math.gcd(self.Q, self.V)

    @property
    def constants(self) -> dict[str, int]:
        """Its numbers by their names in the kernels."""
        return {name: getattr(self, name) for name in ("P", "Q", "PP", "QP", "S1", "S2")}


@dataclass(frozen=True)
class Wide:
    """How states of shape (P, Q) lie in a program that streams its larger factor (see `wide`)."""

    left: bool  # whether A is the larger factor
    W: int
    n: int
    side: int
    padded: int
    rows: int
    aligned: int = 1

    @classmethod
    def of(cls, P: int, Q: int) -> "Wide":
        W, n = max(P, Q), min(P, Q)
        padded = power_of_two(n)
        return cls(P >= Q, W, n, max(64, power_of_two(W)), padded, max(1, TENSOR_CORE // padded))
