"""What every op of `torch.library` here shares: schema, autocast, and what it refuses.

An op's function takes the flat arguments of its schema, which is that of the bags of `arguments`;
a gate comes last, which programs exported before there was one do not give.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kru_triton.ops.arguments import How, LSTMScan, Scan
from kru_triton.ops.dispatch import in_autocast_dtype

library = torch.library.Library("kru_triton", "FRAGMENT")
_KINDS = {Tensor: "Tensor", Tensor | None: "Tensor?", str: "str"}


def schema(kind: type) -> str:
    """The arguments of an op: a bag of that kind without a gate, and a `How` behind it."""
    named = (*kind.__annotations__.items(), *How.__annotations__.items())
    return ", ".join(f"{_KINDS[kind]} {name}" for name, kind in named if name != "gate")


def adjoint_schema(kind: type) -> str:
    """The same where x may be None."""
    return schema(kind).replace("Tensor x", "Tensor? x", 1)


def bags(kind: type[Scan] | type[LSTMScan], flat: tuple) -> tuple:
    """The bag and the `How` that flat arguments begin with, and those behind them."""
    end = len([name for name in kind._fields if name != "gate"])
    behind = end + len(How._fields)
    return kind(*flat[:end]), How(*flat[end:behind]), *flat[behind:]


def empty_like(x: Tensor) -> Tensor:
    """As `torch.empty_like`, contiguous."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def register_autocast(name: str, op, backward) -> None:
    """Let autocast cast the input of an op, its first argument, and nothing in its backward."""

    def register(device_type: str) -> None:
        def forward_rule(x, *args):
            with torch.autocast(device_type, enabled=False):
                return op(in_autocast_dtype(x, device_type), *args)

        def backward_rule(*args):  # where backward() is called under autocast
            with torch.autocast(device_type, enabled=False):
                return backward(*args)

        key = f"Autocast{device_type.upper()}"
        library.impl(name, forward_rule, key)
        library.impl(f"{name}_backward", backward_rule, key)

    register("cpu")
    register("cuda")


def refuse_forward_mode(function: str, *cotangents: Tensor | None) -> None:
    """Raise where an op would drop tangents: that of a result in a forward pass (no cotangents are
    given), or those of its cotangents in a backward pass."""
    duals = (forward_ad.unpack_dual(d).tangent for d in cotangents if d is not None)
    if forward_ad._current_level >= 0 and (not cotangents or any(t is not None for t in duals)):
        raise RuntimeError(
            f"{function}: forward-mode differentiation does not go through its op; call {function} "
            "itself inside of torch.func.jvp or forward_ad.dual_level(), where it is a loop of "
            "plain operations"
        )


def refuse_second_derivatives(function: str, backward_op) -> None:
    """Let a backward pass through `backward_op` raise in words."""

    def refuse(ctx, *grads):
        raise RuntimeError(
            f"{function}: its op is differentiable once; for second derivatives use torch.func "
            "(hessian, or jvp, jacfwd or jacrev of grad), under which it is a loop of plain "
            "operations, or call its loop in kru_triton.reference"
        )

    backward_op.register_autograd(refuse)
