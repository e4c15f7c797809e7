"""The language model that `train/lm.py` trains, and its baselines in the same residual frame.

    embedding -> num_layers × [ x += mixer(norm(x));  x += MLP(norm(x)) ] -> norm -> tied head

The mixer is a gated Kronecker recurrence `V (norm(KRU(x · sigmoid(I x))) · silu(G x))`, a Kronecker
LSTM, a minGRU or one of `torch.nn`'s LSTM, GRU and RNN with a projection, or causal attention over
a sliding window; in the blocks that `linear_attention` names it is gated linear attention. Each
carries its state from one call to the next, so the context of a recurrent model has no fixed
length, and `reset` cuts the state where a document starts.

`frame="plain"` is the network of the KRU paper instead: one-hot tokens -> recurrence -> linear.

B batch, T time, V vocab_size, D d_model, L num_layers. Inside, tensors are time-first `(T, B, D)`.
"""

import contextlib
import dataclasses
import math

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from kru_triton.layers.decoding import GraphedStep, why_not_graphed
from kru_triton.layers.recurrent import in_chunks
from kru_triton.lm.mixers import LinearAttentionMixer, Mixer, mixer_of
from kru_triton.lm.presets import MODELS, LanguageModelConfig
from kru_triton.unitarity import unitarity_penalty


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
        unknown = set(config.linear_attention) - set(range(config.num_layers))
        if unknown or (config.linear_attention and config.frame == "plain"):
            raise ValueError(
                f"linear_attention: must be blocks from 0 to {config.num_layers - 1} of the "
                f"residual frame, got {config.linear_attention} and frame={config.frame!r}"
            )
        self.config = config
        # while decoding, by shapes and dtypes of the inputs
        self.graphs: dict[tuple, GraphedStep] | None = None
        if config.frame == "plain":
            self.blocks = nn.ModuleList([_PlainBlock(config)])
            return
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        nn.init.normal_(self.embedding.weight, std=config.d_model**-0.5)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(_Block(config, k) for k in range(config.num_layers))
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
            head: False returns what the head reads, `(B, T, D)`, in place of logits.
            layers: return what `time_first` adds to its list as well.

        Returns:
            logits `(B, T, V)` and a list of tensors, each with B as its first dimension; with
            `layers` these behind them, each `(B, T, D)`.
        """
        read: list[Tensor] | None = [] if layers else None
        x, state = self.time_first(tokens, state, reset, read)
        if head and self.config.frame == "residual":  # the only block of a plain one has the head
            x = nnf.linear(x, self._rows(tokens.device))
        return x.transpose(0, 1), state, *(read or ())

    def _rows(self, device: torch.device) -> Tensor:
        """The embedding `(V, D)`: its weight, or all rows as a call returns them, where something
        around it adds to its weight or keeps it elsewhere."""
        if isinstance(self.embedding, nn.Embedding):
            weight = self.embedding.weight
            if not weight.is_meta and not is_traceable_wrapper_subclass(weight):  # a DTensor is one
                return weight
        return self.embedding(torch.arange(self.config.vocab_size, device=device))

    def time_first(
        self,
        tokens: Tensor,
        state: list[Tensor] | None = None,
        reset: Tensor | None = None,
        layers: list[Tensor] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """What the head reads, `(T, B, D)` (the logits of a plain frame, whose block has the head),
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
        """As `time_first`, of checked arguments."""
        steps = self.config.recompute
        if self.config.frame == "plain":
            x = nnf.one_hot(tokens.t(), self.config.vocab_size).to(self.blocks[0].bias.dtype)
            x, state = in_chunks(self, self._run_blocks, steps, x, state, reset)
            return x, state
        embedded = tokens.is_floating_point()
        x = tokens.transpose(0, 1) if embedded else self.embedding(tokens.t())
        x = self.dropout(x * math.sqrt(self.config.d_model))
        if layers is None:
            x, state = in_chunks(self, self._run_blocks, steps, x, state, reset)
        else:
            x, state = self._run_blocks(x, state, reset, layers=layers)
        return self.norm(x), state

    def _run_blocks(
        self, x: Tensor, state, reset, lengths=None, layers: list[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """All blocks on `x (T, B, D)`."""
        new_state: list[Tensor] = []
        if layers is not None:
            x = _added_to(layers, x)
        for block in self.blocks:
            before = None
            if state is not None:
                before = state[len(new_state) : len(new_state) + block.mixer.num_states]
            x, after = block(x, before, reset)
            new_state += after
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
                before, reset = list(others[: len(state)]), others[len(state) :]
                x, new = self._hidden(tokens, before, reset[0] if reset else None)
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
        graphed = why_not_graphed(self) is None and self.why_not_triton() is None
        self.graphs = {} if graphed else None
        with contextlib.ExitStack() as stack:
            stack.callback(setattr, self, "graphs", None)
            for mixer in self.mixers():
                stack.enter_context(mixer.decoding())
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
        groups: dict[str, list[nn.Parameter]] = {
            name: [] for name in ("factors", "embeddings", "matrices", "vectors")
        }
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
        ends: tuple[str, ...] = ()
        if self.config.frame == "plain":
            ends = ("weight_ih_l0", "weight_gate_l0", "projection.weight")
        return name == "embedding.weight" or name.endswith(ends)

    def backend_report(self) -> str:
        """One line: what runs the time loop on the model's device, and why."""
        reason, op = self.why_not_triton(), self._timed().op
        if op is None:
            return f"{self.config.model}: torch.nn"
        return f"{op}: triton" if reason is None else f"{op}: torch backend, because {reason}"

    def mixers(self) -> list[Mixer]:
        """The mixers of all blocks, whatever stands around them."""
        return [module for module in self.modules() if isinstance(module, Mixer)]

    def why_not_triton(self) -> str | None:
        """Why no kernel runs the time loop on the model's device; None: one does."""
        return self._timed().why_not_triton()

    def _timed(self) -> Mixer:
        """A mixer with the time loop that the model is named after; any where none has one."""
        mixers = self.mixers()
        return next((m for m in mixers if not isinstance(m, LinearAttentionMixer)), mixers[0])


def _added_to(layers: list[Tensor], x: Tensor) -> Tensor:
    """`x (T, B, D)`, seen through the `(B, T, D)` that is added: that has a gradient then."""
    layers.append(x.transpose(0, 1))
    return layers[-1].transpose(0, 1)


def _is_recurrent(name: str) -> bool:
    return ".factor" in name or "weight_hh" in name


class _Block(nn.Module):
    """x += mixer(norm(x)); x += MLP(norm(x))."""

    def __init__(self, config: LanguageModelConfig, place: int = 0):
        super().__init__()
        d = config.d_model
        inner = max(1, round(config.mlp_ratio * d))
        self.mixer_norm = nn.LayerNorm(d, bias=False)
        self.mixer = mixer_of(config, place)
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
        plain = dataclasses.replace(
            config, d_model=config.vocab_size, gated=False, input_gated=False, token_shift=False
        )
        self.mixer = mixer_of(plain)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        for name, p in self.mixer.named_parameters():
            if name.endswith("weight_ih_l0"):
                nn.init.normal_(p, std=0.5)  # a single row of it is read at a time

    def forward(self, x: Tensor, state, reset) -> tuple[Tensor, list[Tensor]]:
        y, state = self.mixer(x, state, reset)
        return y + self.bias, state


def match_parameters(config: LanguageModelConfig, count: int) -> LanguageModelConfig:
    """The config of nearly `count` parameters: d_model is scaled, and a baseline's hidden_size.

    A Kronecker model keeps its hidden_size and factors: width hardly costs it recurrent parameters.

    Raises:
        ValueError: no d_model up to 8192 comes within 10 % of `count`.
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
