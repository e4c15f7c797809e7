"""f: one KRU language model trained on the standard library's source for a minute.

The loop needs torch alone, none of the packages of train/lm.py: on a new machine it shows that the
kernels train, not what they can reach. A row holds the loss curve, held-out bits per byte and
tokens a second; a loss that does not fall is a failed row.
"""

import math
import sysconfig
import time
from pathlib import Path

import torch

from bench import harness
from bench.gpu.models import TOY, autocast, backward, forward
from kru_triton.lm.model import LanguageModel
from kru_triton.lm.presets import PRESETS

BENCH = "learn"
SECONDS = 50.0
POINTS = 50  # of the loss curve


def corpus() -> torch.Tensor:
    """The bytes of the standard library's modules, in the order of their paths."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    texts = [path.read_bytes() for path in sorted(folder.glob("*.py"))]
    return torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8)


@torch.no_grad()
def held_out(model, tokens: torch.Tensor, device) -> float:
    """Bits per byte of `tokens (B, T + 1)`."""
    tokens = tokens.to(device)
    with autocast(device):
        logits, _ = model(tokens[:, :-1])
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), tokens[:, 1:].flatten()
    )
    return losses.item() / math.log(2)


def run(results: harness.Results, device: torch.device) -> None:
    """Lanes of contiguous bytes with carried state; the last of them are held out."""
    name = "learn kru stdlib"
    if results.is_done(BENCH, name) or results.out_of_time(name):
        return
    quick = results.quick
    batch, length, base = (4, 16, TOY) if quick else (64, 256, PRESETS["base"])
    data = corpus()
    lanes = data[: len(data) // (batch + 1) * (batch + 1)].view(batch + 1, -1).long()
    valid = lanes[batch].unfold(0, length + 1, lanes.shape[1] // 64)
    torch.manual_seed(0)
    with torch.device(device):
        model = LanguageModel(base)
    groups = model.parameter_groups(lr=4e-3, recurrent_lr=2e-3, weight_decay=0.1)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True)
    losses, state, position, seconds = [], None, 0, 0.0
    before, start = held_out(model, valid, device), time.monotonic()
    until = min(SECONDS, results.seconds_left() - 2)
    while seconds < until and not (quick and len(losses) == 60):
        if position + length + 1 > lanes.shape[1]:
            state, position = None, 0
        tokens = lanes[:batch, position : position + length + 1].to(device, non_blocking=True)
        position += length
        loss, state = forward(model, optimizer, tokens, state)
        backward(model, optimizer, loss)
        state = [s.detach() for s in state]
        losses.append(loss.item() / math.log(2))
        seconds = time.monotonic() - start
    every = max(1, len(losses) // POINTS)
    means = [sum(losses[i : i + every]) / every for i in range(0, len(losses) - every + 1, every)]
    after = held_out(model, valid, device)
    values = {
        "implementation": "kru",
        "steps": len(losses),
        "tokens_per_s": len(losses) * batch * length / seconds,
        "curve": [[(i + 1) * every * batch * length, bits] for i, bits in enumerate(means)],
        "bpb_before": before,
        "bpb": after,
        "parameters": model.num_parameters,
        "corpus_bytes": len(data),
        "backend": model.backend_report(),
    }
    line = (
        f"{before:.3f} -> {after:.3f} bits per held-out byte in {len(losses)} steps of "
        f"{batch * length} bytes, {values['tokens_per_s']:.4g} tokens/s; {values['backend']}"
    )
    if after < 0.9 * before:
        results.add(BENCH, name, line, **values)
    else:
        values = {k: v for k, v in values.items() if isinstance(v, str) or k == "steps"}
        results.add_reason(BENCH, name, "failed", f"the loss did not fall: {line}", **values)
