"""Changes of the language model's block that the search tried and the library does not have.

    python bench/lm_variants.py conv-4 --preset tiny --steps 400 --lr 3.2e-2

The flags are those of `train/lm.py`, which this runs with one change; `bench/lm_search.py` does so
for its trials. B batch, T time, D d_model, `x (T, B, D)`.
"""

import sys

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from kru_triton import language_model
from kru_triton.kronecker import group_factors
from kru_triton.language_model import LanguageModel, _KRUMixer
from kru_triton.reference import apply_nonlinearity
from kru_triton.train import lm


class NoStateNorm(_KRUMixer):
    """V (KRU(x · sigmoid(I x)) · silu(G x))."""

    def __init__(self, config):
        super().__init__(config)
        self.norm = nn.Identity()


class Conv(_KRUMixer):
    """A causal convolution per channel over four tokens, before recurrence and gate.

    It reads zeros before the segment: no state carries the three tokens before.
    """

    def __init__(self, config):
        super().__init__(config)
        self.conv = nn.Conv1d(config.d_model, config.d_model, 4, groups=config.d_model)
        with torch.no_grad():  # starts as the identity
            self.conv.weight.zero_()[..., -1] = 1
            self.conv.bias.zero_()

    def forward(self, x: Tensor, state, reset):
        x = self.conv(nnf.pad(x.permute(1, 2, 0), (3, 0))).permute(2, 0, 1)
        return super().forward(x, state, reset)


class Forget(_KRUMixer):
    """h_t = σ(γ · (W h_{t-1}) + √(1 − γ²) · u_t) with a learned γ in (0, 1) for every unit.

    A diagonal matrix times a Kronecker product is none, so no kernel runs it: this is a plain loop.
    """

    def __init__(self, config):
        super().__init__(config)
        gamma = torch.linspace(0.6, 0.999, config.hidden_size)
        self.decay = nn.Parameter(gamma.logit()[torch.randperm(config.hidden_size)])
        self.kru.forward = self.scan

    def gamma(self, x: Tensor) -> Tensor:
        """`(T or 1, B or 1, H·N)`."""
        return self.decay.sigmoid()[None, None]

    def scan(self, x: Tensor, h_0: Tensor | None, reset: Tensor | None = None):
        kru, (time, batch, _) = self.kru, x.shape
        a, b = (torch.complex(*w) for w in group_factors(kru.recurrent_factors(0)))
        shape = a.shape[0], a.shape[-1], b.shape[-1]  # H, P, Q
        gamma = self.gamma(x).float()
        gamma = gamma.view(*gamma.shape[:2], *shape)
        u = kru.input_projection(x).transpose(0, 1).view(time, batch, 2, *shape)
        u = torch.complex(u[:, :, 0], u[:, :, 1]) * (1 - gamma * gamma).sqrt()
        gamma = gamma.expand(time, -1, -1, -1, -1)
        beta = kru.beta()
        beta = None if beta is None else beta.view(shape)
        h = u.new_zeros(batch, *shape)
        if h_0 is not None:
            h = torch.complex(*h_0[0].view(batch, 2, *shape).unbind(1))
        states = []
        for t, (u_t, gamma_t) in enumerate(zip(u.unbind(0), gamma.unbind(0))):
            if reset is not None:
                h = h.masked_fill(reset[:, t, None, None, None], 0)
            z = gamma_t * (a @ h @ b.transpose(-1, -2)) + u_t
            h = apply_nonlinearity(z, kru.nonlinearity, beta)
            states.append(h)
        h = torch.stack(states)
        h = torch.stack((h.real, h.imag), 2).view(time, batch, -1)
        return h, h[-1:]


class Selective(Forget):
    """`Forget` with a γ_t = sigmoid(D x_t + c) that depends on the input."""

    def __init__(self, config):
        super().__init__(config)
        self.forget_gate = nn.Linear(config.d_model, config.hidden_size, bias=False)

    def gamma(self, x: Tensor) -> Tensor:
        return (self.forget_gate(x) + self.decay).sigmoid()


class HeadRadii(_KRUMixer):
    """Heads that start with eigenvalues of 0.6 to 1 in equal steps."""

    def __init__(self, config):
        super().__init__(config)
        factors = self.kru.recurrent_factors(0)
        radii = torch.linspace(0.6, 1, config.num_heads) / config.radius
        with torch.no_grad():
            for w in factors:
                w.mul_(radii.view(1, -1, 1, 1) ** (1 / len(factors)))


def annealed_penalty(start: float, end: float, steps: int):
    """A unitarity penalty whose weight goes from `start` to `end` times the set one in `steps`."""
    penalty, calls = LanguageModel.unitarity_penalty, iter(range(10**9))

    def annealed(self) -> Tensor:
        done = min(1.0, next(calls) / steps)
        return (start + (end - start) * done) * penalty(self)

    return annealed


MIXERS = {
    "no-state-norm": NoStateNorm,
    "conv-4": Conv,
    "forget": Forget,
    "selective": Selective,
    "head-radii": HeadRadii,
}


def main() -> None:
    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if name in MIXERS:
        language_model._KRUMixer = MIXERS[name]
    elif name in ("penalty-down", "penalty-up"):
        ends = (1.0, 0.0) if name == "penalty-down" else (0.0, 1.0)
        LanguageModel.unitarity_penalty = annealed_penalty(*ends, steps=400)
    elif name == "sigmoid-gate":
        language_model.nnf.silu = torch.sigmoid
    else:
        sys.exit(
            f"error: no variant {name!r}; there are {', '.join(MIXERS)}, sigmoid-gate, "
            "penalty-down and penalty-up"
        )
    lm.main()


if __name__ == "__main__":
    main()
