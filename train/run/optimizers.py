"""The optimizers of a run: which numbers they have, at which rate, and their state as tensors."""

import contextlib
import math

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from kru_triton.lm.model import LanguageModel
from kru_triton.train.run.device import multiplies_bfloat16
from kru_triton.train.run.settings import Config, UserError


class _Float32(TorchFunctionMode):
    """Inside, `x.bfloat16()` is a float32 copy."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.bfloat16:
            return args[0].to(torch.float32, copy=True)
        return func(*args, **(kwargs or {}))


class Muon(torch.optim.Muon):
    """torch's, which rounds gradients to bfloat16 for its Newton-Schulz steps, in float32 where the
    device has no such products: emulated ones took three times as long as all else of a step."""

    def step(self, closure=None):
        """As torch's."""
        device = self.param_groups[0]["params"][0].device
        with contextlib.nullcontext() if multiplies_bfloat16(device) else _Float32():
            return super().step(closure)


def build_optimizers(model: LanguageModel, config: Config) -> list[Optimizer]:
    """AdamW, and Muon where it is asked for.

    Muon (Jordan et al., 2024) replaces the gradient of a matrix by the nearest semi-orthogonal one.
    Scaled to AdamW's root mean square (Liu et al., 2025, arXiv 2502.16982), it takes AdamW's rate,
    so one `--lr` serves both.
    """
    groups = model.parameter_groups(config.lr, config.recurrent_lr, config.weight_decay)
    by_name = {group["name"]: group for group in groups}
    matrices = by_name.pop("matrices", None) if config.optimizer == "muon" else None
    rest = list(by_name.values())
    optimizers = [torch.optim.AdamW(rest, lr=config.lr, betas=(0.9, 0.99), fused=True)]
    if matrices:
        momentum = config.muon_momentum
        optimizers.append(Muon([matrices], momentum=momentum, adjust_lr_fn="match_rms_adamw"))
    elif config.optimizer == "muon":
        raise UserError(
            f"--optimizer muon: --model {config.model} --frame {config.frame} has no matrix "
            "between embedding and head; use adamw"
        )
    return optimizers


def describe_optimizers(optimizers: list[Optimizer]) -> str:
    """Which optimizer has how many numbers of which kind, at which peak rate and decay."""
    parts = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            count = sum(p.numel() for p in group["params"] if p.requires_grad)
            decay = f", decay {group['weight_decay']:g}" if group["weight_decay"] else ""
            where = f"{type(optimizer).__name__} at {group['lr']:g}{decay}"
            parts.append(f"{count:,} in {group['name']}: {where}")
    return "; ".join(parts)


def learning_rate_factor(config: Config, step: int, progress: float) -> float:
    """Linear warm-up in steps, times a fall from 1 to the floor over the budget (0 to 1).

    `wsd` (warm-up, stable, decay) stays at 1 until `--decay-share` of the budget is left, then
    falls as 1 - sqrt(share of the decay) (Hägele et al., NeurIPS 2024): before the decay a step
    does not depend on the budget.
    """
    warmup = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    if config.schedule == "cosine":
        fall = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        began = 1 - config.decay_share
        fall = 1 - math.sqrt((progress - began) / config.decay_share) if progress > began else 1.0
    return warmup * (config.lr_floor + (1 - config.lr_floor) * fall)


def peak_rate(group: dict) -> float:
    """The learning rate that a parameter group was made with."""
    return group.setdefault("initial_lr", group["lr"])


def set_learning_rates(optimizers: list[Optimizer], factor: float) -> None:
    """The factor times the peak rate of each group."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * peak_rate(group)


def optimizer_tensors(model: torch.nn.Module, optimizers: list[Optimizer]) -> dict[str, Tensor]:
    """The optimizers' state as flat tensors, by parameter name and entry."""
    return {
        f"{name}:{key}": value
        for name, parameter in model.named_parameters()
        for optimizer in optimizers
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizers(
    model: torch.nn.Module, optimizers: list[Optimizer], tensors: dict[str, Tensor]
) -> None:
    """The inverse of `optimizer_tensors`: each entry goes to the optimizer of its parameter."""
    parameters = dict(model.named_parameters())
    owners = {
        parameter: optimizer
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for key, value in tensors.items():
        name, entry = key.rsplit(":", 1)
        parameter = parameters[name]
        owners[parameter].state[parameter][entry] = value.to(parameter.device)
