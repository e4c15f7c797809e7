"""`metrics.jsonl`: the record of a run's numbers."""

import json
import os
import sys
from pathlib import Path

from kru_triton.train.run.checkpoints import write_atomic


class Metrics:
    """`metrics.jsonl`: one JSON object per line, ordered by step.

    Opening it at step N drops the rows of later steps, so that a resumed run ends with the file of
    a run that never stopped. Rows that a full disk refuses are kept and written with the next one.
    """

    def __init__(self, path: Path, last_step: int):
        self.path = path
        self.rows = [row for row in read_rows(path) if row["step"] <= last_step]
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self.good_bytes = path.stat().st_size
        self.unwritten = b""

    def write(self, row: dict) -> None:
        self.rows.append(row)
        self.unwritten += json.dumps(row).encode() + b"\n"
        try:
            with open(self.path, "r+b", buffering=0) as file:
                file.truncate(self.good_bytes)  # drops a line that was cut short
                file.seek(self.good_bytes)
                if file.write(self.unwritten) == len(self.unwritten):
                    self.good_bytes += len(self.unwritten)
                    self.unwritten = b""
        except OSError as error:
            print(
                f"warning: {self.path}: {error.strerror}; the row is kept for later",
                file=sys.stderr,
            )

    def sync(self) -> None:
        """Flush to the disk (before a checkpoint that stands for these rows)."""
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())


def read_rows(path: Path) -> list[dict]:
    """All whole rows of a metrics file; a last line cut short by a crash is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
