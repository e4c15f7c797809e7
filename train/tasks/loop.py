"""What the task scripts share: the loop from the first step to the summary.

    batch(step) -> model -> loss -> clip -> Adam          every training step
    validation  -> the best weights so far are kept       every --eval-every steps
    test of the best weights -> summary.json              at the end

A batch is a function of the seed and the step alone, so a checkpoint needs no data position: a
resumed run sees what a run that never stopped would have seen. An error leaves a checkpoint of the
last completed step. Exit codes as in lm.py: 0 done or stopped with a checkpoint, 1 that could not
be written, 2 bad arguments or data, 3 non-finite loss, 130 Ctrl-C before the loop.

B batch, T time, D input features.
"""

import dataclasses
import hashlib
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from kru_triton import KRU, diagnostics, unitarity_penalty
from kru_triton.train.run import checkpoints
from kru_triton.train.run.device import pick_device
from kru_triton.train.run.directory import versions
from kru_triton.train.run.optimizers import (
    learning_rate_factor,
    load_optimizers,
    optimizer_tensors,
    peak_rate,
    set_learning_rates,
)
from kru_triton.train.run.run import NonFiniteError, Run, TrainState, is_due
from kru_triton.train.run.script import one_line
from kru_triton.train.run.settings import UserError
from kru_triton.train.tasks.models import SequenceModel, parameter_groups
from kru_triton.train.tasks.settings import TaskConfig


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


@dataclass
class TaskState(TrainState):
    cpu_seconds: float = 0.0  # of this process in `seconds`: what else runs is not in it
    best: float | None = None  # the best validation so far
    best_step: int = 0
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    stale: int = 0  # evaluations since
    before: dict = field(default_factory=dict)  # diagnostics at step 0


def run(config_and_task: Callable[[], tuple[TaskConfig, Task]]) -> None:
    """The `main` of a script: parse, load, train; errors of the user's end with exit code 2."""
    sys.stdout.reconfigure(line_buffering=True)
    with one_line(training=True):
        code = train(*config_and_task())
    sys.exit(code)


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
    run.agree()
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
            run.agree()
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
        "learning_rates": [peak_rate(group) for group in optimizer.param_groups],
        "baseline": task.baseline,
        "diagnostics": {"before": at.before, "after": after},
        "data": task.statistics,
    }
    measured = ", ".join(f"{name} {value:.5g}" for name, value in test.items())
    result = f"{measured} (weights of step {at.best_step} of {at.step})"
    run.summarize(summary, model, result)


# What a run begins with


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


def save_figures(run: Run, model: SequenceModel, x: Tensor, when: str) -> None:
    """Write the figures of `draw`, and hand them to W&B."""
    figures = draw(model, x) if run.config.pictures else {}
    for name, figure in figures.items():
        figure.savefig(run.directory / f"{name}_{when}.png", dpi=120)
    run.wandb.log({"step": run.at.step}, draw=lambda: figures)


# Checkpoint


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
