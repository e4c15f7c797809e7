"""The language model that `train/lm.py` trains, and its baselines in the same residual frame.

    embedding -> num_layers × [ x += mixer(norm(x));  x += MLP(norm(x)) ] -> norm -> tied head

The mixer is a gated Kronecker recurrence `V (norm(KRU(x · sigmoid(I x))) · silu(G x))`, a Kronecker
LSTM, a minGRU or one of `torch.nn`'s LSTM, GRU and RNN with a projection, or causal attention over
a sliding window. Each carries its state from one call to the next, so the context of a recurrent
model has no fixed length, and `reset` cuts the state where a document starts.

`frame="plain"` is the network of the KRU paper instead: one-hot tokens -> recurrence -> linear.

B batch, T time, V vocab_size, D d_model, L num_layers. Inside, tensors are time-first `(T, B, D)`.
"""

import contextlib
import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from kru_triton.layers.decoding import GraphedStep, why_not_graphed
from kru_triton.layers.kru import KRU
from kru_triton.layers.lstm import KRULSTM
from kru_triton.layers.mingru import MinGRU
from kru_triton.layers.recurrent import RecurrentLayers, in_chunks
from kru_triton.unitarity import unitarity_penalty

MODELS = ("kru", "krulstm", "lstm", "gru", "rnn", "mingru", "transformer")


@dataclass(frozen=True)
class LanguageModelConfig:
    """Every size and choice of a `LanguageModel`; plain values, so it can be stored as JSON."""

    vocab_size: int = 257
    model: Literal["kru", "krulstm", "lstm", "gru", "rnn", "mingru", "transformer"] = "kru"
    frame: Literal["residual", "plain"] = "residual"  # plain: one layer, no embedding, norm or MLP
    d_model: int = 128
    num_layers: int = 2
    hidden_size: int = 256  # units per recurrent layer (complex ones for a complex KRU)
    mlp_ratio: float = 2.0
    dropout: float = 0.0
    factors: tuple[int, ...] | None = None  # Kronecker models: sizes of square factors; None: two
    num_heads: int = 1  # Kronecker models: independent blocks; transformer: attention heads
    field: Literal["complex", "real"] = "complex"
    nonlinearity: Literal["modrelu", "modtanh", "tanh", "relu", "identity"] = "modrelu"
    radius: float = 0.9  # KRU: the recurrent matrix starts as this times a unitary one
    time_parallel: bool = False  # KRU without nonlinearity: blocks of time side by side
    gated: bool = True  # KRU: multiply the state by silu(G x) before the projection
    input_gated: bool = True  # KRU: multiply the input by sigmoid(I x) before the recurrence
    token_shift: bool = True  # KRU: mix every input with the one before, by a share per channel
    context_length: int = 256  # transformer: how many earlier positions are attended to
    recompute: int = 0  # run the blocks in chunks of so many steps, again in the backward; 0: whole
    backend: Literal["auto", "triton", "torch"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"


class LanguageModel(nn.Module):
    """`logits, state = model(tokens, state=None, reset=None)`.

    Args:
        config: sizes and choices.

    Raises:
        ValueError, TypeError: sizes that do not fit, with a proposal.

    Example:
        >>> model = LanguageModel(LanguageModelConfig(d_model=16, hidden_size=16))
        >>> logits, state = model(torch.randint(257, (2, 5)))
        >>> logits.shape
        torch.Size([2, 5, 257])
    """

    def __init__(self, config: LanguageModelConfig):
        super().__init__()
        for name in ("vocab_size", "d_model", "num_layers", "context_length"):
            if getattr(config, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(config, name)}")
        if config.recompute < 0:
            raise ValueError(
                f"recompute: must be a number of steps, or 0 for none, got {config.recompute}"
            )
        if config.model not in MODELS:
            raise ValueError(
                f"model: must be one of {', '.join(map(repr, MODELS))}, got {config.model!r}"
            )
        self.config = config
        self.graphs = None  # while decoding, by shapes and dtypes of the inputs
        if config.frame == "plain":
            self.blocks = nn.ModuleList([_PlainBlock(config)])
            return
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        nn.init.normal_(self.embedding.weight, std=config.d_model**-0.5)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.d_model, bias=False)

    def forward(
        self,
        tokens: Tensor,
        state: list[Tensor] | None = None,
        reset: Tensor | None = None,
        *,
        head: bool = True,
        layers: bool = False,
    ) -> tuple[Tensor, list[Tensor], *tuple[Tensor, ...]]:
        """Next-token logits, and the state after the last token.

        Args:
            tokens: `(B, T)` int64.
            state: what the last call returned (detach it between training steps); None: zeros.
            reset: `(B, T)` bool, True where a document starts.
            head: False returns what the head reads, as `hidden` does, in place of logits.
            layers: return what `hidden` adds to its list as well.

        Returns:
            logits `(B, T, V)` and a list of tensors, each with B as its first dimension; with
            `layers` these behind them, each `(B, T, D)`.
        """
        found = [] if layers else None
        x, state = self.hidden(tokens, state, reset, found)
        if head and self.config.frame == "residual":  # the only block of a plain one has the head
            x = nnf.linear(x.transpose(0, 1), self._rows(tokens.device)).transpose(0, 1)
        return x, state, *(found or ())

    def _rows(self, device: torch.device) -> Tensor:
        """The embedding `(V, D)`: its weight, or all rows as a call returns them, where something
        around it adds to its weight or keeps it elsewhere."""
        if isinstance(self.embedding, nn.Embedding):
            weight = self.embedding.weight
            if not weight.is_meta and not is_traceable_wrapper_subclass(weight):  # a DTensor is one
                return weight
        return self.embedding(torch.arange(self.config.vocab_size, device=device))

    def hidden(
        self,
        tokens: Tensor,
        state: list[Tensor] | None = None,
        reset: Tensor | None = None,
        layers: list[Tensor] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """What the head reads, `(B, T, D)` (the logits of a plain frame, whose block has the head),
        and the state.

        Args:
            tokens: as for `forward`, or rows of the embedding in their place, `(B, T, D)`.
            state, reset: as for `forward`.
            layers: a list that what the first block reads and what each block returns is added to,
                `(B, T, D)` each; nothing is recomputed then. A plain frame adds nothing.
        """
        embedded = tokens.is_floating_point() and self.config.frame == "residual"
        if tokens.dim() != 2 + embedded:
            rule = "(B, T, D), rows of the embedding, if not integers" if embedded else "(B, T)"
            raise ValueError(f"tokens: must be {rule}, got shape {tuple(tokens.shape)}")
        states = sum(block.mixer.num_states for block in self.blocks)
        if state is not None and len(state) != states:
            raise ValueError(f"state: expected {states} tensors, got {len(state)}")
        if layers is None and self._has_graphs_for(tokens, state):
            return self._graphed_step(tokens, state, reset)
        return self._hidden(tokens, state, reset, layers)

    def _hidden(self, tokens, state, reset, layers=None) -> tuple[Tensor, list[Tensor]]:
        """As `hidden`, of checked arguments."""
        steps = self.config.recompute
        if self.config.frame == "plain":
            x = nnf.one_hot(tokens.t(), self.config.vocab_size).to(self.blocks[0].bias.dtype)
            x, state = in_chunks(self, self._run_blocks, steps, x, state, reset)
            return x.transpose(0, 1), state
        embedded = tokens.is_floating_point()
        x = tokens.transpose(0, 1) if embedded else self.embedding(tokens.t())
        x = self.dropout(x * math.sqrt(self.config.d_model))
        if layers is None:
            x, state = in_chunks(self, self._run_blocks, steps, x, state, reset)
        else:
            x, state = self._run_blocks(x, state, reset, layers=layers)
        return self.norm(x).transpose(0, 1), state

    def _run_blocks(
        self, x: Tensor, state, reset, lengths=None, layers: list[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """All blocks on `x (T, B, D)`."""
        new_state = []
        if layers is not None:
            x = _added_to(layers, x)
        for block in self.blocks:
            own = None
            if state is not None:
                own = state[len(new_state) : len(new_state) + block.mixer.num_states]
            x, out = block(x, own, reset)
            new_state += out
            if layers is not None:
                x = _added_to(layers, x)
        return x, new_state

    def _has_graphs_for(self, tokens: Tensor, state: list[Tensor] | None) -> bool:
        """Whether a CUDA graph can stand for the launches of these tokens `(B, T)`."""
        return (
            self.graphs is not None
            and tokens.dim() == 2
            and tokens.shape[1] == 1
            and state is not None
            and not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling())
        )

    def _graphed_step(
        self, tokens: Tensor, state: list[Tensor], reset: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """`_hidden` of one token a row by a graph, captured where it is the first of its kind."""
        inputs = [tokens, *state] if reset is None else [tokens, *state, reset]
        autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        key = (autocast, *((x.shape, x.dtype) for x in inputs))
        if key not in self.graphs:

            def step(tokens, *others):
                own, reset = list(others[: len(state)]), others[len(state) :]
                x, new = self._hidden(tokens, own, reset[0] if reset else None)
                return [x, *new]

            self.graphs[key] = GraphedStep(step, *inputs)
        x, *state = self.graphs[key](*inputs)
        return x, state

    @contextlib.contextmanager
    def decoding(self):
        """Inside, single steps are fast, on the promise that no weight changes meanwhile.

        On a CPU a Kronecker layer prepares its matrices once; on a GPU all launches of a step of a
        Kronecker model are one CUDA graph, if a step is nothing but launches: without hooks, and
        with its weights in place.

        Example:
            >>> model = LanguageModel(LanguageModelConfig(d_model=16, hidden_size=16)).eval()
            >>> with torch.no_grad(), model.decoding():
            ...     _, state = model(torch.tensor([[1, 2, 3]]))  # the prompt
            ...     logits, state = model(torch.tensor([[4]]), state)
        """
        graphed = why_not_graphed(self) is None and self._why_not_triton() is None
        self.graphs = {} if graphed else None
        with contextlib.ExitStack() as stack:
            stack.callback(setattr, self, "graphs", None)
            for layers in self._recurrences():
                stack.enter_context(layers.decoding())
            yield

    @property
    def num_parameters(self) -> int:
        """All trainable numbers; the tied head counts once."""
        return sum(p.numel() for p in self.parameters())

    @property
    def num_recurrent_parameters(self) -> int:
        """The numbers of the state-to-state matrices alone (0 for a transformer)."""
        return sum(p.numel() for name, p in self.named_parameters() if _is_recurrent(name))

    def unitarity_penalty(self) -> Tensor:
        """Σ ‖WᴴW − I‖²_F over all Kronecker factors; zero for the baselines."""
        return unitarity_penalty(self)

    def parameter_groups(self, lr: float, recurrent_lr: float, weight_decay: float) -> list[dict]:
        """Groups for optimizers: Kronecker factors at their own rate, decay on what is 2-D.

        `embeddings` have a row or a column for each token: embedding and head, and in a plain frame
        the input weights. The `matrices` between them are what Muon is for. They are taken as they
        stand: the gates of nn.LSTM, query, key and value, or the real and imaginary parts of a
        KRU's input weights, one above the other, are one matrix.
        """
        groups = {name: [] for name in ("factors", "embeddings", "matrices", "vectors")}
        for name, p in self.named_parameters():
            kind = "factors" if ".factor" in name else "matrices" if p.dim() > 1 else "vectors"
            if kind == "matrices" and self._is_embedding(name):
                kind = "embeddings"
            groups[kind].append(p)
        return [
            {
                "name": name,
                "params": params,
                "lr": recurrent_lr if name == "factors" else lr,
                "weight_decay": weight_decay if name in ("embeddings", "matrices") else 0.0,
            }
            for name, params in groups.items()
            if params
        ]

    def _is_embedding(self, name: str) -> bool:
        """Whether the matrix of this name has a row or a column for each token."""
        ends = ("weight_ih_l0", "projection.weight") if self.config.frame == "plain" else ()
        return name == "embedding.weight" or name.endswith(ends)

    def backend_report(self) -> str:
        """One line: what runs the time loop on the model's device, and why."""
        reason = self._why_not_triton()
        op = {"kru": "kru_scan", "krulstm": "kru_lstm_scan"}.get(self.config.model)
        if op is None:
            return f"{self.config.model}: torch.nn"
        return f"{op}: triton" if reason is None else f"{op}: torch backend, because {reason}"

    def _recurrences(self) -> list[RecurrentLayers]:
        """The Kronecker layers themselves, whatever stands around them."""
        return [module for module in self.modules() if isinstance(module, RecurrentLayers)]

    def _why_not_triton(self) -> str | None:
        """Why no kernel runs the time loop on the model's device; None: one does."""
        for layers in self._recurrences():
            return layers.why_not_triton()
        return "its layers are torch.nn's"


def _added_to(layers: list[Tensor], x: Tensor) -> Tensor:
    """`x (T, B, D)`, seen through the `(B, T, D)` that is added: that has a gradient then."""
    layers.append(x.transpose(0, 1))
    return layers[-1].transpose(0, 1)


def _is_recurrent(name: str) -> bool:
    return ".factor" in name or "weight_hh" in name


class _Block(nn.Module):
    """x += mixer(norm(x)); x += MLP(norm(x))."""

    def __init__(self, config: LanguageModelConfig):
        super().__init__()
        d = config.d_model
        inner = max(1, round(config.mlp_ratio * d))
        self.mixer_norm = nn.LayerNorm(d, bias=False)
        self.mixer = _mixer(config)
        self.mlp_norm = nn.LayerNorm(d, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(d, inner), nn.GELU(approximate="tanh"), nn.Linear(inner, d)
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, state, reset) -> tuple[Tensor, list[Tensor]]:
        y, state = self.mixer(self.mixer_norm(x), state, reset)
        x = x + self.dropout(y)
        return x + self.dropout(self.mlp(self.mlp_norm(x))), state


class _PlainBlock(nn.Module):
    """mixer(x) + c on one-hot x; the mixer's projection is the readout."""

    def __init__(self, config: LanguageModelConfig):
        super().__init__()
        if config.model == "transformer" or config.num_layers != 1:
            raise ValueError(
                f"frame: 'plain' is one recurrent layer, got model={config.model!r} and "
                f"num_layers={config.num_layers}"
            )
        sizes = {"d_model": config.vocab_size, "gated": False}
        sizes |= {"input_gated": False, "token_shift": False}
        self.mixer = _mixer(dataclasses.replace(config, **sizes))
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        for name, p in self.mixer.named_parameters():
            if name.endswith("weight_ih_l0"):
                nn.init.normal_(p, std=0.5)  # a single row of it is read at a time

    def forward(self, x: Tensor, state, reset) -> tuple[Tensor, list[Tensor]]:
        y, state = self.mixer(x, state, reset)
        return y + self.bias, state


def _mixer(config: LanguageModelConfig) -> nn.Module:
    kinds = {
        "kru": _KRUMixer,
        "krulstm": _KRULSTMMixer,
        "mingru": _MinGRUMixer,
        "transformer": _AttentionMixer,
    }
    return kinds.get(config.model, _RNNMixer)(config)


class _KRUMixer(nn.Module):
    """V (norm(KRU(x · sigmoid(I x))) · silu(G x)), where x_t may be mixed with x_{t-1}."""

    def __init__(self, config: LanguageModelConfig):
        super().__init__()
        self.kru = KRU(
            config.d_model,
            config.hidden_size,
            factors=config.factors,
            num_heads=config.num_heads,
            field=config.field,
            nonlinearity=config.nonlinearity,
            time_parallel=config.time_parallel,
            backend=config.backend,
            precision=config.precision,
        )
        factors = self.kru.recurrent_factors(0)
        with torch.no_grad():
            for w in factors:
                w.mul_(config.radius ** (1 / len(factors)))
        features = self.kru.output_size
        plain = config.frame == "plain"
        self.norm = nn.Identity() if plain else nn.LayerNorm(features, bias=False)
        self.gate = nn.Linear(config.d_model, features) if config.gated else None
        d = config.d_model
        self.input_gate = nn.Linear(d, d) if config.input_gated else None
        self.shift = nn.Parameter(torch.empty(d)) if config.token_shift else None
        self.num_states = 1 if self.shift is None else 2  # h_n, and the last x
        self.reset_parameters()
        self.projection = nn.Linear(features, config.d_model, bias=False)

    def reset_parameters(self) -> None:
        """Start without a share of the token before; the layers draw their own weights."""
        if self.shift is not None:
            nn.init.zeros_(self.shift)

    def forward(self, x: Tensor, state, reset) -> tuple[Tensor, list[Tensor]]:
        last = []
        if self.shift is not None:
            x, *last = self._shifted(x, None if state is None else state[1], reset)
        read = x if self.input_gate is None else x * self.input_gate(x).sigmoid()
        h, h_n = self.kru(read, None if state is None else state[0][None], reset=reset)
        h = self.norm(h)
        if self.gate is not None:
            gate = nnf.silu(self.gate(x))
            h = h.to(gate.dtype) * gate  # under autocast the norm leaves float32
        return self.projection(h), [h_n[0], *last]

    def _shifted(
        self, x: Tensor, last: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """x_t + s · (x_{t-1} − x_t), with zeros for the x before the first of a document; and the
        last x, in memory of its own: a state must not hold the sequence that it has seen."""
        first = x.new_zeros(1, *x.shape[1:]) if last is None else last[None].to(x.dtype)
        seen = torch.cat((first, x))
        before = seen[:-1]
        if reset is not None:
            before = before.masked_fill(reset.t()[..., None], 0)
        return x + self.shift.to(x.dtype) * (before - x), seen[-1].clone()


class _KRULSTMMixer(nn.Module):
    """A projected Kronecker LSTM."""

    num_states = 2

    def __init__(self, config: LanguageModelConfig):
        super().__init__()
        self.lstm = KRULSTM(
            config.d_model,
            config.hidden_size,
            factors=config.factors,
            num_heads=config.num_heads,
            backend=config.backend,
            precision=config.precision,
        )
        self.projection = nn.Linear(config.hidden_size, config.d_model, bias=False)

    def forward(self, x: Tensor, state, reset) -> tuple[Tensor, list[Tensor]]:
        hx = None if state is None else tuple(s[None] for s in state)
        h, last = self.lstm(x, hx, reset=reset)
        return self.projection(h), [s[0] for s in last]


class _RNNMixer(nn.Module):
    """A projected `torch.nn` LSTM, GRU or RNN; a reset splits the sequence where it falls."""

    def __init__(self, config: LanguageModelConfig):
        super().__init__()
        kind = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[config.model]
        self.rnn = kind(config.d_model, config.hidden_size)
        self.projection = nn.Linear(config.hidden_size, config.d_model, bias=False)
        self.num_states = 2 if config.model == "lstm" else 1

    def forward(self, x: Tensor, state, reset) -> tuple[Tensor, list[Tensor]]:
        time, batch = x.shape[:2]
        if state is None:
            state = [x.new_zeros(batch, self.rnn.hidden_size) for _ in range(self.num_states)]
        cuts = [] if reset is None else reset.any(0).nonzero().flatten().tolist()
        outputs = []
        bounds = [0, *(t for t in cuts if t), time]
        for start, end in itertools.pairwise(bounds):
            if start in cuts:
                state = [s.masked_fill(reset[:, start, None], 0) for s in state]
            hidden = [s[None].contiguous() for s in state]
            hidden = tuple(hidden) if self.num_states == 2 else hidden[0]
            y, hidden = self.rnn(x[start:end], hidden)
            state = [s[0] for s in (hidden if self.num_states == 2 else (hidden,))]
            outputs.append(y)
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return self.projection(y), state


class _MinGRUMixer(nn.Module):
    """A projected minGRU."""

    num_states = 1

    def __init__(self, config: LanguageModelConfig):
        super().__init__()
        self.rnn = MinGRU(config.d_model, config.hidden_size)
        self.projection = nn.Linear(config.hidden_size, config.d_model, bias=False)

    def forward(self, x: Tensor, state, reset) -> tuple[Tensor, list[Tensor]]:
        h, h_n = self.rnn(x, None if state is None else state[0][None], reset)
        return self.projection(h), [h_n[0]]


class _AttentionMixer(nn.Module):
    """Causal attention within a document over the last `context_length` positions.

    The state holds those positions' keys and values (before the rotary embedding) and, per
    position, how many document starts lie between it and the end of what was read so far.
    """

    num_states = 3

    def __init__(self, config: LanguageModelConfig):
        super().__init__()
        d, heads = config.d_model, config.num_heads
        if d % heads or d // heads % 2:
            raise ValueError(
                f"num_heads: must divide d_model into even parts, got num_heads={heads} and "
                f"d_model={d}"
            )
        self.heads, self.context = heads, config.context_length
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.projection = nn.Linear(d, d, bias=False)

    def forward(self, x: Tensor, state, reset) -> tuple[Tensor, list[Tensor]]:
        time, batch, d = x.shape
        q, k, v = self.qkv(x).view(time, batch, 3, self.heads, -1).permute(2, 1, 3, 0, 4)
        starts = x.new_zeros(batch, time, dtype=torch.int64) if reset is None else reset.long()
        document = starts.cumsum(1)
        if state is not None:
            k, v = torch.cat((state[0], k), 2), torch.cat((state[1], v), 2)
            document = torch.cat((-state[2], document), 1)
        total = k.shape[2]
        key, query = (
            torch.arange(total, device=x.device),
            torch.arange(total - time, total, device=x.device),
        )
        q, keys = _rotate(q, query), _rotate(k, key)
        if state is None and reset is None and time <= self.context + 1:
            y = nnf.scaled_dot_product_attention(q, keys, v, is_causal=True)  # the fused kernel
        else:
            distance = query[:, None] - key
            visible = (distance >= 0) & (distance <= self.context)
            visible = visible & (document[:, -time:, None] == document[:, None, :])
            y = nnf.scaled_dot_product_attention(q, keys, v, attn_mask=visible[:, None])
        y = y.permute(2, 0, 1, 3).reshape(time, batch, d)
        kept = slice(max(0, total - self.context), None)
        age = document[:, -1:] - document[:, kept]
        return self.projection(y), [k[:, :, kept], v[:, :, kept], age]


def _rotate(x: Tensor, position: Tensor) -> Tensor:
    """Rotary position embedding (Su et al., 2021) of `x (B, H, T, E)` at `position (T,)`."""
    half = x.shape[-1] // 2
    frequency = 10000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = position[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


def match_parameters(config: LanguageModelConfig, count: int) -> LanguageModelConfig:
    """The config of nearly `count` parameters: d_model is scaled, and a baseline's hidden_size.

    A Kronecker model keeps its hidden_size and factors: width hardly costs it recurrent parameters.

    Raises:
        ValueError: no d_model from 8 to 8192 comes within 10 % of `count`.
    """
    ratio = config.hidden_size / config.d_model
    unit = 2 * config.num_heads if config.model == "transformer" else 2

    def scaled(d_model: int) -> LanguageModelConfig:
        kept = config.model in ("kru", "krulstm")
        hidden = config.hidden_size if kept else max(1, round(ratio * d_model))
        return dataclasses.replace(config, d_model=d_model, hidden_size=hidden)

    def parameters(d_model: int) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in LanguageModel(scaled(d_model)).parameters())

    low, high = 1, 8192 // unit
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if parameters(middle * unit) < count else (low, middle)
    best = min({max(1, low - 1), low}, key=lambda k: abs(parameters(k * unit) - count)) * unit
    if abs(parameters(best) - count) > 0.1 * count:
        raise ValueError(
            f"match_params: d_model={best} gives {parameters(best)} parameters, the nearest to "
            f"{count} that this {config.model} comes; change num_layers, hidden_size or vocab_size"
        )
    return scaled(best)


PRESETS = {
    "tiny": LanguageModelConfig(
        d_model=72, num_layers=3, hidden_size=192, num_heads=2, nonlinearity="identity"
    ),
    "small": LanguageModelConfig(
        d_model=144, num_layers=3, hidden_size=256, num_heads=4, nonlinearity="identity"
    ),
    "base": LanguageModelConfig(d_model=384, num_layers=6, hidden_size=2048, num_heads=8),
    "ptb": LanguageModelConfig(
        frame="plain",
        num_layers=1,
        hidden_size=411,
        factors=(3, 137),
        nonlinearity="relu",
        radius=1.0,
    ),
    "large": LanguageModelConfig(d_model=768, num_layers=12, hidden_size=4096, num_heads=16),
}
