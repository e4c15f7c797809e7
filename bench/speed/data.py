"""Throughput of the data path alone: from files to batches, no model.

    python -m bench data                            # some minutes
    python -m bench data --quick                    # the same code for a moment each

The text is the standard library's source, as `--data stdlib` reads it, written as 8 shards of JSON
lines and of Parquet into a temporary directory, shuffled 64 documents at a time. Each case reads
`--megabytes` of UTF-8 text in batches of 32 lanes and 128 tokens, from its first batch on, when
each line has one block ready. The cases take turns; a row holds the 20th, 50th and 80th percentile
over the rounds of megabytes per second, and the median per second of CPU time where no worker
processes are in it. BPE has 4,096 merges. What is in `memory` was tokenised before the clock
started.
"""

import functools
import json
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow
import torch
from pyarrow import parquet

from bench import harness
from kru_triton.train.text.batches import MemoryBatches, TokenArray
from kru_triton.train.text.documents import read_documents
from kru_triton.train.text.sources import find_source
from kru_triton.train.text.streams import Plan, StreamBatches
from kru_triton.train.text.tokenizer import ByteTokenizer, train_bpe

LANES, LENGTH, SHARDS, MERGES = 32, 128, 8, 4096


def main(argv: list[str] | None = None) -> int:
    parser = harness.parser(__doc__, "data")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=float, nargs=2, default=[200, 40], help="bytes, BPE")
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2])
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = harness.Results(torch.device("cpu"), args, harness.command_line("data", argv))
    if args.quick:
        args.rounds, args.megabytes, args.workers = 1, [1, 1], [0]

    documents = read_documents("stdlib")
    documents = [document for document in documents if document[1]]
    if args.quick:
        documents = documents[:40]
    texts = [text for _, text in documents]
    bpe = train_bpe(MERGES, texts)
    tokenizers = {"bytes": ByteTokenizer(), "bpe": bpe}
    tokens = sum(len(t) for t in bpe.encode_batch(texts))
    bytes_per_token = {"bytes": 1.0, "bpe": sum(map(len, texts)) / tokens}

    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), texts)
        cases = {}
        for name, tokenizer in tokenizers.items():
            lanes = MemoryBatches(TokenArray(documents, tokenizer), LANES, LENGTH, seed=0)
            cases["memory", name, 0] = lambda lanes=lanes: lanes
            for kind in ("json", "parquet"):
                source = find_source(f"{kind}:{folder}/*.{kind}")
                plan = Plan((source,), tokenizer, 0, 0, 1, 64, False)
                for workers in args.workers:
                    cases[kind, name, workers] = functools.partial(
                        StreamBatches, plan, LANES, LENGTH, workers
                    )
        speeds = {case: [] for case in cases}
        amounts = dict(zip(tokenizers, args.megabytes))
        for _ in range(args.rounds):
            for (kind, name, workers), make in cases.items():
                pair = measure(make(), amounts[name], bytes_per_token[name])
                speeds[kind, name, workers].append(pair)

    results.title("source, tokenizer, workers: MB/s (p20, p50, p80) and MB per CPU second")
    for (source, name, workers), pairs in speeds.items():
        walls, cpus = zip(*pairs)
        wall = np.percentile(walls, [20, 50, 80]).round(2).tolist()
        cpu = None if workers else round(statistics.median(cpus), 2)
        label = f"data {source} {name} {workers} workers"
        values = {"source": source, "tokenizer": name, "workers": workers, "mb_s": wall}
        results.add("data", label, f"{wall} MB/s, {cpu or '-'}", **values, mb_per_cpu_s=cpu)
    return results.finish()


def write_shards(folder: Path, texts: list[bytes]) -> None:
    for shard in range(SHARDS):
        part = [text.decode() for text in texts[shard::SHARDS]]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in part)
        (folder / f"{shard}.json").write_text(lines)
        table = pyarrow.table({"text": part})
        parquet.write_table(table, folder / f"{shard}.parquet", row_group_size=100)


def measure(batches, megabytes: float, bytes_per_token: float) -> tuple[float, float]:
    """Megabytes of text per second of wall time, and of this process's CPU time."""
    batches.next()
    began, cpu, size = time.perf_counter(), cpu_seconds(), 0.0
    while size < megabytes:
        inputs, _, _ = batches.next()
        size += inputs.numel() * bytes_per_token / 1e6
    speeds = size / (time.perf_counter() - began), size / (cpu_seconds() - cpu)
    batches.close()
    return speeds


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
