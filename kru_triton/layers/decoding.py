"""One step after another with weights that stay as they are, as text is written.

    Z = A X Bᵀ + U,  h = σ(Z)        (Jose, Cissé and Fleuret, ICML 2018, regrouped)

`kru_scan` regroups the factors, checks its arguments and sets up buffers at every call. That is
little beside a sequence, and most of the time of a single step. A `Step`, or an `LSTMStep` for
`kru_lstm_scan`, has done it once: layers take them in their own forward (`KRU.decoding`), so that
whatever stands around a layer stays in place. On a GPU a `GraphedStep` replays all launches of a
model's step, and nothing else; `why_not_graphed` says where that is not enough.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from kru_triton.kronecker import group_factors, planar_product
from kru_triton.nonlinearity import tiny
from kru_triton.ops.arguments import state_dtype
from kru_triton.torch_backend.scan import left_block, right_block

if TYPE_CHECKING:
    from kru_triton.layers.kru import KRU
    from kru_triton.layers.lstm import KRULSTM

Result = TypeVar("Result")


class Step:
    """A step of one layer, with the weights that it has now: `(h,) = step(x_proj, h)`, or with a
    gate `step(x_proj, h, kru.gate_projection(x)[:, 0])`.

    Args:
        kru: holds the weights. Later changes of them are not seen, and none of their memory is
            kept in use.
        layer: which one; forwards in time.

    Example:
        >>> kru = kru_triton.KRU(8, 6)
        >>> x, h_0 = torch.randn(1, 3, 8), torch.randn(1, 3, 12)
        >>> with torch.no_grad():
        ...     step = Step(kru)
        ...     (h,) = step(kru.input_projection(x)[:, 0], h_0[0])
        ...     torch.allclose(h, kru(x, h_0)[1][0], atol=1e-6)
        True
    """

    def __init__(self, kru: "KRU", layer: int = 0):
        factors, beta = kru.recurrent_factors(layer), kru.beta(layer)
        self.weights = _named(factors, beta, layer)
        a, b = group_factors(factors)
        dtype = state_dtype(a)
        self.left, self.right = left_block(a.to(dtype)).clone(), right_block(b.to(dtype))
        self.sizes = a.shape[0], a.shape[1], a.shape[2], b.shape[2]
        self.dtype, self.nonlinearity = dtype, kru.nonlinearity
        self.beta = None if beta is None else beta.to(dtype, copy=True)

    def __call__(self, x_proj: Tensor, h: Tensor, gate: Tensor | None = None) -> tuple[Tensor]:
        """The next state `(B, F)` from `x_proj (B, F)`, the last one and what it is multiplied by;
        not differentiable."""
        parts, heads, p, q = self.sizes
        batch, h = h.shape[0], h.to(self.dtype)
        if gate is not None:
            h = planar_product(gate.to(self.dtype), h, parts)
        x = h.view(batch, parts, heads, p, q).permute(2, 0, 3, 1, 4)
        x = torch.bmm(x.reshape(heads, batch * p, parts * q), self.right)
        x = torch.matmul(self.left[:, None], x.view(heads, batch, p * parts, q))
        x = x.view(heads, batch, p, parts, q).permute(1, 3, 0, 2, 4)
        z = x_proj.to(self.dtype) + x.reshape(batch, -1)
        if self.nonlinearity == "relu":
            return (z.relu_(),)
        if self.nonlinearity == "tanh":
            return (z.tanh_(),)
        if self.nonlinearity == "identity":
            return (z,)
        z = z.view(batch, parts, -1)
        squared = z.square().sum(1, keepdim=True).add_(tiny(self.dtype))
        if self.nonlinearity == "modrelu":
            scale = torch.addcmul(squared.new_ones(()), self.beta, squared.rsqrt_()).clamp_min_(0)
        else:
            modulus = squared.sqrt_()
            scale = modulus.tanh().div_(modulus)
        return (z.mul_(scale).view(batch, -1),)


class LSTMStep:
    """A step of one `KRULSTM` layer, with the weights that it has now: `h, c = step(x_proj, h, c)`.

    Args:
        lstm, layer: as for `Step`.

    Example:
        >>> lstm = kru_triton.KRULSTM(8, 6)
        >>> x, h_0, c_0 = torch.randn(1, 3, 8), torch.randn(1, 3, 6), torch.randn(1, 3, 6)
        >>> with torch.no_grad():
        ...     step = LSTMStep(lstm)
        ...     h, c = step(lstm.input_projection(x)[:, 0], h_0[0], c_0[0])
        ...     torch.allclose(h, lstm(x, (h_0, c_0))[0][0], atol=1e-6)
        True
    """

    def __init__(self, lstm: "KRULSTM", layer: int = 0):
        factors = lstm.recurrent_factors(layer)
        self.weights = _named(factors, None, layer)
        a, b = (w[0] for w in group_factors(factors))
        dtype = state_dtype(a)
        p, q = a.shape[-1], b.shape[-1]
        self.left = a.to(dtype, copy=True).view(4, lstm.num_heads, 1, p, p)
        right = b.to(dtype, copy=True).view(4, lstm.num_heads, q, q)
        self.right = right.transpose(-1, -2).contiguous()
        self.dtype = dtype

    def __call__(self, x_proj: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """The next h and c `(B, F)` from `x_proj (B, 4·F)` and the last; not differentiable."""
        batch = h.shape[0]
        _, heads, _, p, _ = self.left.shape
        q = self.right.shape[-1]
        x = h.to(self.dtype).view(batch, heads, p, q).transpose(0, 1)
        x = torch.matmul(x.reshape(heads, batch * p, q), self.right)  # (4, H, B·P, Q)
        x = torch.matmul(self.left, x.view(4, heads, batch, p, q))
        z = x_proj.to(self.dtype).view(batch, 4, -1) + x.permute(2, 0, 1, 3, 4).reshape(
            batch, 4, -1
        )
        i, f, g, o = z.unbind(1)
        c = f.sigmoid().mul_(c).addcmul_(i.sigmoid(), g.tanh())
        return o.sigmoid().mul_(c.tanh()), c


def _named(factors: list[Tensor], beta: Tensor | None, layer: int) -> dict[str, Tensor]:
    """What a step is made of, by the names that a layer gives its parameters."""
    named = {f"factor{f}_l{layer}": w for f, w in enumerate(factors)}
    return named if beta is None else {**named, f"beta_l{layer}": beta}


def why_not_graphed(model: nn.Module) -> str | None:
    """Why a graph cannot stand for a step of `model`, in one sentence; None: it can.

    A replay is the launches alone, on the memory where the weights were. So whatever else a call of
    a module does has to be known to be nothing, and every weight a plain one on one GPU.

    Example:
        >>> why_not_graphed(nn.Linear(2, 2))
        "its weights are on ['cpu'], not on one GPU"
    """
    if torch.nn.modules.module._has_any_global_hook():
        return "every module has a hook"
    for name, module in model.named_modules():
        kind = type(module)
        if not kind.__module__.startswith(("torch.nn.modules.", "kru_triton.")):
            return f"{name or 'the model'} is a {kind.__qualname__}"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name or 'the model'} has hooks"
        if "forward" in vars(module) or module._compiled_call_impl is not None:
            return f"the forward of {name or 'the model'} is replaced by another"
    for name, p in model.named_parameters():
        if type(p) is not nn.Parameter:
            return f"{name} is a {type(p).__qualname__}"
    devices = {p.device for p in model.parameters()}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        return f"its weights are on {sorted(map(str, devices))}, not on one GPU"
    return None


def capture(function: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
    """The launches of `function` as a CUDA graph, and what it returned, which replays fill anew.

    The graph reads the inputs of `function` where they were, and holds none of them.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles the kernels and warms the allocator
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        return graph, function()


class GraphedStep:
    """A step of a whole model as one CUDA graph: `outputs = step(*inputs)`.

    Args:
        function: what is captured: of tensors on a GPU, returning a list of tensors, and never
            waiting for the device.
        inputs: of the first call; later ones have the same shapes and dtypes.
    """

    def __init__(self, function: Callable[..., list[Tensor]], *inputs: Tensor):
        self.inputs = [x.clone() for x in inputs]  # where the graph reads
        self.graph, self.outputs = capture(lambda: function(*self.inputs))

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Copies of the results; not differentiable."""
        for place, x in zip(self.inputs, inputs):
            place.copy_(x)
        self.graph.replay()
        return [x.clone() for x in self.outputs]
