"""One thread per process, and without a GPU Triton's interpreter.

Both have to be chosen before torch and triton are imported, so here, before any test module is.
"""

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run in as many processes as fit

import pytest
import torch

if not torch.cuda.is_available():
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    assert interpreted or "triton" not in sys.modules, "triton came before its interpreter"
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def two_products(monkeypatch):
    """The torch backend keeps A and B apart, also in the small heads of the tests."""
    from kru_triton.torch_backend import scan as torch_backend

    monkeypatch.setattr(torch_backend, "DENSE_UNITS", 0)
