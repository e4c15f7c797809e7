"""Kill train/lm.py at random moments, go on each time, and compare with a run that never stopped.

    python tests/kill_harness.py                                       20 kills, text in memory
    python tests/kill_harness.py --kills 30 --processes 2 --seed 5
    python tests/kill_harness.py --stream parquet --shards 3 --flags='--tokenizer bpe:50'

Each leg is `main()` of train/lm.py in processes of its own, forked from one that has torch
imported. Of N kills, number k falls once the run has got through k/N of its steps: in the next
start-up, among the steps after that, or while the next checkpoint is written or an old one
deleted. At the end every number of metrics.jsonl (but the speeds), and every byte of the last
checkpoint's tensors and data positions, must be those of the run that never stopped. The exit code
is 1 where they are not.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import resource
import shlex
import socket
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow
import torch
from pyarrow import parquet

from kru_triton.train import lm
from kru_triton.train.run import checkpoints
from kru_triton.train.run.device import device_name
from kru_triton.train.run.directory import commit
from kru_triton.train.run.metrics import read_rows

TINY = (
    "--preset tiny --d-model 16 --num-layers 1 --hidden-size 16 --num-heads 1 --nonlinearity tanh "
    "--backend torch --device cpu --dtype float32 --batch-size 4 --segment-length 32 --lr 1e-2 "
    "--dropout 0.1 --wandb disabled --sample-tokens 10 --log-every 3 --warmup 10 "
    "--checkpoint-every 5"
)
SPEEDS = ("tok_s", "data_wait")

context = multiprocessing.get_context("forkserver")
# torch's custom ops import torch._dynamo when they are first called
context.set_forkserver_preload(["kru_triton.train.lm", "torch._dynamo"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--stream", choices=("json", "parquet", "text"), help="kind of shards")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--data", default="", help="as of train/lm.py; default: text made up here")
    parser.add_argument("--flags", default="", help="further flags of train/lm.py")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, help="append a row to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = ["--data", args.data]
        if args.stream:
            data = write_stream(write_corpus(folder), folder, args.stream, args.shards)
        elif not args.data:
            data = ["--data", f"text:{write_corpus(folder)}/*.txt"]
        flags = [*shlex.split(TINY), *data, "--steps", str(args.steps), *shlex.split(args.flags)]
        report = kill_and_compare(folder, flags, args.kills, args.processes, args.seed)
    report = {
        "bench": "kills",
        "name": f"{report['kills']} kills, {args.processes} processes, seed {args.seed}",
        "status": "failed" if report["differences"] else "ok",
        "reason": ", ".join(report["differences"]),
        **report,
        "command": shlex.join(["python", "tests/kill_harness.py", *sys.argv[1:]]),
        "device": device_name(torch.device("cpu")),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }
    print(json.dumps(report))
    if args.out:
        with args.out.open("a") as file:
            file.write(json.dumps(report) + "\n")
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


def write_stream(corpus: Path, folder: Path, kind: str, shards: int) -> list[str]:
    """The corpus in documents of 20 words, dealt to `shards` files; the flags that read them.

    In text a file is a document, and the files are given twice, as two sources: a single one would
    be read into memory. The corpus' first file is the validation text.
    """
    first, *others = sorted(corpus.glob("*.txt"))
    words = " ".join(path.read_text() for path in others).split()
    texts = [" ".join(words[at : at + 20]) for at in range(0, len(words), 20)]
    for number in range(shards):
        part, path = texts[number::shards], folder / f"{number}.{kind}"
        if kind == "parquet":
            parquet.write_table(pyarrow.table({"text": part}), path, row_group_size=11)
        elif kind == "json":
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
        else:
            path.write_text("\n".join(part))
    spec = f"{kind}:{folder}/*.{kind}"
    data = ["--data", f"2:{spec}", "--data", f"1:{spec}"] if kind == "text" else ["--data", spec]
    return [*data, "--valid", f"text:{first}"]


class Leg:
    """train/lm.py in processes that stand by with torch imported, as torchrun would start them.

    Args:
        file_limits: by rank, the largest file in bytes that the process may write.
    """

    def __init__(self, flags, run_dir: Path, count: int = 1, file_limits: dict | None = None):
        self.run_dir = run_dir
        self.log = run_dir.with_name(f"{run_dir.name}.log")
        self.log.touch()
        self.settings = run_dir / "config.json"
        self.settings_before = self.settings.exists() and self.settings.stat().st_ino
        rows = run_dir / "metrics.jsonl"
        self.rows_before = rows.stat().st_size if rows.exists() else 0
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        flags = [*map(str, flags), "--run-dir", str(run_dir)]
        self.processes = []
        for rank in range(count):
            limit = (file_limits or {}).get(rank)
            arguments = (flags, self.log, rank, count, port, limit)
            self.processes.append(context.Process(target=child, args=arguments))
        for process in self.processes:
            process.start()

    def wait(self, seconds: float = 60.0) -> list[int] | None:
        """The exit codes by rank; None where the processes go on for longer than that."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        return None if None in codes else codes

    def busy(self) -> float:
        """Seconds that process 0 has computed: other load on the machine does not change it."""
        return int(Path(f"/proc/{self.processes[0].pid}/schedstat").read_text().split()[0]) / 1e9

    def wait_until(self, condition) -> float:
        """`busy()` when the condition came true; 0 where the processes ended before."""
        while self.wait(0) is None:
            try:
                if condition():
                    return self.busy()
            except FileNotFoundError:  # process 0 has just ended
                continue
            time.sleep(0.001)
        return 0.0

    def has_begun(self) -> bool:
        """Whether start-up is over: config.json is then written anew."""
        return self.settings.exists() and self.settings.stat().st_ino != self.settings_before

    def has_logged(self, step: int = 0) -> bool:
        """Whether this leg has added a row of this step or a later one to metrics.jsonl."""
        path = self.run_dir / "metrics.jsonl"
        if not self.has_begun() or not path.exists() or path.stat().st_size <= self.rows_before:
            return False
        rows = read_rows(path)
        return bool(rows) and rows[-1]["step"] >= step

    def is_writing(self) -> bool:
        """Whether a checkpoint is being written or deleted."""
        return any((self.run_dir / "checkpoints").glob(".tmp-*"))

    def wait_for_step(self, step: int) -> None:
        """Until metrics.jsonl has a row of this step or a later one."""
        assert self.wait_until(lambda: self.has_logged(step)), self.output()

    def kill(self, victim: int) -> list[int]:
        """SIGKILL one process, SIGTERM to the others as torchrun does; all must end in a minute."""
        self.processes[victim].kill()
        self.wait(0.1)
        for process in self.processes:
            process.terminate()
        codes = self.wait()
        for process in self.processes:
            process.kill()
        assert codes is not None, f"a process goes on without its peer\n{self.output()}"
        return codes

    def output(self) -> str:
        return self.log.read_text()


def child(flags: list[str], log: Path, rank: int, count: int, port: int, limit: int | None) -> None:
    """Run the script in this process."""
    output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ.update({name: str(number) for name, number in numbers.items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    sys.argv = ["train/lm.py", *flags]
    lm.main()


def kill_and_compare(folder: Path, flags: list[str], kills: int, processes: int, seed: int) -> dict:
    """Two runs in `folder`, one of them killed `kills` times; what came of it."""
    whole = Leg(flags, folder / "whole", processes)
    start_up = whole.wait_until(whole.has_begun)
    seconds = whole.wait_until(lambda: (folder / "whole" / "summary.json").exists()) - start_up
    assert whole.wait() == [0] * processes, whole.output()
    summary = json.loads((folder / "whole" / "summary.json").read_text())
    steps, number_of_writes = summary["steps"], whole.output().count("checkpoint step-")
    step_seconds, write_seconds = seconds / steps, summary["checkpoint_s"] / number_of_writes

    draw = np.random.default_rng(seed)
    done, survivors = [], []
    for number in range(kills):
        leg = Leg(flags, folder / "killed", processes)
        kind = draw.choice(["start-up", "step", "write"], p=[0.2, 0.4, 0.4])
        step = int(0.9 * steps * number / kills)
        if kind == "start-up":
            moment = draw.uniform(0, start_up)
        else:
            moment = leg.wait_until(lambda: leg.has_logged(step))  # noqa: B023 (called at once)
        if kind == "step":
            moment += draw.uniform(0, 10 * step_seconds)
        if kind == "write":
            leg.wait_until(leg.is_writing)
            time.sleep(draw.uniform(0, write_seconds))
        if not leg.wait_until(lambda: leg.busy() >= moment):  # noqa: B023 (called at once)
            break  # it has ended
        victim = int(draw.integers(processes))
        codes = leg.kill(victim)
        survivors += [code for rank, code in enumerate(codes) if rank != victim]
        checkpoint = max(checkpoints.list_steps(folder / "killed"), default=0)
        done.append([kind, checkpoint, leg.is_writing()])
    last = Leg(flags, folder / "killed", processes)
    assert last.wait(600) == [0] * processes, last.output()
    return {
        "kills": len(done),
        "processes": processes,
        "in": {
            kind: sum(kill[0] == kind for kill in done) for kind in ("start-up", "step", "write")
        },
        "write_cut": sum(kill[2] for kill in done),
        "checkpoint_at_kill": [kill[1] for kill in done],
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
