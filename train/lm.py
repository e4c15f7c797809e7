"""Train a language model: predict the next byte of real text, state carried between segments.

    stream   BOS i m p o r t _ o s \\n ... BOS d e f ...   documents in a row, cut into lanes
    inputs   BOS i m p o r t _ o s    one segment of one lane
    targets  i m p o r t _ o s \\n    the same, one further
    state    of the segment before, cut to zero where `reset` marks a document start

    python train/lm.py
    python train/lm.py --data 'text:books/**/*.txt' --minutes 10 --run-dir runs/books
    python train/lm.py --model lstm --match-params 300000 --steps 2000 --run-dir runs/lstm

The same command again goes on from the last checkpoint. Exit codes: 0 done, or stopped by SIGTERM
or SIGINT with a checkpoint written; 1 that checkpoint, or the summary, could not be written; 2 bad
arguments or data; 3 non-finite loss.
"""

import ctypes
import dataclasses
import json
import math
import os
import shlex
import signal
import sys
import textwrap
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from kru_triton import KRU
from kru_triton.language_model import LanguageModel
from kru_triton.train import checkpoints, data
from kru_triton.train.config import Config, UserError, model_config, parse
from kru_triton.train.logger import Metrics, Wandb, new_run_id
from kru_triton.train.run_directory import commit, open_run, versions
from kru_triton.train.sample import generate, pick_device, pick_dtype

EVALUATION_LANES = 32


class NonFiniteError(Exception):
    """The loss or the gradient is not a number any more."""


class Stop:
    """`requested` after the first SIGTERM or SIGINT; the second one ends the process at once."""

    def __init__(self):
        self.requested = ""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle)

    def handle(self, number: int, _frame) -> None:
        self.requested = signal.Signals(number).name
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_DFL)


@dataclass
class Position:
    """Where a run is, besides model, optimizer, data and RNG."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0  # in the loop, all legs
    state: list[Tensor] = field(default_factory=list)  # carried from segment to segment
    losses: list[Tensor] = field(default_factory=list)  # of the steps since the last row
    norms: list[Tensor] = field(default_factory=list)  # gradient norms of the same steps

    def check_finite(self) -> None:
        """Raise for the first step since the last row whose loss or gradient is not finite."""
        first = self.step - len(self.losses) + 1
        for step, (loss, norm) in enumerate(zip(self.losses, self.norms), first):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise NonFiniteError(
                    f"non-finite loss at step {step} (loss {loss}, gradient norm {norm})"
                )


def keep_freed_memory() -> None:
    """Let glibc's malloc keep what a step frees, or the next one page-faults all of it in again.

    On a CPU that took a tenth of a training step and a third of an evaluation.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


# Checkpoint: everything into flat tensors and JSON, and back


def pack(position: Position, model, optimizer, lanes: data.Lanes) -> tuple[dict, dict]:
    """Tensors by file, and the JSON part, for `checkpoints.save`."""
    own = {f"state.{index}": tensor for index, tensor in enumerate(position.state)}
    own["losses"] = torch.tensor(list(map(float, position.losses)), dtype=torch.float64)
    own["norms"] = torch.tensor(list(map(float, position.norms)), dtype=torch.float64)
    own["rng.cpu"] = torch.get_rng_state()
    device = next(model.parameters()).device
    if device.type == "cuda":
        own["rng.cuda"] = torch.cuda.get_rng_state(device)
    moments = {
        f"{name}:{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    trainer = {
        "step": position.step,
        "tokens": position.tokens,
        "seconds": position.seconds,
        "data": lanes.state(),
        "model_config": dataclasses.asdict(model.config),
        "versions": versions(),
    }
    return {"model": model.state_dict(), "optimizer": moments, "rank-0": own}, trainer


def unpack(checkpoint: checkpoints.Checkpoint, model, optimizer, lanes: data.Lanes) -> Position:
    """Put a checkpoint back in place; the inverse of `pack`."""
    parameters = dict(model.named_parameters())
    device = next(model.parameters()).device
    model.load_state_dict(checkpoint.tensors["model"])
    for key, value in checkpoint.tensors["optimizer"].items():
        name, entry = key.rsplit(":", 1)
        optimizer.state[parameters[name]][entry] = value.to(device)
    lanes.load_state(checkpoint.trainer["data"])
    own = checkpoint.tensors["rank-0"]
    torch.set_rng_state(own["rng.cpu"])
    if device.type == "cuda" and "rng.cuda" in own:
        torch.cuda.set_rng_state(own["rng.cuda"], device)
    count = sum(name.startswith("state.") for name in own)
    return Position(
        **{key: checkpoint.trainer[key] for key in ("step", "tokens", "seconds")},
        state=[own[f"state.{index}"].to(device) for index in range(count)],
        losses=list(own["losses"]),
        norms=list(own["norms"]),
    )


# Pieces of the loop


def learning_rate_factor(config: Config, step: int, progress: float) -> float:
    """Linear warm-up in steps, times a cosine from 1 to the floor over the budget (0 to 1)."""
    warmup = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return warmup * (config.lr_floor + (1 - config.lr_floor) * cosine)


@torch.no_grad()
def evaluate(model: LanguageModel, stream: data.Stream, length: int, autocast) -> dict[str, float]:
    """Loss and bits per byte over the whole validation stream, in segments, state carried."""
    device = next(model.parameters()).device
    nats, count, state = torch.zeros((), dtype=torch.float64, device=device), 0, None
    model.eval()
    for batch in data.validation_segments(stream, EVALUATION_LANES, length):
        inputs, targets, reset, counted = (tensor.to(device) for tensor in batch)
        with autocast:
            logits, state = model(inputs, state, reset)
        losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        nats += (losses * counted.flatten()).sum(dtype=torch.float64)
        count += int(batch[3].sum())
    model.train()
    bits_per_byte = nats.item() / math.log(2) / stream.num_bytes
    if not math.isfinite(bits_per_byte):
        raise NonFiniteError("non-finite validation loss")
    return {"val/loss_nats": nats.item() / count, "val/bpb": bits_per_byte}


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
        generator=torch.Generator().manual_seed(config.seed + step),
    )
    text = prompt + tokenizer.decode(list(tokens))
    model.train()
    return text.decode("utf-8", "replace")


@torch.no_grad()
def unitarity(model: LanguageModel) -> float:
    return float(model.unitarity_penalty())


def spectrum_figure(model: LanguageModel):
    """Eigenvalues of the first Kronecker recurrent matrix; None where the model has none."""
    from kru_triton import diagnostics

    for module in model.modules():
        if isinstance(module, KRU):
            return diagnostics.spectrum_figure(module.recurrent_factors(0))
    return None


def describe(row: dict) -> str:
    """A row of metrics.jsonl for people."""
    text = (
        f"step {row['step']}  train {row['train/loss_nats']:.4f} nats  "
        f"grad {row['grad_norm']:.2f}  lr {row['lr']:.2e}  {row['tok_s'] / 1e3:.1f}k tok/s"
    )
    if "val/bpb" in row:
        text += f"  val {row['val/loss_nats']:.4f} nats, {row['val/bpb']:.4f} bits per byte"
    return text


def train(config: Config) -> int:
    """Run to the end of the budget, or to the first signal. Returns the exit code."""
    keep_freed_memory()
    stop = Stop()
    run_dir = Path(config.run_dir)
    device = pick_device(config.device)
    config = dataclasses.replace(config, dtype=pick_dtype(config.dtype, device))

    # Data
    text = data.build(config, run_dir)
    tokenizer, lanes, valid = text.tokenizer, text.train, text.valid
    facts, rivals = text.facts, text.rivals

    # Model
    architecture = model_config(config, tokenizer.vocab_size)
    torch.manual_seed(config.seed)
    try:
        model = LanguageModel(architecture).to(device)
        with torch.no_grad():  # one token, so that what cannot run says so now
            model.eval()(torch.zeros(1, 1, dtype=torch.int64, device=device))
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"model: {error}") from error
    groups = model.parameter_groups(config.lr, config.recurrent_lr, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.99), fused=True)
    peaks = [group["lr"] for group in optimizer.param_groups]
    forward = torch.compile(model) if config.compile else model
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")

    # What runs
    settings = {
        **dataclasses.asdict(config),
        "model_config": dataclasses.asdict(architecture),
        "train_sha256": facts["train"]["sha256"],
        "valid_sha256": facts["valid"]["sha256"],
        "tokenizer_sha256": tokenizer.sha256,
        "wandb_id": new_run_id(),
    }
    settings = json.loads(json.dumps(settings))  # tuples are lists in JSON
    listed = " ".join(f"{key}={settings[key]!r}" for key in vars(config))
    print(textwrap.fill(listed, 100, break_on_hyphens=False))
    print(textwrap.fill(f"model {settings['model_config']}", 100, break_on_hyphens=False))
    print(f"{model.num_parameters:,} parameters, {model.num_recurrent_parameters:,} recurrent")
    print(f"backend: {model.backend_report()}; {device}, {torch.get_num_threads()} threads")
    print(f"tokenizer: {tokenizer.describe()}")
    for name, fact in facts.items():
        print(f"{name}: {data.describe(fact)}")
    print(f"valid, bits per byte: gzip -9 {rivals['gzip']:.4f}, xz {rivals['xz']:.4f}")
    print(f"commit {commit()}, versions {versions()}")

    # Resume
    checkpoint = open_run(run_dir, config.resume, settings)
    at, saved_step = Position(), None
    if checkpoint:
        try:
            at = unpack(checkpoint, model, optimizer, lanes)
        except (KeyError, RuntimeError) as error:
            raise UserError(f"{checkpoint.path} is of another version: {error}") from error
        except ValueError as error:  # of lanes.load_state
            raise UserError(f"{checkpoint.path}: {error}") from error
        saved_step = at.step
        print(f"resumed from {checkpoint.path}: step {at.step}, {at.seconds:.0f} s")
    metrics = Metrics(run_dir / "metrics.jsonl", at.step)
    wandb = Wandb(config.wandb, run_dir, settings["wandb_id"], settings)

    def save() -> bool:
        """Write a checkpoint; False, with a warning, where the disk does not take it."""
        at.check_finite()
        at.seconds = time.perf_counter() - began
        try:
            metrics.sync()
            checkpoints.save(run_dir, at.step, *pack(at, model, optimizer, lanes), config.keep)
            return True
        except OSError as error:
            last = "there is none yet" if saved_step is None else f"step-{saved_step} stays"
            say(f"warning: checkpoint of step {at.step} not written: {error.strerror}; {last}")
            return False

    # Loop
    began = time.perf_counter() - at.seconds

    def progress() -> float:
        """The share of the budget that is spent; 1 ends the run."""
        at.seconds = time.perf_counter() - began
        by_steps = at.step / config.steps if config.steps else 0.0
        by_time = at.seconds / (60 * config.minutes) if config.minutes else 0.0
        return min(1.0, max(by_steps, by_time))

    def schedule() -> float:
        """Set the learning rates of the next step: the factor returned, times each peak."""
        factor = learning_rate_factor(config, at.step, done)
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * factor
        return factor

    parameters = list(model.parameters())
    done = progress()
    bar = tqdm(
        total=1.0,
        initial=done,
        disable=not sys.stderr.isatty(),
        bar_format="{percentage:3.0f}%|{bar:24}| {elapsed}<{remaining}{postfix}",
    )
    say = print if bar.disable else bar.write
    factor = schedule()
    model.train()
    marked, marked_tokens = time.perf_counter(), at.tokens  # of the last row, for the speed
    try:
        while done < 1.0 and not stop.requested:
            inputs, targets, reset = (tensor.to(device) for tensor in lanes.next())

            optimizer.zero_grad()
            with autocast:
                logits, state = forward(inputs, at.state or None, reset)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
            objective = loss
            if config.unitarity_weight:
                objective = loss + config.unitarity_weight * model.unitarity_penalty()
            objective.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip or math.inf, foreach=True)
            optimizer.step()

            at.step += 1
            at.tokens += inputs.numel()
            at.state = [tensor.detach() for tensor in state]
            at.losses.append(loss.detach())
            at.norms.append(norm)
            rate, done = config.lr * factor, progress()
            factor = schedule()

            evaluating = done >= 1.0 or (config.eval_every > 0 and at.step % config.eval_every == 0)
            if evaluating or at.step % config.log_every == 0:
                losses, norms = list(map(float, at.losses)), list(map(float, at.norms))
                at.check_finite()
                at.losses, at.norms, sample = [], [], ""
                row = {
                    "step": at.step,
                    "tokens": at.tokens,
                    "train/loss_nats": sum(losses) / len(losses),
                    "tok_s": round((at.tokens - marked_tokens) / (time.perf_counter() - marked), 1),
                    "grad_norm": sum(norms) / len(norms),
                    "unitarity": unitarity(model),
                    "lr": rate,
                }
                if evaluating:
                    row |= evaluate(model, valid, config.segment_length, autocast)
                    if config.sample_tokens:
                        sample = write_sample(model, tokenizer, config, at.step)
                metrics.write(row)
                wandb.log(row, sample, (lambda: spectrum_figure(model)) if evaluating else None)
                say(describe(row))
                if sample:
                    say(textwrap.indent(sample, "    | ", lambda line: True))
                bar.set_postfix_str(f"step {at.step}", refresh=False)
                marked, marked_tokens = time.perf_counter(), at.tokens
            if config.checkpoint_every and at.step % config.checkpoint_every == 0 and done < 1.0:
                pause = time.perf_counter()
                saved_step = at.step if save() else saved_step
                marked += time.perf_counter() - pause
            bar.update(done - bar.n)

        if saved_step != at.step:
            saved_step = at.step if save() else saved_step
        code = 0 if saved_step == at.step else 1
        again = shlex.join(["python", *sys.argv])
        if done < 1.0:
            say(f"stopped by {stop.requested} after step {at.step}; go on with: {again}")
            return code

        # Result
        result = metrics.rows[-1] if metrics.rows else {}
        if result.get("step") != at.step or "val/bpb" not in result:  # the budget was lowered
            result = evaluate(model, valid, config.segment_length, autocast)
        summary = {
            "val/bpb": result["val/bpb"],
            "val/loss_nats": result["val/loss_nats"],
            "gzip_bpb": rivals["gzip"],
            "xz_bpb": rivals["xz"],
            "steps": at.step,
            "tokens": at.tokens,
            "epochs": lanes.epochs_read(),
            "parameters": model.num_parameters,
            "recurrent_parameters": model.num_recurrent_parameters,
            "seconds": at.seconds,
            "data": facts,
            "backend": model.backend_report(),
            "versions": versions(),
            "commit": commit(),
        }
        checkpoints.write_atomic(run_dir / "summary.json", json.dumps(summary, indent=1) + "\n")
        wandb.summarize(summary)
        bar.close()
        sampler = Path(sys.argv[0]).with_name("sample.py")
        print(
            f"done: val/bpb {summary['val/bpb']:.4f}, gzip -9 {rivals['gzip']:.4f}, "
            f"xz {rivals['xz']:.4f}\n"
            f"{model.num_parameters:,} parameters, {model.num_recurrent_parameters:,} recurrent; "
            f"{at.step:,} steps, {at.tokens:,} tokens, {lanes.epochs_read():.2f} epochs, "
            f"{at.seconds:.0f} s; everything in {run_dir}\n"
            f"sample: python {sampler} {shlex.quote(str(run_dir))} --prompt 'def '\n"
            f"train on: {again}  (with a larger --steps or --minutes)",
            flush=True,
        )
        return code
    except NonFiniteError as error:
        last = "no checkpoint was written before it"
        if saved_step is not None:
            last = f"the last good checkpoint is {checkpoints.folder(run_dir, saved_step)}"
        bar.close()
        where = f"stopped after step {at.step}; {last}"
        print(f"error: {error}; {where}; a lower --lr or --clip may help", file=sys.stderr)
        return 3
    finally:
        bar.close()
        wandb.finish()
        lanes.close()


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)
    try:
        sys.exit(train(parse(description=__doc__)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a full disk, where it is not a checkpoint or a row that is refused
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
