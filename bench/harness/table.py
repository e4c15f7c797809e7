"""The newest rows of a file as a table."""

from pathlib import Path

from bench.harness.rows import latest, read_rows


def ours(row: dict) -> bool:
    return str(row.get("implementation")).startswith("kru")


def table(path: Path) -> tuple[list[str], int]:
    """Lines of Markdown, and how many rows failed: times in ms, how many times our best time of
    the case that is, how many times the prediction, and what else a row says."""
    rows = latest(read_rows(path))
    best = {}
    for row in rows:
        if ours(row) and {"ms_p50", "case"} <= row.keys():
            key = (row["bench"], row["case"], row["direction"])
            best[key] = min(row["ms_p50"], best.get(key, row["ms_p50"]))
    device = rows[0]["device"] if rows else path.stem
    lines = [
        f"| {device}: benchmark, row | ms (p50) | times ours | times predicted | what it says |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        ms = row.get("ms_p50")
        shown = f"{ms:.3f}" if ms else "" if row["status"] == "ok" else row["status"]
        base = best.get((row["bench"], row.get("case"), row.get("direction")))
        ratios = [
            f"{ms / other:.2f}" if ms and other else "" for other in (base, row.get("predicted_ms"))
        ]
        said = row["reason"] if row["status"] != "ok" else row.get("said", "")
        lines.append(
            f"| {row['bench']} {row['name']} | {shown} | {' | '.join(ratios)} | {said[:160]} |"
        )
    failed = sum(row["status"] == "failed" for row in rows)
    return [*lines, "", f"{len(rows)} rows of {path}, {failed} failed"], failed
