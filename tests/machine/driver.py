"""A Triton driver whose device is the machine: launches on CPU tensors execute compiled PTX.

    with active("sm_80") as device:
        kernel[grid](...)          # on CPU tensors, with TRITON_INTERPRET unset
    print(device.launches[-1].report.findings)

Memory of a launch: every storage behind an argument is a buffer of its own, and only the bytes of
elements that an argument has are valid in it. What torch.empty and its relatives return is filled
with NaN of one pattern (POISON), by which the elements that hold nothing yet are known. Beside
those of `machine` a launch has one more kind of finding: `unwritten`, for an argument of which a
kernel wrote some elements and left others without a value.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from unittest import mock

import numpy as np
import torch
import triton
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.cache import get_cache_manager

from kru_triton.kernels import why_not

from . import machine, ptx
from .lanes import Options
from .memory import Arena, Buffer, Report

POISON = np.array([0xD5, 0xFF], np.uint8)  # no NaN of an operation: torch's bfloat16 one is 0xFFFF
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448}
INTEGERS = {"i1": "u1", "i8": "i1", "i16": "i2", "i32": "i4", "i64": "i8", "u32": "u4", "u64": "u8"}


class Poison(TorchFunctionMode):
    """Fills new, empty tensors with the pattern of memory that nothing was written to."""

    NAMES = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        new = getattr(function, "__name__", "") in self.NAMES
        if new and result.numel() and not result.is_meta:
            flat = storage_bytes(result)
            flat[:] = np.resize(POISON, len(flat))
        return result


def storage_bytes(tensor: torch.Tensor) -> np.ndarray:
    storage = tensor.untyped_storage()
    flat = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))
    return flat.numpy()


def elements_of(tensor: torch.Tensor, flat: np.ndarray) -> np.ndarray:
    """View of the bytes of a tensor's elements, (..., itemsize), in an array over its storage."""
    size = tensor.element_size()
    strides = [s * size * flat.itemsize for s in tensor.stride()] + [flat.itemsize]
    start = tensor.storage_offset() * size
    return np.lib.stride_tricks.as_strided(flat[start:], (*tensor.shape, size), strides)


@dataclasses.dataclass
class Launch:
    kernel: str
    grid: tuple[int, int, int]
    ptx: str
    warps: int
    report: Report
    seconds: float


def execute(text, grid, arguments: dict, types, shared, options) -> Report:
    """Run PTX on these arguments by name: tensors, numbers and None."""
    memory, buffers, addresses = Arena(), {}, []
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            continue
        data, start = storage_bytes(value), value.untyped_storage().data_ptr()
        new = Buffer(name, 0, data, np.zeros(len(data), bool), np.ones(len(data), bool))
        buffer = buffers.setdefault(start, new)
        if value.numel():
            elements_of(value, buffer.valid)[...] = True
            if value.is_floating_point():
                nothing = np.resize(POISON, value.element_size())
                empty = (elements_of(value, data) == nothing).all(-1, keepdims=True)
                elements_of(value, buffer.defined)[...] &= ~empty
    starts = {
        start: memory.add(b.data, b.name, start, b.valid, b.defined) for start, b in buffers.items()
    }
    for value, kind in zip(arguments.values(), types):
        if isinstance(value, torch.Tensor):
            start = value.untyped_storage().data_ptr()
            addresses.append(starts[start] + value.data_ptr() - start)
        else:
            addresses.append(int(np.array(value or 0).astype(INTEGERS.get(kind, "i8"))))
    program = ptx.parse(text)
    addresses += [0] * (len(program.parameters) - len(addresses))  # scratch memory
    report = machine.run(program, grid, addresses, memory, shared, options)
    for b, written in zip(buffers.values(), memory.close().values()):
        left = int((b.valid & ~b.defined & ~written).sum())
        if written.any() and left:
            report.add("unwritten", f"argument {b.name}", "bytes that hold no value", left)
    return report


class Launcher:
    """What Triton calls to launch a compiled kernel."""

    def __init__(self, src, metadata):
        path = get_cache_manager(metadata.hash).get_file(f"{src.name[:150]}.ptx")
        with open(path) as file:
            self.ptx = file.read()
        self.signature, self.metadata = src.signature, metadata
        if metadata.global_scratch_size or metadata.num_ctas != 1:
            raise NotImplementedError("the machine has no scratch memory and no clusters")

    def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *values):
        taken = [
            (name, value, kind)
            for (name, kind), value in zip(self.signature.items(), values)
            if kind != "constexpr"
        ]
        device = triton.runtime.driver.active
        text = device.replaced.get(self.ptx, self.ptx)
        arguments, types = {name: value for name, value, _ in taken}, [kind for *_, kind in taken]
        shared, warps = self.metadata.shared, self.metadata.num_warps
        begin = time.perf_counter()
        report = execute(text, (x, y, z), arguments, types, shared, device.options)
        seconds = time.perf_counter() - begin
        launch = Launch(self.metadata.name, (x, y, z), text, warps, report, seconds)
        device.launches.append(launch)


class Device(DriverBase):
    """Keeps what was launched; `replaced` says what is executed in place of a kernel's PTX."""

    launcher_cls = Launcher

    def __init__(self, arch: str, options: Options):
        self.capability = int(arch.removeprefix("sm_"))
        self.options = options
        self.launches: list[Launch] = []
        self.replaced: dict[str, str] = {}
        self.utils = self

    def findings(self) -> list[str]:
        """Of all launches so far, which are forgotten."""
        launches, self.launches = self.launches, []
        return [f"{n.kernel}: {f}" for n in launches for f in n.report.findings.values()]

    @contextlib.contextmanager
    def under(self, **options) -> Iterator[None]:
        """Run with other `Options`."""
        before, self.options = self.options, dataclasses.replace(self.options, **options)
        yield
        self.options = before

    @classmethod
    def is_active(cls):
        return False

    def map_python_to_cpp_type(self, ty):
        raise NotImplementedError

    def get_benchmarker(self):
        raise NotImplementedError

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_current_device(self):
        return self.capability  # kernels are cached by device

    def get_current_stream(self, device):
        return 0

    def get_device_properties(self, device):
        return {"max_shared_mem": SHARED_LIMIT[self.capability], "multiprocessor_count": 1}

    def load_binary(self, name, binary, shared, device):
        return object(), object(), 0, 0, 1024


@contextlib.contextmanager
def active(arch: str, **options) -> Iterator[Device]:
    """The project takes CPU tensors for those of a device of this target; see `lanes.Options`."""
    before = triton.runtime.driver._active
    device = Device(arch, Options(**options))
    triton.runtime.driver.set_active(device)
    limit = SHARED_LIMIT[device.capability]
    try:
        with (
            Poison(),
            mock.patch.object(why_not, "interpreted", return_value=True),
            mock.patch.object(why_not, "SHARED_INTERPRETED", limit),
        ):
            yield device
    finally:
        triton.runtime.driver._active = before
