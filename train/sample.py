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
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from safetensors import SafetensorError

from kru_triton.lm.model import LanguageModel, LanguageModelConfig
from kru_triton.train.run import checkpoints
from kru_triton.train.run.script import one_line
from kru_triton.train.run.settings import UserError, check_seed
from kru_triton.train.text.data import run_tokenizer
from kru_triton.train.text.tokenizer import ByteTokenizer, FileTokenizer, read_tokenizer

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
    top_k: int = 0,
    repetition_penalty: float = 1.0,
) -> Iterator[int]:
    """Yield `count` tokens that follow a document's beginning, `prompt`.

    Args:
        model: in evaluation mode.
        prompt: UTF-8 bytes; empty for the start of a document.
        temperature: 0 takes the most likely token each time.
        top_p: draw from the smallest set of tokens with this much probability.
        generator: on the CPU, whatever the model's device is.
        top_k: draw from this many of the likeliest tokens; 0: all.
        repetition_penalty: as in `penalize`, for all tokens that are there already.

    Raises:
        UserError: the tokenizer cannot encode the prompt, or the logits are no numbers any more.
    """
    device = next(model.parameters()).device
    tokens = torch.tensor([[tokenizer.bos, *tokenizer.encode(prompt).tolist()]], device=device)
    reset = torch.zeros_like(tokens, dtype=torch.bool)
    reset[0, 0] = True
    seen = torch.zeros(tokenizer.vocab_size, dtype=torch.bool)
    seen[tokens[0].cpu()] = True
    with model.decoding():
        logits, state = model(tokens, None, reset)
        for index in range(count):
            logits = penalize(logits[0, -1].float().cpu(), seen, repetition_penalty)
            if not logits.isfinite().all():
                raise UserError(f"the model's logits are not finite after {index} tokens")
            logits[tokenizer.bos] = -math.inf
            token = draw(logits, temperature, top_p, generator, top_k)
            yield token
            seen[token] = True
            if index < count - 1:
                logits, state = model(torch.tensor([[token]], device=device), state)


def encode_prompt(prompt: str, tokenizer: ByteTokenizer | FileTokenizer) -> np.ndarray:
    """Token ids of a prompt; UserError where the tokenizer lacks a character of it."""
    try:
        return tokenizer.encode(os.fsencode(prompt))
    except UserError as error:
        raise UserError(f"--prompt {prompt!r}: {error}") from error


def penalize(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Logits (V,), those of the tokens in `seen` (V,) lower by a factor (Keskar et al. 2019)."""
    lower = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(seen, lower, logits)


def draw(
    logits: torch.Tensor,
    temperature: float,
    top_p: float,
    generator: torch.Generator,
    top_k: int = 0,
) -> int:
    """A token id from logits (V,): the likeliest at temperature 0, else one by `probabilities`."""
    if temperature == 0:
        return int(logits.argmax())
    chances = probabilities(logits, temperature, top_p, top_k)
    chances, order = chances.sort(descending=True, stable=True)
    return int(order[torch.multinomial(chances, 1, generator=generator)])


def probabilities(
    logits: torch.Tensor, temperature: float, top_p: float, top_k: int = 0
) -> torch.Tensor:
    """Of each token (V,), zero outside of the `top_k` likeliest and, of these, of the nucleus.

    Tokens that are as likely as the last of the `top_k` belong to them.
    """
    scaled = ((logits - logits.max()).double() / temperature).float()
    if 0 < top_k < len(scaled):
        scaled[scaled < scaled.topk(top_k).values[-1]] = -math.inf
    chances = torch.softmax(scaled, -1)
    if top_p < 1:
        ordered, order = chances.sort(descending=True, stable=True)
        before = ordered.cumsum(-1, dtype=torch.float64) - ordered  # of all that is likelier
        chances[order[before >= top_p]] = 0.0
    return chances


def until(pieces: Iterable[bytes], stops: Sequence[bytes]) -> Iterator[bytes]:
    """The bytes of `pieces` before the first of `stops` that is complete in them.

    However they are cut into pieces: what may be the beginning of a stop is held back.
    """
    held = b""
    for piece in pieces:
        held += piece
        ends = [(held.index(stop) + len(stop), held.index(stop)) for stop in stops if stop in held]
        if ends:
            yield held[: min(ends)[1]]
            return
        begun = [n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])]
        safe = len(held) - max(begun, default=0)
        yield held[:safe]
        held = held[safe:]
    yield held


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
    return ready(model, pick_device(device)), tokenizer, folder


def ready(model: LanguageModel, device: torch.device) -> LanguageModel:
    """The model on the device and in evaluation mode; UserError where it cannot run there."""
    try:
        model = model.to(device).eval()
        with torch.no_grad():  # one token, so that what cannot run says so now
            model(torch.zeros(1, 1, dtype=torch.int64, device=device))
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"model: {error}") from error
    return model


def load_run(where: str, backend: str) -> tuple[LanguageModel, ByteTokenizer | FileTokenizer, Path]:
    checkpoint, corrupt = checkpoints.load_latest(Path(where))
    for path, reason in corrupt:
        print(f"warning: {path} is corrupt: {reason}", file=sys.stderr)
    if checkpoint is None:
        raise UserError(
            f"no {'good ' if corrupt else ''}checkpoint under {Path(where, 'checkpoints')}; give "
            "the --run-dir of a run of train/lm.py, or a folder of train/export.py"
        )
    try:
        settings = {**checkpoint.trainer["model_config"], "backend": backend}
        settings["factors"] = tuple(settings["factors"]) if settings["factors"] else None
        model = LanguageModel(LanguageModelConfig(**settings))
        model.load_state_dict(checkpoint.tensors["model"])
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{checkpoint.path} holds no language model of this version ({reason})"
        ) from error
    return model, run_tokenizer(Path(where)), checkpoint.path


def is_exported(where: str) -> bool:
    """Whether `where` names a Hugging Face folder and not a run."""
    config = Path(where, "config.json")
    if where.startswith("hub:"):
        return True
    if Path(where, "checkpoints").exists() or not config.exists():
        return False
    try:
        return "model_type" in dict(json.loads(config.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{config} is no configuration of a model ({error})") from error


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
    except (ValueError, TypeError, OSError, SafetensorError) as error:
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
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
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
