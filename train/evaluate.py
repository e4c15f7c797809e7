"""How well a model predicts a text, and how much a long context helps it.

    text       BOS d o c 1 BOS d o c 2 ...        every token but BOS is predicted once
    carried     ------------------------>         one state from the first token to the last
    document    --------|--------------->         cut where a document starts, as in training
    1,000       ---|---|---|---|---|---|>         the carried state, cut every 1,000 tokens

All of these read the text at the same time, as rows of one batch. What a row gains over one that
is cut more often is what context beyond that length is worth.

With `--dynamic` every row is measured once more with weights that follow the text: whenever
`--dynamic-tokens` tokens were predicted, a gradient step on them and a step back towards the
trained weights (Krause, Kahembwe, Murray and Renals, *Dynamic Evaluation of Neural Sequence
Models*, ICML 2018). A cut puts the trained weights back, so that a row knows no more text than its
state does. These figures stand apart; the checkpoint stays as it is.

    python train/evaluate.py runs/lm
    python train/evaluate.py runs/lm --dynamic --max-bytes 100000
    python train/evaluate.py exported --data 'text:books/*.txt' --contexts 100 1000 10000
    python train/evaluate.py runs/lm --data 'text:books/*.txt' --max-bytes 1000000 --json books.json

Exit codes: 0; 2 bad arguments or data; 130 Ctrl-C.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of an import

import json
import math
import os
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
from kru_triton.ops.arguments import Backend
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
    dynamic: bool = False
    """Dynamic evaluation too. Rows take turns at it, one sequence each: slow."""
    dynamic_lr: float = 3e-4
    """Its learning rate."""
    dynamic_decay: float = 1e-3
    """The share of the way back to the trained weights that each step goes."""
    dynamic_tokens: int = 64
    """Tokens between two steps."""
    json: str = ""
    """Write the results to this file too."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """bfloat16: under autocast. auto: that where the device multiplies it in hardware."""
    backend: Backend = "auto"
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


def dynamic_losses(
    model: LanguageModel, tokens: np.ndarray, bos: int, config: EvaluateConfig, autocast
) -> list[float]:
    """As `losses`, with weights that learn from what was predicted since the last cut."""
    inputs, targets = (torch.from_numpy(t.astype(np.int64)) for t in (tokens[:-1], tokens[1:]))
    targets = targets.masked_fill(targets == bos, -100)
    trained = [p.detach().clone() for p in model.parameters()]
    for module in model.modules():
        module.train(isinstance(module, torch.nn.RNNBase))  # or cuDNN refuses its backward
    rows = cuts(inputs, 0, bos, config.contexts)
    bar = tqdm(total=rows.numel(), unit=" tokens", unit_scale=True, disable=not sys.stderr.isatty())
    found = {}  # by the places of the cuts: a context longer than the text makes none
    for row in rows:
        places = tuple(row.nonzero().flatten().tolist())
        if places not in found:
            parts = zip(*(x.tensor_split(places[1:]) for x in (inputs, targets)))
            found[places] = sum(
                adapt(model, trained, *part, config, autocast, bar) for part in parts
            )
    bar.close()
    set_weights(model, trained)
    model.eval()
    return [found[tuple(row.nonzero().flatten().tolist())] for row in rows]


def adapt(
    model: LanguageModel, trained: list, inputs, targets, config: EvaluateConfig, autocast, bar
) -> float:
    """Sum of the losses of one text, read from a zero state with the trained weights at first.

    The step is RMSprop's with its mean corrected for the start, Adam's without momentum.
    """
    set_weights(model, trained)
    device = next(model.parameters()).device
    optimizer = torch.optim.Adam(model.parameters(), lr=config.dynamic_lr, betas=(0.0, 0.999))
    nats, state = 0.0, None
    pieces = zip(*(x.split(config.dynamic_tokens) for x in (inputs, targets)))
    for piece, goal in pieces:
        optimizer.zero_grad()
        with autocast:
            logits, state = model(piece[None].to(device), state)
        loss = F.cross_entropy(logits[0].float(), goal.to(device), reduction="sum")
        nats += loss.item()
        state = [tensor.detach() for tensor in state]
        bar.update(len(piece))
        count = int((goal != -100).sum())
        if count:
            (loss / count).backward()
            optimizer.step()
            with torch.no_grad():
                for p, weight in zip(model.parameters(), trained):
                    p.lerp_(weight, config.dynamic_decay)
    return nats


@torch.no_grad()
def set_weights(model: LanguageModel, weights: list[torch.Tensor]) -> None:
    for p, weight in zip(model.parameters(), weights):
        p.copy_(weight)


def evaluate(config: EvaluateConfig) -> dict:
    """The results, as `--json` writes them."""
    for name in ("contexts", "segment_length", "dynamic_tokens"):
        values = np.atleast_1d(getattr(config, name))
        if (values < 1).any():
            raise UserError(f"--{name.replace('_', '-')} must be positive, got {values.min()}")
    if config.max_bytes < 0:
        raise UserError(f"--max-bytes must be at least 0, got {config.max_bytes}")
    if not (math.isfinite(config.dynamic_lr) and config.dynamic_lr >= 0):
        raise UserError(f"--dynamic-lr must be at least 0, got {config.dynamic_lr}")
    if not 0 <= config.dynamic_decay <= 1:
        raise UserError(f"--dynamic-decay must be in [0, 1], got {config.dynamic_decay}")
    target = Path(config.json)
    if config.json and (target.is_dir() or not os.access(target.parent, os.W_OK)):
        raise UserError(f"--json {config.json}: must be a file in a folder that can be written to")
    model, tokenizer, folder = load_model(config.model, config.device, config.backend)
    device = next(model.parameters()).device
    documents = read_text(config)
    stream = TokenArray(documents, tokenizer)
    dtype = pick_dtype(config.dtype, device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")
    began = time.perf_counter()
    nats, count = losses(model, stream.tokens, stream.bos, config, autocast)
    kinds = {"results": rows_of(config, nats, count, stream.num_bytes)}
    if not all(math.isfinite(row["perplexity"]) for row in kinds["results"]):
        raise UserError(f"{config.model}: the loss is not finite")
    if config.dynamic:
        nats = dynamic_losses(model, stream.tokens, stream.bos, config, autocast)
        kinds["dynamic"] = rows_of(config, nats, count, stream.num_bytes)
        if not all(math.isfinite(row["perplexity"]) for row in kinds["dynamic"]):
            raise UserError("--dynamic: the loss is not finite; a lower --dynamic-lr may help")
    seconds = time.perf_counter() - began
    return {
        "model": str(folder),
        "parameters": model.num_parameters,
        "data": {"spec": " ".join(config.specs), **statistics(documents)},
        "tokens": count,
        **kinds,
        "settings": asdict(config) | {"dtype": dtype},
        "seconds": seconds,
        "versions": versions(),
        "commit": commit(),
    }


def rows_of(config: EvaluateConfig, nats: list[float], count: int, num_bytes: int) -> list[dict]:
    """The row of each way to cut the state."""
    names = ["carried", "document", *(f"{context:,}" for context in config.contexts)]
    return [
        {
            "state": name,
            "loss_nats": total / count,
            "perplexity": torch.tensor(total / count, dtype=torch.float64).exp().item(),
            "bpb": total / math.log(2) / num_bytes,
        }
        for name, total in zip(names, nats)
    ]


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
    names = {"carried": "never", "document": "at documents"}
    for row in report["results"]:
        lines.append(
            f"{names.get(row['state'], row['state']):<14} {row['loss_nats']:>11.4f} "
            f"{row['perplexity']:>12.3f} {row['bpb']:>15.4f} {row['bpb'] - carried:>15.4f}"
        )
    longest = report["tokens"] + text["documents"]
    never = [f"{c:,}" for c in report["settings"]["contexts"] if c >= longest]
    if never:
        lines.append(f"the text is shorter than {', '.join(never)} tokens: nothing was cut there")
    if "dynamic" in report:
        lines += [
            "",
            "dynamic evaluation, bits per byte; state and weights are cut together",
            "cut            trained weights    dynamic    dynamic gains",
        ]
        for row, adapted in zip(report["results"], report["dynamic"]):
            lines.append(
                f"{names.get(row['state'], row['state']):<14} {row['bpb']:>15.4f} "
                f"{adapted['bpb']:>10.4f} {row['bpb'] - adapted['bpb']:>16.4f}"
            )
    return "\n".join(lines)


def main() -> None:
    description, _, examples = __doc__.partition("\n\n    python")
    config = tyro.cli(EvaluateConfig, description=description + "\n\n    python" + examples)
    sys.stdout.reconfigure(errors="backslashreplace")  # names may be no UTF-8
    with one_line():
        report = evaluate(config)
        print(table(report))
        if config.json:
            write_atomic(Path(config.json), json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
