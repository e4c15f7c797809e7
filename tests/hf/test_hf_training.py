"""Losses, checkpointed blocks, and transformers' Trainer."""

import inspect
import math

import pytest
import torch
from torch.nn import functional as F

transformers = pytest.importorskip("transformers")

from hf_models import BOS, FREE, make, padded, tokens_of  # noqa: E402

from kru_triton.hf import CACHE, KRUForCausalLM  # noqa: E402
from kru_triton.lm.model import LanguageModel  # noqa: E402


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
    left, mask = padded(7, 5)
    labels = left.masked_fill(mask == 0, -100)
    loss = model(left, attention_mask=mask, labels=labels).loss
    assert loss.item() == pytest.approx(total / 10, rel=1e-6)
    labels = tokens.masked_fill(padded(7, 5, side="right")[1] == 0, -100)
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
