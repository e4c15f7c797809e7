"""What runs a call: the kernels, the torch backend, or the loop of plain operations."""

import contextlib
import logging
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kru_triton.ops.arguments import How, LSTMScan, Scan

_logger = logging.getLogger("kru_triton")
_said: set[str] = set()


def why_not_op() -> str | None:
    """Why a call must be a loop of plain operations, in one sentence; None: the op may run."""
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func (vmap, grad, jvp, …) sees into plain operations only"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation sees into plain operations only"
    if torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
        return "ONNX has plain operations only"
    return None


def takes_loop(op: str, x: Tensor, backend: str) -> bool:
    """Whether `op` must run as a loop of plain operations; says so once, or raises as told."""
    reason = why_not_op()
    if reason is not None and backend != "torch":
        choose_triton(op, x, backend, reason)
    return reason is not None


def run_loop(loop: Callable, scan: Scan | LSTMScan, how: How):
    """`loop(scan, how)`, under autocast by the rule of the ops."""
    device = scan.x.device.type
    # torch 2.11 cannot compile the second
    has_autocast = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    if has_autocast and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return loop(scan._replace(x=in_autocast_dtype(scan.x, device)), how)
    return loop(scan, how)


def in_autocast_dtype(x: Tensor, device_type: str) -> Tensor:
    """The input of an op under autocast; weights and state keep their precision."""
    if x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(device_type))


def choose_triton(op: str, x: Tensor, backend: str, reason: str | None) -> bool:
    """Whether `op` runs on the kernels, given why they cannot: on a GPU wherever they can, or as
    told. Says so once, or raises."""
    if backend == "auto" and x.device.type == "cpu":  # the interpreter runs when asked for
        reason = reason or "the tensors are on the CPU"
    if backend == "triton" and reason is not None:
        raise RuntimeError(f'backend="triton" cannot run here: {reason}')
    _say_once(
        f"{op} runs on the triton backend"
        if reason is None
        else f"{op} runs on the torch backend: {reason}"
    )
    return reason is None


def _say_once(message: str) -> None:
    if not torch.compiler.is_compiling() and message not in _said:
        _said.add(message)
        _logger.info(message)


def for_kernels(how: How, x: Tensor) -> How:
    """`how` with the precision that "auto" stands for with an input like x."""
    if how.precision != "auto":
        return how
    return how._replace(precision="bf16" if x.dtype == torch.bfloat16 else "fp32")


@contextlib.contextmanager
def way_out():
    """Errors of the kernels, of their compilation say, name what works without them."""
    try:
        yield
    except Exception as error:
        error.add_note(
            'raised by the fused kernels; backend="torch" computes the same without them'
        )
        raise
