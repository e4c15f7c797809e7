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

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForPreTraining
from transformers.models.auto import modeling_auto

from kru_triton.hf.cache import CACHE, KRUCache
from kru_triton.hf.card import model_card
from kru_triton.hf.configuration import KRUConfig
from kru_triton.hf.modeling import KRUForCausalLM, KRUModel, KRUPreTrainedModel

__all__ = [
    "CACHE",
    "KRUCache",
    "KRUConfig",
    "KRUForCausalLM",
    "KRUModel",
    "KRUPreTrainedModel",
    "model_card",
]

AutoConfig.register(KRUConfig.model_type, KRUConfig)
AutoModel.register(KRUConfig, KRUModel)
AutoModelForCausalLM.register(KRUConfig, KRUForCausalLM)
AutoModelForPreTraining.register(KRUConfig, KRUForCausalLM)
# by these names Trainer's label smoothing, model cards and lm-evaluation-harness know what a model
# predicts; `register` leaves them out
modeling_auto.MODEL_MAPPING_NAMES[KRUConfig.model_type] = KRUModel.__name__
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[KRUConfig.model_type] = KRUForCausalLM.__name__
