"""What checkpoints cost a training run: how long it waits, and how much of a core the writes take.

    python -m bench checkpoints                 preset base, at its default interval
    python -m bench checkpoints --preset tiny --rounds 2 --out rows.jsonl

In each round one training step is timed, then one checkpoint: the seconds in which the training
stands still (the tensors are copied), the seconds until it is on the disk, and the processor
seconds that the thread takes for it meanwhile. If all of them were lost to the training, the
overhead would be

    share = (blocked + thread) / (checkpoint_every * step)

Medians of the rounds, the first one left out.
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch

from bench import harness
from kru_triton.lm.model import LanguageModel
from kru_triton.train import lm
from kru_triton.train.run import checkpoints
from kru_triton.train.run.device import keep_freed_memory, pick_device, pick_dtype
from kru_triton.train.run.processes import Processes
from kru_triton.train.run.settings import model_config, parse


class TimedWriter(checkpoints.Writer):
    """Also takes the processor seconds of its thread."""

    def write(self, *arguments) -> None:
        began = time.thread_time()
        super().write(*arguments)
        self.thread_seconds = time.thread_time() - began


def main(argv: list[str] | None = None) -> int:
    parser = harness.parser(__doc__, "checkpoints")
    parser.add_argument("--preset", default="base")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    args.again = True

    device = pick_device(args.device)
    config = parse(["--preset", args.preset])
    config.dtype = pick_dtype(config.dtype, device)
    keep_freed_memory()
    torch.manual_seed(0)
    model = LanguageModel(model_config(config, 257)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")
    tokens = torch.randint(256, (config.batch_size, config.segment_length))
    batch = tokens, tokens, torch.zeros_like(tokens, dtype=torch.bool)
    at = lm.LMState()
    seconds = {name: [] for name in ("step", "blocked", "write", "thread")}
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        writer = TimedWriter(Path(folder), 1, Processes(), print, None)
        for at.step in range(1 + args.rounds):
            began = time.perf_counter()
            optimizer.zero_grad()
            _, at.state = lm.backward(model, model, batch, at.state, config, autocast)
            optimizer.step()
            float(at.state[0].sum())  # a GPU has finished
            stepped = time.perf_counter()
            writer.save(at.step, *lm.pack(at, model, [optimizer], Processes()))
            saved = time.perf_counter()
            writer.wait()
            assert writer.saved_step == at.step
            if at.step:
                seconds["step"].append(stepped - began)
                seconds["blocked"].append(saved - stepped)
                seconds["write"].append(time.perf_counter() - saved)
                seconds["thread"].append(writer.thread_seconds)
    row = {f"{name}_s": statistics.median(values) for name, values in seconds.items()}
    interval = config.checkpoint_every * row["step_s"]
    results = harness.Results(device, args, harness.command_line("checkpoints", argv))
    results.add(
        "checkpoints",
        f"checkpoints {args.preset}",
        f"{row['blocked_s']:.3f} s blocked, {row['write_s']:.3f} s until written",
        preset=args.preset,
        checkpoint_every=config.checkpoint_every,
        bytes=writer.bytes,
        **row,
        blocked_share=row["blocked_s"] / interval,
        share=(row["blocked_s"] + row["thread_s"]) / interval,
    )
    return results.finish()
