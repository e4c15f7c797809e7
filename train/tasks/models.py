"""The models of the task scripts: a recurrence, or a baseline in its place, and a readout.

B batch, T time, D input features.
"""

import math
import sys

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal

from kru_triton import KRU, KRULSTM, unitary_
from kru_triton.layers.mingru import MinGRU
from kru_triton.lm.model import LanguageModelConfig, _Block
from kru_triton.train.tasks.settings import TaskConfig

RECURRENT_RATE_TIMES_LENGTH = 0.005  # of the automatic --recurrent-lr


class SequenceModel(nn.Module):
    """A recurrence from a zero state and a linear readout of its states.

    `(B, T, D)` -> `(B, T, output_size)`, or `(B, output_size)` of the last step.
    """

    def __init__(self, config: TaskConfig, input_size: int, output_size: int, last_only: bool):
        super().__init__()
        self.last_only = last_only
        self.recurrence = build_recurrence(config, input_size)
        features = getattr(self.recurrence, "output_size", config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.readout = nn.Linear(features, output_size)
        nn.init.normal_(self.readout.weight, std=features**-0.5)
        nn.init.zeros_(self.readout.bias)

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.recurrence(x.transpose(0, 1))
        h = self.dropout(h[-1] if self.last_only else h)
        y = self.readout(h)
        return y if self.last_only else y.transpose(0, 1)

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    @property
    def num_recurrent_parameters(self) -> int:
        """Real numbers in the matrices that multiply the state."""
        return sum(p.numel() for name, p in self.named_parameters() if is_recurrent(name))


def build_recurrence(config: TaskConfig, input_size: int) -> nn.Module:
    """The recurrent layers of `--model`, time first."""
    sizes = (input_size, config.hidden_size, config.num_layers)
    shared = {"dropout": config.dropout if config.num_layers > 1 else 0.0}
    if config.model == "transformer":
        return Transformer(config, input_size)
    baselines = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU, "mingru": MinGRU}
    if config.model in baselines:
        layers = baselines[config.model](*sizes, **shared)
        if config.chrono:
            remember_(layers, config.chrono)
        elif config.model == "lstm":  # forget gates start open, as in KRULSTM
            for name, p in layers.named_parameters():
                if name.startswith("bias_ih"):
                    nn.init.ones_(p.data[config.hidden_size : 2 * config.hidden_size])
        return layers
    shared |= {"backend": config.backend, "precision": config.precision}
    spreads = config.init_spread
    spreads = spreads * config.num_layers if len(spreads) == 1 else spreads
    kronecker = {"factors": config.factors or None, "num_heads": config.num_heads, **shared}
    if config.model == "krulstm":
        layers = KRULSTM(*sizes, **kronecker)
    elif config.model == "kru":
        options = {"field": config.field, "nonlinearity": config.nonlinearity}
        options["state_gate"] = config.state_gate
        layers = KRU(*sizes, **options, **kronecker)
        for layer, spread in enumerate(spreads):
            for w in layers.recurrent_factors(layer) if spread < 1 else ():
                unitary_(w, spread)
    else:
        field = "complex" if config.model == "unitary" else "real"
        dense = {"factors": (config.hidden_size,), "nonlinearity": config.nonlinearity}
        layers = KRU(*sizes, field=field, **dense, **shared)
        for layer, spread in enumerate(spreads):
            keep_unitary(layers, f"factor0_l{layer}", spread)
    if config.input_std and config.model != "krulstm":
        nn.init.normal_(layers.weight_ih_l0, std=config.input_std)
    if config.frozen_factors:
        for w in [w for factors in layers.recurrent_factors() for w in factors]:
            w.requires_grad_(False)
    return layers


@torch.no_grad()
def remember_(layers: nn.LSTM | nn.GRU, length: int) -> None:
    """Chrono initialization: gates that keep the state for 2 to `length` steps at first.

    The forget gate of an LSTM gets the bias log u, u uniform in (1, length - 1), and its input gate
    the opposite; the update gate of a GRU, which keeps the state where it is open, gets log u.
    (Tallec and Ollivier, *Can recurrent neural networks warp time?*, ICLR 2018.)
    """
    size = layers.hidden_size
    kept, written = slice(size, 2 * size), slice(size)  # in weights: i f g o, and r z n
    for layer in range(layers.num_layers):
        into, within = getattr(layers, f"bias_ih_l{layer}"), getattr(layers, f"bias_hh_l{layer}")
        bias = torch.empty(size).uniform_(1, length - 1).log()
        into[kept], within[kept] = bias, 0.0
        if isinstance(layers, nn.LSTM):
            into[written], within[written] = -bias, 0.0


class Transformer(nn.Module):
    """The blocks of the language model's transformer on `(T, B, D)`, behind a projection.

    Every position attends to all before it, by their distance (rotary), however far.
    """

    def __init__(self, config: TaskConfig, input_size: int):
        super().__init__()
        sizes = LanguageModelConfig(
            model="transformer",
            d_model=config.hidden_size,
            num_heads=config.num_heads,
            dropout=config.dropout,
            context_length=sys.maxsize,
        )
        self.projection = nn.Linear(input_size, config.hidden_size, bias=False)
        self.blocks = nn.ModuleList(_Block(sizes) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        x = self.projection(x)
        for block in self.blocks:
            x, _ = block(x, None, None)
        return self.norm(x), None


class _PlanarToComplex(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return torch.complex(*w) if len(w) == 2 else w[0]


class _ComplexToPlanar(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return torch.stack([w.real, w.imag]) if w.is_complex() else w[None]


def keep_unitary(layers: nn.Module, name: str, spread: float) -> None:
    """Make the dense factor `name` exp(A), A the skew-Hermitian part of a free planar real matrix.

    A's entries start so small that its eigenvalues fill (-πi, πi) times `spread`: those of exp(A)
    go round the unit circle about once for 1 (Wigner's semicircle of radius 2·sqrt(N)·std).
    """
    weight = getattr(layers, name)
    parts, size = weight.shape[0], weight.shape[-1]
    nn.init.normal_(weight, std=spread * math.pi / (2 * math.sqrt(parts * size)))
    parametrize.register_parametrization(layers, name, _PlanarToComplex(), unsafe=True)
    orthogonal(layers, name, orthogonal_map="matrix_exp", use_trivialization=False)
    parametrize.register_parametrization(layers, name, _ComplexToPlanar(), unsafe=True)


def is_recurrent(name: str) -> bool:
    return ".factor" in name or ".weight_hh" in name


def parameter_groups(model: SequenceModel, config: TaskConfig, length: int) -> list[dict]:
    """Two groups for Adam: what T steps repeat, without gates around it, at a rate of its own.

    Adam moves every number by about its rate per step. T steps of the recurrence multiply what that
    does to a factor and add up what it does to a modReLU's beta, so rate · T is 0.005 for both.
    (Copy memory at T = 1000: with beta at the rate of the rest, one seed of three lost all memory.)
    """
    ungated = config.model in ("kru", "unitary", "orthogonal")
    own = config.recurrent_lr or min(config.lr, RECURRENT_RATE_TIMES_LENGTH / length)
    groups = {own: [], config.lr: []} if ungated else {config.lr: []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            repeated = is_recurrent(name) or ".beta" in name
            groups[own if ungated and repeated else config.lr].append(p)
    return [{"params": params, "lr": rate} for rate, params in groups.items() if params]
