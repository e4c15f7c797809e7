"""Adapters of PEFT on KRUForCausalLM, and steps of TRL's trainers."""

import copy

import pytest
import torch

peft = pytest.importorskip("peft")

from hf_models import BOS, FREE, make, tokens_of  # noqa: E402

from kru_triton.hf import KRUForCausalLM  # noqa: E402
from kru_triton.train.export import pretrained_tokenizer  # noqa: E402
from kru_triton.train.text.tokenizer import ByteTokenizer  # noqa: E402

LM = {"task_type": "CAUSAL_LM"}
# a tuned prompt has no BOS behind it: what is read as embeddings shows none
OPTIONS = {**FREE, "max_new_tokens": 8, "suppress_tokens": [BOS]}
PROMPT = {**LM, "num_virtual_tokens": 3, "token_dim": 16}
LAYERS = ["gate", "input_gate", "projection", "mlp.0", "mlp.2"]


def lora(*targets, **kwargs):
    return peft.LoraConfig(target_modules=list(targets) or "all-linear", **LM, **kwargs)


ADAPTERS = {
    "lora": lora,
    "dora": lambda: lora(use_dora=True),
    "embedding": lambda: lora("embedding", "gate"),
    "weight_ih": lambda: lora("mlp.0", target_parameters=["kru.weight_ih_l0"]),
    "modules": lambda: lora("mlp.0", modules_to_save=["kru", "embedding", "lm_head"]),
    "tokens": lambda: lora("mlp.0", trainable_token_indices=[1, 2]),
    "only-tokens": lambda: peft.TrainableTokensConfig(token_indices=[1, 2], **LM),
    "ia3": lambda: peft.IA3Config(target_modules=LAYERS, feedforward_modules=["mlp.2"], **LM),
    "prompt": lambda: peft.PromptTuningConfig(**PROMPT),
    "p-tuning": lambda: peft.PromptEncoderConfig(encoder_hidden_size=8, **PROMPT),
}
UNMERGED = ("embedding", "prompt", "p-tuning")  # a tied head would change with the embedding


def trained(config):
    """A model with adapters that five steps have changed, and the losses."""
    torch.manual_seed(0)
    adapted, tokens, losses = peft.get_peft_model(make(), config).train(), tokens_of(), []
    weights = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        loss = adapted(input_ids=tokens, attention_mask=tokens * 0 + 1, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return adapted.eval(), losses


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_learn_and_decode_as_they_read(name, tmp_path):
    adapted, losses = trained(ADAPTERS[name]())
    assert losses[-1] < losses[0]
    output = adapted.generate(
        input_ids=tokens_of(), output_logits=True, return_dict_in_generate=True, **OPTIONS
    )
    text, steps = output.sequences, torch.stack(output.logits, 1)
    with torch.no_grad():
        whole = adapted(input_ids=text[:, :-1]).logits[:, -8:]
        assert (steps - whole).abs().max() < 1e-4  # logits are up to 20
        assert (make()(text[:, :-1]).logits[:, -8:] - whole).abs().max() > 1e-3
        adapted.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
        assert torch.equal(loaded(input_ids=text[:, :-1]).logits[:, -8:], whole)
        if name not in UNMERGED:
            merged = adapted.merge_and_unload()
            assert type(merged) is KRUForCausalLM
            assert (merged(text[:, :-1]).logits[:, -8:] - whole).abs().max() < 1e-4
            assert torch.equal(merged.generate(tokens_of(), **OPTIONS), text)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_padding_may_stand_behind_a_tuned_prompt(options):
    adapted, tokens = peft.get_peft_model(make(), ADAPTERS["prompt"]()).eval(), tokens_of()
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    options = {**OPTIONS, **options}
    written = adapted.generate(input_ids=tokens, attention_mask=mask, **options)
    for row, length in enumerate((7, 4)):
        alone = adapted.generate(input_ids=tokens[row : row + 1, -length:], **options)
        assert torch.equal(written[row, 7:], alone[0, length:])


def test_adapters_are_switched_off_and_exchanged():
    adapted, _ = trained(lora())
    other = copy.deepcopy(adapted)
    other.add_adapter("other", lora("gate"))
    other.set_adapter("other")  # starts as nothing
    expected = make().generate(tokens_of(), **OPTIONS)
    assert not torch.equal(adapted.generate(input_ids=tokens_of(), **OPTIONS), expected)
    assert torch.equal(other.generate(input_ids=tokens_of(), **OPTIONS), expected)
    with adapted.disable_adapter():
        assert torch.equal(adapted.generate(input_ids=tokens_of(), **OPTIONS), expected)


def test_prefix_tuning_is_refused():
    adapted = peft.get_peft_model(make(), peft.PrefixTuningConfig(**PROMPT))
    with pytest.raises(TypeError, match=r"must be a KRUCache, got .* use prompt tuning"):
        adapted(input_ids=tokens_of())


@pytest.mark.parametrize("trainer", ["SFT", "DPO"])
def test_steps_of_trl(trainer, tmp_path, monkeypatch):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", True)
    rows = [{"prompt": "for ", "completion": "x in y" + "y" * n} for n in range(4)]
    if trainer == "DPO":
        rows = [{**row, "chosen": row.pop("completion"), "rejected": "?"} for row in rows]
    model = make(vocab_size=257, bos_token_id=256)
    arguments = getattr(trl, f"{trainer}Config")(
        str(tmp_path),
        max_steps=8,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    run = getattr(trl, f"{trainer}Trainer")(
        model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=pretrained_tokenizer(ByteTokenizer()),
        peft_config=lora(),
    )
    run.train()
    losses = [row["loss"] for row in run.state.log_history if "loss" in row]
    assert losses[-1] < 0.9 * losses[0]


def test_documents_that_trl_packs_are_read_apart(tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    arguments = trl.SFTConfig(
        str(tmp_path), packing=True, max_length=32, report_to=[], use_cpu=True, bf16=False
    )
    model = make(vocab_size=257, bos_token_id=256)
    trainer = trl.SFTTrainer(
        model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list([{"text": "x" * n} for n in (3, 9, 5, 12, 7)]),
        processing_class=pretrained_tokenizer(ByteTokenizer()),
    )
    batch = dict(next(iter(trainer.get_train_dataloader())))
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert len(starts) == 5
    model.eval()
    with torch.no_grad():
        logits = model(**batch).logits[0]
        tokens = batch["input_ids"][0]
        for start, end in zip(starts, [*starts[1:], len(tokens)]):
            alone = model(tokens[None, start:end]).logits[0]
            assert (logits[start:end] - alone).abs().max() < 1e-5
    assert trainer.compute_loss(model, batch).isfinite()
