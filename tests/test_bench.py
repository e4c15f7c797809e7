"""Benchmarks of the CPU run from end to end on toy sizes and write rows that can be read."""

import pytest

from bench import __main__ as front
from bench import harness
from bench.speed import cpu

SECTIONS = {"scan", "memory", "layer"}


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
    checked = [r["max_relative_error"] for r in rows if r.get("max_relative_error") is not None]
    assert checked
    assert all(0 < error < 1e-4 for error in checked)


def test_bad_flags_name_what_there_is(capsys):
    with pytest.raises(SystemExit) as stopped:
        front.main(["--device", "cpu"])
    assert stopped.value.code == 2
    assert "say --list, --quick, --all" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("picture --rows /nope", "--rows: no file /nope"),
        ("compiled --match nope", "no variant of --kernel has --match nope"),
    ],
)
def test_what_is_not_there_is_named(flags, message, capsys, monkeypatch):
    # importing `compiled` takes Triton's interpreter from the environment: load what needs it,
    # and have it back afterwards
    pytest.importorskip("bench.quality.precision")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        front.main(flags.split())
    assert message in capsys.readouterr().err


def test_an_unknown_benchmark_is_told_which_there_are(capsys):
    assert front.main(["kernel"]) == 2
    assert "no benchmark 'kernel'; there are gpu, cpu" in capsys.readouterr().err


def test_precision_quick(tmp_path):
    pytest.importorskip("triton")
    assert front.main(["precision", "--quick", "--out", str(tmp_path)]) == 0
    assert front.main(["precision", "--table", "--out", str(tmp_path)]) == 0
    rows = {row["name"]: row for row in rows_in(tmp_path)}
    for act in ("identity", "modrelu"):
        ends = [rows[f"{act}-{precision}"]["state"][-1] for precision in ("fp32", "bf16x2", "bf16")]
        assert ends == sorted(ends)


def test_list_names_benchmarks(capsys):
    assert front.main(["--list"]) == 0
    said = capsys.readouterr().out
    for word in front.BENCHMARKS:
        assert word in said
