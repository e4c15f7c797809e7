"""How a script ends that does not come to its end: one line on stderr, and an exit code.

    2     bad arguments or data (UserError); a file that cannot be read or written
    1     such a file, in a script that trains
    130   Ctrl-C; the second one ends the process at once
    0     and no line: whoever read the output (head, less) has gone

A script's first lines let Ctrl-C end it like any other program while its libraries load.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from kru_triton.train.run.settings import UserError


@contextmanager
def one_line(training: bool = False, silent: bool = False) -> Iterator[None]:
    """End the process so where the block raises one of these; other errors keep their traceback.

    Args:
        training: the block is to train: that nobody reads what it prints is an error, too.
        silent: another process of this run says a UserError.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # scripts die of it while they import
    try:
        yield
        sys.stdout.flush()
        return
    except UserError as error:
        code, line = 2, "" if silent else f"error: {error}"
    except OSError as error:
        code, line = 1 if training else 2, f"error: {error}"
        if isinstance(error, BrokenPipeError):
            drop_output()
            if not training:
                code, line = 0, ""
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        code, line = 130, "interrupted"
    if line:
        print(line, file=sys.stderr)
    sys.exit(code)


def drop_output() -> None:
    """Let what is printed from now on go nowhere: nobody reads it any more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
