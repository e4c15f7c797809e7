"""The paper's tasks: data, models, the shared loop, and the scripts as a user runs them."""

import dataclasses
import gzip
import json
import math
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf

from kru_triton import KRU
from kru_triton.lm.model import LanguageModel
from kru_triton.lm.presets import PRESETS, LanguageModelConfig
from kru_triton.train import reproduce
from kru_triton.train.run import checkpoints
from kru_triton.train.run import run as run_module
from kru_triton.train.run.device import device_name
from kru_triton.train.run.settings import UserError, model_settings, parse, unused
from kru_triton.train.tasks import adding, copy_memory, music, pixel_mnist, state_tracking, timit
from kru_triton.train.tasks import loop as task_loop
from kru_triton.train.tasks.models import (
    RECURRENT_RATE_TIMES_LENGTH,
    SequenceModel,
    parameter_groups,
)
from kru_triton.train.tasks.settings import parse as parse_task
from kru_triton.train.text.tokenizer import character_tokenizer

TRAIN = Path(__file__).parents[1] / "train"
MODELS = (
    *("kru", "krulstm", "rnn", "lstm", "gru", "mingru", "unitary", "orthogonal", "transformer"),
)
FAST = "--wandb disabled --no-pictures --device cpu --backend torch"
TOY_COPY = f"--preset tiny --T 5 --hidden-size 16 --factors 4 4 --batch-size 16 {FAST}"


def start(script, flags):
    command = [sys.executable, str(TRAIN / script), *shlex.split(flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes)


def run(script, flags, code=0):
    process = start(script, flags)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, out + err
    return out, err


def train(script, flags, run_dir):
    """Train here; the exit code and the summary."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        code = task_loop.train(*script.setup(shlex.split(f"{flags} --run-dir {run_dir}")))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    path = run_dir / "summary.json"
    return code, json.loads(path.read_text()) if path.exists() else None


def rows(run_dir):
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "steps_s"} for row in found]


# Data


def test_copy_sequences_are_those_of_the_protocol():
    T = 12
    inputs, targets = copy_memory.sequences(50, T, torch.Generator().manual_seed(0))
    assert inputs.shape == (50, T + 20, 10)
    assert (inputs.sum(-1) == 1).all()
    inputs = inputs.argmax(-1)
    assert set(inputs[:, :10].unique().tolist()) == set(range(1, 9))
    assert (inputs[:, 10 : T + 9] == 0).all()
    assert (inputs[:, T + 9] == 9).all()
    assert (inputs[:, T + 10 :] == 0).all()
    assert (targets[:, :-10] == 0).all()
    assert torch.equal(targets[:, -10:], inputs[:, :10])


def test_copy_fraction_of_the_memoryless_predictor_is_one():
    _, task = copy_memory.setup(shlex.split("--T 7"))

    def memoryless(x):
        """Blanks are certain, then eight symbols are equally likely."""
        logits = torch.full((*x.shape[:2], 10), -1e4)
        logits[:, :-10, 0] = 0
        logits[:, -10:, 1:9] = 0
        return logits

    measures = task.evaluate(memoryless, "test")
    assert measures["fraction"] == pytest.approx(1, rel=1e-5)
    assert measures["loss_nats"] == pytest.approx(10 * math.log(8) / 27, rel=1e-5)
    assert measures["recall"] == pytest.approx(1 / 8, abs=0.03)


def test_adding_marks_one_number_in_each_half():
    inputs, targets = adding.sequences(200, 9, torch.Generator().manual_seed(0))
    values, marks = inputs.unbind(-1)
    assert (marks[:, :4].sum(1) == 1).all()
    assert (marks[:, 4:].sum(1) == 1).all()
    assert torch.equal(targets, (values * marks).sum(1))
    assert ((values >= 0) & (values < 1)).all()


def test_always_one_has_the_baseline_of_adding():
    _, task = adding.setup(["--T", "20"])
    measures = task.evaluate(lambda x: torch.ones(len(x), 1), "val")
    assert measures["loss_mse"] == pytest.approx(task.baseline, rel=0.1)


def test_batches_depend_on_seed_and_step_alone():
    scripts = {copy_memory: "--T 6", adding: "--T 6"}
    scripts[state_tracking] = "--task modular --test-length 50"
    for script, flags in scripts.items():

        def batch_of(seed, script=script, flags=flags):
            return script.setup([*flags.split(), "--seed", seed])[1].batch

        batch = batch_of("3")
        first, other = batch(5)[0], batch_of("3")
        batch(6)
        assert torch.equal(first, batch(5)[0])
        assert torch.equal(first, other(5)[0])
        assert not torch.equal(first, batch(6)[0])
        assert not torch.equal(first, batch_of("4")(5)[0])


def test_values_of_expressions_are_pythons():
    symbols, answers = state_tracking.modular(40, 12, torch.Generator().manual_seed(0))
    for row, values in zip(symbols.tolist(), answers.tolist()):
        text = "".join(str(s) if s < 5 else "+-*"[s - 5] for s in row)
        assert values[::2] == [eval(text[: place + 1]) % 5 for place in range(0, 12, 2)]
        assert set(values[1::2]) == {state_tracking.NOT_ASKED}
    assert set(symbols.flatten().tolist()) == set(range(8))


def test_word_problems_are_products_of_permutation_matrices():
    for things, order in ((3, 6), (5, 120)):
        draw = state_tracking.Permutations(things)
        symbols, answers = draw(4, 9, torch.Generator().manual_seed(0))
        # column i of a permutation's matrix has its one at what i is taken to
        matrices = torch.eye(things, dtype=torch.int64)[draw.elements].mT
        assert len(matrices.flatten(1).unique(dim=0)) == order
        for row, values in zip(symbols, answers):
            product = torch.eye(things, dtype=torch.int64)
            for symbol, value in zip(row, values):
                product = product @ matrices[symbol]
                assert torch.equal(matrices[value], product)


@pytest.mark.parametrize("nonlinearity", ["relu", "modrelu"])
@pytest.mark.parametrize("things", [3, 5])
def test_a_kru_can_multiply_permutations_at_any_length(things, nonlinearity):
    """Unit (v, (i, j)) is 1 where the product so far takes j to v and the next one i to j."""
    draw = state_tracking.Permutations(things)
    symbols, answers = draw(3, 512, torch.Generator().manual_seed(0))
    units = things**3
    kru = KRU(
        len(draw.elements),
        units,
        factors=(things, things**2),
        field="real",
        nonlinearity=nonlinearity,
    )
    eye = torch.eye(things)
    takes = eye[draw.elements]  # (elements, i, j): 1 where i goes to j
    here = takes.flatten(1).mT.repeat(things, 1)  # (units, elements)
    # what (v, (j, any)) sum to goes to (v, (i, j)) for every i
    sums = eye[None, :, :, None].expand(things, -1, -1, things).reshape(1, 1, things**2, -1)
    with torch.no_grad():
        kru.factor0_l0.copy_(eye)
        kru.factor1_l0.copy_(sums)
        kru.weight_ih_l0.copy_(here)
        kru.bias_l0.fill_(-1 if nonlinearity == "relu" else 0)
        if nonlinearity == "modrelu":
            kru.beta_l0.fill_(-1)
        identity = (eye[:, :, None] * eye[:, None, :]).reshape(1, 1, units).repeat(1, 3, 1)
        h, _ = kru(nnf.one_hot(symbols.mT, len(draw.elements)).float(), identity)
    products = h.unflatten(-1, (things, things, things)).sum(-1)  # (T, B, v, i)
    assert torch.equal(products, takes[answers.mT].mT)


def test_s5_from_swaps_follows_five_things_that_change_places():
    symbols_, _, draw, _ = state_tracking.TASKS["s5-swaps"]
    symbols, answers = draw(20, 30, torch.Generator().manual_seed(0))
    assert symbols.max() < symbols_ == len(draw.symbols)
    for word, products in zip(symbols, answers):
        takes = list(range(5))
        for symbol, product in zip(word, products):
            swap = draw.elements[draw.symbols[symbol]].tolist()
            assert sum(i != j for i, j in enumerate(swap)) in (0, 2)
            takes = [takes[i] for i in swap]
            assert draw.elements[product].tolist() == takes


@pytest.mark.parametrize("name", ["parity", "modular", "s3", "s5", "s5-swaps"])
def test_state_tracking_asks_what_its_protocol_says(name):
    flags = ["--task", name, "--train-length", "9", "--test-length", "40", "--batch-size", "5"]
    flags += ["--lengths", "cited", "--asked", "cited"]
    _, task = state_tracking.setup(flags)
    assert (task.length, task.input_size) == (9, state_tracking.TASKS[name][0])
    batches = [task.batch(step) for step in range(60)]
    lengths = {x.shape[1] for x, _ in batches}
    group = name not in ("parity", "modular")
    expected = {9} if group else set(range(1, 10, 2 if name == "modular" else 1))
    assert lengths == expected
    for x, answers in batches:
        assert x.shape == (5, answers.shape[1], task.input_size)
        assert (answers[:, -1] >= 0).all()
        assert (answers[:, -1] < task.output_size).all()
        assert ((answers[:, :-1] >= 0) == group).all()


def test_all_answers_of_a_batch_are_asked_for_unless_as_cited():
    for name, (*_, draw, _) in state_tracking.TASKS.items():
        _, task = state_tracking.setup(["--task", name])
        x, answers = task.batch(7999)
        if name == "parity":
            assert torch.equal(answers, x.argmax(-1).cumsum(1) % 2)
        assert ((answers >= 0).all(0) == (draw(1, x.shape[1], torch.Generator())[1][0] >= 0)).all()


def test_lengths_are_log_uniform_from_two_on():
    flags = ["--task", "s3", "--train-length", "32", "--test-length", "40", "--batch-size", "1"]
    _, task = state_tracking.setup([*flags, "--lengths", "log-uniform"])
    lengths = torch.tensor([task.batch(step)[0].shape[1] for step in range(400)])
    assert (lengths.min(), lengths.max()) == (2, 32)
    assert (lengths <= 8).double().mean() == pytest.approx(0.5, abs=0.1)  # the middle of 2 and 32


def test_growing_lengths_reach_all_of_them_in_the_first_half():
    flags = ["--task", "s3", "--train-length", "32", "--test-length", "40", "--batch-size", "1"]
    _, task = state_tracking.setup([*flags, "--steps", "1200"])
    lengths = [task.batch(step)[0].shape[1] for step in range(1200)]
    assert 6 <= max(lengths[:300]) <= 8  # half of the way, by ratios, to 32
    assert max(lengths[:600]) > 25
    late = torch.tensor(lengths[600:])
    assert (late <= 8).double().mean() == pytest.approx(0.5, abs=0.1)
    with pytest.raises(UserError, match="--lengths growing needs --steps"):
        state_tracking.setup([*flags, "--steps", "0", "--minutes", "1"])


@pytest.mark.parametrize("name", ["parity", "modular", "s3"])
def test_state_tracking_measures_every_length_of_one_pass(name):
    """A predictor that is right up to symbol 40 of 70, and never after it."""
    config, task = state_tracking.setup(["--task", name, "--test-length", "70"])
    draw = state_tracking.TASKS[name][2]
    symbols, answers = draw(512, 70, task_loop.generator(config.seed, 2))

    def predict(x):
        here = next(row for row in range(512) if torch.equal(x.argmax(-1)[0], symbols[row]))
        guesses = answers[here : here + len(x)].clone()
        guesses[:, 40:] = (guesses[:, 40:] + 1) % task.output_size
        return torch.nn.functional.one_hot(guesses.clamp(min=0), task.output_size) * 100.0

    measures = task.evaluate(predict, "test")
    assert measures.pop("loss_nats") < 1e-6
    shares = {20: 1, 40: 1, 64: 20 / 32 if name == "modular" else 40 / 64}
    expected = {f"accuracy_{n}": pytest.approx(share) for n, share in shares.items()}
    assert measures == expected | {"last_20": 1, "last_40": 1, "last_64": 0}


def test_an_epoch_reads_each_example_once():
    steps = [task_loop.epoch_batch(10, 3, seed=1, step=step) for step in range(6)]
    for epoch in (steps[:3], steps[3:]):
        seen = torch.cat(epoch).tolist()
        assert len(set(seen)) == 9
        assert set(seen) <= set(range(10))
    assert torch.cat(steps[:3]).tolist() != torch.cat(steps[3:]).tolist()
    assert task_loop.epoch_batch(2, 8, seed=0, step=7).sort().values.tolist() == [0, 1]


@pytest.fixture(scope="module")
def mnist_file(tmp_path_factory):
    """Twelve images per digit; pixel k of an image of digit d is bright where k % 10 = d."""
    draw = np.random.default_rng(0)
    digits = draw.permutation(np.repeat(np.arange(10), 12))
    images = draw.integers(0, 50, (120, 784))
    images[np.arange(784) % 10 == digits[:, None]] = 255
    path = tmp_path_factory.mktemp("mnist") / "images.csv.gz"
    table = np.concatenate([images, digits[:, None]], 1)
    text = "\n".join(",".join(map(str, row)) for row in table)
    path.write_bytes(gzip.compress(text.encode()))
    return path


def test_pixel_mnist_splits_by_digit_and_permutes(mnist_file):
    config, task = pixel_mnist.setup(["--data", str(mnist_file)])
    parts, facts = pixel_mnist.read(str(mnist_file))
    assert {split: len(digits) for split, (_, digits) in parts.items()} == {
        "train": 100,
        "val": 10,
        "test": 10,
    }
    assert parts["test"][1].bincount().tolist() == [1] * 10
    assert len({tuple(image.tolist()) for images, _ in parts.values() for image in images}) == 120
    assert facts["sha256"] == task.statistics["sha256"]

    images, digits = task.batch(3)
    assert images.shape == (config.batch_size, 784, 1)
    assert images.max() == 1
    for image, digit in zip(images[:5, :, 0], digits):
        assert (image[digit::10] == 1).all()
    permuted, same = pixel_mnist.setup(["--data", str(mnist_file), "--permuted"])[1].batch(3)
    assert torch.equal(digits, same)
    assert not torch.equal(images, permuted)
    assert torch.equal(images.sort(1).values, permuted.sort(1).values)
    reseeded, _ = pixel_mnist.setup(["--data", str(mnist_file), "--permuted", "--seed", "9"])[
        1
    ].batch(3)
    order = {tuple(column): k for k, column in enumerate(permuted[..., 0].T.tolist())}
    assert len(order) > 700  # columns of random pixels tell positions apart
    assert reseeded.shape == permuted.shape


def test_mnist_of_the_wrong_shape_or_values(tmp_path):
    def write(text):
        path = tmp_path / "images.csv"
        path.write_text(text)
        return str(path)

    with pytest.raises(UserError, match="784 pixels and the digit, 785 numbers, got 3"):
        pixel_mnist.read(write("0,0,1\n0,0,2\n"))
    with pytest.raises(UserError, match="digits must be whole numbers in 0 … 9"):
        pixel_mnist.read(write(",".join(["0"] * 784 + ["10"])))
    with pytest.raises(UserError, match="pixels must be whole numbers in 0 … 255"):
        pixel_mnist.read(write(",".join(["256"] * 784 + ["1"])))
    with pytest.raises(UserError, match="at least 10 images of every digit, got 1 of 0"):
        pixel_mnist.read(write(",".join(["0"] * 785)))
    with pytest.raises(UserError, match="cannot be read"):
        pixel_mnist.read(write("a,b\n"))
    with pytest.raises(UserError, match=r"--data .*: there is no such file or directory; give"):
        pixel_mnist.read(str(tmp_path / "missing.csv"))


def write_idx(path, array):
    """An idx file of bytes, by the format's own description."""
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    content = head + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def idx_folder(tmp_path):
    """Twenty images per digit to train on, gzipped, and ten to test on, plain."""
    draw, folder = np.random.default_rng(1), tmp_path / "MNIST"
    folder.mkdir()
    for prefix, count, suffix in (("train", 20, ".gz"), ("t10k", 10, "")):
        digits = draw.permutation(np.repeat(np.arange(10), count))
        images = draw.integers(0, 256, (len(digits), 28, 28))
        images[:, 0, 0] = digits
        write_idx(folder / f"{prefix}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{suffix}", digits)
    return folder


def test_mnist_of_idx_files_and_from_two_places(idx_folder, mnist_file):
    def sizes(parts):
        for images, digits in parts.values():
            assert images.shape == (len(digits), 784)
            assert (images.dtype, digits.dtype) == (torch.uint8, torch.int64)
        whole = torch.cat([images for images, _ in parts.values()])
        assert len(whole.unique(dim=0)) == len(whole)
        return {split: len(digits) for split, (_, digits) in parts.items()}

    whole, facts = pixel_mnist.read(str(idx_folder))
    assert sizes(whole) == {"train": 180, "val": 20, "test": 100}
    assert all(torch.equal(images[:, 0].long(), digits) for images, digits in whole.values())
    assert facts["data"] == "MNIST"

    with_csv, facts = pixel_mnist.read(str(idx_folder), str(mnist_file))  # 12 images a digit
    assert sizes(with_csv) == {"train": 180, "val": 20, "test": 120}
    assert with_csv["val"][1].bincount().tolist() == [2] * 10
    assert (facts["test_data"], facts["test"]) == ("images.csv.gz", 120)

    for name in ("images-idx3", "labels-idx1"):
        (idx_folder / f"train-{name}-ubyte.gz").unlink()
    only_test = str(idx_folder)  # as a user has it who was given the test part alone
    to_train, _ = pixel_mnist.read(only_test, str(mnist_file))
    assert sizes(to_train) == {"train": 90, "val": 10, "test": 120}
    to_test, _ = pixel_mnist.read(str(mnist_file), only_test)
    assert sizes(to_test) == {"train": 110, "val": 10, "test": 100}
    assert torch.equal(to_test["test"][0], whole["test"][0])

    with pytest.raises(UserError, match=r"--data .*: holds MNIST's test images alone; give --test"):
        pixel_mnist.read(only_test)
    with pytest.raises(UserError, match=r"--test .*: 100 of its 100 images are among those of --d"):
        pixel_mnist.read(only_test, only_test)


def test_idx_files_that_cannot_be_used(idx_folder, mnist_file):
    images, labels = (idx_folder / f"t10k-{name}-ubyte" for name in ("images-idx3", "labels-idx1"))
    good, packed = images.read_bytes(), gzip.compress(images.read_bytes())
    cases = [
        (
            images,
            good[:-1],
            r"must be an idx file of bytes, got 78399 .* 00 00 08 03 .*100, 28, 28",
        ),
        (images, good[:2] + b"\x0d" + good[3:], "must be an idx file of bytes, .* 00 00 0d 03"),
        (images, good[:3], "cannot be read as an idx file"),
        (labels, labels.read_bytes()[:-1] + b"\x0a", "digits must be whole numbers in 0 … 9"),
    ]
    for path, content, message in cases:
        before = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"--data {idx_folder}.*{message}"):
            pixel_mnist.read(str(idx_folder))
        path.write_bytes(before)
    write_idx(labels, np.zeros(99))
    with pytest.raises(UserError, match=r"28 x 28 and .* got \(100, 28, 28\) and \(99,\)"):
        pixel_mnist.read(str(idx_folder))
    labels.unlink()
    with pytest.raises(UserError, match="t10k-labels-idx1-ubyte must both be there"):
        pixel_mnist.read(str(idx_folder))
    images.unlink()
    (idx_folder / f"{images.name}.gz").write_bytes(packed[:-9])
    write_idx(idx_folder / f"{labels.name}.gz", np.zeros(100))
    with pytest.raises(UserError, match=r"--test .*gz: cannot be read as an idx file"):
        pixel_mnist.read(str(mnist_file), str(idx_folder))
    broken = bytearray(mnist_file.read_bytes())
    broken[40:60] = bytes(20)  # a broken stream, which zlib names
    (idx_folder / "images.csv.gz").write_bytes(broken)
    with pytest.raises(UserError, match="cannot be read as rows of numbers"):
        pixel_mnist.read(str(idx_folder / "images.csv.gz"))


def rolls(count, seed, low=4, high=12):
    """Random piano rolls with a few notes each frame."""
    draw = np.random.default_rng(seed)
    return [
        (draw.random((draw.integers(low, high), 88)) < 0.05).astype(np.uint8) for _ in range(count)
    ]


def notes(roll):
    return [tuple((np.flatnonzero(frame) + 21).tolist()) for frame in roll]


@pytest.fixture(scope="module")
def music_files(tmp_path_factory):
    """The same rolls as .mat and as .pickle."""
    scipy_io = pytest.importorskip("scipy.io")
    folder = tmp_path_factory.mktemp("music")
    parts = {name: rolls(5, seed) for seed, name in enumerate(("train", "valid", "test"))}
    cells = {}
    for name, own in parts.items():
        cells[f"{name}data"] = np.empty((1, len(own)), dtype=object)
        cells[f"{name}data"][0, :] = own
    scipy_io.savemat(folder / "rolls.mat", cells)
    lists = {name: [notes(roll) for roll in own] for name, own in parts.items()}
    (folder / "rolls.pickle").write_bytes(pickle.dumps(lists, protocol=2))
    return parts, folder / "rolls.mat", folder / "rolls.pickle"


def test_mat_and_pickle_hold_the_same_rolls(music_files):
    parts, *paths = music_files
    for path in paths:
        found, facts = music.read(str(path))
        for ours, theirs in music.SPLITS.items():
            assert len(found[ours]) == len(parts[theirs])
            for a, b in zip(found[ours], parts[theirs]):
                assert np.array_equal(a.numpy(), b)
        assert facts["frames"]["train"] == sum(map(len, parts["train"]))


def test_music_counts_the_frames_that_are_there(music_files):
    parts, path, _ = music_files
    _, task = music.setup(["--data", str(path)])
    frames = np.concatenate([roll[1:] for roll in parts["test"]])
    logits = torch.linspace(-4, 1, 88)
    p = torch.sigmoid(logits).double().numpy()
    expected = -(frames * np.log(p) + (1 - frames) * np.log1p(-p)).sum(1).mean()
    measures = task.evaluate(lambda x: logits.expand(*x.shape[:2], 88), "test")
    assert measures["loss_nats"] == pytest.approx(expected, rel=1e-5)


def test_music_that_cannot_be_used(tmp_path, music_files):
    with pytest.raises(UserError, match=r"wants JSB_Chorales, .* as .mat or .pickle"):
        music.read(str(tmp_path / "JSB_Chorales.mat"))

    def write(content):
        path = tmp_path / "rolls.pickle"
        path.write_bytes(pickle.dumps(content))
        return str(path)

    good = {"train": [[(60,), (61,)]], "valid": [[(60,), (61,)]], "test": [[(60,), (61,)]]}
    music.read(write(good))
    with pytest.raises(UserError, match=r"no valid, test; got train"):
        music.read(write({"train": []}))
    with pytest.raises(UserError, match="train has no sequences"):
        music.read(write({**good, "train": []}))
    with pytest.raises(UserError, match="val sequence 0: needs a frame to predict"):
        music.read(write({**good, "valid": [[]]}))
    with pytest.raises(UserError, match=r"frame 1: a note must be a whole number in 21 … 108"):
        music.read(write({**good, "test": [[(60,), (109,)]]}))
    with pytest.raises(UserError, match="not a pickle of plain lists"):
        music.read(write(np.zeros(3)))
    with pytest.raises(UserError, match=r"would import (posix|nt)\.system; only plain lists"):
        music.read(write(Trap()))
    with pytest.raises(UserError, match=r"train sequence 0: must be frames x 88 keys, got shape"):
        music.check("x", "train", [np.zeros((5, 87))])
    with pytest.raises(UserError, match="zeros and ones"):
        music.check("x", "train", [np.full((5, 88), 2)])


class Trap:
    """Unpickles to a call."""

    def __reduce__(self):
        return os.system, ("exit 1",)


@pytest.fixture(scope="module")
def timit_folder(tmp_path_factory):
    """Two speakers of each part, of TIMIT's form: a tone per phone, SPHERE and RIFF files."""
    soundfile = pytest.importorskip("soundfile")
    root = tmp_path_factory.mktemp("timit")
    draw = np.random.default_rng(0)
    speakers = [("TRAIN", "DR1", "FCJF0"), ("TRAIN", "DR2", "MABC0")]
    speakers += [("TEST", "DR1", "FAKS0"), ("TEST", "DR1", "MDAB0"), ("TEST", "DR1", "MXYZ0")]
    for part, region, speaker in speakers:
        folder = root / part / region / speaker
        folder.mkdir(parents=True)
        for number, sentence in enumerate(("SA1", "SI100", "SX10")):
            names = ["h#", *draw.choice(["ao", "iy", "q", "zh"], 4), "h#"]
            pitch = {"h#": 100, "ao": 500, "iy": 1500, "q": 2500, "zh": 4000}
            starts = np.arange(len(names)) * 1600
            lines = [f"{s} {s + 1600} {name}" for s, name in zip(starts, names)]
            (folder / f"{sentence}.PHN").write_text("\n".join(lines) + "\n")
            t = np.arange(1600) / 16000
            wave = np.concatenate([0.3 * np.sin(2 * np.pi * pitch[name] * t) for name in names])
            kind = "NIST" if number % 2 else "WAV"
            wave = wave + 0.001 * draw.standard_normal(len(wave))
            soundfile.write(folder / f"{sentence}.WAV", wave, 16000, format=kind, subtype="PCM_16")
    return root


def test_timit_parts_labels_and_folding(timit_folder):
    found = timit.find(str(timit_folder))
    names = {split: [path.parts[-2] for path in paths] for split, paths in found.items()}
    assert names == {
        "train": ["FCJF0", "FCJF0", "MABC0", "MABC0"],
        "val": ["FAKS0"] * 2,
        "test": ["MDAB0"] * 2,
    }
    parts, facts = timit.read(str(timit_folder))
    assert facts["utterances"] == {"train": 4, "val": 2, "test": 2}
    x, y = parts["train"][0]
    frames = 1 + (6 * 1600 - 400) // 160
    assert x.shape == (frames, 120)
    assert y.shape == (frames,)
    kept = torch.cat([x for x, _ in parts["train"]])
    assert kept.mean(0).abs().max() < 1e-3
    assert (kept.std(0) - 1).abs().max() < 0.01
    counted = {timit.PHONES[i] for _, y in parts["train"] for i in y.tolist() if i >= 0}
    assert counted <= {"sil", "aa", "iy", "sh"}
    assert y[0] == timit.PHONES.index("sil")  # its middle is sample 200
    assert y[8] == y[0]  # its middle is sample 1480
    assert y[9] != y[0]  # sample 1640 belongs to the next phone


def test_timit_lists_and_folding_are_complete():
    assert len(set(timit.CORE_TEST)) == 24
    assert len(set(timit.DEVELOPMENT)) == 50
    assert not set(timit.CORE_TEST) & set(timit.DEVELOPMENT)
    assert len(set(timit.PHONES)) == 39
    assert len({*timit.PHONES, *timit.FOLDED, "q"} - {"sil"}) == 61
    assert set(timit.FOLDED.values()) <= set(timit.PHONES)


def test_timit_that_cannot_be_used(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    with pytest.raises(UserError, match=r"wants your licensed copy of TIMIT .* no such directory"):
        timit.read(str(tmp_path / "missing"))
    folder = tmp_path / "train" / "dr1" / "fcjf0"
    folder.mkdir(parents=True)
    soundfile.write(folder / "si1.wav", np.zeros(16000), 16000)
    with pytest.raises(UserError, match=r"nothing found for TEST \(development speakers\), TEST"):
        timit.read(str(tmp_path))
    with pytest.raises(UserError, match=r"si1.wav has no labels: si1.PHN should be beside it"):
        timit.read_labels(folder / "si1.wav")
    labels = folder / "si1.phn"
    for text, message in [
        ("0 100", "line 1: must be START END PHONE"),
        ("0 100 h#\n100 200 xx", "line 2: no phone of TIMIT: 'xx'"),
        ("", "holds no labels"),
    ]:
        labels.write_text(text)
        with pytest.raises(UserError, match=message):
            timit.read_labels(folder / "si1.wav")
    soundfile.write(folder / "si1.wav", np.zeros(8000), 8000)
    with pytest.raises(UserError, match="one channel at 16000 Hz"):
        timit.features(folder / "si1.wav")
    (folder / "si1.wav").write_bytes(b"no audio")
    with pytest.raises(UserError, match="cannot be read as SPHERE or WAV"):
        timit.features(folder / "si1.wav")


# Models


@pytest.mark.parametrize(
    ("flags", "parameters", "recurrent"),
    [
        # by hand: U 10·256, b 256, beta 128, factors 7·8, V 256·10, c 10
        ("", 10 * 256 + 256 + 128 + 56 + 2560 + 10, 56),
        ("--frozen-factors", 10 * 256 + 256 + 128 + 56 + 2560 + 10, 56),
        ("--model unitary --factors", 10 * 256 + 256 + 128 + 2 * 128**2 + 2570, 2 * 128**2),
        ("--model orthogonal --factors", 10 * 128 + 128 + 128 + 128**2 + 1290, 128**2),
        ("--model krulstm", 4 * (10 * 128 + 128 + 28) + 1290, 4 * 28),
        ("--model lstm", 4 * (10 * 128 + 128**2 + 2 * 128) + 1290, 4 * 128**2),
        ("--model rnn", 10 * 128 + 128**2 + 2 * 128 + 1290, 128**2),
    ],
)
def test_parameters_of_the_papers_copy_network(flags, parameters, recurrent):
    config, task = copy_memory.setup(shlex.split(flags))
    model = SequenceModel(config, task.input_size, task.output_size, task.last_only)
    assert (model.num_parameters, model.num_recurrent_parameters) == (parameters, recurrent)


def test_a_narrow_init_starts_as_an_integrator():
    for spreads, narrow in {"0.01": [True, True], "1 0.01": [False, True]}.items():
        flags = f"--init-spread {spreads} --num-layers 2 --preset paper"
        config, _ = copy_memory.setup(shlex.split(flags))
        model = SequenceModel(config, 10, 10, False)
        for layer in range(2):
            w = model.recurrence.recurrent_matrix(layer)
            distance = torch.linalg.matrix_norm(w - torch.eye(128), 2)
            # the angles of seven factors at most add up
            assert distance < 7 * 0.02 * math.pi if narrow[layer] else distance > 1
    for kind in ("unitary", "orthogonal"):
        flags = f"--model {kind} --init-spread 0.1 --hidden-size 64 --factors"
        config, _ = copy_memory.setup(shlex.split(flags))
        w = SequenceModel(config, 10, 10, False).recurrence.recurrent_matrix()
        widest = torch.linalg.eigvals(w).angle().abs().max()
        assert 0.08 * math.pi < widest < 0.12 * math.pi


@pytest.mark.parametrize("model", ["lstm", "gru"])
def test_gates_of_chrono_initialization_keep_a_state_for_so_many_steps(model):
    """A state that decays by g a step lasts 1 / (1 - g) steps: here log u has spans 1 + u."""
    config, _ = copy_memory.setup(shlex.split(f"--model {model} --chrono 200 --num-layers 2"))
    torch.manual_seed(0)
    layers = SequenceModel(config, 10, 10, False).recurrence
    with torch.no_grad():
        for name, p in layers.named_parameters():
            if name.startswith("weight"):
                p.zero_()  # what the biases alone do
        first = (torch.ones(2, 1, 128), torch.ones(2, 1, 128))
        if model == "lstm":
            _, (_, last) = layers(torch.zeros(1, 1, 10), first)
            gates = layers.bias_ih_l1.view(4, -1) + layers.bias_hh_l1.view(4, -1)
            torch.testing.assert_close(gates[0], -gates[1])  # writes as much as it forgets
            last = last - gates[0].sigmoid() * gates[2].tanh()
        else:
            _, last = layers(torch.zeros(1, 1, 10), first[0])
            (r, z, into), (_, _, within) = (
                layers.bias_ih_l1.view(3, -1),
                layers.bias_hh_l1.view(3, -1),
            )
            r, z = r + layers.bias_hh_l1[:128], z + layers.bias_hh_l1[128:256]
            last = last - (1 - z.sigmoid()) * (into + r.sigmoid() * within).tanh()
    spans = 1 / (1 - last[-1])
    assert 2 <= spans.min() < 10
    assert 180 < spans.max() <= 200 * 1.001
    assert abs(spans.mean() - 101) < 15


@pytest.mark.parametrize("model", ["unitary", "orthogonal"])
def test_unitary_baselines_stay_unitary_and_are_dense(model):
    config, task = copy_memory.setup(
        shlex.split(f"--T 3 --model {model} --hidden-size 12 --factors --nonlinearity identity")
    )
    torch.manual_seed(0)
    network = SequenceModel(config, task.input_size, task.output_size, task.last_only)
    x, _ = task.batch(0)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    before = network.recurrence.recurrent_matrix().detach().clone()
    network(x).square().sum().backward()
    optimizer.step()
    after = network.recurrence.recurrent_matrix().detach()
    assert (after - before).norm() > 0.1
    assert (after @ after.mH - torch.eye(12)).abs().max() < 1e-5
    angles = torch.linalg.eigvals(before).angle()  # the first ones go round the circle
    assert angles.max() > 1.5
    assert angles.min() < -1.5
    # the recurrence is the dense one
    h = torch.zeros(x.shape[0], 12, dtype=after.dtype)
    u = network.recurrence.input_projection(x[:, :4].transpose(0, 1)).detach()
    for t in range(4):
        step = torch.complex(*u[:, t].chunk(2, -1)) if model == "unitary" else u[:, t]
        h = h @ after.T + step
    expected = torch.cat([h.real, h.imag], -1) if model == "unitary" else h
    output, _ = network.recurrence(x[:, :4].transpose(0, 1))
    torch.testing.assert_close(output[-1], expected, rtol=1e-4, atol=1e-5)


def test_what_the_recurrence_repeats_learns_at_a_rate_of_its_own():
    config, task = copy_memory.setup(shlex.split("--T 180 --lr 1e-2"))
    model = SequenceModel(config, 10, 10, False)
    rates = {}
    for group in parameter_groups(model, config, task.length):
        rates |= {id(p): group["lr"] for p in group["params"]}
    for name, p in model.named_parameters():
        slow = "factor" in name or "beta" in name
        expected = RECURRENT_RATE_TIMES_LENGTH / 200 if slow else 1e-2
        assert rates[id(p)] == pytest.approx(expected)
    frozen = "--frozen-factors --recurrent-lr 1e-4"  # beta still learns
    for flags, slow in (("--model lstm", []), ("--model krulstm", []), (frozen, [1e-4])):
        config, _ = copy_memory.setup(shlex.split(flags))
        model = SequenceModel(config, 10, 10, False)
        groups = parameter_groups(model, config, 100)
        assert [group["lr"] for group in groups] == [*slow, config.lr]


@pytest.mark.parametrize("model", MODELS)
def test_every_model_learns_a_toy_copy(model, tmp_path):
    lr = {"mingru": "5e-2", "transformer": "3e-3"}.get(model, "1e-2")
    flags = f"{TOY_COPY} --lr {lr} --model {model} --steps 150 --eval-every 50 --checkpoint-every 0"
    code, summary = train(copy_memory, flags, tmp_path / "run")
    found = rows(tmp_path / "run")
    assert code == 0
    assert found[0]["train/fraction"] > 1
    keeps_norm = model in ("kru", "unitary", "orthogonal")
    assert summary["test/fraction"] < (0.7 if keeps_norm else 1.05)  # no memory: 1
    assert found[-1]["train/fraction"] < 0.7 * found[0]["train/fraction"]
    assert bool(summary["recurrent_parameters"]) == (model not in ("mingru", "transformer"))
    assert bool(summary["diagnostics"]["after"]) == keeps_norm


# Loop


def test_a_task_imports_nothing_of_the_text_pipeline():
    code = (
        "import sys, kru_triton.train.tasks.copy_memory; "
        "print([m for m in sys.modules if m.startswith('kru_triton.train.text') or "
        "m in ('kru_triton.train.lm', 'kru_triton.train.sample', 'tokenizers', 'transformers')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_scripts_import_no_scripts():
    scripts = {path.stem for path in TRAIN.glob("*.py")} - {"__init__"}
    assert scripts == {"lm", "sample", "evaluate", "export", "reproduce"}
    for path in TRAIN.rglob("*.py"):
        imported = re.findall(
            r"^ *(?:from|import) kru_triton\.train(?:\.| import )(\w+)", path.read_text(), re.M
        )
        assert not scripts & set(imported), path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that never stopped."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    flags = f"{TOY_COPY} --dropout 0.1 --steps 120 --eval-every 30 --checkpoint-every 25"
    code, summary = train(copy_memory, flags, run_dir)
    assert code == 0
    return flags, run_dir, summary


def test_stopped_and_resumed_is_as_never_stopped(whole, tmp_path, monkeypatch):
    flags, run_dir, summary = whole
    again = tmp_path / "run"
    sequences, calls = copy_memory.sequences, []

    def stop_in_the_middle(count, *rest):
        calls.append(count)
        if count == 16 and calls.count(16) == 40:
            os.kill(os.getpid(), signal.SIGTERM)
        return sequences(count, *rest)

    monkeypatch.setattr(copy_memory, "sequences", stop_in_the_middle)
    assert train(copy_memory, flags, again) == (0, None)
    assert calls.count(16) in (40, 41)
    monkeypatch.setattr(copy_memory, "sequences", sequences)
    code, resumed = train(copy_memory, flags, again)
    assert code == 0
    assert rows(again) == rows(run_dir)
    same = ("test/loss_nats", "best_step", "steps", "diagnostics")
    assert {key: resumed[key] for key in same} == {key: summary[key] for key in same}


@pytest.mark.parametrize(
    ("part", "number", "error", "step"),
    [
        ("batch", 39, UserError("a broken file"), 37),  # one call before the first step
        ("loss", 45, ZeroDivisionError("in a step"), 44),
        ("evaluate", 2, OSError(28, "No space left on device"), 60),
        ("evaluate", 4, RuntimeError("of the last step"), 120),
    ],
    ids=["batch", "loss", "evaluation", "last"],
)
def test_an_error_leaves_a_checkpoint_of_the_last_completed_step(
    whole, tmp_path, capsys, part, number, error, step
):
    flags, run_dir, summary = whole
    setup, calls = copy_memory.setup, []

    def broken(argv):
        config, task = setup(argv)

        def failing(*arguments):
            calls.append(1)
            if len(calls) == number:
                raise error
            return getattr(task, part)(*arguments)

        return config, dataclasses.replace(task, **{part: failing})

    code = {UserError: 2, OSError: 1}.get(type(error))
    script = types.SimpleNamespace(setup=broken)
    if code is None:
        with pytest.raises(type(error), match=str(error)):
            train(script, flags, tmp_path)
    else:
        assert train(script, flags, tmp_path) == (code, None)
    good = checkpoints.folder(tmp_path, step)
    err = capsys.readouterr().err
    assert f"stopped after step {step}, the last good checkpoint is {good}" in err
    assert ("error: " in err) == (code is not None)
    code, resumed = train(copy_memory, flags, tmp_path)
    assert code == 0
    weights = [checkpoints.load_latest(d)[0].tensors["model"] for d in (tmp_path, run_dir)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    if part != "evaluate":
        assert rows(tmp_path) == rows(run_dir)
    assert resumed["best/loss_nats"] == pytest.approx(summary["best/loss_nats"], rel=0.05)


def test_summary_and_files(whole):
    _, run_dir, summary = whole
    assert summary["steps"] == 120
    assert summary["best_step"] in (30, 60, 90, 120)
    assert summary["parameters"] == 10 * 32 + 32 + 16 + 64 + 320 + 10
    assert summary["recurrent_parameters"] == 64
    for when in ("before", "after"):
        seen = summary["diagnostics"][when]
        assert set(seen) == {"unitarity_error", "eigenvalue_abs", "gradient_by_lag"}
    before = summary["diagnostics"]["before"]
    assert max(before["gradient_by_lag"].values()) == pytest.approx(1, abs=1e-3)
    assert all(error < 1e-5 for errors in before["unitarity_error"].values() for error in errors)
    assert [row["step"] for row in rows(run_dir)] == [20, 30, 40, 60, 80, 90, 100, 120]


def test_the_script_of_a_user_with_pictures(tmp_path):
    flags = TOY_COPY.replace(" --no-pictures", "").replace("disabled", "offline")
    out, _ = run("tasks/copy_memory.py", f"{flags} --steps 4 --run-dir {tmp_path / 'run'}")
    assert "762 parameters, 64 recurrent" in out
    assert "memoryless baseline: 0.831" in out
    assert "wandb: no figures" not in out
    names = [
        f"{kind}_{when}.png"
        for kind in ("unitarity", "spectrum", "gradient_by_lag")
        for when in ("before", "after")
    ]
    for name in names:
        assert (tmp_path / "run" / name).read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))


def test_patience_ends_a_run_and_the_best_weights_are_tested(tmp_path):
    flags = f"{TOY_COPY} --lr 0.5 --clip 0 --steps 400 --eval-every 5 --patience 3 --lr-floor 1"
    _, summary = train(copy_memory, flags, tmp_path / "run")
    values = {
        row["step"]: row["val/loss_nats"]
        for row in rows(tmp_path / "run")
        if "val/loss_nats" in row
    }
    assert summary["steps"] == summary["best_step"] + 15 < 400
    assert summary["best/loss_nats"] == min(values.values()) == values[summary["best_step"]]
    assert summary["test/loss_nats"] < 2 * summary["best/loss_nats"]


def test_a_summary_names_the_device_and_the_commit_that_ran(tmp_path, monkeypatch):
    later = iter(["before", "after"])  # what a checkout holds at the start, and at the end of a run
    monkeypatch.setattr(run_module, "commit", lambda: next(later))
    _, summary = train(copy_memory, f"{TOY_COPY} --steps 2", tmp_path / "run")
    assert summary["commit"] == "before"
    assert summary["device"] == device_name(torch.device("cpu")) != ""


def test_frozen_factors_stay_as_drawn(tmp_path):
    flags = f"{TOY_COPY} --steps 30 --frozen-factors"
    _, summary = train(copy_memory, flags, tmp_path / "run")
    before, after = (summary["diagnostics"][when] for when in ("before", "after"))
    assert before["unitarity_error"] == after["unitarity_error"]
    assert before["eigenvalue_abs"] == after["eigenvalue_abs"]


def test_a_run_that_diverges_ends_with_3(tmp_path, capsys):
    flags = f"{TOY_COPY} --lr 1e30 --clip 0 --steps 30"
    assert train(copy_memory, flags, tmp_path / "run") == (3, None)
    err = capsys.readouterr().err
    assert "error: non-finite" in err
    assert "a lower --recurrent-lr or --lr may help, or --clip 1" in err


def test_the_other_tasks_train(tmp_path, mnist_file, music_files, timit_folder):
    scripts = {
        adding: ("--preset tiny --T 6 --steps 30", "test/loss_mse"),
        state_tracking: ("--preset tiny --task s5 --num-layers 2 --steps 5", "test/last_20"),
        pixel_mnist: (f"--preset tiny --data {mnist_file} --steps 3", "test/accuracy"),
        music: (f"--preset tiny --data {music_files[1]} --steps 20", "test/loss_nats"),
        timit: (f"--preset tiny --data {timit_folder} --steps 20", "test/accuracy"),
    }
    for script, (flags, measure) in scripts.items():
        run_dir = tmp_path / script.__name__
        code, summary = train(script, f"{flags} --batch-size 4 {FAST}", run_dir)
        assert code == 0
        assert math.isfinite(summary[measure])
        losses = [value for key, value in rows(run_dir)[-1].items() if key.startswith("train/")]
        assert all(map(math.isfinite, losses))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--preset big", "--preset must be one of paper, balanced, tiny, got 'big'"),
        ("--T 0", "--T must be at least 1, got 0"),
        ("--batch-size 0", "--batch-size must be at least 1, got 0"),
        ("--lr nan", "--lr must be at least 0, got nan"),
        ("--init-spread 1.5", r"--init-spread must be 1 or 1 numbers in \[0, 1\]"),
        ("--num-layers 3 --init-spread 0 1", r"must be 1 or 3 numbers in .*, got \(0.0, 1.0\)"),
        ("--dropout 1", "--dropout must be below 1"),
        ("--decay-share 2", "--decay-share must be at most 1, got 2"),
        (f"--seed {2**64}", r"--seed must be at least 0 and below 2\^64, got 1844"),
        ("--seed -1", "--seed must be at least 0 and below"),
        ("--steps 0", "one of --steps, --minutes and --patience"),
        ("--patience 2 --eval-every 0", "give --eval-every too"),
        ("--model lstm --frozen-factors", "for kru and krulstm, not for lstm"),
        ("--chrono 50", "--chrono is for lstm and gru, .*; got 50 and --model kru"),
        ("--model gru --chrono 2", "at least 3 steps; got 2"),
    ],
)
def test_bad_flags(flags, message):
    with pytest.raises(UserError, match=message):
        copy_memory.setup(shlex.split(flags))


def test_what_a_preset_says_is_told_from_flags():
    with pytest.raises(UserError, match=r"got \(1.0, 0.01\) of --preset integrator"):
        adding.setup(["--num-layers", "3"])


def test_flags_of_another_model_are_named_and_what_a_preset_says_is_not(capsys):
    copy_memory.setup(shlex.split("--preset balanced --model lstm"))
    assert capsys.readouterr().out == ""
    copy_memory.setup(shlex.split("--model lstm --state-gate rotation --factors 3 5"))
    said = capsys.readouterr().out
    assert said == "note: not used by --model lstm: --factors, --state-gate\n"
    config = parse(shlex.split("--preset tiny --model gru --factors 7 7 --state-gate rotation"))
    (said,) = unused(config, model_settings(PRESETS["tiny"]))
    assert said == "note: not used by --model gru: --factors, --state-gate"


def test_bad_input_ends_with_2(tmp_path):
    with pytest.raises(UserError, match="model: factors:"):
        train(copy_memory, f"{TOY_COPY} --factors 3 5", tmp_path / "run")
    _, err = run("tasks/music.py", f"{FAST} --run-dir {tmp_path / 'music'}", code=2)
    assert err.startswith("error: --data (nothing): wants JSB_Chorales")


def test_another_configuration_is_refused(whole, capsys):
    flags, run_dir, _ = whole
    with pytest.raises(UserError, match=r"lr: 0\.003 there, 0\.5 now"):
        train(copy_memory, f"{flags} --lr 0.5", run_dir)


def test_toml_between_preset_and_flags(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('preset = "tiny"\nT = 44\nlr = 0.5\n')
    config, _ = copy_memory.setup(["--config", str(path), "--lr", "0.25"])
    assert (config.T, config.lr, config.hidden_size) == (44, 0.25, 32)
    path.write_text("length = 3\n")
    with pytest.raises(UserError, match=r"unknown keys \['length'\]"):
        copy_memory.setup(["--config", str(path)])


# Penn Treebank in lm.py


@pytest.mark.parametrize(
    ("hidden", "factors", "recurrent", "about"),
    [(411, (3, 137), 2 * (9 + 137**2), 120_000), (2048, (2,) * 11, 88, 418_000)],
)
def test_parameters_of_the_papers_networks_for_characters(hidden, factors, recurrent, about):
    config = dataclasses.replace(
        PRESETS["ptb"], vocab_size=50, hidden_size=hidden, factors=factors, nonlinearity="modrelu"
    )
    model = LanguageModel(config)
    # U and V, input bias, beta, factors, output bias
    expected = 2 * 50 * 2 * hidden + 2 * hidden + hidden + recurrent + 50
    assert (model.num_parameters, model.num_recurrent_parameters) == (expected, recurrent)
    assert expected == pytest.approx(about, rel=0.01)


@pytest.mark.parametrize("model", ["kru", "krulstm", "lstm", "gru", "rnn", "mingru"])
def test_the_plain_network_carries_and_cuts_its_state(model):
    config = LanguageModelConfig(
        vocab_size=7, frame="plain", model=model, num_layers=1, hidden_size=12, factors=(3, 4)
    )
    torch.manual_seed(0)
    network = LanguageModel(config)
    tokens = torch.randint(7, (2, 9))
    whole, _ = network(tokens)
    first, state = network(tokens[:, :4])
    second, _ = network(tokens[:, 4:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    reset = torch.zeros(2, 9, dtype=torch.bool)
    reset[:, 4] = True
    cut, _ = network(tokens, reset=reset)
    torch.testing.assert_close(cut[:, 4:], network(tokens[:, 4:])[0])
    assert (cut - whole).abs().max() > 1e-3


def test_the_plain_network_is_one_recurrent_layer():
    for changes in ({"num_layers": 2}, {"num_layers": 1, "model": "transformer"}):
        with pytest.raises(ValueError, match="frame: 'plain' is one recurrent layer"):
            LanguageModel(LanguageModelConfig(frame="plain", **changes))


@pytest.fixture(scope="module")
def treebank(tmp_path_factory):
    """Files of the Penn Treebank's form, of 12 byte values."""
    folder = tmp_path_factory.mktemp("ptb")
    draw = np.random.default_rng(0)
    for part, count in {"train": 300, "valid": 40, "test": 40}.items():
        words = draw.choice(["the", "<unk>", "N", "cat"], (count, 5))
        (folder / f"ptb.{part}.txt").write_text("".join(f" {' '.join(w)} \n" for w in words))
    return folder


def test_lm_preset_ptb_from_a_directory(treebank, tmp_path):
    run_dir = tmp_path / "run"
    run(
        "lm.py",
        f"--preset ptb --data ptb:{treebank} --hidden-size 12 --factors 3 4 --steps 60 --lr 3e-2 "
        "--batch-size 4 --segment-length 16 --warmup 0 --wandb disabled --device cpu "
        f"--dtype float32 --sample-tokens 20 --run-dir {run_dir}",
    )
    text = (treebank / "ptb.train.txt").read_bytes()
    size = len(set(text)) + 1  # and the start of a document
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["parameters"] == 2 * size * 24 + 24 + 2 * (9 + 16) + size
    assert summary["val/bpb"] < 2.5 < math.log2(size)
    assert summary["data"]["test"]["bytes"] == (treebank / "ptb.test.txt").stat().st_size
    assert abs(summary["test/bpb"] - summary["val/bpb"]) < 0.3  # of other sentences alike
    assert summary["test/bpb"] != summary["val/bpb"]
    assert summary["device"] == device_name(torch.device("cpu"))
    assert json.loads((run_dir / "config.json").read_text())["frame"] == "plain"


def test_a_half_present_treebank_names_the_files(tmp_path):
    (tmp_path / "ptb.train.txt").write_text("a\n")
    with pytest.raises(
        UserError,
        match=r"no ptb\.valid\.txt and no ptb\.test\.txt there; the Penn Treebank is licensed",
    ):
        parse(["--preset", "ptb", "--data", f"ptb:{tmp_path}"])


def test_characters_of_the_training_text_alone():
    tokenizer = character_tokenizer([b"abc\n", b"b \xc3\xa9"])
    assert tokenizer.vocab_size == len(set(b"abc\n \xc3\xa9")) + 1
    text = "cé b\na".encode()
    assert len(tokenizer.encode(text)) == len(text)
    assert tokenizer.decode(tokenizer.encode(text).tolist()) == text
    with pytest.raises(UserError, match=r"no tokens for b'dx'"):
        tokenizer.encode(b"axd")


# Tables


def toy_cells(monkeypatch):
    """A cell of toy size and one that diverges, in the table copy."""
    toy = f"{TOY_COPY} --steps 40"
    cells = [
        reproduce.cell("copy", "kru", "tasks/copy_memory.py", toy),
        reproduce.cell("copy", "wild", "tasks/copy_memory.py", f"{toy} --lr 1e30 --clip 0"),
    ]
    monkeypatch.setattr(reproduce, "copy_cells", lambda config: cells)


def test_a_table_from_end_to_end(tmp_path, monkeypatch, capsys):
    toy_cells(monkeypatch)
    results = tmp_path / "results"
    config = reproduce.Config("copy", seeds=1, runs=str(tmp_path / "runs"), results=str(results))
    assert reproduce.reproduce(config) == 0
    found = {row["cell"]: row for row in json.loads((results / "reproduction.json").read_text())}
    assert {name: row["status"] for name, row in found.items()} == {
        "kru": "done",
        "wild": "diverged",
    }
    assert found["kru"]["summary"]["recurrent_parameters"] == 64
    assert found["kru"]["curve"]["step"] == [20, 40]
    assert "seconds" not in found["kru"]["summary"]
    text = (results / "reproduction.md").read_text()
    fraction = found["kru"]["summary"]["test/fraction"]
    assert f"| kru | 762 | 64 | 1 | 0 | {fraction:.4g} |" in text
    assert "| wild |  |  | 1 | 1 |" in text

    # nothing is run again, and all is drawn again from the rows
    picture = results / "reproduction_copy.png"
    drawn = picture.read_bytes()
    monkeypatch.setattr(reproduce.subprocess, "run", None)
    assert reproduce.reproduce(config) == 0
    picture.unlink()
    assert reproduce.reproduce(dataclasses.replace(config, table="draw")) == 0
    assert picture.read_bytes() == drawn
    again = json.loads((results / "reproduction.json").read_text())
    assert again == [found["kru"], found["wild"]]


def test_mean_and_spread_over_seeds_and_both_kinds_of_figure(tmp_path):
    rows = []
    for seed, accuracy in enumerate((0.5, 0.7)):
        summary = {
            "test/accuracy": accuracy,
            "parameters": 10,
            "recurrent_parameters": 4,
            "steps": 3,
        }
        row = {"table": "mnist", "cell": "kru", "scale": "cpu", "seed": seed, "status": "done"}
        rows.append(row | {"summary": summary, "curve": {"step": [1], "loss": [2.0]}})
    rows.append({**rows[0], "cell": "lost", "status": "diverged"})
    del rows[-1]["summary"]
    text = reproduce.markdown(rows)
    assert "| kru | 10 | 4 | 2 | 0 | 0.6 ± 0.14 | 3 ± 0 |" in text
    assert [path.name for path in reproduce.draw(rows, tmp_path)] == ["reproduction_mnist.png"]


def test_gradients_are_drawn_from_the_rows_alone():
    from matplotlib.figure import Figure

    def row(seed, after):
        seen = {"before": {"0": 1.0, "9": 2.0 + seed}, "after": {"0": 1.0, "9": after}}
        seen = {when: {"gradient_by_lag": norms} for when, norms in seen.items()}
        return {"seed": seed, "status": "done", "summary": {"diagnostics": seen}}

    cells = {"free": [row(0, 16.0), row(1, 4.0)], "lost": [{"status": "diverged"}]}
    axes = Figure().add_subplot()
    reproduce.draw_gradients(axes, cells)
    lines = {line.get_label(): line.get_data() for line in axes.get_lines()}
    assert list(lines) == ["before training", "free, after", "lost: diverged"]
    assert lines["free, after"][0] == pytest.approx([0, 9])
    assert lines["free, after"][1] == pytest.approx([1, 8])  # the geometric mean of 16 and 4
    assert lines["before training"][1] == pytest.approx([1, 6**0.5])


def test_accuracy_is_drawn_against_length(tmp_path):
    rows = []
    for seed, accuracy in enumerate((0.5, 1.0)):
        summary = {f"test/last_{n}": accuracy / n for n in (128, 40)}
        summary |= {"test/accuracy_40": 1.0, "parameters": 10, "recurrent_parameters": 4}
        summary |= {"steps": 3, "data": {"train_length": 40}}
        row = {"table": "s3", "cell": "kru-tanh-2", "scale": "cpu", "seed": seed, "status": "done"}
        rows.append(row | {"summary": summary, "curve": {"step": [1], "loss": [2.0]}})
    text = reproduce.markdown(rows)
    assert "| test/accuracy_40 | test/last_40 | test/last_128 |" in text
    assert [path.name for path in reproduce.draw(rows, tmp_path)] == ["reproduction_s3.png"]

    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    reproduce.draw_lengths(axes, {"kru-tanh-2": rows, "gru-1": [{"status": "diverged"}]})
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines["kru-tanh-2"].get_xdata()) == [40, 128]
    assert lines["kru-tanh-2"].get_ydata() == pytest.approx([0.75 / 40, 0.75 / 128])
    assert "gru-1: diverged" in lines


def test_every_cell_of_every_table_has_flags_that_its_script_takes(treebank, music_files):
    modules = (copy_memory, adding, pixel_mnist, music, state_tracking)
    scripts = {f"tasks/{Path(module.__file__).name}": module for module in modules}
    data = {"jsb": str(music_files[1]), "piano": str(music_files[2]), "ptb": str(treebank)}
    for scale in ("cpu", "gpu"):
        config = reproduce.Config("all", scale=scale, **data)
        for table in reproduce.TABLES:
            cells = reproduce.cells(table, config)
            assert len({cell.name for cell in cells}) == len(cells) > 2
            for cell in cells:
                flags = list(cell.flags)
                if cell.script == "lm.py":
                    parse(flags)
                else:
                    script = scripts[cell.script]
                    parse_task(script.Config, script.PRESETS, flags, "")


def test_tables_that_cannot_be_run(tmp_path, monkeypatch, capsys):
    config = reproduce.Config("copies", results=str(tmp_path), runs=str(tmp_path / "runs"), seeds=1)
    with pytest.raises(
        UserError,
        match="one of copy, adding, mnist, ptb, music, frozen, gradients, parity, modular, s3, s5, "
        "s5-swaps, all, draw",
    ):
        reproduce.reproduce(config)
    with pytest.raises(UserError, match="run a table first"):
        reproduce.reproduce(dataclasses.replace(config, table="draw"))
    with pytest.raises(UserError, match="--seeds must be at least 1"):
        reproduce.reproduce(dataclasses.replace(config, table="copy", seeds=0))
    with pytest.raises(UserError, match="--seeds must be at least 1 and at most 1000, got 1844"):
        reproduce.reproduce(dataclasses.replace(config, table="copy", seeds=2**64))
    bad = [reproduce.cell("copy", "kru", "tasks/copy_memory.py", f"{FAST} --T 0")]
    monkeypatch.setattr(reproduce, "copy_cells", lambda config: bad)
    assert reproduce.reproduce(dataclasses.replace(config, table="copy")) == 1
    assert "copy/kru seed 0: failed" in capsys.readouterr().err
    assert json.loads((tmp_path / "reproduction.json").read_text()) == []
