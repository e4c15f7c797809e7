"""e: tokens a second of language models of equal size, in training and in decoding.

A training step is forward, cross-entropy, backward, clipping and AdamW in bfloat16 autocast on
random tokens, as many for every length; `mfu` is 6 FLOPs per token and parameter of a matrix
(embedding once, as the head) and the mixers' own, over the measured speed of a bfloat16 product.
The baselines' sizes are rounded to what tensor cores like. Decoding is one token for all rows of a
batch, replayed as a CUDA graph, checked against the whole sequence at once; that of the Kronecker
models copies state and token, the transformer reads a preallocated cache.
"""

import contextlib
import functools
import math
import time
from dataclasses import replace

import torch
import torch.nn.functional as nnf

from bench import harness
from bench.harness import Candidate
from kru_triton.lm.mixers import _rotate
from kru_triton.lm.model import LanguageModel, LanguageModelConfig, match_parameters

BENCH = "models"
KINDS = ("kru", "krulstm", "lstm", "gru", "transformer")
SIZES = {
    "10M": LanguageModelConfig(d_model=320, num_layers=4, hidden_size=1024, num_heads=4),
    "100M": LanguageModelConfig(d_model=768, num_layers=8, hidden_size=2048, num_heads=8),
}
TOY = LanguageModelConfig(d_model=32, num_layers=1, hidden_size=64, num_heads=2)
LENGTHS = (1024, 8192)
TOKENS = 65536  # per step
CACHE = 1024  # positions before the token that is decoded
BATCHES = (1, 64, 1024)
TOLERANCE = 0.05  # of logits, relative, in bfloat16


@functools.cache
def config_of(kind: str, base: LanguageModelConfig, length: int) -> LanguageModelConfig:
    """The `kind` of model with about as many parameters as the KRU of `base`."""
    if kind == "kru":
        return base
    with torch.device("meta"):
        count = LanguageModel(base).num_parameters
    if kind == "transformer":
        base = replace(base, linear_attention=())
    found = match_parameters(replace(base, model=kind, context_length=length), count)
    if base.d_model < 256:
        return found

    def whole(size, unit):
        return unit * max(1, round(size / unit))

    if kind == "transformer":  # heads of 64
        width = whole(found.d_model, 64)
        return replace(found, d_model=width, num_heads=width // 64)
    hidden = found.hidden_size if kind == "krulstm" else whole(found.hidden_size, 64)
    return replace(found, d_model=whole(found.d_model, 16), hidden_size=hidden)


def flops_per_token(model: LanguageModel, length: int) -> float:
    """Of forward and backward: 6 per number in a matrix, and the mixers' own work."""
    config = model.config
    matrices = sum(
        p.numel() for name, p in model.named_parameters() if p.dim() == 2 and ".factor" not in name
    )
    own = 0.0  # of torch.nn's the recurrent weights are among the matrices
    if config.model in ("kru", "krulstm"):
        side = math.sqrt(config.hidden_size // config.num_heads)  # balanced factors
        own = 3 * 8 * config.hidden_size * 2 * side
    elif config.model == "transformer":
        own = 3 * 4 * config.d_model * (min(length, config.context_length) / 2)
    return 6 * matrices + config.num_layers * own


def build(kind: str, base, length: int, device) -> LanguageModel:
    torch.manual_seed(0)
    with torch.device(device):
        return LanguageModel(config_of(kind, base, length))


def autocast(device):
    return torch.autocast(device.type, torch.bfloat16)


def forward(model, optimizer, tokens, state=None):
    """The loss of predicting each of `tokens (B, T + 1)` from those before it, and the state."""
    optimizer.zero_grad(set_to_none=True)
    with autocast(tokens.device):
        logits, state = model(tokens[:, :-1], state)
    return nnf.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()), state


def backward(model, optimizer, loss) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def training(results, size: str, base, length: int, device, kinds=KINDS, compiled=False) -> None:
    """A race of training steps."""
    batch = max(1, (32 if results.quick else TOKENS) // length)
    case = f"{size} B{batch}-T{length}" + " compiled" * compiled
    results.title(f"training {case}: {batch * length} tokens a step")
    limit, models = harness.ceilings(results, device), {}

    def candidate(kind: str) -> Candidate:
        def prepare():
            models[kind] = own = build(kind, base, length, device)
            model = torch.compile(own) if compiled else own
            optimizer = torch.optim.AdamW(own.parameters(), lr=1e-4, fused=True)
            tokens = torch.randint(own.config.vocab_size, (batch, length + 1), device=device)
            began = time.monotonic()
            loss, _ = forward(model, optimizer, tokens)
            if not abs(loss.item() - math.log(own.config.vocab_size)) < 3:
                raise AssertionError(f"a fresh model's loss is {loss.item():.2f} nats")
            if compiled:
                backward(model, optimizer, loss)
                harness.synchronize(device)
                seconds = time.monotonic() - began
                name = f"{case} {kind}, until its first step is done"
                results.add(BENCH, name, f"{seconds:.1f} s", compile_seconds=seconds)
            return (
                lambda: forward(model, optimizer, tokens)[0],
                lambda loss: backward(model, optimizer, loss),
            )

        return Candidate(kind, prepare, not kind.startswith("kru"), ("both",))

    def describe(candidate, direction, times):
        model = models[candidate.name]
        rate = batch * length / (times["ms_p50"] / 1e3)
        share = flops_per_token(model, length) * rate / limit["matmul_flops"]
        values = {"B": batch, "T": length, "size": size, "compiled": compiled}
        values |= {"tokens_per_s": rate, "mfu": share, "parameters": model.num_parameters}
        shape = ("d_model", "num_layers", "hidden_size", "num_heads")
        values |= {key: getattr(model.config, key) for key in shape}
        values["recurrent_parameters"] = model.num_recurrent_parameters
        return f"{rate / 1e3:9.1f} k tokens/s  {100 * share:5.2f} % of peak", values

    found = [candidate(kind) for kind in kinds]
    rounds = 1 if results.quick else 4
    harness.race(results, BENCH, case, found, device, describe, rounds, flush=False)


class CachedTransformer:
    """One token of a `LanguageModel` of kind transformer from a cache of `length` positions, which
    holds rotated keys: a token writes one position and attends to those before it."""

    def __init__(self, model: LanguageModel, batch: int, length: int, dtype: torch.dtype):
        self.model = model
        config = model.config
        device = model.embedding.weight.device
        head = config.d_model // config.num_heads
        shape = (batch, config.num_heads, length + 1, head)
        self.cache = [
            tuple(torch.zeros(shape, device=device, dtype=dtype) for _ in "kv")
            for _ in model.blocks
        ]

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for pair in self.cache for t in pair)

    def step(self, tokens: torch.Tensor, position: int) -> torch.Tensor:
        """Logits (B, V) after tokens (B,) at `position`, which is written to the cache."""
        model = self.model
        d, heads = model.config.d_model, model.config.num_heads
        x = model.embedding(tokens) * d**0.5
        at = torch.full((1,), position, device=x.device)
        for block, (keys, values) in zip(model.blocks, self.cache):
            mixer = block.mixer
            q, k, v = mixer.qkv(block.mixer_norm(x)).view(-1, 3, heads, 1, d // heads).unbind(1)
            q, k = _rotate(q, at), _rotate(k, at)
            keys[:, :, position] = k[:, :, 0]
            values[:, :, position] = v[:, :, 0]
            y = nnf.scaled_dot_product_attention(
                q.to(keys.dtype), keys[:, :, : position + 1], values[:, :, : position + 1]
            )
            x = x + mixer.projection(y.reshape(-1, d))
            x = x + block.mlp(block.mlp_norm(x))
        return nnf.linear(model.norm(x), model.embedding.weight)


@functools.cache
def check_decoding(kind: str, base, device) -> None:
    """Eight tokens one by one give the logits of the eight at once."""
    model = build(kind, base, 8, device).eval()
    tokens = torch.randint(model.config.vocab_size, (2, 8), device=device)
    with torch.no_grad(), autocast(device):
        expected = model(tokens)[0].float()
        if kind == "transformer":
            cached = CachedTransformer(model, 2, 8, torch.bfloat16)
            logits = [cached.step(tokens[:, t], t) for t in range(8)]
        else:
            state, logits = None, []
            for t in range(8):
                one, state = model(tokens[:, t : t + 1], state)
                logits.append(one[:, 0])
    error = ((torch.stack(logits, 1).float() - expected).norm() / expected.norm()).item()
    if not error <= TOLERANCE:
        raise AssertionError(f"{kind}: stepwise logits differ by {error:.3f}")


def decoder(kind: str, base, batch: int, length: int, device) -> tuple:
    """A function that decodes one token, and the bytes of its state."""
    check_decoding(kind, base, device)
    model = build(kind, base, max(1, length), device).eval()
    tokens = torch.randint(model.config.vocab_size, (batch,), device=device)
    if kind == "transformer":
        cached = CachedTransformer(model, batch, length, torch.bfloat16)

        def cached_step():
            with torch.no_grad(), autocast(device):
                return cached.step(tokens, length)

        return cached_step, cached.bytes
    with torch.no_grad(), autocast(device):
        _, state = model(tokens[:, None])
    decoding = model.decoding() if kind.startswith("kru") else contextlib.nullcontext()
    decoding.__enter__()

    def step(decoding=decoding):  # which ends with the last reference to it
        with torch.no_grad(), autocast(device):
            return model(tokens[:, None], state)[0]

    return step, sum(s.numel() * s.element_size() for s in state)


def decoding(results, size: str, base, batch: int, device) -> None:
    """A race of decoded tokens."""
    results.title(f"decoding {size}, {batch} rows")
    length = 4 if results.quick else CACHE

    def candidate(kind: str) -> Candidate:
        values = {"length": length if kind == "transformer" else 0}

        def prepare():
            step, values["state_bytes"] = decoder(kind, base, batch, values["length"], device)
            graphed = kind.startswith("kru") or device.type == "cpu"  # decoding() replays its own
            return step if graphed else harness.captured(lambda: (step(),)), None

        return Candidate(kind, prepare, not kind.startswith("kru"), ("token",), values)

    def describe(candidate, direction, times):
        rate = batch / (times["ms_p50"] / 1e3)
        held = candidate.values["state_bytes"] / 2**20
        values = {"B": batch, "size": size, "tokens_per_s": rate}
        return f"{rate:12.0f} tokens/s  state {held:10.3f} MiB", values

    found = [candidate(kind) for kind in KINDS]
    case = f"decode {size} B{batch}"
    rounds = 1 if results.quick else 20
    harness.race(results, BENCH, case, found, device, describe, rounds, flush=False)


def run(results: harness.Results, device: torch.device) -> None:
    sizes = {"toy": TOY} if results.quick else SIZES
    first, *longer = (8,) if results.quick else LENGTHS
    for size, base in sizes.items():
        training(results, size, base, first, device)
        harness.free_memory(device)
    for batch in (2,) if results.quick else BATCHES:
        for size, base in sizes.items():
            decoding(results, size, base, batch, device)
            harness.free_memory(device)
    for length in longer:
        for size, base in sizes.items():
            training(results, size, base, length, device)
            harness.free_memory(device)
    if not results.quick:
        for kind in ("kru", "transformer"):
            training(results, "10M", SIZES["10M"], first, device, (kind,), compiled=True)
