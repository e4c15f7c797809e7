"""train/export.py, and what reads its folders: transformers, train/sample.py, train/evaluate.py."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

transformers = pytest.importorskip("transformers")

from kru_triton.hf import KRUForCausalLM  # noqa: E402
from kru_triton.language_model import LanguageModel, LanguageModelConfig  # noqa: E402
from kru_triton.train import checkpoints, evaluate, export, sample  # noqa: E402
from kru_triton.train.config import UserError  # noqa: E402
from kru_triton.train.evaluate import EvaluateConfig  # noqa: E402
from kru_triton.train.export import ExportConfig  # noqa: E402
from kru_triton.train.tokenizer import ByteTokenizer, FileTokenizer, train_bpe  # noqa: E402

TRAIN = Path(__file__).parents[1] / "train"
TEXT = "A täst, of <|endoftext|> — 日本\x00\r\n\tand\u200b more  spaces 🙂"


def run(script, *arguments):
    """Run a script to its end; what it printed."""
    command = [sys.executable, str(TRAIN / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def error_of(script, monkeypatch, capsys, *arguments):
    """What a script's main() prints before it exits with code 2."""
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        script.main()
    assert end.value.code == 2
    return capsys.readouterr().err


def write_run(folder, tokenizer=None, **kwargs):
    """A run directory as train/lm.py leaves it, of a model with random weights."""
    tokenizer = tokenizer or ByteTokenizer()
    torch.manual_seed(0)
    sizes = dict(vocab_size=tokenizer.vocab_size, d_model=16, hidden_size=16, factors=(4, 4))
    model = LanguageModel(LanguageModelConfig(**{**sizes, **kwargs})).eval()
    with torch.no_grad():
        model.blocks[0].mixer.projection.weight.mul_(200)
    trainer = {"step": 7, "model_config": dataclasses.asdict(model.config)}
    checkpoints.save(folder, 7, {"model": model.state_dict()}, {"trainer": trainer}, keep=1)
    if tokenizer.sha256:
        (folder / "tokenizer.json").write_text(tokenizer.json)
    return model


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "lm"
    write_run(folder)
    summary = {"steps": 7, "tokens": 1234, "val/bpb": 2.5, "gzip_bpb": 3.0, "xz_bpb": 2.75}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.json").write_text(json.dumps({"data": ["text:a.txt"]}))
    return folder


@pytest.fixture(scope="module")
def folder(run_dir, tmp_path_factory):
    """The run, exported by the script itself."""
    out = tmp_path_factory.mktemp("exported") / "lm"
    printed = run("export.py", run_dir, out)
    assert "model.safetensors" in printed
    return out


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """A run with a BPE tokenizer: its directory, tokenizer and exported folder."""
    tokenizer = train_bpe(40, [b"the cat and the hat and the cart " * 20])
    base = tmp_path_factory.mktemp("bpe")
    write_run(base / "run", tokenizer)
    return (
        base / "run",
        tokenizer,
        export.export(ExportConfig(str(base / "run"), str(base / "out"))),
    )


# The folder


def test_an_exported_model_is_the_trained_one(run_dir, folder):
    trained, _, _ = sample.load_model(str(run_dir), "cpu", "auto")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.tensor([[256, *b"some text"]])
    assert torch.equal(loaded(tokens).logits, trained(tokens, None, tokens == 256)[0])
    assert loaded.config.factors == (4, 4)
    assert loaded.generation_config.eos_token_id == 256


def test_token_ids_are_those_of_the_training(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 257
    for text in (TEXT, "", "a", "".join(map(chr, range(256)))):
        ids = tokenizer(text)["input_ids"]
        assert ids == [256, *text.encode()]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    batch = tokenizer(["ab", "abcd"], padding=True)
    assert batch["input_ids"] == [[256, 256, 256, 97, 98], [256, 97, 98, 99, 100]]
    assert batch["attention_mask"] == [[0, 0, 1, 1, 1], [1] * 5]
    assert set(batch) == {"input_ids", "attention_mask"}


def test_token_ids_of_a_bpe_run_are_those_of_the_training(bpe):
    _, trained, out = bpe
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.bos_token_id == trained.bos == trained.vocab_size - 1 == len(tokenizer) - 1
    for text in ("the cat and", TEXT, ""):
        ids = tokenizer(text)["input_ids"]
        assert ids == [trained.bos, *trained.encode(text.encode()).tolist()]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer("the cat and the hat")["input_ids"]) < 10
    read, tokens, _ = sample.load_model(str(out), "cpu", "auto")
    assert (tokens.bos, tokens.vocab_size) == (trained.bos, trained.vocab_size)
    assert read.config.vocab_size == trained.vocab_size


def test_a_pipeline_needs_the_folder_alone(folder):
    write = transformers.pipeline("text-generation", str(folder))
    options = {"max_new_tokens": 9, "do_sample": False}
    (alone,), (short,) = write(["a longer prompt", "it"], batch_size=2, **options)
    assert alone["generated_text"].startswith("a longer prompt")
    (again,) = write("it", **options)
    assert short == again
    assert write("", **options)[0]["generated_text"]


def test_the_card_states_what_the_run_measured(folder, bpe):
    card = (folder / "README.md").read_text()
    for fact in ("--data text:a.txt", "7 steps", "1,234 tokens", "2.5000 bits per byte"):
        assert fact in card
    assert "bits per byte" not in (bpe[2] / "README.md").read_text()  # that run has no summary


def test_what_cannot_be_exported(run_dir, folder, tmp_path, monkeypatch, capsys):
    cases = [
        ((run_dir, folder), "exists and is not an empty folder"),
        ((folder, tmp_path / "new"), "exported folder already"),
        ((tmp_path, tmp_path / "new"), "no checkpoint under"),
    ]
    for (source, out), message in cases:
        with pytest.raises(UserError, match=message):
            export.export(ExportConfig(str(source), str(out)))
    assert not (tmp_path / "new").exists()
    error = error_of(export, monkeypatch, capsys, tmp_path, tmp_path / "new")
    assert error.startswith("error: no checkpoint under")
    other = FileTokenizer(train_bpe(5, [b"abababab"]).json)
    write_run(tmp_path / "run", other)
    other.bos += 3
    with pytest.raises(UserError, match=r"BOS would be token \d+ of \d+, in the run it is"):
        export.pretrained_tokenizer(other)


# Samples


def test_a_run_and_its_folder_write_the_same_text(run_dir, folder, capsys):
    texts = []
    for where in (run_dir, folder):
        sample.run(sample.SampleConfig(str(where), prompt="dé\udcff", tokens=80, seed=3))
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith("dé\ufffd")


def test_generate_equals_the_sampler(run_dir, folder):
    network, tokenizer, _ = sample.load_model(str(run_dir), "cpu", "auto")
    options = {"temperature": 0, "top_p": 1.0, "generator": torch.Generator()}
    expected = list(sample.generate(network, tokenizer, b"the ", 40, **options))
    model = KRUForCausalLM.from_pretrained(folder)
    written = model.generate(
        torch.tensor([[256, *b"the "]]), max_new_tokens=40, suppress_tokens=[256]
    )
    assert written[0, 5:].tolist() == expected
    assert len(set(expected)) > 3


def test_folders_that_cannot_be_sampled(folder, tmp_path):
    transformers.GPT2Config(n_layer=1).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UserError, match="configuration of a 'gpt2' model"):
        sample.load_model(str(tmp_path / "gpt2"), "cpu", "auto")

    copied = tmp_path / "copied"
    model = KRUForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(300)
    model.save_pretrained(copied)
    with pytest.raises(UserError, match="no such file"):
        sample.load_model(str(copied), "cpu", "auto")
    (copied / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    with pytest.raises(UserError, match=r"has 257 tokens, the model of .* 300"):
        sample.load_model(str(copied), "cpu", "auto")

    settings = json.loads((folder / "config.json").read_text())
    torch.manual_seed(0)
    untied = KRUForCausalLM(type(model.config)(**{**settings, "tie_word_embeddings": False}))
    untied.save_pretrained(tmp_path / "untied")
    with pytest.raises(UserError, match="head of its own"):
        sample.load_model(str(tmp_path / "untied"), "cpu", "auto")


# Evaluation


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Two documents, and their bytes behind one BOS each."""
    base = tmp_path_factory.mktemp("text")
    documents = [b"the first document\n" * 9, "ünd the second one\n".encode() * 5]
    for index, document in enumerate(documents):
        (base / f"{index}.txt").write_bytes(document)
    tokens = [token for document in documents for token in (256, *document)]
    return f"text:{base}/*.txt", torch.tensor(tokens), sum(map(len, documents))


def by_hand(model, tokens, reset):
    """Sum of losses in nats over all targets but BOS, in one pass."""
    with torch.no_grad():
        logits = model(tokens[None, :-1], None, reset[None, :-1])[0][0]
    losses = F.cross_entropy(logits, tokens[1:], reduction="none")
    return float(losses[tokens[1:] != 256].double().sum())


@pytest.mark.parametrize("length", [1, 37, 1024])
def test_evaluation_equals_one_pass_by_hand(run_dir, text, length):
    spec, tokens, size = text
    config = EvaluateConfig(str(run_dir), spec, contexts=(10, 50, 5000), segment_length=length)
    report = evaluate.evaluate(config)
    model, _, _ = sample.load_model(str(run_dir), "cpu", "auto")
    index = torch.arange(len(tokens))
    resets = [index == 0, tokens == 256, index % 10 == 0, index % 50 == 0, index % 5000 == 0]
    names = ["carried", "document", "10", "50", "5,000"]
    assert [row["state"] for row in report["results"]] == names
    assert report["tokens"] == size == report["data"]["bytes"]
    for row, reset in zip(report["results"], resets):
        nats = by_hand(model, tokens, reset)
        assert row["loss_nats"] == pytest.approx(nats / size, rel=1e-6)
        assert row["perplexity"] == pytest.approx(math.exp(nats / size), rel=1e-6)
        assert row["bpb"] == pytest.approx(nats / size / math.log(2), rel=1e-6)
    losses = [row["loss_nats"] for row in report["results"]]
    assert losses[0] == pytest.approx(losses[4], rel=1e-6)  # the text is shorter than 5,000 tokens
    assert len({round(loss, 5) for loss in losses}) == 4
    assert "shorter than 5,000 tokens" in evaluate.table(report)


def test_bits_per_byte_of_a_bpe_model_count_bytes(bpe, text):
    spec, _, size = text
    report = evaluate.evaluate(EvaluateConfig(str(bpe[2]), spec, contexts=()))
    row = report["results"][0]
    assert report["tokens"] < size
    assert row["bpb"] * size == pytest.approx(
        row["loss_nats"] * report["tokens"] / math.log(2), rel=1e-9
    )


def test_the_evaluation_script(folder, text, tmp_path):
    spec, _, size = text
    out = run(
        *("evaluate.py", folder, "--data", spec, "--contexts", 20, "--max-bytes", size - 2),
        *("--json", tmp_path / "report.json"),
    )
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["data"]["bytes"] == size - 2
    assert report["settings"]["contexts"] == [20]
    for row in report["results"]:
        assert f"{row['bpb']:.4f}" in out
        assert f"{row['perplexity']:.3f}" in out
    assert "at documents" in out


def test_bad_arguments_for_evaluation(run_dir, text, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty.txt").write_text("")
    cases = [
        ({"contexts": (0,)}, "--contexts must be positive, got 0"),
        ({"segment_length": 0}, "--segment-length must be positive"),
        ({"max_bytes": -1}, "--max-bytes must be at least 0"),
        ({"data": f"text:{tmp_path}/none*"}, "no file matches"),
        ({"data": f"text:{tmp_path}/empty.txt"}, "empty corpus"),
        ({"model": str(tmp_path)}, "no checkpoint under"),
        ({"device": "nowhere"}, "--device nowhere"),
    ]
    for values, message in cases:
        config = EvaluateConfig(**{"model": str(run_dir), "data": text[0], **values})
        with pytest.raises(UserError, match=message):
            evaluate.evaluate(config)
    error = error_of(evaluate, monkeypatch, capsys, tmp_path)
    assert error.startswith("error: no checkpoint under")


def test_the_held_out_part_is_that_of_the_training(text, tmp_path):
    for index in range(40):
        (tmp_path / f"{index}.txt").write_text(f"document {index}\n" * 20)
    spec = f"text:{tmp_path}/*.txt"
    config = EvaluateConfig("", spec, held_out=True)
    held_out = evaluate.read_text(config)
    _, expected = evaluate.data.load_documents(spec, "")
    assert held_out == expected
    assert 0 < len(held_out) < 5
