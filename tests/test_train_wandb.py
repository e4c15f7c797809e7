"""Weights & Biases, as train/lm.py and train/run/wandb_run.py use the real package."""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import wandb

from kru_triton.train.run import wandb_run
from kru_triton.train.run.wandb_run import Wandb

KEY = "0123456789abcdef0123456789abcdef01234567"
TRAIN = Path(wandb_run.__file__).parents[1]


def records(run_dir):
    """Every record of the newest `.wandb` file below a run directory.

    A 7-byte header, then blocks of 32 KiB; a record is in chunks that never cross a block, each
    behind its CRC (4 bytes), length (2) and type (1): whole, first, middle or last.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    path = max(run_dir.glob("wandb/*run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime)
    content, at, parts, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            found.append(Record.FromString(parts))
            parts = b""
    return found


def history(run_dir):
    """The rows that were logged, in order, without W&B's own keys."""
    rows = []
    for record in records(run_dir):
        if record.WhichOneof("record_type") == "history":
            items = {
                item.key or "/".join(item.nested_key): item.value_json
                for item in record.history.item
            }
            rows.append({k: json.loads(v) for k, v in items.items() if not k.startswith("_")})
    return rows


def write_run(run_dir, steps=40):
    run_dir.mkdir()
    rows = [{"step": step, "train/loss_nats": 1 / step} for step in range(1, steps + 1)]
    rows[-1] |= {"val/bpb": 1.25}
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run_dir / "config.json").write_text(json.dumps({"wandb_id": "some-id", "lr": 0.5}))
    (run_dir / "summary.json").write_text(json.dumps({"val/bpb": 1.25, "steps": steps}))
    return rows


def test_replay_makes_the_whole_run_of_metrics_jsonl(tmp_path, monkeypatch, capsys):
    rows = write_run(tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["replay", str(tmp_path / "run"), "--wandb", "offline"])
    with pytest.raises(SystemExit) as end:
        wandb_run.main()
    assert end.value.code == 0
    assert "40 rows" in capsys.readouterr().out
    wandb.teardown()  # older versions close the file after `finish` has returned
    assert history(tmp_path / "run") == rows
    kinds = {record.WhichOneof("record_type"): record for record in records(tmp_path / "run")}
    run = next(r.run for r in records(tmp_path / "run") if r.WhichOneof("record_type") == "run")
    assert run.run_id == "some-id"
    assert {item.key: json.loads(item.value_json) for item in run.config.update}["lr"] == 0.5
    axes = [r.metric for r in records(tmp_path / "run") if r.WhichOneof("record_type") == "metric"]
    assert any(metric.glob_name == "*" and metric.step_metric == "step" for metric in axes)
    assert "summary" in kinds


def test_every_variable_of_wandb_reaches_the_run_and_a_resumed_run_keeps_its_id(tmp_path):
    variables = "PROJECT=p NAME=n RUN_ID=rid TAGS=a,b RUN_GROUP=g NOTES=hi ENTITY=e JOB_TYPE=j"
    variables = dict(f"WANDB_{pair}".split("=") for pair in variables.split())
    variables |= {"WANDB_DIR": str(tmp_path / "elsewhere"), "WANDB_MODE": "dryrun"}
    (tmp_path / "text.txt").write_text("some words to learn from\n" * 400)
    flags = "--preset tiny --d-model 16 --num-layers 1 --hidden-size 16 --num-heads 1 --steps 1"
    command = [sys.executable, str(TRAIN / "lm.py"), *flags.split(), "--segment-length", "16"]
    command += ["--batch-size", "2", "--data", f"text:{tmp_path}/text.txt", "--device", "cpu"]
    command += ["--backend", "torch", "--run-dir", str(tmp_path / "run")]
    plain = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}

    def start(more, environment):
        environment = {**plain, **environment, "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
        done = subprocess.run([*command, *more], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    start([], variables)
    found = records(tmp_path / "elsewhere")
    run = next(r.run for r in found if r.WhichOneof("record_type") == "run")
    names = (run.project, run.display_name, run.run_id, run.run_group, run.notes, run.entity)
    assert names == ("p", "n", "rid", "g", "hi", "e")
    assert (list(run.tags), run.job_type) == (["a", "b"], "j")
    assert not (tmp_path / "run" / "wandb").exists()

    start(["--steps", "2", "--wandb-project", "q", "--wandb-name", "m"], {"WANDB_RUN_ID": "other"})
    run = next(r.run for r in records(tmp_path / "run") if r.WhichOneof("record_type") == "run")
    assert (run.project, run.display_name, run.run_id) == ("q", "m", "rid")


def test_replay_of_no_run_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["replay", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        wandb_run.main()
    assert end.value.code == 2
    assert "is not the directory of a run" in capsys.readouterr().err


def test_a_killed_service_stops_neither_the_run_nor_its_end(tmp_path, capsys):
    wandb = Wandb("offline", tmp_path, "id", {})
    wandb.log({"step": 1})
    deadline = time.monotonic() + 300
    while not (services := service_pids()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    while "wandb: offline" not in capsys.readouterr().out:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for pid in services:
        os.kill(pid, signal.SIGKILL)
    for step in range(2, 300):
        wandb.log({"step": step})
    assert not wandb.finish(30)
    assert "wandb: off (" in capsys.readouterr().out


def service_pids():
    """The processes of W&B that this process has started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            command = (folder / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == os.getpid() and b"wandb-core" in command:
            found.append(int(folder.name))
    return found


CHILD = """
import sys
from pathlib import Path
from kru_triton.train.run.wandb_run import Wandb
wandb = Wandb(sys.argv[1], Path(sys.argv[2]), "id", {"lr": 1.0})
for step in range(100):
    wandb.log({"step": step})
print("logged")
print("finished", wandb.finish(2))
"""


def test_a_server_that_never_answers_costs_seconds_and_the_key_stays_secret(tmp_path):
    """It takes connections, so only W&B itself can notice."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=swallow, args=(server,), daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        environment = {**os.environ, "WANDB_API_KEY": KEY, "WANDB_BASE_URL": url}
        environment |= {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
        environment.pop("WANDB_MODE", None)
        command = [sys.executable, "-c", CHILD, "auto", str(tmp_path)]
        done = subprocess.run(command, env=environment, capture_output=True, timeout=100, text=True)
    assert done.returncode == 0, done.stderr
    assert "logged" in done.stdout
    assert "finished False" in done.stdout
    assert "wandb_run.py" in done.stdout or "wandb: off (" in done.stdout
    assert KEY not in done.stdout + done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(KEY.encode() in path.read_bytes() for path in files)


def swallow(server):
    """Take every connection and say nothing."""
    connections = []
    while True:
        try:
            connections.append(server.accept())
        except OSError:
            return


def test_with_a_key_and_no_host_a_run_is_offline_and_the_key_is_nowhere(tmp_path):
    environment = {**os.environ, "WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    environment |= {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "WANDB_MODE": ""}
    (tmp_path / "text.txt").write_text("some words to learn from\n" * 400)
    flags = "--preset tiny --d-model 16 --num-layers 1 --hidden-size 16 --num-heads 1 --steps 3"
    command = [sys.executable, str(TRAIN / "lm.py"), *flags.split(), "--segment-length", "16"]
    command += ["--batch-size", "2", "--data", f"text:{tmp_path}/text.txt", "--device", "cpu"]
    command += ["--backend", "torch", "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=100, text=True)
    assert done.returncode == 0, done.stderr
    assert "wandb: offline (127.0.0.1 cannot be reached" in done.stdout
    assert [row["step"] for row in history(tmp_path / "run")] == [3]
    assert KEY not in done.stdout + done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 8
    assert not any(KEY.encode() in path.read_bytes() for path in files)
