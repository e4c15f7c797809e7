"""How well a model predicts a text, and how much a long context helps it.

    text       BOS d o c 1 BOS d o c 2 ...        every token but BOS is predicted once
    carried     ------------------------>         one state from the first token to the last
    document    --------|--------------->         cut where a document starts, as in training
    1,000       ---|---|---|---|---|---|>         the carried state, cut every 1,000 tokens

All of these read the text at the same time, as rows of one batch. What a row gains over one that
is cut more often is what context beyond that length is worth.

    python train/evaluate.py runs/lm
    python train/evaluate.py exported --data 'text:books/*.txt' --contexts 100 1000 10000
    python train/evaluate.py runs/lm --data 'text:books/*.txt' --max-bytes 1000000 --json books.json

Exit codes: 0; 2 bad arguments or data; 130 Ctrl-C.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of an import

import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch.nn import functional as F
from tqdm import tqdm

from kru_triton.lm.model import LanguageModel
from kru_triton.train.run.checkpoints import write_atomic
from kru_triton.train.run.device import pick_dtype
from kru_triton.train.run.directory import commit, versions
from kru_triton.train.run.script import one_line
from kru_triton.train.run.settings import UserError
from kru_triton.train.text.batches import TokenArray
from kru_triton.train.text.documents import Document, read_documents, statistics
from kru_triton.train.text.held_out import held_out_text, run_data
from kru_triton.train.text.load import load_model


@dataclass
class EvaluateConfig:
    model: tyro.conf.Positional[str]
    """The run directory of train/lm.py, a folder of train/export.py, or hub:org/name."""
    data: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text, spelled like --data of train/lm.py. Nothing: the validation text of the run; of an
    exported model stdlib. Of stdlib always the part that training holds out."""
    held_out: bool = False
    """Only the part of --data that the run held out; of text that it was not trained on, what
    training on it holds out where it is given no --valid."""
    max_bytes: int = 0
    """Only the first bytes of the text. 0: all of it."""
    contexts: tuple[int, ...] = (1_000, 10_000, 100_000)
    """Lengths in tokens after which the carried state is cut."""
    segment_length: int = 1024
    """Tokens read per call. It bounds memory and changes no result."""
    json: str = ""
    """Write the results to this file too."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """bfloat16: under autocast. auto: that where the device multiplies it in hardware."""
    backend: Literal["auto", "triton", "torch"] = "auto"
    """Which implementation of the recurrence runs."""

    def __post_init__(self):
        if isinstance(self.data, str):
            self.data = (self.data,)

    @property
    def run_dir(self) -> Path | None:
        """The run that `model` is of, where it is not exported."""
        return Path(self.model) if Path(self.model, "checkpoints").exists() else None

    @property
    def specs(self) -> tuple[str, ...]:
        return self.data or run_data(self.run_dir)


def read_text(config: EvaluateConfig) -> list[Document]:
    """The documents to predict."""
    limit = config.max_bytes or 1 << 62
    if config.held_out or config.data in ((), ("stdlib",)):
        documents = held_out_text(config.specs, config.run_dir)
    else:
        documents = [d for spec in config.specs for d in read_documents(spec, limit)]
    kept, total = [], 0
    for name, text in documents:
        if total + len(text) > limit:  # up to the last whole character
            text = text[: limit - total].decode("utf-8", "ignore").encode()
        kept.append((name, text))
        total += len(text)
    kept = [(name, text) for name, text in kept if text]
    if not kept:
        raise UserError(f"--data {' '.join(config.specs)}: no text to predict")
    return kept


def cuts(inputs: torch.Tensor, start: int, bos: int, contexts: list[int | None]) -> torch.Tensor:
    """Where the states of carried, document and each context are cut: `(2 + contexts, T)` bool."""
    index = torch.arange(start, start + len(inputs))
    rows = [index == 0, inputs == bos, *(index % context == 0 for context in contexts)]
    return torch.stack(rows)


@torch.no_grad()
def losses(model: LanguageModel, tokens: np.ndarray, bos: int, config: EvaluateConfig, autocast):
    """Sum of the losses of all targets but BOS, in nats, for each row of `cuts`; their number."""
    device = next(model.parameters()).device
    rows = 2 + len(config.contexts)
    nats, count, state = torch.zeros(rows, dtype=torch.float64, device=device), 0, None
    last = len(tokens) - 1
    bar = tqdm(total=last, unit=" tokens", unit_scale=True, disable=not sys.stderr.isatty())
    for start in range(0, last, config.segment_length):
        piece = torch.from_numpy(tokens[start : start + config.segment_length + 1].astype(np.int64))
        inputs, targets = piece[:-1], piece[1:]
        reset = cuts(inputs, start, bos, config.contexts).to(device)
        with autocast:
            logits, state = model(inputs.to(device).expand(rows, -1), state, reset)
        counted = targets != bos
        goal = targets.masked_fill(~counted, -100).to(device).repeat(rows)
        each = F.cross_entropy(logits.flatten(0, 1).float(), goal, reduction="none")
        nats += each.view(rows, -1).sum(1, dtype=torch.float64)
        count += int(counted.sum())
        bar.update(len(inputs))
    bar.close()
    return nats.tolist(), count


def evaluate(config: EvaluateConfig) -> dict:
    """The results, as `--json` writes them."""
    for name in ("contexts", "segment_length"):
        values = np.atleast_1d(getattr(config, name))
        if (values < 1).any():
            raise UserError(f"--{name.replace('_', '-')} must be positive, got {values.min()}")
    if config.max_bytes < 0:
        raise UserError(f"--max-bytes must be at least 0, got {config.max_bytes}")
    model, tokenizer, folder = load_model(config.model, config.device, config.backend)
    device = next(model.parameters()).device
    documents = read_text(config)
    stream = TokenArray(documents, tokenizer)
    dtype = pick_dtype(config.dtype, device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")
    began = time.perf_counter()
    nats, count = losses(model, stream.tokens, stream.bos, config, autocast)
    seconds = time.perf_counter() - began
    names = ["carried", "document", *(f"{context:,}" for context in config.contexts)]
    results = [
        {
            "state": name,
            "loss_nats": total / count,
            "perplexity": math.exp(total / count),
            "bpb": total / math.log(2) / stream.num_bytes,
        }
        for name, total in zip(names, nats)
    ]
    if not all(math.isfinite(row["bpb"]) for row in results):
        raise UserError(f"{config.model}: the loss is not finite")
    return {
        "model": str(folder),
        "parameters": model.num_parameters,
        "data": {"spec": " ".join(config.specs), **statistics(documents)},
        "tokens": count,
        "results": results,
        "settings": asdict(config) | {"dtype": dtype},
        "seconds": seconds,
        "versions": versions(),
        "commit": commit(),
    }


def table(report: dict) -> str:
    """The results for people; the last column is what the carried state gains over the row."""
    text = report["data"]
    lines = [
        f"{report['model']}: {report['parameters']:,} parameters",
        f"{text['spec']}: {text['documents']:,} documents, {text['bytes']:,} bytes, "
        f"{report['tokens']:,} tokens predicted, sha256 {text['sha256'][:16]}",
        "",
        "state cut      loss (nats)   perplexity   bits per byte   carried gains",
    ]
    carried = report["results"][0]["bpb"]
    for row in report["results"]:
        name = {"carried": "never", "document": "at documents"}.get(row["state"], row["state"])
        lines.append(
            f"{name:<14} {row['loss_nats']:>11.4f} {row['perplexity']:>12.3f} "
            f"{row['bpb']:>15.4f} {row['bpb'] - carried:>15.4f}"
        )
    longest = report["tokens"] + text["documents"]
    never = [f"{c:,}" for c in report["settings"]["contexts"] if c >= longest]
    if never:
        lines.append(f"the text is shorter than {', '.join(never)} tokens: nothing was cut there")
    return "\n".join(lines)


def main() -> None:
    description, _, examples = __doc__.partition("\n\n    python")
    config = tyro.cli(EvaluateConfig, description=description + "\n\n    python" + examples)
    sys.stdout.reconfigure(errors="backslashreplace")  # names may be no UTF-8
    with one_line():
        report = evaluate(config)
        if config.json:
            write_atomic(Path(config.json), json.dumps(report, indent=1) + "\n")
        print(table(report))


if __name__ == "__main__":
    main()
