"""One thread per process, and without a GPU Triton's interpreter, or compiled code on the machine.

Both have to be chosen before torch and triton are imported, so here, before any test module is.
With KRU_TARGET=sm_80 or sm_90 the kernel tests execute what Triton compiles for that target, on
the CPU, and fail also for what the sanitizer finds in it (see `machine`):

    CUDA_VISIBLE_DEVICES= KRU_TARGET=sm_90 python -m pytest tests/test_kernels.py tests/machine

`make test-compiled` runs them all.
"""

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run in as many processes as fit

import pytest
import torch

TARGET = os.environ.get("KRU_TARGET")
if TARGET:
    from machine.driver import active

    @pytest.fixture(autouse=True)
    def device():
        """The device that executes compiled code; findings that a test does not take fail it."""
        with active(TARGET) as device:
            yield device
            findings = device.findings()
        assert not findings, "\n".join(findings)

else:
    collect_ignore = ["machine"]

if not TARGET and not torch.cuda.is_available():
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    assert interpreted or "triton" not in sys.modules, "triton came before its interpreter"
    os.environ["TRITON_INTERPRET"] = "1"
    from interpreter import hasten

    hasten()


@pytest.fixture
def two_products(monkeypatch):
    """The torch backend keeps A and B apart, also in the small heads of the tests."""
    from kru_triton.torch_backend import scan as torch_backend

    monkeypatch.setattr(torch_backend, "DENSE_UNITS", 0)


@pytest.fixture
def poisoned_memory(monkeypatch):
    """What the kernels do not write stays NaN, and so does all that lies around their buffers."""
    from poison import allocator, assert_untouched

    buffers = []
    for name, value in (("new_empty", float("nan")), ("new_zeros", 0.0)):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, allocator(original, value, buffers))
    yield buffers
    assert_untouched(buffers)
