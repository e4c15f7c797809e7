"""Tokens from a language model, one after another, and the bytes they stand for."""

import math
import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from kru_triton.lm.model import LanguageModel
from kru_triton.train.run.settings import UserError
from kru_triton.train.text.tokenizer import ByteTokenizer, FileTokenizer


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
