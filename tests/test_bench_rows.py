"""Rows, races, the performance model and the figures, without measuring anything."""

import gc
import json
import math
import subprocess
import sys
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench import __main__ as front
from bench import harness, plot
from bench.harness import Candidate, Unavailable, slug
from bench.static import model

CPU = torch.device("cpu")
ROW = {
    "bench": "kernels",
    "name": "a",
    "status": "ok",
    "device": "X",
    "torch": "2",
    "python": "3",
    "commit": "c",
    "date": "2026-01-01T00:00:00+00:00",
    "command": "python -m bench",
}


def options(out, *flags):
    return harness.parser("", "test").parse_args(["--out", str(out), *flags])


def results(out, *flags, **more):
    return harness.Results(CPU, options(out, *flags), "test", **more)


def describe(candidate, direction, times):
    return "", {}


def count(values):
    """A function that counts its calls."""

    def function():
        values.append(1)

    return function


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"commit": None}, "'commit' must be a non-empty str"),
        ({"status": "good"}, "status must be one of"),
        ({"status": "skipped"}, "must give its reason"),
        ({"ms_p50": 1.0}, "positive and in order"),
        ({"ms_p20": 2.0, "ms_p50": 1.0, "ms_p80": 3.0}, "positive and in order"),
        ({"ms_p20": 0.0, "ms_p50": 1.0, "ms_p80": 3.0}, "positive and in order"),
        ({"date": "yesterday"}, "Invalid isoformat"),
    ],
)
def test_a_bad_row_is_refused_with_its_place(tmp_path, change, said):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + json.dumps({**ROW, **change}) + "\n")
    with pytest.raises(ValueError, match=said):
        harness.read_rows(path)


def test_a_torn_line_is_refused_with_its_number(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + json.dumps(ROW)[:40])
    with pytest.raises(ValueError, match=r"x\.jsonl:2: not JSON .* was a run cut off here"):
        harness.read_rows(path)


def test_committed_rows_are_valid():
    files = sorted(harness.RESULTS.glob("*.jsonl"))
    assert len(files) >= 10
    for path in files:
        rows = harness.read_rows(path)
        assert rows
        devices = {slug(row["device"]) for row in rows}
        assert {path.stem} in (devices, {row["bench"] for row in rows})
        assert not [row for row in rows if row.get("quick")], "toy rows are no results"


def test_compiled_writes_rows_of_its_targets_or_a_file(tmp_path):
    """In a process of its own: here triton interprets."""
    command = [sys.executable, "-m", "bench", "compiled", "--quick"]
    for flags in (["--out", tmp_path], ["--json", tmp_path / "rows.json"]):
        subprocess.run([*command, *map(str, flags)], cwd=harness.ROOT, check=True)
    (row,) = harness.read_rows(tmp_path / "sm-90.jsonl")
    assert (row["bench"], row["device"], row["quick"]) == ("compiled", "sm_90", True)
    (bare,) = json.loads((tmp_path / "rows.json").read_text())
    same = bare.keys() - {"compile_seconds"}
    assert same > {"variant", "arch", "registers", "spills", "instructions_per_step"}
    assert {key: row[key] for key in same} == {key: bare[key] for key in same}


def test_rows_are_appended_and_not_measured_twice(tmp_path, monkeypatch):
    monkeypatch.setenv("BENCH_COMMIT", "abc")
    calls = []
    candidates = [Candidate("one", lambda: (count(calls), None), directions=("forward",))]
    for _ in range(2):
        harness.race(results(tmp_path), "b", "case", candidates, CPU, describe, rounds=3)
    assert len(calls) == 4  # once to warm up, three rounds
    (row,) = harness.read_rows(results(tmp_path).path)
    assert (row["name"], row["commit"], row["rounds"]) == ("case forward one", "abc", 3)
    harness.race(results(tmp_path, "--again"), "b", "case", candidates, CPU, describe, rounds=3)
    assert len(harness.read_rows(results(tmp_path).path)) == 2
    monkeypatch.setenv("BENCH_COMMIT", "def")
    harness.race(results(tmp_path), "b", "case", candidates, CPU, describe, rounds=3)
    assert len(harness.read_rows(results(tmp_path).path)) == 3


def test_a_candidate_that_cannot_run_is_a_row_with_its_reason(tmp_path):
    def raising(error):
        def prepare():
            raise error

        return prepare

    def late():
        calls = []

        def function():
            calls.append(1)
            if len(calls) > 3:
                raise RuntimeError("in a later round")

        return function, None

    own = results(tmp_path)
    one = ("forward",)
    candidates = [
        Candidate("absent", raising(Unavailable("not installed"))),
        Candidate("broken", raising(TypeError("its API changed"))),
        Candidate("large", raising(torch.OutOfMemoryError("CUDA out of memory"))),
        Candidate("ours", raising(ValueError("a bug")), baseline=False),
        Candidate("late", late, directions=one),
        Candidate("good", lambda: (lambda: None, None), directions=one),
    ]
    harness.race(own, "b", "B2048-T1", candidates, CPU, describe, rounds=4)
    rows = {row["implementation"]: row for row in harness.read_rows(own.path)}
    found = {name: (row["status"], row.get("reason")) for name, row in rows.items()}
    assert found == {
        "absent": ("skipped", "not installed"),
        "broken": ("skipped", "TypeError: its API changed"),
        "large": ("skipped", "out of memory at B2048-T1"),
        "ours": ("failed", "ValueError: a bug"),
        "late": ("skipped", "RuntimeError: in a later round"),
        "good": ("ok", None),
    }
    assert own.finish() == 1


def test_what_does_not_fit_beside_others_is_timed_alone(tmp_path):
    attempts = []

    def prepare():
        attempts.append(1)
        if len(attempts) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return (lambda: None), None

    own = results(tmp_path)
    large = Candidate("large", prepare, directions=("forward",))
    small = Candidate("small", lambda: (lambda: None, None), directions=("forward",))
    harness.race(own, "b", "case", [large, small], CPU, describe, rounds=2)
    rows = {row["implementation"]: row for row in harness.read_rows(own.path)}
    assert rows["large"]["alone"]
    assert not rows["small"]["alone"]


def test_parts_are_timed_apart_and_together(tmp_path):
    own = results(tmp_path)
    seen = []
    both = Candidate("two parts", lambda: (lambda: 7, seen.append))
    harness.race(own, "b", "case", [both], CPU, describe, rounds=2)
    rows = {row["direction"]: row for row in harness.read_rows(own.path)}
    assert rows.keys() == {"forward", "backward", "both"}
    assert seen == [7] * 3
    assert rows["both"]["ms_p50"] >= rows["backward"]["ms_p50"]


def test_a_spent_budget_is_left_for_later(tmp_path):
    own = results(tmp_path, deadline=0.0)
    candidates = [Candidate("one", lambda: (lambda: None, None), directions=("forward",))]
    harness.race(own, "b", "case", candidates, CPU, describe, rounds=1)
    assert own.finish() == 0
    assert own.left == ["case forward one"]
    assert not harness.read_rows(own.path)


def test_a_failed_row_is_not_run_again(tmp_path, monkeypatch):
    """What breaks a device's context would stop every later run at the same place."""
    monkeypatch.setenv("BENCH_COMMIT", "abc")
    calls = []

    def prepare():
        calls.append(1)
        raise ValueError("an illegal access")

    ours = [Candidate("ours", prepare, baseline=False)]
    for flags, expected in (((), 1), ((), 1), (("--again",), 2)):
        harness.race(results(tmp_path, *flags), "b", "case", ours, CPU, describe, rounds=1)
        assert len(calls) == expected


def test_toy_rows_do_not_stand_for_real_ones(tmp_path, monkeypatch):
    monkeypatch.setenv("BENCH_COMMIT", "abc")
    results(tmp_path, "--quick").add("b", "learn", "")
    assert not results(tmp_path).is_done("b", "learn")
    assert results(tmp_path, "--quick").is_done("b", "learn")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_lack_of_memory_is_told_from_other_errors(error):
    assert harness.is_out_of_memory(error)
    # of triton: the setting does not fit, the memory does
    assert not harness.is_out_of_memory(RuntimeError("out of resource: shared memory"))


def test_a_replay_keeps_the_inputs_of_its_graph(monkeypatch):
    """A graph reads them where they were, and holds none of them: freed memory would be read."""
    replays = []
    cuda = SimpleNamespace(
        Stream=lambda: SimpleNamespace(wait_stream=lambda other: None),
        current_stream=lambda: SimpleNamespace(wait_stream=lambda other: None),
        stream=lambda stream: nullcontext(),
        CUDAGraph=lambda: SimpleNamespace(replay=lambda: replays.append(1)),
        graph=lambda graph: nullcontext(),
    )
    monkeypatch.setattr(torch, "cuda", cuda)

    def make():
        x = torch.ones(3)
        return harness.captured(lambda: (x + 1,)), weakref.ref(x)

    replay, x = make()
    gc.collect()
    assert x() is not None
    assert torch.equal(replay()[0], torch.full((3,), 2.0))
    assert len(replays) == 2  # once to check that the result is finite
    del replay
    gc.collect()
    assert x() is None


def test_slugs():
    assert slug("NVIDIA H200") == "nvidia-h200"
    assert slug("Intel(R) Xeon(R) Processor") == "intel-xeon-processor"


def test_without_git_the_commit_is_a_hash_of_the_sources(tmp_path, monkeypatch):
    monkeypatch.delenv("BENCH_COMMIT", raising=False)
    monkeypatch.setattr(harness.device, "ROOT", tmp_path)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "a.py").write_text("x = 1")
    first = harness.commit()
    assert first.startswith("sources-")
    (tmp_path / "kernels" / "a.py").write_text("x = 2")
    assert harness.commit() != first


@pytest.mark.parametrize("name", model.DEVICES)
def test_model_growth(name):
    device = model.DEVICES[name]

    def seconds(B=4096, T=1024, P=16, heads=1):
        return model.forward_backward(P, 16, "bf16", B, T, heads, device).seconds

    base = seconds()
    assert math.isclose(seconds(T=2048) / base, 2)
    assert math.isclose(seconds(B=8192) / base, 2, rel_tol=0.01)
    assert math.isclose(seconds(heads=2) / base, 2, rel_tol=0.01)
    assert 1.2 < seconds(P=32) / base < 4  # twice the units and more work per unit
    few = seconds(B=1)
    assert seconds(B=8) < 1.05 * few  # latency: rows of idle processors cost nothing
    one = model.predict("forward", 16, 16, "bf16", 1, 1024, 1, device)
    many = model.predict("forward", 16, 16, "bf16", 8192, 1024, 1, device)
    assert one.bound == "latency"
    assert many.bound == "memory"
    moved = 2 * 2 * 256 * 2 * 8192 * 1024
    assert math.isclose(many.seconds, moved / device.bandwidth)


def test_model_counts_products_of_tiles():
    tile = model.geometry.Tile.of(32, 32, 2)
    assert model.products(tile, "bf16") == 128
    assert model.products(tile, "fp32") == 384
    assert model.products(model.geometry.Tile.of(16, 32, 2), "bf16") == 48
    assert model.products(model.geometry.Tile.of(8, 8, 2), "bf16") == 16


def test_model_of_unknown_devices_and_its_report(capsys):
    assert model.device_of("AMD EPYC") is None
    assert model.device_of("NVIDIA H200") == model.DEVICES["h200"]
    assert model.main(["--device", "b200"]) == 0
    said = capsys.readouterr().out
    assert "| B=2048 |" in said
    assert "| 64x64 |" in said
    for flags, message in [
        (["--device", "v100"], "h200"),
        (["--set", "foo=1"], "--set: must be NAME=NUMBER, NAME of processors, clock"),
        (["--set", "mma_cycles=x"], "--set: must be NAME=NUMBER"),
    ]:
        with pytest.raises(SystemExit):
            model.main(flags)
        assert message in capsys.readouterr().err


def test_the_model_takes_what_a_device_measured_and_shows_measured_times(tmp_path, capsys):
    shape = {"P": 16, "Q": 16, "dtype": "bf16", "B": 4096, "T": 1024, "heads": 1}
    times = {"ms_p20": 9.0, "ms_p50": 10.0, "ms_p80": 11.0, "direction": "forward"}
    own = {"case": "B4096", "implementation": "kru", **shape, **times}
    rows = [
        {"bench": "ceilings", "constants": {"bandwidth": 1e12}},
        {"bench": "micro", "constants": {"latency l2": 273.4}},
        {"bench": "micro", "device": "NVIDIA H200", "constants": {"bandwidth": 7e12}},
        {"bench": "steps", **own},
        {"bench": "steps", **own, "setting": {"PREFETCH": 4}},
        {"bench": "steps", "implementation": "kru", "status": "failed", "reason": "it was"},
    ]
    rows = [
        {**ROW, "device": "NVIDIA H100 80GB HBM3", "name": str(i), **r} for i, r in enumerate(rows)
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert model.device_of("NVIDIA H100 80GB HBM3", rows).bandwidth == 1e12
    assert model.main(["--device", "h100", "--results", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "measured: bandwidth 1e+12" in said
    assert "python -m bench schedule --arch sm_90 --latency l2=273" in said
    predicted = 1e3 * 2 * 2 * 256 * 2 * 4096 * 1024 / 1e12  # bytes over the measured bandwidth
    line = f"| B4096 | forward | 10.000 | {predicted:.3f} | {10 / predicted:.2f} | memory |"
    assert said.count("| B4096 |") == 1
    assert line in said


def synthetic(path):
    """One row of every kind that a figure draws."""
    times = {"ms_p20": 1.0, "ms_p50": 2.0, "ms_p80": 3.0, "direction": "both"}
    shape = {"dtype": "bf16", "P": 32, "Q": 32, "heads": 1, "T": 1024, "us_per_step": 1.0}
    rows = []

    def add(bench, name, **values):
        rows.append({**ROW, "bench": bench, "name": name, **values})

    for B in (16, 64):
        for ms, name in ((2.0, "kru"), (5.0, "nn.LSTM")):
            values = {**shape, **times, "ms_p50": ms, "ms_p80": ms + 1, "predicted_ms": 1.6}
            case = f"B{B}"
            add("steps", f"{case} {name}", case=case, B=B, implementation=name, **values)
    for seen in (10, 100):
        add("context", f"kru {seen}", implementation="kru", context=seen, **times)
    add("cpu", "scan torch", section="scan", ratio=2.0, **times)
    add("steps", "flashrnn", status="skipped", reason="not installed")
    final = {"data": "stdlib", "preset": "tiny", "params": 108000, "flags": "", "kind": "tokens"}
    final |= {"model": "kru", "optimizer": "adamw", "lr": 1e-2, "steps": 8, "parameters": 108000}
    final["model_config"] = {"num_layers": 3}
    curve = [[1000 * step, 5.0 - step / 10] for step in range(1, 9)]
    read = {"tokens": 8000, "curve": curve}
    add("baselines", "kru", **final, **read, val_bpb=2.0)
    add("baselines", "gru", **{**final, **read, "model": "gru"}, val_bpb=2.1)
    for size in (1000, 2000, 4000):
        values = {"params": size, "parameters": size, "tokens": 20 * size, "val_bpb": size**-0.1}
        add("baselines", f"kru {size}", **{**final, **values})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_every_figure_is_drawn_from_rows_alone(tmp_path):
    pytest.importorskip("matplotlib")
    synthetic(tmp_path / "x.jsonl")
    flags = ["--results", str(tmp_path), "--figures", str(tmp_path / "figures")]
    assert plot.main(flags) == 0
    drawn = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert drawn == {f"x-{name}" for name in plot.FIGURES}
    with pytest.raises(SystemExit):
        plot.main(["--results", str(tmp_path / "nothing")])


def test_curves_of_one_model_alone_are_no_comparison(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "x.jsonl"
    synthetic(path)
    rows = [row for row in harness.read_rows(path) if row.get("model") != "gru"]
    assert any("curve" in row for row in rows)
    assert plot.curves(rows, None) is None


def test_rows_in_other_lanes_are_not_of_the_same_scaling(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    path = tmp_path / "x.jsonl"
    synthetic(path)
    rows = harness.read_rows(path)
    better = {**rows[-1], "name": "in other lanes", "lanes": "64x64", "val_bpb": 0.1}

    def new(panels):
        return pyplot.figure(), [pyplot.axes()]

    _, used = plot.scaling([*rows, better], new)
    assert [row["params"] for row in used] == [4000, 2000, 1000]  # the best one first
    assert better not in used
    pyplot.close("all")


def test_a_power_law_is_found_with_its_error():
    size = np.array([1e5, 2e5, 4e5, 8e5])
    scale, exponent, error, residual = plot.power_law(size, 3 * size**-0.07)
    assert (scale, exponent) == pytest.approx((3, -0.07))
    assert error < 1e-12
    assert residual < 1e-12
    noise = np.array([1, -1, -1, 1])  # no slope and no mean
    _, exponent, error, residual = plot.power_law(size, 3 * size**-0.07 * np.exp(0.01 * noise))
    assert exponent == pytest.approx(-0.07)
    assert residual == pytest.approx(0.01)
    assert error == pytest.approx(0.01 * np.sqrt(4 / 2 / (5 * np.log(2) ** 2)))


def test_the_table_shows_ratios_and_reasons(tmp_path, capsys):
    synthetic(tmp_path / "amd-epyc.jsonl")
    lines, failed = harness.table(tmp_path / "amd-epyc.jsonl")
    assert failed == 0
    assert "| steps B16 nn.LSTM | 5.000 | 2.50 | 3.12 |  |" in lines
    assert "| steps flashrnn | skipped |  |  | not installed |" in lines
    assert lines[-1].endswith("0 failed")
    assert front.main(["--table", "--device", "cpu", "--out", str(tmp_path / "nothing")]) == 1


def test_committed_rows_make_tables():
    for path in harness.RESULTS.glob("*.jsonl"):
        lines, _ = harness.table(path)
        assert len(lines) > 4
    pytest.importorskip("tyro")
    assert front.main(["baselines", "--table"]) == 0


@pytest.mark.parametrize(
    ("lr", "rates", "best", "tried"),
    [
        (1, 2, 8, [1, 2, 4, 8, 16]),  # the best at the upper end of what was tried
        (4, 2, 2, [1, 2, 4, 8]),  # at the lower one
        (1, 3, 2, [1, 2, 4]),
        (1, 1, 8, [1]),
    ],
)
def test_the_best_rate_is_inside_those_tried_but_for_a_single_one(
    lr, rates, best, tried, monkeypatch
):
    baselines = pytest.importorskip("bench.quality.baselines")
    monkeypatch.setattr(
        baselines, "run", lambda *of: {"lr": of[-1], "val_bpb": abs(math.log(of[-1] / best))}
    )
    args = SimpleNamespace(lr=lr, rates=rates)
    rows = baselines.bracket(args, "tokens", "kru", "muon", [], 10)
    assert sorted(row["lr"] for row in rows) == tried


def test_the_picture_of_the_readme_is_that_of_the_committed_rows(tmp_path):
    """By the version of Matplotlib that drew it: others place the same text elsewhere."""
    matplotlib = pytest.importorskip("matplotlib")
    committed = harness.ROOT / "bench" / "figures"
    drawn_by = f"Matplotlib v{matplotlib.__version__},"
    if drawn_by not in (committed / "copy-memory-light.svg").read_text():
        pytest.skip("drawn by another version of Matplotlib")
    assert front.main(["picture", "--figures", str(tmp_path)]) == 0
    for page in ("light", "dark"):
        name = f"copy-memory-{page}.svg"
        drawn = (tmp_path / name).read_text()
        assert drawn == (committed / name).read_text()
        assert "<!-- KRU: 56 recurrent numbers -->" in drawn
