"""The cache: prompts in pieces, going on from it, saving it; its size does not grow."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")

from hf_models import BOS, FREE, padded, tokens_of  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from kru_triton import hf  # noqa: E402
from kru_triton.hf import CACHE, KRUCache  # noqa: E402


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


def test_nothing_new_to_read_is_refused(model):
    output = model.generate(tokens_of(), max_new_tokens=5, return_dict_in_generate=True, **FREE)
    with pytest.raises(ValueError, match="has 3 tokens, and the cache has read 11"):
        model.generate(tokens_of(2, 3), max_new_tokens=2, **{CACHE: output[CACHE]}, **FREE)
