"""Settings of a language-model run.

One flat dataclass, `Config`. Where a value comes from, the later wins:

    preset  <  TOML file (`--config`)  <  flags

A preset's model sizes are in `kru_triton.lm.presets.PRESETS`, its training settings in
`TRAINING` below. `IDENTITY_FREE` lists the settings that may change when a run is resumed; every
other one belongs to the run's identity.
"""

import argparse
import dataclasses
import glob
import math
import tomllib
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import tyro

from kru_triton.lm.model import match_parameters
from kru_triton.lm.presets import PRESETS, LanguageModelConfig, lookup_blocks
from kru_triton.nonlinearity import Nonlinearity
from kru_triton.ops.arguments import Backend, Precision

# Training settings of the presets. Their steps count where neither --steps nor --minutes is given.
# The optimizer of tiny and small is what won there; that of base and large goes on from them.
# fmt: off
TRAINING = {
    #        batch_size  segment_length  optimizer      lr  recurrent_lr  warmup   steps
    "tiny":  (       64,             64,    "muon", 1.1e-2,        5e-4,     50,   2000),
    "small": (       64,             64,    "muon",  7e-3,         5e-4,     50,   4000),
    "base":  (       32,            256,    "muon",  3e-3,         5e-4,    100,  20000),
    "large": (       64,            512,    "muon",  1e-3,         3e-4,    500, 100000),
    "ptb":   (       32,            100,   "adamw",  1e-2,         2e-3,     50,   8000),
}
# fmt: on
SEEDS = 1 << 64  # there are so many; a seed and an offset are taken modulo this
TRAINING_COLUMNS = (
    *("batch_size", "segment_length", "optimizer", "lr", "recurrent_lr", "warmup", "steps"),
)


class UserError(Exception):
    """Bad arguments, data or run directory: scripts print the message and exit with code 2."""


@dataclass
class Config:
    data: tyro.conf.UseAppendAction[tuple[str, ...]] = ("stdlib",)
    """Training text: stdlib (source of this Python's own library), text:GLOB (** = folders),
    json:GLOB[#field], parquet:GLOB[#field] (files or http(s) URLs),
    hub:org/name[@config][/split][#field], or ptb:DIRECTORY (of Penn Treebank's ptb.train.txt,
    ptb.valid.txt and ptb.test.txt). Given several times, the sources are mixed, as WEIGHT:SPEC in
    these shares of tokens, else equally."""
    valid: str = ""
    """Validation text, spelled like --data; its files are not trained on. Empty: a fixed part of
    --data is held out."""
    test: str = ""
    """Test text, spelled like --data: all of it is measured, once, at the end of the run."""
    valid_bytes: int = 2_000_000
    """Validation text of a stream ends with the document that reaches this many bytes."""
    tokenizer: str = "bytes"
    """bytes: 256 byte values and a start-of-document mark. characters: the byte values that are in
    the first part of the data. bpe:N: N merges, trained on that part. Or the path of a
    tokenizer.json, or org/name on the Hub."""
    shuffle_buffer: int = 1024
    """Documents that a stream shuffles at a time."""
    workers: int = 0
    """Processes per process that read and tokenise a stream ahead. 0: a thread."""

    preset: Literal["tiny", "small", "base", "large", "ptb"] = "small"
    """Named sizes and training settings; every other flag overrides its part of the preset. ptb:
    the KRU paper's network for characters (N = 411 in 3x3 and 137x137)."""
    config: str = ""
    """Flat TOML file of settings, named like the flags: over the preset, under the flags."""
    model: Literal["kru", "krulstm", "lstm", "gru", "rnn", "mingru", "transformer"] = "kru"
    """The recurrent layer, or a baseline in the same frame."""
    match_params: int = 0
    """Scale the widths until the model has about this many parameters. 0: sizes as given."""
    frame: Literal["residual", "plain"] = "residual"
    """plain: one-hot tokens, one recurrent layer, a linear readout; no residual blocks."""
    d_model: int = 128
    """Width of the residual stream."""
    num_layers: int = 2
    """Residual blocks."""
    hidden_size: int = 128
    """Recurrent units per layer (complex ones for --field complex)."""
    factors: tuple[int, ...] = ()
    """Sizes of the square Kronecker factors of one head. Nothing: two balanced ones."""
    num_heads: int = 1
    """Independent recurrent blocks (attention heads for the transformer)."""
    field: Literal["complex", "real"] = "complex"
    """Numbers the recurrence works in."""
    nonlinearity: Nonlinearity = "modrelu"
    """Nonlinearity of the recurrence."""
    radius: float = 0.9
    """The recurrent matrix starts as this times a unitary one."""
    time_parallel: bool = False
    """With --nonlinearity identity and --state-gate none: run blocks of time side by side (for a
    GPU and few lanes)."""
    state_gate: Literal["none", "sigmoid", "rotation", "modtanh"] = "none"
    """Multiply the state of kru by a gate of the input, before the recurrent matrix: by numbers
    from 0 to 1 (sigmoid), by ones of modulus 1 (rotation), or of up to 1 (modtanh)."""
    gated: bool = True
    """Multiply the recurrence's output by a gate of the input."""
    input_gated: bool = True
    """Multiply the recurrence's input by a gate of the input."""
    token_shift: bool = True
    """Mix what recurrence and gates read with the token before, by a share per channel."""
    linear_attention: tuple[int, ...] = ()
    """Blocks, counted from 0, in which gated linear attention takes the place of the recurrence:
    a matrix per head and lane that looks up what was read before, in constant memory."""
    mlp_ratio: float = 2.0
    """Width of a block's MLP over d_model."""
    dropout: float = 0.0
    """Dropout on the output of each block's branches."""
    context_length: int = 256
    """Window of the transformer baseline, in tokens. Recurrent models have none."""
    backend: Backend = "auto"
    """Which implementation of the recurrence runs."""
    precision: Precision = "auto"
    """Arithmetic of the Triton kernels."""

    steps: int = 0
    """Stop after this many steps. 0: no limit (with neither budget given, the preset's steps)."""
    minutes: float = 0.0
    """Stop after this many minutes of training, resumed legs together. 0: no limit. The schedule
    follows the budget that is further spent."""
    batch_size: int = 32
    """Parallel lanes of each process, every lane reading its own part of the text."""
    grad_accumulation: int = 1
    """Run the lanes of a process in this many slices, one after another: less memory."""
    segment_length: int = 128
    """Tokens per lane and step; gradients reach back this far, the hidden state is carried on."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices between embedding and head, AdamW for all else (embedding, head,
    factors, biases, norms). Gates that are packed in one matrix are one matrix to Muon."""
    muon_momentum: float = 0.9
    """Share of the gradients before that Muon keeps at each step."""
    lr: float = 3e-3
    """Peak learning rate of everything but the Kronecker factors: Muon's updates have the size of
    AdamW's at the same rate."""
    recurrent_lr: float = 1e-3
    """Peak learning rate of the Kronecker factors."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """From the peak to --lr-floor over the budget. wsd: at the peak up to the last --decay-share of
    it, so that a run that is resumed before then with another budget is one of that budget."""
    decay_share: float = 0.2
    """The share of the budget in which wsd falls from the peak to the floor."""
    lr_floor: float = 0.05
    """The schedule ends at this share of the peak."""
    warmup: int = 50
    """Steps of linear warm-up."""
    weight_decay: float = 0.1
    """Decay of the weight matrices (never of factors, biases, norms)."""
    clip: float = 1.0
    """Global gradient norm limit. 0: none."""
    unitarity_weight: float = 0.0
    """Weight of the soft unitary penalty, sum over factors of ||W^H W - I||^2."""
    seed: int = 0
    """Initial weights, dropout, order of documents."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """bfloat16: autocast the forward pass. auto: that where the device multiplies it in hardware
    (GPUs, CPUs with AMX or AVX512-BF16); a run that goes on keeps what it has."""
    compile: bool = False
    """torch.compile the model."""
    frozen_factors: bool = False
    """Control: leave the recurrent matrices of kru or krulstm as they were drawn."""
    recompute: int = 0
    """Run the blocks in chunks of this many steps and compute each again in the backward: less
    memory for more time. 0: keep everything."""

    run_dir: str = "runs/lm"
    """Everything the run writes goes here."""
    resume: Literal["auto", "must", "never"] = "auto"
    """auto: go on if there is a good checkpoint. must: or fail. never: set old files aside."""
    checkpoint_every: int = 500
    """Steps between checkpoints; 0: none but the one at the end or on SIGTERM or SIGINT."""
    eval_every: int = 500
    """Steps between evaluations on the whole validation text; 0: none but the one at the end."""
    log_every: int = 20
    """Steps between rows of metrics.jsonl."""
    keep: int = 3
    """Checkpoints kept."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Weights & Biases. auto: as WANDB_MODE or WANDB_DISABLED says; else online with a key and a
    reachable host, else offline. W&B's other variables hold, too."""
    wandb_project: str = ""
    """Project there. Empty: WANDB_PROJECT, or kru_triton."""
    wandb_name: str = ""
    """Name of the run there. Empty: WANDB_NAME, or that of --run-dir."""

    prompt: str = ""
    """The sample at each evaluation goes on from this text. Empty: from the start of a document."""
    sample_tokens: int = 200
    """Length of that sample. 0: none."""
    temperature: float = 0.8
    """Of that sample. 0: always the most likely token."""
    top_p: float = 0.95
    """Of that sample: draw from the smallest set of tokens with this much probability."""


# What may differ between the legs of one run: budget, logging, where and how it is computed.
IDENTITY_FREE = {
    *("steps", "minutes", "decay_share", "preset", "config", "run_dir", "resume", "keep"),
    *("wandb", "wandb_project", "wandb_name"),
    *("checkpoint_every", "eval_every", "log_every"),
    *("prompt", "sample_tokens", "temperature", "top_p"),
    *("backend", "precision", "device", "compile", "recompute", "workers"),
    *("batch_size", "grad_accumulation", "processes"),  # the lanes of all processes must stay
    "test",
}
# What a run did before there was a flag for it: its config.json does not say.
BEFORE = {
    "optimizer": "adamw",
    "muon_momentum": 0.95,
    "schedule": "cosine",
    "linear_attention": [],
    "state_gate": "none",
    "chrono": 0,
    "asked": "cited",
}
# The models that use a setting; the others pass over it.
USED_BY = {
    "factors": ("kru", "krulstm"),
    **dict.fromkeys(("field", "state_gate", "time_parallel", "radius"), ("kru",)),
    **dict.fromkeys(("gated", "input_gated", "token_shift"), ("kru",)),
    **dict.fromkeys(("nonlinearity", "input_std", "init_spread"), ("kru", "unitary", "orthogonal")),
}


def unused(config, preset: dict) -> list[str]:
    """A line about settings that are not the preset's and that the model does not use, if any."""
    before = {**vars(type(config)()), **preset}
    flags = [
        f"--{name.replace('_', '-')}"
        for name, models in USED_BY.items()
        if config.model not in models and getattr(config, name, None) != before.get(name)
    ]
    return [f"note: not used by --model {config.model}: {', '.join(flags)}"] if flags else []


def parse(argv: list[str] | None = None, description: str = "") -> Config:
    """Resolve preset < TOML < flags.

    Flags that tyro refuses end the process with exit code 2; everything else raises UserError.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset")
    early.add_argument("--config")
    early.add_argument("--data", action="append")
    early.add_argument("--linear-attention", "--linear_attention", nargs="*")
    flags, _ = early.parse_known_args(argv)
    toml = read_toml(flags.config) if flags.config else {}
    preset = flags.preset or toml.get("preset") or Config.preset
    if preset not in TRAINING:
        preset = Config.preset  # only for now: tyro refuses the flag and names the valid ones
    training = dict(zip(TRAINING_COLUMNS[:-1], TRAINING[preset]))
    if preset == "ptb":
        training["tokenizer"] = "characters"
    values = {**model_settings(PRESETS[preset]), **training, **toml, "preset": preset}
    default = dataclasses.replace(Config(), **values)
    if flags.data:
        default.data = ()  # or tyro would append to it
    config = tyro.cli(Config, args=argv, default=default, description=description)
    if not config.steps and not config.minutes:
        config.steps = TRAINING[config.preset][-1]
    asked = flags.linear_attention is not None or "linear_attention" in toml
    if not asked and PRESETS[config.preset].linear_attention:  # in as many blocks as there are
        blocks = config.num_layers if config.frame == "residual" else 0
        config.linear_attention = lookup_blocks(blocks)
    validate(config)
    if len(config.data) == 1 and config.data[0].startswith("ptb:"):
        config = penn_treebank(config)
    return config


def penn_treebank(config: Config) -> Config:
    """The files of `--data ptb:DIRECTORY` as sources."""
    folder = Path(config.data[0].removeprefix("ptb:")).expanduser()
    paths = [folder / f"ptb.{part}.txt" for part in ("train", "valid", "test")]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise UserError(
            f"--data {config.data[0]}: no {' and no '.join(missing)} there; the Penn Treebank is "
            "licensed (LDC99T42), and language-model toolkits pass on its 10,000-word form as "
            "ptb.train.txt, ptb.valid.txt and ptb.test.txt"
        )
    train, valid, test = (f"text:{glob.escape(str(path))}" for path in paths)
    held_out = {"valid": config.valid or valid, "test": config.test or test}
    return dataclasses.replace(config, data=(train,), **held_out)


def check_seed(seed: int) -> None:
    """The range of torch's generators."""
    if not 0 <= seed < SEEDS:
        raise UserError(f"--seed must be at least 0 and below 2^64, got {seed}")


def model_settings(model_config: LanguageModelConfig) -> dict:
    """The fields of a model configuration that are settings here."""
    known = {field.name for field in dataclasses.fields(Config)}
    values = {k: v for k, v in dataclasses.asdict(model_config).items() if k in known}
    return {**values, "factors": tuple(values["factors"] or ())}


def model_config(config: Config, vocab_size: int) -> LanguageModelConfig:
    """The model's configuration out of the run's, parameters matched where that is asked for."""
    shared = {field.name for field in dataclasses.fields(LanguageModelConfig)} - {"vocab_size"}
    values = {name: getattr(config, name) for name in shared if hasattr(config, name)}
    values["factors"] = config.factors or None
    try:
        result = LanguageModelConfig(vocab_size=vocab_size, **values)
        return match_parameters(result, config.match_params) if config.match_params else result
    except (ValueError, TypeError) as error:
        raise UserError(f"model: {error}") from error


def read_toml(path: str, kind: type = Config) -> dict:
    """A flat TOML file as settings of `kind`; unknown names and wrong types are errors."""
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"--config {path}: {error}") from error
    table = {key.replace("-", "_"): value for key, value in table.items()}
    hints = get_type_hints(kind)
    unknown = sorted(set(table) - set(hints))
    if unknown:
        raise UserError(f"--config {path}: unknown keys {unknown}; known: {', '.join(hints)}")
    return {key: toml_value(path, key, value, hints[key]) for key, value in table.items()}


def toml_value(path: str, key: str, value, hint):
    """`value` as the type that `hint` wants, or UserError."""
    if get_origin(hint) is Literal:
        if value in get_args(hint):
            return value
        rule = f"one of {', '.join(map(repr, get_args(hint)))}"
    elif isinstance(hint, types.GenericAlias):  # tuple[int, ...] or tuple[str, ...]
        kind = get_args(hint)[0]
        if kind is str and type(value) is str:
            return (value,)
        if isinstance(value, list) and all(type(item) is kind for item in value):
            return tuple(value)
        rule = f"a list of {'whole numbers' if kind is int else 'strings'}"
    elif hint is float and type(value) in (int, float):
        return float(value)
    elif type(value) is hint:
        return value
    else:
        rule = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}[
            hint
        ]
    raise UserError(f"--config {path}: {key} must be {rule}, got {value!r}")


def validate(config: Config) -> None:
    """Ranges that the types do not say."""
    at_least = {
        1: "d_model num_layers hidden_size num_heads context_length batch_size segment_length "
        "log_every keep valid_bytes shuffle_buffer grad_accumulation",
        0: "match_params steps minutes lr recurrent_lr weight_decay warmup clip unitarity_weight "
        "recompute checkpoint_every eval_every sample_tokens temperature dropout lr_floor "
        "decay_share workers radius",
    }
    for least, names in at_least.items():
        for name in names.split():
            value = getattr(config, name)
            if not least <= value < math.inf:
                raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    check_seed(config.seed)
    if not config.data:
        raise UserError("--data must name at least one source")
    if config.batch_size % config.grad_accumulation:
        raise UserError(
            f"--grad-accumulation must divide --batch-size ({config.batch_size} lanes), got "
            f"{config.grad_accumulation}"
        )
    if config.frozen_factors and config.model not in ("kru", "krulstm"):
        raise UserError(f"--frozen-factors is for kru and krulstm, not for {config.model}")
    if not config.dropout < 1:
        raise UserError(f"--dropout must be below 1, got {config.dropout}")
    for name in ("lr_floor", "decay_share"):
        if not getattr(config, name) <= 1:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} must be at most 1, got {getattr(config, name)}")
    if not 0 <= config.muon_momentum < 1:
        raise UserError(f"--muon-momentum must be in [0, 1), got {config.muon_momentum}")
    if not 0 < config.top_p <= 1:
        raise UserError(f"--top-p must be in (0, 1], got {config.top_p}")
    if not 0 < config.mlp_ratio < math.inf:
        raise UserError(f"--mlp-ratio must be positive and finite, got {config.mlp_ratio}")
    if any(size < 1 for size in config.factors):
        raise UserError(f"--factors must be positive, got {config.factors}")
