"""One run, from its claim on the directory to its closing words.

    with Run(config, processes) as run:
        run.describe(settings, lines, device)    what runs; config.json
        at = run.resume(TrainState(), unpack)    the checkpoint to go on from, where there is one
        run.start(at, device, pack)              metrics.jsonl, W&B, the clock
        while run.goes_on():
            ...                                  a step: agree, update, stepped, log, save
        if run.completed():                      the last checkpoint
            run.summarize(summary, model, ...)   summary.json
    return run.code

The loop itself stands in the script. Every method is called by all processes of a run. An error in
the block, once the run has started, leaves a checkpoint of the last completed step. What ends with
a line of words is in `code`: 0 done, or stopped by a signal with a checkpoint; 1 that checkpoint or
another file could not be written, or too little memory; 2 bad data; 3 a loss that is not finite.
"""

import contextlib
import copy
import json
import shlex
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from torch.optim import Optimizer
from tqdm import tqdm

from kru_triton.train.run import checkpoints
from kru_triton.train.run.device import device_name, keep_freed_memory, rng_state, set_rng_state
from kru_triton.train.run.directory import claim, commit, share, versions, write_settings
from kru_triton.train.run.metrics import Metrics
from kru_triton.train.run.processes import Processes, Stop
from kru_triton.train.run.script import drop_output
from kru_triton.train.run.settings import UserError
from kru_triton.train.run.wandb_run import Wandb, new_run_id


class NonFiniteError(Exception):
    """The loss or the gradient is not a number any more."""


@dataclass
class TrainState:
    """Where a run is, besides model, optimizer and RNG. A script adds what it has."""

    step: int = 0
    seconds: float = 0.0  # in the loop, all legs
    losses: list = field(default_factory=list)  # of the steps since the last row of metrics.jsonl
    norms: list = field(default_factory=list)  # of their gradients


State = TypeVar("State", bound=TrainState)


def is_due(step: int, every: int) -> bool:
    """Whether something that happens at every so many steps (0: never) happens after this one."""
    return every > 0 and step % every == 0


class Run:
    """A run of this process, and of the others of `processes`.

    Args:
        config: with `run_dir`, `resume`, `steps`, `minutes`, `clip`, `keep`, `wandb`,
            `wandb_project` and `wandb_name`.
    """

    def __init__(self, config, processes: Processes = Processes()):  # noqa: B008 (frozen)
        self.config, self.processes = config, processes
        self.directory = Path(config.run_dir)
        self.first = processes.rank == 0  # of the processes: it writes and speaks for all
        self.code = 0
        self.done = 0.0  # the share of the budget that is spent; 1 ends the run
        self.stopping = False  # before that
        self.failure = None  # an error that ends the run once all processes know of it
        self.rng = {}  # before the step that is under way; None: the weights are being changed
        self.started = False
        self.stack = contextlib.ExitStack()  # what is closed at the end

    def __enter__(self) -> "Run":
        keep_freed_memory()
        self.stop = Stop()
        lock = self.checkpoint = None
        with self.processes.raise_together():
            if self.first:
                lock, self.checkpoint = claim(self.directory, self.config.resume)
                self.stack.enter_context(lock)
        self.checkpoint = self.processes.gather(self.checkpoint)[0]
        with self.processes.raise_together():
            share(self.directory, self.processes.rank)
        return self

    def __exit__(self, _kind, error: BaseException | None, _traceback) -> bool:
        with self.stack:
            return self.started and isinstance(error, Exception) and self.ends_with(error)

    # Begin

    def describe(self, settings: dict, lines: list[str], device: torch.device) -> None:
        """Say what runs, and write config.json.

        Args:
            settings: those of `config`, and whatever else makes the run what it is.
            lines: further words.

        Raises:
            UserError: the directory is of a run with other settings.
        """
        settings = json.loads(json.dumps({**settings, "wandb_id": new_run_id()}))
        listed = " ".join(f"{key}={settings[key]!r}" for key in vars(self.config))
        print(textwrap.fill(listed, 100, break_on_hyphens=False))
        for line in lines:
            print(line)
        self.made_by = {"device": device_name(device), "versions": versions(), "commit": commit()}
        print(", ".join(f"{key} {value}" for key, value in self.made_by.items()))
        with self.processes.raise_together():
            if self.first:
                write_settings(self.directory, settings)
        self.settings = settings

    def resume(self, at: State, unpack: Callable[[Path], State]) -> State:
        """What `unpack` puts back in place of the checkpoint to go on from; without one `at`."""
        with self.processes.raise_together():
            if self.checkpoint:
                try:
                    at = unpack(self.checkpoint)
                except (KeyError, RuntimeError, ValueError, checkpoints.CorruptError) as error:
                    raise UserError(f"{self.checkpoint} cannot be gone on from: {error}") from error
                print(f"resumed from {self.checkpoint}: step {at.step}, {at.seconds:.0f} s")
        return at

    def start(
        self, at: TrainState, device: torch.device, pack: Callable[[], tuple[dict, dict]]
    ) -> None:
        """Open what the steps are written to, and start the clock.

        Args:
            pack: tensors and JSON documents of a checkpoint by file, those of this process; it may
                raise NonFiniteError.
        """
        self.at, self.device, self.pack = at, device, pack
        if self.first:
            self.metrics = Metrics(self.directory / "metrics.jsonl", at.step)
        self.wandb = Wandb(
            self.config.wandb if self.first else "disabled",
            self.directory,
            self.settings["wandb_id"],
            self.settings,
            project=self.config.wandb_project,
            name=self.config.wandb_name,
        )
        self.stack.callback(self.wandb.finish)
        self.began = time.perf_counter() - at.seconds
        self.done = self.progress()
        self.bar = tqdm(
            total=1.0,
            initial=self.done,
            disable=not (self.first and sys.stderr.isatty()),
            bar_format="{percentage:3.0f}%|{bar:24}| {elapsed}<{remaining}{postfix}",
        )
        self.stack.callback(self.bar.close)
        self.say = print if self.bar.disable else self.bar.write
        good = at.step if self.checkpoint else None
        self.writer = checkpoints.Writer(
            self.directory, self.config.keep, self.processes, self.say, good
        )
        self.begin_row()
        self.started = True

    # The loop

    def goes_on(self) -> bool:
        """Whether there is another step; it begins here."""
        self.bar.update(self.done - self.bar.n)
        going = self.done < 1.0 and not self.stopping
        self.rng = rng_state(self.device) if going else {}
        return going

    def progress(self) -> float:
        """The share of the budget that is spent, by steps or by time."""
        by_steps = self.at.step / self.config.steps if self.config.steps else 0.0
        by_time = self.at.seconds / (60 * self.config.minutes) if self.config.minutes else 0.0
        return min(1.0, max(by_steps, by_time))

    def clock(self) -> float:
        """Seconds in the loop, of all legs, by the first process; 0 in the others."""
        return time.perf_counter() - self.began if self.first else 0.0

    def agree(self, count: float = 0.0) -> float:
        """A count summed over all processes; with it they agree on the time and whether to stop."""
        events = bool(self.stop.requested), self.failure is not None
        count, signals, failures, seconds = self.processes.sum(count, *events, self.clock())
        self.at.seconds = seconds
        self.stopping = bool(signals or failures)
        return count

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """An error in the block ends the run once `agree` has told all processes of it."""
        try:
            yield
        except NonFiniteError:  # all processes have this one
            raise
        except Exception as error:
            self.failure = self.failure or error

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """The block waits for data."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    def update(self, *optimizers: Optimizer) -> None:
        """Let them change the weights. An error in here leaves those of no step: they are lost."""
        self.rng = None
        for optimizer in optimizers:
            optimizer.step()

    def stepped(self) -> None:
        """The step is complete, `at` included."""
        self.rng = {}
        self.done = self.progress()
        if self.done >= 1.0:
            self.failure = None  # of a batch that is not needed

    def begin_row(self) -> None:
        """The next row is of what comes from now on."""
        self.row_began, self.row_at, self.waited = time.perf_counter(), copy.copy(self.at), 0.0

    def rates(self, name: str) -> tuple[float, float]:
        """Since the last row: what a number of `at` has gained a second, the share of waiting."""
        seconds = time.perf_counter() - self.row_began
        gained = getattr(self.at, name) - getattr(self.row_at, name)
        return gained / seconds, self.waited / seconds

    def log(
        self,
        row: dict,
        words: str,
        sample: Callable[[], str] = str,
        draw: Callable[[], dict] | None = None,
    ) -> None:
        """A row of metrics.jsonl and W&B, and its words.

        Args:
            sample: text to be shown with it.
            draw: matplotlib figures by name, for W&B.
        """
        text = ""
        if self.first:
            self.metrics.write(row)
            text = sample()
            self.wandb.log(row, text, draw)
        self.say(words)
        if text:
            self.say(textwrap.indent(text, "    | ", lambda line: True))
        self.bar.set_postfix_str(f"step {self.at.step}", refresh=False)
        self.begin_row()

    def save(self) -> None:
        """Begin to write a checkpoint; the time that this takes is no row's."""
        pause = time.perf_counter()
        (self.at.seconds,) = self.processes.sum(self.clock())
        before = [self.metrics.sync] if self.first else []
        self.writer.save(self.at.step, *self.pack(), *before)
        self.row_began += time.perf_counter() - pause

    # End

    def completed(self) -> bool:
        """Write the last checkpoint. Whether the budget is spent; else it says how to go on.

        Raises:
            Exception: the one that `noting` has noted, on this process or another.
        """
        self.writer.wait()
        if self.writer.saved_step != self.at.step:
            self.save()
            self.writer.wait()
        self.code = 0 if self.writer.saved_step == self.at.step else 1
        failure = self.failure and (str(self.failure) or repr(self.failure))
        failures = list(filter(None, self.processes.gather(failure)))
        if failures:
            raise self.failure or UserError(failures[0])
        if self.done < 1.0:
            reason = self.stop.requested or "a signal to another process"
            self.say(f"stopped by {reason} after step {self.at.step}; go on with: {self.again()}")
        return self.done >= 1.0

    def again(self) -> str:
        """The command of this run."""
        return f"{self.processes.launcher()} {shlex.join(sys.argv)}"

    def last_row(self, name: str) -> dict:
        """The row of the last step; {} where it lacks this measure (the budget was lowered)."""
        row = self.metrics.rows[-1] if self.first and self.metrics.rows else {}
        row = self.processes.gather(row)[0]
        return row if row.get("step") == self.at.step and name in row else {}

    def summarize(self, measures: dict, model: nn.Module, result: str, hint: str = "") -> None:
        """Write summary.json, and close with the result in words."""
        if not self.first:
            return
        summary = {
            **measures,
            "steps": self.at.step,
            "parameters": model.num_parameters,
            "recurrent_parameters": model.num_recurrent_parameters,
            "seconds": self.at.seconds,
            **self.made_by,
        }
        content = json.dumps(summary, indent=1) + "\n"
        checkpoints.write_atomic(self.directory / "summary.json", content)
        self.wandb.summarize(summary)
        self.bar.close()
        print(
            f"done: {result}\n"
            f"{model.num_parameters:,} parameters, {model.num_recurrent_parameters:,} recurrent; "
            f"{self.at.seconds:.0f} s; everything in {self.directory}\n"
            f"{hint}train on: {self.again()}  (with a larger --steps or --minutes)",
            flush=True,
        )

    def ends_with(self, error: Exception) -> bool:
        """Save the last completed step after an error, and say what happened.

        Whether that is all, with the exit code in `code`; other errors are to be raised again.
        """
        if not isinstance(error, NonFiniteError) and self.processes.have_gone(error):
            return False
        self.bar.close()
        if isinstance(error, NonFiniteError):
            self.writer.wait()
            self.code, said = 3, self.first
            hint = "; a lower --recurrent-lr or --lr may help, or --clip 1"
            if self.config.clip:
                hint = "; a lower --recurrent-lr, --lr or --clip may help"
        else:
            if isinstance(error, BrokenPipeError):
                drop_output()
            self.save_last_step()
            self.code, hint = 2 if isinstance(error, UserError) else 1, ""
            said = self.first or self.code == 1  # a UserError is one on all processes
        saved = self.writer.saved_step
        good = "no checkpoint was written before it"
        if saved is not None:
            good = f"the last good checkpoint is {checkpoints.folder(self.directory, saved)}"
        where = f"stopped after step {self.at.step}, {good}{hint}"
        known = NonFiniteError, UserError, OSError, MemoryError, torch.OutOfMemoryError
        if not isinstance(error, known):
            print(where, file=sys.stderr)
            return False
        if said:
            print(f"error: {str(error) or 'out of memory'}; {where}", file=sys.stderr)
        return True

    def save_last_step(self) -> None:
        """Write a checkpoint of the last completed step, where it can be told.

        Not after an optimizer that fails, for it has changed some of the weights; nor of several
        processes, for the others are somewhere else.
        """
        if self.rng:
            set_rng_state(self.rng, self.device)
        try:
            self.writer.wait()
            alone = self.processes.world_size == 1 and self.rng is not None
            if alone and self.at.step and self.writer.saved_step != self.at.step:
                self.save()
                self.writer.wait()
        except Exception as second:  # the first one is to be told
            print(
                f"warning: checkpoint of step {self.at.step} not written: {second}", file=sys.stderr
            )
