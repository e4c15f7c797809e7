"""Training steps of language models at matched parameters, over sequence lengths.

    python -m bench train_step                       # on the first GPU
    python -m bench train_step --device cpu --quick
    python -m bench train_step --learn 2             # train for two minutes; the loss must fall

A step is forward, cross-entropy, backward, clipping and AdamW, in bfloat16 autocast, on random
tokens; every length has the same tokens per step. A row holds tokens per second, peak memory and
the model FLOP utilisation: 6 FLOPs per token and parameter of a matrix (embedding once, as the
head), what the mixers' recurrences or attention take beyond that, over the measured speed of a
bfloat16 product. The transformer attends causally over the whole sequence (fused attention).

`--learn` trains one model on the standard library's source with the loop below, which needs torch
alone: it shows on a new machine that the kernels train, not what they can reach.
"""

import functools
import math
import sysconfig
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as nnf

from bench import harness
from bench.harness import Candidate, Unavailable
from kru_triton.language_model import LanguageModel, LanguageModelConfig, match_parameters

BENCH = "train_step"
MODELS = ("kru", "kru recompute", "krulstm", "lstm", "transformer")
RECOMPUTE = 256  # steps of a chunk, which the backward computes again
LENGTHS = (256, 1024, 4096, 16384, 32768)
TOKENS = 65536  # per step
BASE = LanguageModelConfig(d_model=512, num_layers=6, hidden_size=2048, num_heads=8)
TOY = LanguageModelConfig(d_model=32, num_layers=1, hidden_size=64, num_heads=2)


def config_of(kind: str, base: LanguageModelConfig, length: int) -> LanguageModelConfig:
    """The `kind` of model with as many parameters as the KRU of `base`.

    Raises:
        Unavailable: the sequence is no longer than a chunk.
    """
    if kind == "kru":
        return base
    if kind == "kru recompute":
        chunk = 8 if base is TOY else RECOMPUTE
        if length <= chunk:
            raise Unavailable(f"{length} steps are one chunk of {chunk}")
        return replace(base, recompute=chunk)
    with torch.device("meta"):
        count = LanguageModel(base).num_parameters
    return match_parameters(replace(base, model=kind, context_length=length), count)


def flops_per_token(model: LanguageModel, length: int) -> float:
    """Of forward and backward: 6 per number in a matrix, and the mixers' own work."""
    config = model.config
    matrices = sum(
        p.numel() for name, p in model.named_parameters() if p.dim() == 2 and ".factor" not in name
    )
    if config.model in ("kru", "krulstm"):
        units = config.hidden_size // config.num_heads
        side = math.sqrt(units)  # balanced factors
        per_unit = {"kru": 8 if config.field == "complex" else 2, "krulstm": 8}[config.model]
        own = 3 * per_unit * config.hidden_size * 2 * side
    elif config.model == "transformer":
        own = 3 * 4 * config.d_model * (min(length, config.context_length) / 2)
    else:
        own = 0  # weight_hh is among the matrices
    return 6 * matrices + config.num_layers * own


def training_step(model, optimizer, tokens, dtype, device, state=None):
    """(forward, backward) of one step, for a race."""

    def forward():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits, _ = model(tokens[:, :-1], state)
        return nnf.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    def backward(loss):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return forward, backward


def run_length(results, base, length: int, batch: int, device, limit: dict, compiled: bool) -> None:
    case = f"B{batch}-T{length}" + ("-compiled" if compiled else "")
    results.title(f"{case}: {batch * length} tokens per step")
    models = {}

    def candidate(kind: str) -> Candidate:
        def prepare():
            config = config_of(kind, base, length)
            torch.manual_seed(0)
            models[kind] = LanguageModel(config).to(device)
            model = torch.compile(models[kind]) if compiled else models[kind]
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
            tokens = torch.randint(config.vocab_size, (batch, length + 1), device=device)
            forward, backward = training_step(model, optimizer, tokens, torch.bfloat16, device)
            loss = forward()
            if not abs(loss.item() - math.log(config.vocab_size)) < 3:
                raise AssertionError(f"a fresh model's loss is {loss.item():.2f} nats")
            return forward, backward

        return Candidate(kind, prepare, rival=not kind.startswith("kru"))

    def describe(candidate, direction, times):
        model = models[candidate.name]
        seconds = times["ms_p50"] / 1e3
        rate = batch * length / seconds
        factor = {"forward": 1 / 3, "backward": 2 / 3, "both": 1}[direction]
        flops = factor * flops_per_token(model, length) * rate
        values = {
            "B": batch,
            "T": length,
            "tokens_per_s": rate,
            "parameters": model.num_parameters,
            "recurrent_parameters": model.num_recurrent_parameters,
            "mfu": flops / limit["matmul_flops"],
            "flops_formula": "6 per matrix element and token, plus the mixer's recurrence",
            "d_model": model.config.d_model,
            "num_layers": model.config.num_layers,
            "compiled": compiled,
            "hidden_size": model.config.hidden_size,
        }
        return f"{rate / 1e3:9.1f} k tokens/s  MFU {100 * values['mfu']:5.2f} %", values

    harness.race(
        results,
        BENCH,
        case,
        [candidate(kind) for kind in MODELS],
        device,
        describe,
        rounds=2 if results.quick else None,
        flush=False,
    )


# Learning


@functools.cache
def corpus() -> torch.Tensor:
    """The bytes of the standard library's modules, in the order of their paths."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    texts = [path.read_bytes() for path in sorted(folder.glob("*.py"))]
    return torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8)


def learn(results, base, minutes: float, device, steps: int | None = None) -> None:
    """Train each kind of model on contiguous lanes of bytes with carried state."""
    batch, length = (4, 16) if results.quick else (64, 256)
    results.title(f"learn: {minutes:g} minutes each, {batch} lanes of {length} bytes, stdlib")
    data = corpus()
    lanes = data[: len(data) // batch * batch].view(batch, -1).long()
    for kind in ("kru", "krulstm", "lstm", "transformer"):
        name = f"learn {kind} {minutes:g} min"
        if results.is_done(BENCH, name) or results.out_of_time(name):
            continue
        config = config_of(kind, base, length)
        torch.manual_seed(0)
        model = LanguageModel(config).to(device)
        optimizer = torch.optim.AdamW(
            model.parameter_groups(lr=4e-3, recurrent_lr=2e-3, weight_decay=0.1),
            betas=(0.9, 0.99),
            fused=True,
        )
        losses, state, position = [], None, 0
        start = time.monotonic()
        while time.monotonic() - start < 60 * minutes and (steps is None or len(losses) < steps):
            if position + length + 1 > lanes.shape[1]:
                state, position = None, 0
            tokens = lanes[:, position : position + length + 1].to(device, non_blocking=True)
            position += length
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16):
                logits, state = model(tokens[:, :-1], state)
            state = [s.detach() for s in state]
            loss = nnf.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        seconds = time.monotonic() - start
        tail = max(1, len(losses) // 20)
        first, last = losses[0] / math.log(2), sum(losses[-tail:]) / tail / math.log(2)
        values = {
            "implementation": kind,
            "steps": len(losses),
            "tokens_per_s": len(losses) * batch * length / seconds,
            "train_bpb_first": first,
            "train_bpb_last": last,
            "parameters": model.num_parameters,
            "corpus_bytes": len(data),
            "backend": model.backend_report(),
        }
        if not last < 0.9 * first:
            reason = f"the loss did not fall: {first:.3f} -> {last:.3f} bits per byte"
            results.add_reason(BENCH, name, "failed", reason, **values)
            continue
        results.add(
            BENCH,
            name,
            f"{first:.3f} -> {last:.3f} bits per byte in {len(losses)} steps, "
            f"{values['tokens_per_s'] / 1e3:.1f} k tokens/s; {values['backend']}",
            **values,
        )


def main(argv: list[str] | None = None) -> int:
    parser = harness.parser(__doc__, prog="python -m bench train_step")
    parser.add_argument("--compile", action="store_true", help="every model through torch.compile")
    parser.add_argument("--learn", type=float, metavar="MINUTES", help="train instead, per model")
    options = parser.parse_args(argv)
    device = harness.device_for(options, parser)
    if options.learn is not None and options.learn <= 0:
        parser.error(f"--learn: must be positive, got {options.learn}")
    lengths = {f"T{t}": t for t in ((8, 16) if options.quick else LENGTHS)}
    names = harness.chosen(list(lengths), options.case, parser)
    if options.list:
        print(*names, sep="\n")
        return 0
    results = harness.Results(device, options, harness.command_line("train_step", argv))
    base = TOY if options.quick else BASE
    if options.learn:
        learn(results, base, options.learn, device, steps=60 if options.quick else None)
        return results.finish()
    limit = harness.ceilings(results, device)
    for name in names:
        length = lengths[name]
        batch = max(1, (32 if options.quick else TOKENS) // length)
        if not results.out_of_time(name):
            run_length(results, base, length, batch, device, limit, options.compile)
            harness.free_memory(device)
    return results.finish()


if __name__ == "__main__":
    raise SystemExit(main())
