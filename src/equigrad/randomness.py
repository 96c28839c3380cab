"""The same dice in every phase."""

from collections.abc import Iterable
from contextlib import ExitStack, nullcontext
from typing import Literal, Self

import torch
from torch import Tensor

Stream = Literal["inner", "outer"]


class CommonRandomness:
    """Makes evaluation t of a loss draw the same random numbers in every phase.

    A contrast of two phases divides their difference by β, and with it any noise that they do not
    share. So every evaluation of a loss is seeded by its step and by the loss it belongs to, not by
    what ran before it: the masks of dropout agree between phases even where one phase evaluates a
    loss that the other does not.

    On entering, one number is drawn from torch's global generator, so that `torch.manual_seed`
    decides everything; on leaving, also by an exception, the global generators stand where they
    would stand after that one draw.

    Args:
        tensors: whatever is computed with; their devices' generators are the ones to seed.
        base: the number, from an earlier such context; None to draw one.
    """

    def __init__(self, tensors: Iterable[Tensor], base: int | None = None) -> None:
        devices = {t.device for t in tensors if t.device.type != "cpu"}
        self._devices = sorted(devices, key=str)
        self._exit = ExitStack()
        self._given, self.base = base, 0

    def __enter__(self) -> Self:
        self.base = int(torch.randint(2**62, ())) if self._given is None else self._given
        by_type: dict[str, list[int]] = {}
        for device in self._devices:
            by_type.setdefault(device.type, []).append(device.index or 0)
        self._exit.enter_context(torch.random.fork_rng(devices=[]))
        for kind, indices in by_type.items():
            self._exit.enter_context(torch.random.fork_rng(devices=indices, device_type=kind))
        return self

    def __exit__(self, *exception: object) -> None:
        self._exit.close()

    def sign(self) -> int:
        """1 or -1, by the number that was drawn on entering."""
        return 1 if self.base % 2 else -1

    def seed(self, stream: Stream, step: int) -> None:
        """Seed the generators for evaluation `step` of the inner or the outer loss."""
        seed = self.base + 2 * step + (stream == "outer")
        torch.default_generator.manual_seed(seed)
        for device in self._devices:
            module = torch.get_device_module(device)
            with getattr(module, "device", nullcontext)(device):
                module.manual_seed(seed)
