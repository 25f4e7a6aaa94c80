"""The power limit a worker reports: NVML's enforced limit of the very device torch computes on."""

from __future__ import annotations

import pytest
import torch

from lanewise.engine import power

NO_DEVICE = "GPU-00000000-0000-0000-0000-000000000000"


def test_a_cpu_and_an_unknown_device_have_none() -> None:
    assert power.limit_watts(torch.device("cpu")) == 0
    assert power._enforced(NO_DEVICE) == 0  # without NVML, and with one that does not know the device


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_has_one() -> None:
    assert 50 <= power.limit_watts(torch.device("cuda:0")) <= 5000
