"""Adding: the sum of the two marked numbers of a sequence of T.

    value   .31 .86 .02 .57 … .44 .91 .13      uniform in [0, 1)
    mark     0   1   0   0  …  0   1   0       one in the first half, one in the second
    target  .86 + .91                          after the last step

    python train/tasks/adding.py --T 200
    python train/tasks/adding.py --T 200 --preset lstm --run-dir runs/adding-lstm
    python train/tasks/adding.py --T 750 --target 0.01 --run-dir runs/adding-750

The preset `integrator` is what learns this at every length tried: a layer of random rotations,
whose relu forgets within a few steps, turns each value and its mark into features, and a second one
that starts near the identity adds them up. A single layer of random rotations cannot hold a sum:
what it stores turns by an angle of its own at each step.

The protocol of Hochreiter and Schmidhuber (1997) in the form of Arjovsky, Shah and Bengio (ICML
2016). Losses are mean squared errors; always answering 1 gives 0.167.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of an import

from dataclasses import dataclass

import torch
import torch.nn.functional as nnf

from kru_triton.train.run.settings import UserError
from kru_triton.train.tasks.loop import Task, generator, run
from kru_triton.train.tasks.settings import TaskConfig, parse

VALIDATION = 1000  # sequences
BASELINE = 1 / 6  # variance of the sum of two uniform numbers

# Config

# "paper": N=128 in seven 2x2 factors, 56 real recurrent parameters
PRESETS = {
    "integrator": {
        "hidden_size": 32,
        "num_layers": 2,
        "factors": (4, 8),
        "nonlinearity": "relu",
        "init_spread": (1.0, 0.01),
        "input_std": 1.0,
        "recurrent_lr": 3e-4,
    },
    "lstm": {"model": "lstm", "hidden_size": 128},
    "paper": {"hidden_size": 128, "factors": (2,) * 7},
    "balanced": {"hidden_size": 128, "factors": (8, 16)},
    "tiny": {"hidden_size": 32, "factors": (4, 8), "T": 20, "steps": 300},
}


@dataclass
class Config(TaskConfig):
    preset: str = "integrator"
    T: int = 200
    """Length of the sequences."""
    steps: int = 5000
    batch_size: int = 50
    run_dir: str = "runs/adding"


# Data


def sequences(count: int, T: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and marks `(count, T, 2)`, and sums `(count,)`."""
    values = torch.rand(count, T, generator=rng)
    rows, half = torch.arange(count), T // 2
    marks = torch.zeros(count, T)
    marks[rows, torch.randint(half, (count,), generator=rng)] = 1
    marks[rows, torch.randint(half, T, (count,), generator=rng)] = 1
    return torch.stack([values, marks], -1), (values * marks).sum(1)


def task(config: Config) -> Task:
    if config.T < 2:
        raise UserError(f"--T must be at least 2, one step for each mark, got {config.T}")
    held_out = {
        split: sequences(VALIDATION, config.T, generator(config.seed, place))
        for place, split in enumerate(("val", "test"), 1)
    }

    def evaluate(predict, split: str) -> dict[str, float]:
        inputs, targets = held_out[split]
        outputs = torch.cat([predict(part)[:, 0] for part in inputs.split(config.batch_size)])
        return {"loss_mse": nnf.mse_loss(outputs, targets).item()}

    return Task(
        input_size=2,
        output_size=1,
        length=config.T,
        last_only=True,
        batch=lambda step: sequences(config.batch_size, config.T, generator(config.seed, 0, step)),
        loss=lambda outputs, targets: nnf.mse_loss(outputs[:, 0], targets),
        evaluate=evaluate,
        unit="mse",
        best="loss_mse",
        baseline=BASELINE,
        statistics={"T": config.T, "sequences": "drawn"},
    )


# Main


def setup(argv: list[str] | None = None) -> tuple[Config, Task]:
    config = parse(Config, PRESETS, argv, __doc__)
    return config, task(config)


if __name__ == "__main__":
    run(setup)
