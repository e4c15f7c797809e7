"""Run directories that an earlier version wrote: sampled, exported, replayed and gone on with.

`data/run-lm` and `data/run-copy` are of commit dabff81, three steps each of

    python train/lm.py --preset tiny --d-model 8 --num-layers 1 --hidden-size 8 --num-heads 1 \\
        --nonlinearity tanh --batch-size 2 --segment-length 16 --tokenizer characters \\
        --data 'text:text/*.txt' --valid text:text/2.txt LM_FLAGS --steps 3 --run-dir lm
    python train/copy_memory.py --preset tiny --T 5 --hidden-size 8 --factors 2 4 --batch-size 4 \\
        COPY_FLAGS --steps 3 --run-dir copy

beside the text of `write_text`; the numbers below are what that version went on with to step 6.
"""

import json
import shlex
import shutil
import signal
import sys
from pathlib import Path

import pytest

from kru_triton.train import lm, sample
from kru_triton.train.tasks import copy_memory, loop

DATA = Path(__file__).parent / "data"
SHARED = "--lr-floor 1 --log-every 1 --wandb disabled --device cpu --backend torch"
LM_FLAGS = (
    "--preset tiny --d-model 8 --num-layers 1 --hidden-size 8 --num-heads 1 --nonlinearity tanh "
    "--state-gate none --batch-size 2 --segment-length 16 --tokenizer characters "
    "--data text:text/*.txt --valid text:text/2.txt --optimizer adamw --lr 1.6e-2 --warmup 0 "
    f"--dtype float32 --sample-tokens 4 {SHARED}"
)
COPY_FLAGS = (
    f"--preset tiny --T 5 --hidden-size 8 --factors 2 4 --batch-size 4 --no-pictures {SHARED}"
)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with both runs and the text in it, which is the working directory."""
    shutil.copytree(DATA, tmp_path, dirs_exist_ok=True)
    (tmp_path / "text").mkdir()
    for number in range(3):
        lines = [f"line {i * i % (17 + number)} of file {number}\n" for i in range(60)]
        (tmp_path / f"text/{number}.txt").write_text("".join(lines))
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)


def losses(run_dir):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [row["train/loss_nats"] for row in map(json.loads, lines)]


def test_an_old_language_model_goes_on(here, monkeypatch, capsys):
    flags = shlex.split(f"{LM_FLAGS} --steps 6 --resume must --run-dir run-lm")
    monkeypatch.setattr(sys, "argv", ["train/lm.py", *flags])
    with pytest.raises(SystemExit) as end:
        lm.main()
    assert end.value.code == 0
    assert "resumed from run-lm/checkpoints/step-3: step 3," in capsys.readouterr().out
    expected = [3.7754459381, 3.4760046005, 3.0852498, 2.9149580002, 3.0401325226, 2.61497116]
    assert losses(here / "run-lm") == pytest.approx(expected, rel=1e-5)  # of another processor
    summary = json.loads((here / "run-lm" / "summary.json").read_text())
    old = json.loads((DATA / "run-lm" / "summary.json").read_text())
    assert set(summary) >= set(old)
    assert summary["val/bpb"] == pytest.approx(3.75512875, rel=1e-5)


def test_an_old_task_goes_on(here):
    flags = shlex.split(f"{COPY_FLAGS} --steps 6 --resume must --run-dir run-copy")
    assert loop.train(*copy_memory.setup(flags)) == 0
    expected = [2.2961094379, 2.2841625214, 2.2662043571, 2.2559483051, 2.2455439568, 2.2194955349]
    assert losses(here / "run-copy") == pytest.approx(expected, rel=1e-5)
    summary = json.loads((here / "run-copy" / "summary.json").read_text())
    old = json.loads((DATA / "run-copy" / "summary.json").read_text())
    assert set(summary) >= set(old)
    assert summary["test/loss_nats"] == pytest.approx(2.2107, abs=1e-4)
    assert summary["diagnostics"]["before"] == old["diagnostics"]["before"]


def test_an_old_run_is_sampled_and_exported_with_the_same_tokens(here, capsys):
    greedy = {"temperature": 0.0, "tokens": 12, "device": "cpu", "backend": "torch"}
    sample.run(sample.SampleConfig("run-lm", **greedy))
    from_run = capsys.readouterr().out
    assert set(from_run) <= set("line 0123456789 of file \n")
    pytest.importorskip("transformers")
    from kru_triton.hf import KRUForCausalLM
    from kru_triton.train import export

    export.export(export.ExportConfig("run-lm", "exported"))
    assert "for 3 steps, 96 tokens: 4.3311 bits per byte" in Path("exported/README.md").read_text()
    assert KRUForCausalLM.from_pretrained("exported").config.vocab_size == 19
    sample.run(sample.SampleConfig("exported", **greedy))
    assert capsys.readouterr().out == from_run
