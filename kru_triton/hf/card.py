"""The model card of an exported model."""

from typing import cast

from transformers import PreTrainedModel

from kru_triton.lm.model import LanguageModel


def model_card(model: PreTrainedModel, facts: str = "") -> str:
    """README.md of a saved model: what it is and how to load it, and `facts`, a paragraph."""
    config = model.config
    network = cast(LanguageModel, model.base_model.network)
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
