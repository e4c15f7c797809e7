"""`KRULSTM`: an LSTM whose recurrent matrices are Kronecker products.

    z_k = (W_k,0 ⊗ … ⊗ W_k,F-1) h_{t-1} + U_k x_t + b_k       for the gates k = i, f, g, o
    c_t = σ(z_f) c_{t-1} + σ(z_i) tanh(z_g),   h_t = σ(z_o) tanh(c_t)

B batch, T time, D input_size, H heads, N units per head, F = hidden_size = H·N features of a state,
L layers, R directions.
"""

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from kru_triton.layers.decoding import LSTMStep
from kru_triton.layers.recurrent import RecurrentLayers, check_state
from kru_triton.ops.arguments import check_choice, lstm_arguments, rows_of
from kru_triton.ops.lstm import run_lstm_scan, why_not_triton_lstm

GATES = ("i", "f", "g", "o")


class KRULSTM(RecurrentLayers):
    """Kronecker LSTM layers: `output, (h_n, c_n) = lstm(input, (h_0, c_0))`, as `torch.nn.LSTM`.

    Real states. The parameters of layer l (its reverse direction ends in `_reverse`) are

        weight_ih_l{l}    (4·F, D)          input weights of the gates i, f, g, o: input, forget,
                                            cell and output, the order of `torch.nn.LSTM`
        bias_l{l}         (4·F,)            one bias, where `torch.nn.LSTM` has two that add up
        factor{f}_l{l}    (1, 4·H, P, Q)    factor f of the H heads of gate i, then of f, g and o

    Factors start orthogonal, input weights as N(0, 1/D), biases as 0 but 1 for the forget gate
    (Jozefowicz, Zaremba and Sutskever, ICML 2015). Gates bound the state: no penalty is needed,
    and `unitarity_penalty()` is there for whom it serves.

    The input may be tokens: `lstm(tokens, embedding=E)` is `lstm(E[tokens])`, with one product over
    the vocabulary in place of one over all tokens. ONNX: as `KRU`.

    Args:
        input_size: D, input features.
        hidden_size: units per layer and direction, over all heads.
        num_layers: stacked layers; each reads the output of the one before.
        factors: ints (square) or `(P, Q)` pairs whose products are hidden_size / num_heads; None
            takes two balanced ones. The same sizes for every gate.
        num_heads: independent diagonal blocks of every recurrent matrix.
        bias: learn b.
        batch_first: input and output are `(B, T, …)` instead of `(T, B, …)`.
        dropout: probability on the output of every layer but the last.
        bidirectional: a second recurrence runs from the end; outputs are concatenated.
        recompute: as in `KRU`.
        backend, precision: as in `kru_lstm_scan`.
        device, dtype: of the parameters.

    Raises:
        ValueError, TypeError: sizes that do not fit, with a proposal.

    Example:
        >>> lstm = KRULSTM(8, 64, factors=(8, 8), batch_first=True)
        >>> output, (h_n, c_n) = lstm(torch.randn(2, 5, 8))
        >>> output.shape, h_n.shape, c_n.shape, lstm.num_recurrent_parameters
        (torch.Size([2, 5, 64]), torch.Size([1, 2, 64]), torch.Size([1, 2, 64]), 512)
    """

    always_shown = ("num_heads",)
    gates = 4
    states = 2  # h and c, side by side where both go from step to step
    mode = "LSTM"  # as torch.nn.LSTM has it
    step_type = LSTMStep

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        factors=None,
        num_heads: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        recompute: int = 0,
        backend: str = "auto",
        precision: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            batch_first=batch_first,
            dropout=dropout,
            bidirectional=bidirectional,
            recompute=recompute,
            device=device,
            dtype=dtype,
            factors=factors,
            num_heads=num_heads,
            field="real",
            nonlinearity="tanh",
            bias=bias,
            backend=backend,
            precision=precision,
        )

    def reset_parameters(self) -> None:
        """Orthogonal factors, input weights N(0, 1/D), bias 1 for the forget gate and else 0."""
        super().reset_parameters()
        for name, parameter in self.named_parameters():
            if name.startswith("bias"):
                with torch.no_grad():
                    parameter.view(4, -1)[GATES.index("f")].fill_(1)

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        reset: Tensor | None = None,
        embedding: Tensor | None = None,
        h_n_only: bool = False,
    ) -> tuple[Tensor | PackedSequence | None, tuple[Tensor, Tensor]]:
        """Run all layers.

        Args:
            input: `(T, B, D)`, `(B, T, D)` with batch_first, `(T, D)` unbatched, or a
                `PackedSequence`. With `embedding`, int64 tokens: the same without the D.
            hx: h_0 and c_0, each `(L·R, B, F)`, or `(L·R, F)` unbatched; zeros if None.
            reset: bool, `(B, T)` whatever batch_first says, or `(T,)` unbatched: a document starts
                at t, so neither state nor cell crosses into it from before. Not with a
                `PackedSequence`.
            embedding: `(V, D)`, of which the input's tokens are rows: as `lstm(embedding[input])`.
            h_n_only: return None in place of output.

        Returns:
            output `(T, B, R·F)` (or as the input came) and `(h_n, c_n)`, each `(L·R, B, F)`: for
            each row those after its last step, which for the reverse direction is its first time
            step.
        """
        stepped = self._stepped(input, hx, reset, embedding, h_n_only)
        if stepped is not None:
            return stepped[0], tuple(stepped[1])
        output, last = super().forward(
            input,
            None if hx is None else self._side_by_side(hx),
            reset=reset,
            embedding=embedding,
            h_n_only=h_n_only,
        )
        return output, last.chunk(2, -1)

    def _side_by_side(self, hx) -> Tensor:
        """`(h_0, c_0)`, checked against each other, as one tensor `(…, 2·F)`."""
        if not isinstance(hx, tuple | list) or len(hx) != 2:
            got = f"{len(hx)} entries" if isinstance(hx, tuple | list) else type(hx).__name__
            raise TypeError(f"hx: must be a tuple (h_0, c_0), got {got}")
        for name, state in zip(("h_0", "c_0"), hx):
            check_state(name, state)
            if state is None:
                raise TypeError(f"{name}: must be a tensor; leave out hx for zeros")
        h_0, c_0 = hx
        for what in ("shape", "dtype", "device"):
            if getattr(h_0, what) != getattr(c_0, what):
                raise ValueError(
                    f"c_0: must have the {what} of h_0, {getattr(h_0, what)}, got "
                    f"{getattr(c_0, what)}"
                )
        if h_0.shape[-1:] != (self.hidden_size,):
            raise ValueError(
                f"h_0: the last dimension must be hidden_size={self.hidden_size}, got shape "
                f"{tuple(h_0.shape)}"
            )
        return torch.cat((h_0, c_0), -1)

    def _scan(self, x: Tensor, suffix: str, h_0, reset, lengths=None, tables=None):
        """h `(T, B, F)` and h_n and c_n side by side; arguments as for any recurrence."""
        x_proj = self._project(x, suffix) if tables is None else rows_of(tables[0], x)
        h_0, c_0 = (None, None) if h_0 is None else h_0.chunk(2, -1)
        given = {"reset": reset, "lengths": lengths, "time_first": True}
        scan = lstm_arguments(x_proj, self._factors(suffix), h_0, c_0, self.how, **given)
        h, last = run_lstm_scan(scan, self.how)
        return h, torch.cat(last, -1)

    def _why_not(self, x_proj: Tensor, factors: list[Tensor]) -> str | None:
        return why_not_triton_lstm(x_proj, factors, precision=self.precision)

    def recurrent_matrix(
        self, gate: str, layer: int = 0, direction: int = 0, head: int = 0
    ) -> Tensor:
        """W_0 ⊗ … ⊗ W_{F-1} of one gate ("i", "f", "g" or "o") and head, real `(N, N)`, at least in
        float32."""
        place = GATES.index(check_choice("gate", gate, GATES))
        return self._matrix(layer, direction, head, place)[0]
