"""TIMIT: which phone is spoken in each 10 ms frame?

    input    log mel energies of 25 ms windows, their first and second differences, 120 numbers
    target   the phone at the middle of the window, 61 labels folded to 39

    python train/tasks/timit.py --data /data/TIMIT
    python train/tasks/timit.py --data /data/TIMIT --model lstm --run-dir runs/timit-lstm
    python train/tasks/timit.py --data /data/TIMIT --nonlinearity relu --run-dir runs/timit-relu

TIMIT is licensed (LDC93S1): `--data` is your own copy, with TRAIN/DR*/SPEAKER/SENTENCE.WAV (NIST
SPHERE or RIFF) and .PHN beside it, in capitals or not. The usual parts: all training speakers, 50
development speakers, the 24 speakers of the core test set, without the two SA sentences that all
speakers read. The folding is Lee and Hon's (1989); frames in a glottal stop q are not counted.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of an import

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf

from kru_triton.nonlinearity import Nonlinearity
from kru_triton.train.run.settings import UserError
from kru_triton.train.tasks.loop import Task, epoch_batch, run
from kru_triton.train.tasks.settings import TaskConfig, parse

RATE, WINDOW, HOP, MELS = 16000, 400, 160, 40  # samples and bands
DELTA_WIDTH = 9  # frames that a difference looks at
UNCOUNTED = -100  # target of frames past the end, and of q

CORE_TEST = str.split(
    "mdab0 mwbt0 felc0 mtas1 mwew0 fpas0 mjmp0 mlnt0 fpkt0 mlll0 mtls0 fjlm0 "
    "mbpm0 mklt0 fnlp0 mcmj0 mjdh0 fmgd0 mgrt0 mnjm0 fdhc0 mjln0 mpam0 fmld0"
)
DEVELOPMENT = str.split(
    "faks0 fdac1 fjem0 mgwt0 mjar0 mmdb1 mmdm2 mpdf0 fcmh0 fkms0 mbdg0 mbwm0 mcsh0 "
    "fadg0 fdms0 fedw0 mgjf0 mglb0 mrtk0 mtaa0 mtdt0 mthc0 mwjg0 fnmr0 frew0 fsem0 "
    "mbns0 mmjr0 mdls0 mdlf0 mdvc0 mers0 fmah0 fdrw0 mrcs0 mrjm4 fcal1 mmwh0 fjsj0 "
    "majc0 mjsw0 mreb0 fgjd0 fjmg0 mroa0 mteb0 mjfc0 mrjr0 fmml0 mrws1"
)

PHONES = str.split(
    "aa ae ah aw ay b ch d dh dx eh er ey f g hh ih iy jh k l m n ng ow oy p r s sh sil t th uh uw "
    "v w y z"
)
FOLDED = {
    "ao": "aa", "ax": "ah", "ax-h": "ah", "axr": "er", "hv": "hh", "ix": "ih", "el": "l",
    "em": "m", "en": "n", "nx": "n", "eng": "ng", "zh": "sh", "ux": "uw", "pcl": "sil",
    "tcl": "sil", "kcl": "sil", "bcl": "sil", "dcl": "sil", "gcl": "sil", "h#": "sil",
    "pau": "sil", "epi": "sil",
}  # fmt: skip

# Config

PRESETS = {
    "balanced": {"hidden_size": 256, "factors": (16, 16)},
    "kronecker": {"hidden_size": 256, "factors": (2,) * 8},
    "tiny": {"hidden_size": 16, "factors": (4, 4), "steps": 50},
}


@dataclass
class Config(TaskConfig):
    preset: str = "balanced"
    data: str = ""
    """Directory of TIMIT, with TRAIN and TEST in it."""
    steps: int = 20000
    patience: int = 10
    batch_size: int = 16
    eval_every: int = 200
    nonlinearity: Nonlinearity = "modtanh"
    lr: float = 3e-3
    recurrent_lr: float = 1e-3
    run_dir: str = "runs/timit"


# Data


def find(data: str) -> dict[str, list[Path]]:
    """Audio files of train, val and test, in order."""
    root = Path(data)
    wanted = (
        f"--data {data or '(nothing)'}: wants your licensed copy of TIMIT (LDC93S1): "
        "TRAIN/DR*/SPEAKER/SENTENCE.WAV with .PHN files, and TEST likewise; "
    )
    if not data or not root.is_dir():
        raise UserError(wanted + "there is no such directory")
    parts = {"train": [], "val": [], "test": []}
    for path in sorted(root.rglob("*"), key=lambda path: str(path).lower()):
        folders = [folder.lower() for folder in path.relative_to(root).parts[:-1]]
        if path.suffix.lower() != ".wav" or len(folders) < 3 or path.stem.lower()[:2] == "sa":
            continue
        part, speaker = folders[-3], folders[-1]
        if part == "train":
            parts["train"].append(path)
        elif part == "test" and speaker in DEVELOPMENT:
            parts["val"].append(path)
        elif part == "test" and speaker in CORE_TEST:
            parts["test"].append(path)
    names = {"train": "TRAIN", "val": "TEST (development speakers)", "test": "TEST (core test)"}
    missing = [names[split] for split, paths in parts.items() if not paths]
    if missing:
        raise UserError(f"{wanted}nothing found for {', '.join(missing)}")
    return parts


def read_labels(path: Path) -> list[tuple[int, int, str]]:
    """First sample, end and folded phone of each segment of the `.PHN` file of an audio file."""
    beside = [path.with_suffix(suffix) for suffix in (".PHN", ".phn")]
    label_file = next((path for path in beside if path.exists()), None)
    if label_file is None:
        raise UserError(f"{path} has no labels: {beside[0].name} should be beside it")
    segments = []
    for number, line in enumerate(label_file.read_text().splitlines(), 1):
        try:
            start, end, phone = line.split()
            start, end = int(start), int(end)
        except ValueError as error:
            raise UserError(
                f"{label_file}, line {number}: must be START END PHONE, got {line!r}"
            ) from error
        phone = FOLDED.get(phone, phone)
        if phone not in PHONES and phone != "q":
            raise UserError(f"{label_file}, line {number}: no phone of TIMIT: {phone!r}")
        segments.append((start, end, phone))
    if not segments:
        raise UserError(f"{label_file} holds no labels")
    return segments


def features(path: Path) -> np.ndarray:
    """`(T, 3·MELS)`: log mel energies and their first and second differences."""
    import soundfile
    from scipy.signal import savgol_filter
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

    try:
        wave, rate = soundfile.read(path)
    except soundfile.SoundFileError as error:
        raise UserError(f"{path}: cannot be read as SPHERE or WAV: {error}") from error
    if rate != RATE or wave.ndim != 1:
        raise UserError(f"{path}: must be one channel at {RATE} Hz, got {wave.shape} at {rate} Hz")
    if len(wave) < WINDOW + (DELTA_WIDTH - 1) * HOP:
        raise UserError(f"{path}: too short, {len(wave)} samples")
    mel = spectrogram(
        wave,
        window_function(WINDOW, "hann"),
        WINDOW,
        HOP,
        fft_length=512,
        power=2.0,
        center=False,
        mel_filters=mel_filter_bank(257, MELS, 0.0, RATE / 2, RATE, mel_scale="htk"),
        log_mel="log",
    ).T
    slopes = [savgol_filter(mel, DELTA_WIDTH, n, deriv=n, axis=0) for n in (1, 2)]
    return np.concatenate([mel, *slopes], 1).astype(np.float32)


def targets(segments: list[tuple[int, int, str]], frames: int) -> np.ndarray:
    """The phone at the middle of each frame, an index into PHONES or UNCOUNTED."""
    middles = np.arange(frames) * HOP + WINDOW // 2
    result = np.full(frames, UNCOUNTED, dtype=np.int64)
    for start, end, phone in segments:
        if phone != "q":
            result[(middles >= start) & (middles < end)] = PHONES.index(phone)
    return result


def read(data: str) -> tuple[dict[str, list[tuple[torch.Tensor, torch.Tensor]]], dict]:
    """Features `(T, 3·MELS)` and targets `(T,)` of every utterance of train, val and test."""
    parts = {}
    digest = hashlib.sha256()
    for split, paths in find(data).items():
        parts[split] = []
        for path in paths:
            segments = read_labels(path)
            x = features(path)
            digest.update(path.read_bytes() + repr(segments).encode())
            parts[split].append((x, targets(segments, len(x))))
    stacked = np.concatenate([x for x, _ in parts["train"]])
    mean, std = stacked.mean(0), stacked.std(0) + 1e-5
    tensors = {
        split: [(torch.from_numpy((x - mean) / std), torch.from_numpy(y)) for x, y in utterances]
        for split, utterances in parts.items()
    }
    counts = {split: len(utterances) for split, utterances in parts.items()}
    return tensors, {"data": "TIMIT", "sha256": digest.hexdigest(), "utterances": counts}


def padded(utterances: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, ...]:
    pad = torch.nn.utils.rnn.pad_sequence
    xs, ys = zip(*utterances)
    return pad(xs, True), pad(ys, True, padding_value=UNCOUNTED)


def task(config: Config) -> Task:
    parts, statistics = read(config.data)

    def batch(step: int) -> tuple[torch.Tensor, ...]:
        indices = epoch_batch(len(parts["train"]), config.batch_size, config.seed, step)
        return padded([parts["train"][i] for i in indices])

    def loss(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nnf.cross_entropy(outputs.flatten(0, 1), y.flatten(), ignore_index=UNCOUNTED)

    def evaluate(predict, split: str) -> dict[str, float]:
        nats, right, count = 0.0, 0, 0
        for start in range(0, len(parts[split]), config.batch_size):
            x, y = padded(parts[split][start : start + config.batch_size])
            outputs, there = predict(x), y != UNCOUNTED
            nats += nnf.cross_entropy(outputs[there], y[there], reduction="sum").item()
            right += int((outputs.argmax(-1) == y)[there].sum())
            count += int(there.sum())
        return {"loss_nats": nats / count, "accuracy": right / count}

    return Task(
        input_size=3 * MELS,
        output_size=len(PHONES),
        length=max(len(y) for _, y in parts["train"]),
        last_only=False,
        batch=batch,
        loss=loss,
        evaluate=evaluate,
        unit="nats",
        best="accuracy",
        higher=True,
        statistics=statistics,
    )


# Main


def setup(argv: list[str] | None = None) -> tuple[Config, Task]:
    config = parse(Config, PRESETS, argv, __doc__)
    return config, task(config)


if __name__ == "__main__":
    run(setup)
