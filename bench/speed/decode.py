"""Generation, one token at a time: recurrent state against a transformer's cache.

    python -m bench decode                       # on the first GPU
    python -m bench decode --device cpu --quick

Language models at matched parameters (those of `train_step.py`). A recurrent model's token
costs the same at any length; the transformer's reads the keys and values of all earlier positions,
so it is timed with a cache of every length of a series. Its cache is preallocated and holds rotated
keys: a token writes one position and attends to those before it, without copies. Both are checked
against the model run over the whole sequence at once. Times are of one token for all rows of the
batch, the state taken as given, in bfloat16 autocast, eager and (GPU) as a CUDA graph: for the
Kronecker models the one of `model.decoding()`, with its copies of state and token.
"""

import contextlib

import torch
import torch.nn.functional as nnf

from bench import harness
from bench.harness import Candidate
from bench.speed import train_step
from kru_triton.lm.mixers import _rotate
from kru_triton.lm.model import LanguageModel

BENCH = "decode"
RECURRENT = ("kru", "krulstm", "lstm")
BATCHES = (1, 16, 128, 1024)
CACHES = (256, 2048, 16384, 131072)
TOLERANCE = 0.05  # of logits, relative, in bfloat16


class CachedTransformer:
    """One token of a `LanguageModel` of kind transformer from a cache of `length` positions."""

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


def build(kind: str, base, length: int, device) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(train_step.config_of(kind, base, length)).to(device).eval()


def autocast(device):
    return torch.autocast(device.type, torch.bfloat16)


def check(kind: str, base, device) -> None:
    """Eight tokens one by one give the logits of the eight at once."""
    model = build(kind, base, 8, device)
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


def candidates(kind: str, base, batch: int, length: int, device) -> list[Candidate]:
    values = {"length": length}

    def step(prepared=device.type == "cpu"):
        check(kind, base, device)
        model = build(kind, base, max(1, length), device)
        values["parameters"] = model.num_parameters
        tokens = torch.randint(model.config.vocab_size, (batch,), device=device)
        if kind == "transformer":
            cached = CachedTransformer(model, batch, length, torch.bfloat16)
            values["state_bytes"] = cached.bytes

            def one():
                with torch.no_grad(), autocast(device):
                    return cached.step(tokens, length)

            return one
        with torch.no_grad(), autocast(device):
            _, state = model(tokens[:, None])
        decoding = model.decoding() if prepared else contextlib.nullcontext()
        decoding.__enter__()
        values["state_bytes"] = sum(s.numel() * s.element_size() for s in state)

        def one(decoding=decoding):  # which ends with the last reference to it
            with torch.no_grad(), autocast(device):
                return model(tokens[:, None], state)[0]

        return one

    def graph():
        if not baseline:
            return step(prepared=True), None
        one = step()
        return harness.captured(lambda: (one(),)), None

    baseline = kind not in ("kru", "krulstm")
    name = f"{kind} L{length}" if kind == "transformer" else kind
    found = [Candidate(name, lambda: (step(), None), baseline, ("forward",), values)]
    if device.type == "cuda":
        found.append(Candidate(f"{name} graph", graph, baseline, ("forward",), values))
    return found


def run_batch(results, base, batch: int, device, caches) -> None:
    results.title(f"B={batch}: one token per row; transformers with L cached positions")
    found = [c for kind in RECURRENT for c in candidates(kind, base, batch, 0, device)]
    for length in caches:
        found += candidates("transformer", base, batch, length, device)

    def describe(candidate, direction, times):
        rate = batch / (times["ms_p50"] / 1e3)
        size = candidate.values["state_bytes"] / 2**20
        return f"{rate:12.0f} tokens/s  state {size:10.3f} MiB", {"B": batch, "tokens_per_s": rate}

    rounds = 2 if results.quick else None
    harness.race(results, BENCH, f"B{batch}", found, device, describe, rounds=rounds, flush=False)


def main(argv: list[str] | None = None) -> int:
    def cases(options, device):
        return {f"B{batch}": batch for batch in ((1, 2) if options.quick else BATCHES)}

    def run(results, batch, options, device):
        base = train_step.TOY if options.quick else train_step.BASE
        run_batch(results, base, batch, device, (4, 32) if options.quick else CACHES)

    return harness.cases_main(__doc__, BENCH, argv, cases, run)
