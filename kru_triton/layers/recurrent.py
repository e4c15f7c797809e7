"""What `KRU` and `KRULSTM` share: parameters, layers, directions, packing, chunks, single steps.

Inside, sequences are time first. A recurrence says in `_scan` how one layer and direction runs.

B batch, T time, D input_size, H heads, N units per head, hidden_size = H·N, F = parts·hidden_size
features of a state (parts = 2: real parts, then imaginary parts; 1 in the real field), L layers,
R directions, V rows of an embedding.
"""

import contextlib
import functools
import math

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils.checkpoint import checkpoint

from kru_triton.kronecker import factor_shapes, kron_dense
from kru_triton.layers.decoding import LSTMStep, Step
from kru_triton.nonlinearity import NONLINEARITIES
from kru_triton.ops.arguments import (
    BACKENDS,
    PRECISIONS,
    How,
    check_choice,
    check_shape,
    state_dtype,
)
from kru_triton.ops.dispatch import why_not_op
from kru_triton.ops.scan import why_not_triton
from kru_triton.reference import apply_nonlinearity
from kru_triton.unitarity import unitarity_penalty, unitary_

FIELDS = ("complex", "real")
GATES = ("none", "sigmoid", "rotation", "modtanh")
_DEFAULTS = {  # of what a repr shows where it differs
    "state_gate": "none",
    "num_layers": 1,
    "has_bias": True,
    "batch_first": False,
    "dropout": 0,
    "bidirectional": False,
    "recompute": 0,
    "time_parallel": False,
    "backend": "auto",
    "precision": "auto",
}


class Recurrence(nn.Module):
    """Sizes and parameters that all recurrences share; a suffix names layer and direction."""

    always_shown: tuple[str, ...] = ("num_heads", "field", "nonlinearity")  # in the repr
    gates = 1  # recurrent matrices of a head, each with an input projection of its own

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        factors,
        num_heads: int,
        field: str,
        nonlinearity: str,
        state_gate: str = "none",
        bias: bool,
        backend: str,
        precision: str,
    ):
        super().__init__()
        self.input_size = check_positive("input_size", input_size)
        self.factor_shapes = factor_shapes(factors, hidden_size, num_heads)
        self.hidden_size, self.num_heads = hidden_size, num_heads
        self.field = check_choice("field", field, FIELDS)
        self.nonlinearity = check_choice("nonlinearity", nonlinearity, NONLINEARITIES)
        self.state_gate = check_choice("state_gate", state_gate, GATES)
        if state_gate == "rotation" and field == "real":
            raise ValueError(
                'state_gate: "rotation" turns complex numbers, and field is "real"; set "modtanh"'
            )
        self.backend = check_choice("backend", backend, BACKENDS)
        self.precision = check_choice("precision", precision, PRECISIONS)
        self.has_bias = bias
        self.parts = 2 if field == "complex" else 1
        self.output_size = self.parts * hidden_size

    def _add_parameters(self, suffix: str, input_size: int, device, dtype) -> None:
        real = isinstance(dtype, torch.dtype) and dtype.is_floating_point
        if dtype is not None and not real:
            raise TypeError(
                f"dtype: must be a real float dtype, got {dtype!r}; complex parameters are stored "
                "as real and imaginary parts"
            )

        def parameter(*shape):
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        features, heads = self.gates * self.output_size, self.gates * self.num_heads
        setattr(self, f"weight_ih{suffix}", parameter(features, input_size))
        if self.has_bias:
            setattr(self, f"bias{suffix}", parameter(features))
        if self.nonlinearity == "modrelu":
            setattr(self, f"beta{suffix}", parameter(self.hidden_size))
        if self.state_gate != "none":
            numbers = self.output_size if self.state_gate == "modtanh" else self.hidden_size
            setattr(self, f"weight_gate{suffix}", parameter(numbers, input_size))
            setattr(self, f"bias_gate{suffix}", parameter(numbers))
        for f, (p, q) in enumerate(self.factor_shapes):
            setattr(self, f"factor{f}{suffix}", parameter(self.parts, heads, p, q))

    @property
    def how(self) -> How:
        """The choices that go to the op."""
        return How(self.nonlinearity, self.backend, self.precision)

    def _factors(self, suffix: str) -> list[Tensor]:
        return [getattr(self, f"factor{f}{suffix}") for f in range(len(self.factor_shapes))]

    def reset_parameters(self) -> None:
        """Haar unitary factors, beta and bias 0, input weights N(0, 1/D); a gate's bias such that,
        where there is no input, a state keeps 0.73 of itself, turns by 0, or keeps 0.96."""
        for name, parameter in self.named_parameters(recurse=False):
            if name.startswith("factor"):
                unitary_(parameter)
            elif name.startswith("weight"):
                nn.init.normal_(parameter, std=1 / math.sqrt(parameter.shape[1]))
            else:
                nn.init.zeros_(parameter)
                if name.startswith("bias_gate"):
                    start = {"sigmoid": 1.0, "rotation": 0.0, "modtanh": 2.0}[self.state_gate]
                    nn.init.constant_(parameter[: self.hidden_size], start)

    def _project(self, x: Tensor, suffix: str) -> Tensor:
        return nnf.linear(
            x, getattr(self, f"weight_ih{suffix}"), getattr(self, f"bias{suffix}", None)
        )

    def _gate(self, x: Tensor, suffix: str) -> Tensor | None:
        """By what the state is multiplied before the recurrent matrix, of x `(…, D)`: `(…, F)`, or
        of "sigmoid" a real number for each unit."""
        if self.state_gate == "none":
            return None
        weight, bias = (getattr(self, f"{kind}_gate{suffix}") for kind in ("weight", "bias"))
        g = nnf.linear(x, weight, bias)
        if self.state_gate == "sigmoid":
            return g.sigmoid()
        if self.state_gate == "rotation":
            return torch.cat((g.cos(), g.sin()), -1)
        g = g.unflatten(-1, (self.parts, -1))
        return apply_nonlinearity(g, "modtanh").flatten(-2)

    def why_not_triton(self) -> str | None:
        """Why no kernel runs these layers where their weights are, in one sentence; None: one does.

        Example:
            >>> KRU(8, 64, backend="torch").why_not_triton()
            'backend="torch"'
        """
        if self.backend == "torch":
            return 'backend="torch"'
        suffix = self._suffixes[0]
        weight, factor = getattr(self, f"weight_ih{suffix}"), self._factors(suffix)[0]
        x_proj = weight.new_empty(1, 1, self.gates * self.output_size)
        shapes = [(self.parts, self.gates * self.num_heads, *pq) for pq in self.factor_shapes]
        like = {"dtype": factor.dtype, "device": factor.device}
        return self._why_not(x_proj, [torch.empty(*shape, **like) for shape in shapes])

    def _why_not(self, x_proj: Tensor, factors: list[Tensor]) -> str | None:
        gate = None if self.state_gate == "none" else torch.empty_like(x_proj)
        return why_not_triton(
            x_proj, factors, nonlinearity=self.nonlinearity, precision=self.precision, gate=gate
        )

    @property
    def num_recurrent_parameters(self) -> int:
        """Real numbers in the Kronecker factors: seven complex 2×2 factors count 56."""
        return sum(w.numel() for factors in self.recurrent_factors() for w in factors)

    def unitarity_penalty(self) -> Tensor:
        """Σ ‖WᴴW − I‖²_F over all factors, heads, layers and directions; a 0-dimensional tensor."""
        return unitarity_penalty(self)

    def extra_repr(self) -> str:
        shapes = ", ".join(f"{p}x{q}" for p, q in self.factor_shapes)
        shown = [f"{self.input_size}, {self.hidden_size}, factors=({shapes})"]
        shown += [f"{name}={getattr(self, name)!r}" for name in self.always_shown]
        for name, default in _DEFAULTS.items():
            value = getattr(self, name, default)
            if value != default:
                shown.append(f"{name.removeprefix('has_')}={value!r}")
        return ", ".join(shown)


class RecurrentLayers(Recurrence):
    """Stacked layers and directions with the calling convention of `torch.nn.RNN`.

    A recurrence is one if it says how one layer and direction runs (`_scan`), with all that goes
    from step to step in one tensor of `states` parts of F features.
    """

    states = 1
    proj_size = 0  # as torch.nn.RNN has it: no projection of the state
    step_type = Step
    steps: dict[int, Step | LSTMStep] | None = None  # while decoding, by layer

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        *,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        recompute: int,
        device,
        dtype,
        **recurrence,
    ):
        super().__init__(input_size, hidden_size, **recurrence)
        self.num_layers = check_positive("num_layers", num_layers)
        if isinstance(dropout, bool) or not isinstance(dropout, int | float):
            raise TypeError(f"dropout: must be a number, got {type(dropout).__name__} {dropout!r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: must be in [0, 1), got {dropout}")
        if isinstance(recompute, bool) or not isinstance(recompute, int):
            raise TypeError(f"recompute: must be an int, got {type(recompute).__name__}")
        if recompute < 0:
            raise ValueError(
                f"recompute: must be a number of steps, or 0 for none, got {recompute}"
            )
        self.recompute = recompute
        self.batch_first, self.dropout, self.bidirectional = batch_first, dropout, bidirectional
        self.num_directions = 2 if bidirectional else 1
        for layer in range(num_layers):
            size = input_size if layer == 0 else self.num_directions * self.output_size
            for direction in range(self.num_directions):
                self._add_parameters(suffix_of(layer, direction), size, device, dtype)
        self.reset_parameters()

    def forward(
        self,
        input: Tensor | PackedSequence,
        h_0: Tensor | None = None,
        *,
        reset: Tensor | None = None,
        embedding: Tensor | None = None,
        h_n_only: bool = False,
    ) -> tuple[Tensor | PackedSequence | None, Tensor]:
        """Run all layers.

        Args:
            input: `(T, B, D)`, `(B, T, D)` with batch_first, `(T, D)` unbatched, or a
                `PackedSequence`. With `embedding`, int64 tokens: the same without the D.
            h_0: `(L·R, B, F)`, or `(L·R, F)` unbatched; zeros if None.
            reset: bool, `(B, T)` whatever batch_first says, or `(T,)` unbatched: a document starts
                at t, so no state crosses into it from before. Not with a `PackedSequence`.
            embedding: `(V, D)`, of which the input's tokens are rows: as `kru(embedding[input])`.
            h_n_only: return None in place of output. With `recompute`, no tensor over all steps is
                then made beside the input.

        Returns:
            output `(T, B, R·F)` (or as the input came) and h_n `(L·R, B, F)`: for each row the
            state after its last step, which for the reverse direction is its first time step.
        """
        stepped = self._stepped(input, (h_0,), reset, embedding, h_n_only)
        if stepped is not None:
            return stepped[0], stepped[1][0]
        packed = isinstance(input, PackedSequence)
        if not packed and not isinstance(input, Tensor):
            raise TypeError(
                f"input: must be a tensor or PackedSequence, got {type(input).__name__}"
            )
        data = input.data if packed else input
        unbatched_dim = 2 if embedding is None else 1
        if data.dim() not in (unbatched_dim, unbatched_dim + (not packed)):
            raise ValueError(
                f"input: must have {unbatched_dim} (unbatched) or {unbatched_dim + 1} dimensions, "
                f"got shape {tuple(data.shape)}"
            )
        if embedding is None:
            check_features("input", data, self.input_size, self.weight_ih_l0)
        else:
            _check_embedding(data, embedding, self.input_size, self.weight_ih_l0)
        check_state("h_0", h_0)
        if reset is not None and not isinstance(reset, Tensor):
            raise TypeError(f"reset: must be a bool tensor, got {type(reset).__name__}")
        if packed:
            if reset is not None:
                raise ValueError("reset: not with a PackedSequence; pad the batch to use it")
            return self._forward_packed(input, h_0, embedding, h_n_only)
        batched = input.dim() > unbatched_dim
        batch_dim = 0 if self.batch_first else 1
        if not batched:
            input = input.unsqueeze(batch_dim)
            h_0 = None if h_0 is None else h_0.unsqueeze(min(h_0.dim(), 1))
            reset = None if reset is None else reset.unsqueeze(0)
        x = input.transpose(0, 1) if self.batch_first else input
        h_0 = self._check_h_0(h_0, x.shape[1], batched)
        output, h_n = self._run(x, h_0, reset, None, embedding, h_n_only)
        if output is not None:
            output = output.transpose(0, 1) if self.batch_first else output
            output = output if batched else output.squeeze(batch_dim)
        return output, h_n if batched else h_n.squeeze(1)

    def _forward_packed(self, input: PackedSequence, h_0, embedding, h_n_only):
        data, batch_sizes, order, original_order = input
        # longest row first, as packed: rows that run equally long lie side by side
        runs = torch.arange(int(batch_sizes[0])) < batch_sizes[:, None]  # (T, B)
        lengths, places = (v.to(data.device) for v in (runs.sum(0), runs.flatten().nonzero()[:, 0]))
        # plain operations: torch.func cannot look into torch.nn.utils.rnn's
        x = data.new_zeros(runs.numel(), *data.shape[1:]).index_copy(0, places, data)
        h_0 = self._check_h_0(h_0, runs.shape[1], True)
        h_0 = h_0 if h_0 is None or order is None else h_0[:, order]
        x = x.unflatten(0, runs.shape)
        output, h_n = self._run(x, h_0, None, lengths, embedding, h_n_only)
        if not h_n_only:
            output = output.flatten(0, 1).index_select(0, places)
            output = PackedSequence(output, batch_sizes, order, original_order)
        return output, h_n if order is None else h_n[:, original_order]

    def _run(self, x: Tensor, h_0, reset, lengths, embedding, h_n_only):
        """`x (T, B, ·)` through all layers; `lengths (B,)` of rows that end earlier."""
        tables = [None] * self.num_directions
        if embedding is not None:
            suffixes = [suffix_of(0, d) for d in range(self.num_directions)]
            tables = [(self._project(embedding, s), self._gate(embedding, s)) for s in suffixes]
        run = functools.partial(self._layers, tables, h_n_only)
        # a reverse direction has to end before the next layer begins: each is cut by itself
        steps = 0 if self.bidirectional else self.recompute
        return in_chunks(self, run, steps, x, h_0, reset, lengths)

    def _layers(self, tables, h_n_only: bool, x: Tensor, h_0, reset, lengths):
        steps = self.recompute if self.bidirectional else 0
        flip = None
        if self.bidirectional and lengths is not None:
            flip = _reversal(x.shape[0], lengths)
        last_states = []
        for layer in range(self.num_layers):
            if layer and self.dropout:
                x = nnf.dropout(x, self.dropout, self.training)
            drop = h_n_only and layer == self.num_layers - 1
            outputs = []
            for direction in range(self.num_directions):
                given = None if layer else tables[direction]
                run = functools.partial(self._direction, suffix_of(layer, direction), given, drop)
                inputs, cut = x, reset
                if direction:
                    inputs = _reversed(x, flip)
                    cut = None if reset is None else _reverse_reset(reset)
                start = None if h_0 is None else h_0[layer * self.num_directions + direction]
                y, h_n = in_chunks(self, run, steps, inputs, start, cut, lengths)
                outputs.append(_reversed(y, flip) if direction and not drop else y)
                last_states.append(h_n)
            if not drop:
                x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        return None if h_n_only else x, torch.stack(last_states)

    def _direction(self, suffix: str, tables, drop: bool, x: Tensor, h_0, reset, lengths):
        y, h_n = self._scan(x, suffix, h_0, reset, lengths, tables)
        return None if drop else y, h_n

    @property
    def mode(self) -> str:
        """As torch.nn's layers have it: "RNN_TANH" and "RNN_RELU", here also "RNN_MODRELU", …."""
        return f"RNN_{self.nonlinearity.upper()}"

    @property
    def bias(self) -> bool:
        """Whether b is learnt."""
        return self.has_bias

    @property
    def _all_weights(self) -> list[list[str]]:
        """The names of `all_weights`."""
        kinds = ["weight_ih", *(f"factor{f}" for f in range(len(self.factor_shapes)))]
        kinds += ["bias"] if self.has_bias else []
        kinds += ["beta"] if self.nonlinearity == "modrelu" else []
        kinds += ["weight_gate", "bias_gate"] if self.state_gate != "none" else []
        return [[kind + suffix for kind in kinds] for suffix in self._suffixes]

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """Per layer and direction: input weight, factors, bias, β and gate, of those there are."""
        return [[getattr(self, name) for name in names] for names in self._all_weights]

    def get_expected_hidden_size(
        self, input: Tensor, batch_sizes: Tensor | None = None
    ) -> tuple[int, int, int]:
        """The shape of h_0, and of a c_0, for an input `(T, B, ·)`, or a packed one's sizes."""
        if batch_sizes is None:
            batch = input.shape[0 if self.batch_first else 1]
        else:
            batch = int(batch_sizes[0])
        return self.num_layers * self.num_directions, batch, self.output_size

    def flatten_parameters(self) -> None:
        """Does nothing: the weights are read where they are."""

    @contextlib.contextmanager
    def decoding(self):
        """Inside, single steps are fast on a CPU, on the promise that no weight changes meanwhile.

        The first step from a given state makes the recurrent matrices ready, in memory of their
        own. Later ones take them while the layer has the very tensors they were made of; weights
        that something brings in or computes for each call are read anew each time.

        Example:
            >>> kru, x = KRU(8, 64), torch.randn(1, 3, 8)
            >>> with torch.no_grad(), kru.decoding():
            ...     _, h = kru(x)
            ...     _, h = kru(x, h)
        """
        outer, self.steps = self.steps, {}
        try:
            yield
        finally:
            self.steps = outer

    def __getstate__(self) -> dict:
        """All but the prepared steps: a copy has weights of its own, and may outlive `decoding`."""
        return {name: value for name, value in vars(self).items() if name != "steps"}

    def _stepped(self, input, states, reset, embedding, h_n_only: bool) -> tuple | None:
        """Output and last states of one time step, by a `Step` for each layer; None where none can
        stand for the scan, and where an argument does not fit."""
        if (
            torch.compiler.is_compiling()
            or self.steps is None
            or torch.is_grad_enabled()
            or not (reset is None and embedding is None and not h_n_only)
            or self.bidirectional
            or (self.dropout and self.training)
            or not isinstance(states, tuple | list)
            or len(states) != self.states
        ):
            return None
        time = 1 if self.batch_first else 0
        for x in (input, *states):
            if not isinstance(x, Tensor) or x.dim() != 3 or not x.is_cpu:
                return None
        shape = (self.num_layers, input.shape[1 - time], self.output_size)
        dtype, like = states[0].dtype, self.weight_ih_l0
        if input.shape[time] != 1 or dtype not in (like.dtype, state_dtype(like)):
            return None
        if any(x.shape != shape or x.dtype != dtype for x in states):
            return None
        check_features("input", input, self.input_size, self.weight_ih_l0)
        x, after = input.select(time, 0), []
        for layer in range(self.num_layers):
            step = self.steps.get(layer)
            if step is None:
                step = self.steps[layer] = self.step_type(self, layer)
            for name, weight in step.weights.items():
                if self._parameters.get(name) is not weight:
                    return None
            x_proj, gate = self._project(x, suffix_of(layer, 0)), self._gate(x, suffix_of(layer, 0))
            gate = () if gate is None else (gate,)
            after.append(step(x_proj, *[state[layer] for state in states], *gate))
            x = after[-1][0].to(x_proj.dtype)
        after = [x[0].unsqueeze(0) if len(x) == 1 else torch.stack(x) for x in zip(*after)]
        return x.unsqueeze(time), after

    def input_projection(self, x: Tensor, layer: int = 0, direction: int = 0) -> Tensor:
        """U x + b of one layer and direction: x `(T, B, ·)` (or batch-first) -> `(B, T, F)`."""
        x_proj = self._project(x, self._suffix(layer, direction))
        return x_proj if self.batch_first else x_proj.transpose(0, 1)

    def gate_projection(self, x: Tensor, layer: int = 0, direction: int = 0) -> Tensor | None:
        """The gate of one layer and direction, as `input_projection`; None without one."""
        gate = self._gate(x, self._suffix(layer, direction))
        return gate if gate is None or self.batch_first else gate.transpose(0, 1)

    def recurrent_factors(self, layer: int | None = None, direction: int = 0):
        """The factors `(parts, H, P, Q)` of one layer and direction; without a layer, of each."""
        if layer is not None:
            return self._factors(self._suffix(layer, direction))
        return [self._factors(suffix) for suffix in self._suffixes]

    def _matrix(self, layer: int, direction: int, head: int, gate: int = 0) -> Tensor:
        """W_0 ⊗ … ⊗ W_{F-1} of one head of a gate, planar `(parts, N, N)`, at least in float32."""
        _check_index("head", head, self.num_heads)
        block = gate * self.num_heads + head
        factors = [w[:, block, None] for w in self.recurrent_factors(layer, direction)]
        dtype = state_dtype(factors[0])
        return kron_dense([w.to(dtype) for w in factors])[:, 0]

    def _suffix(self, layer: int, direction: int) -> str:
        """`suffix_of` one that there is."""
        _check_index("layer", layer, self.num_layers)
        _check_index("direction", direction, self.num_directions)
        return suffix_of(layer, direction)

    @property
    def _suffixes(self) -> list[str]:
        """One per layer and direction, as states and weights lie."""
        return [suffix_of(i, d) for i in range(self.num_layers) for d in range(self.num_directions)]

    def _check_h_0(self, h_0, batch: int, batched: bool):
        if h_0 is None:
            return None
        shape = (self.num_layers * self.num_directions, batch, self.output_size)
        if tuple(h_0.shape) != (*shape[:2], self.states * self.output_size):
            got = (*h_0.shape[:-1], *(n // self.states for n in h_0.shape[-1:]))
            want = shape
            if not batched:
                want, got = (shape[0], shape[2]), (got[0], *got[2:])
            raise ValueError(
                f"h_0: must have shape {want} (layers · directions, batch, "
                f"parts · hidden_size), got {got}"
            )
        return h_0


def suffix_of(layer: int, direction: int = 0) -> str:
    """The end of the names of the parameters of one layer and direction."""
    return f"_l{layer}" + ("_reverse" if direction else "")


def check_positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: must be an int, got {type(value).__name__} {value!r}")
    if value < 1:
        raise ValueError(f"{name}: must be at least 1, got {value}")
    return value


def _check_index(name: str, index: int, count: int) -> None:
    if not 0 <= index < count:
        raise IndexError(f"{name}: must be from 0 to {count - 1}, got {index}")


def check_state(name: str, h) -> None:
    if h is not None and not isinstance(h, Tensor):
        raise TypeError(f"{name}: must be a tensor, got {type(h).__name__}")
    if h is not None and h.is_complex():
        raise TypeError(
            f"{name}: must be planar real, got {h.dtype}; convert with "
            "torch.cat((h.real, h.imag), -1)"
        )


def check_features(name: str, x: Tensor, size: int, weight: Tensor) -> None:
    if x.is_complex():
        raise TypeError(
            f"{name}: must be real, got {x.dtype}; convert with torch.cat((x.real, x.imag), -1) "
            "and double input_size"
        )
    if x.shape[-1] != size:
        raise ValueError(f"{name}: the last dimension must be input_size={size}, got {x.shape[-1]}")
    if x.device != weight.device:
        raise ValueError(f"{name}: is on {x.device} but the parameters are on {weight.device}")
    if x.dtype != weight.dtype and not (
        x.is_floating_point() and torch.is_autocast_enabled(x.device.type)
    ):
        raise TypeError(f"{name}: must be {weight.dtype} like the parameters, got {x.dtype}")


def _check_embedding(tokens: Tensor, embedding: Tensor, size: int, weight: Tensor) -> None:
    if not isinstance(embedding, Tensor):
        raise TypeError(f"embedding: must be a tensor, got {type(embedding).__name__}")
    if embedding.dim() != 2:
        raise ValueError(
            f"embedding: must be (V, input_size), one row per token, got shape "
            f"{tuple(embedding.shape)}"
        )
    check_features("embedding", embedding, size, weight)
    if tokens.dtype != torch.int64:
        raise TypeError(f"input: must be int64 tokens with an embedding, got {tokens.dtype}")
    if tokens.device != weight.device:
        raise ValueError(f"input: is on {tokens.device} but the parameters are on {weight.device}")


def in_chunks(module: nn.Module, run, steps: int, x: Tensor, state, reset=None, lengths=None):
    """`output, state = run(x, state, reset, lengths)`, `steps` time steps of x `(T, …)` at a time.

    The backward computes each chunk again, from its x, the state before it and the weights of the
    module: nothing else is kept. With `steps` 0, and where torch.func refuses hooks on what is
    kept, there is one chunk and everything is kept. `output` may be None.
    """
    if not 0 < steps < x.shape[0] or why_not_op() is not None:
        return run(x, state, reset, lengths)
    if reset is not None:
        check_shape("reset", reset, (x.shape[1], x.shape[0]), "(B, T)")
    # what torch.func.functional_call lends to the forward pass is gone in the backward
    lent = {n: p for n, p in module.named_parameters() if not isinstance(p, nn.Parameter)}

    def chunk(*args):
        with _reparametrize_module(module, lent):
            return run(*args)

    outputs = []
    for i, piece in enumerate(x.split(steps)):
        start, count = i * steps, piece.shape[0]
        cut = None if reset is None else reset[:, start : start + count]
        remaining = None if lengths is None else (lengths - start).clamp(0, count)
        output, state = checkpoint(chunk, piece, state, cut, remaining, use_reentrant=False)
        outputs.append(output)
    return None if outputs[0] is None else torch.cat(outputs), state


def _reversal(time: int, lengths: Tensor) -> Tensor:
    """Places `(T·B,)` in `x (T, B, …)` that reverse each row within its length."""
    t = torch.arange(time, device=lengths.device)[:, None]
    reverse = torch.where(t < lengths, lengths - 1 - t, t)
    return (reverse * len(lengths) + torch.arange(len(lengths), device=lengths.device)).flatten()


def _reversed(x: Tensor, places: Tensor | None) -> Tensor:
    """`x (T, B, …)` with each row's time steps backwards, or where `places` says."""
    if places is None:
        return x.flip(0)
    return x.flatten(0, 1).index_select(0, places).view_as(x)


def _reverse_reset(reset: Tensor) -> Tensor:
    """Cuts of the reversed sequence: before the step that follows a document's first one."""
    cut = torch.zeros_like(reset)
    cut[:, 1:] = reset[:, 1:].flip(1)
    return cut
