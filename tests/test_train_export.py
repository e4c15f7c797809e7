"""train/export.py, and what reads its folders: transformers, train/sample.py, train/evaluate.py."""

import copy
import dataclasses
import itertools
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import unittest.mock
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch.nn import functional as F

transformers = pytest.importorskip("transformers")

from kru_triton.hf import KRUForCausalLM  # noqa: E402
from kru_triton.lm.model import LanguageModel, LanguageModelConfig  # noqa: E402
from kru_triton.train import evaluate, export, lm, reproduce, sample  # noqa: E402
from kru_triton.train.evaluate import EvaluateConfig  # noqa: E402
from kru_triton.train.export import ExportConfig  # noqa: E402
from kru_triton.train.run import checkpoints, wandb_run  # noqa: E402
from kru_triton.train.run.directory import find_checkpoint  # noqa: E402
from kru_triton.train.run.settings import UserError  # noqa: E402
from kru_triton.train.tasks import loop as task_loop  # noqa: E402
from kru_triton.train.text import generate, load  # noqa: E402
from kru_triton.train.text.held_out import split_in_memory  # noqa: E402
from kru_triton.train.text.tokenizer import ByteTokenizer, FileTokenizer, train_bpe  # noqa: E402

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
    trained, _, _ = load.load_model(str(run_dir), "cpu", "auto")
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
    read, tokens, _ = load.load_model(str(out), "cpu", "auto")
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


@pytest.fixture
def growing(tmp_path, monkeypatch):
    """A run that writes a checkpoint after every step, to a quick disk, and keeps one."""
    monkeypatch.setattr(checkpoints, "write_synced", Path.write_bytes)
    monkeypatch.setattr(checkpoints, "sync_folder", lambda path: None)
    run_dir, stop = tmp_path / "run", threading.Event()
    model = write_run(run_dir)
    trainer = {"model_config": dataclasses.asdict(model.config)}
    tensors = {"model": model.state_dict(), "rank-0": {"rng": torch.arange(9)}}

    def write():
        for step in itertools.count(8):
            checkpoints.save(run_dir, step, tensors, {"trainer": {"step": step, **trainer}}, keep=1)
            if stop.wait(0.004):
                return

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)  # the two take turns often
    thread = threading.Thread(target=write)
    thread.start()
    yield run_dir
    stop.set()
    thread.join()
    sys.setswitchinterval(interval)


@pytest.mark.parametrize("reader", ["sample", "evaluate", "export", "resume"])
def test_a_run_is_read_while_it_writes_and_deletes(growing, text, tmp_path, monkeypatch, reader):
    monkeypatch.setattr(export, "KRUForCausalLM", unittest.mock.MagicMock())  # writes nothing
    monkeypatch.setattr(export, "pretrained_tokenizer", unittest.mock.MagicMock())
    monkeypatch.setattr(export, "model_card", lambda *_: "")
    monkeypatch.setattr(evaluate, "commit", lambda: None)
    monkeypatch.setattr(evaluate, "versions", dict)
    measured = EvaluateConfig(str(growing), text[0], contexts=(), max_bytes=20)
    read = {
        "sample": lambda _: load.load_model(str(growing), "cpu", "auto"),
        "evaluate": lambda _: evaluate.evaluate(measured),
        "export": lambda index: export.export(ExportConfig(str(growing), f"{tmp_path}/{index}")),
        "resume": lambda _: find_checkpoint(growing).name,
    }[reader]
    index, enough = 0, checkpoints.list_steps(growing)[-1] + 100
    while index < 200 or checkpoints.list_steps(growing)[-1] < enough:
        read(index)
        index += 1
    assert not list((growing / "checkpoints").glob("corrupt-*"))


def test_what_cannot_be_exported(run_dir, folder, tmp_path, monkeypatch, capsys):
    cases = [
        ((run_dir, folder), "exists and is not an empty folder"),
        ((folder, tmp_path / "new"), "exported folder already"),
        ((tmp_path, tmp_path / "new"), "no checkpoint under"),
    ]
    for (source, out), message in cases:
        with pytest.raises(UserError, match=message):
            export.export(ExportConfig(str(source), str(out)))
    plain = LanguageModel(LanguageModelConfig(257, hidden_size=16, frame="plain", num_layers=1))
    trainer = {"step": 1, "model_config": dataclasses.asdict(plain.config)}
    files = {"model": plain.state_dict()}, {"trainer": trainer}
    checkpoints.save(tmp_path / "plain", 1, *files, keep=1)
    with pytest.raises(UserError, match="plain cannot be exported: frame: a 'plain' network"):
        export.export(ExportConfig(str(tmp_path / "plain"), str(tmp_path / "new")))
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
    network, tokenizer, _ = load.load_model(str(run_dir), "cpu", "auto")
    options = {"temperature": 0, "top_p": 1.0, "generator": torch.Generator()}
    expected = list(generate.generate(network, tokenizer, b"the ", 40, **options))
    model = KRUForCausalLM.from_pretrained(folder)
    written = model.generate(
        torch.tensor([[256, *b"the "]]), max_new_tokens=40, suppress_tokens=[256]
    )
    assert written[0, 5:].tolist() == expected
    assert len(set(expected)) > 3


def test_folders_that_cannot_be_sampled(folder, tmp_path):
    transformers.GPT2Config(n_layer=1).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UserError, match="configuration of a 'gpt2' model"):
        load.load_model(str(tmp_path / "gpt2"), "cpu", "auto")

    copied = tmp_path / "copied"
    model = KRUForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(300)
    model.save_pretrained(copied)
    with pytest.raises(UserError, match="no such file"):
        load.load_model(str(copied), "cpu", "auto")
    (copied / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    with pytest.raises(UserError, match=r"has 257 tokens, the model of .* 300"):
        load.load_model(str(copied), "cpu", "auto")

    settings = json.loads((folder / "config.json").read_text())
    torch.manual_seed(0)
    untied = KRUForCausalLM(type(model.config)(**{**settings, "tie_word_embeddings": False}))
    untied.save_pretrained(tmp_path / "untied")
    with pytest.raises(UserError, match="head of its own"):
        load.load_model(str(tmp_path / "untied"), "cpu", "auto")


def test_chances_are_those_of_transformers_processors():
    torch.manual_seed(0)
    prompt, vocabulary = torch.randint(50, (1, 20)), 50
    seen = torch.zeros(vocabulary, dtype=torch.bool)
    seen[prompt[0]] = True
    cases = itertools.product((1.0, 1.3, 0.7), (0.5, 1.0, 3.0), (0, 1, 7, 99), (0.2, 0.9, 1.0))
    for penalty, temperature, top_k, top_p in cases:
        logits = 3 * torch.randn(1, vocabulary)
        steps = [transformers.RepetitionPenaltyLogitsProcessor(penalty)]
        steps += [transformers.TemperatureLogitsWarper(temperature)]
        steps += [transformers.TopKLogitsWarper(top_k)] if top_k else []
        steps += [transformers.TopPLogitsWarper(top_p)] if top_p < 1 else []
        scores = transformers.LogitsProcessorList(steps)(prompt, logits.clone())
        ours = generate.penalize(logits[0], seen, penalty)
        assert torch.equal(ours, steps[0](prompt, logits.clone())[0])
        ours = generate.probabilities(ours, temperature, top_p, top_k)
        expected = torch.softmax(scores[0], -1)
        assert torch.equal(ours > 0, expected > 0), (penalty, temperature, top_k, top_p)
        torch.testing.assert_close(ours / ours.sum(), expected, rtol=1e-5, atol=0)  # float32
    tied = torch.tensor([1.0, 2.0, 2.0, 0.0])
    assert (generate.probabilities(tied, 1.0, 1.0, 1) > 0).tolist() == [False, True, True, False]


def test_generate_with_a_penalty_equals_the_sampler(run_dir, folder):
    network, tokenizer, _ = load.load_model(str(run_dir), "cpu", "auto")
    options = {"temperature": 0, "top_p": 1.0, "generator": torch.Generator()}
    ours = [
        list(generate.generate(network, tokenizer, b"the ", 40, repetition_penalty=p, **options))
        for p in (1.0, 1.5)
    ]
    model = KRUForCausalLM.from_pretrained(folder)
    written = model.generate(
        torch.tensor([[256, *b"the "]]),
        max_new_tokens=40,
        suppress_tokens=[256],
        repetition_penalty=1.5,
    )
    assert written[0, 5:].tolist() == ours[1] != ours[0]


@pytest.mark.parametrize("temperature", [1e-300, 1e-60, 1e60, 1e300])
def test_extreme_temperatures_still_draw(temperature):
    logits, draws = torch.tensor([0.0, -math.inf, 2.0, 1.0]), torch.Generator().manual_seed(0)
    found = {generate.draw(logits, temperature, 1.0, draws) for _ in range(60)}
    assert found == ({2} if temperature < 1 else {0, 2, 3})


@pytest.mark.parametrize("size", [1, 2, 3, 99])
def test_what_is_written_ends_before_a_stop_however_it_is_cut(size):
    cases = [
        ("eins zwei drei", ["zwei"], "eins "),
        ("aaab", ["aab"], "a"),
        ("größer", ["öß"], "gr"),
        ("abcd", ["abcd", "bc"], "a"),  # "bc" is complete first
        ("abc", ["bc", "abc"], ""),
        ("ende", ["enden", "x"], "ende"),  # held back to the end
        ("stop", ["stop"], ""),
        ("any", [], "any"),
    ]
    for text, stops, expected in cases:
        text = text.encode()
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        written = list(generate.until(pieces, [stop.encode() for stop in stops]))
        assert b"".join(written) == expected.encode(), (text, stops)
    live = generate.until(iter([b"ab", b"x", b"y"]), [b"abc"])
    assert [next(live), next(live)] == [b"", b"abx"]  # as soon as no stop can begin there


def test_stops_end_a_sample_of_a_bpe_model(bpe, capsys):
    config = sample.SampleConfig(str(bpe[0]), prompt="the ", tokens=60)
    sample.run(config)
    whole = capsys.readouterr().out
    body = whole.removeprefix("the ").removesuffix("\n")
    stop = next(body[at : at + 3] for at in range(9, 60) if "\ufffd" not in body[at : at + 3])
    sample.run(dataclasses.replace(config, stop=("never there", stop)))
    assert capsys.readouterr().out == "the " + body[: body.index(stop)] + "\n"


# How scripts end


def test_what_cannot_run_or_is_no_run_is_one_line(run_dir, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # with it the kernels run on a CPU
    for name, content in {"list": "[1", "number": "5"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(content)
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "model.safetensors").write_bytes(b"half")
    checkpoints.save(tmp_path / "task", 3, {"model": {}}, {"trainer": {"step": 3}}, keep=1)
    cases = [
        (["--backend", "triton"], 'backend="triton" cannot run here'),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--device", "meta"], "--device meta"),
        (["--device", "hpu"], "--device hpu"),
    ]
    places = {tmp_path / "list": "is no configuration", tmp_path / "number": "is no configuration"}
    places |= {
        tmp_path / "task": "holds no language model of this version",
        broken: "deserializing header",
    }
    places |= {tmp_path / "missing": "no checkpoint under"}
    for script in (sample, evaluate):
        for flags, message in cases:
            error = error_of(script, monkeypatch, capsys, run_dir, *flags)
            assert message in error
            assert error.startswith("error: ")
        for place, message in places.items():
            error = error_of(script, monkeypatch, capsys, place)
            assert message in error
            assert error.startswith("error: ")
    flags = {
        "--temperature": ["inf", "nan", "-1"],
        "--seed": ["-1", str(2**64), "9" * 400],
        "--top-k": ["-1"],
        "--repetition-penalty": ["0", "-1", "inf", "nan"],
        "--stop": [""],
    }
    for flag, values in flags.items():
        for value in values:
            error = error_of(sample, monkeypatch, capsys, run_dir, flag, value)
            assert error.startswith(f"error: {flag} must be "), error
    sample.run(sample.SampleConfig(str(run_dir), tokens=1, seed=2**64 - 1))


def test_a_failed_export_leaves_nothing(run_dir, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(KRUForCausalLM, "save_pretrained", full)
    error = error_of(export, monkeypatch, capsys, run_dir, tmp_path / "out")
    assert re.match(r"error: .*out cannot be written: .*No space left", error)
    assert not (tmp_path / "out").exists()


def test_logits_that_are_no_numbers_end_a_sample_in_words(run_dir):
    network, tokenizer, _ = load.load_model(str(run_dir), "cpu", "auto")
    next(network.parameters()).data.fill_(math.nan)
    options = {"temperature": 1.0, "top_p": 1.0, "generator": torch.Generator()}
    with pytest.raises(UserError, match="logits are not finite after 0 tokens"):
        list(generate.generate(network, tokenizer, b"the ", 9, **options))


@pytest.mark.parametrize(
    ("script", "inner", "arguments"),
    [
        (sample, "run", ["runs"]),
        (evaluate, "evaluate", ["runs"]),
        (export, "export", ["runs", "out"]),
        (wandb_run, "replay", ["runs"]),
        (reproduce, "reproduce", ["draw"]),
        (checkpoints, "list_all", ["runs"]),
        (lm, "train", []),
        (task_loop, "train", []),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_ctrl_c_is_one_line_and_130(script, inner, arguments, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, inner, interrupted)
    monkeypatch.setattr(sys, "argv", ["script", *arguments])
    handler = signal.getsignal(signal.SIGINT)
    terminate = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    try:
        with pytest.raises(SystemExit) as end:
            task_loop.run(lambda: (None, None)) if script is task_loop else script.main()
    finally:
        signal.signal(signal.SIGINT, handler)
        for number, before in zip((signal.SIGTERM, signal.SIGHUP), terminate):
            signal.signal(number, before)
    assert end.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    "name", ["sample", "evaluate", "export", "run/wandb_run", "lm", "tasks/adding"]
)
def test_ctrl_c_while_the_libraries_load_ends_without_a_traceback(name):
    process = subprocess.Popen(
        [sys.executable, TRAIN / f"{name}.py", "--help"], stdout=-1, stderr=-1
    )
    maps = Path(f"/proc/{process.pid}/maps")
    while "libtorch" not in maps.read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out, err) == (-signal.SIGINT, b"", b"")


def test_a_reader_that_goes_costs_no_traceback_and_no_steps(run_dir, text, tmp_path):
    def read_a_little(script, *arguments):
        command = [sys.executable, TRAIN / script, *map(str, arguments)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process.stdout.read(1)
        process.stdout.close()
        err = process.stderr.read().decode()
        process.stderr.close()
        assert "Traceback" not in err
        assert "Exception ignored" not in err
        return process.wait(60), err

    assert read_a_little("sample.py", run_dir, "--tokens", 3000)[0] == 0
    flags = "--preset tiny --d-model 16 --num-layers 1 --hidden-size 16 --num-heads 1 --steps 400"
    flags += " --device cpu --batch-size 2 --segment-length 16 --log-every 1 --wandb disabled"
    flags = [*flags.split(), "--data", text[0], "--valid", text[0], "--run-dir", tmp_path]
    code, err = read_a_little("lm.py", *flags)
    assert code == 1
    assert err.startswith("error: [Errno 32] Broken pipe")


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
    model, _, _ = load.load_model(str(run_dir), "cpu", "auto")
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


@pytest.mark.parametrize("kind", ["kru", "gru"])
def test_dynamic_evaluation_equals_steps_by_hand(text, tmp_path, kind):
    spec, tokens, size = text
    write_run(tmp_path, model=kind, dropout=0.5)  # which must not act
    settings = dict(dynamic=True, dynamic_lr=1e-2, dynamic_decay=0.1, dynamic_tokens=13)
    config = EvaluateConfig(str(tmp_path), spec, contexts=(100, 5000), **settings)
    stored = {p: p.read_bytes() for p in (tmp_path / "checkpoints").rglob("*") if p.is_file()}
    report = evaluate.evaluate(config)
    assert {p: p.read_bytes() for p in stored} == stored

    index = torch.arange(len(tokens) - 1)
    resets = [index == 0, tokens[:-1] == 256, index % 100 == 0, index % 5000 == 0]
    model, _, _ = sample.load_model(str(tmp_path), "cpu", "auto")
    trained = copy.deepcopy(model.state_dict())
    for row, reset in zip(report["dynamic"], resets, strict=True):
        nats = 0.0
        starts = [*reset.nonzero().flatten().tolist(), len(index)]
        for first, end in itertools.pairwise(starts):
            model.load_state_dict(trained)
            squares, state = [torch.zeros_like(p) for p in model.parameters()], None
            for step, t in enumerate(range(first, end, 13), 1):
                goal = tokens[t + 1 : min(t + 13, end) + 1]
                logits, state = model(tokens[None, t : min(t + 13, end)], state)
                losses = F.cross_entropy(logits[0], goal, reduction="none")[goal != 256]
                nats += losses.double().sum().item()
                state = [s.detach() for s in state]
                gradients = torch.autograd.grad(losses.mean(), list(model.parameters()))
                with torch.no_grad():
                    for (name, p), v, g in zip(model.named_parameters(), squares, gradients):
                        v.mul_(0.999).add_(0.001 * g * g)
                        p -= 1e-2 * g / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
                        p += 0.1 * (trained[name] - p)
        assert row["loss_nats"] == pytest.approx(nats / size, rel=1e-4)  # sign steps at first
    static = [row["bpb"] for row in report["results"]]
    assert report["dynamic"][0] == {**report["dynamic"][3], "state": "carried"}  # never cut
    assert report["dynamic"][0]["bpb"] < static[0] - 0.1
    for row in report["dynamic"]:
        assert f"{row['bpb']:.4f}" in evaluate.table(report).partition("dynamic evaluation")[2]
    plain = evaluate.evaluate(EvaluateConfig(str(tmp_path), spec, contexts=(100, 5000)))
    assert plain["results"] == report["results"]
    assert "dynamic" not in plain


def test_a_dynamic_rate_of_zero_changes_nothing_and_a_wild_one_is_said(run_dir, text):
    config = EvaluateConfig(str(run_dir), text[0], contexts=(50,), dynamic=True, dynamic_lr=0.0)
    report = evaluate.evaluate(config)
    for still, row in zip(report["dynamic"], report["results"]):
        assert still["bpb"] == pytest.approx(row["bpb"], rel=1e-5)
    with pytest.raises(UserError, match="--dynamic: the loss is not finite; a lower --dynamic-lr"):
        evaluate.evaluate(dataclasses.replace(config, dynamic_lr=1e30))


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
        ({"dynamic_tokens": 0}, "--dynamic-tokens must be positive, got 0"),
        ({"dynamic_lr": math.nan}, "--dynamic-lr must be at least 0, got nan"),
        ({"dynamic_decay": 1.5}, r"--dynamic-decay must be in \[0, 1\], got 1.5"),
        ({"data": f"text:{tmp_path}/none*"}, "no file matches"),
        ({"data": f"text:{tmp_path}/empty.txt"}, "empty corpus"),
        ({"model": str(tmp_path)}, "no checkpoint under"),
        ({"device": "nowhere"}, "--device nowhere"),
        ({"json": f"{tmp_path}/none/a.json"}, "--json .*/none/a.json: must be a file in a folder"),
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
    assert held_out == split_in_memory(spec, "", 1 << 62).held_out
    assert 0 < len(held_out) < 5
