"""Settings of the task scripts: preset < TOML file (`--config`) < flags."""

import argparse
import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import tyro

from kru_triton.nonlinearity import Nonlinearity
from kru_triton.ops.arguments import Backend, Precision
from kru_triton.train.run.settings import UserError, check_seed, read_toml, unused


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
    nonlinearity: Nonlinearity = "modrelu"
    """Of kru, unitary and orthogonal."""
    state_gate: Literal["none", "sigmoid", "rotation", "modtanh"] = "none"
    """Multiply the state of kru by a gate of the input, before the recurrent matrix: by numbers
    from 0 to 1 (sigmoid), by ones of modulus 1 (rotation), or of up to 1 (modtanh)."""
    frozen_factors: bool = False
    """Control: leave the recurrent matrices of kru or krulstm as they were drawn."""
    input_std: float = 0.0
    """Standard deviation of the initial input weights of kru, unitary, orthogonal. 0: 1/sqrt(D)."""
    init_spread: tuple[float, ...] = (1.0,)
    """Of kru, unitary, orthogonal: angles of the eigenvalues of the initial factors, as a share of
    the whole circle's; one for all layers, or one per layer. Near 0 a layer is an integrator."""
    chrono: int = 0
    """Gates of lstm and gru start so that they keep what they saw for up to this many steps (chrono
    initialization). 0: as usual, forget gates of lstm open by 1."""
    dropout: float = 0.0
    """Between stacked layers and before the readout."""
    backend: Backend = "auto"
    """Which implementation of the Kronecker recurrence runs."""
    precision: Precision = "auto"
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
        "input_std chrono dropout checkpoint_every eval_every decay_share",
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
        source = f" of --preset {preset}" if spreads == presets[preset].get("init_spread") else ""
        raise UserError(
            f"--init-spread must be 1 or {config.num_layers} numbers in [0, 1], got {spreads}"
            f"{source}"
        )
    if not (config.steps or config.minutes or config.patience):
        raise UserError("one of --steps, --minutes and --patience must limit the run")
    for name in ("patience", "target"):
        if getattr(config, name) and not config.eval_every:
            raise UserError(f"--{name} looks at evaluations: give --eval-every too")
    if config.chrono and (config.model not in ("lstm", "gru") or config.chrono < 3):
        raise UserError(
            f"--chrono is for lstm and gru, and at least 3 steps; got {config.chrono} and "
            f"--model {config.model}"
        )
    if config.frozen_factors and config.model not in ("kru", "krulstm"):
        raise UserError(f"--frozen-factors is for kru and krulstm, not for {config.model}")
    for line in unused(config, presets[preset]):
        print(line)
    return config
