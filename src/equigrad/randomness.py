"""Common random numbers: every phase of a meta-gradient draws the same ones."""

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Literal, Self

import torch
from torch import Tensor

Stream = Literal["inner", "outer"]

RANKS_APART = 1_000_000_000_039
"""Distance between the seeds of two ranks, which draw different masks; a prime number."""


class CommonRandomness:
    """Makes evaluation t of a loss draw the same random numbers in every phase.

    A contrast of two phases divides their difference by β, and with it any noise that they do not
    share. Every evaluation of a loss is therefore seeded by its step and by the loss, and not by
    what ran before: dropout masks agree between phases even if one phase evaluates a loss that the
    other does not.

    On entry, one number is drawn from torch's global generator, so that `torch.manual_seed`
    determines everything. On exit, also by an exception, the global generators are in the state
    after that one draw.

    The generators of Python's `random` and, if it has been imported, of `numpy.random` are seeded
    and restored likewise. After the first evaluation of each loss, they are seeded only if a loss
    drew from them.

    Args:
        tensors: all tensors of the computation; the generators of their devices are seeded.
        base: the number drawn by an earlier such context, to repeat it; None to draw one.
    """

    def __init__(self, tensors: Iterable[Tensor], base: int | None = None) -> None:
        devices = {t.device for t in tensors if t.device.type != "cpu"}
        self._devices = sorted(devices, key=str)
        self._exit = ExitStack()
        self._given, self.base = base, 0
        self._others: list[_Other] = []
        self._met: set[Stream] = set()

    def __enter__(self) -> Self:
        self.base = int(torch.randint(2**62, ())) if self._given is None else self._given
        by_type: dict[str, list[int]] = {}
        for device in self._devices:
            by_type.setdefault(device.type, []).append(device.index or 0)
        self._exit.enter_context(torch.random.fork_rng(devices=[]))
        for kind, indices in by_type.items():
            self._exit.enter_context(torch.random.fork_rng(devices=indices, device_type=kind))
        self._others = _others()
        for other in self._others:
            self._exit.callback(other.put_back)
        self._met.clear()
        return self

    def __exit__(self, *exception: object) -> None:
        self._exit.close()

    def sign(self) -> int:
        """1 or -1, from the number that was drawn on entry."""
        return 1 if self.base % 2 else -1

    def seed(self, stream: Stream, step: int, rank: int = 0) -> None:
        """Seed the generators for evaluation `step` of the inner or outer loss on a rank."""
        seed = self.base + 2 * step + (stream == "outer") + RANKS_APART * rank
        torch.default_generator.manual_seed(seed)
        for device in self._devices:
            module = torch.get_device_module(device)
            with getattr(module, "device", nullcontext)(device):
                module.manual_seed(seed)
        first = stream not in self._met
        for other in self._others:
            if other.drawn_from() or first:
                other.seed(seed)
        if first:
            self._met.add(stream)


@contextmanager
def seeded(seed: int, generators: Iterable[torch.Generator] = ()) -> Iterator[None]:
    """A context in which the CPU's global generators are seeded; they are restored on exit.

    Args:
        seed: the seed, below 2^62.
        generators: further generators to seed, which are not restored.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        torch.default_generator.manual_seed(seed)
        for other in _others():
            stack.callback(other.put_back)
            other.seed(seed)
        for generator in generators:
            generator.manual_seed(seed)
        yield


class _Other:
    """A global generator that is not torch's.

    Seeding it takes as long as evaluating a small loss. To avoid that, a twin with the same seed
    draws along with it: as long as their next numbers agree, no loss has drawn from the generator.

    Args:
        generator: the global generator.
        twin: a private generator of the same kind.
        put_back: restores the current state of the global generator.
    """

    def __init__(self, generator: Any, twin: Any, put_back: Any) -> None:
        self._generator, self._twin, self.put_back = generator, twin, put_back
        self._number, self._same = generator.random, twin.random
        self._drawn_from = self._seeded = False

    def drawn_from(self) -> bool:
        """Whether a loss has drawn from the generator, now or at an earlier question."""
        if self._seeded and not self._drawn_from:
            self._drawn_from = self._number() != self._same()
        return self._drawn_from

    def seed(self, seed: int) -> None:
        """Seed the generator, and its twin while both agree."""
        seed, self._seeded = seed % 2**32, True
        self._generator.seed(seed)
        if not self._drawn_from:
            self._twin.seed(seed)


def _others() -> list[_Other]:
    """Python's generator, and numpy's if it is imported and can be seeded."""
    state = random.getstate()
    found = [_Other(random, random.Random(0), lambda: random.setstate(state))]
    numpy: Any = sys.modules.get("numpy.random")
    if numpy is not None:
        stood = numpy.get_state(legacy=False)
        if stood["bit_generator"] == "MT19937":
            twin = _spare.pop() if _spare else numpy.RandomState(0)

            def put_back() -> None:
                numpy.set_state(stood)
                _spare.append(twin)

            found.append(_Other(numpy, twin, put_back))
    return found


_spare: list[Any] = []
"""Unused twins of numpy's generator, kept because making one takes 0.1 ms."""
