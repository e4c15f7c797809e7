"""Rows, races, the performance model and the figures, without measuring anything."""

import gc
import json
import math
import subprocess
import sys
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from bench import __main__ as front
from bench import harness, plot
from bench.harness import Candidate, Unavailable, slug
from bench.speed import cpu, kernel_baselines, kernel_cases, kernels
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


def results(out, *flags):
    return harness.Results(CPU, options(out, *flags), "test")


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
    assert len(calls) == 5  # twice to warm up, three rounds
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
    assert seen == [7] * 4
    assert rows["both"]["ms_p50"] >= rows["backward"]["ms_p50"]


def test_a_spent_budget_is_said_and_left_for_later(tmp_path, capsys):
    own = results(tmp_path, "--minutes", "1e-9")
    candidates = [Candidate("one", lambda: (lambda: None, None), directions=("forward",))]
    harness.race(own, "b", "case", candidates, CPU, describe)
    assert own.finish() == 0
    assert "left for another run of the same command: 1" in capsys.readouterr().out
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


def test_equal_parameters():
    for kind, layer in (("LSTM", torch.nn.LSTM), ("GRU", torch.nn.GRU), ("RNN", torch.nn.RNN)):
        hidden = kernel_baselines.equal_parameters(kind, 256, 300_000)
        count = sum(p.numel() for p in layer(256, hidden).parameters())
        assert abs(count / 300_000 - 1) < 0.05
    case = kernel_cases.Case("layer", 1, 1, 8, 8, heads=2, D=24)
    kru = kernels.KRU(24, 128, factors=(8, 8), num_heads=2)
    assert kernel_baselines.layer_parameters(case) == sum(p.numel() for p in kru.parameters())


def test_work_counts_bytes_and_operations():
    scan = kernel_cases.Case("scan", 2, 3, 4, 4)
    moved, flops, _ = kernel_cases.work(scan, "kru", "forward")
    assert moved == 2 * 3 * (32 + 32) * 2  # x_proj in, h out, two bytes each
    assert flops == 2 * 3 * (8 * 16 * (4 + 4))  # complex multiply-adds of A X and X Bᵀ
    layer = kernel_cases.Case("layer", 2, 3, 4, 4, D=10)
    moved, flops, _ = kernel_cases.work(layer, "LSTM", "both", hidden=16)
    assert moved == 3 * 2 * 3 * (10 + 16) * 2
    assert flops == 3 * 2 * 3 * 2 * 4 * 16 * (16 + 10)


def test_the_planar_step_is_the_definition():
    case = kernel_cases.Case("scan", 3, 1, 3, 4, heads=2, dtype="fp32")
    x, factors, beta, _, _ = kernel_cases.scan_problem(case, CPU)
    h_0 = torch.randn(3, 2 * 24)
    a, b = factors
    expected, _ = kernel_baselines.kru_scan_reference(x, factors, beta, h_0)
    h = kernel_baselines.planar_step(
        h_0.view(3, 2, 2, 3, 4), x[:, 0].view(3, 2, 2, 3, 4), a, b, beta.view(2, 3, 4)
    )
    assert torch.allclose(h.flatten(1), expected[:, 0], atol=1e-6)


@pytest.mark.parametrize("name", model.DEVICES)
def test_model_growth(name):
    device = model.DEVICES[name]

    def seconds(B=4096, T=1024, P=16, heads=1):
        return model.of_direction("both", P, 16, "bf16", B, T, heads, device).seconds

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
    assert model.products(tile, "forward", "bf16") == 128
    assert model.products(tile, "forward", "fp32") == 384
    assert model.products(model.geometry.Tile.of(16, 32, 2), "forward", "bf16") == 48
    assert model.products(model.geometry.Tile.of(8, 8, 2), "forward", "bf16") == 16


def test_model_of_unknown_devices_and_its_report(capsys):
    assert model.predicted_ms("both", 16, 16, "bf16", 1, 1, 1, "AMD EPYC") is None
    assert model.predicted_ms("both", 16, 16, "bf16", 64, 1024, 1, "NVIDIA H200") > 0
    assert model.main(["--device", "b200", "--gpus", "8"]) == 0
    said = capsys.readouterr().out
    assert "memory-bound from B" in said
    assert "| 64x64 |" in said
    with pytest.raises(SystemExit):
        model.main(["--device", "v100"])
    assert "h200" in capsys.readouterr().err


def test_exponent_of_a_power_law():
    assert math.isclose(cpu.exponent([1, 2, 4, 8], [3, 6, 12, 24]), 1)
    assert math.isclose(cpu.exponent([1, 4, 16], [1, 8, 64]), 1.5)


def synthetic(path):
    """One row of every kind that a figure draws."""
    times = {"ms_p20": 1.0, "ms_p50": 2.0, "ms_p80": 3.0, "direction": "both"}
    shape = {**plot.USUAL, "P": 32, "Q": 32, "heads": 1, "units": 1024, "us_per_step": 1.0}
    model_says = {"predicted_ms": 1.5, "floor_ms": 0.5}
    rows = []

    def add(bench, name, **values):
        rows.append({**ROW, "bench": bench, "name": name, **values})

    for B, T in ((16, 256), (16, 1024), (64, 256), (64, 1024)):
        for ms, name in ((2.0, "kru triton"), (5.0, "nn.LSTM(1024)")):
            values = {**shape, **times, "ms_p50": ms, "ms_p80": ms + 1, **model_says}
            case = f"B{B}-T{T}"
            add("kernels", f"{case} {name}", case=case, B=B, T=T, implementation=name, **values)
    for T in (256, 512):
        values = {**times, "T": T, "tokens_per_s": 1e6 / T}
        add("train_step", f"T{T}", case=f"T{T}", implementation="kru", **values)
    for length in (0, 256, 2048):
        name = f"transformer L{length}" if length else "kru"
        values = {**times, "B": 1, "length": length, "tokens_per_s": 100.0 + length}
        add("decode", name, case="B1", implementation=name, **values)
    for seen in (10, 100):
        add("context", f"kru {seen}", implementation="kru", context=seen, **times)
    for value in (16, 32):
        values = {**times, "ms_p20": 0.5, "ms_p50": value / 16, "value": value}
        add("cpu", f"growth {value}", section="growth", family="length T", **values)
    add("cpu", "exponent", section="exponent", family="length T", exponent=1.0)
    add("cpu", "scan torch", section="scan", ratio=2.0, **times)
    add("kernels", "flashrnn", status="skipped", reason="not installed")
    final = {"data": "stdlib", "preset": "tiny", "params": 108000, "flags": "", "kind": "tokens"}
    final |= {"model": "kru", "optimizer": "adamw", "lr": 1e-2, "steps": 8, "parameters": 108000}
    curve = [[1000 * step, 5.0 - step / 10] for step in range(1, 9)]
    add("baselines", "kru", **final, tokens=8000, val_bpb=2.0, curve=curve)
    add("states", "s3", task="s3", flags="--lr 1e-3 --model kru", last={"8": 1.0, "16": 0.5})
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


def test_the_table_shows_ratios_and_reasons(tmp_path, capsys):
    synthetic(tmp_path / "x.jsonl")
    assert front.table(tmp_path, "X") == 0
    said = capsys.readouterr().out
    assert "| kernels B16-T256 nn.LSTM(1024) | 5.000 | 2.50 | predicted 1.500, floor 0.5" in said
    assert "| kernels flashrnn | skipped | | not installed |" in said
    assert said.rstrip().endswith("0 failed")
    assert front.table(tmp_path, "Y") == 1


def test_model_of_wide_factors_and_of_the_lstm():
    device = model.DEVICES["h200"]

    def of(kernel, P, Q, B, kind="kru"):
        return model.predict(kernel, P, Q, "bf16", B, 1024, 1, device, kind)

    assert model.counts("wide_forward", 256, 16, "bf16", "sm_90").instructions == 4 * 900
    # the factor is read from L2 by every program in every step: 2 planes of 256 x 256 in 2 bytes
    assert of("forward", 256, 16, 512).bound == "L2"
    expected = 512 * 1024 * 2 * 256**2 * 2 / device.l2
    assert math.isclose(of("forward", 256, 16, 512).seconds, expected)
    assert of("weight_grad", 256, 16, 512).bound == "memory"
    # at many rows memory is the limit: gates, state and cell of 2, 2 and 4 bytes
    assert of("forward", 16, 16, 4096, "lstm").bound == "memory"
    expected = 4096 * 1024 * 256 * (4 * 2 + 2 + 4) / device.bandwidth
    assert math.isclose(of("forward", 16, 16, 4096, "lstm").seconds, expected)
    assert of("backward", 32, 32, 16, "lstm").bound == "latency"


def test_a_prediction_stands_beside_our_kernels_alone():
    ceilings = {"copy_bytes_per_s": 1e30, "matmul_flops": 1e30}
    scan = kernel_cases.Case("scan", 64, 1024, 32, 32)
    lstm = kernel_cases.Case("lstm", 64, 1024, 32, 32, D=1024)

    def predicted(case, name, limit=ceilings):
        return kernels.predicted_ms(case, name, "both", "NVIDIA H200", limit)

    assert predicted(scan, "kru triton graph") == predicted(scan, "kru triton") > 0
    assert predicted(lstm, "krulstm triton") > predicted(scan, "kru triton")
    slow = {**ceilings, "matmul_flops": 1e12}  # the projection's three products are then the time
    more = predicted(lstm, "krulstm triton", slow) - predicted(lstm, "krulstm triton")
    assert math.isclose(more, 1e3 * 3 * 2 * 1024 * 4096 * 64 * 1024 / 1e12, rel_tol=1e-6)
    assert predicted(scan, "nn.LSTM(1024)") is None
    assert predicted(scan, "kru torch") is None


def test_work_of_tokens_is_their_eight_bytes():
    tokens = kernel_cases.Case("tokens", 2, 3, 4, 4, D=257)
    moved, flops, _ = kernel_cases.work(tokens, "kru", "forward")
    assert moved == 2 * 3 * (8 + 32 * 2)
    assert flops == 2 * 3 * (8 * 16 * (4 + 4))


def test_the_picture_of_the_readme_is_that_of_the_committed_rows(tmp_path):
    assert front.main(["picture", "--figures", str(tmp_path)]) == 0
    committed = harness.ROOT / "bench" / "figures"
    for page in ("light", "dark"):
        name = f"copy-memory-{page}.svg"
        drawn = (tmp_path / name).read_text()
        assert drawn == (committed / name).read_text()
        assert "<!-- KRU: 56 recurrent numbers -->" in drawn
