"""Checkpoints: complete or not there, verified, the last ones kept."""

import errno
import itertools
import json
import operator
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from kill_harness import context

from kru_triton.train.run import checkpoints
from kru_triton.train.run.processes import Processes
from kru_triton.train.run.settings import UserError


def save(run_dir, step, keep=3):
    tensors = {"model": {"w": torch.full((100,), float(step))}, "rank-0": {"rng": torch.arange(9)}}
    checkpoints.save(run_dir, step, tensors, {"trainer": {"step": step}}, keep)
    return checkpoints.folder(run_dir, step)


def test_what_is_saved_is_loaded(tmp_path):
    strange = {
        "bf16": torch.randn(3).bfloat16(),
        "scalar": torch.tensor(2.5),
        "none": torch.zeros(0),
    }
    strange["view"] = torch.randn(4, 6).t()
    trainer = {"step": 7, "list": [1, None]}
    count = checkpoints.save(tmp_path, 7, {"model": strange}, {"trainer": trainer}, keep=1)
    path = tmp_path / "checkpoints" / "step-7"
    assert count == sum(f.stat().st_size for f in path.iterdir() if f.name != "manifest.json")
    loaded = checkpoints.load(path)
    assert loaded.trainer == {"format": 2, **trainer}
    for name, tensor in strange.items():
        assert torch.equal(loaded.tensors["model"][name], tensor)
        assert loaded.tensors["model"][name].dtype == tensor.dtype


def test_the_last_ones_are_kept_in_order_of_their_steps(tmp_path):
    for step in (8, 9, 10, 11):
        save(tmp_path, step, keep=2)
    assert checkpoints.list_steps(tmp_path) == [10, 11]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-10",
        "step-11",
    ]


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "harm", [flip_a_bit, cut_in_half, lambda path: path.unlink()], ids=["bit", "cut", "gone"]
)
@pytest.mark.parametrize(
    "name", ["model.safetensors", "rank-0.safetensors", "trainer.json", "manifest.json"]
)
def test_a_damaged_checkpoint_is_found_and_the_one_before_is_taken(tmp_path, name, harm):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    harm(newest / name)
    good, corrupt = checkpoints.load_latest(tmp_path)
    assert good.trainer["step"] == 1
    ((path, reason),) = corrupt
    assert path == newest
    assert name in reason or "cannot be read" in reason or "SHA-256" in reason


def test_no_good_checkpoint_is_none(tmp_path):
    assert checkpoints.load_latest(tmp_path) == (None, [])
    cut_in_half(save(tmp_path, 1) / "model.safetensors")
    good, corrupt = checkpoints.load_latest(tmp_path)
    assert good is None
    assert len(corrupt) == 1


@pytest.mark.parametrize(
    "during", ["list_steps", "safetensors.torch.load", "hashlib.file_digest", "compare"]
)
def test_a_run_that_goes_on_may_delete_what_is_read(tmp_path, monkeypatch, during):
    """Between listing and opening, between two files, in the middle of one."""
    for step, read in enumerate((checkpoints.load_latest, checkpoints.latest)):
        run_dir = tmp_path / str(step)
        save(run_dir, 1)
        real, calls = operator.attrgetter(during)(checkpoints), []

        def late(*arguments, real=real, calls=calls, run_dir=run_dir):
            found = real(*arguments)
            if not calls:
                calls.append(1)
                save(run_dir, 2, keep=1)
            return found

        with monkeypatch.context() as patch:
            patch.setattr(f"kru_triton.train.run.checkpoints.{during}", late)
            found, corrupt = read(run_dir)
        assert corrupt == []
        assert (getattr(found, "path", found).name, bool(calls)) in (
            ("step-2", True),
            ("step-1", True),  # its files were open
            ("step-1", False),  # `latest` reads no tensors
        )
        if isinstance(found, checkpoints.Checkpoint):
            assert found.trainer["step"] == found.tensors["model"]["w"][0]


def test_a_dangling_link_is_corrupt_and_not_looked_for_for_ever(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / "step-2").symlink_to(tmp_path / "nowhere")
    good, corrupt = checkpoints.load_latest(tmp_path)
    assert good.trainer["step"] == 1
    assert [path.name for path, _ in corrupt] == ["step-2"]


def test_a_file_of_another_format_is_refused(tmp_path):
    path = save(tmp_path, 1)
    content = json.dumps({"format": 99}).encode()
    (path / "trainer.json").write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["trainer.json"] = {
        "bytes": len(content),
        "sha256": checkpoints.hashlib.sha256(content).hexdigest(),
    }
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="step-1 has format 99, this version reads format 2: go on"):
        checkpoints.load_latest(tmp_path)
    assert path.is_dir()  # neither renamed nor passed over


@pytest.mark.parametrize("good_writes", [0, 1, 2, 3])
def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(tmp_path, monkeypatch, good_writes):
    save(tmp_path, 1, keep=1)
    write, count = checkpoints.write_synced, []

    def fill_up(path, content):
        if len(count) == good_writes:
            write(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        count.append(path)
        write(path, content)

    monkeypatch.setattr(checkpoints, "write_synced", fill_up)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-1"]
    assert checkpoints.load_latest(tmp_path)[0].trainer["step"] == 1


def writer(run_dir, lines, keep=3):
    return checkpoints.Writer(run_dir, keep, Processes(), lines.append, saved_step=None)


def test_a_killed_write_is_ignored_and_cleaned_up(tmp_path):
    save(tmp_path, 1)
    half = tmp_path / "checkpoints" / ".tmp-step-2"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    assert checkpoints.load_latest(tmp_path)[0].trainer["step"] == 1
    writer(tmp_path, [])
    assert not half.exists()


def save_and_die(run_dir, fatal):
    """Write checkpoint 3 and kill this process at call number `fatal` to the file system."""
    count = itertools.count(1)

    def deadly(call):
        def inner(*arguments, **options):
            if next(count) == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return inner

    checkpoints.write_synced = deadly(checkpoints.write_synced)
    checkpoints.sync_folder = deadly(checkpoints.sync_folder)
    checkpoints.shutil.rmtree = deadly(checkpoints.shutil.rmtree)
    Path.rename = deadly(Path.rename)
    Path.mkdir = deadly(Path.mkdir)
    save(run_dir, 3, keep=2)


def test_a_kill_at_any_call_loses_no_checkpoint(tmp_path):
    for fatal in range(1, 20):
        run_dir = tmp_path / str(fatal)
        save(run_dir, 1)
        save(run_dir, 2)
        process = context.Process(target=save_and_die, args=(run_dir, fatal))
        process.start()
        process.join(60)
        newest, corrupt = checkpoints.load_latest(run_dir)
        assert corrupt == []
        assert newest.trainer["step"] in (2, 3)
        checkpoints.remove_unfinished(run_dir)
        steps = checkpoints.list_steps(run_dir)
        assert steps[-2:] in ([1, 2], [2, 3])
        assert all(checkpoints.verify(checkpoints.folder(run_dir, step)) for step in steps)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert fatal > 8  # files, folders, rename, removal of the oldest one
    assert steps == [2, 3]


# In the background


def test_a_background_write_holds_the_tensors_of_its_moment(tmp_path, monkeypatch):
    """The training changes them while they are being written."""
    go_on, real = threading.Event(), checkpoints.save

    def slow(*arguments):
        assert go_on.wait(20)
        return real(*arguments)

    monkeypatch.setattr(checkpoints, "save", slow)
    lines, weight = [], torch.zeros(1000)
    background = writer(tmp_path, lines)
    background.save(5, {"model": {"w": weight}}, {"trainer": {"step": 5}})
    weight += 1
    assert checkpoints.list_steps(tmp_path) == []
    go_on.set()
    background.wait()
    assert background.saved_step == 5
    assert not checkpoints.load_latest(tmp_path)[0].tensors["model"]["w"].any()
    assert re.fullmatch(r"checkpoint step-5: [\d,]+ bytes, \d+\.\d\d s", lines[0])


def test_one_write_at_a_time_and_a_failed_one_is_said(tmp_path, monkeypatch):
    running, most, real = [], [], checkpoints.save

    def watched(run_dir, step, *arguments):
        running.append(step)
        most.append(len(running))
        time.sleep(0.05)
        try:
            if step == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(run_dir, step, *arguments)
        finally:
            running.remove(step)

    monkeypatch.setattr(checkpoints, "save", watched)
    lines = []
    background = writer(tmp_path, lines)
    for step in (1, 2, 3):
        background.save(step, {"model": {"w": torch.ones(3)}}, {"trainer": {"step": step}})
    background.wait()
    assert most == [1, 1, 1]
    assert checkpoints.list_steps(tmp_path) == [1, 3]
    assert lines[1] == (
        "warning: checkpoint of step 2 not written: No space left on device; step-1 stays"
    )


def test_a_write_that_breaks_in_another_way_is_raised_where_the_run_waits(tmp_path):
    background = writer(tmp_path, [])
    background.save(1, {"model": {}}, {"trainer": {"not JSON": object()}})
    with pytest.raises(TypeError, match="not JSON serializable"):
        background.wait()
    assert background.saved_step is None


# The command


def list_checkpoints(run_dir):
    script = Path(checkpoints.__file__)
    return subprocess.run([sys.executable, script, run_dir], capture_output=True, text=True)


def test_the_command_lists_and_verifies(tmp_path):
    nothing = list_checkpoints(tmp_path)
    assert (nothing.returncode, nothing.stdout) == (2, "")
    assert nothing.stderr.startswith("error: no checkpoint under ")
    save(tmp_path, 1)
    flip_a_bit(save(tmp_path, 2) / "model.safetensors")
    listed = list_checkpoints(tmp_path)
    assert listed.returncode == 1
    good, corrupt = listed.stdout.splitlines()
    assert re.fullmatch(r"step-1: good, 3 files, [\d,]+ bytes", good)
    assert corrupt == "step-2: CORRUPT: model.safetensors has another SHA-256 than was written"
    checkpoints.remove(tmp_path / "checkpoints" / "step-2")
    assert list_checkpoints(tmp_path).returncode == 0
