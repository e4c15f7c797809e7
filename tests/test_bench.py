"""Every benchmark runs from end to end on toy sizes and writes rows that can be read.

So does all of `make gpu`, on the CPU: what is broken for a trivial reason is found here, not on the
day when there is a GPU.
"""

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import __main__ as front
from bench import harness
from bench.quality import learn
from bench.speed import cpu, decode, kernels, train_step, tune
from bench.speed.kernel_cases import Case

ROOT = Path(__file__).parents[1]
SECTIONS = {"scan", "memory", "layer", "growth", "exponent", "linear"}


def rows_in(folder):
    """All rows of a folder's one file."""
    (path,) = folder.glob("*.jsonl")
    return harness.read_rows(path)


def test_cpu_quick(tmp_path, capsys):
    assert cpu.main(["--quick", "--threads", "1", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    rows = rows_in(tmp_path)
    assert {row["section"] for row in rows} == SECTIONS
    for row in rows:
        assert {"device", "torch", "threads", "commit", "date", "command"} <= row.keys()
        assert row["threads"] == 1
        assert "--quick" in row["command"]
        assert row["name"] in said
    assert {"loop", "torch"} <= {
        row["implementation"] for row in rows if row["section"] == "memory"
    }
    assert len({row["family"] for row in rows if row["section"] == "exponent"}) == 4
    checked = [r["max_relative_error"] for r in rows if r.get("max_relative_error") is not None]
    assert checked
    assert all(0 < error < 1e-4 for error in checked)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Rows of the benchmarks of `make gpu`, parts 2, 4 and 5, on the CPU."""
    folder = tmp_path_factory.mktemp("quick")
    with pytest.MonkeyPatch.context() as patch:
        # the torch backend alone; triton itself must keep the mode in which it was imported
        patch.setattr(kernels.why_not, "interpreted", lambda: False)
        for module in (kernels, train_step, decode):
            assert module.main(["--device", "cpu", "--quick", "--out", str(folder)]) == 0
    return rows_in(folder)


def test_benchmarks_measure_ours_and_the_baselines(quick):
    assert not [row for row in quick if row["status"] == "failed"]
    measured = {(row["bench"], row.get("implementation")) for row in quick if row["status"] == "ok"}
    for bench, *ours in (
        ("kernels", "kru torch", "krulstm torch", "kru torch gathered"),
        ("kernels", "kru torch recompute=64", "krulstm torch recompute=64"),
        ("train_step", "kru", "kru recompute", "krulstm"),
        ("decode", "kru", "krulstm"),
    ):
        assert {(bench, name) for name in ours} <= measured
    for baseline in ("nn.LSTM(16)", "nn.GRU at equal parameters", "nn.RNNCell", "loop eager"):
        assert ("kernels", baseline) in measured
    assert {("train_step", "transformer"), ("decode", "transformer L32")} <= measured
    operations = {row["op"] for row in quick if row["bench"] == "kernels" and "op" in row}
    assert operations == {"scan", "tokens", "layer", "lstm", "step"}


def test_rows_carry_rates_and_floors(quick):
    timed = [row for row in quick if row["bench"] == "kernels" and row["status"] == "ok"]
    assert timed
    for row in timed:
        assert 0 < row["floor_ms"] < row["ms_p50"]
        assert "B T" in row["floor_formula"]
        assert row["checked"] in ("float64", "finite", "definition")
        if row["implementation"] == "kru torch":
            assert row["checked"] == "float64"
            assert all(0 < error < 1e-3 for error in row["errors"].values())
        assert math.isclose(row["us_per_step"] * row["T"], 1e3 * row["ms_p50"])
        assert math.isclose(row["tokens_per_s"] * row["ms_p50"], 1e3 * row["B"] * row["T"])
    cached = {row["length"]: row["state_bytes"] for row in quick if row["bench"] == "decode"
              and "transformer" in row["implementation"]}  # fmt: skip
    assert cached[32] * 5 == cached[4] * 33  # the cache, and the token's own position


def test_baselines_that_are_not_there_are_rows(quick):
    reasons = {row["implementation"]: row["reason"] for row in quick if row["status"] == "skipped"}
    baselines = {
        "flashrnn": "flashrnn cuda_fused",
        "xma": "xma gru",
        "fla": "fla gla",
        "torchrl": "torchrl lstm",
        "mamba_ssm": "mamba2",
    }
    for module, baseline in baselines.items():
        if importlib.util.find_spec(module) is None:
            assert "is not installed" in reasons[baseline]


def test_make_gpu_on_the_cpu(tmp_path):
    """The parts that take no time here; the table is last, whatever a part's end."""
    command = ["make", "--no-print-directory", "gpu", "PART=3 6", "DEVICE=cpu"]
    command += ["QUICK=--quick", "LEARN=1"]
    command += [f"OUT={tmp_path}", f"PYTHON={sys.executable}"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=environment
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    rows = rows_in(tmp_path)
    experiments = {row["name"]: row for row in rows if row["bench"] == "tune"}
    assert experiments.keys() == tune.EXPERIMENTS.keys()
    assert all("needs a GPU" in row["reason"] for row in experiments.values())
    learnt = {row["implementation"]: row for row in rows if "train_bpb_last" in row}
    assert {"kru", "lstm", "transformer"} <= learnt.keys()
    assert all(row["train_bpb_last"] < 0.9 * row["train_bpb_first"] for row in learnt.values())
    assert "WHEELS=FOLDER" in result.stdout
    assert result.stdout.rstrip().splitlines()[-1].endswith("0 failed")


def run_case(case, found, folder, monkeypatch):
    """Rows of a case with these candidates alone."""
    options = harness.parser("", "test").parse_args(["--quick", "--out", str(folder)])
    results = harness.Results(torch.device("cpu"), options, "test")
    monkeypatch.setattr(kernels, "candidates", lambda case, device: found)
    ceilings = {"copy_bytes_per_s": 1e10, "matmul_flops": 1e11}
    kernels.run_case(results, case, torch.device("cpu"), ceilings)
    return harness.read_rows(results.path), results.finish()


def test_our_kernels_through_the_interpreter(tmp_path, monkeypatch):
    """The checked case, and what the rows say of it."""
    case = Case("scan", 3, 4, 4, 4, dtype="fp32", baselines="none")
    ours = kernels.ours_scan(case, torch.device("cpu"), "triton")
    rows, _ = run_case(case, ours, tmp_path, monkeypatch)
    assert [row["direction"] for row in rows] == ["forward", "backward", "both"]
    for row in rows:
        assert row["implementation"] == "kru triton (interpreted)"
        assert row["errors"].keys() == {"h", "dx", "dA", "dB", "dbeta"}
        assert all(1e-8 < error < 1e-4 for error in row["errors"].values())
        assert row["bytes"] == {"forward": 2, "backward": 4, "both": 6}[row["direction"]] * 1536


def test_a_wrong_result_is_never_timed(tmp_path, monkeypatch):
    case = Case("scan", 3, 4, 4, 4, dtype="fp32", baselines="none")
    scan = kernels.kru_scan

    def wrong(x, *rest, backend="auto", **options):
        h, h_n = scan(x, *rest, backend=backend, **options)
        return (h * 1.001 if x.dtype == torch.float32 else h), h_n

    monkeypatch.setattr(kernels, "kru_scan", wrong)
    ours = kernels.ours_scan(case, torch.device("cpu"), "torch")
    (row,), code = run_case(case, ours, tmp_path, monkeypatch)
    assert row["status"] == "failed"
    assert "h is wrong: relative error 1.00e-03" in row["reason"]
    assert code == 1


def test_experiments_through_the_interpreter(tmp_path):
    names = ["mma", "tf32", "accuracy", "shared", "fused"]
    flags = ["--device", "cpu", "--quick", "--out", str(tmp_path), "--case", *names]
    assert tune.main(flags) == 0
    rows = {row["name"]: row for row in rows_in(tmp_path)}
    assert rows["tf32 truncation"]["answer"] == "exact"  # what the interpreter computes
    assert rows["fused weight gradient"]["status"] == "skipped"
    assert {row["name"].split()[0] for row in rows.values()} == set(names)
    settings = [row["setting"] for row in rows.values() if row.get("kernel") == "forward"]
    assert {} in settings
    assert len(settings) > 1


COMPILE_CHAIN = """
import sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bench.speed.tune import chain_kernel

for chains in (1, 4):
    signature = {"p_out": "*fp32", "steps": "i32", "CHAINS": "constexpr"}
    source = ASTSource(fn=chain_kernel(), signature=signature, constexprs={(2,): chains})
    made = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1})
    print(made.asm["ptx"].count("mma.sync"))
"""


def test_the_compiler_keeps_the_chains_apart():
    """16x16x16 is two instructions; four equal chains would be compiled to one."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE_CHAIN]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.split() == ["2", "8"]


def test_every_open_question_has_an_experiment():
    assert len(tune.EXPERIMENTS) == 11
    for name, experiment in tune.EXPERIMENTS.items():
        assert experiment.__doc__.strip().endswith(("?", "?)", ")", "do?")), name


@pytest.mark.parametrize(
    ("module", "flags", "said"),
    [
        (kernels, ["--case", "scan-B7"], "no case 'scan-B7'; there are scan-B256"),
        (tune, ["--case", "nothing"], "no case 'nothing'; there are latency"),
        (train_step, ["--device", "cuda:99"], "device: 'cuda:99' is not here; there are auto, cpu"),
        (decode, ["--device", "tpu"], "device: 'tpu' is not here"),
        (learn, ["--minutes-each", "-1"], "--minutes-each: must be positive"),
        (front, ["--device", "cpu"], "say --list, --quick, --all"),
    ],
)
def test_bad_flags_name_what_there_is(module, flags, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        module.main(flags)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_an_unknown_benchmark_is_told_which_there_are(capsys):
    assert front.main(["kernel"]) == 2
    assert "no benchmark 'kernel'; there are kernels, tune" in capsys.readouterr().err


def test_list_names_benchmarks_and_cases(capsys):
    assert front.main(["--list"]) == 0
    said = capsys.readouterr().out
    for word in (*front.BENCHMARKS, "scan-B2048-T1024-32x32-bf16", "prefetch"):
        assert word in said


def test_checkpoint_overhead(tmp_path):
    flags = ["--preset", "tiny", "--device", "cpu", "--rounds", "1", "--out", str(tmp_path)]
    assert front.main(["checkpoints", *flags]) == 0
    (row,) = rows_in(tmp_path)
    assert row["bytes"] > 1e6
    assert row["write_s"] > 0
    interval = row["checkpoint_every"] * row["step_s"]
    assert math.isclose(row["share"], (row["blocked_s"] + row["thread_s"]) / interval)
