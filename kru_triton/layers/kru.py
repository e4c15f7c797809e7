"""`KRU` and `KRUCell`: Kronecker recurrent units with the calling conventions of `torch.nn.RNN`.

    h_t = σ((W_0 ⊗ … ⊗ W_{F-1}) h_{t-1} + U x_t + b)        (Jose, Cissé and Fleuret, ICML 2018)

With a gate, g(x_t) ⊙ h_{t-1} takes the place of h_{t-1}: the recurrent matrix is then
(W_0 ⊗ … ⊗ W_{F-1}) diag(g(x_t)), one for every input.

B batch, T time, D input_size, H heads, N units per head, hidden_size = H·N, F = parts·hidden_size
features of a state (parts = 2: real parts, then imaginary parts; 1 in the real field), L layers,
R directions, V rows of an embedding.
"""

import torch
from torch import Tensor

from kru_triton.layers.recurrent import (
    Recurrence,
    RecurrentLayers,
    check_features,
    check_state,
)
from kru_triton.ops.arguments import check_shape, rows_of, scan_arguments
from kru_triton.ops.linear import run_linear_scan
from kru_triton.ops.scan import run_scan


class KRU(RecurrentLayers):
    """Kronecker recurrent layers: `output, h_n = kru(input, h_0=None, *, reset=None)`.

    `h_t = σ((W_0 ⊗ … ⊗ W_{F-1}) h_{t-1} + U x_t + b)`, with a complex state by default. A layer's
    output is planar real, `(…, parts·hidden_size)`: real parts, then imaginary parts.

    The input may be tokens: `kru(tokens, embedding=E)` is `kru(E[tokens])`, with one product over
    the vocabulary in place of one over all tokens.

    `torch.onnx.export(…, dynamo=True)` takes the module (not its ExportedProgram, which keeps the
    op) and writes every step out, so that T is fixed; B may be dynamic.

    Args:
        input_size: D, real input features.
        hidden_size: units per layer and direction, over all heads (complex units by default).
        num_layers: stacked layers; each reads the planar output of the one before.
        factors: ints (square) or `(P, Q)` pairs whose products are hidden_size / num_heads; None
            takes two balanced ones.
        num_heads: independent diagonal blocks of the recurrent matrix.
        field: "complex" or "real" (real state, orthogonal factors).
        nonlinearity: "modrelu", "modtanh", "tanh", "relu" or "identity".
        state_gate: "none", "sigmoid", "rotation" or "modtanh". The state is multiplied, unit by
            unit, by a number that depends on the input, before the recurrent matrix: by
            sigmoid(G x_t + c), a forget gate; by exp(i (G x_t + c)), which keeps a unitary
            recurrence unitary (complex field); or by tanh(|z|) z/|z| of z = G x_t + c, which
            turns and forgets. Not with time_parallel.
        bias: learn b.
        batch_first: input and output are `(B, T, …)` instead of `(T, B, …)`.
        dropout: probability on the output of every layer but the last.
        bidirectional: a second recurrence runs from the end; outputs are concatenated.
        recompute: a number of steps k keeps for the backward only the input and every k-th state:
            all layers run in chunks of k steps, each computed again in the backward (with
            directions, each direction of each layer by itself). 0: keep every state. Gradients
            differ by the rounding of their sums, in bfloat16 also of every k-th state.
        time_parallel: with "identity", run blocks of time side by side, `kru_linear_scan`.
        backend, precision: as in `kru_scan`.
        device, dtype: of the parameters.

    Raises:
        ValueError, TypeError: sizes that do not fit, with a proposal.

    Example:
        >>> kru = KRU(8, 64, factors=(8, 8), batch_first=True)
        >>> output, h_n = kru(torch.randn(2, 5, 8))
        >>> output.shape, h_n.shape, kru.num_recurrent_parameters
        (torch.Size([2, 5, 128]), torch.Size([1, 2, 128]), 256)
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        factors=None,
        num_heads: int = 1,
        field: str = "complex",
        nonlinearity: str = "modrelu",
        state_gate: str = "none",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        recompute: int = 0,
        time_parallel: bool = False,
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
            field=field,
            nonlinearity=nonlinearity,
            state_gate=state_gate,
            bias=bias,
            backend=backend,
            precision=precision,
        )
        if not isinstance(time_parallel, bool):
            raise TypeError(f"time_parallel: must be a bool, got {type(time_parallel).__name__}")
        if time_parallel and nonlinearity != "identity":
            raise ValueError(
                "time_parallel: only a recurrence without nonlinearity can run in parallel over "
                f"time, got {nonlinearity!r}; set nonlinearity='identity'"
            )
        if time_parallel and state_gate != "none":
            raise ValueError(
                "time_parallel: only a recurrence with one matrix for all steps can run so, got "
                f"{state_gate!r}; set state_gate='none'"
            )
        self.time_parallel = time_parallel

    def _scan(
        self,
        x: Tensor,
        suffix: str,
        h_0: Tensor | None,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
        tables: tuple[Tensor, Tensor | None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """h `(T, B, F)` and h_n of `x (T, B, ·)`, or of tokens `(T, B)` with tables `(V, F)` of
        their inputs and gates."""
        tokens = None
        if tables is None:
            x, gate = self._project(x, suffix), self._gate(x, suffix)
        else:
            table, gates = tables
            gate = None if gates is None else rows_of(gates, x)
            x, tokens = (rows_of(table, x), None) if self.time_parallel else (table, x)
        scan = scan_arguments(
            x,
            self._factors(suffix),
            getattr(self, f"beta{suffix}", None),
            h_0,
            self.how,
            reset=reset,
            lengths=lengths,
            tokens=tokens,
            gate=gate,
            time_first=True,
        )
        return (run_linear_scan if self.time_parallel else run_scan)(scan, self.how)

    def beta(self, layer: int = 0, direction: int = 0) -> Tensor | None:
        """The modReLU threshold `(hidden_size,)`, None for other nonlinearities."""
        return getattr(self, f"beta{self._suffix(layer, direction)}", None)

    def recurrent_matrix(self, layer: int = 0, direction: int = 0, head: int = 0) -> Tensor:
        """W_0 ⊗ … ⊗ W_{F-1} of one head as a complex `(N, N)` matrix (real in the real field), at
        least in single precision."""
        w = self._matrix(layer, direction, head)
        return torch.complex(w[0], w[1]) if self.parts == 2 else w[0]


class KRUCell(Recurrence):
    """One step of a `KRU` layer: `h = cell(input, h=None)`, as `torch.nn.RNNCell`.

    `h' = σ((W_0 ⊗ … ⊗ W_{F-1}) h + U x + b)`. Arguments are those of `KRU`.

    Example:
        >>> cell = KRUCell(8, 64)
        >>> cell(torch.randn(3, 8)).shape
        torch.Size([3, 128])
    """

    time_parallel = False
    _scan = KRU._scan

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        factors=None,
        num_heads: int = 1,
        field: str = "complex",
        nonlinearity: str = "modrelu",
        state_gate: str = "none",
        bias: bool = True,
        backend: str = "auto",
        precision: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__(
            input_size,
            hidden_size,
            factors=factors,
            num_heads=num_heads,
            field=field,
            nonlinearity=nonlinearity,
            state_gate=state_gate,
            bias=bias,
            backend=backend,
            precision=precision,
        )
        self._add_parameters("", input_size, device, dtype)
        self.reset_parameters()

    def forward(self, input: Tensor, h: Tensor | None = None) -> Tensor:
        """input `(B, D)` or `(D,)`, h `(B, F)` or `(F,)` (zeros if None); returns the next h."""
        if not isinstance(input, Tensor):
            raise TypeError(f"input: must be a tensor, got {type(input).__name__}")
        if input.dim() not in (1, 2):
            raise ValueError(f"input: must be (B, D) or (D,), got shape {tuple(input.shape)}")
        check_features("input", input, self.input_size, self.weight_ih)
        check_state("h", h)
        batched = input.dim() == 2
        if h is not None:
            shape = (*input.shape[:-1], self.output_size)
            check_shape("h", h, shape, "B, parts·H·N" if batched else "parts·H·N")
        if not batched:
            input, h = input.unsqueeze(0), None if h is None else h.unsqueeze(0)
        _, h_n = self._scan(input.unsqueeze(0), "", h)
        return h_n if batched else h_n.squeeze(0)

    def recurrent_factors(self):
        """The factors `(parts, H, P, Q)`, as the only entry of a list."""
        return [self._factors("")]

    @property
    def _suffixes(self) -> list[str]:
        return [""]
