"""Let a trained language model write on.

    prompt -> one scan over the prompt -> state -> token -> step -> token -> step -> ...

The state has a fixed size, so memory and time per token do not grow with the text. The mark that
ends a document is never drawn: exactly `--tokens` tokens come out.

    python train/sample.py runs/lm --prompt "def "
    python train/sample.py runs/lm --prompt "def " --temperature 0.8 --top-p 0.95 --tokens 500
    python train/sample.py exported --prompt "import" --temperature 0
"""

import codecs
import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from kru_triton.language_model import LanguageModel, LanguageModelConfig
from kru_triton.train import checkpoints
from kru_triton.train.config import UserError
from kru_triton.train.data import run_tokenizer
from kru_triton.train.tokenizer import ByteTokenizer, FileTokenizer, read_tokenizer

BOS = "<|endoftext|>"  # the name of BOS in exported byte tokenizers


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
    tokens: int = 500
    """How many tokens to write."""
    seed: int = 0
    """Of the draws."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    backend: Literal["auto", "triton", "torch"] = "auto"
    """Which implementation of the recurrence runs."""


@torch.no_grad()
def generate(
    model: LanguageModel,
    tokenizer: ByteTokenizer | FileTokenizer,
    prompt: bytes,
    count: int,
    *,
    temperature: float,
    top_p: float,
    generator: torch.Generator,
) -> Iterator[int]:
    """Yield `count` tokens that follow a document's beginning, `prompt`.

    Args:
        model: in evaluation mode.
        prompt: UTF-8 bytes; empty for the start of a document.
        temperature: 0 takes the most likely token each time.
        top_p: draw from the smallest set of tokens with this much probability.
        generator: on the CPU, whatever the model's device is.
    """
    device = next(model.parameters()).device
    tokens = torch.tensor([[tokenizer.bos, *tokenizer.encode(prompt).tolist()]], device=device)
    reset = torch.zeros_like(tokens, dtype=torch.bool)
    reset[0, 0] = True
    with model.decoding():
        logits, state = model(tokens, None, reset)
        for index in range(count):
            logits = logits[0, -1].float().cpu()
            logits[tokenizer.bos] = -math.inf
            token = draw(logits, temperature, top_p, generator)
            yield token
            if index < count - 1:
                logits, state = model(torch.tensor([[token]], device=device), state)


def draw(logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """A token id from logits (V,): the likeliest at temperature 0, else by nucleus sampling."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities, order = torch.softmax((logits - logits.max()) / temperature, -1).sort(
        descending=True, stable=True
    )
    before = probabilities.cumsum(-1) - probabilities  # probability of all that is likelier
    probabilities[before >= top_p] = 0.0
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


def load_model(
    where: str, device: str, backend: str
) -> tuple[LanguageModel, ByteTokenizer | FileTokenizer, Path]:
    """A model in evaluation mode, its tokenizer, and the folder both were read from.

    Args:
        where: a run directory (the newest good checkpoint is taken), a folder that train/export.py
            wrote, or `hub:org/name`.
    """
    found = load_exported if is_exported(where) else load_run
    model, tokenizer, folder = found(where, backend)
    if tokenizer.vocab_size != model.config.vocab_size:
        raise UserError(
            f"the tokenizer of {where} has {tokenizer.vocab_size} tokens, the model of {folder} "
            f"{model.config.vocab_size}: tokenizer.json is another model's"
        )
    return model.to(pick_device(device)).eval(), tokenizer, folder


def load_run(where: str, backend: str) -> tuple[LanguageModel, ByteTokenizer | FileTokenizer, Path]:
    checkpoint, corrupt = checkpoints.load_latest(Path(where))
    for path, reason in corrupt:
        print(f"warning: {path} is corrupt: {reason}", file=sys.stderr)
    if checkpoint is None:
        raise UserError(
            f"no {'good ' if corrupt else ''}checkpoint under {Path(where, 'checkpoints')}"
        )
    settings = {**checkpoint.trainer["model_config"], "backend": backend}
    settings["factors"] = tuple(settings["factors"]) if settings["factors"] else None
    model = LanguageModel(LanguageModelConfig(**settings))
    model.load_state_dict(checkpoint.tensors["model"])
    return model, run_tokenizer(Path(where)), checkpoint.path


def is_exported(where: str) -> bool:
    """Whether `where` names a Hugging Face folder and not a run."""
    config = Path(where, "config.json")
    return where.startswith("hub:") or (
        not Path(where, "checkpoints").exists()
        and config.exists()
        and "model_type" in json.loads(config.read_text(encoding="utf-8"))
    )


def load_exported(
    where: str, backend: str
) -> tuple[LanguageModel, ByteTokenizer | FileTokenizer, Path]:
    try:
        from transformers.utils.logging import disable_progress_bar

        from kru_triton.hf import KRUForCausalLM
    except ImportError as error:
        raise UserError(
            f"{where} is a Hugging Face folder: pip install 'kru-triton[hf]'"
        ) from error
    name = where.removeprefix("hub:")
    disable_progress_bar()
    try:
        model = KRUForCausalLM.from_pretrained(name, backend=backend, dtype=torch.float32)
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"{where}: {error}") from error
    if not model.config.tie_word_embeddings:
        raise UserError(f"{where}: has a head of its own (tie_word_embeddings=False); use generate")
    tokenizer = read_tokenizer(name)
    if tokenizer.bytes_of == [*(bytes([b]) for b in range(256)), BOS.encode()]:
        tokenizer = ByteTokenizer()
    return model.model.network, tokenizer, Path(name)


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def pick_dtype(name: str, device: torch.device) -> str:
    """`auto` is bfloat16 where the device multiplies it in hardware."""
    if name != "auto":
        return name
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and torch.cpu._is_amx_tile_supported()
    return "bfloat16" if fast else "float32"


def run(config: SampleConfig) -> None:
    if not config.temperature >= 0:
        raise UserError(f"--temperature must be at least 0, got {config.temperature}")
    if not 0 < config.top_p <= 1:
        raise UserError(f"--top-p must be in (0, 1], got {config.top_p}")
    if config.tokens < 1:
        raise UserError(f"--tokens must be at least 1, got {config.tokens}")
    model, tokenizer, folder = load_model(config.run_dir, config.device, config.backend)
    print(
        f"{folder}: {model.num_parameters:,} parameters, {model.backend_report()}",
        file=sys.stderr,
    )

    prompt = os.fsencode(config.prompt)  # the bytes as they were typed
    tokens = generate(
        model,
        tokenizer,
        prompt,
        config.tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        generator=torch.Generator().manual_seed(config.seed),
    )
    # a character may take several tokens
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    sys.stdout.reconfigure(encoding="utf-8")
    sys.stdout.write(decoder.decode(prompt))
    for piece in tokenizer.decode_each(tokens):
        sys.stdout.write(decoder.decode(piece))
        sys.stdout.flush()
    sys.stdout.write(decoder.decode(b"", final=True) + "\n")
    sys.stdout.flush()


def main() -> None:
    description, _, examples = __doc__.partition("\n\n    python")
    config = tyro.cli(SampleConfig, description=description + "\n\n    python" + examples)
    try:
        run(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
