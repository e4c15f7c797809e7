"""metrics.jsonl survives crashes and full disks; Weights & Biases may break at any call."""

import json
import os
import sys
import threading
import types

import pytest

from kru_triton.train.run import metrics as record
from kru_triton.train.run import wandb_run
from kru_triton.train.run.metrics import Metrics
from kru_triton.train.run.settings import UserError
from kru_triton.train.run.wandb_run import ReplayConfig, Wandb


def rows_in(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_on_disk_at_once_and_later_ones_are_dropped_on_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, 0)
    for step in (10, 20, 30):
        metrics.write({"step": step, "loss": 1 / step})
        assert rows_in(path)[-1]["step"] == step
    resumed = Metrics(path, 20)
    assert rows_in(path) == [{"step": 10, "loss": 0.1}, {"step": 20, "loss": 0.05}] == resumed.rows
    resumed.write({"step": 30})
    assert [row["step"] for row in rows_in(path)] == [10, 20, 30]


def test_a_line_cut_short_by_a_crash_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    metrics = Metrics(path, 10)
    metrics.write({"step": 2})
    assert rows_in(path) == [{"step": 1}, {"step": 2}]


def test_rows_that_the_disk_refused_are_written_later(tmp_path, monkeypatch, capsys):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, 0)
    metrics.write({"step": 1})

    class FullDisk:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, content):
            self.file.write(content[:4])
            raise OSError(28, os.strerror(28))

    def open_full(path, mode, buffering):
        return FullDisk(os.fdopen(os.open(path, os.O_RDWR), mode, buffering))

    with monkeypatch.context() as patch:
        patch.setattr(record, "open", open_full, raising=False)
        metrics.write({"step": 2})
    assert "No space left" in capsys.readouterr().err
    metrics.write({"step": 3})
    assert rows_in(path) == [{"step": 1}, {"step": 2}, {"step": 3}]


# Weights & Biases


def broken_wandb(failing):
    """A stand-in for the wandb module in which one call raises."""
    calls = []

    def call(name, result=None):
        def inner(*_args, **_kwargs):
            calls.append(name)
            if name == failing:
                raise ConnectionResetError("the service is gone")
            return result

        return inner

    run = types.SimpleNamespace(
        define_metric=call("define_metric"),
        log=call("log"),
        finish=call("finish"),
        summary=types.SimpleNamespace(update=call("update")),
    )
    module = types.ModuleType("wandb")
    module.Settings, module.init, module.Html = call("Settings"), call("init", run), call("Html")
    module.teardown = call("teardown")
    return module, calls


@pytest.mark.parametrize(
    "failing", ["Settings", "init", "define_metric", "log", "Html", "update", "finish", "nothing"]
)
def test_a_failing_call_turns_wandb_off_with_one_line(failing, tmp_path, monkeypatch, capsys):
    module, calls = broken_wandb(failing)
    monkeypatch.setitem(sys.modules, "wandb", module)
    wandb = Wandb("offline", tmp_path, "id", {})
    for step in range(3):
        wandb.log({"step": step}, sample="text")
    wandb.summarize({"val/bpb": 1.0})
    wandb.finish()
    lines = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("wandb: off (")
    ]
    if failing == "nothing":
        assert lines == []
        assert calls.count("log") == 3
        assert calls[-1] == "finish"
    else:
        assert lines == [
            "wandb: off (ConnectionResetError: the service is gone); metrics.jsonl goes on"
        ]
        assert calls[-2:] == [failing, "teardown"]  # nothing else was called after it


def test_a_figure_that_fails_costs_only_the_figures(tmp_path, monkeypatch, capsys):
    module, calls = broken_wandb("nothing")
    monkeypatch.setitem(sys.modules, "wandb", module)
    wandb = Wandb("offline", tmp_path, "id", {})
    for step in range(2):
        wandb.log({"step": step}, draw=lambda: 1 / 0)
    assert wandb.finish()
    assert calls.count("log") == 2
    assert capsys.readouterr().out.count("no figures: division by zero") == 1


def test_no_call_waits_for_wandb(tmp_path, monkeypatch):
    module, calls = broken_wandb("nothing")
    answers, log = threading.Event(), module.init().log
    module.init = lambda **_: types.SimpleNamespace(
        define_metric=lambda *_, **__: answers.wait(), log=log, finish=lambda: None
    )
    monkeypatch.setitem(sys.modules, "wandb", module)
    wandb = Wandb("offline", tmp_path, "id", {})
    for step in range(300):
        wandb.log({"step": step})
    assert calls.count("log") == 0  # W&B has not even begun
    answers.set()
    assert wandb.finish()
    assert calls.count("log") == 300


def test_wandb_missing_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)  # import raises ImportError
    wandb = Wandb("auto", tmp_path, "id", {})
    wandb.log({"step": 1})
    assert not wandb.finish()
    assert "wandb: not installed, off" in capsys.readouterr().out


def stub(monkeypatch):
    """A stand-in for the wandb module; the arguments of its `init` will be in what is returned."""
    module, _ = broken_wandb("nothing")
    seen, init = {}, module.init
    module.init = lambda **arguments: seen.update(arguments) or init()
    module.Settings = lambda **settings: settings
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    return seen


@pytest.mark.parametrize(
    ("variables", "flags", "expected"),
    [
        ({}, {}, {"project": "kru_triton", "name": "run", "mode": "offline", "resume": None}),
        ({"PROJECT": "p", "NAME": "n"}, {}, {"project": "p", "name": "n"}),
        ({"PROJECT": "p", "NAME": "n"}, {"project": "q", "name": "m"}, {"project": "q"}),
        ({"PROJECT": "p", "NAME": "n"}, {"name": "m"}, {"project": "p", "name": "m"}),
        ({"PROJECT": "", "NAME": ""}, {}, {"project": "kru_triton", "name": "run"}),
        ({"MODE": "dryrun"}, {"mode": "auto"}, {"mode": "offline"}),
        ({"MODE": "run"}, {"mode": "auto"}, {"mode": "online", "resume": "allow"}),
        ({"MODE": "run", "RESUME": "must"}, {"mode": "auto"}, {"resume": None}),  # W&B reads it
        ({"MODE": "online"}, {"mode": "offline"}, {"mode": "offline"}),
        ({"DISABLED": "true"}, {"mode": "offline"}, {"mode": "offline"}),  # a flag wins
        ({"DISABLED": "false", "MODE": "offline"}, {"mode": "auto"}, {"mode": "offline"}),
        ({"DIR": "elsewhere"}, {}, {"dir": "elsewhere"}),
    ],
)
def test_flags_win_over_wandbs_variables_and_those_over_ours(
    variables, flags, expected, tmp_path, monkeypatch
):
    seen = stub(monkeypatch)
    for name, value in variables.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    assert Wandb(flags.pop("mode", "offline"), tmp_path / "run", "id", {}, **flags).finish()
    assert seen["id"] == "id"
    assert {name: seen[name] for name in expected} == expected


@pytest.mark.parametrize("value", ["true", "TRUE", "1", "yes", "on"])
def test_wandb_disabled_is_off_and_silent(value, tmp_path, monkeypatch, capsys):
    seen = stub(monkeypatch)
    monkeypatch.setenv("WANDB_DISABLED", value)
    monkeypatch.setenv("WANDB_MODE", "online")
    wandb = Wandb("auto", tmp_path, "id", {})
    wandb.log({"step": 1})
    assert not wandb.finish()
    assert (seen, capsys.readouterr().out) == ({}, "")


def test_what_the_environment_says_is_not_overridden_by_our_settings(tmp_path, monkeypatch, capsys):
    seen = stub(monkeypatch)
    assert Wandb("offline", tmp_path, "id", {}).finish()
    ours = seen["settings"]
    assert set(ours) == {"console", "silent", "init_timeout", "disable_git"}
    assert "files in" in capsys.readouterr().out
    for name in ours:
        monkeypatch.setenv(f"WANDB_{name.upper()}", "true")
    assert Wandb("offline", tmp_path, "id", {}).finish()
    assert seen["settings"] == {}
    assert capsys.readouterr().out == ""  # WANDB_SILENT


def test_the_id_of_the_environment_is_that_of_a_new_run(monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "chosen")
    assert wandb_run.new_run_id() == "chosen"
    for not_one in ("", " ", "a/b", "a:b"):
        monkeypatch.setenv("WANDB_RUN_ID", not_one)
        assert wandb_run.new_run_id().startswith("20")


def test_replay_goes_where_the_run_went_and_says_when_it_is_switched_off(tmp_path, monkeypatch):
    seen = stub(monkeypatch)
    settings = {"wandb_id": "some-id", "wandb_project": "q", "wandb_name": "m"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    for variable in ("PROJECT", "NAME", "RUN_ID"):
        monkeypatch.setenv(f"WANDB_{variable}", "other")
    monkeypatch.setenv("WANDB_RESUME", "must")  # the run is replaced whatever that says
    assert wandb_run.replay(ReplayConfig(str(tmp_path), "offline", wandb_name="mine"))
    assert (seen["project"], seen["name"], seen["id"]) == ("q", "mine", "some-id")
    assert "WANDB_RESUME" not in os.environ
    monkeypatch.setenv("WANDB_DISABLED", "true")
    with pytest.raises(UserError, match="WANDB_DISABLED switches W&B off: give --wandb"):
        wandb_run.replay(ReplayConfig(str(tmp_path)))


def test_auto_is_offline_without_a_key_or_without_the_host(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert wandb_run.why_offline("http://127.0.0.1:9") == "no key"
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login user password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert "127.0.0.1 cannot be reached" in wandb_run.why_offline("http://127.0.0.1:9")
    (tmp_path / ".netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    reason = wandb_run.why_offline("http://127.0.0.1:9")
    assert "127.0.0.1 cannot be reached" in reason
    assert "xxxx" not in reason
    with wandb_run.socket.create_server(("127.0.0.1", 0)) as server:
        assert wandb_run.why_offline(f"http://127.0.0.1:{server.getsockname()[1]}") == ""
