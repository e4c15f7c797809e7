"""All of `make gpu` on the CPU, at toy sizes, and what it does where something is missing.

What is broken for a trivial reason is found here, not on the day when there is a GPU.
"""

import json
import os
import re
import resource
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import harness
from bench.gpu import launches, models, run
from kru_triton.kernels import why_not

pytest.importorskip("triton")

from bench.gpu import correct, micro, steps

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def options(out, *flags):
    return harness.parser("", "test").parse_args(["--quick", "--out", str(out), *flags])


def results(out, **more):
    return harness.Results(CPU, options(out), "test", **more)


def rows_in(folder):
    """All rows of a folder's one file."""
    (path,) = folder.glob("*.jsonl")
    return harness.read_rows(path)


def make_gpu(out, *flags, **environment):
    command = ["make", "--no-print-directory", "gpu", "DEVICE=cpu", f"PYTHON={sys.executable}"]
    left_out = ("TRITON_INTERPRET", "MAKEFLAGS")  # the latter holds the ARGS of `make test`
    inherited = {k: v for k, v in os.environ.items() if k not in left_out}
    return subprocess.run(
        [*command, f"OUT={out}", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        env={**inherited, **environment},
    )


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """Every part: what it prints, and its rows by benchmark and name."""
    out = tmp_path_factory.mktemp("gpu")
    done = make_gpu(out, "QUICK=--quick", BENCH_COMMIT="abc")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = rows_in(out)
    assert not [row for row in rows if row["status"] == "failed"]
    return SimpleNamespace(
        out=out, said=done.stdout, rows={(r["bench"], r["name"]): r for r in rows}
    )


def of(rehearsal, bench):
    return {name: row for (own, name), row in rehearsal.rows.items() if own == bench}


def test_a_rehearsal_runs_every_part_and_ends_with_a_table(rehearsal):
    names = [f"part {letter} {part.name}" for letter, part in run.PARTS.items()]
    assert list(of(rehearsal, "gpu")) == names
    assert {part.name for part in run.PARTS.values()} < {bench for bench, _ in rehearsal.rows}
    assert {row["commit"] for row in rehearsal.rows.values()} == {"abc"}
    table = (rehearsal.out / "gpu-table.txt").read_text()
    assert rehearsal.said.rstrip().endswith(table.rstrip())
    assert table.rstrip().endswith(", 0 failed")
    assert all(f"| {bench} {name} |" in table for bench, name in rehearsal.rows)


def test_what_a_rehearsal_leaves_can_be_brought_back(rehearsal):
    """At most 8 files of 16 MiB, in folders at most 2 deep, in plain letters."""
    files = [path for path in rehearsal.out.rglob("*") if path.is_file()]
    assert 2 <= len(files) <= 8
    for path in files:
        relative = path.relative_to(rehearsal.out)
        assert len(relative.parents) <= 3
        assert re.fullmatch(r"[\w./-]+", str(relative), re.ASCII)
        assert path.stat().st_size < 2**24


def test_correctness_rows_have_errors(rehearsal):
    rows = of(rehearsal, "correct")
    checked = [row["errors"] for row in rows.values() if "errors" in row]
    assert checked
    assert all(0 < error < 1e-2 for errors in checked for error in errors.values())
    for tool in ("compute-sanitizer memcheck", "compute-sanitizer racecheck", "ncu"):
        assert rows[tool]["reason"] == f"{tool.split()[0]} is not installed"


def test_every_measurement_of_the_device_runs(rehearsal):
    rows = of(rehearsal, "micro")
    assert rows.keys() == micro.measurements(micro.micro_of(CPU)).keys()
    assert not any(row["constants"] for row in rows.values())  # without a clock
    assert of(rehearsal, "ceilings")["ceilings"]["constants"]["bandwidth"] > 0


def test_steps_are_ours_checked_and_others(rehearsal):
    rows = of(rehearsal, "steps").values()
    ours = [row for row in rows if row.get("implementation") == "kru" and "setting" not in row]
    assert [row["direction"] for row in ours] == list(launches.KERNELS)
    for row in ours:
        assert row["errors"].keys() == {"h", "dx", "dA", "dB", "dbeta"}
        assert all(1e-8 < error < 1e-4 for error in row["errors"].values())
        assert row["us_per_step"] * row["T"] == pytest.approx(1e3 * row["ms_p50"])
    others = {row["implementation"] for row in rows if row["status"] == "ok"}
    assert {"nn.LSTM", "nn.GRU", "loop", "torch backend"} < others
    settings = [row["setting"] for row in rows if "setting" in row]
    assert settings[0] == {}
    assert len(settings) > 1
    skipped = {row["implementation"]: row["reason"] for row in rows if row["status"] == "skipped"}
    assert "is not installed" in skipped["flashrnn cuda_fused"]


def test_models_of_every_kind_train_and_decode(rehearsal):
    rows = [row for row in of(rehearsal, "models").values() if row["status"] == "ok"]
    for direction in ("both", "token"):
        kinds = {row["implementation"] for row in rows if row["direction"] == direction}
        assert kinds == set(models.KINDS)
    assert all(row["mfu"] > 0 for row in rows if row["direction"] == "both")


def test_a_model_learns(rehearsal):
    (row,) = of(rehearsal, "learn").values()
    assert row["bpb"] < 0.9 * row["bpb_before"]
    assert len(row["curve"]) == row["steps"] == 60
    assert row["curve"][-1][1] < row["curve"][0][1]


def test_baselines_have_as_many_parameters_in_sizes_that_tensor_cores_like():
    for size, base in models.SIZES.items():
        with torch.device("meta"):
            counts = {
                kind: models.LanguageModel(models.config_of(kind, base, 1024)).num_parameters
                for kind in models.KINDS
            }
        assert counts["kru"] == pytest.approx(float(size[:-1]) * 1e6, rel=0.15)
        for kind, count in counts.items():
            assert count == pytest.approx(counts["kru"], rel=0.1), kind
            config = models.config_of(kind, base, 1024)
            assert config.d_model % 16 == 0
            assert (config.d_model // config.num_heads if kind == "transformer" else
                    config.hidden_size) % 64 == 0  # fmt: skip


# Time


def test_boxes_share_the_budget_and_what_others_leave():
    letters = list(run.PARTS)
    found = run.boxes(540, letters, {})
    assert sum(found.values()) == pytest.approx(540)
    assert found["d"] / found["c"] == pytest.approx(145 / 60)
    assert run.boxes(400, letters[3:], {"e": 10})["e"] == 10
    assert sum(run.boxes(400, letters[3:], {"e": 10}).values()) == pytest.approx(400)
    assert run.boxes(-3, ["f"], {}) == {"f": 0}


def test_a_part_that_does_not_end_is_ended_and_the_next_one_runs(tmp_path):
    """Each of them, in turn: none has so much as begun in a second."""
    flags = [f"{letter}=0.5" for letter in run.PARTS]
    done = make_gpu(tmp_path, "QUICK=--quick", f"ARGS=--box {' '.join(flags)}")
    assert not done.returncode, done.stderr[-2000:]
    rows = rows_in(tmp_path)
    assert [row["name"].split()[1] for row in rows] == list(run.PARTS)
    assert all("ended after its box of 0 s" in row["reason"] for row in rows)
    assert "ended after its box" in (tmp_path / "gpu-table.txt").read_text()


@pytest.mark.parametrize("letter", [letter for letter in run.PARTS if letter != "a"])
def test_a_part_that_is_out_of_time_says_what_it_left(letter, tmp_path):
    part = run.PARTS[letter]
    own = options(tmp_path)
    own.until = time.monotonic() - 1
    assert run.work(part, CPU, own) == 0
    left = [row for row in rows_in(tmp_path) if row["name"] == f"{part.name} left"]
    assert left[0]["reason"].startswith("out of time: ")
    measured = [r for r in rows_in(tmp_path) if r["status"] == "ok" and r["bench"] == part.name]
    assert not measured


def test_a_part_ends_with_all_that_it_started(tmp_path):
    child = "import time; print('here', flush=True); time.sleep(60)"
    code = (
        f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}]);"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid)); p.wait()"
    )
    ended = run.run_part([sys.executable, "-c", code], 3, dict(os.environ))
    assert ended == ("skipped", "ended after its box of 3 s")
    pid = int((tmp_path / "pid").read_text())
    for _ in range(50):
        if not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text():
            break
        time.sleep(0.1)
    else:
        raise AssertionError("what a part had started runs on")


def test_a_crash_is_told_from_failed_rows():
    def ended(code):
        return run.run_part([sys.executable, "-c", code], 60, dict(os.environ))

    assert ended("raise SystemExit(1)") == ("ok", "")
    assert ended("raise SystemExit(7)") == ("failed", "ended with code 7")
    kill = f"import os; os.kill(os.getpid(), {int(signal.SIGSEGV)})"
    assert ended(kill) == ("failed", "ended by SIGSEGV")


# What may be missing


def test_without_a_gpu_each_part_says_so(capsys):
    assert run.main(["--device", "cpu"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(run.PARTS)
    assert all("needs a GPU" in line for line in lines)


@pytest.mark.parametrize("version", [None, (3, 5)])
def test_without_a_triton_that_does_parts_say_so_and_a_model_still_learns(
    version, tmp_path, monkeypatch
):
    monkeypatch.setattr(why_not, "triton_version", lambda: version)
    own = options(tmp_path)
    own.until = time.monotonic() + 600
    for letter in "abcdf":
        assert run.work(run.PARTS[letter], CPU, own) == 0
    rows = rows_in(tmp_path)
    words = "triton 3.5 is older than 3.6" if version else "triton is not installed"
    assert [row["reason"].startswith(words) for row in rows[:4]] == [True] * 4
    assert rows[4]["bench"] == "learn"
    assert len(rows) == 5
    assert rows[4]["backend"].startswith(f"kru_scan: torch backend, because {words}")


def test_a_device_that_another_process_fills_is_a_row(tmp_path, monkeypatch):
    def full(results, device):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(micro, "run", full)
    own = options(tmp_path)
    own.until = time.monotonic() + 60
    assert run.work(run.PARTS["c"], CPU, own) == 0
    (row,) = rows_in(tmp_path)
    assert row["status"] == "skipped"
    assert "out of memory. Tried to allocate" in row["reason"]


def test_memory_that_another_process_holds_is_said(tmp_path, monkeypatch):
    def no_launches(results, device):
        results.add("micro", "ran", "")

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * 2**30, 80 * 2**30))
    monkeypatch.setattr(harness.device, "device_name", lambda device: "GPU")
    monkeypatch.setattr(run, "why_no_kernels", lambda device: None)
    monkeypatch.setattr(micro, "run", no_launches)
    own = options(tmp_path)
    own.until = time.monotonic() + 60
    run.work(run.PARTS["c"], torch.device("cuda"), own)
    rows = rows_in(tmp_path)
    assert rows[0]["reason"] == "only 2.0 of 80.0 GiB of memory are free"
    assert rows[1]["name"] == "ran"


def test_without_room_on_the_disk_rows_are_seen_and_those_before_stay(tmp_path, capsys):
    """A limit of the size of files stands for the disk: what is written is cut in the same way."""
    own = results(tmp_path)
    own.add("micro", "first", "1 cycle")
    size = own.path.stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, hard))
    try:
        own.add("micro", "second", "2 cycles")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    own.add("micro", "third", "3 cycles")
    assert own.finish() == 1
    said = capsys.readouterr().out
    assert re.search(r"second +2 cycles  NOT WRITTEN: ", said)
    assert [row["name"] for row in rows_in(tmp_path)] == ["first", "third"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--part", "g"], "no part 'g'; there are a (compile), b (correct)"),
        (["--box", "z=3"], "no part 'z'"),
        (["--budget", "0"], "--budget: must be a number of seconds above 0, got 0"),
        (["--device", "cuda:99"], "device: 'cuda:99' is not here; there are auto, cpu"),
    ],
)
def test_bad_flags_name_what_there_is(flags, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        run.main(flags)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_parts_are_chosen_by_letter_or_name_and_run_in_their_order():
    assert run.by_letter(["steps", "b", "d"], None) == ["b", "d"]


def test_a_wrong_result_is_never_timed(tmp_path, monkeypatch):
    forward = launches.Problem.forward
    monkeypatch.setattr(launches.Problem, "forward", lambda self: 1.0105 * forward(self))
    own = results(tmp_path)
    steps.race(own, steps.QUICK, steps.ours(steps.Shared(steps.QUICK, CPU)), CPU, 1)
    for row in rows_in(tmp_path):
        assert row["status"] == "failed"
        assert re.search(r"h is wrong: relative error 1\.0\de-02", row["reason"])
    assert own.finish() == 1


def test_the_tests_that_come_first_are_there():
    names = [*correct.chosen(), *correct.LONG]
    assert len(names) > 40
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1000:]


@pytest.mark.parametrize("precision", launches.DTYPES)
def test_every_precision_is_checked(precision):
    errors = launches.checked(launches.Problem.of(3, 4, 8, 8, 2, precision, CPU))
    low, high = (1e-8, 1e-4) if precision == "fp32" else (1e-4, 2e-2)
    assert all(low < error < high for error in errors.values())


def test_every_case_has_a_prediction():
    device = steps.model.DEVICES["h100"]
    found = [
        steps.model.predict(kernel, c.P, c.Q, c.dtype, c.B, c.T, c.heads, device)
        for c in steps.cases(False)
        for kernel in launches.KERNELS
        if c.dtype != "bf16x2"
    ]
    assert len(found) == 6 * 4 * 2 * 3
    assert all(prediction.seconds > 0 for prediction in found)


# The tools of CUDA


def fake_tool(folder, name, says, code=0):
    path = folder / name
    path.write_text(f"#!/bin/sh\ncat <<'EOF'\n{says}\nEOF\nexit {int(code)}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)


SANITIZED = {
    "clean": ("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors", "ok", ""),
    "races": (
        "========= COMPUTE-SANITIZER\n========= Error: Race reported between Write and Read access"
        "\n========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)",
        "failed",
        "Race reported between",
    ),
    "refused": (
        "========= Error: Device not supported\n========= ERROR SUMMARY: 0 errors",
        "skipped",
        "ended with code 1: Error: Device not supported",
    ),
    "silent": ("", "skipped", "ended with code 0"),
}


@pytest.mark.parametrize("case", SANITIZED)
def test_what_the_sanitizer_says(case, tmp_path, monkeypatch):
    says, status, words = SANITIZED[case]
    fake_tool(tmp_path, "compute-sanitizer", says, code=case == "refused")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    correct.sanitize(results(tmp_path), "racecheck", CPU)
    (row,) = rows_in(tmp_path)
    assert row["status"] == status
    assert words in row.get("reason", "")


STALLED = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
PROFILE = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","sm__cycles_active.max","smsp__inst_executed.sum",{columns}
"","","","cycle","inst","inst","inst"
"0","7","scan_forward_kernel","161,280","78,848","0.12","1.00"
"1","7","scan_backward_kernel","209,920","147,968","0.40","1.00"
"2","7","scan_forward_kernel","n/a","n/a","n/a","n/a"
==PROF== Disconnected"""


def test_what_the_profiler_says(tmp_path, monkeypatch):
    columns = ",".join(f'"{STALLED.format(name)}"' for name in ("long_scoreboard", "selected"))
    fake_tool(tmp_path, "ncu", PROFILE.format(columns=columns))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    correct.profile(results(tmp_path), CPU)
    forward, backward, none = rows_in(tmp_path)
    assert none["status"] == "skipped"
    assert forward["name"] == "ncu forward-16x16-bf16"
    assert (forward["cycles"], forward["instructions"]) == (315, 154)
    assert forward["stalls"] == {"long_scoreboard": 0.12, "selected": 1.0}
    budget = json.loads((ROOT / "bench/static/compiled_budget.json").read_text())["sm_90"]
    assert backward["simulated_cycles"] == budget["backward-16x16-bf16"]["step_cycles"]
    assert "410 cycles a step" in backward["said"]


def test_a_profiler_that_refuses_is_a_row(tmp_path, monkeypatch):
    fake_tool(tmp_path, "ncu", "==ERROR== Failed to initialize the profiler: LibraryNotLoaded", 1)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    correct.profile(results(tmp_path), CPU)
    (row,) = rows_in(tmp_path)
    assert (row["status"], row["name"]) == ("skipped", "ncu")
    assert "LibraryNotLoaded" in row["reason"]


# Kernels that count cycles, compiled for a device


COMPILE = """
import json
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bench.gpu import micro
from bench.static import compiled

TYPES = {"p_said": "*i32", "steps": "i32", "stride": "i32", "a": "fp32", "b": "fp32"}

def loop(kernel, memory, **constants):
    signature, values = {}, {}
    for name in kernel.arg_names:
        signature[name] = TYPES.get(name, memory if name.startswith("p_") else "constexpr")
        if signature[name] == "constexpr":
            values[name] = constants[name]
    source = ASTSource(kernel, signature, constexprs=values)
    made = triton.compile(source, GPUTarget("cuda", 90, 32), options={"num_warps": 1})
    sass = compiled.disassemble(made.asm["cubin"])[0]
    opcodes, (where, *_) = compiled.nvidia_loops(sass)
    return [o.split(".")[0] for o in opcodes[where]], sass.count("SR_CLOCKLO")

print(json.dumps({
    "chain": loop(micro.mma, "*fp32", CHAINS=1, ON=True),
    "chains": loop(micro.mma, "*fp32", CHAINS=4, ON=True),
    "special": loop(micro.special, "*fp32", SIZE=32, ON=True),
    "load": loop(micro.load, "*i32", AHEAD=micro.AHEAD, ON=True),
    "code": loop(micro.code, "*fp32", SIZE=16, ON=True),
}))
"""


def test_the_compiler_leaves_in_the_loops_what_is_measured():
    """For sm_90, by what stands in the machine code between two readings of the clock."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert not done.returncode, done.stderr[-2000:]
    loops = json.loads(done.stdout.splitlines()[-1])
    assert {clocks for _, clocks in loops.values()} == {2}
    opcodes = {name: loop for name, (loop, _) in loops.items()}
    for name in ("chain", "chains"):
        assert opcodes[name].count("HMMA") % 8 == 0 < opcodes[name].count("HMMA")
        assert {"LDS", "LDSM", "BAR", "STS"}.isdisjoint(opcodes[name])
    assert opcodes["special"].count("MUFU") % 8 == 0 < opcodes["special"].count("MUFU")
    assert opcodes["load"].count("LDG") == opcodes["load"].count("CCTL") > 0
    assert opcodes["code"].count("FFMA") == 64
    for loop in opcodes.values():  # little else
        assert len(loop) < 80
