"""KRUModel and KRUForCausalLM: the `LanguageModel` behind the interface of transformers.

B batch, T tokens of this call, V vocab_size, D d_model.
"""

import dataclasses
import os

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import local_torch_dtype

from kru_triton.hf.cache import CACHE, KRUCache
from kru_triton.hf.card import model_card
from kru_triton.hf.configuration import KRUConfig
from kru_triton.hf.documents import PACKED, ordered, read_documents, read_mask
from kru_triton.layers.kru import KRU
from kru_triton.lm.model import LanguageModel, _Block

PROMPT_CHUNK = 8192  # tokens of a prompt that are read at once: bounds memory, not length


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
            start, padded_right, started, order = read_mask(attention_mask, batch, time, cache)
        documents = read_documents(position_ids, packed, attention_mask, batch, time, cache)
        if documents is not None:
            documents = documents if order is None else ordered(documents, order)
            start = documents if start is None else start | documents
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and not padded_right
        if padded_right and (use_cache or cache is not None):
            raise ValueError(
                "attention_mask: has padding on the right, which would become part of the state; "
                "pad on the left (tokenizer.padding_side = 'left'), or pass use_cache=False"
            )
        if order is not None:
            tokens = ordered(tokens, order)
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
            layers = [ordered(x, order.argsort(1)) for x in layers]
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
                is what padding must have. A token behind padding is not counted either, as no first
                token is. With labels no cache is returned unless asked for.
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
            labels = _without_first(labels, attention_mask)
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


def _without_first(labels: Tensor, mask: Tensor | None) -> Tensor:
    """-100 where the token before is padding, which predicts nothing."""
    if mask is None or mask.shape != labels.shape:
        return labels
    return labels.masked_fill(nn.functional.pad(mask[:, :-1] == 0, (1, 0)), -100)
