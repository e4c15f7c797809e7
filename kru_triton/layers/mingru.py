"""`MinGRU`, a modern linear recurrence to compare with: a diagonal that depends on the input alone.

    z_t = sigmoid(W_z x_t + b_z)
    h_t = (1 − z_t) h_{t-1} + z_t g(W_h x_t + b_h),      g(v) = v + 1/2 where v ≥ 0, else sigmoid(v)

Source: Feng, Tung, Ahmed, Bengio and Hajimirsadegh, *Were RNNs All We Needed?*, 2024 (arXiv
2410.01201), in the form that the paper trains (its appendix B), whose states are positive.

No gate reads the state, so h is a scan of the maps h → a h + b, and parallel over time: every step
at an odd place is joined with the one before it, the joined ones are scanned alike, and the steps
between follow from those. Here 0 ≤ a ≤ 1, and maps are only ever composed, so nothing overflows or
is divided by; a in place of log a lets a reset be a = 0. (The paper scans in log space.)

T time, B batch, D input_size, H hidden_size, L num_layers.
"""

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from kru_triton.layers.recurrent import check_features, check_positive
from kru_triton.ops.arguments import check_kind, check_same, check_shape, check_tensor


class MinGRU(nn.Module):
    """Stacked minGRU layers, time first: `output, h_n = mingru(input, h_0=None, reset=None)`.

    The parameters of layer l are `weight_ih_l{l}` `(2·H, D)` and `bias_ih_l{l}` `(2·H,)`, of the
    gate z, then of the candidate. They start as those of `torch.nn.Linear`.

    Args:
        input_size, hidden_size: D, H.
        num_layers: stacked layers; each reads the output of the one before.
        dropout: probability on the output of every layer but the last.

    Raises:
        ValueError, TypeError: a size or an argument breaks a rule.

    Example:
        >>> mingru = MinGRU(3, 8)
        >>> output, h_n = mingru(torch.randn(5, 2, 3))
        >>> output.shape, h_n.shape
        (torch.Size([5, 2, 8]), torch.Size([1, 2, 8]))
    """

    weight_ih_l0: Tensor

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, dropout: float = 0.0
    ):
        super().__init__()
        self.input_size = check_positive("input_size", input_size)
        self.hidden_size = check_positive("hidden_size", hidden_size)
        self.num_layers = check_positive("num_layers", num_layers)
        self.dropout = nn.Dropout(dropout)
        for layer in range(num_layers):
            weight = torch.empty(2 * hidden_size, hidden_size if layer else input_size)
            self.register_parameter(f"weight_ih_l{layer}", nn.Parameter(weight))
            self.register_parameter(f"bias_ih_l{layer}", nn.Parameter(torch.empty(2 * hidden_size)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights."""
        for layer in range(self.num_layers):
            weight = getattr(self, f"weight_ih_l{layer}")
            for p in (weight, getattr(self, f"bias_ih_l{layer}")):
                nn.init.uniform_(p, -(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5)

    def extra_repr(self) -> str:
        layers = "" if self.num_layers == 1 else f", num_layers={self.num_layers}"
        return f"{self.input_size}, {self.hidden_size}{layers}"

    def forward(
        self, input: Tensor, h_0: Tensor | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Read a sequence.

        Args:
            input: `(T, B, D)`, T at least 1.
            h_0: `(L, B, H)`; None: zeros.
            reset: `(B, T)` bool, True where h_{t-1} is replaced by 0.

        Returns:
            output `(T, B, H)` and `h_n (L, B, H)`, at least in float32.
        """
        check_tensor("input", input)
        if input.dim() != 3 or not len(input):
            raise ValueError(
                f"input: must be (T, B, D) of at least one step, got shape {tuple(input.shape)}"
            )
        check_features("input", input, self.input_size, self.weight_ih_l0)
        time, batch, _ = input.shape
        if reset is not None:
            check_shape("reset", reset, (batch, time), "(B, T)")
            check_kind("reset", reset, "a bool", input, "input")
        if h_0 is not None:
            check_same("h_0", h_0, input, "input")
            check_shape("h_0", h_0, (self.num_layers, batch, self.hidden_size), "(L, B, H)")
        else:
            h_0 = input.new_zeros(self.num_layers, batch, self.hidden_size)
        last = []
        for layer in range(self.num_layers):
            weights = getattr(self, f"weight_ih_l{layer}"), getattr(self, f"bias_ih_l{layer}")
            x = nnf.linear(input, *weights)
            gate, candidate = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
            keep = (-gate).sigmoid()  # 1 − z
            if reset is not None:
                keep = keep.masked_fill(reset.t()[..., None], 0)
            candidate = torch.where(candidate >= 0, candidate + 0.5, candidate.sigmoid())
            h = diagonal_scan(keep, gate.sigmoid() * candidate, h_0[layer].to(keep.dtype))
            last.append(h[-1].clone())  # in memory of its own: a state holds no sequence
            if layer < self.num_layers - 1:
                input = self.dropout(h).to(x.dtype)
        return h, torch.stack(last)


def diagonal_scan(a: Tensor, b: Tensor, h_0: Tensor) -> Tensor:
    """`h_t = a_t h_{t-1} + b_t`, elementwise; on a GPU in 2 log2 T steps one after another.

    Args:
        a, b: `(T, …)`, 0 ≤ a ≤ 1.
        h_0: `(…)`.

    Returns:
        h `(T, …)`. Differentiable once, in all arguments.

    Example:
        >>> diagonal_scan(torch.full((3, 1), 0.5), torch.ones(3, 1), torch.zeros(1)).flatten()
        tensor([1.0000, 1.5000, 1.7500])
    """
    return _DiagonalScan.apply(a, b, h_0)


class _DiagonalScan(torch.autograd.Function):
    """The adjoint is the same scan backwards: ∂h_t = dh_t + a_{t+1} ∂h_{t+1}."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, h_0: Tensor) -> Tensor:
        b = torch.cat((torch.addcmul(b[:1], a[:1], h_0), b[1:]))
        h = _scan(a, b)
        ctx.save_for_backward(a, h, h_0)
        return h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, h, h_0 = ctx.saved_tensors
        a_after = torch.cat((torch.zeros_like(a[:1]), a[1:].flip(0)))
        db = _scan(a_after, dh.flip(0)).flip(0)
        return db * torch.cat((h_0[None], h[:-1])), db, a[0] * db[0]


def _scan(a: Tensor, b: Tensor) -> Tensor:
    """`diagonal_scan` from zero. One step of a batch is enough work for a processor's core (and a
    loop over time too much for `torch.compile`)."""
    in_turn = a.device.type == "cpu" and not torch.compiler.is_compiling()
    return (_in_turn if in_turn else _in_pairs)(a, b)


def _in_turn(a: Tensor, b: Tensor) -> Tensor:
    """`_scan` by T steps one after another."""
    h = torch.empty_like(b)
    h[0] = b[0]
    for a_t, b_t, before, h_t in zip(a[1:], b[1:], h[:-1], h[1:]):
        torch.addcmul(b_t, a_t, before, out=h_t)
    return h


def _in_pairs(a: Tensor, b: Tensor) -> Tensor:
    """`_scan` by joining pairs of steps."""
    time = a.shape[0]
    if time == 1:
        return b
    even_a, even_b = a[: time - 1 : 2], b[: time - 1 : 2]
    h = torch.empty_like(b)
    h[1::2] = _in_pairs(even_a * a[1::2], torch.addcmul(b[1::2], a[1::2], even_b))
    h[0] = b[0]
    rest = b[2::2], a[2::2], h[1 : time - 1 : 2]
    if torch.compiler.is_compiling():  # which takes no strided out
        h[2::2] = torch.addcmul(*rest)
    else:
        torch.addcmul(*rest, out=h[2::2])
    return h
