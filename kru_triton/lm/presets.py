"""Sizes and choices of a language model, and the named ones."""

from dataclasses import dataclass
from typing import Literal, get_args

from kru_triton.nonlinearity import Nonlinearity
from kru_triton.ops.arguments import Backend, Precision

Model = Literal["kru", "krulstm", "lstm", "gru", "rnn", "mingru", "transformer"]
MODELS: tuple[str, ...] = get_args(Model)


@dataclass(frozen=True)
class LanguageModelConfig:
    """Every size and choice of a `LanguageModel`; plain values, so it can be stored as JSON."""

    vocab_size: int = 257
    model: Model = "kru"
    frame: Literal["residual", "plain"] = "residual"  # plain: one layer, no embedding, norm or MLP
    d_model: int = 128
    num_layers: int = 2
    hidden_size: int = 256  # units per recurrent layer (complex ones for a complex KRU)
    mlp_ratio: float = 2.0
    dropout: float = 0.0
    factors: tuple[int, ...] | None = None  # Kronecker models: sizes of square factors; None: two
    num_heads: int = 1  # Kronecker models: independent blocks; transformer: attention heads
    field: Literal["complex", "real"] = "complex"
    nonlinearity: Nonlinearity = "modrelu"
    radius: float = 0.9  # KRU: the recurrent matrix starts as this times a unitary one
    time_parallel: bool = False  # KRU without nonlinearity: blocks of time side by side
    state_gate: Literal["none", "sigmoid", "rotation", "modtanh"] = "none"  # KRU: as there
    gated: bool = True  # KRU: multiply the state by silu(G x) before the projection
    input_gated: bool = True  # KRU: multiply the input by sigmoid(I x) before the recurrence
    token_shift: bool = True  # KRU: mix every input with the one before, by a share per channel
    linear_attention: tuple[int, ...] = ()  # blocks, from 0, that have it in place of the model's
    context_length: int = 256  # transformer: how many earlier positions are attended to
    recompute: int = 0  # run the blocks in chunks of so many steps, again in the backward; 0: whole
    backend: Backend = "auto"
    precision: Precision = "auto"


def lookup_blocks(num_layers: int) -> tuple[int, ...]:
    """The blocks, from 0, of linear attention in a preset of so many: the last of up to three, the
    second of every three of more; never the first.

    Example:
        >>> lookup_blocks(3), lookup_blocks(6)
        ((2,), (1, 4))
    """
    if num_layers > 3:
        return tuple(range(1, num_layers, 3))
    return (num_layers - 1,) if num_layers > 1 else ()


# "identity", and linear attention in one block of three, predicted text best from 0.1 to 4 million
# parameters, and a forget gate from 0.1 to 1 million; base and large go on from there. In the last
# of three blocks linear attention is better than in the second at 0.1 million parameters, level at
# 1 million; of six blocks, at 4 million, the last ones were worse. tiny has two blocks for three:
# what they learn less of a token they make up for in time (a GRU learns more there). An identity is
# linear in the state: no such model keeps a parity at every length, where a gate is never negative
# (train/tasks/state_tracking.py).
PRESETS = {
    "tiny": LanguageModelConfig(
        d_model=136,
        num_layers=2,
        hidden_size=144,
        num_heads=4,
        nonlinearity="identity",
        state_gate="sigmoid",
        linear_attention=lookup_blocks(2),
    ),
    "small": LanguageModelConfig(
        d_model=144,
        num_layers=3,
        hidden_size=256,
        num_heads=4,
        nonlinearity="identity",
        state_gate="sigmoid",
        linear_attention=lookup_blocks(3),
    ),
    "base": LanguageModelConfig(
        d_model=608,
        num_layers=6,
        hidden_size=1024,
        num_heads=4,
        nonlinearity="identity",
        state_gate="sigmoid",
        linear_attention=lookup_blocks(6),
    ),
    "ptb": LanguageModelConfig(
        frame="plain",
        num_layers=1,
        hidden_size=411,
        factors=(3, 137),
        nonlinearity="relu",
        radius=1.0,
    ),
    "large": LanguageModelConfig(
        d_model=1216,
        num_layers=12,
        hidden_size=2048,
        num_heads=8,
        nonlinearity="identity",
        state_gate="sigmoid",
        linear_attention=lookup_blocks(12),
    ),
}
