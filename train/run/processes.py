"""The processes of one run: who this one is, what all of them agree on, and when they stop.

    python train/lm.py                                      one process
    torchrun --standalone --nproc_per_node 8 train/lm.py    eight, on one machine
    torchrun --nnodes 4 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29400 \\
        train/lm.py --run-dir /shared/run                   on four machines, started on each

Numbers that decide something (stop? how many targets?) are summed over all processes, so that all
take the same branch. They go over gloo on the CPU; gradients go over DDP, on a GPU with NCCL. A
single process sends nothing.
"""

import dataclasses
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kru_triton.train.run.settings import UserError

# How long one process may keep the others waiting before they give up. A process that dies is
# noticed at once, by its closed connections; this is for a machine that vanishes without a word.
TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Processes:
    """This process among all of a run. Every method is called by all of them."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # on this machine
    group: dist.ProcessGroup | None = None

    def sum(self, *values: float) -> list[float]:
        """Each value summed over all processes, in float64: the same bits on every one."""
        if self.world_size == 1:
            return list(map(float, values))
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.group)
        return total.tolist()

    def gather(self, item) -> list:
        """What every process passed, by rank. For a few kB."""
        if self.world_size == 1:
            return [item]
        items = [None] * self.world_size
        dist.all_gather_object(items, item, group=self.group)
        return items

    def new_group(self) -> "Processes":
        """The same processes with connections of their own, for use in another thread."""
        if self.world_size == 1:
            return self
        return dataclasses.replace(self, group=dist.new_group(backend="gloo", timeout=TIMEOUT))

    @contextmanager
    def raise_together(self) -> Iterator[None]:
        """An error in the block, on any process, is raised on all of them, after the block.

        What is a UserError there is one on all; of any other, those that do not have it are told.
        """
        error = None
        try:
            yield
        except Exception as caught:
            error = caught
        errors = self.gather(None if error is None else str(error) or repr(error))
        if error is not None and (self.world_size == 1 or not isinstance(error, UserError)):
            raise error
        for rank, message in enumerate(errors):
            if message is not None:
                alone = errors.count(message) < self.world_size
                raise UserError(f"process {rank}: {message}" if alone else message)

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """`model` as a module whose gradients are averaged over all processes."""
        if self.world_size == 1:
            return model
        wrapped = DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )
        # After its first backward DDP regroups the gradients, and so the order of their sums: let
        # it do that now, or a resumed run would differ in the last bits from one that never stopped
        with torch.random.fork_rng():
            tokens = torch.zeros(1, 2, dtype=torch.int64, device=device)
            wrapped(tokens, None, torch.ones_like(tokens, dtype=torch.bool))[0].sum().backward()
        wrapped.zero_grad()
        return wrapped

    def device_name(self, name: str) -> str:
        """Of `--device cuda` (or auto), the GPU that belongs to this process."""
        if self.world_size > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{self.local_rank}"
        return name

    def launcher(self) -> str:
        """What starts a script in this many processes."""
        if self.world_size == 1:
            return "python"
        if os.environ.get("LOCAL_WORLD_SIZE") == str(self.world_size):
            return f"torchrun --standalone --nproc_per_node {self.world_size}"
        return "torchrun ..."

    def have_gone(self, error: RuntimeError) -> bool:
        """Whether this error says that another process of the run is not there any more."""
        return self.world_size > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))


def join(device: str) -> Processes:
    """Meet the other processes that torchrun (or whoever set WORLD_SIZE) has started.

    Args:
        device: as in `--device`.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return Processes()
    gpu = torch.cuda.is_available() and not device.startswith("cpu")
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=TIMEOUT)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"cannot meet the other {world_size - 1} processes: {error}") from error
    return Processes(dist.get_rank(), world_size, int(os.environ.get("LOCAL_RANK", "0")))


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


class Stop:
    """`requested` after the first SIGTERM or SIGINT; the second one ends the process at once.

    Under torchrun only the first one counts: it passes on a signal that may have reached this
    process before, and ends those that do not stop within 30 s itself.
    """

    def __init__(self):
        self.requested = ""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle)

    def handle(self, number: int, _frame) -> None:
        self.requested = self.requested or signal.Signals(number).name
        if not dist.is_torchelastic_launched():
            for each in (signal.SIGTERM, signal.SIGINT):
                signal.signal(each, signal.SIG_DFL)
