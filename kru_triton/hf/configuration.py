"""Sizes, choices and special tokens of a model, checked."""

import dataclasses
import difflib
from typing import get_type_hints

from huggingface_hub.dataclasses import type_validator
from transformers import PreTrainedConfig

from kru_triton.lm.model import LanguageModelConfig

SIZES = {field.name: field for field in dataclasses.fields(LanguageModelConfig)}
HINTS = get_type_hints(LanguageModelConfig)
OF_TRANSFORMERS = {field.name for field in dataclasses.fields(PreTrainedConfig)} | {
    *("model_type", "name_or_path", "_name_or_path", "_commit_hash", "torch_dtype", "num_labels"),
    *("attn_implementation", "experts_implementation", "output_attentions", "quantization_config"),
}


class KRUConfig(PreTrainedConfig):
    """Sizes and choices of a KRU language model, and the ids of its special tokens.

    Args:
        bos_token_id: the token that starts a document: the state is cut to zero where it is read.
            None: documents are not told apart.
        eos_token_id, pad_token_id: `bos_token_id` if None, as a model trained by `train/lm.py`
            ends a document by starting the next.
        tie_word_embeddings: the head's weight is the embedding's.
        use_cache: return the state, outside of training.
        kwargs: the fields of `LanguageModelConfig` (`hidden_size` is the number of recurrent units
            per layer; the width of the residual stream and of embeddings is `d_model`, which PEFT
            wants as the `token_dim` of tuned prompts) and those of `transformers.PreTrainedConfig`.

    Raises:
        ValueError: an unknown name, with the nearest known one, or an id outside the vocabulary. In
            a configuration that was saved they are kept.
        TypeError: a value of the wrong type.

    Example:
        >>> config = KRUConfig(d_model=16, hidden_size=16, factors=[4, 4], bos_token_id=256)
        >>> config.vocab_size, config.factors, config.eos_token_id
        (257, (4, 4), 256)
    """

    model_type = "kru"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012 (Trainer wants a list)
    attribute_map = {  # noqa: RUF012 (and a dict)
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
    }

    def __init__(
        self,
        *,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        tie_word_embeddings: bool = True,
        use_cache: bool = True,
        **kwargs,
    ):
        for name in kwargs:
            # what was saved has a model_type, and perhaps names that other tools have added
            if "model_type" not in kwargs and name not in SIZES and name not in OF_TRANSFORMERS:
                near = difflib.get_close_matches(name, [*SIZES, *OF_TRANSFORMERS], 1)
                raise ValueError(
                    f"{name}: KRUConfig has no such setting"
                    + (f"; did you mean {near[0]}?" if near else f"; it has {', '.join(SIZES)}")
                )
        for name, field in SIZES.items():
            setattr(self, name, _checked(name, kwargs.pop(name, field.default)))
        ids = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
        ids["pad_token_id"] = pad_token_id
        for name, value in ids.items():
            value = bos_token_id if value is None else value
            type_validator(name, value, int | None)
            if value is not None and not 0 <= value < self.vocab_size:
                raise ValueError(
                    f"{name}: must be in [0, vocab_size={self.vocab_size}), got {value}"
                )
            setattr(self, name, value)
        type_validator("tie_word_embeddings", tie_word_embeddings, bool)
        type_validator("use_cache", use_cache, bool)
        self.tie_word_embeddings, self.use_cache = tie_word_embeddings, use_cache
        super().__init__(**kwargs)

    @property
    def layer_types(self) -> list[str]:
        """What tells tools that a state goes along a sequence, which they must not cut up then."""
        return ["linear_attention"] * self.num_layers

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As `PreTrainedConfig.from_dict`; refuses the configuration of another architecture."""
        found = config_dict.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise ValueError(
                f"model_type: this is the configuration of a {found!r} model, not of a "
                f"{cls.model_type!r} one; load it with transformers.AutoModelForCausalLM"
            )
        return super().from_dict({**config_dict, "model_type": found}, **kwargs)

    def language_model_config(self) -> LanguageModelConfig:
        """The configuration of the `LanguageModel` inside, types checked."""
        return LanguageModelConfig(**{name: _checked(name, getattr(self, name)) for name in SIZES})


def _checked(name: str, value):
    """`value` as the type that `LanguageModelConfig` declares for `name`, or TypeError."""
    if HINTS[name] is float and type(value) is int:
        value = float(value)
    if isinstance(value, list):  # a tuple that has been through JSON
        value = tuple(value)
    type_validator(name, value, HINTS[name])
    return value
