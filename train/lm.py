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
import time
from collections.abc import Callable, Iterator
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
from tqdm import tqdm

from kru_triton import KRU
from kru_triton.lm.model import LanguageModel, LanguageModelConfig
from kru_triton.train.run import checkpoints
from kru_triton.train.run.device import (
    device_name,
    keep_freed_memory,
    pick_device,
    pick_dtype,
    rng_state,
    set_rng_state,
)
from kru_triton.train.run.directory import (
    claim,
    commit,
    share,
    versions,
    write_settings,
)
from kru_triton.train.run.metrics import Metrics, Wandb, new_run_id
from kru_triton.train.run.optimizers import (
    build_optimizers,
    describe_optimizers,
    learning_rate_factor,
    load_optimizers,
    optimizer_tensors,
)
from kru_triton.train.run.processes import Processes, Stop, join, leave
from kru_triton.train.run.script import drop_output, one_line
from kru_triton.train.run.settings import SEEDS, Config, UserError, model_config, parse
from kru_triton.train.text import data
from kru_triton.train.text.generate import encode_prompt, generate
from kru_triton.train.text.load import ready

EVALUATION_LANES = 32


class NonFiniteError(Exception):
    """The loss or the gradient is not a number any more."""


@dataclass
class Position:
    """Where a run is, besides model, optimizer and RNG."""

    step: int = 0
    tokens: int = 0  # targets that were counted, of all processes
    seconds: float = 0.0  # in the loop, all legs
    data: dict = field(default_factory=dict)  # of this process, after the last step's batch
    epochs: float = 0.0
    state: list[Tensor] = field(default_factory=list)  # carried from segment to segment
    # of the steps since the last row of metrics.jsonl:
    losses: list[Tensor] = field(default_factory=list)  # summed over this process' targets
    counts: list[float] = field(default_factory=list)  # targets of all processes
    norms: list[Tensor] = field(default_factory=list)  # of the gradient

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


# Checkpoint: everything into flat tensors and JSON, and back


def pack(at: Position, model, optimizers, processes: Processes) -> tuple[dict, dict]:
    """Tensors and JSON documents by file, those of this process, for `checkpoints.Writer`."""
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
            "processes": processes.count,
            "model_config": dataclasses.asdict(model.config),
            "versions": versions(),
        }
    return tensors, documents


def unpack(path: Path, model, optimizers, batches, processes: Processes) -> Position:
    """Put a checkpoint back in place; the inverse of `pack`.

    The lanes of all processes together are those of the checkpoint, whatever its number of
    processes was: each process takes its part. (Not every source of data allows that; the random
    numbers of dropout are others then.)
    """
    trainer = json.loads((path / "trainer.json").read_text())
    same = trainer["processes"] == processes.count
    checkpoint = checkpoints.load(path, ranks=[processes.rank] if same else None)
    device = next(model.parameters()).device
    model.load_state_dict(checkpoint.tensors["model"])
    load_optimizers(model, optimizers, checkpoint.tensors["optimizer"])

    at = Position(**{key: trainer[key] for key in ("step", "tokens", "seconds", "counts", "norms")})
    ranks = [processes.rank] if same else range(trainer["processes"])
    own = [checkpoint.tensors[f"rank-{rank}"] for rank in ranks]
    for index in range(sum(name.startswith("state.") for name in own[0])):
        lanes = torch.cat([tensors[f"state.{index}"] for tensors in own])
        part = lanes if same else lanes.chunk(processes.count)[processes.rank].clone()
        at.state.append(part.to(device))
    if same or processes.rank == 0:
        at.losses = list(sum(tensors["losses"] for tensors in own))
    else:
        at.losses = [torch.zeros(())] * len(at.norms)
    batches.load_state(checkpoint.documents[f"rank-{ranks[0]}"]["data"])
    if same:
        set_rng_state(own[0], device)
    return at


# Pieces of the loop


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


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    stream: data.Stream,
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
    with processes.together():
        for batch in data.validation_segments(stream, EVALUATION_LANES, length):
            batch = [tensor.tensor_split(processes.count)[processes.rank] for tensor in batch]
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


def prepare(config: Config, processes: Processes) -> int:
    """Take the run directory, open the data, and train. Returns the exit code."""
    keep_freed_memory()
    stop = Stop()
    run_dir = Path(config.run_dir)
    first = processes.rank == 0
    # The first process before the others
    with processes.together():
        _lock, path = claim(run_dir, config.resume) if first else (None, None)
    path = processes.gather(path)[0]
    for turn in (first, not first):
        with processes.together():
            if turn:
                share(run_dir, processes.rank)
                text = data.build(config, run_dir, processes.rank, processes.count)
    with contextlib.closing(text.train):
        return train(config, processes, stop, text, path)


def train(
    config: Config, processes: Processes, stop: Stop, text: data.Data, path: Path | None
) -> int:
    """Run to the end of the budget, or to the first signal. Returns the exit code.

    Args:
        path: the checkpoint to go on from.
    """
    run_dir = Path(config.run_dir)
    first = processes.rank == 0

    # Model
    with processes.together():
        device = pick_device(processes.device_name(config.device))
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
        config = dataclasses.replace(config, dtype=pick_dtype(config.dtype, device))
        architecture = model_config(config, text.tokenizer.vocab_size)
        if config.sample_tokens:  # or the first evaluation would end the run
            encode_prompt(config.prompt, text.tokenizer)
        torch.manual_seed(config.seed)
        model = build_model(architecture, device)
    if config.frozen_factors:
        for name, p in model.named_parameters():
            p.requires_grad_(".factor" not in name)
    if not first:
        torch.manual_seed((config.seed + processes.rank) % SEEDS)  # dropout draws of its own
    with processes.together():
        optimizers = build_optimizers(model, config)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group["lr"] for group in groups]
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")

    # What runs
    settings = {
        **dataclasses.asdict(config),
        "model_config": dataclasses.asdict(architecture),
        "processes": processes.count,
        "lanes": processes.count * config.batch_size,
        "train_sha256": text.facts["train"]["sha256"],
        "valid_sha256": text.facts["valid"]["sha256"],
        "tokenizer_sha256": text.tokenizer.sha256,
        "wandb_id": new_run_id(),
    }
    settings = json.loads(json.dumps(settings))  # tuples are lists in JSON
    listed = " ".join(f"{key}={settings[key]!r}" for key in vars(config))
    print(textwrap.fill(listed, 100, break_on_hyphens=False))
    print(textwrap.fill(f"model {settings['model_config']}", 100, break_on_hyphens=False))
    print(f"{model.num_parameters:,} parameters, {model.num_recurrent_parameters:,} recurrent")
    print(textwrap.fill(describe_optimizers(optimizers), 100))
    print(
        f"backend: {model.backend_report()}; {device}, {torch.get_num_threads()} threads, "
        f"{processes.count} processes, {settings['lanes']} lanes"
    )
    print(f"tokenizer: {text.tokenizer.describe()}")
    for name, fact in text.facts.items():
        print(f"{name}: {data.describe(fact)}")
    rivals = text.rivals
    if first:
        print(f"valid, bits per byte: gzip -9 {rivals['gzip']:.4f}, xz {rivals['xz']:.4f}")
    made_by = {"device": device_name(device), "versions": versions(), "commit": commit()}
    print(", ".join(f"{key} {value}" for key, value in made_by.items()))

    # Resume
    at = Position()
    with processes.together():
        if first:
            write_settings(run_dir, settings)
    with processes.together():
        if path:
            try:
                at = unpack(path, model, optimizers, text.train, processes)
            except (KeyError, RuntimeError, ValueError, checkpoints.CorruptError) as error:
                raise UserError(f"{path} cannot be gone on from: {error}") from error
            print(f"resumed from {path}: step {at.step}, {at.seconds:.0f} s")
    forward = processes.wrap(torch.compile(model) if config.compile else model, device)
    metrics = Metrics(run_dir / "metrics.jsonl", at.step) if first else None
    wandb = Wandb(
        config.wandb if first else "disabled",
        run_dir,
        settings["wandb_id"],
        settings,
        project=config.wandb_project,
        name=config.wandb_name,
    )

    # Loop
    began = time.perf_counter() - at.seconds
    waited, failure = 0.0, None
    rng = {}  # before the step that is under way; None: the optimizer is changing the weights

    @contextlib.contextmanager
    def noting() -> Iterator[None]:
        """An error in the block ends the run once `agree` has told all processes of it."""
        nonlocal failure
        try:
            yield
        except NonFiniteError:  # all processes have this one
            raise
        except Exception as error:
            failure = failure or error

    def fetch() -> tuple[Tensor, ...] | None:
        """The next batch, with `following` the position before it; None where that has failed."""
        nonlocal waited, following
        start, batch = time.perf_counter(), None
        following = text.train.state(), text.train.epochs_read()
        with noting():
            batch = text.train.next()
        waited += time.perf_counter() - start
        return batch

    def clock() -> float:
        return time.perf_counter() - began if first else 0.0

    def agree(count: int) -> float:
        """Sum a count over all processes, and note with them what ends the run."""
        nonlocal stopping
        events = bool(stop.requested), failure is not None
        count, signals, failures, at.seconds = processes.sum(count, *events, clock())
        stopping = bool(signals or failures)
        return count

    def progress() -> float:
        """The share of the budget that is spent; 1 ends the run."""
        by_steps = at.step / config.steps if config.steps else 0.0
        by_time = at.seconds / (60 * config.minutes) if config.minutes else 0.0
        return min(1.0, max(by_steps, by_time))

    def schedule() -> float:
        """Set the learning rates of the next step: the factor returned, times each peak."""
        factor = learning_rate_factor(config, at.step, done)
        for group, peak in zip(groups, peaks):
            group["lr"] = peak * factor
        return factor

    def save() -> None:
        at.mean_losses(processes)
        (at.seconds,) = processes.sum(clock())
        parts = pack(at, model, optimizers, processes)
        writer.save(at.step, *parts, *([metrics.sync] if first else []))

    def report(rate: float, evaluating: bool) -> None:
        """A row of the steps since the last one."""
        nonlocal marked, marked_tokens, waited
        losses, norms = at.mean_losses(processes), list(map(float, at.norms))
        seconds, sample = time.perf_counter() - marked, ""
        row = {
            "step": at.step,
            "tokens": at.tokens,
            "train/loss_nats": sum(losses) / len(losses),
            "tok_s": round((at.tokens - marked_tokens) / seconds, 1),
            "data_wait": round(waited / seconds, 4),
            "grad_norm": sum(norms) / len(norms),
            "unitarity": unitarity(model),
            "lr": rate,
        }
        if evaluating:
            row |= evaluate(model, text.valid, config.segment_length, autocast, processes)
        at.losses, at.counts, at.norms = [], [], []
        if first:
            metrics.write(row)
            if evaluating and config.sample_tokens:
                sample = write_sample(model, text.tokenizer, config, at.step)
            wandb.log(row, sample, (lambda: draw(model)) if evaluating else None)
        say(describe(row))
        if sample:
            say(textwrap.indent(sample, "    | ", lambda line: True))
        bar.set_postfix_str(f"step {at.step}", refresh=False)
        marked, marked_tokens, waited = time.perf_counter(), at.tokens, 0.0

    parameters = [p for p in model.parameters() if p.requires_grad]
    stopping, following = False, None
    batch = fetch()
    at.data, at.epochs = following
    agree(0)
    done = progress()
    bar = tqdm(
        total=1.0,
        initial=done,
        disable=not (first and sys.stderr.isatty()),
        bar_format="{percentage:3.0f}%|{bar:24}| {elapsed}<{remaining}{postfix}",
    )
    say = print if bar.disable else bar.write
    writer = checkpoints.Writer(run_dir, config.keep, processes, say, at.step if path else None)
    factor = schedule()
    model.train()
    marked, marked_tokens, waited = time.perf_counter(), at.tokens, 0.0  # of the last row
    try:
        while done < 1.0 and not stopping:
            rng = rng_state(device)
            for optimizer in optimizers:
                optimizer.zero_grad()
            total, state = backward(model, forward, batch, at.state, config, autocast)
            here = int((batch[1] != -100).sum())
            capacity = batch[1].numel() * processes.count
            batch = fetch()  # while a GPU is still busy
            count = agree(here)
            if 0 < count < capacity:
                for parameter in parameters:
                    parameter.grad *= capacity / count
            norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip or math.inf, foreach=True)
            rng = None
            for optimizer in optimizers:
                optimizer.step()

            at.step += 1
            at.tokens += int(count)
            at.state = state
            at.data, at.epochs = following
            at.losses.append(total)
            at.counts.append(count)
            at.norms.append(norm)
            rng = {}
            rate, done = config.lr * factor, progress()
            factor = schedule()
            if done >= 1.0:
                failure = None  # of a batch that is not needed

            evaluating = done >= 1.0 or (config.eval_every > 0 and at.step % config.eval_every == 0)
            if evaluating or at.step % config.log_every == 0:
                with noting():
                    report(rate, evaluating)
                agree(0)
            if config.checkpoint_every and at.step % config.checkpoint_every == 0 and done < 1.0:
                pause = time.perf_counter()
                save()
                marked += time.perf_counter() - pause
            bar.update(done - bar.n)

        writer.wait()
        if writer.saved_step != at.step:
            save()
            writer.wait()
        code = 0 if writer.saved_step == at.step else 1
        failures = list(filter(None, processes.gather(failure and (str(failure) or repr(failure)))))
        if failures:
            raise failure or UserError(failures[0])
        again = f"{processes.launcher()} {shlex.join(sys.argv)}"
        if done < 1.0:
            reason = stop.requested or "a signal to another process"
            say(f"stopped by {reason} after step {at.step}; go on with: {again}")
            return code

        # Result
        result = metrics.rows[-1] if first and metrics.rows else {}
        known = result.get("step") == at.step and "val/bpb" in result
        if processes.sum(known) == [0.0]:  # the budget was lowered
            result = evaluate(model, text.valid, config.segment_length, autocast, processes)
        test = {}
        if text.test is not None:
            test = evaluate(model, text.test, config.segment_length, autocast, processes, "test")
        if not first:
            return code
        summary = {
            "val/bpb": result["val/bpb"],
            "val/loss_nats": result["val/loss_nats"],
            **test,
            "gzip_bpb": rivals["gzip"],
            "xz_bpb": rivals["xz"],
            "steps": at.step,
            "tokens": at.tokens,
            "epochs": at.epochs,
            "parameters": model.num_parameters,
            "recurrent_parameters": model.num_recurrent_parameters,
            "seconds": at.seconds,
            "checkpoint_bytes": writer.bytes,
            "checkpoint_s": writer.seconds,
            "checkpoint_blocked_s": writer.blocked,
            "processes": processes.count,
            "data": {**text.facts, "read": text.train.counts()},
            "backend": model.backend_report(),
            **made_by,
        }
        checkpoints.write_atomic(run_dir / "summary.json", json.dumps(summary, indent=1) + "\n")
        wandb.summarize(summary)
        bar.close()
        sampler = Path(sys.argv[0]).with_name("sample.py")
        print(
            f"done: val/bpb {summary['val/bpb']:.4f}, "
            + (f"test/bpb {test['test/bpb']:.4f}, " if test else "")
            + f"gzip -9 {rivals['gzip']:.4f}, "
            f"xz {rivals['xz']:.4f}\n"
            f"{model.num_parameters:,} parameters, {model.num_recurrent_parameters:,} recurrent; "
            f"{at.step:,} steps, {at.tokens:,} tokens, {at.epochs:.2f} epochs, "
            f"{at.seconds:.0f} s; everything in {run_dir}\n"
            f"sample: python {sampler} {shlex.quote(str(run_dir))} --prompt 'def '\n"
            f"train on: {again}  (with a larger --steps or --minutes)",
            flush=True,
        )
        return code
    except NonFiniteError as error:
        writer.wait()
        bar.close()
        where = f"stopped after step {at.step}; {last_good(writer)}"
        if first:
            hint = "a lower --recurrent-lr, --lr or --clip may help"
            print(f"error: {error}; {where}; {hint}", file=sys.stderr)
        return 3
    except Exception as error:
        if processes.have_gone(error):
            raise
        bar.close()
        if rng:
            set_rng_state(rng, device)
        alone = processes.count == 1 and rng is not None
        return end_with(error, at.step, writer, save if alone else None, first)
    finally:
        bar.close()
        wandb.finish()


def build_model(architecture: LanguageModelConfig, device: torch.device) -> LanguageModel:
    try:
        model = LanguageModel(architecture)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"model: {error}") from error
    return ready(model, device)


def end_with(
    error: Exception,
    step: int,
    writer: checkpoints.Writer,
    save: Callable[[], None] | None,
    speaks: bool = True,
) -> int:
    """Write a checkpoint of the last completed step after an error, and say what happened.

    Args:
        step: the last one that is complete.
        save: hands that step's checkpoint to the writer; None where it cannot be told: an optimizer
            that fails has changed some of the weights, and other processes are somewhere else.
        speaks: this process says the errors that all of them have.

    Returns:
        The exit code, for errors of the user's and of the system; others are raised again.
    """
    if isinstance(error, BrokenPipeError):
        drop_output()
    try:
        writer.wait()
        if save and step and writer.saved_step != step:
            save()
            writer.wait()
    except Exception as second:  # the first one is to be told
        print(f"warning: checkpoint of step {step} not written: {second}", file=sys.stderr)
    where = f"stopped after step {step}, {last_good(writer)}"
    if not isinstance(error, (UserError, OSError, MemoryError, torch.OutOfMemoryError)):
        print(where, file=sys.stderr)
        raise error
    if speaks or not isinstance(error, UserError):
        print(f"error: {str(error) or 'out of memory'}; {where}", file=sys.stderr)
    return 2 if isinstance(error, UserError) else 1


def last_good(writer: checkpoints.Writer) -> str:
    if writer.saved_step is None:
        return "no checkpoint was written before it"
    return f"the last good checkpoint is {checkpoints.folder(writer.run_dir, writer.saved_step)}"


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # names may be no UTF-8
    with one_line(training=True):
        config = parse(description=__doc__)
        processes = join(config.device)
    if processes.rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (the first process speaks for all)
    try:
        with one_line(training=True, silent=processes.rank > 0):
            code = prepare(config, processes)
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
