"""Train one model of each kind on the standard library's source, where torch is all there is.

    python -m bench learn --minutes-each 2           # on the first GPU
    python -m bench learn --device cpu --quick

The loop needs none of the packages that train/lm.py does: on a new machine it shows that the
kernels train, not what they can reach. A loss that does not fall is a failed row.
"""

import functools
import math
import sysconfig
import time
from pathlib import Path

import torch

from bench import harness
from bench.speed.train_step import BASE, TOY, backward, config_of, forward
from kru_triton.lm.model import LanguageModel

BENCH = "learn"
KINDS = ("kru", "krulstm", "lstm", "transformer")


@functools.cache
def corpus() -> torch.Tensor:
    """The bytes of the standard library's modules, in the order of their paths."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    texts = [path.read_bytes() for path in sorted(folder.glob("*.py"))]
    return torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8)


def learn(results, base, kinds, minutes: float, device, steps: int | None = None) -> None:
    """Train each kind of model on contiguous lanes of bytes with carried state."""
    batch, length = (4, 16) if results.quick else (64, 256)
    results.title(f"learn: {minutes:g} minutes each, {batch} lanes of {length} bytes, stdlib")
    data = corpus()
    lanes = data[: len(data) // batch * batch].view(batch, -1).long()
    for kind in kinds:
        name = f"learn {kind} {minutes:g} min"
        if results.is_done(BENCH, name) or results.out_of_time(name):
            continue
        config = config_of(kind, base, length)
        torch.manual_seed(0)
        model = LanguageModel(config).to(device)
        optimizer = torch.optim.AdamW(
            model.parameter_groups(lr=4e-3, recurrent_lr=2e-3, weight_decay=0.1),
            betas=(0.9, 0.99),
            fused=True,
        )
        losses, state, position = [], None, 0
        start = time.monotonic()
        while time.monotonic() - start < 60 * minutes and (steps is None or len(losses) < steps):
            if position + length + 1 > lanes.shape[1]:
                state, position = None, 0
            tokens = lanes[:, position : position + length + 1].to(device, non_blocking=True)
            position += length
            loss, state = forward(model, optimizer, tokens, device, state)
            backward(model, optimizer, loss)
            state = [s.detach() for s in state]
            losses.append(loss.item())
        seconds = time.monotonic() - start
        tail = max(1, len(losses) // 20)
        first, last = losses[0] / math.log(2), sum(losses[-tail:]) / tail / math.log(2)
        values = {
            "implementation": kind,
            "steps": len(losses),
            "tokens_per_s": len(losses) * batch * length / seconds,
            "train_bpb_first": first,
            "train_bpb_last": last,
            "parameters": model.num_parameters,
            "corpus_bytes": len(data),
            "backend": model.backend_report(),
        }
        if not last < 0.9 * first:
            reason = f"the loss did not fall: {first:.3f} -> {last:.3f} bits per byte"
            results.add_reason(BENCH, name, "failed", reason, **values)
            continue
        results.add(
            BENCH,
            name,
            f"{first:.3f} -> {last:.3f} bits per byte in {len(losses)} steps, "
            f"{values['tokens_per_s'] / 1e3:.1f} k tokens/s; {values['backend']}",
            **values,
        )


def main(argv: list[str] | None = None) -> int:
    parser = harness.parser(__doc__, "learn")
    parser.add_argument("--minutes-each", type=float, default=1.75, help="of each kind of model")
    options = parser.parse_args(argv)
    device = harness.device_for(options, parser)
    if not options.minutes_each > 0:
        parser.error(f"--minutes-each: must be positive, got {options.minutes_each}")
    kinds = harness.chosen(list(KINDS), options.case, parser)
    if options.list:
        print(*kinds, sep="\n")
        return 0
    results = harness.Results(device, options, harness.command_line("learn", argv))
    base, steps = (TOY, 60) if options.quick else (BASE, None)
    learn(results, base, kinds, options.minutes_each, device, steps)
    return results.finish()
