"""Let a trained language model write on.

    prompt -> one scan over the prompt -> state -> token -> step -> token -> step -> ...

The state has a fixed size, so memory and time per token do not grow with the text. The mark that
ends a document is never drawn: exactly `--tokens` tokens come out, or fewer with `--stop`.

    python train/sample.py runs/lm --prompt "def "
    python train/sample.py runs/lm --prompt "def " --temperature 0.8 --top-p 0.95 --tokens 500
    python train/sample.py exported --prompt "import" --temperature 0
    python train/sample.py runs/lm --prompt "def " --top-k 40 --repetition-penalty 1.2 --stop "def "

Exit codes: 0; 2 bad arguments, or nothing there to sample from; 130 Ctrl-C.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of an import

import codecs
import math
import os
import sys
from dataclasses import dataclass

import torch
import tyro

from kru_triton.ops.arguments import Backend
from kru_triton.train.run.script import one_line
from kru_triton.train.run.settings import UserError, check_seed
from kru_triton.train.text.generate import encode_prompt, generate, until
from kru_triton.train.text.load import load_model


@dataclass
class SampleConfig:
    run_dir: tyro.conf.Positional[str]
    """The run directory of train/lm.py, a folder of train/export.py, or hub:org/name."""
    prompt: str = ""
    """Text to go on from. Empty: the start of a document."""
    temperature: float = 0.8
    """Below 1 sharper, above 1 flatter; 0: always the most likely token."""
    top_p: float = 0.95
    """Draw from the smallest set of tokens with this much probability."""
    top_k: int = 0
    """Draw from this many of the likeliest tokens. 0: all."""
    repetition_penalty: float = 1.0
    """Divide the positive logits of the tokens that are there already, prompt included, by this,
    and multiply the negative ones."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """End before the written text has this in it. May be given several times."""
    tokens: int = 500
    """How many tokens to write, at most."""
    seed: int = 0
    """Of the draws."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    backend: Backend = "auto"
    """Which implementation of the recurrence runs."""


def run(config: SampleConfig) -> None:
    if not 0 <= config.temperature < math.inf:
        raise UserError(
            f"--temperature must be at least 0, got {config.temperature}; 1 leaves the model's "
            "chances as they are"
        )
    if not 0 < config.top_p <= 1:
        raise UserError(f"--top-p must be in (0, 1], got {config.top_p}")
    if config.top_k < 0:
        raise UserError(f"--top-k must be at least 0, got {config.top_k}")
    penalty = config.repetition_penalty
    if not 0 < penalty < math.inf:
        raise UserError(f"--repetition-penalty must be positive and finite, got {penalty}")
    if "" in config.stop:
        raise UserError("--stop must be a text, got an empty one")
    if config.tokens < 1:
        raise UserError(f"--tokens must be at least 1, got {config.tokens}")
    check_seed(config.seed)
    model, tokenizer, folder = load_model(config.run_dir, config.device, config.backend)
    print(
        f"{folder}: {model.num_parameters:,} parameters, {model.backend_report()}",
        file=sys.stderr,
    )

    prompt, *stops = map(os.fsencode, (config.prompt, *config.stop))  # the bytes as they were typed
    encode_prompt(config.prompt, tokenizer)  # or a refusal would come after the prompt
    tokens = generate(
        model,
        tokenizer,
        prompt,
        config.tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        generator=torch.Generator().manual_seed(config.seed),
        top_k=config.top_k,
        repetition_penalty=config.repetition_penalty,
    )
    # a character may take several tokens
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    sys.stdout.reconfigure(encoding="utf-8")
    sys.stdout.write(decoder.decode(prompt))
    for piece in until(tokenizer.decode_each(tokens), stops):
        sys.stdout.write(decoder.decode(piece))
        sys.stdout.flush()
    sys.stdout.write(decoder.decode(b"", final=True) + "\n")
    sys.stdout.flush()


def main() -> None:
    description, _, examples = __doc__.partition("\n\n    python")
    with one_line():
        run(tyro.cli(SampleConfig, description=description + "\n\n    python" + examples))


if __name__ == "__main__":
    main()
