"""Hidden states, and embeddings in place of tokens."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from hf_models import BOS, FREE, every_model, make, padded, tokens_of  # noqa: E402

from kru_triton import hf  # noqa: E402
from kru_triton.hf import CACHE  # noqa: E402


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
