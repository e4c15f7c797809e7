"""Rows: one line of JSON each, checked when written and when read.

A row says `bench`, `name`, `status` ("ok", or "skipped" or "failed" with a `reason`), where it came
from (`provenance`), and the fields of its benchmark. Files are appended to, never rewritten. A file
of `bench/results` holds the rows of one device, or of one benchmark, and is named after it.
"""

import argparse
import datetime
import errno
import json
import math
import os
import time
from pathlib import Path

from bench.harness.device import ROOT, provenance, slug

RESULTS = ROOT / "bench" / "results"
SCRATCH = ROOT / "build" / "bench"  # toy runs, which no figure may be drawn from
STATUSES = ("ok", "skipped", "failed")
REQUIRED = {
    "bench": str,
    "name": str,
    "status": str,
    "device": str,
    "torch": str,
    "python": str,
    "commit": str,
    "date": str,
    "command": str,
}


def check_row(row, where: str) -> dict:
    """`row`, after checking that a reader can rely on it."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a row must be a JSON object, got {type(row).__name__}")
    for key, kind in REQUIRED.items():
        if not isinstance(row.get(key), kind) or not row[key]:
            raise ValueError(f"{where}: {key!r} must be a non-empty {kind.__name__}")
    if row["status"] not in STATUSES:
        raise ValueError(f"{where}: status must be one of {STATUSES}, got {row['status']!r}")
    if row["status"] != "ok" and not row.get("reason"):
        raise ValueError(f"{where}: a row that is {row['status']} must give its reason")
    times = [row[key] for key in ("ms_p20", "ms_p50", "ms_p80") if key in row]
    if times and (len(times) < 3 or not 0 < times[0] <= times[1] <= times[2] < math.inf):
        raise ValueError(f"{where}: ms_p20, ms_p50, ms_p80 must be positive and in order: {times}")
    datetime.datetime.fromisoformat(row["date"])
    return row


def read_rows(path: Path) -> list[dict]:
    """The checked rows of one file, oldest first; [] if it is not there.

    Raises:
        ValueError: for a line that is no row, with its number.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error}); was a run cut off here?") from None
        rows.append(check_row(row, where))
    return rows


def append_row(path: Path, row: dict) -> dict:
    """`row`, checked and appended to a file: all of its line, or nothing and an OSError."""
    check_row(row, f"row {row.get('name')!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(row, allow_nan=False) + "\n").encode()
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            os.truncate(path, before)
            raise
    return row


def latest(rows: list[dict]) -> list[dict]:
    """The last row of every benchmark and name."""
    return list({(row["bench"], row["name"]): row for row in rows}.values())


class Results:
    """Prints a line per row and appends it to the device's file.

    Args:
        device: a torch device, or the name of what was measured if it is not this machine.
        options: of `parser` (out, again, quick).
        command: as a user would type it.
        deadline: of time.monotonic(), from which on nothing is started.
    """

    def __init__(self, device, options: argparse.Namespace, command: str, deadline=math.inf):
        self.provenance = provenance(device, command)
        self.folder = Path(options.out or (SCRATCH if options.quick else RESULTS))
        self.path = self.folder / f"{slug(self.provenance['device'])}.jsonl"
        self.quick = options.quick
        self.failures = 0
        self.left = []  # what there was no time for
        self.ceilings = {}  # of the device, once measured
        self.deadline = deadline
        known = {p: read_rows(p) for p in {self.path, RESULTS / self.path.name}}
        self.done = set()
        if not options.again and not self.provenance["commit"].endswith("-dirty"):
            # failed ones too: what breaks the device's context must not stop every later run
            self.done = {
                (row["bench"], row["name"])
                for rows in known.values()
                for row in rows
                if row["commit"] == self.provenance["commit"]
                and row.get("quick", False) == self.quick
            }
        print(" · ".join(f"{k} {v}" for k, v in self.provenance.items() if k != "command" and v))

    def title(self, text: str) -> None:
        print(f"\n{text}", flush=True)

    def is_done(self, bench: str, name: str) -> bool:
        return (bench, name) in self.done

    def out_of_time(self, what: str) -> bool:
        """Whether the budget is spent; `what` is then listed as left over."""
        if self.seconds_left() > 0:
            return False
        self.left.append(what)
        return True

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def add(self, bench: str, name: str, line: str, status: str = "ok", **values) -> dict:
        """Append a row; `line` is what a reader of the terminal, or of the table, sees."""
        self.failures += status == "failed"
        row = {"bench": bench, "name": name, "status": status, **values, **self.provenance}
        row["said"] = " ".join(line.split())
        if self.quick:
            row["quick"] = True
        try:
            append_row(self.path, row)
        except OSError as error:  # no room: what was measured is at least seen
            self.failures += 1
            line += f"  NOT WRITTEN: {error}"
        print(f"  {name:<44} {line}", flush=True)
        self.done.add((bench, name))
        return row

    def add_reason(self, bench: str, name: str, status: str, reason: str, **values) -> None:
        reason = " ".join(reason.split())[:500]
        self.add(bench, name, f"{status}: {reason[:120]}", status=status, reason=reason, **values)

    def finish(self) -> int:
        """The exit status: 1 if a row failed."""
        print(f"\nrows appended to {self.path}")
        return int(self.failures > 0)
