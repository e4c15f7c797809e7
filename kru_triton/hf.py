"""The language model as a Hugging Face citizen; needs the extra `[hf]`.

`import kru_triton.hf` registers `KRUConfig`, `KRUModel` and `KRUForCausalLM` with the Auto classes.
Inside is the `LanguageModel` that `train/lm.py` trains, not a copy:

    KRUForCausalLM                      generate, pipeline, Trainer, labels
      model: KRUModel                   padding, documents, the cache
        network: LanguageModel          embedding, blocks, norm
      lm_head: Linear                   tied to network.embedding unless told otherwise

The cache holds one state per layer, of constant size however much has been read. A state is cut to
zero where a document starts: at each `bos_token_id`, as in training, at each 0 of position ids, as
packed documents have them, and at the first token behind left padding, so that padding changes
nothing.

B batch, T tokens of this call, V vocab_size, D d_model.
"""

import dataclasses
import difflib
import os
from typing import get_type_hints

import torch
import torch.nn.functional as nnf
from huggingface_hub.dataclasses import type_validator
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForPreTraining,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.generation.utils import ALL_CACHE_NAMES
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import local_torch_dtype
from transformers.models.auto import modeling_auto

from kru_triton.language_model import LanguageModel, LanguageModelConfig, _Block
from kru_triton.modules import KRU

# What this version of transformers calls the cache of a model; models here take both names.
CACHE = "cache" if "cache" in ALL_CACHE_NAMES else "past_key_values"
# Other words for where packed documents start, as collators add them to position ids
PACKED = ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
PROMPT_CHUNK = 8192  # tokens of a prompt that are read at once: bounds memory, not length

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


class KRUCache:
    """What a model knows of the tokens it has read: a constant number of floats.

    A forward pass or `generate` puts the new state in place of the old one and never writes into a
    state, so `copy.copy(cache)` keeps a point to come back to.

    Attributes:
        state: tensors with the batch as first dimension, None before the first token.
        seen: how many tokens each row has read, padding included.
        started: `(B,)` bool, False for a row that has seen only padding so far; None: all have.

    Example:
        >>> import kru_triton
        >>> model = KRUForCausalLM(KRUConfig(d_model=8, hidden_size=4)).eval()
        >>> cache = KRUCache()
        >>> _ = model(torch.tensor([[1, 2, 3]]), past_key_values=cache)
        >>> cache.get_seq_length(), [tuple(s.shape) for s in cache.state]  # per layer h and last x
        (3, [(1, 8), (1, 8), (1, 8), (1, 8)])
    """

    is_compileable = False
    is_croppable = False
    is_linear = (False,)  # generate() then passes on the new part of the whole sequence

    def __init__(self):
        self.state: list[Tensor] | None = None
        self.seen = 0
        self.started: Tensor | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens have been read."""
        return self.seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was, as beam search asks."""
        self._change(lambda t: t.index_select(0, beam_idx.to(t.device)))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, to go on from one prompt in several ways."""
        self._change(lambda t: t.repeat_interleave(repeats, 0))

    def _change(self, function) -> None:
        if self.state is not None:
            self.state = [function(t) for t in self.state]
        if self.started is not None:
            self.started = function(self.started)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything as named tensors, as `safetensors.torch.save_file` and `torch.save` take."""
        tensors = {f"state.{i}": t.contiguous() for i, t in enumerate(self.state or [])}
        tensors["seen"] = torch.tensor(self.seen)
        if self.started is not None:
            tensors["started"] = self.started.contiguous()
        return tensors

    @classmethod
    def from_state_dict(cls, tensors: dict[str, Tensor]) -> "KRUCache":
        """The inverse of `state_dict`."""
        cache = cls()
        count = sum(name.startswith("state.") for name in tensors)
        cache.state = [tensors[f"state.{i}"] for i in range(count)] or None
        cache.seen = int(tensors["seen"])
        cache.started = tensors.get("started")
        return cache


class KRUBlock(_Block, GradientCheckpointingLayer):
    """A block that `gradient_checkpointing_enable` makes the backward compute again."""


class KRUPreTrainedModel(PreTrainedModel):
    """What `KRUModel` and `KRUForCausalLM` share: loading, saving, initial weights."""

    config_class = KRUConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _is_stateful = True
    _no_split_modules = ("KRUBlock",)
    # rounded to bfloat16 the factors are not unitary any more
    _keep_in_fp32_modules_strict = (r"factor\d+_l\d+",)
    _skip_keys_device_placement = ("past_key_values", "cache")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As `PreTrainedModel.from_pretrained`; a folder without all of the weights is refused,
        unless `output_loading_info` asks which ones it lacks."""
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        if wants_info:
            return model, info
        for kind in ("missing_keys", "unexpected_keys"):
            if info[kind]:
                raise ValueError(
                    f"{pretrained_model_name_or_path}: the weights do not fit the configuration, "
                    f"{kind.replace('_', ' ')}: {', '.join(sorted(info[kind])[:5])}"
                )
        return model

    def save_pretrained(self, save_directory, **kwargs):
        """As `PreTrainedModel.save_pretrained`, and a model card where the folder has none."""
        card = os.path.join(save_directory, "README.md")
        if kwargs.get("is_main_process", True) and not os.path.exists(card):
            os.makedirs(save_directory, exist_ok=True)
            with open(card, "w", encoding="utf-8") as file:
                file.write(model_card(self))
        super().save_pretrained(save_directory, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        """Weights that a checkpoint lacks; a new model's are those of `LanguageModel` already."""
        if isinstance(module, nn.Embedding) or module is getattr(self, "lm_head", None):
            nn.init.normal_(module.weight, std=self.config.d_model**-0.5)
        elif hasattr(module, "reset_parameters"):
            present = {
                p: p.clone() for p in module.parameters() if getattr(p, "_is_hf_initialized", False)
            }
            module.reset_parameters()
            if isinstance(module, KRU):
                factors = module.recurrent_factors(0)
                for w in factors:
                    w.mul_(self.config.radius ** (1 / len(factors)))
            for parameter, value in present.items():
                parameter.copy_(value)


class KRUModel(KRUPreTrainedModel):
    """The blocks without a head: `output = model(input_ids, attention_mask=None, ...)`.

    Example:
        >>> model = KRUModel(KRUConfig(d_model=16, hidden_size=16))
        >>> model(torch.randint(257, (2, 5))).last_hidden_state.shape
        torch.Size([2, 5, 16])
    """

    _keys_to_ignore_on_load_unexpected = (r"^lm_head\.",)

    def __init__(self, config: KRUConfig):
        super().__init__(config)
        if config.frame != "residual":
            raise ValueError(
                f"frame: a {config.frame!r} network has no embedding or head of its own, which "
                "transformers needs; use the residual frame"
            )
        dtype = torch.get_default_dtype()
        with local_torch_dtype(torch.promote_types(dtype, torch.float32)):
            self.set_network(LanguageModel(config.language_model_config()))
        for name, parameter in self.network.named_parameters():
            if ".factor" not in name:
                parameter.data = parameter.to(dtype)
        if self.network.embedding.weight.device.type != "meta":
            for module in self.network.modules():
                module._is_hf_initialized = True
        self.post_init()

    def set_network(self, network: LanguageModel) -> None:
        """Put `network` itself inside; its blocks become `KRUBlock`s."""
        for block in network.blocks:
            block.__class__ = KRUBlock
        self.network = network

    def get_input_embeddings(self) -> nn.Embedding:
        return self.network.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.network.embedding = value
        self.network.config = dataclasses.replace(
            self.network.config, vocab_size=value.num_embeddings
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: KRUCache | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        cache: KRUCache | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        position_ids: Tensor | None = None,
        **packed: Tensor | int | None,
    ) -> BaseModelOutputWithPast | tuple:
        """Read tokens.

        Args:
            input_ids: `(B, T)` int64.
            attention_mask: 1 for tokens, 0 for padding; `(B, T)`, or `(B, seen + T)` with what the
                cache has read. Padding may stand in front of a row's tokens or between those that
                it begins with, as behind a tuned prompt, and on the right where no cache is asked
                for. Compiled or exported, a model takes it to be on the left, unchecked.
            past_key_values, cache: two names of the state to go on from; it is brought up to date.
            use_cache: return the state. None: `config.use_cache`, but not in training, and not with
                padding on the right, which would be part of it.
            inputs_embeds: rows of the embedding, `(B, T, D)`, in place of `input_ids`; no BOS is
                seen in them.
            output_hidden_states: return what the first block reads and what each block returns, the
                last one after the final norm. None: `config.output_hidden_states`.
            output_attentions: not True, here or in the configuration: there are none.
            position_ids: `(B, T)`, or `(1, T)` for all rows: a 0 starts a document, and a document
                counts up by one. A first id above 0 goes on from the cache. Those of padding are
                not looked at; compiled or exported, a model trusts the others too.
            packed: the same in other words, alone or beside position_ids: `seq_idx (B, T)`, another
                number for each document, and `cu_seq_lens_q`, `cu_seq_lens_k (documents + 1,)`,
                where they start in the batch as one row, and its length. `max_length_q` and
                `max_length_k` say nothing more.

        Returns:
            `last_hidden_state (B, T, D)`, the cache, under the name transformers gives it, and
            `hidden_states`, `num_layers + 1` of `(B, T, D)`.
        """
        if past_key_values is not None and cache is not None and cache is not past_key_values:
            raise ValueError("past_key_values and cache are two names of one argument; give one")
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError(
                "output_attentions: must not be True; there are no attention weights to return, a "
                "state stands in their place"
            )
        cache = past_key_values if cache is None else cache
        self._check_input(input_ids, inputs_embeds, cache)
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        batch, time = tokens.shape[:2]
        if attention_mask is None and cache is not None and cache.started is not None:
            attention_mask = tokens.new_ones(batch, time)  # rows may begin here
        start, padded_right, order = None, False, None
        if attention_mask is not None:
            start, padded_right, started, order = _read_mask(attention_mask, batch, time, cache)
        documents = _read_documents(position_ids, packed, attention_mask, batch, time, cache)
        if documents is not None:
            documents = documents if order is None else _ordered(documents, order)
            start = documents if start is None else start | documents
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and not padded_right
        if padded_right and (use_cache or cache is not None):
            raise ValueError(
                "attention_mask: has padding on the right, which would become part of the state; "
                "pad on the left (tokenizer.padding_side = 'left'), or pass use_cache=False"
            )
        if order is not None:
            tokens = _ordered(tokens, order)
            input_ids = None if input_ids is None else tokens
        reset = self._resets(input_ids, start)
        state = None if cache is None else cache.state
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states

        pieces = [slice(None)]
        if not torch.is_grad_enabled() and time > PROMPT_CHUNK:
            pieces = [slice(t, t + PROMPT_CHUNK) for t in range(0, time, PROMPT_CHUNK)]
        outputs = []
        for piece in pieces:
            cut = None if reset is None else reset[:, piece]
            x, state, *layers = self.network(
                tokens[:, piece], state, cut, head=False, layers=output_hidden_states
            )
            outputs.append([*layers[:-1], x])
        layers = outputs[0] if len(outputs) == 1 else [torch.cat(x, 1) for x in zip(*outputs)]
        if order is not None:
            layers = [_ordered(x, order.argsort(1)) for x in layers]
        x = layers.pop().contiguous()  # not time-first any more

        if use_cache or cache is not None:
            cache = KRUCache() if cache is None else cache
            cache.state = state
            cache.seen += time
            cache.started = None if attention_mask is None else started
            if cache.started is not None and not torch.compiler.is_compiling():
                cache.started = None if started.all() else started
        output = BaseModelOutputWithPast(
            last_hidden_state=x,
            hidden_states=(*layers, x) if output_hidden_states else None,
            **{CACHE: cache},
        )
        return output if _wants_dict(return_dict, self.config) else output.to_tuple()

    def _check_input(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, cache: KRUCache | None
    ) -> None:
        if inputs_embeds is None:
            name, tokens, rule = "input_ids", input_ids, "(B, T) token ids"
            fits = tokens is not None and tokens.dim() == 2
        elif input_ids is not None:
            raise ValueError("inputs_embeds: stand in place of input_ids; give one of the two")
        else:
            width = self.config.d_model
            name, tokens, rule = "inputs_embeds", inputs_embeds, f"(B, T, {width}) numbers"
            fits = tokens.dim() == 3 and tokens.shape[2] == width and tokens.is_floating_point()
        if not fits:
            got = None if tokens is None else f"shape {tuple(tokens.shape)}"
            raise ValueError(f"{name}: must be {rule}, got {got}")
        if tokens.numel() == 0:
            bos = self.config.bos_token_id
            hint = "set config.bos_token_id" if bos is None else f"start with token {bos}"
            raise ValueError(
                f"{name}: is empty (shape {tuple(tokens.shape)}); {hint}, the start of a document"
            )
        if cache is not None and not isinstance(cache, KRUCache):
            raise TypeError(
                f"past_key_values: must be a KRUCache, got {type(cache).__name__}; a state has no "
                "keys and values, so in place of prefix tuning use prompt tuning"
            )
        if cache is not None and cache.state is not None:
            rows = cache.state[0].shape[0]
            if rows != tokens.shape[0]:
                raise ValueError(
                    f"past_key_values: holds {rows} rows and {name} has {tokens.shape[0]}; "
                    "repeat them with cache.batch_repeat_interleave(n)"
                )
        on_cpu = tokens.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_cpu and input_ids is not None:
            least, most = (int(x) for x in torch.aminmax(input_ids))
            size = self.network.config.vocab_size
            if least < 0 or most >= size:
                raise ValueError(
                    f"input_ids: token {most if most >= size else least} is not in the vocabulary "
                    f"of {size}; is the tokenizer this model's?"
                )

    def _resets(self, input_ids: Tensor | None, start: Tensor | None) -> Tensor | None:
        """`(B, T)`, True where the state is cut; None where it is nowhere."""
        reset = start
        if self.config.bos_token_id is not None and input_ids is not None:
            reset = input_ids == self.config.bos_token_id
            reset = reset if start is None else reset | start
        if reset is None or torch.compiler.is_compiling() or reset.device.type != "cpu":
            return reset
        return reset if reset.any() else None


def _read_mask(
    mask: Tensor, batch: int, time: int, cache: KRUCache | None
) -> tuple[Tensor, bool, Tensor, Tensor | None]:
    """What an attention mask says of these tokens: `start (B, T)`, True at the first token of a
    row; whether a row ends in padding; `started (B,)`, whether a row has seen a token; and the
    `order (B, T)` that puts all padding first, for which `start` is, if there is some in between.

    Compiled, a mask is trusted: its values are not looked at, and no row ends in padding."""
    seen = 0 if cache is None else cache.seen
    if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] not in (time, seen + time):
        raise ValueError(
            f"attention_mask: must be ({batch}, {time}) or, with what was read before, "
            f"({batch}, {seen + time}), got {tuple(mask.shape)}"
        )
    mask = mask[:, -time:].bool()
    if seen == 0:
        started = mask.new_zeros(batch)
    else:
        started = mask.new_ones(batch) if cache.started is None else cache.started
    real = (mask.cumsum(1) > 0) | started[:, None]  # this token or one before it is one
    before = torch.cat((started[:, None], real[:, :-1]), 1)
    previous = torch.cat((started[:, None], mask[:, :-1]), 1)
    start = mask & ~before
    if torch.compiler.is_compiling():
        return start, False, real[:, -1], None
    holes = (mask & before & ~previous).any(1)
    if (holes & started).any():
        row = int((holes & started).nonzero()[0])
        raise ValueError(
            f"attention_mask: row {row} has padding between its tokens and those that the cache "
            "has read; a recurrent state would read it, so pad on the left only"
        )
    padded_right, order = bool((real[:, -1] & ~mask[:, -1]).any()), None
    if holes.any():
        order = mask.byte().argsort(dim=1, stable=True)
        start = _read_mask(_ordered(mask, order), batch, time, cache)[0]
    if cache is None and not real[:, -1].all():
        row = int((~real[:, -1]).nonzero()[0])
        raise ValueError(
            f"attention_mask: row {row} is padding alone; an empty prompt starts with the BOS token"
        )
    return start, padded_right, real[:, -1], order


def _ordered(x: Tensor, order: Tensor) -> Tensor:
    """What `x (B, T, ...)` has at the places `order (B, T)` of each row."""
    return x[torch.arange(len(x), device=x.device)[:, None], order]


def _read_documents(
    position_ids: Tensor | None,
    packed: dict[str, Tensor | int | None],
    mask: Tensor | None,
    batch: int,
    time: int,
    cache: KRUCache | None,
) -> Tensor | None:
    """`(B, T)`, True where a document starts; None where no argument says so.

    Compiled, they are trusted: values are not looked at."""
    found, real = {}, None if mask is None else mask[:, -time:].bool()
    if position_ids is not None:
        found["position_ids"] = _read_position_ids(position_ids, real, batch, time)
    for name, value in packed.items():
        if name not in PACKED:
            raise TypeError(f"{name}: no argument of KRUModel.forward")
        if value is None or name.startswith("max_length"):
            continue
        if name == "seq_idx":
            numbers = _one_per_token(name, value, batch, time)
            found[name] = nnf.pad(numbers[:, 1:] != numbers[:, :-1], (1, 0), value=True)
        else:
            found[name] = _read_bounds(name, value, batch, time)
    if not found:
        return None
    (first, start), *others = found.items()
    if position_ids is None and cache is not None and cache.state is not None:
        raise ValueError(
            f"{first}: does not say whether the first token goes on with what the cache has read; "
            "give position_ids, which start a document with 0"
        )
    for name, other in others:
        differ = (start != other)[:, 1:]
        differ = differ if real is None else differ & real[:, 1:]
        if not torch.compiler.is_compiling() and differ.any():
            row, place = (int(i) for i in differ.nonzero()[0])
            raise ValueError(
                f"{name}: disagrees with {first} on whether token {place + 1} of row {row} starts "
                "a document; give one of them"
            )
    return start


def _one_per_token(name: str, numbers: Tensor, batch: int, time: int) -> Tensor:
    if numbers.dim() != 2 or numbers.shape[0] not in (1, batch) or numbers.shape[1] != time:
        raise ValueError(
            f"{name}: must be ({batch}, {time}), one for each token, or (1, {time}) for all rows, "
            f"got {tuple(numbers.shape)}"
        )
    return numbers.expand(batch, time)


def _read_position_ids(ids: Tensor, real: Tensor | None, batch: int, time: int) -> Tensor:
    ids = _one_per_token("position_ids", ids, batch, time)
    start = ids == 0
    jumps = ~start[:, 1:] & (ids[:, 1:] != ids[:, :-1] + 1)
    if real is not None:  # between two tokens: the first one of a row may have any id
        jumps = jumps & real[:, 1:] & real[:, :-1]
    if not torch.compiler.is_compiling() and jumps.any():
        row, place = (int(i) for i in jumps.nonzero()[0])
        before, after = ids[row, place : place + 2].tolist()
        raise ValueError(
            f"position_ids: row {row} goes from {before} to {after} at token {place + 1}; they "
            "must count up by one within a document, and start the next one with 0"
        )
    return start


def _read_bounds(name: str, bounds: Tensor, batch: int, time: int) -> Tensor:
    """`(B, T)`, True at all bounds but the last, in rows one after the other."""
    if bounds.dim() != 1:
        raise ValueError(f"{name}: must be (documents + 1,), got {tuple(bounds.shape)}")
    start = torch.zeros(batch * time + 1, dtype=torch.bool, device=bounds.device)
    if not torch.compiler.is_compiling():
        ends = bounds[:1].tolist() + bounds[-1:].tolist()
        if ends != [0, batch * time] or (bounds.diff() < 0).any():
            raise ValueError(
                f"{name}: must count up from 0 to {batch * time}, the tokens of the batch, got "
                f"{bounds.tolist()}"
            )
    start[bounds.long()] = True
    return start[:-1].view(batch, time)


def _wants_dict(return_dict: bool | None, config: KRUConfig) -> bool:
    return config.return_dict if return_dict is None else return_dict


class KRUForCausalLM(KRUPreTrainedModel, GenerationMixin):
    """A KRU language model with `generate`: `output = model(input_ids, labels=None, ...)`.

    Example:
        >>> model = KRUForCausalLM(KRUConfig(d_model=16, hidden_size=16)).eval()
        >>> model.generate(torch.tensor([[7, 8]]), max_new_tokens=3).shape
        torch.Size([1, 5])
    """

    _tied_weights_keys = {  # noqa: RUF012 (transformers reads a plain dict)
        "lm_head.weight": "model.network.embedding.weight"
    }

    def __init__(self, config: KRUConfig):
        super().__init__(config)
        self.model = KRUModel(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_language_model(cls, model: LanguageModel, **kwargs) -> "KRUForCausalLM":
        """`model` itself, with the face of transformers; kwargs go to `KRUConfig`."""
        causal_lm = cls(KRUConfig(**dataclasses.asdict(model.config), **kwargs))
        causal_lm.model.set_network(model)
        causal_lm.tie_weights()
        return causal_lm.train(model.training)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict):
        """None: those of `GenerationMixin` say no more than the attention mask does."""

    def generate(self, *args, **kwargs):
        """As `GenerationMixin.generate`; its steps cost the same however long the text is."""
        with self.model.network.decoding():
            return super().generate(*args, **kwargs)

    def _prepare_attention_mask_for_generation(
        self, inputs_tensor: Tensor, generation_config, model_kwargs: dict
    ) -> Tensor:
        """As the one of `GenerationMixin`, for a call without a mask: it takes padding tokens for
        padding, which a BOS is not, though it pads by default."""
        mask = super()._prepare_attention_mask_for_generation(
            inputs_tensor, generation_config, model_kwargs
        )
        pad, bos = generation_config._pad_token_tensor, generation_config._bos_token_tensor
        return torch.ones_like(mask) if pad is not None and pad == bos else mask

    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        inputs_embeds=None,
        tokenizer=None,
        assistant_tokenizer=None,
        **kwargs,
    ):
        """As `GenerationMixin.prepare_inputs_for_generation`; nothing new to read is an error, and
        tokenizers, which `generate` itself has used, go no further."""
        if next_sequence_length is not None and next_sequence_length < 1:
            name, count = "input_ids", input_ids.shape[1]
            if inputs_embeds is not None:
                name, count = "inputs_embeds", inputs_embeds.shape[1]
            raise ValueError(
                f"{name}: has {count} tokens, and the cache has read "
                f"{count - next_sequence_length}; pass the whole text, what the cache has read and "
                "what is new"
            )
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        if inputs.get("use_cache", False) is None:
            inputs["use_cache"] = False  # to `generate`, though not to `forward`
        cache = inputs.get(CACHE)
        if isinstance(cache, KRUCache) and cache.seen:
            inputs["past_key_values"] = cache  # the name PEFT knows, or it puts its prompt again
        return inputs

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: KRUCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        cache: KRUCache | None = None,
        num_items_in_batch: Tensor | int | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        position_ids: Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast | tuple:
        """Next-token logits, and the loss where `labels` are given.

        Args:
            labels: `(B, T)`, the input itself: the loss shifts them by one; -100 is not counted and
                is what padding must have. With labels no cache is returned unless asked for.
            logits_to_keep: how many of the last positions get logits (0: all), or their indices.
            num_items_in_batch: what the sum of losses is divided by; None: the number of targets.
            kwargs: `shift_labels (B, T)`, the token after each one, in place of `labels`. (Trainer
                takes an argument of that name for one that each batch has.) Any other must be None.
            The other arguments are those of `KRUModel.forward`.

        Returns:
            `loss`, `logits (B, T, V)`, the cache, under the name transformers gives it, and
            `hidden_states`.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        packed = {name: kwargs.pop(name) for name in PACKED if name in kwargs}
        unknown = [name for name, value in kwargs.items() if value is not None]
        if unknown:
            raise TypeError(f"{', '.join(unknown)}: no argument of KRUForCausalLM.forward")
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if shift_labels is not None:
            _check_labels("shift_labels", shift_labels, tokens, None)
        elif labels is not None:
            _check_labels("labels", labels, tokens, attention_mask)
        learning = labels is not None or shift_labels is not None
        if learning:
            use_cache = bool(use_cache)
        output = self.model(
            input_ids,
            attention_mask,
            past_key_values,
            use_cache=use_cache,
            return_dict=True,
            cache=cache,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            position_ids=position_ids,
            **packed,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])
        loss = None
        if learning:
            loss = self.loss_function(
                logits,
                labels,
                vocab_size=logits.shape[-1],
                num_items_in_batch=num_items_in_batch,
                shift_labels=shift_labels,
            )
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=output.hidden_states,
            **{CACHE: output.get(CACHE)},
        )
        return output if _wants_dict(return_dict, self.config) else output.to_tuple()


def _check_labels(name: str, labels: Tensor, tokens: Tensor | None, mask: Tensor | None) -> None:
    if tokens is not None and labels.shape != tokens.shape[:2]:
        raise ValueError(
            f"{name}: must have the shape of input_ids, {tuple(tokens.shape[:2])}, got "
            f"{tuple(labels.shape)}"
        )
    if mask is None or mask.shape != labels.shape:
        return
    wrong = int(((mask == 0) & (labels != -100)).sum())
    if wrong:
        raise ValueError(
            f"labels: {wrong} positions that attention_mask marks as padding are not -100; set "
            "labels[attention_mask == 0] = -100"
        )


def model_card(model: KRUPreTrainedModel, facts: str = "") -> str:
    """README.md of a saved model: what it is and how to load it, and `facts`, a paragraph."""
    config = model.config
    network = model.base_model.network
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [kru, recurrent, kronecker]
---

# {config.model.upper()} language model

{network.num_parameters:,} parameters, of which {network.num_recurrent_parameters:,} recurrent.
Layers: {config.num_layers}, width {config.d_model}, {config.hidden_size} recurrent units per layer.
Vocabulary: {config.vocab_size:,} tokens. The state has a constant size: a context has no fixed
length, and a token takes the same time however long it is.

{facts}
```python
import kru_triton.hf  # registers the architecture
from transformers import pipeline

write = pipeline("text-generation", "THIS_FOLDER")
print(write("Once", max_new_tokens=100)[0]["generated_text"])
```

Architecture: Jose, Cissé and Fleuret, *Kronecker Recurrent Units*, ICML 2018. Code: `kru_triton`.
"""


AutoConfig.register(KRUConfig.model_type, KRUConfig)
AutoModel.register(KRUConfig, KRUModel)
AutoModelForCausalLM.register(KRUConfig, KRUForCausalLM)
AutoModelForPreTraining.register(KRUConfig, KRUForCausalLM)
# by these names Trainer's label smoothing, model cards and lm-evaluation-harness know what a model
# predicts; `register` leaves them out
modeling_auto.MODEL_MAPPING_NAMES[KRUConfig.model_type] = KRUModel.__name__
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[KRUConfig.model_type] = KRUForCausalLM.__name__
