"""State tracking: what a simple rule makes of all symbols so far, on lengths never trained on.

    parity     0 1 1 0 1            1 if the ones so far are odd in number
    modular    2 * 4 - 3 * 3        value so far, modulo 5: 2, 3, 0, 4 after the numbers
    s3, s5     a b c d e            product so far of permutations of three or five things
    s5-swaps   a b c d e            the same, where every symbol swaps two of five things or none

    python train/tasks/state_tracking.py --task s3
    python train/tasks/state_tracking.py --task s5 --model lstm --run-dir runs/s5-lstm
    python train/tasks/state_tracking.py --task parity --nonlinearity identity --run-dir runs/linear

Every task is a finite automaton, and a model that has found it is right at any length. Trained on
up to `--train-length` symbols, tested on `--test-length`; all are one-hot and equally likely. Each
batch has one length (odd for modular). `--lengths cited --asked cited` trains as given here:

    parity, modular   Delétang et al., *Neural Networks and the Chomsky Hierarchy*, 2022 (arXiv
                      2207.02098): asked for is the answer after the last symbol alone; lengths
                      uniform from 1 on; + - * with the usual precedence, no brackets
    s3, s5            the word problem of Merrill, Petty and Sabharwal, *The Illusion of State in
                      State-Space Models*, 2024 (arXiv 2404.08819): each symbol is an element of the
                      group, and the product of all so far is asked for after every symbol; all of
                      `--train-length`

With swaps alone S5 has 11 symbols, hence 1,320 products to learn, where s5 has 14,400.

Models read from left to right, so one pass over `--test-length` symbols answers for every shorter
sequence, too. `last_n` is the share of right answers after symbol n (the number before it, where n
falls on an operator), `accuracy_n` the share among all answers up to there. The weights tested are
those of the lowest loss on validation sequences of `--train-length` symbols.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of an import

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as nnf
from torch import Tensor

from kru_triton.train.run.settings import UserError
from kru_triton.train.tasks.loop import Task, generator, run
from kru_triton.train.tasks.settings import TaskConfig, parse

MODULUS = 5
PLUS, MINUS, TIMES = MODULUS, MODULUS + 1, MODULUS + 2
NOT_ASKED = -100  # what cross_entropy leaves out
LENGTHS = (20, 40, 64, 128, 256, 512)  # reported where --test-length reaches them
HELD_OUT = 512  # sequences for validation, and as many for the test

# Config

# Factors must leave what they start as, and soon: a unitary matrix forgets nothing
PRESETS = {
    "balanced": {"hidden_size": 64, "num_layers": 2, "factors": (8, 8)},
    "gated": {  # a recurrent matrix for every symbol
        "hidden_size": 128,
        "factors": (2, 64),  # right for longer than 4 and 32, 8 and 16, or 128 alone
        "nonlinearity": "tanh",
        "state_gate": "modtanh",
        "batch_size": 256,
        "steps": 16000,
    },
    "tiny": {"hidden_size": 16, "factors": (4, 4), "train_length": 6, "test_length": 20},
}


@dataclass
class Config(TaskConfig):
    preset: str = "balanced"
    task: Literal["parity", "modular", "s3", "s5", "s5-swaps"] = "parity"
    """What is asked for: see above."""
    train_length: int = 40
    """Longest training sequence, in symbols."""
    test_length: int = 512
    """Length of the test sequences."""
    lengths: Literal["growing", "log-uniform", "cited"] = "growing"
    """Of each training batch: log-uniform from 2 up to a limit, which grows to --train-length over
    the first half of --steps (many models find the rule so alone); log-uniform up to --train-length
    from the start; or as in the work cited above."""
    asked: Literal["all", "cited"] = "all"
    """Answers in training: after every symbol that has one, which is the quicker to learn from; or
    as in the work cited above."""
    steps: int = 8000
    batch_size: int = 64
    lr: float = 1e-2
    recurrent_lr: float = 3e-3
    unitarity_weight: float = 0.0
    eval_every: int = 500
    run_dir: str = "runs/state"


# Data


def parity(count: int, length: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Symbols and answers `(count, length)`, as all tasks here."""
    bits = torch.randint(2, (count, length), generator=rng)
    return bits, bits.cumsum(1) % 2


def modular(count: int, length: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Numbers are 0 … 4, operators 5 … 7; there is no answer after an operator."""
    symbols = torch.randint(PLUS, TIMES + 1, (count, length), generator=rng)
    symbols[:, ::2] = torch.randint(MODULUS, (count, (length + 1) // 2), generator=rng)
    return symbols, values(symbols)


def values(symbols: Tensor) -> Tensor:
    """What the expressions in `symbols (count, length)` are worth so far."""
    answers = torch.full_like(symbols, NOT_ASKED)
    total, term = torch.zeros_like(symbols[:, 0]), symbols[:, 0]  # all terms but the last; it
    answers[:, 0] = term
    for place in range(2, symbols.shape[1], 2):
        operator, number = symbols[:, place - 1], symbols[:, place]
        times = operator == TIMES
        total = torch.where(times, total, total + term)
        term = torch.where(times, term * number, torch.where(operator == MINUS, -number, number))
        term = term % MODULUS
        answers[:, place] = (total + term) % MODULUS
    return answers


class Permutations:
    """The word problem of the symmetric group: `(count, length, rng)` -> symbols and answers.

    An element is the index of its permutation in lexicographic order, and x_1 … x_t stands for the
    permutation that takes i to x_1(… x_t(i)). Symbols are the elements that move at most `moved`
    things.
    """

    def __init__(self, things: int, moved: int = 5):
        self.elements = torch.tensor(list(itertools.permutations(range(things))))
        places = torch.arange(things)
        weights = things**places
        products = self.elements[:, self.elements] @ weights  # (first, second) as one number each
        index = torch.zeros(int(products.max()) + 1, dtype=torch.int64)
        index[self.elements @ weights] = torch.arange(len(self.elements))
        self.table = index[products]
        self.symbols = ((self.elements != places).sum(1) <= moved).nonzero().flatten()

    def __call__(self, count: int, length: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        symbols = torch.randint(len(self.symbols), (count, length), generator=rng)
        first, *others = self.symbols[symbols].unbind(1)
        answers = [first]
        for element in others:
            answers.append(self.table[answers[-1], element])
        return symbols, torch.stack(answers, 1)


# name: how many symbols there are, answers there are, what draws them, answers after the last alone
TASKS = {
    "parity": (2, 2, parity, True),
    "modular": (MODULUS + 3, MODULUS, modular, True),
    "s3": (6, 6, Permutations(3), False),
    "s5": (120, 120, Permutations(5), False),
    "s5-swaps": (11, 120, Permutations(5, moved=2), False),
}


def task(config: Config) -> Task:
    for name in ("train_length", "test_length"):
        value = getattr(config, name)
        if value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if config.test_length < config.train_length:
        raise UserError(
            f"--test-length must be at least --train-length ({config.train_length}), got "
            f"{config.test_length}"
        )
    if config.lengths == "growing" and not config.steps:
        raise UserError(
            "--lengths growing needs --steps, to grow over half of them; or --lengths log-uniform"
        )
    symbol_count, answer_count, draw, last_alone = TASKS[config.task]

    def one_hot(symbols: Tensor) -> Tensor:
        return nnf.one_hot(symbols, symbol_count).float()

    def batch(step: int) -> tuple[Tensor, Tensor]:
        rng, length = generator(config.seed, 0, step), config.train_length
        if config.lengths in ("log-uniform", "growing"):
            share = torch.rand((), generator=rng).item()
            if config.lengths == "growing":
                share *= min(1.0, 2 * step / config.steps)
            length = min(length, round(2 * (length / 2) ** share))
        elif last_alone:
            length = int(torch.randint(1, length + 1, (), generator=rng))
        if config.task == "modular":
            length -= length % 2 == 0
        symbols, answers = draw(config.batch_size, length, rng)
        if last_alone and config.asked == "cited":
            answers[:, :-1] = NOT_ASKED
        return one_hot(symbols), answers

    def loss(outputs: Tensor, answers: Tensor) -> Tensor:
        return nnf.cross_entropy(outputs.flatten(0, 1), answers.flatten(), ignore_index=NOT_ASKED)

    held_out = {
        "val": draw(HELD_OUT, config.train_length, generator(config.seed, 1)),
        "test": draw(HELD_OUT, config.test_length, generator(config.seed, 2)),
    }

    def evaluate(predict, split: str) -> dict[str, float]:
        symbols, answers = held_out[split]
        known, guesses, nats = config.train_length, [], 0.0
        for part, asked in zip(*(x.split(config.batch_size) for x in (symbols, answers))):
            outputs = predict(one_hot(part))
            guesses.append(outputs.argmax(-1))
            nats += loss(outputs[:, :known], asked[:, :known]).item() * len(part)
        right = (torch.cat(guesses) == answers).double().mean(0)  # after every symbol
        places = (answers[0] != NOT_ASKED).nonzero().flatten()
        lengths = (n for n in LENGTHS if n <= config.test_length) if split == "test" else ()
        measures = {"loss_nats": nats / len(symbols)}
        for n in sorted({known, *lengths}):
            upto = right[places[places < n]]
            measures |= {f"accuracy_{n}": upto.mean().item(), f"last_{n}": upto[-1].item()}
        return measures

    return Task(
        input_size=symbol_count,
        output_size=answer_count,
        length=config.train_length,
        last_only=False,
        batch=batch,
        loss=loss,
        evaluate=evaluate,
        unit="nats",
        best="loss_nats",
        statistics={
            "task": config.task,
            "answers": answer_count,
            "train_length": config.train_length,
            "test_length": config.test_length,
            "sequences": "drawn",
        },
    )


# Main


def setup(argv: list[str] | None = None) -> tuple[Config, Task]:
    config = parse(Config, PRESETS, argv, __doc__)
    return config, task(config)


if __name__ == "__main__":
    run(setup)
