"""Checkpoints: complete or not there, verified, the last ones kept."""

import errno
import json

import pytest
import torch

from kru_triton.train import checkpoints


def save(run_dir, step, keep=3):
    tensors = {"model": {"w": torch.full((100,), float(step))}, "rank-0": {"rng": torch.arange(9)}}
    return checkpoints.save(run_dir, step, tensors, {"step": step}, keep)


def test_what_is_saved_is_loaded(tmp_path):
    strange = {
        "bf16": torch.randn(3).bfloat16(),
        "scalar": torch.tensor(2.5),
        "none": torch.zeros(0),
    }
    strange["view"] = torch.randn(4, 6).t()
    path = checkpoints.save(tmp_path, 7, {"model": strange}, {"step": 7, "list": [1, None]}, keep=1)
    loaded = checkpoints.load(path)
    assert path == tmp_path / "checkpoints" / "step-7"
    assert loaded.trainer == {"format": 1, "step": 7, "list": [1, None]}
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
    with pytest.raises(checkpoints.CorruptError, match="format 99, this version reads 1"):
        checkpoints.load(path)


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


def test_a_killed_write_is_ignored_and_cleaned_up(tmp_path):
    save(tmp_path, 1)
    half = tmp_path / "checkpoints" / ".tmp-step-2"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    assert checkpoints.load_latest(tmp_path)[0].trainer["step"] == 1
    save(tmp_path, 3)
    assert not half.exists()
