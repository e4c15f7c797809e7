"""Train a language model: predict the next byte of real text, state carried between segments.

    stream   BOS i m p o r t _ o s \\n ... BOS d e f ...   documents in a row, cut into lanes
    inputs   BOS i m p o r t _ o s    one segment of one lane
    targets  i m p o r t _ o s \\n    the same, one further
    state    of the segment before, cut to zero where `reset` marks a document start

    python train/lm.py
    python train/lm.py --data 'text:books/**/*.txt' --minutes 10 --run-dir runs/books
    python train/lm.py --model lstm --match-params 300000 --steps 2000 --run-dir runs/lstm
    torchrun --standalone --nproc_per_node 8 train/lm.py --preset base

The same command again goes on from the last checkpoint. An error leaves one of the last completed
step. Exit codes: 0 done, or stopped by SIGTERM or SIGINT with a checkpoint written; 1 that
checkpoint, or another file, could not be written, there is too little memory, or another process of
the run has died; 2 bad arguments or data; 3 non-finite loss; 130 Ctrl-C before it has begun.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of an import

import contextlib
import dataclasses
import json
import math
import os
import shlex
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

# before torch loads OpenMP: its threads would spin for milliseconds at the end of every operation,
# which beside other busy processes takes the time of the thread that they wait for
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from kru_triton import KRU
from kru_triton.lm.model import LanguageModel
from kru_triton.lm.presets import PRESETS
from kru_triton.train.run import checkpoints
from kru_triton.train.run.device import pick_device, pick_dtype, rng_state, set_rng_state
from kru_triton.train.run.directory import setting_of, versions
from kru_triton.train.run.optimizers import (
    build_optimizers,
    describe_optimizers,
    learning_rate_factor,
    load_optimizers,
    optimizer_tensors,
    set_learning_rates,
)
from kru_triton.train.run.processes import Processes, join, leave
from kru_triton.train.run.run import NonFiniteError, Run, TrainState, is_due
from kru_triton.train.run.script import one_line
from kru_triton.train.run.settings import (
    SEEDS,
    Config,
    UserError,
    model_config,
    model_settings,
    parse,
    unused,
)
from kru_triton.train.text import data
from kru_triton.train.text.batches import Batches, TokenArray, validation_segments
from kru_triton.train.text.documents import describe_statistics
from kru_triton.train.text.generate import encode_prompt, generate
from kru_triton.train.text.load import ready

EVALUATION_LANES = 32


@dataclass
class LMState(TrainState):
    """Losses are summed over the targets of this process."""

    tokens: int = 0  # targets that were counted, of all processes
    counts: list[float] = field(default_factory=list)  # of each of `losses`
    data: dict = field(default_factory=dict)  # of this process, after the last step's batch
    epochs: float = 0.0
    state: list[Tensor] = field(default_factory=list)  # carried from segment to segment

    def mean_losses(self, processes: Processes) -> list[float]:
        """Mean loss of each step since the last row, over all processes.

        Raises:
            NonFiniteError: for the first step whose loss or gradient is not finite.
        """
        sums = processes.sum(*map(float, self.losses)) if self.losses else []
        means = [total / max(count, 1) for total, count in zip(sums, self.counts)]
        first = self.step - len(means) + 1
        for step, (loss, norm) in enumerate(zip(means, self.norms), first):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise NonFiniteError(
                    f"non-finite loss at step {step} (loss {loss}, gradient norm {norm})"
                )
        return means


# Loop


def train(config: Config, processes: Processes) -> int:
    """Run to the end of the budget, or to the first signal. Returns the exit code."""
    with Run(config, processes) as run:
        if config.dtype == "auto":  # what the run has, if it was begun, perhaps elsewhere
            dtype = setting_of(run.directory, "dtype") or config.dtype
            config = dataclasses.replace(config, dtype=dtype)
        text = open_text(config, run)
        config, model = build_model(config, text, processes)
        device = next(model.parameters()).device
        with processes.raise_together():
            optimizers = build_optimizers(model, config)
        lines = describe_model(model, optimizers, run) + describe_text(text)
        run.describe(settings_of(config, model, text, processes), lines, device)
        at = run.resume(
            LMState(), lambda path: unpack(path, model, optimizers, text.train, processes)
        )
        forward = processes.wrap(torch.compile(model) if config.compile else model, device)
        run.start(at, device, lambda: pack(at, model, optimizers, processes))
        learn(config, run, text, model, forward, optimizers)
        if run.completed():
            finish(config, run, text, model)
    return run.code


def learn(config: Config, run: Run, text: data.Data, model, forward, optimizers) -> None:
    """The steps."""
    at, autocast = run.at, autocast_of(config, run.device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    batch, (at.data, at.epochs) = fetch(run, text.train)
    run.agree()
    model.train()
    while run.goes_on():
        factor = learning_rate_factor(config, at.step, run.done)
        set_learning_rates(optimizers, factor)
        for optimizer in optimizers:
            optimizer.zero_grad()
        total, state = backward(model, forward, batch, at.state, config, autocast)
        here = int((batch[1] != -100).sum())
        capacity = batch[1].numel() * run.processes.world_size
        batch, position = fetch(run, text.train)  # while a GPU is still busy
        count = run.agree(here)
        if 0 < count < capacity:
            for parameter in parameters:
                parameter.grad *= capacity / count
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip or math.inf, foreach=True)
        run.update(*optimizers)

        at.step += 1
        at.tokens += int(count)
        at.state = state
        at.data, at.epochs = position
        at.losses.append(total)
        at.counts.append(count)
        at.norms.append(norm)
        run.stepped()

        evaluating = run.done >= 1.0 or is_due(at.step, config.eval_every)
        if evaluating or is_due(at.step, config.log_every):
            with run.noting():
                report(config, run, text, model, config.lr * factor, evaluating)
            run.agree()
        if is_due(at.step, config.checkpoint_every) and run.done < 1.0:
            run.save()


def report(config: Config, run: Run, text: data.Data, model, rate: float, evaluating: bool) -> None:
    """A row of the steps since the last one."""
    at = run.at
    losses, norms = at.mean_losses(run.processes), list(map(float, at.norms))
    tokens_per_second, data_wait = run.rates("tokens")
    row = {
        "step": at.step,
        "tokens": at.tokens,
        "train/loss_nats": sum(losses) / len(losses),
        "tok_s": round(tokens_per_second, 1),
        "data_wait": round(data_wait, 4),
        "grad_norm": sum(norms) / len(norms),
        "unitarity": unitarity(model),
        "lr": rate,
    }
    extras = {}
    if evaluating:
        autocast = autocast_of(config, run.device)
        row |= evaluate(model, text.valid, config.segment_length, autocast, run.processes)
        extras["draw"] = lambda: draw(model)
        if config.sample_tokens:
            extras["sample"] = lambda: write_sample(model, text.tokenizer, config, at.step)
    at.losses, at.counts, at.norms = [], [], []
    run.log(row, describe(row), **extras)


def finish(config: Config, run: Run, text: data.Data, model: LanguageModel) -> None:
    """Measure the last weights, and write the summary."""
    at, autocast = run.at, autocast_of(config, run.device)
    options = config.segment_length, autocast, run.processes
    result = run.last_row("val/bpb") or evaluate(model, text.valid, *options)
    test = {} if text.test is None else evaluate(model, text.test, *options, "test")
    measures = {name: result[name] for name in ("val/bpb", "val/loss_nats")} | test
    if not run.first:
        return
    summary = {
        **measures,
        "gzip_bpb": text.baselines["gzip"],
        "xz_bpb": text.baselines["xz"],
        "tokens": at.tokens,
        "epochs": at.epochs,
        "checkpoint_bytes": run.writer.bytes,
        "checkpoint_s": run.writer.seconds,
        "checkpoint_blocked_s": run.writer.blocked,
        "processes": run.processes.world_size,
        "data": {**text.statistics, "read": text.train.counts()},
        "backend": model.backend_report(),
    }
    bits = [f"{name} {measures[name]:.4f}" for name in measures if name.endswith("/bpb")]
    sampler = Path(sys.argv[0]).with_name("sample.py")
    run.summarize(
        summary,
        model,
        f"{', '.join(bits)}, {describe_baselines(text)}; "
        f"{at.step:,} steps, {at.tokens:,} tokens, {at.epochs:.2f} epochs",
        f"sample: python {sampler} {shlex.quote(str(run.directory))} --prompt 'def '\n",
    )


def fetch(run: Run, batches: Batches) -> tuple[tuple[Tensor, ...] | None, tuple[dict, float]]:
    """The next batch, None where that has failed; position and epochs before it."""
    position, batch = (batches.state(), batches.epochs_read()), None
    with run.noting(), run.waiting():
        batch = batches.next()
    return batch, position


# Pieces of a step


def backward(
    model: LanguageModel, forward, batch, state, config: Config, autocast
) -> tuple[Tensor, list[Tensor]]:
    """Add up the gradients of a batch, in `--grad-accumulation` slices of its lanes.

    They are those of (sum of the losses of all targets) / batch.numel() + penalty; where not every
    target is counted, those of the counted share of that.

    Args:
        forward: the model, or what wraps it for several processes or `--compile`.
        batch: inputs, targets and reset, each (lanes, time); a target of -100 is not counted.

    Returns:
        The sum of the losses, and the state after the batch.
    """
    device = next(model.parameters()).device
    states = [tensor.chunk(config.grad_accumulation) for tensor in state]
    total, after = torch.zeros((), device=device), []
    for index, part in enumerate(
        zip(*(tensor.chunk(config.grad_accumulation) for tensor in batch))
    ):
        share = int((part[1] != -100).sum()) / batch[1].numel()
        inputs, targets, reset = (tensor.to(device) for tensor in part)
        sync = contextlib.nullcontext()
        if isinstance(forward, DistributedDataParallel) and index < config.grad_accumulation - 1:
            sync = forward.no_sync()
        with sync:
            with autocast:
                own = [slices[index] for slices in states] or None
                logits, own = forward(inputs, own, reset)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
            objective = loss / batch[1].numel()
            if config.unitarity_weight:
                objective += share * config.unitarity_weight * model.unitarity_penalty()
            objective.backward()
        total += loss.detach()
        after.append([tensor.detach() for tensor in own])
    return total, [torch.cat(parts) for parts in zip(*after)]


def autocast_of(config: Config, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    stream: TokenArray,
    length: int,
    autocast,
    processes: Processes,
    split: str = "val",
) -> dict[str, float]:
    """Loss and bits per byte over a whole held-out stream, in segments, state carried.

    Each process reads some of the lanes.
    """
    device = next(model.parameters()).device
    nats, count, state = torch.zeros((), dtype=torch.float64, device=device), 0, None
    model.eval()
    with processes.raise_together():
        for batch in validation_segments(stream, EVALUATION_LANES, length):
            batch = [tensor.tensor_split(processes.world_size)[processes.rank] for tensor in batch]
            if not len(batch[0]):  # more processes than lanes
                break
            inputs, targets, reset, counted = (tensor.to(device) for tensor in batch)
            with autocast:
                logits, state = model(inputs, state, reset)
            targets = targets.flatten()
            losses = F.cross_entropy(logits.flatten(0, 1).float(), targets, reduction="none")
            nats += (losses * counted.flatten()).sum(dtype=torch.float64)
            count += int(batch[3].sum())
    model.train()
    nats, count = processes.sum(nats.item(), count)
    bits_per_byte = nats / math.log(2) / stream.num_bytes
    if not math.isfinite(bits_per_byte):
        raise NonFiniteError(f"non-finite {split} loss")
    return {f"{split}/loss_nats": nats / count, f"{split}/bpb": bits_per_byte}


def write_sample(model: LanguageModel, tokenizer, config: Config, step: int) -> str:
    """Text of the model's own, drawn with a generator of its own: training does not notice."""
    model.eval()
    prompt = os.fsencode(config.prompt)
    tokens = generate(
        model,
        tokenizer,
        prompt,
        config.sample_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        generator=torch.Generator().manual_seed((config.seed + step) % SEEDS),
    )
    text = prompt + tokenizer.decode(list(tokens))
    model.train()
    return text.decode("utf-8", "replace")


@torch.no_grad()
def unitarity(model: LanguageModel) -> float:
    return float(model.unitarity_penalty())


def draw(model: LanguageModel) -> dict:
    """Figure of the eigenvalues of the first Kronecker matrix, by name; {} where there is none."""
    from kru_triton import diagnostics

    for module in model.modules():
        if isinstance(module, KRU):
            return {"spectrum": diagnostics.spectrum_figure(module.recurrent_factors(0))}
    return {}


def describe(row: dict) -> str:
    """A row of metrics.jsonl for people."""
    text = (
        f"step {row['step']}  train {row['train/loss_nats']:.4f} nats  "
        f"grad {row['grad_norm']:.2f}  lr {row['lr']:.2e}  {row['tok_s'] / 1e3:.1f}k tok/s"
    )
    if "val/bpb" in row:
        text += f"  val {row['val/loss_nats']:.4f} nats, {row['val/bpb']:.4f} bits per byte"
    return text


# What a run begins with


def open_text(config: Config, run: Run) -> data.Data:
    """The data of this process; the first process before the others."""
    processes, text = run.processes, None
    for turn in (run.first, not run.first):
        with processes.raise_together():
            if turn:
                text = data.build(config, run.directory, processes.rank, processes.world_size)
    run.stack.callback(text.train.close)
    return text


def build_model(
    config: Config, text: data.Data, processes: Processes
) -> tuple[Config, LanguageModel]:
    """The model on its device; the configuration with the precision that this has."""
    with processes.raise_together():
        device = pick_device(processes.device_name(config.device))
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
        config = dataclasses.replace(config, dtype=pick_dtype(config.dtype, device))
        architecture = model_config(config, text.tokenizer.vocab_size)
        if config.sample_tokens:  # or the first evaluation would end the run
            encode_prompt(config.prompt, text.tokenizer)
        torch.manual_seed(config.seed)
        try:
            model = LanguageModel(architecture)
        except (ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"model: {error}") from error
        model = ready(model, device)
    if config.frozen_factors:
        for name, p in model.named_parameters():
            p.requires_grad_(".factor" not in name)
    if processes.rank:
        torch.manual_seed((config.seed + processes.rank) % SEEDS)  # dropout draws of its own
    return config, model


def settings_of(config: Config, model, text: data.Data, processes: Processes) -> dict:
    """What is written to config.json."""
    return {
        **dataclasses.asdict(config),
        "model_config": dataclasses.asdict(model.config),
        "processes": processes.world_size,
        "lanes": processes.world_size * config.batch_size,
        "train_sha256": text.statistics["train"]["sha256"],
        "valid_sha256": text.statistics["valid"]["sha256"],
        "tokenizer_sha256": text.tokenizer.sha256,
    }


def describe_model(model: LanguageModel, optimizers: list[Optimizer], run: Run) -> list[str]:
    count = run.processes.world_size
    return [
        textwrap.fill(f"model {dataclasses.asdict(model.config)}", 100, break_on_hyphens=False),
        *unused(run.config, model_settings(PRESETS[run.config.preset])),
        f"{model.num_parameters:,} parameters, {model.num_recurrent_parameters:,} recurrent",
        textwrap.fill(describe_optimizers(optimizers), 100),
        f"backend: {model.backend_report()}; {next(model.parameters()).device}, "
        f"{torch.get_num_threads()} threads, {count} processes, "
        f"{count * run.config.batch_size} lanes",
    ]


def describe_text(text: data.Data) -> list[str]:
    sizes = [f"{name}: {describe_statistics(known)}" for name, known in text.statistics.items()]
    return [
        f"tokenizer: {text.tokenizer.describe()}",
        *sizes,
        f"valid, bits per byte: {describe_baselines(text)}",
    ]


def describe_baselines(text: data.Data) -> str:
    names = {"gzip": "gzip -9", "xz": "xz"}
    return ", ".join(f"{names[name]} {bits:.4f}" for name, bits in text.baselines.items())


# Checkpoint: everything into flat tensors and JSON, and back


def pack(at: LMState, model, optimizers, processes: Processes) -> tuple[dict, dict]:
    """Tensors and JSON documents by file, those of this process, for `checkpoints.Writer`.

    Raises:
        NonFiniteError: for what is not to be gone on from.
    """
    at.mean_losses(processes)
    own = {f"state.{index}": tensor for index, tensor in enumerate(at.state)}
    own["losses"] = torch.tensor(list(map(float, at.losses)), dtype=torch.float64)
    own |= rng_state(next(model.parameters()).device)
    name = f"rank-{processes.rank}"
    tensors, documents = {name: own}, {name: {"data": at.data}}
    if processes.rank == 0:
        tensors["model"] = model.state_dict()
        tensors["optimizer"] = optimizer_tensors(model, optimizers)
        documents["trainer"] = {
            **{key: getattr(at, key) for key in ("step", "tokens", "seconds", "counts")},
            "norms": list(map(float, at.norms)),
            "processes": processes.world_size,
            "model_config": dataclasses.asdict(model.config),
            "versions": versions(),
        }
    return tensors, documents


def unpack(path: Path, model, optimizers, batches: Batches, processes: Processes) -> LMState:
    """Put a checkpoint back in place; the inverse of `pack`.

    The lanes of all processes together are those of the checkpoint, whatever its number of
    processes was: each process takes its part. (Not every source of data allows that; the random
    numbers of dropout are others then.)
    """
    trainer = json.loads((path / "trainer.json").read_text())
    same = trainer["processes"] == processes.world_size
    checkpoint = checkpoints.load(path, ranks=[processes.rank] if same else None)
    device = next(model.parameters()).device
    model.load_state_dict(checkpoint.tensors["model"])
    load_optimizers(model, optimizers, checkpoint.tensors["optimizer"])

    at = LMState(**{key: trainer[key] for key in ("step", "tokens", "seconds", "counts", "norms")})
    ranks = [processes.rank] if same else range(trainer["processes"])
    own = [checkpoint.tensors[f"rank-{rank}"] for rank in ranks]
    for index in range(sum(name.startswith("state.") for name in own[0])):
        lanes = torch.cat([tensors[f"state.{index}"] for tensors in own])
        part = lanes if same else lanes.chunk(processes.world_size)[processes.rank].clone()
        at.state.append(part.to(device))
    if same or processes.rank == 0:
        at.losses = list(sum(tensors["losses"] for tensors in own))
    else:
        at.losses = [torch.zeros(())] * len(at.norms)
    batches.load_state(checkpoint.documents[f"rank-{ranks[0]}"]["data"])
    if same:
        set_rng_state(own[0], device)
    return at


# Main


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # names may be no UTF-8
    with one_line(training=True):
        config = parse(description=__doc__)
        processes = join(config.device)
    if processes.rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (the first process speaks for all)
    try:
        with one_line(training=True, silent=processes.rank > 0):
            code = train(config, processes)
            leave()
    except RuntimeError as error:
        if not processes.have_gone(error):
            raise
        print(
            f"error: process {processes.rank} ends, because another process of this run has gone; "
            f"the same command goes on from the last checkpoint ({str(error).splitlines()[0]})",
            file=sys.stderr,
        )
        sys.stderr.flush()
        os._exit(1)  # threads may be waiting for that process
    sys.exit(code)


if __name__ == "__main__":
    main()
