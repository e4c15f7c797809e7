"""Time per token on a CPU against the tokens read before it, from 10 to 100,000.

    python -m bench context
    python -m bench context --quick

Language models of preset `tiny` at matched parameters, one row, float32. A recurrent model reads
the context with its scan and goes on in `model.decoding()`, as `generate` does; the transformer
attends to a preallocated cache of all positions (`gpu/models.py`). Contexts take turns, 20 tokens
each; a row holds the 20th, 50th and 80th percentile of one token's time.
"""

import time
from collections import defaultdict

import torch

from bench import harness
from bench.gpu.models import CachedTransformer, config_of
from kru_triton.lm.model import LanguageModel
from kru_triton.lm.presets import PRESETS

BENCH = "context"
CONTEXTS = (10, 100, 1_000, 10_000, 100_000)
CHUNK = 8192  # tokens of the context that are read at once


def recurrent(kind: str, contexts):
    """A function that generates tokens behind one of the contexts: their times in ms."""
    torch.manual_seed(0)
    model = LanguageModel(config_of(kind, PRESETS["tiny"], 1)).eval()
    states, state, read = {}, None, 0
    for context in contexts:
        while read < context:
            count = min(CHUNK, context - read)
            _, state = model(torch.randint(257, (1, count)), state)
            read += count
        states[context] = state

    def generate(context, count):
        with model.decoding():
            state, token, times = states[context], torch.zeros(1, 1, dtype=torch.int64), []
            for _ in range(count):
                start = time.perf_counter()
                logits, state = model(token, state)
                token = logits[:, -1:].argmax(-1)
                times.append(1e3 * (time.perf_counter() - start))
        return times

    return generate


def transformer(contexts):
    """The same from a cache of so many positions."""
    torch.manual_seed(0)
    model = LanguageModel(config_of("transformer", PRESETS["tiny"], max(contexts))).eval()
    caches = {c: CachedTransformer(model, 1, c + 64, torch.float32) for c in contexts}

    def generate(context, count):
        token, times = torch.zeros(1, dtype=torch.int64), []
        for i in range(count):
            start = time.perf_counter()
            token = caches[context].step(token, context + i).argmax(-1)
            times.append(1e3 * (time.perf_counter() - start))
        return times

    return generate


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    parser = harness.parser(__doc__, "context")
    options = parser.parse_args(argv)
    options.again = True
    contexts = (10, 100) if options.quick else CONTEXTS
    rounds = 2 if options.quick else 5
    results = harness.Results(torch.device("cpu"), options, harness.command_line("context", argv))
    kinds = {"kru": recurrent("kru", contexts), "krulstm": recurrent("krulstm", contexts)}
    kinds["transformer"] = transformer(contexts)
    times = defaultdict(list)
    for turn in range(rounds + 1):
        for kind, generate in kinds.items():
            for context in contexts:
                found = generate(context, 20)
                if turn:  # the first warms up
                    times[kind, context] += found[1:]
    results.title("context: ms of one token, after so many")
    for (kind, context), found in times.items():
        ms = harness.quantiles(found)
        line = f"{ms['ms_p50']:8.3f} ms   (p20 {ms['ms_p20']:.3f}, p80 {ms['ms_p80']:.3f})"
        values = {"implementation": kind, "context": context, **ms}
        results.add(BENCH, f"context {kind} {context}", line, **values)
    return results.finish()
