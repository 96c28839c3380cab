"""Where to compute, and in which precision."""

from typing import Literal

import torch

from equigrad.errors import ConfigurationError

DeviceName = Literal["auto", "cpu", "cuda"]
DtypeName = Literal["float32", "float64"]


def pick_device(name: DeviceName) -> torch.device:
    """The device of that name; `auto` takes CUDA where there is a working one.

    Raises:
        ConfigurationError: CUDA is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("device cuda: torch finds no CUDA device here; use --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def pick_dtype(name: DtypeName) -> torch.dtype:
    """The floating-point type of that name."""
    return {"float32": torch.float32, "float64": torch.float64}[name]
