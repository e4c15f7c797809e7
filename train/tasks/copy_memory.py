"""Copy memory: repeat ten symbols after T steps of nothing.

    input    3 1 7 5 2 2 8 4 6 1  0 0 0 … 0  9  0 0 0 0 0 0 0 0 0 0
    target   0 0 0 0 0 0 0 0 0 0  0 0 0 … 0  0  3 1 7 5 2 2 8 4 6 1
             ten of 8 symbols      T-1 blanks   delimiter, then ten blanks

    python train/tasks/copy_memory.py --T 1000
    python train/tasks/copy_memory.py --T 1000 --frozen-factors --run-dir runs/copy-frozen
    python train/tasks/copy_memory.py --T 1000 --model lstm --run-dir runs/copy-lstm

The protocol of Arjovsky, Shah and Bengio (ICML 2016): all T + 20 steps count, one-hot inputs and
targets of 10 symbols. Losses are in nats per step. A predictor without memory reaches
10 ln 8 / (T + 20): `fraction` is the loss over that. A fixed random unitary matrix solves this task
too, so look at `--frozen-factors` beside every result.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of an import

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as nnf

from kru_triton.train.run.settings import UserError
from kru_triton.train.tasks.loop import Task, generator, run
from kru_triton.train.tasks.settings import TaskConfig, parse

SYMBOLS, BLANK, DELIMITER, COUNT = 8, 0, 9, 10
VALIDATION = 256  # sequences

# Config

# "paper": N=128 in seven 2x2 factors, 56 real recurrent parameters
PRESETS = {
    "paper": {"hidden_size": 128, "factors": (2,) * 7},
    "balanced": {"hidden_size": 128, "factors": (8, 16)},
    "tiny": {"hidden_size": 32, "factors": (4, 8), "T": 30, "steps": 300},
}


@dataclass
class Config(TaskConfig):
    preset: str = "paper"
    T: int = 1000
    """Steps between the last symbol to be copied and its first place in the output."""
    steps: int = 1000
    input_std: float = 0.01
    run_dir: str = "runs/copy"


# Data


def sequences(count: int, T: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """One-hot inputs `(count, T + 20, 10)` and targets `(count, T + 20)`."""
    symbols = torch.randint(1, SYMBOLS + 1, (count, COUNT), generator=rng)
    inputs = torch.full((count, T + 2 * COUNT), BLANK)
    targets = inputs.clone()
    inputs[:, :COUNT] = symbols
    inputs[:, T + COUNT - 1] = DELIMITER
    targets[:, -COUNT:] = symbols
    return nnf.one_hot(inputs, DELIMITER + 1).float(), targets


def task(config: Config) -> Task:
    if config.T < 1:
        raise UserError(f"--T must be at least 1, got {config.T}")
    held_out = {
        split: sequences(VALIDATION, config.T, generator(config.seed, place))
        for place, split in enumerate(("val", "test"), 1)
    }

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nnf.cross_entropy(outputs.flatten(0, 1), targets.flatten())

    baseline = COUNT * math.log(SYMBOLS) / (config.T + 2 * COUNT)

    def evaluate(predict, split: str) -> dict[str, float]:
        inputs, targets = held_out[split]
        outputs = torch.cat([predict(part) for part in inputs.split(config.batch_size)])
        nats = loss(outputs, targets).item()
        recalled = outputs[:, -COUNT:].argmax(-1) == targets[:, -COUNT:]
        return {
            "loss_nats": nats,
            "fraction": nats / baseline,
            "recall": recalled.double().mean().item(),
        }

    return Task(
        input_size=DELIMITER + 1,
        output_size=DELIMITER + 1,
        length=config.T + 2 * COUNT,
        last_only=False,
        batch=lambda step: sequences(config.batch_size, config.T, generator(config.seed, 0, step)),
        loss=loss,
        evaluate=evaluate,
        unit="nats",
        best="loss_nats",
        baseline=baseline,
        statistics={"T": config.T, "sequences": "drawn"},
    )


# Main


def setup(argv: list[str] | None = None) -> tuple[Config, Task]:
    config = parse(Config, PRESETS, argv, __doc__)
    return config, task(config)


if __name__ == "__main__":
    run(setup)
