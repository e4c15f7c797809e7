"""Documents, the held-out part, lanes with resets, and validation that counts each byte once."""

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch

from kru_triton.train.run.settings import Config, UserError
from kru_triton.train.text import data
from kru_triton.train.text.batches import MemoryBatches, TokenArray, validation_segments
from kru_triton.train.text.documents import (
    compressed_bits_per_byte,
    read_documents,
    statistics,
)
from kru_triton.train.text.held_out import held_out_text, is_held_out, split_in_memory
from kru_triton.train.text.sources import find_source
from kru_triton.train.text.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()


def load_documents(spec, valid):
    """What is trained on, and what is held out."""
    return split_in_memory(spec, valid, 1 << 62)[:2]


def write_files(folder, sizes, seed=0):
    letters = np.random.default_rng(seed)
    for number, size in enumerate(sizes):
        text = bytes(letters.integers(97, 123, size, dtype=np.uint8))
        (folder / f"file{number:02}.txt").write_bytes(text)
    return f"text:{folder}/*.txt"


def random_documents(lengths):
    letters = np.random.default_rng(1)
    return [
        (str(i), bytes(letters.integers(0, 256, n, dtype=np.uint8))) for i, n in enumerate(lengths)
    ]


# Documents


def test_stdlib_is_split_by_file_without_tests_and_always_the_same_way():
    train, valid = load_documents("stdlib", "")
    assert (train, valid) == load_documents("stdlib", "")
    assert valid == held_out_text(("stdlib",))  # as train/evaluate.py reads it
    names = [name for name, _ in train + valid]
    assert len(names) == len(set(names))
    assert "ast.py" in names
    assert "collections/__init__.py" in names
    bad = {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    assert not [name for name in names if bad & set(name.split("/")) or "_sysconfigdata" in name]
    share = statistics(valid)["bytes"] / statistics(train + valid)["bytes"]
    assert 0.04 < share <= 0.05
    compressed = compressed_bits_per_byte(valid)
    assert 1.3 < compressed["xz"] < compressed["gzip"] < 2.5


def test_text_files_are_split_by_file_and_nothing_is_lost(tmp_path):
    spec = write_files(tmp_path, [1000] * 50)
    train, valid = load_documents(spec, "")
    assert (len(train), len(valid)) == (48, 2)
    whole = {name: text for name, text in read_documents(spec)}
    assert dict(train) | dict(valid) == whole


def test_the_split_does_not_depend_on_where_the_corpus_lies(tmp_path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        write_files(tmp_path / name, [1000] * 50)
    splits = [load_documents(f"text:{tmp_path}/{name}/*", "") for name in ("here", "there")]
    assert splits[0] == splits[1]


def test_a_single_file_gives_its_last_tenth_from_a_line_start(tmp_path):
    text = "".join(f"line {number} é\n" for number in range(1000)).encode()
    (tmp_path / "one.txt").write_bytes(text)
    ((_, train),), ((_, valid),) = load_documents(f"text:{tmp_path}/one.txt", "")
    assert train + valid == text
    assert train.endswith(b"\n")
    assert 0.08 < len(valid) / len(text) <= 0.10


def test_a_single_file_without_lines_is_cut_between_characters(tmp_path):
    (tmp_path / "one.txt").write_bytes("é€".encode() * 333)
    ((_, train),), ((_, valid),) = load_documents(f"text:{tmp_path}/one.txt", "")
    assert (train + valid).decode() == train.decode() + valid.decode() == "é€" * 333


def test_globs_are_recursive_and_sorted(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("z.txt", "a/y.txt", "a/b/x.txt", "a/b/x.md"):
        (tmp_path / name).write_text(name)
    names = [name for name, _ in read_documents(f"text:{tmp_path}/**/*.txt")]
    assert names == ["a/b/x.txt", "a/y.txt", "z.txt"]


def names_of(spec):
    return [shard.name for shard in find_source(spec).shards]


def test_a_file_that_links_lead_to_several_times_counts_once(tmp_path):
    spec, folder = write_files(tmp_path, [1000] * 20).replace("*", "**/*"), tmp_path
    whole, names = load_documents(spec, ""), names_of(spec)
    for name, target in {
        "again": ".",
        "and-again": ".",  # two of these make 2^40 paths
        "a-link.txt": "file03.txt",  # before its file in order
        "dangling.txt": "nothing",
        "round.txt": "round.txt",
    }.items():
        (folder / name).symlink_to(target)
        assert names_of(spec) == names
    assert names_of(f"text:{folder}/**/**/*.txt") == names
    assert load_documents(spec, "") == whole
    (tmp_path / "elsewhere").symlink_to(folder)  # the same below a link
    assert load_documents(f"text:{tmp_path}/elsewhere/**/*.txt", "") == whole

    # What links lead to from outside is there, once; a hard link is a file of its own.
    inside = tmp_path / "inside"
    inside.mkdir()
    for name in ("one", "two"):
        (inside / name).symlink_to(folder)
    (inside / "hard.txt").hardlink_to(folder / "file00.txt")
    assert names_of(f"text:{inside}/**/*.txt") == ["hard.txt", *(f"one/{name}" for name in names)]


def test_a_name_that_exists_is_that_file_whatever_characters_it_has(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["x[1].txt", "st*r.txt", "qu?.txt", "ha#sh.txt", "2:a.txt", "50%20.txt", "{b}.txt"]
    for name in [*names, "x1.txt", "star.txt", "quo.txt", "sp ace.txt", "$HOME.txt"]:
        (tmp_path / name).write_text(name)
    for name in [*names, "sp ace.txt", "$HOME.txt"]:
        assert read_documents(f"text:{name}") == [(name, name.encode())]
        assert names_of(f"2:text:./{name}") == [name]
    (tmp_path / "dir[1]").mkdir()
    (tmp_path / "dir1").mkdir()
    for folder in ("dir[1]", "dir1"):
        (tmp_path / folder / "a.txt").write_text(folder)
    assert read_documents("text:dir[1]/*.txt") == [("a.txt", b"dir[1]")]

    odd = os.fsdecode(b"bad\xff.txt")  # no UTF-8
    (tmp_path / odd).write_text("text\n" * 100)
    (train, valid) = load_documents("text:bad*", "")
    assert (train[0][0], len(train[0][1] + valid[0][1])) == (odd, 500)
    assert statistics(train) != statistics(valid)


def test_a_number_sign_in_the_name_of_a_file_marks_no_field(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d#1").mkdir()
    for name in ("a#b.jsonl", "c#body", "d#1/x.jsonl", "e.jsonl"):
        (tmp_path / name).write_text('{"text": "of text", "body": "of body", "x#y": "of x#y"}\n')
    for spec, text in {
        "a#b.jsonl": "text",
        "a#b.jsonl#body": "body",
        "a#*#body": "body",
        "c#body": "text",
        "c#body#body": "body",
        "d#1/*.jsonl": "text",
        "d#1/*.jsonl#x#y": "x#y",
        "e.jsonl#x#y": "x#y",
        "e.jsonl#": "text",
    }.items():
        assert read_documents(f"json:{spec}")[0][1] == f"of {text}".encode(), spec


def zstd(content):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as file:
        file.write(content)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress), ("zst", zstd)],
    ids=["gz", "bz2", "xz", "zst"],
)
def test_compressed_text_is_read_under_any_name(tmp_path, suffix, compress):
    text = "".join(f"line {number} é\n" for number in range(1000)).encode()
    (tmp_path / "plain").write_bytes(text)
    train, valid = load_documents(f"text:{tmp_path}/plain", "")
    packed = compress(text[:5000]) + compress(text[5000:])  # in two members
    lines = compress(b'{"text": "one"}\n{"text": "two"}\n')
    for name in (f"a.txt.{suffix}", "other.txt", "wrong.gz"):
        spec = f"text:{tmp_path}/{name}"
        (tmp_path / name).write_bytes(packed)
        assert load_documents(spec, "") == ([(name, train[0][1])], [(name, valid[0][1])])
        assert read_documents(spec) == [(name, text)]  # as of --valid and --test
        assert read_documents(f"2:{spec}") == [(f"{name}:0", text)]  # streamed
        (tmp_path / name).write_bytes(lines)
        assert [t for _, t in read_documents(f"json:{tmp_path}/{name}")] == [b"one", b"two"]

        (tmp_path / name).write_bytes(packed[:-9])
        for weight in ("", "2:"):
            with pytest.raises(UserError, match=rf"{name}: .*([Tt]runcated|ended before)"):
                read_documents(weight + spec)
        (tmp_path / name).write_bytes(compress(b""))
        with pytest.raises(UserError, match="empty corpus: all 1 files have 0 bytes"):
            read_documents(spec)


def test_validation_files_are_taken_out_of_the_training_files(tmp_path):
    spec = write_files(tmp_path, [100] * 5)
    train, valid = load_documents(spec, f"text:{tmp_path}/file03.txt")
    assert [name for name, _ in train] == ["file00.txt", "file01.txt", "file02.txt", "file04.txt"]
    assert valid == [("file03.txt", (tmp_path / "file03.txt").read_bytes())]
    (tmp_path / "link").symlink_to("file03.txt")
    assert load_documents(spec, f"text:{tmp_path}/link") == (train, [("link", valid[0][1])])


def test_validation_text_of_the_standard_library_is_not_trained_on(tmp_path):
    root = os.path.dirname(json.__file__)
    train, valid = load_documents("stdlib", f"text:{root}/*.py")
    assert {"__init__.py", "decoder.py"} <= {name for name, _ in valid}
    assert not [name for name, _ in train if name.startswith("json/")]
    train, valid = load_documents(f"text:{root}/../*.py", "stdlib")
    assert valid == load_documents("stdlib", "")[1]
    names, held_out = ({name for name, _ in part if "/" not in name} for part in (train, valid))
    assert held_out
    assert "ast.py" in names
    assert not names & held_out


def test_the_rule_by_checksum_stays_what_it_was():
    """Another rule would validate runs that go on, and old checkpoints, on what they trained on."""
    held_out = [i for i in range(1000) if is_held_out(b"document %d" % i)]
    assert held_out == [28, 71, 96, 116, 216, 312, 316, 412, 512, 612, 616, 712, 716, 843, 943, 947]


def test_what_counts_once_is_said_in_words(tmp_path, capsys):
    for number in range(4):
        text = "".join(f'{{"text": "{number} {i}", "n": "{i}"}}\n' for i in range(200))
        (tmp_path / f"{number}.jsonl").write_text(text)
    (tmp_path / "link").symlink_to("2.jsonl")
    specs = [f"3:json:{tmp_path}/[12].jsonl", f"json:{tmp_path}/*", f"json:{tmp_path}/./2.jsonl"]
    config = Config(
        data=(*specs, f"json:{tmp_path}/2.jsonl#n"),
        valid=f"json:{tmp_path}/0.jsonl",
        test=f"json:{tmp_path}/link",
        batch_size=2,
        segment_length=32,
    )
    built = data.build(config, tmp_path / "run")
    shards = [[shard.name for shard in source.shards] for source in built.train.plan.sources]
    assert shards == [["1.jsonl", "2.jsonl"], ["3.jsonl"], ["2.jsonl"]]
    assert [source.field for source in built.train.plan.sources] == ["text", "text", "n"]
    out = capsys.readouterr().out
    assert f"note: --data {specs[1]}: files in --valid, too, which are not trained on: 1" in out
    assert f"--data {specs[1]}: files of an earlier --data, which count there: 2" in out
    assert f"--data {specs[2]}: files of an earlier --data, which count there: 1" in out
    assert f"warning: 1 files of --test are trained on, as {tmp_path}/2.jsonl" in out


def test_a_changed_byte_changes_the_sha256():
    one, other = [("a", b"xy"), ("b", b"z")], [("a", b"xy"), ("b", b"y")]
    moved = [("a", b"x"), ("b", b"yz")]
    assert len({statistics(part)["sha256"] for part in (one, other, moved)}) == 3


def test_bad_data_is_named(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "bad.txt").write_bytes(b"fine until \xff here")
    (tmp_path / "good.txt").write_bytes(b"fine")
    cases = [
        ("text:/no/such/*.txt", "", r"no file matches 'text:/no/such/\*\.txt'"),
        (f"text:{tmp_path}/empty.txt", "", "empty corpus: all 1 files have 0 bytes"),
        (f"text:{tmp_path}/bad.txt", "", r"bad\.txt is not UTF-8 text: byte 0xff at offset 11"),
        ("csv:x", "", "unknown data 'csv:x'; known: stdlib, text:GLOB"),
        (f"text:{tmp_path}", "", rf"is a folder; name .* as in 'text:{tmp_path}/\*\*/\*\.txt'"),
        (f"2:json:{tmp_path}/#x", "", rf"'json:{tmp_path}/' is a folder; .*/\*\*/\*\.jsonl'"),
        (
            f"text:{tmp_path}/good.txt",
            f"text:{tmp_path}/g*",
            r"validation data is empty|training data is empty",
        ),
    ]
    for spec, valid, message in cases:
        with pytest.raises(UserError, match=message):
            load_documents(spec, valid)


def test_an_unreadable_file_is_named(tmp_path, monkeypatch):
    # By a patch, because the superuser can read everything.
    def refuse(path):
        raise PermissionError(13, os.strerror(13), str(path))

    spec = write_files(tmp_path, [10])
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UserError, match=r"cannot read .*file00\.txt: Permission denied"):
        read_documents(spec)


# Lanes


@pytest.mark.parametrize(
    ("lengths", "batch_size", "segment_length"),
    [([7, 1, 30, 12, 5], 3, 4), ([50], 4, 7), ([1] * 9, 2, 5), ([3, 2], 3, 16)],
    ids=["several", "one-document", "one-byte-documents", "segment-longer-than-lane"],
)
def test_lanes_read_the_whole_stream_once_per_epoch(lengths, batch_size, segment_length):
    documents = random_documents(lengths)
    stream = TokenArray(documents, TOKENIZER)
    lanes = MemoryBatches(stream, batch_size, segment_length, seed=5)
    batches = [lanes.next() for _ in range(60)]
    inputs, targets, reset = (torch.cat(parts, 1).numpy() for parts in zip(*batches))

    size = sum(lengths) + len(lengths)
    for lane in range(batch_size):
        begin, end = lane * size // batch_size, (lane + 1) * size // batch_size
        expected = {"inputs": [], "targets": [], "reset": []}
        for epoch in range(-(-inputs.shape[1] // (end - begin))):
            order = np.random.default_rng([5, epoch]).permutation(len(documents))
            tokens = [t for i in order for t in (256, *documents[i][1])] + [256]
            expected["inputs"] += tokens[begin:end]
            expected["targets"] += tokens[begin + 1 : end + 1]
            expected["reset"] += [at == begin or tokens[at] == 256 for at in range(begin, end)]
        length = inputs.shape[1]
        assert inputs[lane].tolist() == expected["inputs"][:length]
        assert targets[lane].tolist() == expected["targets"][:length]
        assert reset[lane].tolist() == expected["reset"][:length]


def test_epochs_have_different_orders_and_the_seed_decides():
    stream = TokenArray(random_documents([5] * 20), TOKENIZER)
    orders = [
        MemoryBatches(stream, 2, 4, seed).epoch_order(e)[0].tolist()
        for seed in (0, 1)
        for e in (0, 1)
    ]
    assert len({tuple(order) for order in orders}) == 4
    assert orders[0] == MemoryBatches(stream, 4, 9, 0).epoch_order(0)[0].tolist()


def test_lanes_go_on_from_their_state():
    stream = TokenArray(random_documents([40, 7, 90, 3]), TOKENIZER)
    whole = MemoryBatches(stream, 3, 8, seed=1)
    batches = [whole.next() for _ in range(40)]
    for stop in (1, 17, 39):
        first = MemoryBatches(stream, 3, 8, seed=1)
        for _ in range(stop):
            first.next()
        second = MemoryBatches(stream, 3, 8, seed=1)
        second.load_state(first.state())
        for expected in batches[stop:]:
            assert all(map(torch.equal, second.next(), expected))


def test_lanes_of_two_ranks_are_the_lanes_of_one_with_twice_the_batch():
    stream = TokenArray(random_documents([40, 7, 90, 3]), TOKENIZER)
    whole = MemoryBatches(stream, 6, 8, seed=1)
    for _ in range(5):
        whole.next()
    ranks = [MemoryBatches(stream, 3, 8, 1, rank, world_size=2) for rank in range(2)]
    for lanes in ranks:
        lanes.load_state(whole.state())  # another number of processes goes on exactly
    for _ in range(40):
        parts = zip(*(lanes.next() for lanes in ranks))
        assert all(map(torch.equal, whole.next(), map(torch.cat, parts)))
    assert ranks[0].state() == ranks[1].state() == whole.state()
    with pytest.raises(ValueError, match="its 6 lanes are 3 now; keep processes times --batch-"):
        MemoryBatches(stream, 3, 8, seed=1).load_state(whole.state())


def test_too_little_text_for_the_lanes_is_an_error():
    with pytest.raises(UserError, match="5 training tokens are too few for 3 lanes"):
        MemoryBatches(TokenArray([("a", b"abcd")], TOKENIZER), 3, 8, seed=0)


# Validation


@pytest.mark.parametrize("lengths", [[9000, 1, 20000, 300], [5], [70000], [1] * 3000])
@pytest.mark.parametrize(("max_lanes", "segment_length"), [(1, 64), (32, 100)])
def test_validation_counts_each_byte_once_and_reads_it_in_context(
    lengths, max_lanes, segment_length
):
    stream = TokenArray(random_documents(lengths), TOKENIZER)
    count = len(stream)
    stream.tokens, stream.bos = np.arange(count), -1  # a token is now its own position
    segments = list(validation_segments(stream, max_lanes, segment_length, warm_up=50))
    inputs, targets, _, counted = (torch.cat(parts, 1).numpy() for parts in zip(*segments))
    assert all(segment[0].shape[1] <= segment_length for segment in segments)
    assert len(inputs) == min(max_lanes, max(1, (count - 1) // 400))
    # Each position after the first is counted as a target once, its predecessor being the input,
    assert sorted(targets[counted].tolist()) == list(range(1, count))
    assert (targets == inputs + 1).all()
    # with the 50 tokens before a lane's part, or all there are, as uncounted context.
    for lane in range(len(inputs)):
        first = counted[lane].argmax()
        assert first == min(50, inputs[lane, first])
        steps = np.diff(inputs[lane][: counted[lane].nonzero()[0][-1] + 1])
        assert (steps == 1).all()


def test_validation_leaves_document_ends_out_and_resets_at_starts():
    documents = random_documents([5, 3, 4])
    segments = list(validation_segments(TokenArray(documents, TOKENIZER), 32, 8))
    inputs, targets, reset, counted = (torch.cat(parts, 1) for parts in zip(*segments))
    assert bytes(targets[counted].tolist()) == b"".join(text for _, text in documents)
    assert torch.equal(reset, inputs == 256)
    assert int(reset.sum()) == 3
