"""transformers' own model and generation tests on KRUModel and KRUForCausalLM.

They are no part of the package, so a checkout of its sources has to be there, best of the very
version that is installed; the package `transformers` is always the installed one.

    pip install parameterized
    git clone --depth 1 --branch v5.24.0 https://github.com/huggingface/transformers CHECKOUT
    python tests/transformers_suite.py CHECKOUT [arguments of pytest, as -rs or -k generate]

RUN_SLOW=1 in the environment adds the slow ones. pytest alone does not collect this file.
"""

import sys
import unittest

import pytest

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.path.insert(0, sys.argv[1])  # `tests` is now the checkout's
    marks = "ignore::pytest.PytestUnknownMarkWarning"  # the checkout registers them, we do not
    sys.exit(pytest.main([__file__, "-o", "addopts=", "-W", marks, *sys.argv[2:]]))

import torch
from tests.generation.test_utils import GenerationTesterMixin
from tests.pipelines import test_pipelines_feature_extraction, test_pipelines_text_generation
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, ids_tensor

from kru_triton.hf import CACHE, KRUConfig, KRUForCausalLM, KRUModel
from kru_triton.train.export import pretrained_tokenizer
from kru_triton.train.text.tokenizer import ByteTokenizer


class KRUTester:
    """Makes small configurations and batches; the suite reads the attributes too."""

    batch_size, seq_length, is_training = 3, 7, True
    vocab_size, hidden_size, num_hidden_layers = 99, 32, 2

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent

    def get_config(self, **kwargs) -> KRUConfig:
        sizes = dict(vocab_size=self.vocab_size, num_layers=self.num_hidden_layers)
        sizes.update(d_model=self.hidden_size, hidden_size=self.hidden_size)
        return KRUConfig(**{**sizes, "bos_token_id": self.vocab_size - 1, **kwargs})

    def prepare_config_and_inputs_for_common(self) -> tuple[KRUConfig, dict]:
        # without the last token, which starts a document: inputs_embeds show no such starts, and
        # generate() without an attention mask takes it for padding
        tokens = ids_tensor([self.batch_size, self.seq_length], self.vocab_size - 1)
        return self.get_config(), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


class KRUTest(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (KRUModel, KRUForCausalLM)
    has_attentions = False  # no attention weights to return

    def setUp(self):
        self.model_tester = KRUTester(self)

    def test_config(self):
        ConfigTester(self, config_class=KRUConfig, d_model=36).run_common_tests()

    def test_left_padding_compatibility(self):
        self.has_attentions = True  # the suite takes models without attention to take no padding
        super().test_left_padding_compatibility()

    def test_pipelines(self):  # PipelineTesterMixin takes its models from the Hub
        tokenizer = pretrained_tokenizer(ByteTokenizer())
        for module, name, kind in (
            (test_pipelines_feature_extraction, "FeatureExtractionPipelineTests", KRUModel),
            (test_pipelines_text_generation, "TextGenerationPipelineTests", KRUForCausalLM),
        ):
            model = kind(self.model_tester.get_config(vocab_size=257, bos_token_id=256)).eval()
            tests = getattr(module, name)()
            tests.run_pipeline_test(*tests.get_test_pipeline(model, tokenizer))

    # The suite asks models with a cache of their own to replace its two checks of caches.

    def _check_past_key_values_for_generate(self, batch_size, past_key_values, seq_length, config):
        assert past_key_values.get_seq_length() == seq_length
        shapes = [tuple(state.shape) for state in past_key_values.state]
        units, last_input = (batch_size, 2 * config.hidden_size), (batch_size, config.d_model)
        assert shapes == [units, last_input] * config.num_layers

    def _check_caches_are_equal(self, cache1, cache2):
        assert cache1.seen == cache2.seen
        torch.testing.assert_close(cache1.state, cache2.state)

    def _check_outputs_close(self, actual, expected, **tolerances):
        started = actual.pop(f"{CACHE}.started", None)  # eager, a mask of all ones leaves none
        assert started is None or started.all()
        super()._check_outputs_close(actual, expected, **tolerances)
