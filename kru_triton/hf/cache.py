"""The state of a model between calls."""

import torch
from torch import Tensor
from transformers.generation.utils import ALL_CACHE_NAMES

# What this version of transformers calls the cache of a model; models here take both names.
CACHE = "cache" if "cache" in ALL_CACHE_NAMES else "past_key_values"


class KRUCache:
    """What a model knows of the tokens it has read: a constant number of floats.

    A forward pass or `generate` puts the new state in place of the old one and never writes into a
    state, so `copy.copy(cache)` keeps a point to come back to.

    Attributes:
        state: tensors with the batch as first dimension, None before the first token.
        seen: how many tokens each row has read, padding included.
        started: `(B,)` bool, False for a row that has seen only padding so far; None: all have.

    Example:
        >>> from kru_triton.hf import KRUConfig, KRUForCausalLM
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
