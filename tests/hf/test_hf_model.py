"""The Hugging Face model: the training model inside, saved, resized, compiled; bad input."""

import math

import pytest
import torch
from torch.nn import functional as F

transformers = pytest.importorskip("transformers")

from hf_models import BOS, FREE, VOCAB, config_of, every_model, make, padded, tokens_of  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import kru_triton  # noqa: E402
from kru_triton import hf  # noqa: E402
from kru_triton.hf import CACHE, KRUCache, KRUConfig, KRUForCausalLM, KRUModel  # noqa: E402
from kru_triton.lm.model import LanguageModel  # noqa: E402


@every_model
def test_the_model_inside_is_the_training_model(kind):
    config = make(kind).config
    torch.manual_seed(0)
    causal_lm = KRUForCausalLM(config).eval()
    torch.manual_seed(0)
    trained = LanguageModel(causal_lm.config.language_model_config())
    ours, theirs = causal_lm.model.network.state_dict(), trained.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert {p.data_ptr() for p in causal_lm.parameters()} == {
        p.data_ptr() for p in causal_lm.model.network.parameters()
    }
    assert torch.equal(causal_lm(tokens_of()).logits, causal_lm.model.network(tokens_of())[0])

    wrapped = KRUForCausalLM.from_language_model(trained, bos_token_id=BOS)
    assert wrapped.model.network is trained
    assert wrapped.lm_head.weight is trained.embedding.weight
    assert torch.equal(wrapped(tokens_of()).logits, causal_lm(tokens_of()).logits)


def test_saved_and_loaded_weights_are_the_same_bits(model, folder):
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded) is KRUForCausalLM
    assert type(transformers.AutoConfig.from_pretrained(folder)) is KRUConfig
    assert loaded.lm_head.weight is loaded.model.network.embedding.weight
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    for (name, a), (_, b) in zip(model.state_dict().items(), loaded.state_dict().items()):
        assert torch.equal(a, b), name
    base = transformers.AutoModel.from_pretrained(folder)
    assert type(base) is KRUModel
    hidden = base(tokens_of()).last_hidden_state
    assert torch.equal(loaded.lm_head(hidden), model(tokens_of()).logits)
    base.save_pretrained(folder / "base")
    again = KRUForCausalLM.from_pretrained(folder / "base")
    assert torch.equal(again(tokens_of()).logits, model(tokens_of()).logits)


def test_a_model_card_is_written_once(model, tmp_path):
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    network = model.model.network
    assert f"{network.num_parameters:,} parameters" in card
    assert f"{network.num_recurrent_parameters:,} recurrent" in card
    assert "import kru_triton.hf" in card
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_public_names_are_those_of_the_module():
    for name in ("KRUCache", "KRUConfig", "KRUForCausalLM", "KRUModel"):
        assert getattr(kru_triton, name) is getattr(hf, name)
    with pytest.raises(AttributeError, match="KRUConfigg"):
        kru_triton.KRUConfigg  # noqa: B018


def test_a_state_is_cut_at_each_document_as_in_training(model):
    tokens = tokens_of()
    tokens[0, 3] = tokens[1, 5] = tokens[1, 0] = BOS
    expected, _ = model.model.network(tokens, None, tokens == BOS)
    assert torch.equal(model(tokens).logits, expected)
    assert (model.model.network(tokens)[0] - expected).abs().max() > 1e-3
    without = make(bos_token_id=None)
    assert torch.equal(without(tokens).logits, without.model.network(tokens)[0])


def test_the_head_can_be_untied(tmp_path):
    untied = make(tie_word_embeddings=False)
    assert untied.lm_head.weight is not untied.model.network.embedding.weight
    std = float(untied.lm_head.weight.detach().std())
    assert 0.8 < std * math.sqrt(16) < 1.2
    untied.save_pretrained(tmp_path)
    loaded = KRUForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens_of()).logits, untied(tokens_of()).logits)
    base = KRUModel.from_pretrained(tmp_path)
    assert torch.equal(untied.lm_head(base(tokens_of())[0]), untied(tokens_of()).logits)


@pytest.mark.parametrize("size", [25, 40])
def test_embeddings_resize(size, tmp_path):
    model = make(bos_token_id=None)
    tokens = tokens_of() % 25
    before = model(tokens).logits
    model.resize_token_embeddings(size)
    assert model.lm_head.weight is model.model.network.embedding.weight
    assert model.config.vocab_size == model.model.network.config.vocab_size == size
    after = model(tokens).logits
    assert after.shape[-1] == size
    common = min(size, VOCAB)
    assert (after[..., :common] - before[..., :common]).abs().max() < 1e-6
    model.save_pretrained(tmp_path)
    assert torch.equal(KRUForCausalLM.from_pretrained(tmp_path)(tokens).logits, after)


def test_bfloat16_keeps_the_factors_in_float32(model, folder):
    loaded = KRUForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == (torch.float32 if "factor" in name else torch.bfloat16), name
    expected, logits = model(tokens_of()).logits, loaded(tokens_of()).logits
    assert logits.dtype == torch.bfloat16
    # a bfloat16 has 8 bits: 2^-9 in each of the dozen roundings on the way
    assert (logits - expected).norm() / expected.norm() < 12 * 2**-9
    assert loaded.generate(tokens_of(), max_new_tokens=5, **FREE).shape == (2, 12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_new_model_of_another_dtype_has_exact_factors(dtype):
    config = config_of(hidden_size=16, radius=0.5)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    high = torch.promote_types(dtype, torch.float32)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (high if "factor" in name else dtype), name
    for block in model.model.network.blocks:
        for w in block.mixer.kru.recurrent_factors(0):
            u = torch.complex(*w.detach().double() / 0.5**0.5)
            assert (u @ u.mH - torch.eye(u.shape[-1])).abs().max() < 20 * torch.finfo(high).eps
    tokens = tokens_of()
    assert model(tokens).logits.dtype == dtype


def test_device_map(model, folder):
    pytest.importorskip("accelerate")
    loaded = KRUForCausalLM.from_pretrained(folder, device_map="cpu")
    assert torch.equal(loaded(tokens_of()).logits, model(tokens_of()).logits)
    loaded = KRUForCausalLM.from_pretrained(folder, device_map={"model": "cpu", "lm_head": "cpu"})
    assert torch.equal(loaded(tokens_of()).logits, model(tokens_of()).logits)


@pytest.mark.parametrize("lengths", [(7, 7), (7, 4)])
def test_compiled_in_one_graph(model, lengths):
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    (tokens, mask), more = padded(*lengths), tokens_of(seed=1)
    read, later = {}, {}
    if lengths == (7, 4):
        read = {"attention_mask": mask}
        later = {"attention_mask": F.pad(mask, (0, 7), value=1)}
    with torch.no_grad():
        first, expected = compiled(tokens, **read), model(tokens, **read)
        assert torch.equal(first.logits, expected.logits)
        assert first[CACHE].seen == 7
        second = compiled(more, **{CACHE: first[CACHE]}, **later)
        assert torch.equal(second.logits, model(more, **{CACHE: expected[CACHE]}, **later).logits)


def test_exported_with_a_mask(model):
    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, tokens, mask):
            return self.model(tokens, mask, use_cache=False).logits

    with torch.no_grad():
        program = torch.export.export(Logits(), padded(7, 4)).module()
        found, expected = (f(*padded(3, 7, seed=9)) for f in (program, Logits()))
    assert (found - expected).abs().max() < 1e-5


def test_tables_that_tools_read_name_the_models(folder):
    names = transformers.models.auto.modeling_auto
    assert names.MODEL_MAPPING_NAMES["kru"] == "KRUModel"
    assert names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["kru"] == "KRUForCausalLM"
    loaded = transformers.AutoModelForPreTraining.from_pretrained(folder)
    assert type(loaded) is KRUForCausalLM
    # a state goes along a sequence: none of it on another device, no paged keys and values
    assert loaded.config.layer_types == ["linear_attention"] * 2
    assert "layer_types" not in loaded.config.to_dict()


def test_arguments_that_every_model_is_given(model, monkeypatch):
    tokens = tokens_of()
    for each in (model, model.model):
        expected = each(tokens)[0]
        for value in (None, False):
            kwargs = dict(output_attentions=value, output_hidden_states=value, return_dict=value)
            assert torch.equal(each(tokens, **kwargs)[0], expected)
        with pytest.raises(ValueError, match="output_attentions: must not be True; there are no"):
            each(tokens, output_attentions=True)
    assert torch.equal(model(tokens, head_mask=None).logits, model(tokens).logits)
    with pytest.raises(ValueError, match="output_attentions: must not be True"):
        model.generate(tokens, max_new_tokens=2, output_attentions=True)
    monkeypatch.setattr(model.config, "_output_attentions", True)
    with pytest.raises(ValueError, match="output_attentions: must not be True"):
        model(tokens)
    assert model(tokens, output_attentions=False).logits.shape == (2, 7, VOCAB)


def test_bad_tokens_and_caches_are_refused(model):
    tokens = tokens_of()
    cases = [
        (dict(), "input_ids: must be .* got None"),
        (dict(input_ids=tokens[0]), r"input_ids: must be .* got shape \(7,\)"),
        (
            dict(input_ids=tokens[:, :0]),
            r"input_ids: is empty \(shape \(2, 0\)\); start with token",
        ),
        (dict(input_ids=tokens + VOCAB), "not in the vocabulary of 31; is the tokenizer this mod"),
        (dict(input_ids=tokens - 31), "token -31 is not in the vocabulary"),
        (dict(input_ids=tokens, cache=KRUCache(), past_key_values=KRUCache()), "two names of one"),
        (
            dict(input_ids=tokens[:1], cache=model(tokens)[CACHE]),
            "holds 2 rows and input_ids has 1",
        ),
        (dict(input_ids=tokens, labels=tokens[:, 1:]), "labels: must have the shape of input_ids"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            model(**arguments)
    with pytest.raises(TypeError, match=r"must be a KRUCache, got list; .* prompt tuning"):
        model(tokens, cache=[1])
    with pytest.raises(ValueError, match=r"is empty \(shape \(1, 0\)\); set config.bos_token_id"):
        make(bos_token_id=None)(torch.zeros(1, 0, dtype=torch.int64))
    with pytest.raises(ValueError, match="is empty"):
        model.generate(torch.zeros(1, 0, dtype=torch.int64), max_new_tokens=2)
    with pytest.raises(ValueError, match="bos_token_id"):
        make(bos_token_id=None).generate(max_new_tokens=2)
    embedded = model.get_input_embeddings()(tokens)
    cases = [
        (dict(input_ids=tokens, inputs_embeds=embedded), "inputs_embeds: stand in place of"),
        (dict(inputs_embeds=embedded[0]), r"inputs_embeds: must be \(B, T, 16\) .* \(7, 16\)"),
        (dict(inputs_embeds=embedded[..., 1:]), r"inputs_embeds: must be \(B, T, 16\) numbers"),
        (dict(inputs_embeds=embedded[:, :0]), "inputs_embeds: is empty"),
        (dict(inputs_embeds=embedded[:1], cache=model(tokens)[CACHE]), "and inputs_embeds has 1"),
        (dict(inputs_embeds=embedded, labels=tokens[:, 1:]), "labels: must have the shape of"),
        (dict(input_ids=tokens, shift_labels=tokens[:, 1:]), "shift_labels: must have the shape"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            model(**arguments)
    with pytest.raises(TypeError, match="atention_mask: no argument of KRUForCausalLM"):
        model(tokens, atention_mask=tokens)
