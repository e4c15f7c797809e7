"""Kill train/lm.py at random moments, go on each time, and compare with a run that never stopped.

    python tests/kill_harness.py                                       20 kills, one process
    python tests/kill_harness.py --kills 30 --processes 2 --seed 5
    python tests/kill_harness.py --flags='--workers 2 --tokenizer bpe:300' --data 'json:shards/*'

Each leg is `main()` of train/lm.py in processes of its own, forked from this one, so that a leg
does not import torch anew. The moments are drawn over start-up, steps, checkpoint writes and
renames. At the end every number of metrics.jsonl (but the speeds), and every byte of the last
checkpoint's tensors and data positions, must be those of the run that never stopped. The exit code
is 1 where they are not.
"""

import argparse
import json
import os
import shlex
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import torch._dynamo  # noqa: F401 (the first call of an op imports it: once, here)

from kru_triton.train import checkpoints, lm

TINY = (
    "--preset tiny --d-model 16 --num-layers 1 --hidden-size 16 --num-heads 1 --nonlinearity tanh "
    "--lr 1e-2 --dtype float32 --batch-size 4 --segment-length 32 --device cpu --dropout 0.1 "
    "--wandb disabled --sample-tokens 10 --log-every 3 --warmup 10 --checkpoint-every 5"
)
SPEEDS = ("tok_s", "data_wait")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--data", default="", help="as of train/lm.py; default: text made up here")
    parser.add_argument("--flags", default="", help="further flags of train/lm.py")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if not args.data:
            args.data = f"text:{write_corpus(Path(folder))}/*.txt"
        flags = [*shlex.split(TINY), *shlex.split(args.flags), "--data", args.data]
        flags += ["--steps", str(args.steps)]
        report = kill_and_compare(Path(folder), flags, args.kills, args.processes, args.seed)
    print(json.dumps(report))
    sys.exit(1 if report["differences"] or report["kills"] < args.kills else 0)


def write_corpus(folder: Path) -> Path:
    """Eight files of random words."""
    draw = np.random.default_rng(0)
    words = ["the", "unit", "state", "carries", "kröneker", "of", "a", "matrix", "and", "time"]
    (folder / "corpus").mkdir()
    for number in range(8):
        text = " ".join(draw.choice(words, 1000)) + "\n"
        (folder / "corpus" / f"{number}.txt").write_text(text)
    return folder / "corpus"


class Leg:
    """train/lm.py in processes forked from this one, as torchrun would start them."""

    def __init__(self, flags: list[str], run_dir: Path, count: int):
        self.log = run_dir.with_name(f"{run_dir.name}.log")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.pids = []
        for rank in range(count):
            pid = os.fork()
            if pid == 0:
                self.child([*flags, "--run-dir", str(run_dir)], rank, count, port)
            self.pids.append(pid)
        self.codes = dict.fromkeys(self.pids)

    def child(self, flags: list[str], rank: int, count: int, port: int) -> None:
        """Run the script here, and never return."""
        output = os.open(self.log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
        os.environ.update({name: str(number) for name, number in numbers.items()})
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        sys.argv = ["train/lm.py", *flags]
        code = 99
        try:
            lm.main()
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def wait(self, seconds: float = 60.0) -> list[int] | None:
        """The exit codes by rank; None where the processes go on for longer than that."""
        deadline = time.monotonic() + seconds
        while True:
            for pid in [pid for pid, code in self.codes.items() if code is None]:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
            if None not in self.codes.values():
                return [self.codes[pid] for pid in self.pids]
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.002)

    def busy(self) -> float:
        """Seconds that process 0 has computed: other load on the machine does not change it."""
        return int(Path(f"/proc/{self.pids[0]}/schedstat").read_text().split()[0]) / 1e9

    def wait_until(self, condition) -> float:
        """`busy()` when the condition came true; 0 where the processes ended before."""
        while self.wait(0) is None:
            if condition():
                return self.busy()
            time.sleep(0.001)
        return 0.0

    def kill(self, victim: int) -> list[int]:
        """SIGKILL one process, SIGTERM to the others as torchrun does; all must end in a minute."""
        os.kill(self.pids[victim], signal.SIGKILL)
        self.wait(0.1)
        for pid, code in self.codes.items():
            if code is None:
                os.kill(pid, signal.SIGTERM)
        codes = self.wait()
        if codes is None:
            for pid in self.pids:
                os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"a process goes on without its peer\n{self.output()}")
        return codes

    def output(self) -> str:
        return self.log.read_text()


def kill_and_compare(folder: Path, flags: list[str], kills: int, processes: int, seed: int) -> dict:
    """Two runs in `folder`, one of them killed `kills` times; what came of it."""
    whole = Leg(flags, folder / "whole", processes)
    start_up = whole.wait_until(lambda: (folder / "whole" / "config.json").exists())
    total = whole.wait_until(lambda: (folder / "whole" / "summary.json").exists())
    assert whole.wait() == [0] * processes, whole.output()

    draw = np.random.default_rng(seed)
    steps, survivors = [], []
    while True:
        leg = Leg(flags, folder / "killed", processes)
        if len(steps) < kills:
            moment = draw.uniform(0, start_up)
            if draw.uniform() < 0.8:
                moment = start_up + draw.uniform(0, 1.5 * (total - start_up) / kills)
            if leg.wait_until(lambda: leg.busy() > moment):  # noqa: B023 (called at once)
                victim = int(draw.integers(processes))
                codes = leg.kill(victim)
                survivors += [code for rank, code in enumerate(codes) if rank != victim]
                steps.append(max(checkpoints.list_steps(folder / "killed"), default=0))
                continue
        assert leg.wait(600) == [0] * processes, leg.output()
        break
    return {
        "kills": len(steps),
        "checkpoint_at_kill": steps,
        "exit_codes_of_survivors": survivors,
        "differences": differences(folder / "whole", folder / "killed"),
    }


def differences(*runs: Path) -> list[str]:
    """What differs between two finished runs."""
    found = []
    texts = [(run / "metrics.jsonl").read_text() for run in runs]
    rows = [[json.loads(line) for line in text.splitlines()] for text in texts]
    for row in rows[0] + rows[1]:
        for key in SPEEDS:
            del row[key]
    if rows[0] != rows[1]:
        found.append("metrics.jsonl")
    steps = [checkpoints.list_steps(run)[-1] for run in runs]
    first, second = (checkpoints.folder(run, step) for run, step in zip(runs, steps))
    for path in sorted(first.iterdir()):
        timed = path.name in ("trainer.json", "manifest.json")
        if not timed and path.read_bytes() != (second / path.name).read_bytes():
            found.append(path.name)
    return found


if __name__ == "__main__":
    main()
