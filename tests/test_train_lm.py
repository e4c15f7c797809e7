"""train/lm.py and train/sample.py as a user runs them: real scripts in real processes."""

import importlib.metadata
import itertools
import json
import math
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import tokenizers
import torch
from pyarrow import parquet
from torch.nn import functional as F

from kru_triton.lm.model import LanguageModel, LanguageModelConfig
from kru_triton.train import evaluate, lm, sample
from kru_triton.train.evaluate import EvaluateConfig
from kru_triton.train.run import checkpoints, optimizers
from kru_triton.train.run import directory as run_directory
from kru_triton.train.run import run as run_module
from kru_triton.train.run.device import pick_dtype
from kru_triton.train.run.optimizers import learning_rate_factor
from kru_triton.train.run.settings import Config, UserError
from kru_triton.train.text import data, generate, held_out, load, streams, tokenizer
from kru_triton.train.text.batches import MemoryBatches
from kru_triton.train.text.documents import read_documents
from kru_triton.train.text.rows import START
from kru_triton.train.text.shards import DataError
from kru_triton.train.text.streams import Reader, lines_of_rank

TRAIN = Path(__file__).parents[1] / "train"
TINY = shlex.split(
    "--preset tiny --d-model 16 --num-layers 1 --hidden-size 16 --num-heads 1 --nonlinearity tanh "
    "--backend torch --device cpu --dtype float32 --batch-size 4 --segment-length 32 --lr 1e-2 "
    "--dropout 0.1 --wandb disabled --sample-tokens 20 --log-every 7 --warmup 10"
)


def environment():
    """A user's: Triton's interpreter, slow as it is, is for the tests of the kernels."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}


def start(script, *arguments, **options):
    command = [sys.executable, str(TRAIN / script), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment()}
    return subprocess.Popen(command, **pipes, **options)


def run(script, *arguments, code=0, **options):
    """Run a script to its end; its output (stdout, stderr) as text."""
    process = start(script, *arguments, **options)
    out, err = (text.decode() for text in process.communicate(timeout=300))
    assert process.returncode == code, out + err
    return out, err


@pytest.mark.skipif(sys.platform != "linux", reason="OpenMP is libgomp on Linux")
@pytest.mark.parametrize(
    ("given", "rounds"),
    [({}, 10000), ({"GOMP_SPINCOUNT": "7"}, 7), ({"OMP_WAIT_POLICY": "passive"}, 0)],
    ids=["ours", "count", "policy"],
)
def test_waiting_threads_soon_sleep(given, rounds, monkeypatch):
    """What OpenMP has read when torch loaded it; a user's own choice stands."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):  # this process may have imported lm
        monkeypatch.delenv(name, raising=False)
    for name, value in {**given, "OMP_DISPLAY_ENV": "verbose"}.items():
        monkeypatch.setenv(name, value)
    _, told = run("lm.py", "--help")
    assert re.search(r"GOMP_SPINCOUNT = '(\d+)'", told)[1] == str(rounds)


def metrics(run_dir):
    """The rows of metrics.jsonl without the speeds, which differ from run to run."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    speeds = ("tok_s", "data_wait")
    return [{key: value for key, value in row.items() if key not in speeds} for row in rows]


def run_in_process(monkeypatch, *arguments):
    """Exit code of train/lm.py's main(), here (fast, for what needs no process of its own)."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr(sys, "argv", ["train/lm.py", *map(str, arguments)])
    try:
        with pytest.raises(SystemExit) as end:
            lm.main()
        return end.value.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Eight files of English-like text, one held out by hand."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = np.random.default_rng(0)
    words = ["the", "unit", "state", "carries", "kröneker", "of", "a", "matrix", "and", "time"]
    for number in range(8):
        text = " ".join(draw.choice(words, 1000)) + "\n"
        (folder / f"{number}.txt").write_text(text)
    return ["--data", f"text:{folder}/*.txt", "--valid", f"text:{folder}/7.txt"]


@pytest.fixture(scope="module")
def long_flags(corpus):
    """A run long enough to be stopped in the middle."""
    return [*TINY, *corpus, "--steps", "420", "--eval-every", "100", "--checkpoint-every", "50"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, long_flags):
    """An uninterrupted run: its directory and what it printed."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    return run_dir, run("lm.py", *long_flags, "--run-dir", run_dir)[0]


# What a run leaves and prints


def test_a_finished_run_has_all_its_files_and_keys(finished):
    run_dir, _ = finished
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    always = {"step", "tokens", "train/loss_nats", "tok_s", "data_wait", "grad_norm"}
    always |= {"unitarity", "lr"}
    evaluated = always | {"val/loss_nats", "val/bpb"}
    assert [row["step"] for row in rows] == sorted({*range(7, 421, 7), 100, 200, 300, 400, 420})
    for row in rows:
        assert set(row) == (evaluated if row["step"] in (100, 200, 300, 400, 420) else always)
        assert row["tokens"] == row["step"] * 4 * 32
        assert all(math.isfinite(value) for value in row.values())
        assert 0 <= row["data_wait"] < 1

    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["val/bpb"] == rows[-1]["val/bpb"]
    assert (summary["steps"], summary["tokens"]) == (420, 420 * 4 * 32)
    assert summary["seconds"] > 0
    assert summary["versions"]["torch"] == importlib.metadata.version("torch")
    assert "commit" in summary
    settings = json.loads((run_dir / "config.json").read_text())
    assert (settings["steps"], settings["dropout"], settings["d_model"]) == (420, 0.1, 16)

    model = LanguageModel(LanguageModelConfig(**{**settings["model_config"], "factors": None}))
    assert summary["parameters"] == sum(p.numel() for p in model.parameters())
    assert summary["recurrent_parameters"] == 2 * (4 * 4 + 4 * 4)  # two complex 4x4 factors
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == [
        "step-350",
        "step-400",
        "step-420",
    ]


def test_a_run_learns_and_states_its_facts_first_and_its_result_last(finished):
    run_dir, out = finished
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["val/bpb"] < 3 < metrics(run_dir)[0]["train/loss_nats"] / math.log(2)
    head, tail = out.split("step 7 ")[0], out.split("done: ")[1]
    for fact in ("lr=0.01", "parameters", "recurrent", "backend: kru_scan", "gzip -9", "commit"):
        assert fact in head
    assert re.search(r"train: 7 documents, [\d,]+ bytes, sha256 [0-9a-f]{16}", head)
    for fact in (f"val/bpb {summary['val/bpb']:.4f}", "gzip -9", "xz", "53,760 tokens"):
        assert fact in tail
    assert f"sample.py {run_dir} --prompt" in tail
    assert out.count("    | ") >= 5  # a sample at each evaluation


def test_val_bpb_is_the_loss_of_each_byte_given_all_bytes_before_it_in_its_document(
    finished, corpus
):
    run_dir, _ = finished
    model, _, _ = load.load_model(str(run_dir), "cpu", "auto")
    ((_, text),) = read_documents(corpus[3])
    tokens = torch.tensor([[256, *text]])
    with torch.no_grad():
        logits, _ = model(tokens[:, :-1])
    nats = F.cross_entropy(logits[0].double(), tokens[0, 1:], reduction="sum").item()
    expected = nats / math.log(2) / len(text)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["val/bpb"] == pytest.approx(expected, rel=1e-5)  # float32 logits
    assert summary["val/loss_nats"] == pytest.approx(expected * math.log(2), rel=1e-5)


def test_help_has_every_flag():
    out, _ = run("lm.py", "--help")
    flags = (
        "data valid tokenizer model preset match-params steps minutes batch-size segment-length "
        "optimizer lr schedule decay-share unitarity-weight seed run-dir resume checkpoint-every "
        "eval-every log-every keep wandb backend precision device compile"
    )
    missing = [flag for flag in flags.split() if not re.search(rf"--{flag}[ ,]", out)]
    assert missing == []


# Stop and resume


def wait_for_row(process, run_dir, step):
    """Until metrics.jsonl has the row of this step."""
    path = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 300  # of a machine that does much else
    while not (path.exists() and f'"step": {step},' in path.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def same_end(run_dir, finished):
    """Every number, and every byte of the last checkpoint's tensors, as without a stop."""
    whole, _ = finished
    assert metrics(run_dir) == metrics(whole)
    assert last_tensors(run_dir, 420) == last_tensors(whole, 420)


def last_tensors(run_dir, step):
    """The bytes of a checkpoint's tensors, by file."""
    files = checkpoints.folder(run_dir, step).glob("*.safetensors")
    found = {path.name: path.read_bytes() for path in files}
    assert set(found) == {"model.safetensors", "optimizer.safetensors", "rank-0.safetensors"}
    return found


def stop_in_training(monkeypatch, *calls):
    """SIGTERM in these calls of the model, counted from 1, among those that train."""
    real, seen = LanguageModel.forward, []

    def interrupted(self, *arguments):
        seen.extend([1] * self.training)
        if self.training and len(seen) in calls:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *arguments)

    monkeypatch.setattr(LanguageModel, "forward", interrupted)


def test_after_sigkill_the_run_goes_on_bit_for_bit(tmp_path, long_flags, finished):
    for row in (63, 182, 322):  # later than the checkpoints at 50, 150 and 300
        process = start("lm.py", *long_flags, "--run-dir", tmp_path / "run")
        wait_for_row(process, tmp_path / "run", row)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    out, _ = run("lm.py", *long_flags, "--run-dir", tmp_path / "run", "--resume", "must")
    assert re.search(r"resumed from .*step-(\d+): step \1,", out)
    same_end(tmp_path / "run", finished)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_checkpoints_and_exits_0(tmp_path, long_flags, finished, number):
    process = start("lm.py", *long_flags, "--run-dir", tmp_path / "run")
    wait_for_row(process, tmp_path / "run", 105)
    process.send_signal(number)
    out = process.communicate(timeout=300)[0].decode()
    assert process.returncode == 0
    stopped = int(re.search(rf"stopped by {number.name} after step (\d+)", out)[1])
    assert 105 <= stopped < 420
    assert checkpoints.list_steps(tmp_path / "run")[-1] == stopped
    assert not (tmp_path / "run" / "summary.json").exists()
    run("lm.py", *long_flags, "--run-dir", tmp_path / "run")
    same_end(tmp_path / "run", finished)


def test_resuming_on_stdlib_data_changes_no_digit(tmp_path, corpus, monkeypatch):
    flags = [*TINY, "--data", "stdlib", *corpus[2:], "--steps", 12, "--log-every", 1]
    assert run_in_process(monkeypatch, *flags, "--run-dir", tmp_path / "whole") == 0
    stop_in_training(monkeypatch, 3, 8)
    for end in (3, 8, 12):
        assert run_in_process(monkeypatch, *flags, "--run-dir", tmp_path / "parts") == 0
        assert checkpoints.list_steps(tmp_path / "parts")[-1] == end
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")


def test_a_second_signal_ends_the_process_at_once():
    code = (
        "import os, signal, time; from kru_triton.train.run.processes import Stop; stop = Stop()\n"
        "os.kill(os.getpid(), signal.SIGTERM); print(stop.requested, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGINT); time.sleep(60)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=50)
    assert process.stdout.decode().split() == ["SIGTERM"]
    assert process.returncode == -signal.SIGINT


def test_a_corrupt_checkpoint_falls_back_and_says_so(
    tmp_path, long_flags, finished, monkeypatch, capsys
):
    short = [*long_flags, "--run-dir", tmp_path / "run"]
    assert run_in_process(monkeypatch, *short, "--steps", 120) == 0
    newest = tmp_path / "run" / "checkpoints" / "step-120" / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    capsys.readouterr()
    assert run_in_process(monkeypatch, *short, "--steps", 120) == 0
    out = capsys.readouterr().out
    assert re.search(r"step-120 is corrupt: optimizer.safetensors has \d+ bytes, \d+ were", out)
    assert re.search(r"falling back to .*step-100", out)
    assert "resumed from" in out
    assert checkpoints.load_latest(tmp_path / "run")[1] == []
    assert (tmp_path / "run" / "checkpoints" / "corrupt-step-120").is_dir()


def test_a_full_disk_costs_the_checkpoint_and_not_the_run(tmp_path, long_flags):
    flags = [*long_flags, "--run-dir", tmp_path / "run"]
    process = start("lm.py", *flags)
    wait_for_row(process, tmp_path / "run", 56)
    while not checkpoints.list_steps(tmp_path / "run"):  # it is written in the background
        assert process.poll() is None, process.communicate()
    process.kill()
    process.communicate()
    kept = checkpoints.list_steps(tmp_path / "run")
    model_bytes = (
        (tmp_path / "run" / "checkpoints" / f"step-{kept[0]}" / "optimizer.safetensors")
        .stat()
        .st_size
    )

    def limit_file_size():  # a real write that fails in a real process
        resource.setrlimit(resource.RLIMIT_FSIZE, (model_bytes - 1000, resource.RLIM_INFINITY))

    out, _ = run("lm.py", *flags, code=1, preexec_fn=limit_file_size)
    assert re.search(
        r"warning: checkpoint of step 420 not written: File too large; step-\d+ stays", out
    )
    assert "done: val/bpb" in out
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [
        f"step-{step}" for step in kept
    ]
    assert checkpoints.load_latest(tmp_path / "run")[1] == []
    assert metrics(tmp_path / "run")[-1]["step"] == 420


def test_another_configuration_is_refused_with_the_settings_that_differ(
    finished, long_flags, monkeypatch, capsys
):
    run_dir, _ = finished
    before = metrics(run_dir)
    other = ["--lr", 0.5, "--d-model", 32, "--seed", 3]
    assert run_in_process(monkeypatch, *long_flags, "--run-dir", run_dir, *other) == 2
    err = capsys.readouterr().err
    assert "belongs to a run with other settings" in err
    lines = [line.strip() for line in err.splitlines() if " there, " in line]
    assert lines == [
        "d_model: 16 there, 32 now",
        "lr: 0.01 there, 0.5 now",
        "seed: 0 there, 3 now",
    ]
    assert metrics(run_dir) == before


@pytest.mark.parametrize("other", [["--tokenizer", "bpe:9"], ["--data", "json:{}/a.json"]])
def test_refused_data_leave_the_run_as_it_was(tmp_path, finished, long_flags, monkeypatch, other):
    def files():
        paths = (path for path in run_dir.rglob("*") if path.name != ".lock" and path.is_file())
        return {path: path.read_bytes() for path in paths}

    run_dir, _ = finished
    before = files()
    (tmp_path / "a.json").write_text('{"text": "some words"}\n' * 20)
    flags = [*long_flags, "--run-dir", run_dir, *(flag.format(tmp_path) for flag in other)]
    assert run_in_process(monkeypatch, *flags) == 2
    assert files() == before


def test_other_text_is_another_configuration(tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text("some words to learn from\n" * 400)
    flags = [
        *TINY,
        "--data",
        f"text:{tmp_path}/text.txt",
        "--run-dir",
        tmp_path / "run",
        "--steps",
        2,
    ]
    assert run_in_process(monkeypatch, *flags) == 0
    (tmp_path / "text.txt").write_text("other words to learn from\n" * 400)
    assert run_in_process(monkeypatch, *flags) == 2
    assert "train_sha256" in capsys.readouterr().err


def test_a_larger_budget_goes_on_and_a_finished_run_only_reports(
    tmp_path, corpus, monkeypatch, capsys
):
    flags = [*TINY, *corpus, "--run-dir", tmp_path / "run"]
    for steps, expected in ((20, [7, 14, 20]), (20, [7, 14, 20]), (30, [7, 14, 20, 21, 28, 30])):
        assert run_in_process(monkeypatch, *flags, "--steps", steps) == 0
        assert [row["step"] for row in metrics(tmp_path / "run")] == expected
        assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == steps
    assert "note: --steps was 20 and is 30" in capsys.readouterr().out


def test_resume_must_and_never(tmp_path, corpus, monkeypatch, capsys):
    flags = [*TINY, *corpus, "--run-dir", tmp_path / "run", "--steps", 3]
    assert run_in_process(monkeypatch, *flags, "--resume", "must") == 2
    assert "--resume must: no good checkpoint under" in capsys.readouterr().err
    assert run_in_process(monkeypatch, *flags) == 0
    assert run_in_process(monkeypatch, *flags, "--seed", 1, "--resume", "never") == 0
    old, new = (
        json.loads((d / "config.json").read_text())
        for d in (tmp_path / "run" / "old-1", tmp_path / "run")
    )
    assert (old["seed"], new["seed"]) == (0, 1)
    assert checkpoints.load_latest(tmp_path / "run" / "old-1")[0].trainer["step"] == 3
    (tmp_path / "run/checkpoints/step-3/model.safetensors").unlink()
    before = sorted((tmp_path / "run").rglob("*"))
    assert run_in_process(monkeypatch, *flags, "--seed", 1, "--resume", "must") == 2
    assert re.search(r"--resume must: .*; step-3 is corrupt: model", capsys.readouterr().err)
    assert sorted((tmp_path / "run").rglob("*")) == before


def test_what_a_run_remembers_of_its_data_is_set_aside_with_it(tmp_path, corpus, monkeypatch):
    flags = [*TINY, *corpus, "--run-dir", tmp_path / "run", "--steps", 2]
    assert run_in_process(monkeypatch, *flags, "--tokenizer", "bpe:20") == 0
    assert run_in_process(monkeypatch, *flags, "--resume", "never") == 0
    assert (tmp_path / "run" / "old-1" / "data.json").exists()
    assert run_in_process(monkeypatch, *flags, "--steps", 3) == 0


def fail_at(monkeypatch, owner, name, number, error):
    """Let call `number` of a function raise."""
    real, calls = getattr(owner, name), []

    def failing(*arguments, **options):
        calls.append(1)
        if len(calls) == number:
            raise error
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, failing)


@pytest.fixture(scope="module")
def twelve_steps(tmp_path_factory, corpus):
    """An undisturbed run of twelve steps, and its flags."""
    run_dir = tmp_path_factory.mktemp("runs") / "twelve"
    flags = [*TINY, *corpus, "--steps", 12, "--eval-every", 5]
    with pytest.MonkeyPatch.context() as patch:
        assert run_in_process(patch, *flags, "--run-dir", run_dir) == 0
    return flags, run_dir


FAULTS = {  # what raises in which call, exit code (None: the error itself), steps that are done
    "shard": (MemoryBatches, "next", 8, DataError("shard-7", "the server is gone"), 2, 7),
    "tokenizer": (MemoryBatches, "next", 8, UserError("no tokens for b'x'"), 2, 7),
    "reader": (MemoryBatches, "next", 8, ZeroDivisionError("in a worker"), None, 7),
    "evaluation": (lm, "evaluate", 1, UserError("cannot evaluate"), 2, 5),
    "memory": (lm, "evaluate", 1, MemoryError(), 1, 5),
    "result": (lm, "evaluate", 3, RuntimeError("of the last step"), None, 12),
    "sample": (lm, "write_sample", 2, RuntimeError("cannot sample"), None, 10),
    "output": (lm, "describe", 1, BrokenPipeError(32, "Broken pipe"), 1, 5),
    "backward": (lm, "backward", 7, torch.OutOfMemoryError("of a GPU"), 1, 6),
    "gradient": (torch.nn.utils, "clip_grad_norm_", 9, RuntimeError("a kernel failed"), None, 8),
    "checkpoint": (lm, "pack", 1, MemoryError(), 1, 4),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_error_leaves_a_checkpoint_of_the_last_completed_step(
    tmp_path, twelve_steps, monkeypatch, capsys, fault
):
    owner, name, number, error, code, step = FAULTS[fault]
    flags, whole = twelve_steps
    flags = [*flags, "--run-dir", tmp_path, "--checkpoint-every", 4 if name == "pack" else 0]
    with monkeypatch.context() as patch:
        fail_at(patch, owner, name, number, error)
        patch.setattr(run_module, "drop_output", lambda: None)
        if code is None:
            with pytest.raises(type(error), match=str(error)):
                run_in_process(patch, *flags)
        else:
            assert run_in_process(patch, *flags) == code
    err = capsys.readouterr().err
    good = tmp_path / "checkpoints" / f"step-{step}"
    assert f"stopped after step {step}, the last good checkpoint is {good}" in err
    assert ("error: " in err) == (code is not None)
    assert checkpoints.list_steps(tmp_path) == [step]

    assert run_in_process(monkeypatch, *flags) == 0
    results = [json.loads((d / "summary.json").read_text()) for d in (tmp_path, whole)]
    assert results[0]["val/bpb"] == results[1]["val/bpb"]
    for file in ("model.safetensors", "optimizer.safetensors", "rank-0.json"):
        path = Path("checkpoints", "step-12", file)
        assert (tmp_path / path).read_bytes() == (whole / path).read_bytes()
    if owner is not lm:  # no row was lost
        assert metrics(tmp_path) == metrics(whole)


def test_a_half_done_update_is_not_saved(tmp_path, twelve_steps, monkeypatch, capsys):
    flags, whole = twelve_steps
    flags = [*flags, "--run-dir", tmp_path, "--checkpoint-every", 3]
    with monkeypatch.context() as patch:
        fail_at(patch, torch.optim.AdamW, "step", 9, RuntimeError("some weights are new"))
        with pytest.raises(RuntimeError, match="some weights are new"):
            run_in_process(patch, *flags)
    assert re.search(r"after step 8, the last good checkpoint is .*step-6", capsys.readouterr().err)
    assert checkpoints.list_steps(tmp_path) == [3, 6]
    assert run_in_process(monkeypatch, *flags) == 0
    assert metrics(tmp_path) == metrics(whole)


def test_a_character_without_token_far_into_a_stream(tmp_path, monkeypatch, capsys):
    texts = ["the state of a unit "] * 400
    texts[350] = "the state of a n\u00eft"
    shard = tmp_path / "shard.jsonl"
    shard.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "valid.txt").write_text(" ".join(texts[:100]))
    for module in (tokenizer, data):
        monkeypatch.setattr(module, "TRAINING_BYTES", 2000)
    monkeypatch.setattr(streams, "PANEL", 64)
    flags = [*TINY, "--data", f"json:{shard}", "--valid", f"text:{tmp_path}/valid.txt"]
    flags += ["--tokenizer", "characters", "--shuffle-buffer", 20, "--batch-size", 2]
    assert run_in_process(monkeypatch, *flags, "--run-dir", tmp_path / "run", "--steps", 500) == 2
    err = capsys.readouterr().err
    assert (
        "error: the tokenizer has no tokens for b'\\xaf\\xc3', as in 'the state of a n\u00eft'"
        in err
    )
    assert "--tokenizer bytes takes any text; stopped after step " in err
    (saved,) = checkpoints.list_steps(tmp_path / "run")
    assert metrics(tmp_path / "run")[-1]["step"] > saved - 7 > 20


@pytest.mark.parametrize("kind", ["characters", "words"])
def test_a_prompt_that_the_tokenizer_cannot_encode_is_refused_at_once(
    tmp_path, corpus, monkeypatch, capsys, kind
):
    if kind == "words":  # without a token for what is unknown
        vocabulary = {word: i for i, word in enumerate(Path(corpus[3][5:]).read_text().split())}
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary))
        words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        words.save(str(tmp_path / "words.json"))
        kind = tmp_path / "words.json"
    flags = [*TINY, *corpus, "--run-dir", tmp_path / "run", "--steps", 2, "--tokenizer", kind]
    assert run_in_process(monkeypatch, *flags, "--prompt", "the Ünit") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: --prompt 'the Ünit': the tokenizer ")
    assert "--tokenizer bytes" in err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert run_in_process(monkeypatch, *flags, "--prompt", "the Ünit", "--sample-tokens", 0) == 0
    capsys.readouterr()
    with pytest.raises(UserError, match="--prompt 'Ünit'"):
        sample.run(sample.SampleConfig(str(tmp_path / "run"), prompt="Ünit"))
    assert capsys.readouterr().out == ""


def test_a_clock_that_is_set_back_changes_no_budget(tmp_path, corpus, monkeypatch):
    hours = iter(range(10**6, 0, -1))
    monkeypatch.setattr(time, "time", lambda: next(hours) * 3600.0)
    flags = [*TINY, *corpus, "--run-dir", tmp_path / "run", "--minutes", 0.02]
    assert run_in_process(monkeypatch, *flags) == 0
    assert 1.2 <= json.loads((tmp_path / "run" / "summary.json").read_text())["seconds"] < 3600


def test_minutes_anneal_the_learning_rate_to_the_floor(tmp_path, corpus, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: 0.01 * next(ticks))  # the run's own clock
    flags = [*TINY, *corpus, "--run-dir", tmp_path / "run", "--minutes", 0.1, "--log-every", 1]
    assert run_in_process(monkeypatch, *flags) == 0
    rates = [row["lr"] for row in metrics(tmp_path / "run")]
    assert max(rates) > 0.9 * 0.01
    assert rates[-1] == pytest.approx(0.05 * 0.01, rel=0.3)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_the_schedule_warms_up_and_follows_the_cosine():
    config = Config(warmup=10, lr_floor=0.1)
    factors = [learning_rate_factor(config, step, step / 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[9] > 0.95
    assert factors[50] == pytest.approx(0.55)
    assert learning_rate_factor(config, 100, 1.0) == pytest.approx(0.1)


def test_wsd_stays_at_the_peak_until_its_decay():
    config = Config(warmup=10, lr_floor=0.1, schedule="wsd", decay_share=0.25)
    factors = [learning_rate_factor(config, step, step / 100) for step in range(101)]
    assert factors[:9] == sorted(factors[:9])
    assert factors[9:76] == [factors[9]] * 67
    assert factors[9] == pytest.approx(1)
    assert factors[75:] == sorted(factors[75:], reverse=True)
    assert factors[-1] == pytest.approx(0.1)
    assert factors[81] == pytest.approx(0.1 + 0.9 * (1 - 0.24**0.5))
    constant = Config(warmup=0, schedule="wsd", decay_share=0)
    assert learning_rate_factor(constant, 100, 1.0) == pytest.approx(1)


def test_a_run_resumed_before_its_decay_is_one_of_the_larger_budget(
    tmp_path, corpus, monkeypatch, capsys
):
    """The first leg has 20 steps, of which the last 10 decay, and is stopped after 8."""
    flags = [*TINY, *corpus, "--schedule", "wsd", "--decay-share", 0.5, "--log-every", 1]
    flags += ["--optimizer", "muon"]
    assert run_in_process(monkeypatch, *flags, "--steps", 40, "--run-dir", tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        stop_in_training(patch, 8)
        assert run_in_process(monkeypatch, *flags, "--steps", 20, "--run-dir", tmp_path / "p") == 0
    assert "stopped by SIGTERM after step 8" in capsys.readouterr().out
    assert run_in_process(monkeypatch, *flags, "--steps", 40, "--run-dir", tmp_path / "p") == 0
    assert metrics(tmp_path / "p") == metrics(tmp_path / "whole")
    assert last_tensors(tmp_path / "p", 40) == last_tensors(tmp_path / "whole", 40)
    rates = [row["lr"] for row in metrics(tmp_path / "p")]
    assert len(set(rates[10:20])) == 1 < len(set(rates[20:]))


# Bad input


def test_a_non_finite_loss_stops_with_code_3_and_names_the_checkpoint(
    tmp_path, corpus, monkeypatch, capsys
):
    flags = [*TINY, *corpus, "--run-dir", tmp_path / "run", "--steps", 60, "--checkpoint-every", 10]
    real, steps = LanguageModel.forward, []

    def poisoned(self, *arguments):
        logits, state = real(self, *arguments)
        steps.extend([1] * self.training)
        return (logits * math.nan if len(steps) == 24 else logits), state

    monkeypatch.setattr(LanguageModel, "forward", poisoned)
    assert run_in_process(monkeypatch, *flags) == 3
    err = capsys.readouterr().err
    assert "error: non-finite loss at step 24 (loss nan" in err
    assert re.search(r"the last good checkpoint is .*checkpoints/step-20;", err)
    assert checkpoints.list_steps(tmp_path / "run") == [10, 20]


def test_bad_arguments_and_data_end_with_code_2_and_a_message(
    tmp_path, corpus, monkeypatch, capsys
):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # with it the kernels run on a CPU
    (tmp_path / "short.txt").write_text("ten bytes\n")
    (tmp_path / "file").touch()
    cases = [
        (["--data", "text:/no/such/file"], "no file matches 'text:/no/such/file'"),
        (
            [*corpus, "--valid", f"text:{tmp_path}/short.txt"],
            "validation text too short: 11 tokens",
        ),
        ([*corpus, "--factors", "3", "5"], "hidden_size"),
        ([*corpus, "--num-heads", "3"], "num_heads"),
        ([*corpus, "--backend", "triton"], "triton"),
        ([*corpus, "--device", "cuda:99"], "--device cuda:99"),
        ([*corpus, "--match-params", "10"], "match_params"),
        ([*corpus, "--run-dir", tmp_path / "file" / "run"], "--run-dir"),
        ([*corpus, "--batch-size", "100000"], "too few for 100000 lanes"),
        ([*corpus, "--frozen-factors", "--model", "gru"], "kru and krulstm, not for gru"),
        (
            [*corpus, "--optimizer", "muon", "--frame", "plain"],
            "--model kru --frame plain has no matrix between embedding and head; use adamw",
        ),
        ([*corpus, "--test", "text:/no/such/test"], "no file matches 'text:/no/such/test'"),
        ([*corpus, "--grad-accumulation", "3"], "must divide --batch-size (4 lanes), got 3"),
    ]
    for flags, message in cases:
        code = run_in_process(
            monkeypatch, *TINY, "--run-dir", tmp_path / "run", "--steps", 1, *flags
        )
        err = capsys.readouterr().err
        assert code == 2, (flags, err)
        assert message in err, (flags, err)
        assert err.startswith("error: ")
        assert "Traceback" not in err


def test_exit_code_2_of_the_real_process(tmp_path):
    _, err = run("lm.py", "--data", "text:/no/such/file", "--run-dir", tmp_path, code=2)
    assert err.startswith("error: no file matches")
    run("lm.py", "--no-such-flag", code=2)


def test_a_config_file_that_is_not_one_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json is not the configuration of a run"):
        run_directory.compare_settings(tmp_path, {})


# What is held out


def write_corpus(folder, kind):
    """400 documents, as text files or in two shards; returns their spec."""
    folder.mkdir()
    texts = [f"{kind} {number} " + f"{number} words " * 9 for number in range(400)]
    shards = 400 if kind == "text" else 2
    for shard in range(shards):
        path, part = folder / f"{shard}.{kind}", texts[shard::shards]
        if kind == "parquet":
            parquet.write_table(pyarrow.table({"text": part}), path)
        else:
            lines = [json.dumps({"text": text}) + "\n" for text in part]
            path.write_text("".join(part if kind == "text" else lines))
    return f"{kind}:{folder}/*.{kind}"


def texts_of(tokens, starts):
    return [bytes(tokens[a + 1 : b].tolist()) for a, b in itertools.pairwise(starts)]


def texts_of_an_epoch(batches):
    """All documents that training reads."""
    if isinstance(batches, MemoryBatches):
        return texts_of(batches.stream.tokens, batches.stream.starts)
    texts, reader = [], Reader(batches.plan)
    for source in range(len(batches.plan.sources)):
        for line in range(len(lines_of_rank(batches.plan, source, 0))):
            begin = 0, START
            while begin:
                block = reader.block(source, 0, line, begin)
                texts += texts_of(block.tokens, block.starts)
                begin = block.next
    return texts


@pytest.mark.parametrize(
    ("kinds", "limit"),
    [
        ("text", held_out.MEMORY_LIMIT),
        ("text", 1000),
        ("2:text", held_out.MEMORY_LIMIT),
        ("json", held_out.MEMORY_LIMIT),
        ("parquet", held_out.MEMORY_LIMIT),
        ("text 3:json parquet", held_out.MEMORY_LIMIT),
    ],
    ids=lambda value: value if isinstance(value, str) else "large" if value == 1000 else "",
)
def test_evaluation_reads_what_the_run_held_out_and_nothing_it_trains_on(
    tmp_path, monkeypatch, kinds, limit
):
    specs = []
    for kind in kinds.split():
        weight, colon, name = kind.rpartition(":")
        specs.append(weight + colon + write_corpus(tmp_path / name, name))
    build, built = data.build, []
    monkeypatch.setattr(data, "build", lambda *args: built.append(build(*args)) or built[-1])
    monkeypatch.setattr(held_out, "MEMORY_LIMIT", limit)
    flags = [*TINY, "--steps", 1, "--run-dir", tmp_path / "run"]
    assert run_in_process(monkeypatch, *flags, *(f"--data={spec}" for spec in specs)) == 0
    trained = set(texts_of_an_epoch(built[0].train))
    kept = texts_of(built[0].valid.tokens, built[0].valid.starts)
    assert len(trained) > 370
    assert len(kept) > 4
    assert trained.isdisjoint(kept)

    def read(*data, model=tmp_path / "run"):
        return [text for _, text in evaluate.read_text(EvaluateConfig(str(model), data, True))]

    assert read() == read(*specs) == kept
    assert read(*specs, model="exported") == kept
    assert [text for spec in specs for text in read(spec)] == kept
    assert read(*(spec.replace(str(tmp_path), f"{tmp_path}/.") for spec in specs)) == kept
    monkeypatch.setattr(held_out, "MEMORY_LIMIT", 10**9)  # the run knows what it did
    assert read() == kept
    if kinds == "json":
        saved = json.loads((tmp_path / "run/data.json").read_text())
        saved["held_out"].pop()
        (tmp_path / "run/data.json").write_text(json.dumps(saved))
        with pytest.raises(UserError, match=r"the text that it held out of --data json:.* changed"):
            read()
    if kinds == "text" and limit > 1000:
        with pytest.raises(UserError, match=r"was trained on .*\.text, of --data text:.*1\*"):
            read(f"text:{tmp_path}/text/1*")
        (number,) = re.findall(rb"text (\d+) ", kept[0])
        (tmp_path / f"text/{int(number)}.text").write_text("other text")
        with pytest.raises(UserError, match=r"the text that it held out of --data text:.* changed"):
            read()


def test_evaluation_of_a_run_with_validation_text_of_its_own(tmp_path, monkeypatch):
    data, valid = (write_corpus(tmp_path / name, "json") for name in ("data", "valid"))
    flags = [*TINY, "--steps", 1, "--run-dir", tmp_path / "run", "--valid-bytes", 1000]
    assert run_in_process(monkeypatch, *flags, "--data", data, "--valid", valid) == 0

    def read(*data, held_out=True):
        return evaluate.read_text(EvaluateConfig(str(tmp_path / "run"), data, held_out))

    whole = read(valid, held_out=False)
    assert read() == read(data) == whole[: len(read())]
    assert 1000 <= sum(len(text) for _, text in read()) < 1200
    with pytest.raises(UserError, match=r"was trained on .*/0\.json, .*without --data it is"):
        read(data.replace("*", "0"))
    other = read(write_corpus(tmp_path / "other", "text"))  # it was not trained on that
    assert 0 < len(other) < 40


def test_a_file_whose_name_is_no_utf8_is_trained_on_and_evaluated(tmp_path, monkeypatch, capsys):
    file = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt")
    Path(file).write_text("some words to learn from\n" * 100)
    flags = [*TINY, "--steps", 1, "--run-dir", tmp_path / "run", "--data", f"text:{file}"]
    assert run_in_process(monkeypatch, *flags) == 0
    monkeypatch.setattr(
        sys, "argv", ["train/evaluate.py", str(tmp_path / "run"), "--contexts", "9"]
    )
    evaluate.main()
    out = capsys.readouterr().out
    assert out.count(r"\udcff.txt") >= 2


# Other ways to run


@pytest.mark.parametrize(
    ("model", "optimizer"),
    [
        *((model, "adamw") for model in ("krulstm", "lstm", "gru", "rnn", "transformer")),
        *((model, "muon") for model in ("kru", "lstm", "mingru", "transformer")),
    ],
)
def test_models_train_stop_and_go_on(tmp_path, corpus, monkeypatch, model, optimizer):
    flags = [*TINY, *corpus, "--model", model, "--optimizer", optimizer, "--eval-every", 6]
    for directory, legs in (("whole", [12]), ("parts", [5, 12])):
        for steps in legs:
            # Constant learning rate, so that the shorter first leg has the same schedule.
            more = ["--steps", steps, "--lr-floor", 1, "--run-dir", tmp_path / directory]
            assert run_in_process(monkeypatch, *flags, *more, "--log-every", 1) == 0
    losses = {
        d: [row["train/loss_nats"] for row in metrics(tmp_path / d)] for d in ("whole", "parts")
    }
    whole = losses["whole"]
    assert whole == losses["parts"]
    assert whole[-1] < whole[0]
    assert last_tensors(tmp_path / "whole", 12) == last_tensors(tmp_path / "parts", 12)
    found = checkpoints.load(checkpoints.folder(tmp_path / "whole", 12)).tensors["optimizer"]
    owners = {name.rsplit(":", 1)[0] for name in found if name.endswith(":momentum_buffer")}
    with_adam = {name.rsplit(":", 1)[0] for name in found if name.endswith(":exp_avg_sq")}
    assert not owners & with_adam
    assert bool(owners) == (optimizer == "muon")
    assert {"embedding.weight", "norm.weight"} <= with_adam
    assert ("blocks.0.mixer.projection.weight" in owners) == (optimizer == "muon")


@pytest.mark.parametrize("hardware", [True, False])
def test_muon_rounds_to_bfloat16_where_the_device_multiplies_it(monkeypatch, hardware):
    monkeypatch.setattr(optimizers, "multiplies_bfloat16", lambda device: hardware)
    gradient = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    x = gradient.double() / gradient.norm()
    for _ in range(5):  # Newton-Schulz steps of the coefficients that torch documents
        square = x @ x.T
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    weight = torch.nn.Parameter(torch.zeros(24, 40))
    weight.grad = gradient
    optimizers.Muon([weight], lr=1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    error = (weight.detach() / (-0.2 * math.sqrt(40)) - x).abs().max()
    assert 1e-3 < error < 2e-2 if hardware else error < 1e-5


def test_what_learns_how_is_said_first(tmp_path, corpus, monkeypatch, capsys):
    flags = [*TINY, *corpus, "--steps", 1, "--run-dir", tmp_path, "--recurrent-lr", 1e-3]
    assert run_in_process(monkeypatch, *flags, "--optimizer", "muon", "--resume", "never") == 0
    said = "64 in factors: AdamW at 0.001; 4,112 in embeddings: AdamW at 0.01, decay 0.1; "
    head = capsys.readouterr().out.split("step 1 ")[0]
    assert said in " ".join(head.split())
    assert "in matrices: Muon at 0.01, decay 0.1" in " ".join(head.split())


def test_a_run_module_before_the_flags_goes_on(tmp_path, corpus, monkeypatch, capsys):
    flags = [*TINY, *corpus, "--run-dir", tmp_path, "--lr-floor", 1, "--optimizer", "adamw"]
    assert run_in_process(monkeypatch, *flags, "--steps", 3) == 0
    settings = json.loads((tmp_path / "config.json").read_text())
    for name in ("optimizer", "muon_momentum", "schedule", "decay_share"):
        del settings[name]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    muon = ["--optimizer", "muon", "--schedule", "wsd"]
    assert run_in_process(monkeypatch, *flags, *muon, "--steps", 5) == 2
    err = capsys.readouterr().err
    assert "optimizer: 'adamw' there, 'muon' now" in err
    assert "schedule: 'cosine' there, 'wsd' now" in err
    assert run_in_process(monkeypatch, *flags, "--steps", 5) == 0


def test_momentum_is_muons_and_belongs_to_its_runs(tmp_path, corpus, monkeypatch, capsys):
    def train(momentum, optimizer, folder, steps):
        flags = ["--muon-momentum", momentum, "--optimizer", optimizer, "--run-dir", folder]
        more = ["--lr-floor", 1, "--steps", steps, "--log-every", 1]
        return run_in_process(monkeypatch, *TINY, *corpus, *flags, *more)

    muon, other, adamw = (tmp_path / name for name in ("muon", "other", "adamw"))
    assert train(0.5, "muon", muon, 3) == train(0.9, "muon", other, 3) == 0
    losses = [[row["train/loss_nats"] for row in metrics(folder)] for folder in (muon, other)]
    assert losses[0] != losses[1]
    assert train(0.9, "muon", muon, 4) == 2
    assert "muon_momentum: 0.5 there, 0.9 now" in capsys.readouterr().err
    assert train(0.5, "adamw", adamw, 3) == train(0.9, "adamw", adamw, 4) == 0


def test_frozen_factors_stay_as_they_were_drawn_and_the_rest_learns(tmp_path, corpus, monkeypatch):
    flags = [*TINY, *corpus, "--frozen-factors", "--checkpoint-every", 1, "--keep", 9]
    for steps in (3, 6):  # and the second leg resumes
        assert run_in_process(monkeypatch, *flags, "--steps", steps, "--run-dir", tmp_path) == 0
    first, last = (
        checkpoints.load(checkpoints.folder(tmp_path, step)).tensors["model"] for step in (1, 6)
    )
    for name in first:
        assert torch.equal(first[name], last[name]) == (".factor" in name), name


@pytest.mark.parametrize(("amx", "avx512"), [(False, False), (False, True), (True, True)])
def test_auto_is_bfloat16_where_the_processor_multiplies_it(monkeypatch, amx, avx512):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    expected = "bfloat16" if amx or avx512 else "float32"
    assert pick_dtype("auto", torch.device("cpu")) == expected
    assert pick_dtype("float32", torch.device("cpu")) == "float32"
    assert pick_dtype("auto", torch.device("meta")) == "float32"


def test_a_run_that_goes_on_elsewhere_keeps_its_precision(tmp_path, corpus, monkeypatch, capsys):
    flags = [*TINY, *corpus, "--run-dir", tmp_path / "run", "--steps"]
    assert run_in_process(monkeypatch, *flags, 2) == 0  # TINY is in float32
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert run_in_process(monkeypatch, *flags, 4, "--dtype", "auto") == 0
    assert "resumed from" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "config.json").read_text())["dtype"] == "float32"
    again = [*flags, 2, "--dtype", "auto", "--resume", "never"]
    assert run_in_process(monkeypatch, *again) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["dtype"] == "bfloat16"


def test_bfloat16_and_the_unitary_penalty_take_effect(tmp_path, corpus, monkeypatch):
    flags = [*TINY, *corpus, "--steps", 4, "--log-every", 4, "--dropout", 0]
    ends = {}
    for name, more in {
        "plain": [],
        "bfloat16": ["--dtype", "bfloat16"],
        "penalty": ["--unitarity-weight", 100.0],
    }.items():
        assert run_in_process(monkeypatch, *flags, *more, "--run-dir", tmp_path / name) == 0
        ends[name] = metrics(tmp_path / name)[-1]
    plain, low = ends["plain"]["train/loss_nats"], ends["bfloat16"]["train/loss_nats"]
    assert plain != low == pytest.approx(plain, rel=0.05)
    assert ends["penalty"]["grad_norm"] != ends["plain"]["grad_norm"]


def test_wandb_offline_holds_numbers_sample_and_spectrum(tmp_path, corpus):
    flags = [*TINY, *corpus, "--steps", 10, "--wandb", "offline", "--run-dir", tmp_path / "run"]
    out, _ = run("lm.py", *flags)
    assert "wandb: offline" in out
    assert "wandb: off " not in out
    assert "no figures" not in out
    (record,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    content = record.read_bytes()
    for key in (b"train/loss_nats", b"val/bpb", b"grad_norm", b"unitarity"):
        assert key in content
    media = [path.suffix for path in record.parent.glob("files/media/*/*")]
    assert sorted(media) == [".html", ".png"]
    assert metrics(tmp_path / "run")[-1]["step"] == 10


# Samples


def test_samples_stream_to_the_terminal(finished):
    process = start("sample.py", finished[0], "--prompt", "the ", "--tokens", 2000)
    first = process.stdout.read(10)
    assert process.poll() is None  # it is still writing
    rest, err = process.communicate(timeout=300)
    assert process.returncode == 0
    text = first + rest
    assert text.startswith(b"the ")
    assert b"parameters" in err
    assert len(text.decode()) <= len("the ") + 2000 + 1


def test_samples_are_repeatable_and_follow_the_seed(finished):
    outs = [run("sample.py", finished[0], "--tokens", 60, "--seed", seed)[0] for seed in (1, 1, 2)]
    assert outs[0] == outs[1] != outs[2]


def test_greedy_decoding_equals_the_argmax_of_the_whole_text(finished):
    model, tokenizer, _ = load.load_model(str(finished[0]), "cpu", "auto")
    options = {"temperature": 0, "top_p": 1.0, "generator": torch.Generator()}
    tokens = list(generate.generate(model, tokenizer, b"the unit ", 50, **options))
    whole = torch.tensor([[256, *b"the unit ", *tokens]])
    with torch.no_grad():
        logits, _ = model(whole)
    logits[..., 256] = -math.inf
    assert logits[0, 9:-1].argmax(-1).tolist() == tokens


def test_the_state_does_not_grow_with_the_text(finished, monkeypatch):
    model, tokenizer, _ = load.load_model(str(finished[0]), "cpu", "auto")
    forward, seen = model.forward, []

    def watched(tokens, state=None, reset=None):
        logits, state = forward(tokens, state, reset)
        seen.append((tokens.shape[1], sum(tensor.numel() for tensor in state)))
        return logits, state

    monkeypatch.setattr(model, "forward", watched)
    options = {"temperature": 1.0, "top_p": 1.0, "generator": torch.Generator().manual_seed(0)}
    list(generate.generate(model, tokenizer, b"x" * 99, 20, **options))
    assert [length for length, _ in seen] == [100] + [1] * 19  # the prompt in one go
    assert len({size for _, size in seen}) == 1


def test_draws_stay_in_the_nucleus_and_follow_its_probabilities():
    probabilities = torch.tensor([0.05, 0.5, 0.15, 0.3])
    generator = torch.Generator().manual_seed(0)
    draws = [generate.draw(probabilities.log(), 1.0, 0.75, generator) for _ in range(2000)]
    assert set(draws) == {1, 3}
    assert draws.count(1) / 2000 == pytest.approx(0.625, abs=0.04)  # 3.7 standard errors
    everything = {generate.draw(probabilities.log(), 1.0, 1.0, generator) for _ in range(2000)}
    assert everything == {0, 1, 2, 3}
    assert {generate.draw(probabilities.log(), 1e-30, 1.0, generator) for _ in range(9)} == {1}
    assert generate.draw(probabilities.log(), 0, 0.5, generator) == 1


def test_characters_of_several_bytes_are_put_together(finished, monkeypatch, capsys):
    monkeypatch.setattr(sample, "generate", lambda *_, **__: iter("é€".encode() + b"\xe2"))
    sample.run(sample.SampleConfig(str(finished[0]), prompt="ö"))
    assert capsys.readouterr().out == "öé€\ufffd\n"


def test_bad_arguments_for_samples(finished, tmp_path):
    cases = [
        ({"temperature": -1.0}, "--temperature must be at least 0, got -1.0"),
        ({"temperature": math.nan}, "--temperature must be at least 0"),
        ({"top_p": 0.0}, r"--top-p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"--top-p must be in \(0, 1\], got 1.5"),
        ({"tokens": 0}, "--tokens must be at least 1, got 0"),
        ({"run_dir": str(tmp_path)}, "no checkpoint under"),
    ]
    for values, message in cases:
        with pytest.raises(UserError, match=message):
            sample.run(sample.SampleConfig(**{"run_dir": str(finished[0]), **values}))
    _, err = run("sample.py", tmp_path, code=2)
    assert err.startswith("error: no checkpoint under")
