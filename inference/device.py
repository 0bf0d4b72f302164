"""Which device to use when nobody says."""

import torch


def best_device() -> torch.device:
    """CUDA or ROCm, XPU or MPS where there is one, else the CPU."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")  # type: ignore[return-value]
