"""The electric power of the GPU under a worker, as NVML knows it.

Owns: finding the device's handle and reading its limit. Must not: set anything, or fail where there is no NVML:
a budget in watts is then not enforced, and the ScalingPolicy says so.
"""

from __future__ import annotations

import pynvml
import torch


def limit_watts(device: torch.device) -> int:
    """Most this GPU may draw (the enforced limit, so that a cap set by an administrator counts); 0 where nobody knows.

    The limit and not the draw: a budget must hold when an idle worker gets busy.
    """
    if device.type != "cuda":
        return 0
    # CUDA_VISIBLE_DEVICES renumbers what torch sees and not what NVML sees; the UUID names the same device in both.
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return _enforced(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")


def _enforced(uuid: str) -> int:
    """Watts, rounded up. NVML is opened and closed again: it is asked once in the life of a worker."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return 0
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        return -(-int(pynvml.nvmlDeviceGetEnforcedPowerLimit(handle)) // 1000)
    except pynvml.NVMLError:  # a device without power management, such as a slice of a GPU
        return 0
    finally:
        pynvml.nvmlShutdown()
