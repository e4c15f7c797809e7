"""Documents packed into one row, and position ids."""

import copy

import pytest
import torch
from torch.nn import functional as F

transformers = pytest.importorskip("transformers")

from hf_models import BOS, FREE, every_model, make, packed, padded, tokens_of  # noqa: E402

from kru_triton.hf import CACHE  # noqa: E402


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
