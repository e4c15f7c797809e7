"""What the benchmarks share. Only torch is needed.

device.py  the device, the commit; cli.py  flags; rows.py  rows and their checks; race.py  timing
"""

from bench.harness.cli import (
    chosen,
    command_line,
    device_for,
    parser,
    plain_parser,
    pyplot_for,
    row_flags,
)
from bench.harness.device import (
    ROOT,
    commit,
    cpu_name,
    device_name,
    free_memory,
    pick_device,
    provenance,
    slug,
    synchronize,
    version,
)
from bench.harness.race import (
    Candidate,
    Clock,
    Unavailable,
    captured,
    ceilings,
    is_out_of_memory,
    quantiles,
    race,
    reason_of,
)
from bench.harness.rows import (
    RESULTS,
    SCRATCH,
    Results,
    append_row,
    check_row,
    latest,
    read_rows,
)

__all__ = [
    "RESULTS",
    "ROOT",
    "SCRATCH",
    "Candidate",
    "Clock",
    "Results",
    "Unavailable",
    "append_row",
    "captured",
    "ceilings",
    "check_row",
    "chosen",
    "command_line",
    "commit",
    "cpu_name",
    "device_for",
    "device_name",
    "free_memory",
    "is_out_of_memory",
    "latest",
    "parser",
    "pick_device",
    "plain_parser",
    "provenance",
    "pyplot_for",
    "quantiles",
    "race",
    "read_rows",
    "reason_of",
    "row_flags",
    "slug",
    "synchronize",
    "version",
]
