"""The kernels that measure a device (`bench/gpu/micro.py`), compiled: their results are right."""

import pytest
import torch

from bench.gpu import micro

MEASURED = micro.measurements(micro.micro_of(torch.device("cpu")))


@pytest.mark.parametrize("name", MEASURED)
def test_measurement(name):
    MEASURED[name][0]()
