"""What converting a trained RNN to a KRU loses, and how fast training recovers it.

    python -m bench.convert                    # 256 units, some minutes
    python -m bench.convert --quick            # the same code for a moment

Bytes of the standard library (`--data stdlib`) into an embedding, one recurrent layer of tanh
units, a linear readout. A dense `nn.RNN` is trained, plain and kept orthogonal by torch's
parametrization; `from_torch` takes its recurrent matrix to the nearest Kronecker product, and all
parameters are trained further. Beside that, with the same steps and at the best of the learning
rates:

    fresh      the converted model with new orthogonal factors in place of the nearest
    scratch    a new KRU model
    dense      the RNN itself, trained further

Validation bits per byte on the first bytes of the held-out part, the state carried over them all.
Rows are appended to `--out`.
"""

import argparse
import copy
import datetime
import json
import math
import shlex
import sys
from pathlib import Path

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from bench.harness import ROOT
from kru_triton import KRU, from_torch, unitary_
from kru_triton.train import data
from kru_triton.train.run_directory import commit, versions
from kru_triton.train.tokenizer import ByteTokenizer

LANES, LENGTH, CLIP = 16, 64, 1.0


class ByteModel(nn.Module):
    """Next-byte logits `(T, B, 257)` and the last state of tokens `(T, B)`."""

    def __init__(self, recurrence: nn.Module, width: int):
        super().__init__()
        self.embedding = nn.Embedding(257, width)
        self.recurrence = recurrence
        self.readout = nn.Linear(recurrence.hidden_size, 257)

    def forward(self, tokens: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        h, state = self.recurrence(self.embedding(tokens), state)
        return self.readout(h), state


class OrthogonalRNN(nn.Module):
    """A tanh RNN whose recurrent matrix is orthogonal: a real KRU of one factor, parametrized."""

    def __init__(self, width: int, units: int):
        super().__init__()
        self.hidden_size = units
        self.kru = KRU(width, units, factors=(units,), field="real", nonlinearity="tanh")
        parametrizations.orthogonal(self.kru, "factor0_l0", orthogonal_map="matrix_exp")

    def forward(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.kru(x, state)

    def plain(self) -> nn.RNN:
        """The same function as an `nn.RNN`."""
        rnn = nn.RNN(self.kru.input_size, self.hidden_size)
        with torch.no_grad():
            rnn.weight_ih_l0.copy_(self.kru.weight_ih_l0)
            rnn.weight_hh_l0.copy_(self.kru.factor0_l0[0, 0])
            rnn.bias_ih_l0.copy_(self.kru.bias_l0)
            rnn.bias_hh_l0.zero_()
        return rnn


def train(model: nn.Module, lanes: data.Lanes, steps: int, lr: float) -> None:
    """AdamW, warm-up over a tenth and cosine to zero; the state is carried, documents or not."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0)
    state = None
    for step in range(steps):
        rate = min(1, 10 * (step + 1) / steps) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * rate
        tokens, targets, _ = lanes.next()
        logits, state = model(tokens.t(), state)
        state = state.detach()
        loss = nnf.cross_entropy(logits.flatten(0, 1), targets.t().flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()


@torch.no_grad()
def bits(model: nn.Module, validation: Tensor) -> float:
    """Bits per byte of `validation (B, T + 1)`."""
    loss, state, count = 0.0, None, 0
    for piece in range(0, validation.shape[1] - 1, 256):
        tokens = validation[:, piece : piece + 257].t()
        logits, state = model(tokens[:-1], state)
        part = nnf.cross_entropy(logits.flatten(0, 1), tokens[1:].flatten(), reduction="sum")
        loss, count = loss + part.item(), count + tokens[1:].numel()
    return loss / count / math.log(2)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--units", type=int, default=256)
    parser.add_argument("--steps", type=int, default=600, help="of the dense RNN")
    parser.add_argument("--more", type=int, nargs="+", default=[30, 100, 300], help="steps after")
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--quick", action="store_true", help="a few steps of a small model")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/convert.jsonl")
    args = parser.parse_args(argv)
    if args.quick:
        args.units, args.steps, args.more, args.lr = 16, 20, [3], [1e-2]

    documents, held_out = data.hold_out(data.read_documents("stdlib"))
    text = b"".join(text for _, text in held_out)[: LANES * (256 if args.quick else 4096)]
    validation = torch.tensor(list(text)).view(LANES, -1)
    stream = data.Stream(documents, ByteTokenizer())
    width = args.units // 2
    shared = {
        "units": args.units,
        "lanes": LANES,
        "length": LENGTH,
        "dense_steps": args.steps,
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "-m", "bench.convert", *(argv or sys.argv[1:])]),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)

    def report(source: str, model: str, steps: int, value: float, **extra) -> None:
        row = {"source": source, "model": model, "steps": steps, "bits": value, **extra, **shared}
        print(f"{source:12} {model:14} {steps:5} steps  {value:7.3f} bits per byte  {extra or ''}")
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def best(source: str, name: str, model: nn.Module, steps: int, seed: int) -> nn.Module:
        """A copy of `model` trained at the best of the rates."""
        found = []
        for lr in args.lr:
            candidate = copy.deepcopy(model)
            train(candidate, data.Lanes(stream, LANES, LENGTH, seed=seed), steps, lr)
            found.append((bits(candidate, validation), lr, candidate))
        value, lr, candidate = min(found, key=lambda entry: entry[:2])
        rates = {str(rate): round(value, 4) for value, rate, _ in found}
        report(source, name, steps, value, lr=lr, rates=rates)
        return candidate

    torch.manual_seed(0)
    scratch = ByteModel(KRU(width, args.units, field="real", nonlinearity="tanh"), width)
    for steps in (*args.more, args.steps):
        best("none", "scratch", scratch, steps, seed=0 if steps == args.steps else 1)
    for source in ("rnn", "orthogonal"):
        torch.manual_seed(0)
        kind = nn.RNN if source == "rnn" else OrthogonalRNN
        dense = best(source, "dense", ByteModel(kind(width, args.units), width), args.steps, seed=0)
        if source == "orthogonal":
            dense.recurrence = dense.recurrence.plain()
        converted = copy.deepcopy(dense)
        converted.recurrence = from_torch(dense.recurrence)
        w, nearest = dense.recurrence.weight_hh_l0, converted.recurrence.recurrent_matrix()
        left = {"matrix_error": ((w - nearest).norm() / w.norm()).item()}
        report(source, "converted", 0, bits(converted, validation), **left)
        fresh = copy.deepcopy(converted)
        for factor in fresh.recurrence.recurrent_factors(0):
            unitary_(factor)
        report(source, "fresh", 0, bits(fresh, validation))
        for steps in args.more:
            for name, model in (("converted", converted), ("fresh", fresh), ("dense", dense)):
                best(source, name if name != "dense" else "dense, more", model, steps, seed=1)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
