"""The Hugging Face face: the training model inside, generation, padding, the cache, bad input.

The generation part holds what transformers' own tests ask of a model with a recurrent state: every
way of decoding with the cache equals the one without it, left padding and chunked prompts change
nothing, generation goes on from a returned cache, beams reorder it, logits of single steps equal
those of one pass, the cache has a constant size.
"""

import contextlib
import copy
import inspect
import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

import kru_triton  # noqa: E402
from kru_triton import KRU, KRULSTM, hf  # noqa: E402
from kru_triton.hf import CACHE, KRUCache, KRUConfig, KRUForCausalLM, KRUModel  # noqa: E402
from kru_triton.layers.decoding import LSTMStep, Step, why_not_graphed  # noqa: E402
from kru_triton.lm.model import MODELS, LanguageModel, LanguageModelConfig  # noqa: E402
from kru_triton.train.export import pretrained_tokenizer  # noqa: E402
from kru_triton.train.text.tokenizer import ByteTokenizer  # noqa: E402
from kru_triton.unitarity import unitarity_penalty  # noqa: E402

VOCAB, BOS = 31, 30
FREE = {"eos_token_id": None, "pad_token_id": BOS}  # generation to the end of its length
every_model = pytest.mark.parametrize("kind", MODELS)


def config_of(**kwargs):
    sizes = dict(vocab_size=VOCAB, d_model=16, hidden_size=12, num_heads=2, context_length=9)
    return KRUConfig(**{**sizes, "bos_token_id": BOS, **kwargs})


def make(kind="kru", **kwargs):
    """A model whose blocks outweigh the embedding: a fresh one with a tied head repeats a token."""
    torch.manual_seed(0)
    model = KRUForCausalLM(config_of(model=kind, **kwargs)).eval()
    with torch.no_grad():
        for block in model.model.network.blocks:
            block.mixer.projection.weight.mul_(50)
            block.mlp[2].weight.mul_(4)
    return model


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    model.save_pretrained(path)
    return path


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


# The model itself


@every_model
def test_the_model_inside_is_the_training_model(kind):
    torch.manual_seed(0)
    causal_lm = KRUForCausalLM(config_of(model=kind)).eval()
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


# Hidden states, and embeddings in place of tokens


@every_model
def test_hidden_states_are_those_between_the_blocks(kind):
    model, tokens = make(kind), tokens_of()
    tokens[0, 3] = BOS
    network = model.model.network
    output = model(tokens, output_hidden_states=True)
    x = network.embedding(tokens) * 4  # sqrt(d_model)
    assert torch.equal(output.hidden_states[0], x)
    for block, found in zip(network.blocks, [*output.hidden_states[1:-1], None], strict=True):
        x = block(x.transpose(0, 1), None, tokens == BOS)[0].transpose(0, 1)
        if found is not None:
            assert (found - x).abs().max() < 1e-5
    base = model.model(tokens, output_hidden_states=True)
    assert base.hidden_states[-1] is base.last_hidden_state
    assert (network.norm(x) - output.hidden_states[-1]).abs().max() < 1e-5
    assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)
    assert (output.logits - model(tokens).logits).abs().max() < 1e-5


def test_hidden_states_have_gradients(model):
    output = model(tokens_of(), output_hidden_states=True)
    *inner, last = output.hidden_states
    for x in inner:
        x.retain_grad()
    (last[:, 2] @ torch.linspace(-1, 1, last.shape[-1])).backward(torch.ones(2))
    for x in inner:
        assert (x.grad[:, :3] != 0).all()
        assert (x.grad[:, 3:] == 0).all()


def test_hidden_states_are_left_out_unless_asked_for(model, monkeypatch):
    tokens = tokens_of()
    assert "hidden_states" not in model(tokens)
    monkeypatch.setattr(model.config, "output_hidden_states", True)
    assert len(model(tokens).hidden_states) == 3
    assert len(model.model(tokens, return_dict=False)[-1]) == 3
    assert "hidden_states" not in model(tokens, output_hidden_states=False)


def test_hidden_states_of_a_long_prompt_and_of_a_recomputed_one(monkeypatch):
    model, tokens = make(recompute=4), tokens_of(2, 20)
    expected = model(tokens, output_hidden_states=True).hidden_states
    assert [tuple(x.shape) for x in expected] == [(2, 20, 16)] * 3
    monkeypatch.setattr(hf.modeling, "PROMPT_CHUNK", 6)
    with torch.no_grad():
        found = model(tokens, output_hidden_states=True).hidden_states
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() < 1e-5


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_returns_the_hidden_states_of_each_step(model, beams):
    output = model.generate(
        tokens_of(),
        num_beams=beams,
        max_new_tokens=5,
        return_dict_in_generate=True,
        output_hidden_states=True,
        **FREE,
    )
    lengths = [7, 1, 1, 1, 1]
    for length, layers in zip(lengths, output.hidden_states, strict=True):
        assert [tuple(x.shape) for x in layers] == [(2 * beams, length, 16)] * 3
    if beams == 1:
        whole = model(output.sequences[:, :-1], output_hidden_states=True).hidden_states
        for layer in range(3):
            steps = torch.cat([layers[layer] for layers in output.hidden_states], 1)
            assert (steps - whole[layer]).abs().max() < 1e-5


@every_model
def test_embeddings_stand_in_for_tokens(kind):
    model, (tokens, mask) = make(kind), padded(7, 4)
    embedded = model.get_input_embeddings()(tokens)
    labels = tokens.masked_fill(mask == 0, -100)
    labels[1, 3] = -100  # or padding would predict it
    expected = model(tokens, attention_mask=mask, labels=labels)
    output = model(inputs_embeds=embedded, attention_mask=mask, labels=labels)
    assert (output.logits - expected.logits)[mask == 1].abs().max() < 1e-5
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    (grad,) = torch.autograd.grad(output.loss, embedded)
    assert (grad[1, :3] == 0).all()  # padding
    assert (grad[1, 3:6] != 0).all()


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_from_embeddings(model, beams):
    tokens, mask = padded(7, 4)
    embed = model.get_input_embeddings()
    options = {**FREE, "num_beams": beams, "max_new_tokens": 6, "attention_mask": mask}
    expected = model.generate(tokens, **options)
    assert torch.equal(model.generate(inputs_embeds=embed(tokens), **options), expected[:, 7:])
    both = model.generate(tokens, inputs_embeds=embed(tokens), **options)
    assert torch.equal(both, expected)
    soft = embed(tokens) + torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(model.generate(inputs_embeds=soft, **options), expected[:, 7:])


def test_generation_goes_on_from_embeddings_and_a_cache(model):
    embed, options = model.get_input_embeddings(), {**FREE, "return_dict_in_generate": True}
    whole = model.generate(tokens_of(), max_new_tokens=9, **FREE)
    first = model.generate(inputs_embeds=embed(tokens_of()), max_new_tokens=4, **options)
    text = embed(torch.cat((tokens_of(), first.sequences), 1))
    cache = {CACHE: first[CACHE]}
    second = model.generate(inputs_embeds=text, max_new_tokens=5, **cache, **FREE)
    assert torch.equal(torch.cat((first.sequences, second), 1), whole[:, 7:])
    with pytest.raises(ValueError, match="inputs_embeds: has 11 tokens, and the cache has read 15"):
        model.generate(inputs_embeds=text, max_new_tokens=2, **cache, **FREE)


# Training


def test_labels_give_the_loss_of_the_next_token(model):
    tokens, mask = padded(7, 5, side="right")
    labels = tokens.masked_fill(mask == 0, -100)
    output = model(tokens, attention_mask=mask, labels=labels)
    logits = model(tokens).logits
    losses = [F.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="sum")]
    losses.append(F.cross_entropy(logits[1, :4], tokens[1, 1:5], reduction="sum"))
    total = float(sum(losses).detach())
    assert output.loss.item() == pytest.approx(total / 10, rel=1e-6)
    assert CACHE not in output
    halved = model(tokens, labels=labels, num_items_in_batch=20).loss
    assert halved.item() == pytest.approx(total / 20, rel=1e-6)
    loss, logits = model(tokens, labels=labels, return_dict=False)
    assert torch.equal(loss, output.loss)
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    assert torch.equal(model(tokens, shift_labels=shifted).loss, output.loss)
    ahead = model(tokens, labels=labels, shift_labels=labels).loss
    assert abs(ahead.item() - output.loss.item()) > 1e-3


def test_smoothed_labels_are_the_next_tokens(tmp_path):
    pytest.importorskip("accelerate")
    arguments = transformers.TrainingArguments(
        str(tmp_path), label_smoothing_factor=0.1, report_to=[], use_cpu=True
    )
    model, tokens, labels = make(), tokens_of(), tokens_of()
    labels[1, 4] = -100
    trainer = transformers.Trainer(model, arguments)
    loss = trainer.compute_loss(model, {"input_ids": tokens, "labels": labels})
    log_p = model(tokens).logits[:, :-1].log_softmax(-1)
    likely = log_p.gather(2, tokens[:, 1:, None])[..., 0]
    smoothed = -(0.9 * likely + 0.1 * log_p.mean(-1))
    assert loss.item() == pytest.approx(smoothed[labels[:, 1:] != -100].mean().item(), rel=1e-5)


def test_no_cache_in_training_and_none_where_it_is_not_asked_for(model):
    tokens = tokens_of()
    assert CACHE in model(tokens)
    assert CACHE not in model(tokens, use_cache=False)
    training = make().train()
    assert CACHE not in training(tokens)
    assert CACHE in training(tokens, use_cache=True)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_give_the_same_gradients(reentrant, wrapped):
    model, tokens = make(dropout=0.1, num_layers=3).train(), tokens_of()
    if wrapped:
        network = LanguageModel(model.config.language_model_config())
        model = KRUForCausalLM.from_language_model(network).train()
    calls = []
    for i, block in enumerate(model.model.network.blocks):
        block.mlp.register_forward_hook(lambda *_, i=i: calls.append(i))

    def gradients():
        torch.manual_seed(1)
        model.zero_grad()
        calls.clear()
        model(tokens, labels=tokens).loss.backward()
        return [p.grad.clone() for p in model.parameters()], [calls.count(i) for i in range(3)]

    plain, once = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again, twice = gradients()
    assert (once, twice) == ([1, 1, 1], [2, 2, 2])
    assert all(torch.equal(a, b) for a, b in zip(plain, again))
    if "every_n_layers" in inspect.signature(model.gradient_checkpointing_enable).parameters:
        model.gradient_checkpointing_enable(every_n_layers=2)
        again, some = gradients()
        assert some == [2, 1, 2]
        assert all(torch.equal(a, b) for a, b in zip(plain, again))
    model.gradient_checkpointing_disable()
    assert gradients()[1] == [1, 1, 1]


def test_trainer_learns_evaluates_and_resumes(tmp_path):
    pytest.importorskip("accelerate")
    rows = [{"input_ids": [BOS, *range(n, n + 10)], "attention_mask": [1] * 11} for n in range(20)]

    def collate(batch):
        tokens = torch.tensor([row["input_ids"] for row in batch])
        return {"input_ids": tokens, "labels": tokens}

    def trainer(steps):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=steps,
            per_device_train_batch_size=10,
            learning_rate=3e-2,
            lr_scheduler_type="constant",
            gradient_checkpointing=True,
            logging_steps=10,
            save_steps=20,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        return transformers.Trainer(
            make(), arguments, train_dataset=rows, eval_dataset=rows, data_collator=collate
        )

    first = trainer(40)
    first.train()
    history = [row["loss"] for row in first.state.log_history if "loss" in row]
    assert float(history[-1]) < 0.3 * float(history[0])
    # the start n of a row is one of 20: ln 20 / 10 is the least loss there is
    assert first.evaluate()["eval_loss"] < 2 * math.log(20) / 10
    resumed = trainer(40)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    for a, b in zip(first.model.parameters(), resumed.model.parameters()):
        assert torch.equal(a, b)
    written = first.model.generate(torch.tensor([[BOS, 4, 5]]), max_new_tokens=6, **FREE)
    assert written[0].tolist() == [BOS, *range(4, 12)]


# Packed documents


def packed(*lengths, seed=0):
    """Documents of random tokens in one row, each alone, and their position ids."""
    documents = [tokens_of(1, length, seed + i) for i, length in enumerate(lengths)]
    ids = torch.cat([torch.arange(length) for length in lengths])[None]
    return torch.cat(documents, 1), documents, ids


@every_model
def test_packed_documents_are_read_apart(kind):
    model, (tokens, documents, ids) = make(kind), packed(4, 1, 6)
    labels = tokens.masked_fill(ids == 0, -100)  # as the collators do
    output = model(tokens, position_ids=ids, labels=labels)
    alone = torch.cat([model(document).logits for document in documents], 1)
    assert (output.logits - alone).abs().max() < 1e-5
    assert (model(tokens).logits - alone).abs().max() > 1e-3
    losses = [
        F.cross_entropy(model(d).logits[0, :-1], d[0, 1:], reduction="sum") for d in documents
    ]
    expected = sum(losses) / 8  # 3 + 0 + 5 targets
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    names, weights = zip(*model.named_parameters())
    found = torch.autograd.grad(output.loss, weights)
    for name, a, b in zip(names, found, torch.autograd.grad(expected, weights)):
        assert (a - b).abs().max() < 1e-5 * b.abs().max() + 1e-6, name


def test_collators_of_packed_batches(model):
    """transformers' own, with all it can return, and TRL's, whose padding is zeros."""
    tokens, documents, ids = packed(4, 1, 6)
    alone = torch.cat([model(document).logits for document in documents], 1)
    collator = transformers.DataCollatorWithFlattening(
        return_flash_attn_kwargs=True, return_seq_idx=True
    )
    batch = collator([{"input_ids": document[0].tolist()} for document in documents])
    assert {"position_ids", "seq_idx", "cu_seq_lens_q", "max_length_k"} <= set(batch)
    assert torch.equal(batch["position_ids"], ids)
    assert (model(**batch).logits - alone).abs().max() < 1e-5
    for name in ("position_ids", "seq_idx", "cu_seq_lens_q"):  # each says it alone
        assert (model(tokens, **{name: batch[name]}).logits - alone).abs().max() < 1e-5
    in_rows = torch.tensor([0, 4, 5, 11, 13, 22])
    logits = model(tokens.repeat(2, 1), cu_seq_lens_q=in_rows).logits
    assert (logits[0] - alone[0]).abs().max() < 1e-5
    assert (logits[1, 2:] - model(tokens[:, 2:]).logits[0]).abs().max() < 1e-5
    logits = model(F.pad(tokens, (0, 2)), position_ids=F.pad(ids, (0, 2))).logits
    assert (logits[:, :11] - alone).abs().max() < 1e-5


def test_position_ids_beside_bos_masks_embeddings_and_hidden_states(model):
    tokens, documents, ids = packed(4, 6)
    tokens[0, 6] = BOS  # cuts too, where ids do not
    expected, _ = model.model.network(tokens, None, (ids == 0) | (tokens == BOS))
    assert torch.equal(model(tokens, position_ids=ids).logits, expected)
    embedded = model.get_input_embeddings()(documents[1])
    double = torch.cat((embedded, embedded), 1)
    output = model(inputs_embeds=double, position_ids=torch.arange(6).repeat(2)[None])
    assert (output.logits[:, 6:] - output.logits[:, :6]).abs().max() < 1e-5
    tokens, mask = padded(7, 4)
    expected = model(tokens, attention_mask=mask).logits
    ids = (mask.cumsum(1) - 1).clamp_min(0)
    for row in (ids, ids.masked_fill(mask == 0, 1), torch.arange(7)[None]):  # ids of padding: any
        found = model(tokens, attention_mask=mask, position_ids=row).logits
        assert (found - expected)[mask == 1].abs().max() < 1e-6
    mask = torch.tensor([[1, 1, 0, 0, 1, 1, 1], [1, 1, 0, 1, 1, 1, 1]])  # behind a tuned prompt
    ids = torch.tensor([[0, 1, 9, 9, 2, 3, 4], [0, 1, 9, 0, 1, 2, 3]])
    logits = model(tokens, attention_mask=mask, position_ids=ids).logits
    kept = tokens[0][mask[0] == 1][None]
    assert (logits[0][mask[0] == 1] - model(kept).logits[0]).abs().max() < 1e-5
    assert (logits[1, 3:] - model(tokens[1:, 3:]).logits[0]).abs().max() < 1e-5


def test_position_ids_go_on_from_a_cache_or_start_anew(model):
    tokens, more = tokens_of(), tokens_of(2, 3, seed=1)
    with torch.no_grad():
        cache = model(tokens)[CACHE]
        whole = model(torch.cat((tokens, more), 1)).logits[:, 7:]
        later = torch.tensor([[7, 8, 9], [0, 1, 2]])
        logits = model(more, position_ids=later, **{CACHE: copy.copy(cache)}).logits
        assert (logits[0] - whole[0]).abs().max() < 1e-5
        assert (logits[1] - model(more[1:]).logits[0]).abs().max() < 1e-5
        with pytest.raises(
            ValueError, match="seq_idx: does not say whether the first token goes on"
        ):
            model(more, seq_idx=torch.zeros(2, 3), **{CACHE: cache})


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generation_with_position_ids_given(model, options):
    (tokens, mask), options = padded(7, 4), {**FREE, "max_new_tokens": 8, **options}
    expected = model.generate(tokens, attention_mask=mask, **options)
    ids = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    for use_cache in (True, False):
        options["use_cache"] = use_cache
        found = model.generate(tokens, attention_mask=mask, position_ids=ids, **options)
        assert torch.equal(found, expected)
    text, documents, ids = packed(3, 5)
    found = model.generate(text, position_ids=ids, **options)
    assert torch.equal(found[:, 3:], model.generate(documents[1], **options))


def test_packed_documents_compiled_and_exported(model):
    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, tokens, ids):
            return self.model(tokens, position_ids=ids, use_cache=False).logits

    (tokens, _, ids), (others, _, of_others) = packed(4, 6), packed(2, 5, 3, seed=5)
    with torch.no_grad():
        expected = Logits()(others, of_others)
        exported = torch.export.export(Logits(), (others, of_others.flip(1))).module()
        assert (exported(others, of_others) - expected).abs().max() < 1e-5
        compiled = torch.compile(Logits(), backend="aot_eager", fullgraph=True)
        assert (compiled(others, of_others) - expected).abs().max() < 1e-5
        assert (compiled(tokens, ids) - Logits()(tokens, ids)).abs().max() < 1e-5


def test_bad_position_ids_are_refused(model):
    tokens, _, ids = packed(4, 6)
    two = tokens.repeat(2, 1)
    jump = torch.cat((ids, ids + (ids > 2)))
    cases = [
        (dict(position_ids=jump), r"position_ids: row 1 goes from 2 to 4 at token 3; they must"),
        (dict(position_ids=ids + 2), "row 0 goes from 5 to 2 at token 4"),
        (dict(position_ids=ids * 0 + 1), "row 0 goes from 1 to 1 at token 1"),
        (dict(position_ids=ids[:, 1:]), r"position_ids: must be \(2, 10\), .*, got \(1, 9\)"),
        (dict(position_ids=ids[None]), r"position_ids: must be \(2, 10\)"),
        (dict(seq_idx=ids.repeat(3, 1)), r"seq_idx: must be \(2, 10\)"),
        (
            dict(cu_seq_lens_q=torch.tensor([0, 4, 10])),
            r"cu_seq_lens_q: must count up from 0 to 20",
        ),
        (dict(cu_seq_lens_k=torch.tensor([0, 9, 4, 20])), "cu_seq_lens_k: must count up"),
        (dict(cu_seq_lens_q=ids), r"cu_seq_lens_q: must be \(documents \+ 1,\), got \(1, 10\)"),
        (
            dict(position_ids=ids, seq_idx=torch.zeros(1, 10)),
            "seq_idx: disagrees with position_ids on whether token 4 of row 0 starts a document",
        ),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            model(two, **arguments)
    with pytest.raises(TypeError, match="seqidx: no argument of KRUModel"):
        model.model(two, seqidx=ids)


# Generation

DECODING = {
    "greedy": {},
    "sampled": {"do_sample": True},
    "nucleus": {"do_sample": True, "top_p": 0.7, "temperature": 0.8, "num_return_sequences": 2},
    "beams": {"num_beams": 4},
    "beams-returned": {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.0},
    "beam-sample": {"num_beams": 3, "do_sample": True},
    "penalties": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "ended": {"eos_token_id": [3, 7, 11], "min_new_tokens": 3},
    "beams-ended": {"num_beams": 3, "eos_token_id": [3, 7, 11], "early_stopping": True},
}


@pytest.mark.parametrize("name", DECODING)
def test_with_the_cache_as_without(model, name):
    options = {**FREE, "max_new_tokens": 12, **DECODING[name]}
    tokens, mask = padded(7, 4)
    outs = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        outs.append(model.generate(tokens, attention_mask=mask, use_cache=use_cache, **options))
    assert torch.equal(*outs)
    assert outs[0].shape[1] > 7


@every_model
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_with_the_cache_as_without_for_every_model(kind, options):
    model, (tokens, mask) = make(kind), padded(5, 3)
    options = {**FREE, "max_new_tokens": 12, **options}
    cached = model.generate(tokens, attention_mask=mask, **options)
    assert torch.equal(
        cached, model.generate(tokens, attention_mask=mask, use_cache=False, **options)
    )


def test_generation_equals_one_pass_over_the_whole_text(model):
    output = model.generate(
        tokens_of(),
        max_new_tokens=80,
        return_dict_in_generate=True,
        output_logits=True,
        **FREE,
    )
    stepwise = torch.stack(output.logits, 1)
    whole = model(output.sequences[:, :-1]).logits[:, 6:]
    assert torch.equal(whole.argmax(-1), output.sequences[:, 7:])
    assert (stepwise - whole).abs().max() < 1e-5
    assert output.sequences[:, 7:].unique().numel() > 4  # not one token over and over


@torch.no_grad()
def brute_force_beams(network, prompt, beams, count):
    """The `beams` best texts, each scored from scratch: pairs of tokens and log-probability."""
    kept = [(prompt, 0.0)]
    for _ in range(count):
        longer = []
        for tokens, score in kept:
            text = torch.tensor([tokens])
            logits = network(text, None, text == BOS)[0][0, -1]
            for token, log_p in enumerate(logits.log_softmax(-1).tolist()):
                longer.append(([*tokens, token], score + log_p))
        kept = sorted(longer, key=lambda pair: -pair[1])[:beams]
    return kept


def test_beams_are_those_of_a_brute_force_search(model):
    prompt = tokens_of(1, 4)
    expected = brute_force_beams(model.model.network, prompt[0].tolist(), 4, 7)
    output = model.generate(
        prompt,
        num_beams=4,
        num_return_sequences=4,
        max_new_tokens=7,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
        **FREE,
    )
    assert output.sequences.tolist() == [tokens for tokens, _ in expected]
    scores = torch.tensor([score for _, score in expected])
    assert (output.sequences_scores - scores).abs().max() < 1e-5


@every_model
def test_left_padding_changes_nothing(kind):
    model, (tokens, mask) = make(kind), padded(9, 4, 1)
    logits = model(tokens, attention_mask=mask).logits
    options = {**FREE, "max_new_tokens": 10}
    written = model.generate(tokens, attention_mask=mask, **options)
    for row, length in enumerate((9, 4, 1)):
        alone = tokens[row : row + 1, -length:]
        assert (logits[row, -length:] - model(alone).logits[0]).abs().max() < 1e-5
        assert torch.equal(written[row, 9 - length :], model.generate(alone, **options)[0])


@pytest.mark.parametrize("ends", [None, 7])
def test_without_a_mask_a_bos_is_read_though_it_is_the_padding_token(ends):
    """transformers takes padding tokens for padding where EOS is another token."""
    model, tokens = make(eos_token_id=ends), tokens_of(1, 6)
    for place in (0, 3):
        tokens[0, place] = BOS  # a prompt's start; then a document's start inside, too
        options = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
        logits = model.generate(tokens, **options).logits[0]
        assert (logits - model(tokens).logits[:, -1]).abs().max() < 1e-5


def test_without_a_mask_other_padding_is_still_inferred():
    model, (tokens, mask) = make(eos_token_id=7, pad_token_id=5), padded(8, 3)
    tokens = torch.where(mask == 0, 5, tokens.where(tokens != 5, 6))
    options = {"max_new_tokens": 8, "eos_token_id": None}
    expected = model.generate(tokens, attention_mask=mask, **options)
    assert torch.equal(model.generate(tokens, **options), expected)


def test_padding_is_not_read_whatever_it_holds(model):
    tokens, mask = padded(6, 3)
    other = torch.where(mask == 0, 5, tokens)
    a, b = (model(t, attention_mask=mask).logits[1, 3:] for t in (tokens, other))
    assert torch.equal(a, b)
    assert (model(other).logits[1, 3:] - a).abs().max() > 1e-3


@every_model
def test_padding_between_the_first_tokens_changes_nothing(kind):
    model, tokens = make(kind), tokens_of(3, 9)
    tokens[1, 7] = BOS
    mask = torch.ones(3, 9).long()
    mask[0, 2:5] = mask[1, 0] = mask[1, 3:5] = 0
    output = model(tokens, attention_mask=mask, output_hidden_states=True)
    options = {**FREE, "max_new_tokens": 6}
    written = model.generate(tokens, attention_mask=mask, **options)
    for row in range(3):
        alone = tokens[row : row + 1, mask[row] == 1]
        expected = model(alone, output_hidden_states=True)
        for found, right in zip(output.hidden_states, expected.hidden_states, strict=True):
            assert (found[row, mask[row] == 1] - right[0]).abs().max() < 1e-5
        for found, right in zip(output[CACHE].state, expected[CACHE].state, strict=True):
            if kind != "transformer":  # whose state holds padding too, out of sight
                assert (found[row] - right[0]).abs().max() < 1e-5
        assert torch.equal(written[row, 9:], model.generate(alone, **options)[0, alone.shape[1] :])
    mask[0, 8] = 0
    logits = model(tokens, attention_mask=mask).logits[0, mask[0] == 1]
    assert (logits - model(tokens[:1, mask[0] == 1]).logits[0]).abs().max() < 1e-5


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_prompt_in_chunks_equals_one_in_one_go(model, size):
    tokens, mask = padded(9, 4, 1)
    options = {**FREE, "max_new_tokens": 6, "attention_mask": mask}
    whole = model.generate(tokens, **options)
    chunked = model.generate(tokens, prefill_chunk_size=size, **{CACHE: KRUCache()}, **options)
    assert torch.equal(whole, chunked)


def test_a_long_prompt_is_read_in_pieces_of_bounded_size(model, monkeypatch):
    tokens = tokens_of(2, 50)
    tokens[0, 20] = BOS
    with torch.no_grad():
        expected = model(tokens)
    monkeypatch.setattr(hf.modeling, "PROMPT_CHUNK", 8)
    time_first, seen = model.model.network.time_first, []

    def watched(tokens, *args):
        seen.append(tokens.shape[1])
        return time_first(tokens, *args)

    monkeypatch.setattr(model.model.network, "time_first", watched)
    with torch.no_grad():
        output = model(tokens)
    assert seen == [8] * 6 + [2]
    assert (output.logits - expected.logits).abs().max() < 1e-5
    assert output[CACHE].seen == 50


def test_generation_goes_on_from_a_returned_cache(model):
    options = {**FREE, "return_dict_in_generate": True}
    first = model.generate(tokens_of(), max_new_tokens=8, **options)
    kept = copy.copy(first[CACHE])
    assert kept.seen == 14  # the last token has not been read
    whole = model.generate(tokens_of(), max_new_tokens=20, **options).sequences
    for _ in range(2):  # the copy is a point to come back to
        second = model.generate(
            first.sequences, max_new_tokens=12, **{CACHE: copy.copy(kept)}, **options
        )
        assert torch.equal(second.sequences, whole)
    assert second[CACHE].seen == 26
    more = torch.cat((first.sequences, tokens_of(2, 3, seed=5)), 1)  # the user says something
    answer = model.generate(more, max_new_tokens=5, **{CACHE: kept}, **FREE)
    assert torch.equal(answer, model.generate(more, max_new_tokens=5, **FREE))
    assert kept.seen == 22  # brought up to date in place


def test_a_padded_batch_goes_on_from_its_cache(model):
    tokens, mask = padded(6, 2)
    options = {**FREE, "return_dict_in_generate": True}
    first = model.generate(tokens, attention_mask=mask, max_new_tokens=4, **options)
    longer = torch.cat((mask, torch.ones(2, 4).long()), 1)
    second = model.generate(
        first.sequences,
        attention_mask=longer,
        max_new_tokens=4,
        **{CACHE: first[CACHE]},
        **options,
    )
    whole = model.generate(tokens, attention_mask=mask, max_new_tokens=8, **FREE)
    assert torch.equal(second.sequences, whole)


def test_a_saved_state_continues_the_text_bit_for_bit(model, tmp_path):
    tokens, mask = padded(8, 3)
    with torch.no_grad():
        cache = model(tokens, attention_mask=mask)[CACHE]
        save_file(cache.state_dict(), tmp_path / "state.safetensors")
        loaded = KRUCache.from_state_dict(load_file(tmp_path / "state.safetensors"))
        assert loaded.seen == 8
        for token in (3, 14, 1):
            step = torch.full((2, 1), token)
            a = model(step, **{CACHE: cache})
            b = model(step, **{CACHE: loaded})
            assert torch.equal(a.logits, b.logits)
    assert all(torch.equal(x, y) for x, y in zip(cache.state, loaded.state))


def test_rows_that_have_not_begun_are_saved_too(model, tmp_path):
    tokens, mask = padded(8, 3)
    cache = KRUCache()
    with torch.no_grad():
        model(tokens[:, :4], attention_mask=mask[:, :4], **{CACHE: cache})
        assert cache.started.tolist() == [True, False]
        save_file(cache.state_dict(), tmp_path / "state.safetensors")
        loaded = KRUCache.from_state_dict(load_file(tmp_path / "state.safetensors"))
        logits = model(tokens[:, 4:], attention_mask=mask, **{CACHE: copy.copy(loaded)}).logits
        expected = model(tokens, attention_mask=mask).logits[:, 4:]
    assert (logits[0] - expected[0]).abs().max() < 1e-5
    assert (logits[1, 1:] - expected[1, 1:]).abs().max() < 1e-5
    with torch.no_grad():  # without a mask everything is text
        logits = model(tokens[:, 5:], **{CACHE: loaded}).logits[1]
        assert (logits - model(tokens[1:, 5:]).logits[0]).abs().max() < 1e-5


def test_one_token_per_step_and_a_state_of_constant_size(model, monkeypatch):
    time_first, seen = model.model.network.time_first, []

    def watched(tokens, *args):
        x, state = time_first(tokens, *args)
        seen.append((tokens.shape[1], sum(s.numel() for s in state)))
        return x, state

    monkeypatch.setattr(model.model.network, "time_first", watched)
    model.generate(tokens_of(), max_new_tokens=200, **FREE)
    assert [length for length, _ in seen] == [7] + [1] * 199
    d = model.config.d_model
    assert {size for _, size in seen} == {2 * 2 * (24 + d)}  # layers, rows, state and last input


def test_cache_rows_are_selected_and_repeated(model):
    with torch.no_grad():
        cache = model(tokens_of())[CACHE]
        step = tokens_of(2, 1, seed=3)
        expected = model(step, **{CACHE: copy.copy(cache)}).logits
        turned = copy.copy(cache)
        turned.reorder_cache(torch.tensor([1, 0, 1]))
        logits = model(step[[1, 0, 1]], **{CACHE: turned}).logits
        assert (logits - expected[[1, 0, 1]]).abs().max() < 1e-5
        cache.batch_repeat_interleave(2)
        logits = model(step.repeat_interleave(2, 0), **{CACHE: cache}).logits
        assert (logits - expected.repeat_interleave(2, 0)).abs().max() < 1e-5


def test_generation_from_nothing_starts_with_bos_and_ends_with_eos(model):
    torch.manual_seed(0)
    written = model.generate(do_sample=True, max_new_tokens=300)
    assert written[0, 0] == BOS
    assert written[0, -1] == BOS
    assert (written[0, 1:-1] != BOS).all()


def test_tokens_stream_as_they_are_written(model):
    class Streamer(transformers.generation.streamers.BaseStreamer):
        def __init__(self):
            self.pieces, self.ended = [], False

        def put(self, value):
            self.pieces.append(value.flatten().tolist())

        def end(self):
            self.ended = True

    streamer = Streamer()
    written = model.generate(tokens_of(1), max_new_tokens=6, streamer=streamer, **FREE)
    assert streamer.ended
    assert [len(piece) for piece in streamer.pieces] == [7] + [1] * 6
    assert [token for piece in streamer.pieces for token in piece] == written[0].tolist()


@pytest.fixture(scope="module")
def writer():
    """A model that writes ASCII bytes, and its tokenizer."""
    model = make(vocab_size=257, bos_token_id=256)
    model.generation_config.suppress_tokens = list(range(128, 257))
    return model, pretrained_tokenizer(ByteTokenizer())


@pytest.mark.parametrize("beams", [1, 3])
def test_text_ends_with_a_stop_string(writer, beams):
    model, tokenizer = writer
    prompt = tokenizer("for", return_tensors="pt")

    def written(**kwargs):
        output = model.generate(**prompt, max_new_tokens=20, num_beams=beams, **kwargs)
        return tokenizer.decode(output[0], skip_special_tokens=True)

    text = written()
    assert len(text) == 23
    stop = text[10:12]
    stopped = written(stop_strings=[stop], tokenizer=tokenizer)
    assert len(stopped) < 23
    assert stopped.index(stop, 3) == len(stopped) - 2
    if beams == 1:
        assert text.startswith(stopped)
        assert written(token_healing=True, tokenizer=tokenizer) == text  # a byte has no longer form
        pipe = transformers.pipeline("text-generation", model, tokenizer=tokenizer)
        options = {"stop_strings": [stop], "tokenizer": tokenizer, "do_sample": False}
        assert pipe("for", max_new_tokens=20, **options)[0]["generated_text"] == stopped


def test_no_cache_where_use_cache_is_none(model):
    options = {"max_new_tokens": 8, "output_logits": True, "return_dict_in_generate": True, **FREE}
    outputs = [model.generate(tokens_of(), use_cache=x, **options) for x in (True, None)]
    expected, logits = (torch.stack(output.logits) for output in outputs)
    assert (logits - expected).abs().max() < 1e-5
    assert CACHE not in outputs[1]


def test_assisted_generation_is_refused(model):
    with pytest.raises(ValueError, match="stateful"):
        model.generate(tokens_of(1), assistant_model=model, max_new_tokens=3)


# Fast single steps

STEPS = {
    "modrelu": {},
    "modtanh-4x2x3": {"nonlinearity": "modtanh", "factors": (4, 2, 3), "num_heads": 1},
    "tanh-heads": {"nonlinearity": "tanh", "num_heads": 3},
    "relu-one-factor": {"nonlinearity": "relu", "factors": (24,), "num_heads": 1},
    "identity-real": {"nonlinearity": "identity", "field": "real"},
    "modrelu-real-heads": {"nonlinearity": "modrelu", "field": "real", "num_heads": 4},
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", STEPS)
def test_a_prepared_step_equals_the_layer(name, batch):
    torch.manual_seed(0)
    options = {"num_heads": 2, **STEPS[name]}
    kru = KRU(5, 24, **options).double()
    if kru.beta() is not None:
        torch.nn.init.uniform_(kru.beta(), -0.5, 0.5)
    x = torch.randn(4, batch, 5, dtype=torch.float64)
    with torch.no_grad():
        expected, h_n = kru(x)
        step = Step(kru)
        h = torch.zeros_like(h_n[0])
        for t in range(4):
            (h,) = step(kru.input_projection(x[t : t + 1])[:, 0], h)
            assert (h - expected[t]).abs().max() < 1e-13


@pytest.mark.parametrize("factors", [(3, 4), (12,), (2, 2, 3)])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_prepared_step_equals_the_lstm(factors, batch):
    torch.manual_seed(0)
    lstm = KRULSTM(5, 24, num_heads=2, factors=factors).double()
    x = torch.randn(4, batch, 5, dtype=torch.float64)
    with torch.no_grad():
        expected, (_, c_n) = lstm(x)
        step = LSTMStep(lstm)
        h, c = torch.zeros_like(expected[0]), torch.zeros_like(c_n[0])
        for t in range(4):
            h, c = step(lstm.input_projection(x[t : t + 1])[:, 0], h, c)
            assert (h - expected[t]).abs().max() < 1e-13
        assert (c - c_n[0]).abs().max() < 1e-13


@pytest.mark.parametrize("model", ["kru", "krulstm"])
@pytest.mark.parametrize("batch", [1, 2])
def test_decoding_takes_the_prepared_steps_and_no_others(model, batch, monkeypatch):
    config = LanguageModelConfig(model=model, d_model=16, hidden_size=12)
    network = LanguageModel(config).eval()
    tokens, used = torch.randint(257, (batch, 6)), []
    for kind in (Step, LSTMStep):
        call = kind.__call__
        monkeypatch.setattr(kind, "__call__", lambda *args, f=call: used.append(1) or f(*args))
    with torch.no_grad():
        expected, _ = network(tokens)
        with network.decoding():
            logits, state = network(tokens[:, :3])
            assert not used
            for t in range(3, 6):
                logits, state = network(tokens[:, t : t + 1], state)
                assert (logits[:, 0] - expected[:, t]).abs().max() < 1e-5
            assert len(used) == 6
            network(tokens[:, :1], state, torch.ones(batch, 1, dtype=torch.bool))
            assert len(used) == 6
            with torch.enable_grad():
                network(tokens[:, :1], state)[0].sum().backward()
            assert len(used) == 6
        network(tokens[:, :1], state)
    assert len(used) == 6


# Weights that something else keeps, brings in or computes


@pytest.mark.parametrize("where", ["cpu", "disk", "mixed", "loaded"])
@pytest.mark.parametrize("kind", ["kru", "krulstm"])
def test_an_offloaded_model_writes_the_same(kind, where, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, (tokens, mask) = make(kind), padded(7, 4)
    options = {**FREE, "max_new_tokens": 6, "attention_mask": mask}
    expected = model.generate(tokens, **options)
    penalty = unitarity_penalty(model).item()
    parts = {"embedding": "cpu", "blocks.0": "disk", "blocks.1": "cpu", "norm": "disk"}
    device_map = {f"model.network.{name}": place for name, place in parts.items()}
    device_map["lm_head"] = "cpu"
    if where == "cpu":
        model = accelerate.cpu_offload(model, execution_device="cpu")
    elif where == "disk":
        model = accelerate.disk_offload(model, tmp_path / "off", execution_device="cpu")
    elif where == "mixed":
        options_of_map = {"main_device": "cpu", "offload_dir": tmp_path / "off"}
        model = accelerate.dispatch_model(model, device_map, **options_of_map)
    else:
        model.save_pretrained(tmp_path / "model")
        model = KRUForCausalLM.from_pretrained(
            tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "off"
        )
    assert any(p.is_meta for name, p in model.named_parameters() if ".factor" in name)
    for more in ({}, {"num_beams": 3}, {"use_cache": False}):
        found = model.generate(tokens, **options, **more)
        assert torch.equal(found, make(kind).generate(tokens, **options, **more))
    assert unitarity_penalty(model).item() == pytest.approx(penalty, rel=1e-6)
    assert any(p.is_meta for name, p in model.named_parameters() if ".factor" in name)
    if where in ("mixed", "loaded"):  # without a device map transformers saves no offloaded model
        model.save_pretrained(tmp_path / "saved")
        saved = KRUForCausalLM.from_pretrained(tmp_path / "saved")
        assert torch.equal(saved.generate(tokens, **options), expected)


def test_every_module_is_called_at_every_step(model):
    model, calls = make(), {}
    for name, module in model.named_modules():
        calls[name] = 0
        if not isinstance(module, torch.nn.ModuleList):

            def count(*_, name=name):
                calls[name] += 1

            module.register_forward_hook(count)
    model.generate(tokens_of(), max_new_tokens=8, **FREE)
    assert {name for name, count in calls.items() if count < 8} == {"model.network.blocks"}


class Half(torch.nn.Module):
    def forward(self, w):
        return w / 2


class Inside(torch.nn.Module):
    """A wrapper that passes nothing on but calls."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


class Louder(KRU):
    def forward(self, x, *args, **kwargs):
        return super().forward(3 * x, *args, **kwargs)


def replaced(kru):
    forward = kru.forward
    kru.forward = lambda x, *args, **kwargs: forward(3 * x, *args, **kwargs)


WRAPPINGS = {
    "pre-hook": lambda kru: kru.register_forward_pre_hook(lambda _, args: (3 * args[0], *args[1:])),
    "hook": lambda kru: kru.register_forward_hook(lambda _, args, out: (out[0].abs(), out[1])),
    "replaced": replaced,
    "subclass": lambda kru: setattr(kru, "__class__", Louder),
    "factor": lambda kru: parametrize.register_parametrization(kru, "factor0_l0", Half()),
    "weight_ih": lambda kru: parametrize.register_parametrization(kru, "weight_ih_l0", Half()),
    "weight_norm": lambda kru: torch.nn.utils.parametrizations.weight_norm(kru, "factor1_l0"),
    "pruned": lambda kru: prune.l1_unstructured(kru, "factor0_l0", 0.3),
    "compiled": lambda kru: torch.compile(kru, backend="eager"),
    "inside": Inside,
}


@pytest.mark.parametrize("name", WRAPPINGS)
def test_steps_of_a_wrapped_layer_are_those_of_its_own_forward(name):
    network = make().model.network
    mixer, tokens = network.blocks[0].mixer, tokens_of(2, 9)
    with torch.no_grad():
        before, _ = network(tokens)
        wrapped = WRAPPINGS[name](mixer.kru)
        if name in ("compiled", "inside"):
            mixer.kru = wrapped
        expected, _ = network(tokens)
        same = name in ("compiled", "inside", "weight_norm")
        assert ((expected - before).abs().max() < 1e-5) == same
        with network.decoding():
            logits, state = network(tokens[:, :4])
            for t in range(4, 9):
                logits, state = network(tokens[:, t : t + 1], state)
                assert (logits[:, 0] - expected[:, t]).abs().max() < 1e-5
    assert network.num_recurrent_parameters >= 104
    assert unitarity_penalty(network) > 0


@pytest.mark.parametrize("name", ["gate", "input_gate", "norm", "projection", "embedding"])
def test_other_wrapped_modules(name):
    model, tokens = make(), tokens_of()
    expected, network = model.generate(tokens, max_new_tokens=6, **FREE), model.model.network
    logits, _ = network(tokens)
    owner = network if name == "embedding" else network.blocks[0].mixer
    setattr(owner, name, Inside(getattr(owner, name)))
    assert torch.equal(model.generate(tokens, max_new_tokens=6, **FREE), expected)
    assert torch.equal(network(tokens)[0], logits)  # its head is the embedding


def test_weights_that_change_while_decoding():
    """Other tensors in the place of those that a step was made of."""
    network, tokens = make().model.network, tokens_of(2, 3)
    with torch.no_grad(), network.decoding():
        _, state = network(tokens)
        network(tokens[:, :1], state)
        kru = network.blocks[0].mixer.kru
        kru.factor0_l0 = torch.nn.Parameter(2 * kru.factor0_l0)
        found, _ = network(tokens[:, :1], state)
    assert (found - network(tokens[:, :1], state)[0]).abs().max() < 1e-5


@pytest.mark.parametrize("make_layers", [KRU, KRULSTM])
@pytest.mark.parametrize("batch_first", [False, True])
def test_layers_decode_by_themselves(make_layers, batch_first, monkeypatch):
    torch.manual_seed(0)
    layers = make_layers(5, 12, 3, batch_first=batch_first, dropout=0.5).eval()
    used, kind = [], layers.step_type
    call = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda *args: used.append(1) or call(*args))
    x = torch.randn(6, 2, 5)
    with torch.no_grad():
        expected, last = layers(x.transpose(0, 1) if batch_first else x)
        with layers.decoding():
            state = None
            for t in range(6):
                step = x[t : t + 1]
                output, state = layers(step.transpose(0, 1) if batch_first else step, state)
                wanted = expected[:, t : t + 1] if batch_first else expected[t : t + 1]
                assert output.shape == wanted.shape
                assert (output - wanted).abs().max() < 1e-5
            assert len(used) == 5 * 3
            with pytest.raises(TypeError, match=r"input: must be torch\.float32"):
                layers(step.double(), state)
            short = state[:2] if make_layers is KRU else tuple(s[:2] for s in state)
            with pytest.raises(ValueError, match="h_0: "):
                layers(step, short)
    for a, b in zip(
        [last] if make_layers is KRU else last, [state] if make_layers is KRU else state
    ):
        assert (a - b).abs().max() < 1e-5


def test_why_no_graph_stands_for_a_step():
    def reason(change):
        network = make().model.network
        change(network)
        return why_not_graphed(network)

    in_place = "its weights are on ['cpu'], not on one GPU"
    assert reason(lambda network: None) == in_place
    assert reason(lambda network: network.register_forward_hook(print)) == "the model has hooks"
    assert "blocks.1.mixer.gate has" in reason(
        lambda network: network.blocks[1].mixer.gate.register_forward_pre_hook(print)
    )
    assert "the forward of blocks.0.mixer.kru is replaced" in reason(
        lambda network: replaced(network.blocks[0].mixer.kru)
    )
    assert "norm is a Inside" in reason(lambda n: setattr(n, "norm", Inside(n.norm)))
    assert "blocks.0.mixer.kru is a ParametrizedKRU" in reason(
        lambda network: WRAPPINGS["factor"](network.blocks[0].mixer.kru)
    )
    assert reason(lambda network: network.to("meta")) == in_place.replace("cpu", "meta")
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert reason(lambda network: None) == "every module has a hook"
    hook.remove()


def test_the_layers_say_why_no_kernel_runs_them():
    assert KRU(4, 6, backend="torch").why_not_triton() == 'backend="torch"'
    assert "'meta'" in KRU(4, 64, device="meta").why_not_triton()
    assert "float64" in KRU(4, 64, dtype=torch.float64).why_not_triton()
    assert KRU(4, 64, 2).why_not_triton() is None  # interpreted
    assert KRULSTM(4, 64, bidirectional=True).why_not_triton() is None
    assert kru_triton.KRUCell(4, 64).why_not_triton() is None
    assert "backend" in kru_triton.KRUCell(4, 64, backend="torch").why_not_triton()


def test_an_averaged_copy_writes():
    model = make()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    expected = model.generate(tokens_of(), max_new_tokens=5, **FREE)
    assert torch.equal(averaged.module.generate(tokens_of(), max_new_tokens=5, **FREE), expected)


# Steps as graphs


class Recording(TorchDispatchMode):
    """What a CUDA graph does, on a CPU: what runs is noted, and runs again on the same memory."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, results))
        return results

    def replay(self):
        for function, args, kwargs, results in self.calls:
            again = function(*args, **kwargs)
            for place, result in zip(tree_leaves(results), tree_leaves(again)):
                if isinstance(place, Tensor) and place.data_ptr() != result.data_ptr():
                    place.copy_(result)


@pytest.fixture
def graphs_on_a_cpu(monkeypatch):
    """`torch.cuda` as far as capturing goes; the list of recordings."""
    made = []
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, stand_in in {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": lambda: made.append(Recording()) or made[-1],
        "graph": lambda graph: graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return made


@pytest.mark.parametrize("model", ["kru", "krulstm"])
@pytest.mark.parametrize("reset", [False, True])
def test_steps_as_graphs(model, reset, graphs_on_a_cpu):
    """Each kind of call is captured once, and replays read what they are given."""
    torch.manual_seed(0)
    network = LanguageModel(LanguageModelConfig(model=model, d_model=16, hidden_size=12)).eval()
    tokens = torch.randint(257, (2, 8))
    cut = torch.zeros(2, 8, dtype=torch.bool)
    cut[0, 5] = reset
    with torch.no_grad():
        expected, _ = network(tokens, None, cut)
        with network.decoding():
            assert network.graphs is None  # on a CPU
            network.graphs = {}
            logits, state = network(tokens[:, :3], None, cut[:, :3])
            assert not graphs_on_a_cpu
            kept = []
            for t in range(3, 8):
                at = slice(t, t + 1)
                kept.append(state)
                logits, state = network(tokens[:, at], state, cut[:, at] if reset else None)
                assert (logits[:, 0] - expected[:, t]).abs().max() < 1e-5
            assert len(graphs_on_a_cpu) == 1
            again, _ = network(tokens[:, 5:6], kept[2], cut[:, 5:6] if reset else None)
            assert (again[:, 0] - expected[:, 5]).abs().max() < 1e-5  # kept states are copies
            network(tokens[:1, :1], [s[:1] for s in state])  # one row
            assert len(graphs_on_a_cpu) == 2
            with torch.enable_grad():
                network(tokens[:, :1], state)[0].sum().backward()
            network.train()(tokens[:, :1], state)
            assert len(graphs_on_a_cpu) == 2
        assert network.graphs is None


# Bad input


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


def test_bad_masks_are_refused(model):
    tokens, mask = padded(7, 4)
    right = mask.flip(1)
    cases = [
        (dict(attention_mask=mask * 0), "row 0 is padding alone; an empty prompt starts with"),
        (dict(attention_mask=mask[:, 1:]), r"attention_mask: must be \(2, 7\)"),
        (dict(attention_mask=mask[None]), r"attention_mask: must be \(2, 7\)"),
        (dict(attention_mask=right, use_cache=True), "padding on the right, which would become"),
        (dict(attention_mask=right, cache=KRUCache()), "padding on the right"),
        (
            dict(attention_mask=right, labels=tokens),
            "labels: 3 positions that attention_mask marks",
        ),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            model(tokens, **arguments)
    with pytest.raises(ValueError, match="padding on the right"):
        model.generate(tokens, attention_mask=right, max_new_tokens=2, **FREE)
    cache = model(tokens, attention_mask=mask)[CACHE]
    late = torch.tensor([[1], [0]])
    model(tokens[:, :1], attention_mask=late * 0 + 1, cache=copy.copy(cache))
    with pytest.raises(ValueError, match="padding on the right"):
        model(tokens[:, :1], attention_mask=late, cache=cache)
    with pytest.raises(ValueError, match="row 0 has padding between its tokens and those that"):
        model(tokens, attention_mask=mask.flip(0), cache=cache)
    assert CACHE not in model(tokens, attention_mask=right)  # its logits are right, no state is


def test_nothing_new_to_read_is_refused(model):
    output = model.generate(tokens_of(), max_new_tokens=5, return_dict_in_generate=True, **FREE)
    with pytest.raises(ValueError, match="has 3 tokens, and the cache has read 11"):
        model.generate(tokens_of(2, 3), max_new_tokens=2, **{CACHE: output[CACHE]}, **FREE)


def test_bad_configurations_are_refused(tmp_path):
    cases = [
        (dict(hiden_size=3), ValueError, "hiden_size: .* did you mean hidden_size"),
        (dict(zzz=3), ValueError, "zzz: KRUConfig has no such setting; it has vocab_size, model"),
        (dict(hidden_size="big"), TypeError, "'hidden_size' expected int, got str"),
        (dict(num_layers=2.0), TypeError, "num_layers"),
        (dict(gated=1), TypeError, "gated"),
        (dict(model="gpt"), TypeError, "model"),
        (dict(factors="44"), TypeError, "factors"),
        (dict(factors=[4, 4.0]), TypeError, "factors"),
        (dict(bos_token_id=257), ValueError, r"bos_token_id: must be in \[0, vocab_size=257\)"),
        (dict(pad_token_id=-1), ValueError, "pad_token_id: must be in"),
        (dict(eos_token_id="x"), TypeError, "eos_token_id"),
        (dict(tie_word_embeddings="no"), TypeError, "tie_word_embeddings"),
    ]
    for arguments, kind, message in cases:
        with pytest.raises(kind, match=message):
            KRUConfig(**arguments)
    assert KRUConfig(mlp_ratio=3).mlp_ratio == 3.0
    changed = KRUConfig()
    changed.hidden_size = "big"  # transformers checks no assignment
    with pytest.raises(TypeError, match="hidden_size"):
        KRUForCausalLM(changed)
    with pytest.raises(ValueError, match="hidden_size"):
        KRUForCausalLM(KRUConfig(hidden_size=30, factors=(4, 4)))


def test_settings_survive_the_folder_and_can_be_overridden(tmp_path):
    config = config_of(factors=[2, 3], radius=0.9, pad_token_id=3, use_cache=False)
    config.save_pretrained(tmp_path)
    loaded = KRUConfig.from_pretrained(tmp_path)
    assert loaded.language_model_config() == config.language_model_config()
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (BOS, BOS, 3)
    assert loaded.use_cache is False
    assert KRUConfig.from_pretrained(tmp_path, backend="torch").backend == "torch"


def test_a_configuration_keeps_what_tools_have_added(tmp_path):
    config = config_of(factors=[2, 3])
    config.update({"pretraining_tp": 1, "of_a_tool": {"a": [1, None]}, "_hidden": "x"})
    config.save_pretrained(tmp_path)
    loaded = KRUConfig.from_pretrained(tmp_path)
    assert loaded.of_a_tool == {"a": [1, None]}
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert transformers.AutoConfig.from_pretrained(tmp_path).pretraining_tp == 1
    assert KRUConfig.from_pretrained(tmp_path, of_a_tool=5).of_a_tool == 5
    copies = [KRUConfig(**config.to_dict()), KRUConfig.from_json_file(tmp_path / "config.json")]
    for each in (*copies, KRUConfig.from_dict(config.to_dict()), copy.deepcopy(config)):
        assert (each._hidden, each.of_a_tool, each.factors) == ("x", {"a": [1, None]}, (2, 3))
    assert KRUConfig.from_dict({"of_a_tool": 3}).of_a_tool == 3  # written by hand
    assert KRUConfig.from_dict({"num_hidden_layers": 3}).num_layers == 3
    assert type(KRUForCausalLM(loaded)) is KRUForCausalLM
    for typed in (KRUConfig, lambda **kwargs: transformers.AutoConfig.for_model("kru", **kwargs)):
        with pytest.raises(ValueError, match=r"hiden_size: .* did you mean hidden_size"):
            typed(hiden_size=3)
    with pytest.raises(TypeError, match="hidden_size"):
        KRUConfig.from_dict({**config.to_dict(), "hidden_size": "big"})


@pytest.mark.parametrize("kind", ["kru", "krulstm"])
def test_weights_that_a_folder_lacks_are_drawn_as_a_new_models(kind):
    config = config_of(model=kind, d_model=32, hidden_size=64, radius=0.5, vocab_size=99)
    new = KRUForCausalLM(config)
    drawn, info = KRUForCausalLM.from_pretrained(
        None, config=config, state_dict={}, output_loading_info=True
    )
    assert info["missing_keys"] >= {name for name, _ in new.named_parameters()}
    for (name, a), (_, b) in zip(new.named_parameters(), drawn.named_parameters()):
        spread, other = float(a.detach().std()), float(b.detach().std())
        assert other == pytest.approx(spread, rel=0.5), name  # of 32 draws or more, or constant


def test_folders_that_do_not_fit_are_refused(model, folder, tmp_path):
    other = tmp_path / "other"
    transformers.GPT2Config(n_layer=1).save_pretrained(other)
    for kind in (KRUConfig, KRUForCausalLM, KRUModel):
        with pytest.raises(ValueError, match="configuration of a 'gpt2' model"):
            kind.from_pretrained(other)
    with pytest.raises(OSError, match="no file named"):
        KRUForCausalLM.from_pretrained(tmp_path)

    model.save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    tensors = load_file(weights)
    name = "model.network.blocks.1.mixer.kru.factor0_l0"
    save_file({k: v for k, v in tensors.items() if k != name}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=f"missing keys: {name}"):
        KRUForCausalLM.from_pretrained(tmp_path / "cut")
    completed, info = KRUForCausalLM.from_pretrained(tmp_path / "cut", output_loading_info=True)
    assert info["missing_keys"] == {name}  # asked for, so not refused
    for key, value in completed.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]) == (key != name), key
    penalties = [unitarity_penalty(each).item() for each in (completed, model)]
    assert penalties[0] == pytest.approx(penalties[1], rel=1e-4)  # drawn as a new model's
    settings = json.loads((folder / "config.json").read_text())
    model.save_pretrained(tmp_path / "thin")
    thin = json.dumps({**settings, "num_layers": 1})
    (tmp_path / "thin" / "config.json").write_text(thin)
    with pytest.raises(ValueError, match=r"unexpected keys: model\.network\.blocks\.1"):
        KRUForCausalLM.from_pretrained(tmp_path / "thin")
    wide = json.dumps({**settings, "vocab_size": 50})
    (tmp_path / "thin" / "config.json").write_text(wide)
    with pytest.raises(RuntimeError, match="size"):
        KRUForCausalLM.from_pretrained(tmp_path / "thin")
