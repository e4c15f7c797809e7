"""Settings and folders: what survives, what is refused, and what a folder may lack."""

import copy
import json

import pytest
import torch

transformers = pytest.importorskip("transformers")

from hf_models import BOS, config_of  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from kru_triton.hf import KRUConfig, KRUForCausalLM, KRUModel  # noqa: E402
from kru_triton.unitarity import unitarity_penalty  # noqa: E402


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
