"""Settings: preset < TOML < flags, and clear errors."""

import dataclasses

import pytest

from kru_triton.lm.model import LanguageModel
from kru_triton.lm.presets import PRESETS, LanguageModelConfig
from kru_triton.train.run.settings import TRAINING, Config, UserError, model_config, parse


def write_toml(tmp_path, text):
    path = tmp_path / "settings.toml"
    path.write_text(text)
    return str(path)


def test_flags_win_over_toml_and_toml_over_the_preset(tmp_path):
    toml = write_toml(tmp_path, 'preset = "tiny"\nlr = 0.5\nbatch-size = 3\nfactors = [8, 8]\n')
    config = parse(["--config", toml, "--lr", "0.25"])
    assert config.lr == 0.25  # flag
    assert (config.batch_size, config.factors) == (3, (8, 8))  # TOML
    assert config.segment_length == TRAINING["tiny"][1]  # preset: training
    assert config.d_model == PRESETS["tiny"].d_model  # preset: model
    assert parse(["--config", toml, "--preset", "base"]).d_model == PRESETS["base"].d_model


def test_a_budget_replaces_the_steps_of_the_preset():
    assert parse(["--preset", "tiny"]).steps == TRAINING["tiny"][-1]
    assert parse(["--preset", "tiny", "--minutes", "2"]).steps == 0
    assert parse(["--preset", "tiny", "--steps", "7"]).steps == 7


def test_every_field_of_the_model_is_a_setting():
    fields = {field.name for field in dataclasses.fields(LanguageModelConfig)}
    assert fields - {field.name for field in dataclasses.fields(Config)} == {"vocab_size"}


@pytest.mark.parametrize("preset", TRAINING)
def test_a_preset_gives_the_model_of_that_name(preset):
    built = model_config(parse(["--preset", preset]), PRESETS[preset].vocab_size)
    assert built == PRESETS[preset]


def test_linear_attention_of_a_preset_goes_with_its_blocks():
    for layers, blocks in (("2", (1,)), ("3", (2,)), ("4", (1,)), ("6", (1, 4))):
        assert parse(["--num-layers", layers]).linear_attention == blocks
    for flag in ("--linear-attention", "--linear_attention"):  # what is asked for stays
        assert parse(["--num-layers", "6", flag, "2"]).linear_attention == (2,)
    for flags in ("--num-layers 1", "--frame plain --num-layers 1", "--linear-attention"):
        config = parse(flags.split())
        assert config.linear_attention == ()
        model_config(config, 257)
    wrong = parse(["--linear-attention", "3"])
    with pytest.raises(ValueError, match=r"linear_attention: must be blocks from 0 to 2 .* \(3,\)"):
        LanguageModel(model_config(wrong, 257))


def test_match_params_comes_near_the_count():
    config = parse(["--preset", "tiny", "--model", "lstm", "--match-params", "100000"])
    model = LanguageModel(model_config(config, 257))
    assert abs(model.num_parameters - 100_000) < 10_000


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("hiden_size = 3", r"unknown keys \['hiden_size'\]; known: .*hidden_size"),
        ("[model]\nd_model = 3", "model must be one of 'kru'"),
        ("lr = 'fast'", "lr must be a number, got 'fast'"),
        ("steps = 1.5", "steps must be a whole number, got 1.5"),
        ("compile = 1", "compile must be true or false, got 1"),
        ("factors = [2.0]", "factors must be a list of whole numbers"),
        ("lr = ", "settings.toml: Invalid value"),
    ],
)
def test_a_wrong_toml_file_is_explained(tmp_path, toml, message):
    with pytest.raises(UserError, match=message):
        parse(["--config", write_toml(tmp_path, toml)])


def test_a_missing_toml_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.toml"):
        parse(["--config", str(tmp_path / "none.toml")])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--batch-size 0", "--batch-size must be at least 1, got 0"),
        ("--segment-length -1", "--segment-length must be at least 1"),
        ("--lr nan", "--lr must be at least 0, got nan"),
        ("--steps -5", "--steps must be at least 0"),
        ("--dropout 1", "--dropout must be below 1"),
        ("--decay-share 1.5", "--decay-share must be at most 1, got 1.5"),
        ("--muon-momentum 1", r"--muon-momentum must be in \[0, 1\), got 1"),
        ("--muon-momentum -0.1", r"--muon-momentum must be in \[0, 1\), got -0.1"),
        ("--decay-share -1", "--decay-share must be at least 0"),
        (f"--seed {2**64}", r"--seed must be at least 0 and below 2\^64, got 1844"),
        (f"--seed {'9' * 400}", "--seed must be at least 0 and below"),
        ("--seed -1", "--seed must be at least 0 and below"),
        ("--temperature inf", "--temperature must be at least 0, got inf"),
        ("--top-p 0", r"--top-p must be in \(0, 1\], got 0"),
        ("--factors 4 0", "--factors must be positive"),
        ("--radius -1", "--radius must be at least 0, got -1"),
        ("--radius nan", "--radius must be at least 0, got nan"),
        ("--mlp-ratio inf", "--mlp-ratio must be positive and finite, got inf"),
    ],
)
def test_values_out_of_range_are_named(flags, message):
    with pytest.raises(UserError, match=message):
        parse(flags.split())


@pytest.mark.parametrize("flags", ["--no-such-flag 1", "--model mamba", "--preset huge"])
def test_wrong_flags_end_with_exit_code_2(flags, capsys):
    with pytest.raises(SystemExit) as error:
        parse(flags.split())
    assert error.value.code == 2
    assert "--" in "".join(capsys.readouterr())
