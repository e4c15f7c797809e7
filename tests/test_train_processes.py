"""Runs of several processes, and runs that are killed: real processes of train/lm.py."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kill_harness import TINY, Leg, differences, kill_and_compare, write_corpus, write_stream

from kru_triton.train.run import checkpoints
from kru_triton.train.text.tokenizer import character_tokenizer

SCRIPT = Path(__file__).parents[1] / "train" / "lm.py"
EXACT = [*shlex.split(TINY), "--dropout", "0", "--log-every", "1", "--eval-every", "10"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The folder of eight text files."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def flags(corpus):
    return [*EXACT, "--data", f"text:{corpus}/*.txt", "--steps", "24"]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, flags):
    """A whole run of eight lanes in one process."""
    run_dir = tmp_path_factory.mktemp("runs") / "one"
    leg = Leg([*flags, "--batch-size", 8], run_dir)
    assert leg.wait() == [0], leg.output()
    return run_dir


def metrics(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def assert_same_curve(run_dir, whole):
    """Equal up to the order of float32 sums."""
    rows, expected = metrics(run_dir), metrics(whole)
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, other in zip(rows, expected):
        assert row["tokens"] == other["tokens"]
        for key in ("train/loss_nats", "grad_norm", "val/bpb"):
            assert (key in row) == (key in other)
            if key in row:
                assert row[key] == pytest.approx(other[key], rel=1e-4), (row["step"], key)


# Killed at random moments


@pytest.mark.parametrize(
    ("kills", "processes", "shards", "more"),
    [
        (20, 1, 0, ""),
        (4, 2, 0, ""),
        (4, 1, 1, "--tokenizer bpe:50 --shuffle-buffer 30"),
        (4, 2, 5, "--shuffle-buffer 30"),
        (2, 1, 2, "--workers 2 --tokenizer bpe:50 --shuffle-buffer 30"),
    ],
    ids=["memory", "two", "bpe-1-shard", "two-5-shards", "bpe-2-workers-2-shards"],
)
def test_random_kills_change_no_digit(tmp_path, corpus, kills, processes, shards, more):
    data = ["--data", f"text:{corpus}/*.txt"]
    if shards:
        data = write_stream(corpus, tmp_path, "json", shards)
    settings = [*shlex.split(TINY), *more.split(), *data]
    settings += ["--steps", str(40 + 5 * kills)]
    report = kill_and_compare(tmp_path, settings, kills, processes, seed=kills)
    assert report["kills"] == kills
    assert report["differences"] == []
    # 1: it said that a peer has gone; -SIGTERM: not yet in the loop; 0: it had just finished
    assert set(report["exit_codes_of_survivors"]) <= {1, -signal.SIGTERM, 0}


# Two processes are one run


def test_two_processes_learn_what_one_learns(tmp_path, flags, one_process):
    leg = Leg([*flags, "--batch-size", 4], tmp_path / "two", 2)
    assert leg.wait() == [0, 0], leg.output()
    assert "2 processes, 8 lanes" in leg.output()
    assert leg.output().count("done: val/bpb") == 1
    assert_same_curve(tmp_path / "two", one_process)
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert (summary["processes"], summary["tokens"]) == (2, 24 * 8 * 32)
    names = {path.name for path in checkpoints.folder(tmp_path / "two", 24).iterdir()}
    assert names >= {"rank-0.safetensors", "rank-0.json", "rank-1.safetensors", "rank-1.json"}


def test_slices_of_lanes_add_up_to_the_batch(tmp_path, flags, one_process):
    leg = Leg([*flags, "--batch-size", 8, "--grad-accumulation", 4], tmp_path / "slices")
    assert leg.wait() == [0], leg.output()
    assert_same_curve(tmp_path / "slices", one_process)


def test_a_signal_to_one_stops_all_and_another_number_of_processes_goes_on(
    tmp_path, flags, one_process
):
    run_dir = tmp_path / "run"
    two = Leg([*flags, "--batch-size", 4], run_dir, 2)
    two.wait_for_step(5)
    two.processes[1].terminate()
    assert two.wait() == [0, 0], two.output()
    stopped = int(
        re.search(r"stopped by a signal to another process after step (\d+)", two.output())[1]
    )
    assert checkpoints.list_steps(run_dir)[-1] == stopped < 24

    four = Leg([*flags, "--batch-size", 2, "--grad-accumulation", 2], run_dir, 4)
    four.wait_for_step(stopped + 3)
    four.processes[0].terminate()
    assert four.wait() == [0] * 4, four.output()
    one = Leg([*flags, "--batch-size", 8], run_dir)
    assert one.wait() == [0], one.output()
    assert_same_curve(run_dir, one_process)

    # Others than eight lanes are another run
    refused = Leg([*flags, "--batch-size", 8], run_dir, 2)
    assert refused.wait() == [2, 2]
    assert "lanes: 8 there, 16 now" in refused.output()


def test_streams_refuse_another_number_of_processes(tmp_path, corpus):
    settings = [*EXACT, *write_stream(corpus, tmp_path, "json", 2), "--steps", "3"]
    assert Leg([*settings, "--batch-size", 2], tmp_path / "run", 2).wait() == [0, 0]
    leg = Leg([*settings, "--batch-size", 4], tmp_path / "run")
    assert leg.wait() == [2]
    assert re.search(r"error: .*step-3 cannot be gone on from: ", leg.output())


def test_three_processes_stop_and_go_on_bit_for_bit(tmp_path, flags):
    """Of more than two numbers, float sums depend on the order."""
    settings = [*flags, "--batch-size", 2, "--dropout", 0.1, "--optimizer", "muon"]
    assert Leg(settings, tmp_path / "whole", 3).wait() == [0] * 3
    leg = Leg(settings, tmp_path / "parts", 3)
    leg.wait_for_step(7)
    leg.processes[2].terminate()
    assert leg.wait() == [0] * 3, leg.output()
    assert Leg(settings, tmp_path / "parts", 3).wait() == [0] * 3
    assert differences(tmp_path / "whole", tmp_path / "parts") == []


def test_a_killed_process_ends_torchrun_with_a_message_and_the_run_goes_on(tmp_path, flags):
    run_dir = tmp_path / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc_per_node", "2", SCRIPT, *flags]
    command += ["--batch-size", "4", "--steps", "4000", "--run-dir", run_dir]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(list(map(str, command)), env=environment, **pipes)
    try:
        deadline = time.monotonic() + 300
        while not checkpoints.list_steps(run_dir):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        pids = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ranks = {
            re.search(rb"\0RANK=(\d)", Path(f"/proc/{pid}/environ").read_bytes())[1]: int(pid)
            for pid in pids
        }
        os.kill(ranks[b"1"], signal.SIGKILL)
        out, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode != 0
    assert "error: process 0 ends, because another process of this run has gone" in out
    saved = checkpoints.list_steps(run_dir)[-1]
    leg = Leg([*flags, "--batch-size", 4, "--steps", saved + 5], run_dir, 2)
    assert leg.wait() == [0, 0], leg.output()
    assert f"resumed from {checkpoints.folder(run_dir, saved)}: step {saved}," in leg.output()


# Bad conditions


def test_two_runs_in_one_directory_the_second_is_refused(tmp_path, flags):
    run_dir = tmp_path / "run"
    first = Leg([*flags, "--steps", 4000], run_dir)
    first.wait_for_step(3)
    second = Leg(flags, run_dir)
    assert second.wait() == [2], second.output()
    pid = first.processes[0].pid
    assert f"--run-dir {run_dir} is in use by process {pid} on " in second.output()
    first.kill(0)
    third = Leg([*flags, "--steps", 12], run_dir)  # the lock of a dead process does not block
    assert third.wait() == [0], third.output()


def test_a_directory_that_one_process_cannot_write_ends_all(tmp_path, flags):
    leg = Leg(flags, tmp_path / "run", 2, file_limits={1: 0})
    assert leg.wait() == [2, 2], leg.output()
    message = f"error: process 1: --run-dir {tmp_path / 'run'} cannot be written: File too large"
    assert message in leg.output()
    assert leg.output().count("error: ") == 1


def test_a_disk_that_is_full_for_one_process_costs_the_checkpoints(tmp_path, flags):
    leg = Leg([*flags, "--steps", 12], tmp_path / "run", 2, file_limits={1: 2000})
    assert leg.wait() == [1, 1], leg.output()
    warning = "warning: checkpoint of step 5 not written: File too large; there is none yet"
    assert warning in leg.output()
    assert "done: val/bpb" in leg.output()
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_what_one_process_cannot_encode_stops_both_with_a_checkpoint(tmp_path, corpus):
    stream = write_stream(corpus, tmp_path, "json", 2)
    known = character_tokenizer(path.read_bytes() for path in corpus.glob("*.txt"))
    (tmp_path / "tokenizer").write_text(known.json)
    with open(tmp_path / "1.json", "a") as shard:
        shard.write(json.dumps({"text": "a § of time"}) + "\n")
    settings = [*EXACT, *stream, "--tokenizer", tmp_path / "tokenizer", "--batch-size", 1]
    settings += ["--segment-length", 1024, "--steps", 99, "--checkpoint-every", 0]
    settings += ["--shuffle-buffer", 5]  # the line is read later
    leg = Leg(settings, tmp_path / "run", 2)
    assert leg.wait() == [2, 2], leg.output()
    step = checkpoints.list_steps(tmp_path / "run")[-1]
    assert step > 0
    (error,) = [line for line in leg.output().splitlines() if line.startswith("error: ")]
    assert "no tokens for b'\\xa7\\xc2', as in 'a § of time'" in error
    assert f"stopped after step {step}, the last good checkpoint is" in error


def test_a_non_finite_loss_ends_all(tmp_path, flags):
    leg = Leg([*flags, "--lr", "1e30", "--warmup", 0, "--clip", 0], tmp_path / "run", 2)
    assert leg.wait() == [3, 3], leg.output()
    assert leg.output().count("error: non-finite loss at step ") == 1
