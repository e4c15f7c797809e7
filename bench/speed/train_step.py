"""Training steps of language models at matched parameters, over sequence lengths.

    python -m bench train_step                       # on the first GPU
    python -m bench train_step --device cpu --quick

A step is forward, cross-entropy, backward, clipping and AdamW, in bfloat16 autocast, on random
tokens; every length has the same tokens per step. A row holds tokens per second, peak memory and
the model FLOP utilisation: 6 FLOPs per token and parameter of a matrix (embedding once, as the
head), what the mixers' recurrences or attention take beyond that, over the measured speed of a
bfloat16 product. The transformer attends causally over the whole sequence (fused attention).
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as nnf

from bench import harness
from bench.harness import Candidate, Unavailable
from kru_triton.lm.model import LanguageModel, LanguageModelConfig, match_parameters

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


def forward(model, optimizer, tokens, device, state=None):
    """The loss of predicting each of `tokens (B, T + 1)` from those before it, and the state."""
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(device.type, torch.bfloat16):
        logits, state = model(tokens[:, :-1], state)
    return nnf.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()), state


def backward(model, optimizer, loss) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


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
            loss, _ = forward(model, optimizer, tokens, device)
            if not abs(loss.item() - math.log(config.vocab_size)) < 3:
                raise AssertionError(f"a fresh model's loss is {loss.item():.2f} nats")
            return (
                lambda: forward(model, optimizer, tokens, device)[0],
                lambda loss: backward(model, optimizer, loss),
            )

        return Candidate(kind, prepare, baseline=not kind.startswith("kru"))

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


def main(argv: list[str] | None = None) -> int:
    parser = harness.parser(__doc__, BENCH)
    parser.add_argument("--compile", action="store_true", help="every model through torch.compile")

    def cases(options, device):
        return {f"T{length}": length for length in ((8, 16) if options.quick else LENGTHS)}

    def run(results, length, options, device):
        batch = max(1, (32 if options.quick else TOKENS) // length)
        base, limit = TOY if options.quick else BASE, harness.ceilings(results, device)
        run_length(results, base, length, batch, device, limit, options.compile)

    return harness.cases_main(__doc__, BENCH, argv, cases, run, parser)
