"""Polyphonic music: which of the 88 keys sound next?

    input    frames 0 … T-2 of a piano roll, 88 zeros and ones each
    target   frames 1 … T-1
    output   a probability per key; loss: sum of their negative log-likelihoods, mean over frames

    python train/tasks/music.py --data JSB_Chorales.mat
    python train/tasks/music.py --data Piano_midi.mat --segment-length 200 --run-dir runs/piano
    python train/tasks/music.py --data JSB_Chorales.mat --model lstm --run-dir runs/jsb-lstm

The data and its split are those of Boulanger-Lewandowski, Bengio and Vincent (ICML 2012): JSB
Chorales, Piano-midi, Nottingham or MuseData, as `.mat` files (traindata, validdata, testdata: cells
of T x 88 matrices), as the `.pickle` files of that paper (train, valid, test: lists of sequences of
lists of MIDI note numbers), or `hub:org/name` (splits train, validation, test with a column `notes`
of the same lists). Validation picks the weights, and ends the run.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of an import

import hashlib
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf

from kru_triton.nonlinearity import Nonlinearity
from kru_triton.train.run.settings import UserError
from kru_triton.train.tasks.loop import Task, epoch_batch, run
from kru_triton.train.tasks.settings import TaskConfig, parse

KEYS, LOWEST = 88, 21  # keys of a piano, MIDI number of the lowest
SPLITS = {"train": "train", "val": "valid", "test": "test"}  # ours to the files'
PADDING = -1.0  # target of frames that are not there

# Config

# Sizes of about equal parameters in all
PRESETS = {
    "balanced": {
        "hidden_size": 72,
        "num_layers": 2,
        "factors": (8, 9),
        "nonlinearity": "relu",
        "dropout": 0.5,
    },
    "krulstm": {"model": "krulstm", "hidden_size": 112, "factors": (8, 14)},
    "lstm": {"model": "lstm", "hidden_size": 70},
    "gru": {"model": "gru", "hidden_size": 84},
    "rnn": {"model": "rnn", "hidden_size": 145},
    "tiny": {"hidden_size": 16, "factors": (4, 4), "steps": 50},
}


@dataclass
class Config(TaskConfig):
    preset: str = "balanced"
    data: str = ""
    """A .mat or .pickle file, or hub:org/name."""
    segment_length: int = 200
    """Training sequences are cut into pieces of at most this many frames."""
    steps: int = 5000
    patience: int = 10
    batch_size: int = 16
    eval_every: int = 50
    nonlinearity: Nonlinearity = "tanh"
    lr: float = 3e-3
    recurrent_lr: float = 1e-3
    unitarity_weight: float = 0.0
    run_dir: str = "runs/music"


# Data


class _PlainUnpickler(pickle.Unpickler):
    """Lists, tuples, dicts, strings and numbers alone: a class or function is never looked up."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it would import {module}.{name}; only plain lists are read")


def read_pickle(path: Path) -> dict[str, list[np.ndarray]]:
    """Rolls of a pickle of lists of notes; nothing in it is run."""
    try:
        with open(path, "rb") as file:
            found = _PlainUnpickler(file, encoding="latin1").load()
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError) as error:
        raise UserError(f"--data {path}: not a pickle of plain lists: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"--data {path}: must hold a dict, got {type(found).__name__}")
    check_splits(path, found)
    return {ours: rolls_of_notes(path, found[name]) for ours, name in SPLITS.items()}


def check_splits(where: object, found) -> None:
    missing = [name for name in SPLITS.values() if name not in found]
    if missing:
        raise UserError(
            f"--data {where}: no {', '.join(missing)}; got {', '.join(map(str, found))}"
        )


def rolls_of_notes(where: object, sequences) -> list[np.ndarray]:
    """Lists of lists of MIDI numbers as T x 88 arrays of zeros and ones."""
    rolls = []
    for place, sequence in enumerate(sequences):
        roll = np.zeros((len(sequence), KEYS), dtype=np.uint8)
        for t, notes in enumerate(sequence):
            for note in notes:
                if not (isinstance(note, int) and LOWEST <= note < LOWEST + KEYS):
                    raise UserError(
                        f"--data {where}: sequence {place}, frame {t}: a note must be a whole "
                        f"number in {LOWEST} … {LOWEST + KEYS - 1}, got {note!r}"
                    )
                roll[t, note - LOWEST] = 1
        rolls.append(roll)
    return rolls


def read_mat(path: Path) -> dict[str, list[np.ndarray]]:
    try:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    except ModuleNotFoundError as error:
        raise UserError(f"--data {path}: needs scipy; pip install 'kru-triton[tasks]'") from error
    try:
        found = loadmat(path)
    except (MatReadError, ValueError, TypeError, NotImplementedError) as error:
        raise UserError(f"--data {path}: not a MATLAB file: {error}") from error
    check_splits(path, {key.removesuffix("data") for key in found})
    return {ours: list(found[f"{name}data"].ravel()) for ours, name in SPLITS.items()}


def read_hub(name: str) -> dict[str, list[np.ndarray]]:
    import datasets

    where = f"hub:{name}"
    try:
        found = datasets.load_dataset(name)
        names = {"train": "train", "val": "validation", "test": "test"}
        notes = {ours: list(found[theirs]["notes"]) for ours, theirs in names.items()}
    except (KeyError, ValueError, OSError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--data {where}: {reason}") from error
    return {split: rolls_of_notes(where, sequences) for split, sequences in notes.items()}


def read(data: str) -> tuple[dict[str, list[torch.Tensor]], dict]:
    """Rolls `(T, 88)` float of train, val and test, and statistics."""
    sha256 = None
    if data.startswith("hub:"):
        rolls = read_hub(data.removeprefix("hub:"))
    else:
        path = Path(data)
        kinds = {".mat": read_mat, ".pickle": read_pickle, ".pkl": read_pickle}
        if path.suffix not in kinds or not path.is_file():
            raise UserError(
                f"--data {data or '(nothing)'}: wants JSB_Chorales, Piano_midi, Nottingham or "
                "MuseData as .mat or .pickle (the piano rolls of Boulanger-Lewandowski et al., "
                "2012, on that paper's page), or hub:org/name"
            )
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        rolls = kinds[path.suffix](path)
    for split, sequences in rolls.items():
        check(data, split, sequences)
    parts = {
        split: [torch.from_numpy(np.asarray(roll, dtype=np.float32)) for roll in sequences]
        for split, sequences in rolls.items()
    }
    frames = {split: sum(map(len, sequences)) for split, sequences in parts.items()}
    return parts, {"data": Path(data).name, "sha256": sha256, "frames": frames}


def check(data: str, split: str, sequences: list[np.ndarray]) -> None:
    """Widths, values and lengths."""
    if not sequences:
        raise UserError(f"--data {data}: {split} has no sequences")
    for place, roll in enumerate(sequences):
        where = f"--data {data}: {split} sequence {place}"
        if roll.ndim != 2 or roll.shape[1] != KEYS:
            raise UserError(f"{where}: must be frames x {KEYS} keys, got shape {roll.shape}")
        if len(roll) < 2:
            raise UserError(f"{where}: needs a frame to predict after the first, got {len(roll)}")
        if not np.isin(roll, (0, 1)).all():
            raise UserError(f"{where}: must hold zeros and ones")


def padded(rolls: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets `(B, T - 1, 88)`, targets past the end of a roll PADDING."""
    inputs = [roll[:-1] for roll in rolls]
    targets = [roll[1:] for roll in rolls]
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(inputs, True), pad(targets, True, padding_value=PADDING)


def nats_of_frames(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Negative log-likelihood summed over the frames that are there, and their number."""
    there = targets[..., 0] != PADDING
    nats = nnf.binary_cross_entropy_with_logits(outputs[there], targets[there], reduction="sum")
    return nats, int(there.sum())


def task(config: Config) -> Task:
    if config.segment_length < 2:
        raise UserError(f"--segment-length must be at least 2, got {config.segment_length}")
    parts, statistics = read(config.data)
    pieces = [
        piece
        for roll in parts["train"]
        for piece in roll.split(config.segment_length)
        if len(piece) > 1
    ]

    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        indices = epoch_batch(len(pieces), config.batch_size, config.seed, step)
        return padded([pieces[i] for i in indices])

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        nats, frames = nats_of_frames(outputs, targets)
        return nats / frames

    def evaluate(predict, split: str) -> dict[str, float]:
        nats, frames = 0.0, 0
        rolls = sorted(parts[split], key=len)
        for start in range(0, len(rolls), 8):
            inputs, targets = padded(rolls[start : start + 8])
            more, count = nats_of_frames(predict(inputs), targets)
            nats, frames = nats + more.item(), frames + count
        return {"loss_nats": nats / frames}

    return Task(
        input_size=KEYS,
        output_size=KEYS,
        length=max(map(len, pieces)) - 1,
        last_only=False,
        batch=batch,
        loss=loss,
        evaluate=evaluate,
        unit="nats",
        best="loss_nats",
        statistics=statistics,
    )


# Main


def setup(argv: list[str] | None = None) -> tuple[Config, Task]:
    config = parse(Config, PRESETS, argv, __doc__)
    return config, task(config)


if __name__ == "__main__":
    run(setup)
