"""Padding on the left, between and on the right; masks, and where there is none."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")

from hf_models import BOS, FREE, every_model, make, padded, tokens_of  # noqa: E402

from kru_triton.hf import CACHE, KRUCache  # noqa: E402


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
