"""Small Hugging Face models, tokens and masks for the tests of this folder."""

import pytest
import torch

from kru_triton.hf import KRUConfig, KRUForCausalLM
from kru_triton.lm.model import MODELS

VOCAB, BOS = 31, 30
FREE = {"eos_token_id": None, "pad_token_id": BOS}  # generation to the end of its length
every_model = pytest.mark.parametrize("kind", [*MODELS, "hybrid"])


def config_of(**kwargs):
    sizes = dict(vocab_size=VOCAB, d_model=16, hidden_size=12, num_heads=2, context_length=9)
    return KRUConfig(**{**sizes, "bos_token_id": BOS, **kwargs})


def make(kind="kru", **kwargs):
    """A model whose blocks outweigh the embedding: a fresh one with a tied head repeats a token.
    `hybrid`: a KRU whose second block is linear attention."""
    torch.manual_seed(0)
    if kind == "hybrid":
        kind, kwargs = "kru", {"linear_attention": [1], **kwargs}
    model = KRUForCausalLM(config_of(model=kind, **kwargs)).eval()
    with torch.no_grad():
        for block in model.model.network.blocks:
            block.mixer.projection.weight.mul_(50)
            block.mlp[2].weight.mul_(4)
    return model


def tokens_of(batch=2, time=7, seed=0):
    return torch.randint(VOCAB - 1, (batch, time), generator=torch.Generator().manual_seed(seed))


def padded(*lengths, side="left", seed=0):
    """Rows of random tokens padded with BOS, and their mask."""
    time = max(lengths)
    tokens, mask = torch.full((len(lengths), time), BOS), torch.zeros(len(lengths), time).long()
    for row, length in enumerate(lengths):
        where = slice(time - length, time) if side == "left" else slice(0, length)
        tokens[row, where] = tokens_of(1, length, seed + row)[0]
        mask[row, where] = 1
    return tokens, mask


def packed(*lengths, seed=0):
    """Documents of random tokens in one row, each alone, and their position ids."""
    documents = [tokens_of(1, length, seed + i) for i, length in enumerate(lengths)]
    ids = torch.cat([torch.arange(length) for length in lengths])[None]
    return torch.cat(documents, 1), documents, ids
