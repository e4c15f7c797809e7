"""What the benchmarks share. Only torch is needed.

device.py  the device, the commit; cli.py  flags; rows.py  rows and their checks; race.py  timing
table.py  the newest of them
"""

from bench.harness.cli import command_line, device_for, parser, plain_parser, pyplot_for
from bench.harness.device import (
    ROOT,
    commit,
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
    latest,
    read_rows,
)
from bench.harness.table import table
