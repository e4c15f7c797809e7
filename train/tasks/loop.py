"""What the task scripts share: settings, models, and the loop from the first step to the summary.

    batch(step) -> model -> loss -> clip -> Adam          every training step
    validation  -> the best weights so far are kept       every --eval-every steps
    test of the best weights -> summary.json              at the end

A batch is a function of the seed and the step alone, so a checkpoint needs no data position: a
resumed run sees what a run that never stopped would have seen. An error leaves a checkpoint of the
last completed step. Exit codes as in lm.py: 0 done or stopped with a checkpoint, 1 that could not
be written, 2 bad arguments or data, 3 non-finite loss, 130 Ctrl-C before the loop.

B batch, T time, D input features, F features of a state.
"""

import argparse
import dataclasses
import hashlib
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal

from kru_triton import KRU, KRULSTM, diagnostics, unitarity_penalty, unitary_
from kru_triton.layers.mingru import MinGRU
from kru_triton.lm.model import LanguageModelConfig, _Block
from kru_triton.train.run import checkpoints
from kru_triton.train.run.device import pick_device
from kru_triton.train.run.directory import versions
from kru_triton.train.run.optimizers import (
    learning_rate_factor,
    load_optimizers,
    optimizer_tensors,
    set_learning_rates,
)
from kru_triton.train.run.run import NonFiniteError, Run, TrainState, is_due
from kru_triton.train.run.script import one_line
from kru_triton.train.run.settings import UserError, check_seed, read_toml

RECURRENT_RATE_TIMES_LENGTH = 0.005  # of the automatic --recurrent-lr


@dataclass
class TaskConfig:
    preset: str = ""
    """Named sizes and settings; every other flag overrides its part of the preset."""
    config: str = ""
    """Flat TOML file of settings, named like the flags: over the preset, under the flags."""
    model: Literal[
        "kru", "krulstm", "rnn", "lstm", "gru", "mingru", "unitary", "orthogonal", "transformer"
    ] = "kru"
    """The recurrence. unitary and orthogonal: one dense matrix, complex or real, that stays exactly
    unitary (torch's parametrization). transformer: blocks of causal attention and an MLP."""
    hidden_size: int = 128
    """Recurrent units per layer (complex ones for kru --field complex and for unitary), or width of
    the transformer."""
    num_layers: int = 1
    """Stacked recurrent layers."""
    factors: tuple[int, ...] = ()
    """Sizes of the square Kronecker factors of one head. Nothing: two balanced ones."""
    num_heads: int = 1
    """Independent recurrent blocks of kru and krulstm, attention heads of the transformer."""
    field: Literal["complex", "real"] = "complex"
    """Numbers the recurrence of kru works in."""
    nonlinearity: Literal["modrelu", "modtanh", "tanh", "relu", "identity"] = "modrelu"
    """Of kru, unitary and orthogonal."""
    frozen_factors: bool = False
    """Control: leave the recurrent matrices of kru or krulstm as they were drawn."""
    input_std: float = 0.0
    """Standard deviation of the initial input weights of kru, unitary, orthogonal. 0: 1/sqrt(D)."""
    init_spread: tuple[float, ...] = (1.0,)
    """Of kru, unitary, orthogonal: angles of the eigenvalues of the initial factors, as a share of
    the whole circle's; one for all layers, or one per layer. Near 0 a layer is an integrator."""
    dropout: float = 0.0
    """Between stacked layers and before the readout."""
    backend: Literal["auto", "triton", "torch"] = "auto"
    """Which implementation of the Kronecker recurrence runs."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the Triton kernels."""

    steps: int = 1000
    """Stop after this many steps. 0: no limit."""
    minutes: float = 0.0
    """Stop after this many minutes of training, resumed legs together. 0: no limit."""
    target: float = 0.0
    """Stop when the measure on the validation data is this good. 0: never."""
    patience: int = 0
    """Stop after this many evaluations in a row without a better one. 0: never."""
    batch_size: int = 32
    """Sequences per step."""
    lr: float = 3e-3
    """Peak learning rate of everything but the recurrent matrices of kru, unitary, orthogonal and
    the beta of their nonlinearity."""
    recurrent_lr: float = 0.0
    """Peak learning rate of those. 0: min(lr, 0.005 / T) for sequences of T steps."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """From the peak to --lr-floor over the budget. wsd: at the peak up to the last --decay-share of
    it, so that a run that is resumed before then with another budget is one of that budget."""
    decay_share: float = 0.2
    """The share of the budget in which wsd falls from the peak to the floor."""
    lr_floor: float = 0.05
    """The schedule ends at this share of the peak."""
    warmup: int = 0
    """Steps of linear warm-up."""
    clip: float = 1.0
    """Global gradient norm limit. 0: none."""
    unitarity_weight: float = 1e-3
    """Weight of the soft unitary penalty of kru, sum over factors of ||W^H W - I||^2."""
    seed: int = 0
    """Initial weights and data."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""

    run_dir: str = "runs/task"
    """Everything the run writes goes here."""
    resume: Literal["auto", "must", "never"] = "auto"
    """auto: go on if there is a good checkpoint. must: or fail. never: set old files aside."""
    checkpoint_every: int = 500
    """Steps between checkpoints; 0: none but the one at the end or on SIGTERM or SIGINT."""
    eval_every: int = 100
    """Steps between evaluations on the validation data; 0: none but the one at the end."""
    log_every: int = 20
    """Steps between rows of metrics.jsonl."""
    keep: int = 2
    """Checkpoints kept."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Weights & Biases. auto: as WANDB_MODE or WANDB_DISABLED says; else online with a key and a
    reachable host, else offline. W&B's other variables hold, too."""
    wandb_project: str = ""
    """Project there. Empty: WANDB_PROJECT, or kru_triton."""
    wandb_name: str = ""
    """Name of the run there. Empty: WANDB_NAME, or that of --run-dir."""
    pictures: bool = True
    """Write the diagnostics' pictures (unitarity, spectrum, gradient against lag) as PNG files."""


@dataclass
class Task:
    """A data set and what is measured on it.

    Args:
        input_size, output_size: D, and the model's outputs.
        length: T of the (longest) sequences.
        last_only: one output per sequence, after its last step.
        batch: step (from 0) -> inputs `(B, T, D)` and targets. The same step is the same batch.
        loss: outputs, targets -> mean loss.
        evaluate: predict, "val" or "test" -> {name: value}; predict maps inputs to outputs.
        unit: of the training loss, as in `train/loss_nats`.
        best: the measure that picks the weights to test, without its prefix.
        higher: whether more of it is better.
        baseline: loss of the best predictor that remembers nothing; None: not known.
        statistics: about the data, for config.json and summary.json.
    """

    input_size: int
    output_size: int
    length: int
    last_only: bool
    batch: Callable[[int], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    evaluate: Callable[[Callable[[Tensor], Tensor], str], dict[str, float]]
    unit: str
    best: str
    higher: bool = False
    baseline: float | None = None
    statistics: dict = field(default_factory=dict)


# Config


def parse(kind: type, presets: dict[str, dict], argv: list[str] | None, description: str):
    """Resolve preset < TOML < flags into a `kind`, a dataclass on `TaskConfig`."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset")
    early.add_argument("--config")
    flags, _ = early.parse_known_args(argv)
    toml = read_toml(flags.config, kind) if flags.config else {}
    preset = flags.preset or toml.get("preset") or kind.preset
    if preset not in presets:
        raise UserError(f"--preset must be one of {', '.join(presets)}, got {preset!r}")
    values = {**presets[preset], **toml, "preset": preset}
    default = dataclasses.replace(kind(), **values)
    config = tyro.cli(kind, args=argv, default=default, description=description)
    at_least = {
        1: "hidden_size num_layers num_heads batch_size log_every keep",
        0: "steps minutes target patience lr recurrent_lr lr_floor warmup clip unitarity_weight "
        "input_std dropout checkpoint_every eval_every decay_share",
    }
    for least, names in at_least.items():
        for name in names.split():
            value = getattr(config, name)
            if not least <= value < math.inf:
                raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    check_seed(config.seed)
    if not config.dropout < 1:
        raise UserError(f"--dropout must be below 1, got {config.dropout}")
    if not config.decay_share <= 1:
        raise UserError(f"--decay-share must be at most 1, got {config.decay_share}")
    spreads = config.init_spread
    if len(spreads) not in (1, config.num_layers) or not all(0 <= s <= 1 for s in spreads):
        raise UserError(
            f"--init-spread must be 1 or {config.num_layers} numbers in [0, 1], got {spreads}"
        )
    if not (config.steps or config.minutes or config.patience):
        raise UserError("one of --steps, --minutes and --patience must limit the run")
    for name in ("patience", "target"):
        if getattr(config, name) and not config.eval_every:
            raise UserError(f"--{name} looks at evaluations: give --eval-every too")
    if config.frozen_factors and config.model not in ("kru", "krulstm"):
        raise UserError(f"--frozen-factors is for kru and krulstm, not for {config.model}")
    return config


# Models


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
        if config.model == "lstm":  # forget gates start open, as in KRULSTM
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


# Diagnostics


def diagnose(model: SequenceModel, x: Tensor) -> dict:
    """Unitarity error of each factor, range of |eigenvalue|, gradient norm over lags to lag 0.

    Args:
        x: inputs `(B, T, D)`. The model's first layer is looked at; {} where it is no KRU.
    """
    kru = model.recurrence
    if not isinstance(kru, KRU):
        return {}
    radii = diagnostics.spectrum(kru.recurrent_factors(0)).abs()
    lags, norms = diagnostics.gradient_norm_by_lag(kru, x.transpose(0, 1), relative=True)
    shown = sorted({round((len(lags) - 1) * k / 32) for k in range(33)})
    errors = diagnostics.unitarity_error(kru)
    return {
        "unitarity_error": {name: error.flatten().tolist() for name, error in errors.items()},
        "eigenvalue_abs": [radii.min().item(), radii.max().item()],
        "gradient_by_lag": {str(lag): norms[lag].item() for lag in shown},
    }


def draw(model: SequenceModel, x: Tensor) -> dict:
    """The figures of `diagnose` by name."""
    kru = model.recurrence
    if not isinstance(kru, KRU):
        return {}
    lags_and_norms = diagnostics.gradient_norm_by_lag(kru, x.transpose(0, 1), relative=True)
    return {
        "unitarity": diagnostics.unitarity_figure(kru),
        "spectrum": diagnostics.spectrum_figure(kru.recurrent_factors(0)),
        "gradient_by_lag": diagnostics.gradient_norm_figure(*lags_and_norms),
    }


# Loop


@dataclass
class TaskState(TrainState):
    cpu_seconds: float = 0.0  # of this process in `seconds`: what else runs is not in it
    best: float | None = None  # the best validation so far
    best_step: int = 0
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    stale: int = 0  # evaluations since
    before: dict = field(default_factory=dict)  # diagnostics at step 0


def pack(at: TaskState, model: SequenceModel, optimizer, cpu_before: float) -> tuple[dict, dict]:
    """Tensors and JSON documents by file, for `checkpoints.Writer`.

    Args:
        cpu_before: of all legs, when this process had taken none.
    """
    at.cpu_seconds = cpu_before + time.process_time()
    tensors = {
        "model": model.state_dict(),
        "optimizer": optimizer_tensors(model, [optimizer]),
        "best": at.best_weights,
        "rng": {"cpu": torch.get_rng_state()},
    }
    position = {key: value for key, value in vars(at).items() if key != "best_weights"}
    return tensors, {"trainer": {"step": at.step, "position": position, "versions": versions()}}


def unpack(path: Path, model: SequenceModel, optimizer) -> TaskState:
    """Put a checkpoint back in place; the inverse of `pack`."""
    checkpoint = checkpoints.load(path)
    model.load_state_dict(checkpoint.tensors["model"])
    load_optimizers(model, [optimizer], checkpoint.tensors["optimizer"])
    torch.set_rng_state(checkpoint.tensors["rng"]["cpu"])
    position = checkpoint.trainer["position"]
    return TaskState(**position, best_weights=checkpoint.tensors["best"])


def train(config: TaskConfig, task: Task) -> int:
    """Run to the end of the budget, or to the first signal. Returns the exit code."""
    with Run(config) as run:
        device = pick_device(config.device)
        model = build_model(config, task, device)
        optimizer = torch.optim.Adam(parameter_groups(model, config, task.length), fused=True)
        settings = {**dataclasses.asdict(config), "model_config": {}, "data_facts": task.statistics}
        run.describe(settings, describe(model, optimizer, task, device), device)
        x_look = task.batch(0)[0][:4].to(device)  # for the diagnostics
        at = run.resume(TaskState(), lambda path: unpack(path, model, optimizer))
        if not run.checkpoint:
            at.before = diagnose(model, x_look)
        cpu_before = at.cpu_seconds - time.process_time()
        run.start(at, device, lambda: pack(at, model, optimizer, cpu_before))
        if not run.checkpoint:
            save_figures(run, model, x_look, "before")
        learn(config, task, run, model, optimizer)
        if run.completed():
            save_figures(run, model, x_look, "after")
            finish(task, run, model, optimizer, diagnose(model, x_look))
    return run.code


def learn(config: TaskConfig, task: Task, run: Run, model: SequenceModel, optimizer) -> None:
    """The steps."""
    at, device = run.at, run.device
    parameters = [p for p in model.parameters() if p.requires_grad]
    if is_enough(config, task, at):
        run.done = 1.0
    model.train()
    while run.goes_on():
        factor = learning_rate_factor(config, at.step, run.done)
        set_learning_rates([optimizer], factor)
        x, target = (tensor.to(device) for tensor in task.batch(at.step))
        optimizer.zero_grad()
        loss = task.loss(model(x), target)
        objective = loss
        if config.unitarity_weight and config.model == "kru":
            objective = loss + config.unitarity_weight * unitarity_penalty(model)
        objective.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip or math.inf, foreach=True)
        run.agree()
        run.update(optimizer)

        at.step += 1
        at.losses.append(loss.item())
        at.norms.append(norm.item())
        if not (math.isfinite(at.losses[-1]) and math.isfinite(at.norms[-1])):
            raise NonFiniteError(f"non-finite loss or gradient at step {at.step}")
        run.stepped()

        evaluating = run.done >= 1.0 or is_due(at.step, config.eval_every)
        if evaluating or is_due(at.step, config.log_every):
            row = describe_steps(task, run, model) | {"lr": config.lr * factor}
            if evaluating:
                row |= validate(task, run, model)
                if is_enough(config, task, at):
                    run.done = 1.0
            at.losses, at.norms = [], []
            words = (f"{k} {v:.4g}" if k != "step" else f"step {v}" for k, v in row.items())
            run.log(row, "  ".join(words))
        if is_due(at.step, config.checkpoint_every) and run.done < 1.0:
            run.save()


def describe_steps(task: Task, run: Run, model: SequenceModel) -> dict:
    """Of the steps since the last row."""
    at = run.at
    mean = sum(at.losses) / len(at.losses)
    fraction = {} if task.baseline is None else {"train/fraction": mean / task.baseline}
    return {
        "step": at.step,
        f"train/loss_{task.unit}": mean,
        **fraction,
        "steps_s": round(run.rates("step")[0], 2),
        "grad_norm": sum(at.norms) / len(at.norms),
        "unitarity": unitarity_penalty(model).item(),
    }


@torch.no_grad()
def evaluate(task: Task, run: Run, model: SequenceModel, split: str) -> dict[str, float]:
    model.eval()
    measures = task.evaluate(lambda x: model(x.to(run.device)).cpu(), split)
    model.train()
    if not all(math.isfinite(value) for value in measures.values()):
        raise NonFiniteError(f"non-finite evaluation after step {run.at.step}: {measures}")
    return {f"{split}/{name}": value for name, value in measures.items()}


def validate(task: Task, run: Run, model: SequenceModel) -> dict[str, float]:
    """Evaluate, and keep the weights where they are the best so far."""
    at, measures = run.at, evaluate(task, run, model, "val")
    value = measures[f"val/{task.best}"]
    at.stale += 1
    if at.best is None or (value > at.best if task.higher else value < at.best):
        at.best, at.best_step, at.stale = value, at.step, 0
        at.best_weights = {name: p.detach().clone() for name, p in model.state_dict().items()}
    return measures


def is_enough(config: TaskConfig, task: Task, at: TaskState) -> bool:
    """Whether `--patience` or `--target` ends the run."""
    if config.patience and at.stale >= config.patience:
        return True
    if not config.target or at.best is None:
        return False
    return at.best >= config.target if task.higher else at.best <= config.target


def finish(task: Task, run: Run, model: SequenceModel, optimizer, after: dict) -> None:
    """Test the best weights, and write the summary."""
    at, best = run.at, f"val/{task.best}"
    last = run.last_row(best) or validate(task, run, model)
    model.load_state_dict(at.best_weights)
    test = evaluate(task, run, model, "test")
    summary = {
        **{key: value for key, value in last.items() if key.startswith("val/")},
        f"best/{task.best}": at.best,
        **test,
        "best_step": at.best_step,
        "cpu_seconds": at.cpu_seconds,
        "learning_rates": [group["initial_lr"] for group in optimizer.param_groups],
        "baseline": task.baseline,
        "diagnostics": {"before": at.before, "after": after},
        "data": task.statistics,
    }
    measured = ", ".join(f"{name} {value:.5g}" for name, value in test.items())
    result = f"{measured} (weights of step {at.best_step} of {at.step})"
    run.summarize(summary, model, result)


def build_model(config: TaskConfig, task: Task, device: torch.device) -> SequenceModel:
    torch.manual_seed(config.seed)
    try:
        model = SequenceModel(config, task.input_size, task.output_size, task.last_only).to(device)
        model(torch.zeros(1, 1, task.input_size, device=device))
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"model: {error}") from error
    return model


def describe(model: SequenceModel, optimizer, task: Task, device: torch.device) -> list[str]:
    rates = [group["lr"] for group in optimizer.param_groups]
    lines = [
        f"data: {task.statistics}",
        f"{model.num_parameters:,} parameters, {model.num_recurrent_parameters:,} recurrent",
        f"learning rates {rates}; {device}, {torch.get_num_threads()} threads",
    ]
    if task.baseline is not None:
        lines.append(f"memoryless baseline: {task.baseline:.6g} {task.unit}")
    return lines


def save_figures(run: Run, model: SequenceModel, x: Tensor, when: str) -> None:
    """Write the figures of `draw`, and hand them to W&B."""
    figures = draw(model, x) if run.config.pictures else {}
    for name, figure in figures.items():
        figure.savefig(run.directory / f"{name}_{when}.png", dpi=120)
    run.wandb.log({"step": run.at.step}, draw=lambda: figures)


def run(config_and_task: Callable[[], tuple[TaskConfig, Task]]) -> None:
    """The `main` of a script: parse, load, train; errors of the user's end with exit code 2."""
    sys.stdout.reconfigure(line_buffering=True)
    with one_line(training=True):
        code = train(*config_and_task())
    sys.exit(code)


# Batches


def generator(seed: int, *path: int) -> torch.Generator:
    """Random numbers that depend on the seed and the place (split, step, epoch) alone."""
    text = ",".join(map(str, (seed, *path)))
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7]))


def epoch_batch(count: int, batch_size: int, seed: int, step: int) -> Tensor:
    """Indices `(min(batch_size, count),)` of a step: a new order of all examples every epoch.

    What is left of an epoch, less than a batch, is not used in it.
    """
    batch_size = min(batch_size, count)
    epoch, place = divmod(step, count // batch_size)
    order = torch.randperm(count, generator=generator(seed, 0, epoch))
    return order[place * batch_size : (place + 1) * batch_size]
