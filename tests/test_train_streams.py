"""Streams: each document once, the same batches after any stop, faults, the Hub, tokenizers."""

import collections
import dataclasses
import gzip
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet
from servers import FileServer, HubServer, serve

from kru_triton.train.run.settings import Config, UserError, parse
from kru_triton.train.text import data, generate, load, shards, streams, tokenizer
from kru_triton.train.text.batches import validation_segments
from kru_triton.train.text.documents import read_documents, statistics
from kru_triton.train.text.held_out import held_out_documents, held_out_text, split_in_memory
from kru_triton.train.text.rows import read_shard
from kru_triton.train.text.shards import DataError, RangeFile, file_system
from kru_triton.train.text.sources import find_size, find_source
from kru_triton.train.text.streams import Documents, Plan, StreamBatches, Workers

TRAIN = Path(__file__).parents[1] / "train"
BYTES = tokenizer.ByteTokenizer()
TINY = shlex.split(
    "--preset tiny --d-model 16 --num-layers 1 --hidden-size 16 --num-heads 1 --lr 1e-2 "
    "--dtype float32 --batch-size 3 --segment-length 32 --device cpu --wandb disabled "
    "--sample-tokens 5 --log-every 1 --warmup 2 --shuffle-buffer 16"
)


def make_texts(count, seed=0):
    """Documents that begin with their own number."""
    draw = np.random.default_rng(seed)
    words = ["the", "unit", "state", "kröneker", "of", "matrix", "\n", "time", "€", '"']
    return [
        f"{number}: " + " ".join(draw.choice(words, draw.integers(0, 60)))
        for number in range(count)
    ]


def write_shards(folder, texts, shards, kind):
    """`texts` dealt to files; returns their spec."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        part = texts[shard::shards]
        if kind == "parquet":
            table = pyarrow.table({"id": list(range(len(part))), "text": part})
            file = folder / f"{shard}.parquet"
            parquet.write_table(table, file, row_group_size=11, write_page_checksum=True)
            continue
        lines = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(part))
        if kind == "jsonl":
            (folder / f"{shard}.jsonl").write_text(lines)
        else:
            (folder / f"{shard}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return f"{'parquet' if kind == 'parquet' else 'json'}:{folder}/*.{kind.split('.')[-1]}"


def make_plan(*specs, rank=0, world_size=1, seed=0, buffer=16, hold_out=False, tokenizer=BYTES):
    found = tuple(find_source(spec) for spec in specs)
    return Plan(found, tokenizer, seed, rank, world_size, buffer, hold_out)


def read_epochs(plan, epochs=1):
    """The texts that one rank reads in each of the first epochs."""
    workers = Workers(plan, 0)
    documents = Documents(plan, 0, workers, None)
    texts = [[] for _ in range(epochs)]
    while True:
        document = documents.take()
        if documents.epoch >= epochs:
            workers.close()
            return texts
        texts[documents.epoch].append(bytes(document.tokens[1:].tolist()).decode())


def read_batches(batches, count):
    result = [batches.next() for _ in range(count)]
    batches.close()
    return result


def read_until_stop(batches, count, found):
    """Append batches to `found`, until there are `count`."""
    while len(found) < count:
        found.append(batches.next())


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        assert all(map(torch.equal, one, other))


@pytest.fixture
def quick_retries(monkeypatch):
    """Pauses of milliseconds, many small requests."""
    monkeypatch.setattr(shards, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(shards, "LONGEST_PAUSE", 0.005)
    monkeypatch.setattr(shards, "STALL", 0.3)
    monkeypatch.setattr(shards, "CHUNK", 1500)
    file_system.cache_clear()
    yield
    file_system.cache_clear()


# Each document once


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
@pytest.mark.parametrize("shards", [1, 2, 8])
@pytest.mark.parametrize("world_size", [1, 2, 3, 11])
def test_ranks_read_each_document_once_per_epoch(tmp_path, kind, shards, world_size):
    texts = make_texts(200)
    spec = write_shards(tmp_path, texts, shards, kind)
    epochs = [[], []]
    for rank in range(world_size):
        plan = make_plan(spec, rank=rank, world_size=world_size)
        for epoch, read in zip(epochs, read_epochs(plan, 2)):
            epoch.append(read)
    for epoch in epochs:
        assert sorted(text for rank in epoch for text in rank) == sorted(texts)
    assert epochs[0] != epochs[1]
    if world_size == 1 and kind != "jsonl.gz":
        distance = np.abs(np.diff([texts.index(text) for text in epochs[0][0]]))
        assert np.median(distance) > 16  # shuffled, across shards or pieces


def test_more_ranks_than_text_files_read_each_once_per_epoch(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(f"file {number}")
    epochs = [[] for _ in range(4)]
    for rank in range(5):
        plan = make_plan(f"text:{tmp_path}/*.txt", rank=rank, world_size=5)
        for epoch, read in zip(epochs, read_epochs(plan, 4)):
            epoch += read
    for epoch in epochs:
        assert sorted(epoch) == ["file 0", "file 1", "file 2"]


@pytest.mark.parametrize("chunk", [1, 7, 1500])
def test_lines_cut_anywhere_belong_to_one_piece(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(shards, "CHUNK", chunk)
    (tmp_path / "a.jsonl").write_bytes(
        b'{"text": "ab"}\n\n{"text": "c"}\r\n  {"text": ""}\n{"text":"d"}'
    )
    source = find_source(f"json:{tmp_path}/a.jsonl")
    for pieces in range(1, 60):  # the file has 59 bytes
        rows = [row for p in range(pieces) for row in read_shard(source, 0, -1, p, pieces)]
        assert [row.text for row in rows] == [b"ab", b"c", b"", b"d"]
    for row in rows:
        again = list(read_shard(source, 0, row.at, 0, 1))
        assert again[0] == row


class Counted(bytes):
    """Bytes of a file that count those which any work on them goes through."""

    touched = 0

    def split(self, *separators):
        Counted.touched += len(self)
        return super().split(*separators)

    def __radd__(self, other):
        Counted.touched += len(other) + len(self)
        return bytes(other) + bytes(self)


def test_a_long_line_is_read_once_by_one_piece_and_never_copied_again(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "CHUNK", 4096)
    long, short = "é" * 500_000, "\\n" * 10
    lines = [f'{{"text": "{text}"}}\n'.encode() for text in (short, long, short, long)]
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    source = find_source(f"json:{tmp_path}/a.jsonl")
    size = source.shards[0].size
    read = RangeFile.read
    monkeypatch.setattr(RangeFile, "read", lambda *given: Counted(read(*given)))
    for pieces in (1, 2, 16):
        monkeypatch.setattr(Counted, "touched", 0)
        tracemalloc.start()
        rows = []
        for piece in range(pieces):
            for row in read_shard(source, 0, -1, piece, pieces):
                rows.append((row.at, row.next, len(row.text)))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert rows == [
            (0, len(lines[0]), 10),
            (len(lines[0]), len(lines[0]) + len(lines[1]), len(lines[1]) - 13),
            (size - len(lines[3]) - len(lines[2]), size - len(lines[3]), 10),
            (size - len(lines[3]), size, len(lines[3]) - 13),
        ]
        # each byte by one reader; a line that goes on in the next pieces there once more
        assert size <= Counted.touched <= 2 * size + 4096 * pieces
        assert peak < 5 * len(lines[1])


def test_batches_hold_the_documents_in_order_behind_their_bos(tmp_path):
    texts = make_texts(50)
    plan = make_plan(write_shards(tmp_path, texts, 2, "jsonl"))
    batches = read_batches(StreamBatches(plan, 3, 32), 200)
    inputs, targets, reset = (torch.cat(parts, 1) for parts in zip(*batches))
    assert torch.equal(targets[:, :-1], inputs[:, 1:])
    assert torch.equal(reset, inputs == 256)
    assert reset[:, 0].all()
    read = []
    for lane in inputs.tolist():
        pieces = bytes(t if t < 256 else 0 for t in lane).split(b"\0")[1:]
        assert set(piece.decode() for piece in pieces[:-1]) <= set(texts)
        read += pieces[:-1]
    assert len(read) > 2 * len(texts)
    assert (np.unique(read, return_counts=True)[1] >= len(read) // len(texts) - 2).all()


def test_held_out_documents_are_never_trained_on(tmp_path):
    texts = make_texts(2000)
    spec = write_shards(tmp_path, texts, 3, "parquet")
    held_out = held_out_documents([find_source(spec)], 10**6)
    held_out = {text.decode() for _, text in held_out}
    assert 10 < len(held_out) < 100
    plan = make_plan(spec, hold_out=True)
    (read,) = read_epochs(plan)
    assert sorted(read) == sorted(set(texts) - held_out)
    few = held_out_documents([find_source(spec)], 500)
    assert 500 <= sum(len(text) for _, text in few) < 1000


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_fields_inside_of_objects_and_structs(tmp_path, kind):
    rows = [
        {"meta": {"text": f"inner {i}", "n": i}, "a.b": {"c": {"d": f"deep {i}"}}, "x.y": f"{i}"}
        for i in range(30)
    ]
    rows[4] = {**rows[4], "meta": None}
    rows[5] = {**rows[5], "meta": {"text": None, "n": 5}}
    literal = [{**row, "meta.text": f"literal {i}"} for i, row in enumerate(rows)]
    for name, part in (("nested", rows), ("literal", literal)):
        if kind == "json":
            lines = [json.dumps(row) for row in part]
            lines[4] = lines[4].replace('"meta": null', '"meta": ["no", "object"]')
            (tmp_path / name).write_text("\n".join(lines))
        else:
            parquet.write_table(pyarrow.Table.from_pylist(part), tmp_path / name, row_group_size=7)

    def read(spec):
        source = find_source(f"{kind}:{tmp_path}/{spec}")
        rows = [row for piece in range(3) for row in read_shard(source, 0, -1, piece, 3)]
        return [row.text and row.text.decode() for row in rows]

    inner = [None if i in (4, 5) else f"inner {i}" for i in range(30)]
    assert read("nested#meta.text") == inner
    assert read("literal#meta.text") == [f"literal {i}" for i in range(30)]
    assert read("nested#a.b.c.d") == [f"deep {i}" for i in range(30)]
    assert read("nested#x.y") == [f"{i}" for i in range(30)]
    for spec, message in {
        "nested#meta.body": r"no field 'meta\.body'; it has meta\.text \(str.*, a\.b\.c\.d \(str",
        "nested#meta.text.x": "no field",
        "nested#meta": "field 'meta' is (dict|struct<.*>), not text",
        "nested#meta.n": r"field 'meta\.n' is int.*, not text",
    }.items():
        with pytest.raises(UserError, match=message):
            read(spec)


def test_sources_are_mixed_by_weight_in_tokens(tmp_path):
    short = write_shards(tmp_path / "a", [f"a{i}" for i in range(50)], 1, "jsonl")
    long = write_shards(tmp_path / "b", ["b" * 300 + str(i) for i in range(50)], 2, "parquet")
    plan = make_plan(f"3:{short}", f"1.0:{long}")
    assert [source.weight for source in plan.sources] == [3, 1]
    batches = StreamBatches(plan, 2, 64)
    text = torch.cat([batches.next()[0] for _ in range(300)])
    state = batches.state()
    share = (text == ord("b")).sum() / text.numel()
    assert 0.2 < share < 0.3
    assert state["sources"][0]["epoch"] > 5  # the short one starts again and again
    batches.close()
    again = StreamBatches(plan, 2, 64)
    again.load_state(state)
    assert again.state() == state
    again.close()


# The same batches after any stop


@pytest.mark.parametrize(
    ("kind", "shards", "rank", "world_size", "tokens"),
    [
        ("jsonl", 8, 0, 1, "bytes"),
        ("jsonl.gz", 2, 1, 3, "bytes"),
        ("parquet", 1, 1, 2, "bpe"),
        ("jsonl", 3, 0, 2, "bpe"),
    ],
)
def test_stops_change_no_batch(tmp_path, kind, shards, rank, world_size, tokens):
    texts = make_texts(300)
    texts[7] = "7: " + "a long document " * 3000  # more than a panel of a lane
    spec = write_shards(tmp_path, texts, shards, kind)
    own = BYTES if tokens == "bytes" else tokenizer.train_bpe(60, [t.encode() for t in texts])
    plan = make_plan(spec, rank=rank, world_size=world_size, tokenizer=own)
    whole = read_batches(StreamBatches(plan, 4, 200), 260)  # several epochs

    draw = np.random.default_rng(len(spec))
    batches, found = StreamBatches(plan, 4, 200), []
    for stop in [*sorted(draw.choice(260, 12, replace=False)), 260]:
        read_until_stop(batches, stop, found)
        state = json.dumps(batches.state())
        assert len(state) < 3000
        batches.close()
        batches = StreamBatches(plan, 4, 200)
        batches.load_state(json.loads(state))
        assert json.dumps(batches.state()) == state
    assert_equal(found, whole)
    assert batches.epochs_read() > 1


def test_worker_processes_change_no_batch_and_end_with_their_parent(tmp_path):
    spec = write_shards(tmp_path, make_texts(300), 8, "jsonl")
    plan = make_plan(spec)
    whole = read_batches(StreamBatches(plan, 4, 200), 160)
    # 1, 2 and no workers by turns
    found, state = [], StreamBatches(plan, 4, 200).state()
    for workers, stop in ((2, 50), (0, 70), (1, 159)):
        batches = StreamBatches(plan, 4, 200, workers)
        batches.load_state(state)
        read_until_stop(batches, stop, found)
        state = json.loads(json.dumps(batches.state()))
        process = batches.workers.pools[0].submit(os.getpid).result(60)
        if workers < 1:
            assert process == os.getpid()
        elif workers == 2:
            batches.close()
            assert not Path(f"/proc/{process}").exists()  # waited for
        else:  # it is killed, as for lack of memory
            os.kill(process, signal.SIGKILL)
            with pytest.raises(DataError, match="data worker: its process has died"):
                read_until_stop(batches, 1000, found)
            state = batches.state()
            batches.close()
    del found[160:]
    assert_equal(found, whole)
    after = StreamBatches(plan, 4, 200)
    after.load_state(state)
    after.next()
    after.close()


def wait_until_gone(process, seconds=30):
    for _ in range(100 * seconds):
        try:
            os.kill(process, 0)
            status = Path(f"/proc/{process}/stat")
            if status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return
        except (ProcessLookupError, FileNotFoundError):
            return
        time.sleep(0.01)
    pytest.fail(f"process {process} still runs")


def test_workers_that_end_in_the_middle_of_a_block_do_not_hold_up_the_exit(tmp_path):
    """Blocks of 16 MB are on their way to the parent most of the time."""
    spec = write_shards(tmp_path, ["x" * 8_000_000] * 8, 1, "jsonl")
    script = tmp_path / "parent.py"
    script.write_text(
        "import time\n"
        "from kru_triton.train.text.rows import START\n"
        "from kru_triton.train.text.sources import find_source\n"
        "from kru_triton.train.text.streams import Plan, Workers\n"
        "from kru_triton.train.text.tokenizer import ByteTokenizer\n"
        "if __name__ == '__main__':\n"
        f"    source = find_source({spec!r})\n"
        "    plan = Plan((source,), ByteTokenizer(), 0, 0, 1, 1, False)\n"
        "    workers = [Workers(plan, 1) for _ in range(3)]\n"
        "    begin = (0, START)\n"
        "    first = [[w.block(0, 0, 0, begin) for _ in range(8)][0] for w in workers]\n"
        "    for number, (w, future) in enumerate(zip(workers, first)):\n"
        "        future.result()\n"
        "        time.sleep(0.02 * number)\n"
        "        w.close()\n"
        "    print('closed', flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, script], stdout=subprocess.PIPE, text=True, timeout=100, check=True
    )
    assert done.stdout == "closed\n"


def test_no_worker_outlives_a_killed_parent(tmp_path):
    spec = write_shards(tmp_path, make_texts(50), 2, "jsonl")
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, sys, time\n"
        "from kru_triton.train.text.sources import find_source\n"
        "from kru_triton.train.text.streams import Plan, StreamBatches\n"
        "from kru_triton.train.text.tokenizer import ByteTokenizer\n"
        "if __name__ == '__main__':\n"
        f"    source = find_source({spec!r})\n"
        "    plan = Plan((source,), ByteTokenizer(), 0, 0, 1, 8, False)\n"
        "    batches = StreamBatches(plan, 2, 16, workers=1)\n"
        "    batches.next()\n"
        "    print(batches.workers.pools[0].submit(os.getpid).result(), flush=True)\n"
        "    time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    wait_until_gone(worker)


def test_a_state_of_something_else_is_refused(tmp_path):
    spec = write_shards(tmp_path, make_texts(50), 2, "jsonl")
    state = StreamBatches(make_plan(spec), 4, 16).state()
    other = write_shards(tmp_path / "other", make_texts(51), 2, "jsonl")
    cases = [
        (
            StreamBatches(make_plan(spec, world_size=2), 4, 16),
            "rank 0 of 1, this is rank 0 of 2",
        ),
        (StreamBatches(make_plan(spec), 3, 16), r"\[4, 16\], now \[3, 16\]"),
        (StreamBatches(make_plan(other), 4, 16), "of other data, tokenizer, seed"),
        (StreamBatches(make_plan(spec, seed=1), 4, 16), "of other data, tokenizer, seed"),
    ]
    for batches, message in cases:
        with pytest.raises(ValueError, match=message):
            batches.load_state(state)


# Faults


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "jsonl.gz"])
def test_faults_lose_nothing_and_change_nothing(tmp_path, quick_retries, monkeypatch, kind, capfd):
    monkeypatch.setattr(shards, "RETRIES", 30)  # so many faults may come in a row by chance
    texts = make_texts(400)
    write_shards(tmp_path, texts, 3, kind)
    draw = np.random.default_rng(3)
    other = make_texts(3)[2].encode() + b"\n"  # another version of the file
    faults = [503, 429, 500, 416, "drop", "short", "cut", "long", "garbage", "no-range", other]
    faults += ["page", "error", "elsewhere", "untold", "chunked", "gzip", "gzip-part"]
    spell, made = [], set()  # faults to come in a row; those that were made

    def fault(path, begin, end):
        if not spell and draw.random() < 0.4:
            spell.extend(draw.choice(len(faults), draw.integers(1, 5)))
        if not spell:
            return None
        made.add(faults[spell[-1]])
        return faults[spell.pop()]

    with serve(FileServer(tmp_path)) as server:
        reader = "parquet" if kind == "parquet" else "json"
        specs = [f"{reader}:{server.url}/{shard}.{kind}" for shard in range(3)]
        found = [find_source(spec) for spec in specs]
        source = found[0].with_shards(shard for one in found for shard in one.shards)
        plan = Plan((source,), BYTES, 0, 0, 1, 16, False)
        calm = read_batches(StreamBatches(plan, 4, 200), 40)
        server.fault = fault
        assert_equal(read_batches(StreamBatches(plan, 4, 200), 40), calm)
        epochs = 0
        while server.faults < 200:
            (read,) = read_epochs(plan)
            assert sorted(read) == sorted(texts)
            epochs += 1
        assert epochs >= 1
        assert made == set(faults)
    assert "; again in 0 s" in capfd.readouterr().err


def test_a_stalled_server_is_left_and_asked_again(tmp_path, quick_retries):
    texts = make_texts(40)
    write_shards(tmp_path, texts, 1, "jsonl")
    stalls = iter(["stall", None, "stall"])
    with serve(FileServer(tmp_path, lambda *_: next(stalls, None))) as server:
        server.stall = 3600  # whoever waits for it does so to the end of the tests
        plan = make_plan(f"json:{server.url}/0.jsonl")
        (read,) = read_epochs(plan)
        assert sorted(read) == sorted(texts)
        assert server.faults == 2


@pytest.mark.parametrize("fault", [503, "drop", "cut", "garbage"])
def test_a_shard_that_stays_broken_is_named_and_the_position_stays_good(
    tmp_path, quick_retries, monkeypatch, fault
):
    monkeypatch.setattr(shards, "RETRIES", 3)
    monkeypatch.setattr(streams, "PANEL", 128)  # so that batches come before the fault
    write_shards(tmp_path, make_texts(400), 1, "jsonl")
    size = (tmp_path / "0.jsonl").stat().st_size
    with serve(FileServer(tmp_path)) as server:
        plan = make_plan(f"json:{server.url}/0.jsonl")
        calm = read_batches(StreamBatches(plan, 2, 64), 400)
        server.fault = lambda path, begin, end: fault if begin > 0.9 * size else None
        batches, found = StreamBatches(plan, 2, 64), []
        with pytest.raises(DataError, match=r"http://.*/0\.jsonl: .* \(4 times\)") as error:
            read_until_stop(batches, 400, found)
        assert error.value.shard == f"{server.url}/0.jsonl"
        assert len(found) > 10
        state = json.loads(json.dumps(batches.state()))
        batches.close()
        server.fault = lambda *_: None
        batches = StreamBatches(plan, 2, 64)
        batches.load_state(state)
        assert_equal(found + read_batches(batches, 400 - len(found)), calm)


@pytest.mark.parametrize("fault", ["page", "error", 503, "long", "elsewhere", "gzip", None])
def test_a_size_is_not_learned_from_a_wrong_reply(tmp_path, quick_retries, fault):
    write_shards(tmp_path, make_texts(50), 1, "jsonl")
    (tmp_path / "empty.jsonl").touch()
    wrong = iter([fault])
    with serve(FileServer(tmp_path, lambda *_: next(wrong, None))) as server:
        size = find_size(f"{server.url}/0.jsonl", "json")
        assert size == (tmp_path / "0.jsonl").stat().st_size
        assert find_size(f"{server.url}/empty.jsonl", "json") == 0


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        (["page"], r"a page \(text/html\) comes in its place; is there a login\?"),
        (["error", "no-range"], r"it has 18 bytes in one reply, 4\d\d\d in the next"),
        (["loop"], "10 redirects, one after another"),
        ([503], "HTTP 503"),
    ],
)
def test_a_size_that_cannot_be_learned_is_an_error(tmp_path, quick_retries, faults, message):
    write_shards(tmp_path, make_texts(20), 1, "jsonl")
    replies = itertools.cycle(faults)
    with serve(FileServer(tmp_path, lambda *_: next(replies))) as server:
        where = re.escape(f"{server.url}/0.jsonl")
        with pytest.raises(UserError, match=f"^cannot read {where}: {message}$"):
            find_source(f"json:{server.url}/0.jsonl")


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
@pytest.mark.parametrize("known", [18, 0.5, 1.5])
def test_a_known_size_that_is_wrong_loses_nothing_without_a_word(
    tmp_path, quick_retries, monkeypatch, kind, known
):
    monkeypatch.setattr(shards, "RETRIES", 2)
    write_shards(tmp_path, make_texts(100), 1, kind)
    content = (tmp_path / f"0.{kind}").read_bytes()
    if known != 18:
        known = content[: int(known * len(content))].rfind(b"\n") + 1 + len(content) * (known > 1)
    with serve(FileServer(tmp_path)) as server:
        (source,) = make_plan(f"{kind.split('.')[0].rstrip('l')}:{server.url}/0.{kind}").sources
        source = source.with_shards([dataclasses.replace(source.shards[0], size=known)])
        message = (
            rf"0\.{kind}: the server says that it has {len(content):,} bytes; it had {known:,} "
            r"when the run began\. If it has changed, begin a new run \(3 times\)"
        )
        with pytest.raises(DataError, match=message):
            list(read_shard(source, 0, -1, 0, 1))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (b'{"text": "new"}\n', "the server says that it has 16 bytes; it had"),
        (416, "HTTP 416 with no part, where 1500 bytes from 1500 on"),
        ("page", r"18 bytes of text/html come in its place; it had \d+,\d+ when the run began"),
        ("error", "18 bytes of application/json come in its place; it had"),
        ("elsewhere", "HTTP 206 with bytes from 1501 on, where 1500 bytes from 1500 on were"),
        ("untold", "HTTP 206 with no part, where 1500 bytes from 1500 on were asked for"),
    ],
)
def test_a_reply_that_is_not_of_the_shard_is_named(
    tmp_path, quick_retries, monkeypatch, fault, message
):
    monkeypatch.setattr(shards, "RETRIES", 2)
    texts = make_texts(100)
    write_shards(tmp_path, texts, 1, "jsonl")
    with serve(FileServer(tmp_path)) as server:
        source = find_source(f"json:{server.url}/0.jsonl")
        server.fault = lambda path, begin, end: fault if begin else None
        found = []
        with pytest.raises(DataError, match=message):
            found.extend(row.text.decode() for row in read_shard(source, 0, -1, 0, 1))
        assert 0 < len(found) < 100
        assert found == texts[: len(found)]


def test_a_cache_that_is_stale_is_passed_by(tmp_path, quick_retries, capfd):
    texts = make_texts(50)
    write_shards(tmp_path, texts, 1, "jsonl")
    with serve(FileServer(tmp_path)) as server:
        source = find_source(f"json:{server.url}/0.jsonl")
        server.cached = b'{"text": "old"}\n'
        assert [row.text.decode() for row in read_shard(source, 0, -1, 0, 1)] == texts
    assert "0.jsonl: the server says that it has 16 bytes; it had" in capfd.readouterr().err


def test_a_local_shard_that_has_changed_is_an_error_at_once(tmp_path):
    spec = write_shards(tmp_path, make_texts(100), 1, "jsonl")
    plan = make_plan(spec)
    lines = (tmp_path / "0.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "0.jsonl").write_bytes(b"".join(lines[:60]))  # cut at a line's end
    with pytest.raises(DataError, match=r"0\.jsonl: \d+ bytes at .*when the run began"):
        read_epochs(plan)


def test_a_shard_that_is_not_whole_on_the_server_is_an_error(tmp_path, quick_retries):
    spec = write_shards(tmp_path, make_texts(100), 1, "parquet")
    (tmp_path / "0.parquet").write_bytes((tmp_path / "0.parquet").read_bytes()[:-300])
    with pytest.raises(DataError, match=r"0\.parquet: "):
        list(read_shard(find_source(spec), 0, -1, 0, 1))


# The Hub


BOOKS = """---
configs:
- config_name: small
  data_files:
  - split: train
    path:
    - small/train-*
    - small/*-of-3.jsonl
  - split: validation
    path: small/validation.jsonl
- config_name: big
  data_files: big/*.parquet
---
"""
READ = """
import json, sys
from kru_triton.train.text import shards
from kru_triton.train.text.rows import read_shard
from kru_triton.train.text.sources import find_source
from kru_triton.train.run.settings import UserError
shards.FIRST_PAUSE = 0.01
shards.CHUNK = 700
for spec in sys.argv[1:]:
    try:
        source = find_source(spec)
        rows = [r.text.decode() for i in range(len(source.shards))
                for r in read_shard(source, i, -1, 0, 1)]
        print(json.dumps({"names": [s.name for s in source.shards], "rows": rows}))
    except UserError as error:
        print(json.dumps({"error": str(error)}))
"""


def test_hub_configs_splits_fields_faults_and_bad_names(tmp_path):
    texts = make_texts(120)
    books, mixed, secret = (tmp_path / "hub/org" / name for name in ("books", "mixed", "secret"))
    write_shards(books / "small", texts, 3, "jsonl")
    for shard in range(3):
        (books / f"small/{shard}.jsonl").rename(books / f"small/train-{shard}-of-3.jsonl")
    (books / "small/validation.jsonl").write_text('{"text": "valid"}\n')
    (books / "big").mkdir()
    table = pyarrow.table({"number": [1, 2], "body": ["one", "two"]})
    parquet.write_table(table, books / "big/a.parquet")
    (books / "README.md").write_text(BOOKS)
    for folder in (mixed, secret):
        folder.mkdir()
        (folder / "train.csv").write_text("text\na\nb\n")

    found = {"GET": 0}

    def fault(path, begin, end):  # each file read goes wrong in turn
        if "small/train" not in path:
            return None
        found["GET"] += 1
        return [None, "cut", "short", "garbage", None][found["GET"] % 5]

    specs = [
        "hub:org/books@small",
        "hub:org/books@small/validation",
        "hub:org/books@big/train#body",
        "hub:org/books@big",
        "hub:org/books@big#number",
        "hub:org/books",
        "hub:org/books@medium",
        "hub:org/books@small/test",
        "hub:org/nothing",
        "hub:org/secret",
        "hub:org/mixed",
        "hub:books",
    ]
    with serve(HubServer(tmp_path / "hub", fault)) as server:
        server.gated = ("org/secret",)
        results = run_hub(server.url, tmp_path, specs)
        assert server.faults > 5
    small, valid, big, *errors = results
    assert sorted(small["rows"]) == sorted(texts)
    assert all(name.startswith("hf://datasets/org/books@") for name in small["names"])
    assert (valid["rows"], big["rows"]) == (["valid"], ["one", "two"])
    expected = [
        ": no field 'text'; it has number (int64), body (string); name one with #field",
        "field 'number' is int64, not text",
        "available configs: ['small', 'big']",
        "'medium' not found. Available: ['small', 'big']",
        "no split 'test'; it has train, validation",
        "HF_TOKEN",
        "is a gated dataset",
        "train.csv is not of a kind that is read here",
        "must be hub:org/name[@config][/split][#field]",
    ]
    for message, error in zip(expected, errors, strict=True):
        assert message in error["error"]

    (refused,) = run_hub("http://127.0.0.1:9", tmp_path / "other", ["hub:org/books@small"])
    assert "(the Hub): no connection to 127.0.0.1:9" in refused["error"]


def run_hub(url, home, specs):
    environment = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(home / "home")}
    command = [sys.executable, "-c", READ, *specs]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


# Tokenizers


def test_trained_bpe_is_lossless_shorter_than_bytes_and_never_gives_bos():
    texts = [text.encode() for text in make_texts(200)]
    own = tokenizer.train_bpe(100, texts)
    assert own.vocab_size == own.bos + 1 == 257 + 100
    hard = [*texts, "<|endoftext|> \0 \x7f\u00ad \u3000 🙂 \r\n\t".encode(), b""]
    encoded = own.encode_batch(hard)
    for text, tokens in zip(hard, encoded):
        assert own.decode(tokens.tolist()) == text
        assert b"".join(own.decode_each(tokens.tolist())) == text
        assert own.bos not in tokens
        assert own.encode(text).tolist() == tokens.tolist()
    assert sum(map(len, encoded)) < 0.5 * sum(map(len, hard))


def foreign_tokenizer(path, normalizer=None, tokens=("<s>",)):
    """A tokenizer.json that is not byte-level, with special tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    own = Tokenizer(models.BPE(unk_token="<unk>"))
    own.normalizer = normalizers.Lowercase() if normalizer else None
    own.pre_tokenizer = pre_tokenizers.Metaspace()
    own.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=150, special_tokens=["<unk>", *tokens], show_progress=False
    )
    own.train_from_iterator(make_texts(100), trainer)
    own.enable_truncation(5)
    own.save(str(path))


def test_a_tokenizer_file_keeps_its_own_bos_and_never_makes_it_of_text(tmp_path):
    foreign_tokenizer(tmp_path / "tokenizer.json")
    own = tokenizer.read_tokenizer(str(tmp_path))
    assert own.bos == 1  # <s>
    text = b"unit state <s> matrix unit state matrix"
    tokens = own.encode(text)
    assert len(tokens) > 5  # not cut off, as the file says
    assert own.bos not in tokens
    pieces = list(own.decode_each(own.encode(b"unit state matrix").tolist()))
    assert b"".join(pieces) == b"unit state matrix"
    foreign_tokenizer(tmp_path / "other.json", tokens=())
    other = tokenizer.read_tokenizer(str(tmp_path / "other.json"))
    assert other.bos == other.vocab_size - 1
    assert not tokenizer.is_lossless(other, [b"Unit"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("bpe:x", "N of bpe:N must be a positive number"),
        ("bpe:0", "N of bpe:N must be a positive number"),
        ("words", "no such file; known: bytes, characters, bpe:N"),
        ("{tmp}/broken.json", "broken.json: "),
    ],
)
def test_bad_tokenizers_are_named(tmp_path, spec, message):
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "a.txt").write_text("words and words\n" * 200)
    config = Config(data=(f"text:{tmp_path}/a.txt",), tokenizer=spec.format(tmp=tmp_path))
    with pytest.raises(UserError, match=message):
        data.build(config, tmp_path / "run")


# What a run builds


def make_config(*specs, **settings):
    return Config(data=specs, batch_size=3, segment_length=32, **settings)


def test_a_run_keeps_its_tokenizer_held_out_part_and_shards(tmp_path):
    spec = write_shards(tmp_path / "data", make_texts(1500), 3, "jsonl")
    run_dir = tmp_path / "run"
    settings = {"tokenizer": "bpe:50", "shuffle_buffer": 32, "valid_bytes": 2000}
    built = data.build(make_config(spec, **settings), run_dir)
    assert built.statistics["train"]["shards"] == 3
    assert 2000 <= built.valid.num_bytes == built.statistics["valid"]["bytes"] < 2500
    assert set(built.baselines) == {"gzip", "xz"}
    counted = [s[1][s[3]] for s in validation_segments(built.valid, 4, 64)]
    counted = torch.cat(counted).tolist()
    text = built.tokenizer.decode(counted)
    assert len(text) == built.valid.num_bytes  # the bits of all tokens are those of all bytes
    batches = read_batches(built.train, 30)

    files = {name: (run_dir / name).read_bytes() for name in ("data.json", "tokenizer.json")}
    other = data.build(make_config(spec, **settings), run_dir, rank=1, world_size=2)
    again = data.build(make_config(spec, **settings), run_dir)
    assert {
        name: (run_dir / name).read_bytes() for name in ("data.json", "tokenizer.json")
    } == files
    assert other.tokenizer.sha256 == again.tokenizer.sha256 == built.tokenizer.sha256
    assert other.baselines == {}
    assert (other.valid.tokens == built.valid.tokens).all()
    assert_equal(read_batches(again.train, 30), batches)

    (run_dir / "config.json").write_text("{}")  # as of a run that has begun
    with pytest.raises(UserError, match="other data:\n  tokenizer: 'bpe:50' there, 'bytes' now"):
        data.build(make_config(spec, **{**settings, "tokenizer": "bytes"}), run_dir)
    assert (run_dir / "tokenizer.json").read_bytes() == files["tokenizer.json"]
    settings["tokenizer"] = "bpe:40"
    data.build(make_config(spec, resume="never", **settings), run_dir)
    assert (run_dir / "tokenizer.json").read_bytes() != files["tokenizer.json"]
    (run_dir / "tokenizer.json").write_bytes(files["tokenizer.json"])
    with pytest.raises(UserError, match="is not the tokenizer that this run began with"):
        data.build(make_config(spec, **settings), run_dir)
    (tmp_path / "data/0.jsonl").write_text('{"text": "short"}\n')
    with pytest.raises(DataError, match=r"0\.jsonl: has 18 bytes; it had .* when the run"):
        data.build(make_config(spec, **settings), run_dir)


def test_a_run_that_began_with_copies_goes_on_with_them_where_its_folder_is(tmp_path, monkeypatch):
    """As runs did when a file counted as often as links lead to it."""
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path / "data", make_texts(300), 3, "jsonl")
    (tmp_path / "data/again").symlink_to(".")
    config, run_dir = make_config("json:data/**/*.jsonl"), tmp_path / "run"
    assert data.build(config, run_dir).statistics["train"]["shards"] == 3
    saved = json.loads((run_dir / "data.json").read_text())
    shards = saved["sources"][0]["shards"]
    url, name = f"{tmp_path}/data/again/0.jsonl", "again/0.jsonl"
    shards.append({**shards[0], "url": url, "name": name})
    (run_dir / "data.json").write_text(json.dumps(saved))
    built = data.build(config, run_dir)
    batches = read_batches(built.train, 20)
    assert [shard.name for shard in built.train.plan.sources[0].shards][3:] == [name]
    (tmp_path / "moved").mkdir()
    (tmp_path / "data").rename(tmp_path / "moved/data")
    monkeypatch.chdir(tmp_path / "moved")
    assert_equal(read_batches(data.build(config, run_dir).train, 20), batches)

    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"text {number}\n" * 20)
    (tmp_path / "0-again.txt").symlink_to("0.txt")
    config, run_dir = make_config(f"text:{tmp_path}/*.txt"), tmp_path / "in memory"
    earlier = split_in_memory(*config.data, "", 1, once=False)
    (run_dir / "checkpoints").mkdir(parents=True)
    known = {part: statistics(getattr(earlier, part)) for part in ("train", "held_out")}
    settings = {"data": config.data, "train_sha256": known["train"]["sha256"]}
    settings["valid_sha256"] = known["held_out"]["sha256"]
    (run_dir / "config.json").write_text(json.dumps(settings))
    assert data.build(config, run_dir).statistics["train"] == known["train"]
    assert data.build(config, tmp_path / "new").statistics["train"]["documents"] == 38
    assert held_out_text(config.data, run_dir) == earlier.held_out


def test_validation_shards_are_not_trained_on(tmp_path):
    spec = write_shards(tmp_path, make_texts(300), 3, "jsonl")
    built = data.build(make_config(spec, valid=f"json:{tmp_path}/1.jsonl"), tmp_path / "run")
    assert built.statistics["train"]["shards"] == 2
    assert built.statistics["valid"]["documents"] == 100
    assert not built.train.plan.hold_out
    config = make_config(f"json:{tmp_path}/1.jsonl", valid=f"json:{tmp_path}/*.jsonl")
    with pytest.raises(UserError, match=r"all of its shards are in --valid"):
        data.build(config, tmp_path / "other")


def test_rows_without_text_are_left_out_and_invalid_utf8_is_replaced_both_counted(tmp_path, capfd):
    rows = [f'{{"text": "row {i}"}}'.encode() for i in range(40)]
    rows[3] = b'{"text": null}'
    rows[4] = b'{"other": 1}'
    rows[5] = b'{"text": "bad \xff byte"}'
    rows[6] = b'{"text": "half \\ud800 pair"}'
    rows[7] = b'{"text": ""}'
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows))
    plan = make_plan(f"json:{tmp_path}/a.jsonl")
    batches = StreamBatches(plan, 2, 64)
    read_batches(batches, 200)
    counts = batches.counts()
    assert 0 < counts["documents"] % 37 < 37 or counts["documents"] >= 37
    epochs = counts["documents"] / 37
    assert counts["no text (left out)"] == pytest.approx(3 * epochs, abs=3)
    assert counts["invalid UTF-8 (replaced)"] == pytest.approx(2 * epochs, abs=2)
    (read,) = read_epochs(plan)
    assert {"bad \ufffd byte", "half \ufffd pair"} <= set(read)
    assert len(read) == 37
    warnings = capfd.readouterr().err
    assert "a.jsonl: no text (left out) at " in warnings
    assert "a.jsonl: invalid UTF-8 (replaced) at " in warnings


# What is in a second shard; its texts, the remarks on its rows, and what `datasets` 5.2 gives, or
# None where it refuses
JSON_ROWS = {
    "first-lacks-field": ('{"b": 1}\n{"text": "c"}', ["c"], {"no text": 1}, None),
    "all-lack-field": ('{"b": 1}\n{"b": 2}', [], {"no text": 2}, None),
    "null": ('{"text": null}\n{"text": "c"}', ["c"], {"no text": 1}, [None, "c"]),
    "null-rows": ('{"text": "c"}\nnull', ["c"], {"no text": 1}, ["c", None]),
    "no-objects": ('{"text": "c"}\n3\n"x"\n[1]\ntrue', ["c"], {"not text": 4}, None),
    "empty": ('{"text": ""}\n{"text": "c"}', ["c"], {"no text": 1}, ["", "c"]),
    "numbers": ('{"text": 7}\n{"text": 7.5}', ["7", "7.5"], {"no string": 2}, ["7", "7.5"]),
    "truth": ('{"text": true}', ["true"], {"no string": 1}, ["true"]),
    "object": ('{"text": {"b": 1}}', ['{"b":1}'], {"no string": 1}, ['{"b":1}']),
    "list": ('{"text": ["c", "é"]}', ['["c","é"]'], {"no string": 1}, None),
    "not-a-number": ('{"text": NaN}\n{"text": "c", "n": -Infinity}', ["c"], {"no text": 1}, None),
    "twice": ('{"text": "c", "text": "d"}', ["d"], {}, None),
    "many-digits": ('{"n": %s, "text": "c"}' % ("1" * 5000), ["c"], {}, None),
    "half-a-pair": (r'{"text": "c\ud800"}', ["c\ufffd"], {"invalid UTF-8": 1}, None),
    "no-utf8": (b'{"text": "c\xff"}', ["c\ufffd"], {"invalid UTF-8": 1}, None),
    "nul": (r'{"text": "c\u0000"}', ["c\0"], {}, ["c\0"]),
    "spaces": (' {"text": "c"} \t\r\n\r\n \n{"text": "d"}', ["c", "d"], {}, ["c", "d"]),
    "byte-order-mark": ('\ufeff{"text": "c"}\n{"text": "d"}', ["c", "d"], {}, ["c", "d"]),
    "no-bytes": ("", [], {}, []),
}
TEXTS = ["c", None, "é"]
ARROW_FORMS = {
    "large": (pyarrow.array(TEXTS, pyarrow.large_string()), TEXTS, {}, TEXTS),
    "view": (pyarrow.array(TEXTS, pyarrow.string_view()), TEXTS, {}, TEXTS),
    "dictionary": (pyarrow.array(TEXTS).dictionary_encode(), TEXTS, {}, TEXTS),
    "nulls": (pyarrow.nulls(3), [None] * 3, {}, [None] * 3),
    "binary": (pyarrow.array([b"c", None, b"\xc3\xa9"]), TEXTS, {}, TEXTS),
    "no-utf8": (pyarrow.array([b"c\xff"]), ["c\ufffd"], {"invalid UTF-8": 1}, None),
    "binary-view": (pyarrow.array([b"c"], pyarrow.binary_view()), ["c"], {}, ["c"]),
    "fixed": (pyarrow.array([b"cd", None], pyarrow.binary(2)), ["cd", None], {}, ["cd", None]),
    "integers": (pyarrow.array([1, None]), ["1", None], {"no string": 1}, ["1", None]),
    "floats": (pyarrow.array([1.0, 0.5]), ["1", "0.5"], {"no string": 2}, ["1", "0.5"]),
    "decimals": (pyarrow.array([Decimal("1.50")]), ["1.50"], {"no string": 1}, ["1.50"]),
    "truth": (pyarrow.array([True]), ["true"], {"no string": 1}, ["true"]),
    "lists": (pyarrow.array([["c"], None]), [None, None], {"not text": 2}, None),
    "structs": (pyarrow.array([{"b": "c"}]), [None], {"not text": 1}, None),
    "other-field": (None, [None, None], {}, None),
}
ROWS = [("json", *case) for case in JSON_ROWS.items()]
ROWS += [("parquet", *case) for case in ARROW_FORMS.items()]


@pytest.mark.parametrize(("kind", "name", "case"), ROWS, ids=[f"{k}-{n}" for k, n, _ in ROWS])
def test_rows_are_read_as_datasets_reads_them_or_left_out_and_counted(tmp_path, kind, name, case):
    import datasets

    content, texts, remarks, theirs = case
    remarks = collections.Counter(remarks)
    files = [str(tmp_path / f"{shard}.{kind}") for shard in "ab"]
    if kind == "json":
        Path(files[0]).write_text('{"text": "a"}\n')
        Path(files[1]).write_bytes(content if isinstance(content, bytes) else content.encode())
    else:
        remarks["no text"] += texts.count(None) - remarks["not text"]
        parquet.write_table(pyarrow.table({"text": ["a"]}), files[0])
        columns = {"text": content} if content is not None else {"other": [1, 2]}
        parquet.write_table(pyarrow.table(columns), files[1])
    source = find_source(f"{kind}:{tmp_path}/*.{kind}")
    rows = [row for piece in range(3) for row in read_shard(source, 1, -1, piece, 3)]
    assert [row.text.decode() for row in rows if row.text] == [text for text in texts if text]
    counts = collections.Counter(row.remark.partition(" (")[0] for row in rows if row.remark)
    assert counts == +remarks
    for row in rows:  # from each row on
        assert list(read_shard(source, 1, row.at, 0, 1)) == rows[rows.index(row) :]
    if theirs is not None:
        read = datasets.load_dataset(kind, data_files=files, split="train", streaming=True)
        assert [row["text"] for row in read] == ["a", *theirs]


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_shards_without_text_end_no_run_and_change_no_batch(tmp_path, kind, capfd):
    texts, text = make_texts(40), pyarrow.array
    columns = [text(texts), pyarrow.nulls(30), text(texts).dictionary_encode(), text([["a"]] * 9)]
    for number, column in enumerate([*columns, None]):
        rows = [{"n": number}] * 20 if column is None else [{"text": t} for t in column.to_pylist()]
        if kind == "json":
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / f"{number}.json").write_text(lines)
        else:
            table = pyarrow.table({"n": [1] * 20} if column is None else {"text": column})
            parquet.write_table(table, tmp_path / f"{number}.parquet", row_group_size=7)
    plan = make_plan(f"{kind}:{tmp_path}/*.{kind}", buffer=8)
    whole = read_batches(StreamBatches(plan, 2, 512), 40)  # several epochs
    batches, found = StreamBatches(plan, 2, 512), []
    for stop in (3, 17, 18, 40):
        read_until_stop(batches, stop, found)
        state = json.loads(json.dumps(batches.state()))
        batches.close()
        batches = StreamBatches(plan, 2, 512)
        batches.load_state(state)
    assert_equal(found, whole)
    counts = batches.counts()
    documents = 80 + 9 * (kind == "json")
    assert batches.epochs_read() > 1
    assert counts["no text (left out)"] / counts["documents"] == pytest.approx(50 / documents, 0.4)
    warnings = capfd.readouterr().err
    assert re.search(rf"\.{kind}: no text \(left out\) at \d+: ", warnings)
    remark = r"no string \(read as text\)" if kind == "json" else r"not text \(left out\)"
    assert re.search(rf"3\.{kind}: {remark} at \d+: field 'text' is list.*, not text; ", warnings)


@pytest.mark.parametrize(
    ("name", "content", "spec", "message"),
    [
        ("a.jsonl", b"plain text\n", "json:{file}", "not JSON lines: .* in the line at byte 0"),
        (
            "a.json",
            b'[{"text": "a"}]',
            "json:{file}",
            "not JSON lines: the line at byte 0 is list, not an object with a field",
        ),
        (
            "a.jsonl",
            b'null\n{"body": "a", "n": 1}\n{"body": "b", "n": 2}\n',
            "json:{file}",
            r"no field 'text'; it has body \(str\), n \(int\); name one with #field",
        ),
        (
            "a.json",
            b'{"text": "a"}\n{\n  "text": "b"\n}\n',
            "json:{file}",
            "in the line at byte 14, b'{'; each object must be one line, as jq -c . writes it",
        ),
        (
            "a.json",
            b'{"text": "a"}\n[{"text": "b"}]\n',
            "json:{file}",
            r"14 is list.*jq -c '\.\[\]'",
        ),
        ("a.json", b'{"text": "a"}\n{"text": "\0"}\n', "json:{file}", "control char.* at byte 14"),
        (
            "a.json",
            b'["a"]\n',
            "json:{file}",
            "the line is list, not an object with a field 'text'",
        ),
        ("a.json", b'{"text": "a"}\n' + b"[" * 10**5, "json:{file}", "recursion.* at byte 14"),
        ("a.jsonl", b'{"text": 7}\n', "json:{file}", "is int, not text; name another"),
        ("a.jsonl", b'{"text": ""}\n', "json:{file}", "the first rows have no text"),
        ("a.parquet", b'{"text": "a"}\n', "parquet:{file}", "a.parquet: "),
        ("a.jsonl.gz", b'{"text": "a"}\n', "json:{file}", "a.jsonl.gz: "),
        ("a.jsonl", b"", "json:{file}", "the first rows have no text"),
        ("a.jsonl", b'{"text": "all the text there is"}', "json:{file}", "give --valid"),
        (
            "a.jsonl",
            b'{"text": "text 8"}',
            "json:{file}",
            r"all of its documents are in the held-out part \(1 in",
        ),
        ("a.jsonl", b"", "json:{tmp}/b*", r"no file matches 'json:.*/b\*'"),
        ("a.jsonl", b"", "csv:{file}", "unknown data 'csv:.*known: stdlib"),
        ("a.jsonl", b"", "0:json:{file}", "the weight must be positive"),
        ("a.jsonl", b"", "json:http://127.0.0.1:9/a.jsonl", "no connection to 127.0.0.1:9"),
    ],
)
def test_bad_data_is_named(tmp_path, name, content, spec, message):
    (tmp_path / name).write_bytes(content)
    config = make_config(spec.format(file=tmp_path / name, tmp=tmp_path))
    with pytest.raises(UserError, match=message):
        data.build(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_missing_remote_file_is_named_at_once(tmp_path, quick_retries):
    with serve(FileServer(tmp_path)) as server:
        with pytest.raises(UserError, match=r"cannot read http://.*/a\.jsonl: HTTP 404"):
            find_source(f"json:{server.url}/a.jsonl")
        assert len(server.requests) == 1


@pytest.mark.parametrize("fault", ["no-range", "chunked", "gzip", "gzip-part", "no-total"])
def test_a_server_without_sizes_or_ranges_is_read_whole(tmp_path, quick_retries, fault):
    texts = make_texts(50)
    write_shards(tmp_path, texts, 1, "jsonl")
    with serve(FileServer(tmp_path, lambda *_: fault)) as server:
        plan = make_plan(f"json:{server.url}/0.jsonl")
        size = (tmp_path / "0.jsonl").stat().st_size
        assert plan.sources[0].shards[0].size == (size if fault == "no-range" else None)
        (read,) = read_epochs(plan)
        assert sorted(read) == sorted(texts)


def test_remote_files_are_unpacked_under_any_name(tmp_path, quick_retries):
    texts = make_texts(200)
    write_shards(tmp_path, texts, 1, "jsonl")
    lines = (tmp_path / "0.jsonl").read_bytes()
    with pyarrow.CompressedOutputStream(str(tmp_path / "a.jsonl.zst"), "zstd") as file:
        file.write(lines)
    (tmp_path / "b.bin").write_bytes((tmp_path / "a.jsonl.zst").read_bytes())
    (tmp_path / "c.jsonl").write_bytes(gzip.compress(lines))
    with serve(FileServer(tmp_path)) as server:
        for name in ("a.jsonl.zst", "b.bin?download=1", "c.jsonl"):
            spec = f"json:{server.url}/{name}"
            (read,) = read_epochs(make_plan(spec))
            assert sorted(read) == sorted(texts)
            assert read_documents(spec.replace("json:", "text:"))[0][1] == lines


def test_several_data_flags_and_a_toml_list(tmp_path):
    assert parse(["--data", "stdlib", "--data", "2:text:a*"]).data == ("stdlib", "2:text:a*")
    (tmp_path / "a.toml").write_text('data = ["stdlib", "json:x"]\nworkers = 2\n')
    (tmp_path / "b.toml").write_text('data = "json:x"\n')
    assert parse(["--config", str(tmp_path / "a.toml")]).data == ("stdlib", "json:x")
    assert parse(["--config", str(tmp_path / "b.toml")]).data == ("json:x",)
    assert parse(["--config", str(tmp_path / "a.toml"), "--data", "json:y"]).data == ("json:y",)
    assert parse([]).data == ("stdlib",)
    (tmp_path / "c.toml").write_text("data = []\n")
    with pytest.raises(UserError, match="--data must name at least one source"):
        parse(["--config", str(tmp_path / "c.toml")])


def test_a_run_on_a_stream_with_bpe_goes_on_exactly_and_is_sampled(tmp_path):
    spec = write_shards(tmp_path / "data", make_texts(1500), 3, "parquet")
    for folder in "ab":  # files of one name
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "c.txt").write_text(f"{folder} " + "a text file " * 500)
    text = f"text:{tmp_path}/[ab]/*.txt"
    flags = [*TINY, "--data", f"2:{spec}", "--data", text, "--tokenizer", "bpe:50"]
    flags += ["--valid", f"parquet:{tmp_path}/data/1.parquet", "--valid-bytes", "3000"]

    def train(run_dir, *more):
        command = [sys.executable, str(TRAIN / "lm.py"), *flags, "--run-dir", str(run_dir), *more]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        return done.stdout, [json.loads(line)["train/loss_nats"] for line in lines]

    out, whole = train(tmp_path / "whole", "--steps", "60", "--checkpoint-every", "50")
    assert re.search(r"train: 4 shards of 2:parquet:.*, text:.*, streamed, ", out)
    assert "tokenizer: 307 tokens, sha256 " in out
    for path in (tmp_path / "whole/checkpoints").iterdir():
        if path.name != "step-50":  # as if it had been killed after it
            shutil.rmtree(path)
    out, resumed = train(tmp_path / "whole", "--steps", "60", "--workers", "1")
    assert "step 50" in out
    assert resumed == whole

    model, own, _ = load.load_model(str(tmp_path / "whole"), "cpu", "torch")
    assert (own.vocab_size, own.bos) == (307, 306)
    generator = torch.Generator().manual_seed(0)
    drawn = generate.generate(
        model, own, b"the unit", 20, temperature=1.0, top_p=1.0, generator=generator
    )
    assert b"".join(own.decode_each(drawn))
    (tmp_path / "whole/tokenizer.json").write_text(
        tokenizer.train_bpe(20, [text.encode() for text in make_texts(50)]).json
    )
    with pytest.raises(UserError, match=r"the tokenizer of .* has 277 tokens, the model of .* 307"):
        load.load_model(str(tmp_path / "whole"), "cpu", "torch")


def test_bench_data_quick(tmp_path):
    command = [sys.executable, "-m", "bench", "data", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=TRAIN.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    cases = {(row["source"], row["tokenizer"]) for row in rows}
    assert cases == {(s, t) for s in ("memory", "json", "parquet") for t in ("bytes", "bpe")}
    for row in rows:
        assert 0 < row["mb_s"][0] <= row["mb_s"][1] <= row["mb_s"][2]
        assert row["commit"].removesuffix("-dirty").replace("sources-", "").isalnum()
