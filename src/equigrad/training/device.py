"""The choice of a device and a precision."""

from typing import Literal

import torch

from equigrad.errors import ConfigurationError

DeviceName = Literal["auto", "cpu", "cuda"]
DtypeName = Literal["float32", "float64"]


def pick_device(name: DeviceName) -> torch.device:
    """The device of a name; `auto` is CUDA if it works, else the CPU.

    Raises:
        ConfigurationError: CUDA is requested but not available.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(
            "device cuda: torch finds no CUDA device on this machine; use --device cpu"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def pick_dtype(name: DtypeName) -> torch.dtype:
    """The floating-point dtype of a name."""
    return {"float32": torch.float32, "float64": torch.float64}[name]
