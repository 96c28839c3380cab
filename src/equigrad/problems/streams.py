"""Mini-batches of a loader, drawn when a step needs them and reproducible by step number."""

import copy
import random
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from equigrad.errors import ProblemError
from equigrad.randomness import seeded

KEPT = 64
"""The largest number of batches that are kept for further phases which begin at the same step."""


def is_sequence(batches: object) -> bool:
    """Whether batches can be indexed; a loader can only be iterated over."""
    return hasattr(batches, "__getitem__") and hasattr(batches, "__len__")


def may_be_batches(batches: Any) -> bool:
    """Whether every phase can iterate over the same batches, of which there is at least one."""
    if isinstance(batches, str | bytes) or hasattr(batches, "__next__"):
        return False
    return _length(batches) != 0


class DrawnBatches(Sequence[Any]):
    """The batches of a loader by step number, pass after pass.

    Only the batch of the latest step is kept in memory, and up to `KEPT` batches from the step that
    `keep` was given. To go back to an earlier step, its pass is started again.

    The random numbers of each draw are seeded by its step: the global generators of torch, Python
    and numpy, and those of the loader, its samplers and its dataset. So every pass has its own
    order, which is the same whenever that pass is started again. `close` restores all generators.

    Args:
        loader: a `DataLoader`, or any iterable that can be iterated over again.
        name: its name, for messages.
        seed: seed of all passes.
        device: device that tensors in batches are moved to; None to leave them where they are.

    Raises:
        ProblemError: workers give batches in the order in which they are ready; in a draw, if
            there are no batches, fewer than the loader's length, or others
            when a pass is started again.
    """

    def __init__(
        self, loader: Iterable[Any], name: str, seed: int, device: torch.device | None = None
    ) -> None:
        if isinstance(loader, DataLoader):  # others may be using the original's workers
            _refuse_race(name, loader)
            loader = copy.copy(loader)
        self._loader, self._name, self._seed, self._device = loader, name, seed, device
        self._parts = _parts(loader)
        self._generators = [
            g
            for p in self._parts
            if isinstance(g := getattr(p, "generator", None), torch.Generator)
        ]
        self._back = ExitStack()
        self._count = _length(loader)
        self._iterator: Iterator[Any] | None = None
        self._pass = self._next = 0
        self._batch: Any = None
        self._kept: dict[int, Any] = {}
        self._keep_from: int | None = None
        self._seen: dict[tuple[int, int], int] = {}
        for generator in self._generators:
            self._back.callback(generator.set_state, generator.get_state())
        for part in self._parts:
            if callable(getattr(part, "set_epoch", None)) and hasattr(part, "epoch"):
                self._back.callback(setattr, part, "epoch", part.epoch)

    def __len__(self) -> int:
        """The batches in a pass; a loader without a length is iterated over once to count them."""
        if self._count is None:
            self._begin(0)
            self._count = sum(1 for _ in iter(self._draw, _END))
            self._release()
            if not self._count:
                raise ProblemError(f"{self._name} has no batches")
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.at(index % len(self))

    def at(self, step: int) -> Any:
        """The batch of a step."""
        if step in self._kept:
            return self._kept[step]
        number, index = divmod(step, len(self))
        if self._iterator is None or number != self._pass or index < self._next - 1:
            self._begin(number)
        if self._next <= index:
            self._batch = drawn = None
            while self._next <= index:
                drawn = self._draw()
                if drawn is _END:
                    raise ProblemError(
                        f"{self._name} says that it has {len(self)} batches (its __len__), but "
                        f"gave {self._next}"
                    )
            self._batch = moved(drawn, self._device)
        if self._keep_from is not None and step >= self._keep_from and len(self._kept) < KEPT:
            self._kept[step] = self._batch
        return self._batch

    def keep(self, step: int) -> None:
        """Keep up to `KEPT` batches from this step on, which several phases will begin with."""
        if self._keep_from is None or step < self._keep_from:
            self._keep_from = step
            self._kept.clear()

    def close(self) -> None:
        """Release all batches and restore the generators."""
        self._release()
        self._kept.clear()
        self._back.close()

    def _release(self) -> None:
        """End the current pass, and with it the loader's workers, persistent ones too."""
        self._iterator = self._batch = None
        if isinstance(self._loader, DataLoader):
            self._loader._iterator = None

    def _begin(self, number: int) -> None:
        """Start a pass."""
        self._release()
        self._pass, self._next = number, 0
        for part in self._parts:
            if callable(set_epoch := getattr(part, "set_epoch", None)):
                set_epoch(number)
        with self._seeded(-1):
            self._iterator = iter(self._loader)

    def _draw(self) -> Any:
        """The next batch of this pass, or `_END`."""
        assert self._iterator is not None
        with self._seeded(self._next):
            batch = next(self._iterator, _END)
        if batch is _END:
            return _END
        place, found = (self._pass, self._next), hash(str(_fingerprint(batch)))
        if self._seen.setdefault(place, found) != found:
            raise ProblemError(
                f"{self._name} gave another batch {self._next} when it was iterated over again, "
                f"and phases can only be compared if they see the same data. Either it "
                f"continues from where it stopped instead of starting again, or it draws "
                f"random numbers that equigrad cannot seed: it seeds the global generators of "
                f"torch, Python and numpy, and the loader's own .generator"
            )
        self._next += 1
        return batch

    def _seeded(self, index: int) -> Any:
        seed = random.Random(f"{self._seed} {self._name} {self._pass} {index}").getrandbits(62)
        return seeded(seed, self._generators)


_END = object()


def _refuse_race(name: str, loader: DataLoader[Any]) -> None:
    """Raise a `ProblemError` if the order of batches depends on which worker is faster."""
    if loader.num_workers > 1 and not getattr(loader, "in_order", True):
        raise ProblemError(
            f"{name} gives batches in the order in which its {loader.num_workers} workers have "
            f"them ready (in_order=False), which differs from phase to phase. Leave in_order out"
        )


def moved(batch: Any, device: torch.device | None) -> Any:
    """A batch with all tensors moved to a device, also those inside containers."""
    if device is None:
        return batch
    if isinstance(batch, Tensor) or callable(getattr(batch, "to", None)):
        return batch.to(device)
    if isinstance(batch, MutableMapping):
        there = copy.copy(batch)
        there.update({key: moved(value, device) for key, value in batch.items()})
        return there
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(moved(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)([moved(value, device) for value in batch])
    return batch


def _length(batches: Any) -> int | None:
    """The number of batches, if it is known."""
    try:
        return len(batches)
    except TypeError:  # an iterable dataset
        return None


def _parts(loader: Any) -> list[Any]:
    """A loader, its samplers and its dataset, which may hold generators or an epoch number."""
    found, queue = [], [loader]
    while queue and len(found) < 20:
        part = queue.pop()
        if part is None or any(part is f for f in found):
            continue
        found.append(part)
        queue += [getattr(part, n, None) for n in ("sampler", "batch_sampler", "dataset")]
    return found


def _fingerprint(batch: Any) -> list[Any]:
    """Shapes and sums of a batch's samples, to tell whether two batches are the same."""
    if isinstance(batch, Tensor):
        rows = batch.detach() if batch.layout == torch.strided else batch.detach().to_dense()
        rows = rows.flatten(1) if rows.dim() > 1 else rows[..., None]
        dtype = None if rows.is_complex() else torch.float64
        return [tuple(batch.shape), rows.sum(dim=-1, dtype=dtype).tolist()]
    if isinstance(batch, Mapping):
        return [item for value in batch.values() for item in _fingerprint(value)]
    if isinstance(batch, list | tuple):
        return [item for value in batch for item in _fingerprint(value)]
    if isinstance(batch, int | float | str):
        return [batch]
    tensors = [v for v in getattr(batch, "__dict__", {}).values() if isinstance(v, Tensor)]
    return _fingerprint(tensors) if tensors else []
