"""Recordings of the torch operations in a velocity, which can be replayed on other tensors."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from equigrad.errors import ConfigurationError, EquigradError
from equigrad.problems import Params, Velocity

EAGER = "use compile=False"
"""Advice for losses that cannot be recorded."""


def record(velocity: Velocity, params: Params, step: int) -> "Recording":
    """Record one evaluation of the velocity.

    Raises:
        ConfigurationError: it draws random numbers, changes a tensor that it did not create, or
            uses values of φ in Python's control flow.
    """
    recording = Recording(params.values())
    try:
        with recording:
            moves, _ = velocity(params, step)
    except (EquigradError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise refused("cannot record the operations of the losses", error) from error
    recording.close(moves)
    return recording


class Recording(TorchDispatchMode):
    """All torch operations on the way from `inputs` to the results, below autograd.

    Attributes:
        constants: tensors that existed before the recording, by place.
    """

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        super().__init__()
        self._alive = list(inputs)  # an id identifies a tensor only while the tensor is alive
        self._places = {id(t): i for i, t in enumerate(self._alive)}
        # places of tensors that depend on φ: Python code must not read their values, since a
        # replay would repeat what the values of this evaluation led to
        self._dependent = set(self._places.values())
        # memory that this evaluation allocated: a write to any other would be seen outside
        self._fresh: set[int] = set()
        self._calls: list[RecordedCall] = []
        # the memory that each call uses, and that any call rewrites: `split` keeps their order
        self._touched: list[frozenset[int]] = []
        self._rewritten: set[int] = set()
        self._results: tuple[_Place, ...] = ()
        self.constants: dict[int, Tensor] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if _draws(func, args, kwargs):
            raise ConfigurationError(
                f"compile=True cannot be used with losses that draw random numbers, and these do "
                f"so by {func}: every step would repeat the numbers of the first one; {EAGER}"
            )
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        taken = tree_map_only(Tensor, self._place, (args, kwargs))
        depends = any(self._places[id(t)] in self._dependent for t in given)
        written = [t for part in _written(func, args, kwargs) for t in tree_leaves(part)]
        if any(_storage(t) not in self._fresh for t in written if isinstance(t, Tensor)):
            raise ConfigurationError(
                f"compile=True cannot be used with losses that change a tensor in place, and "
                f"these do so by {func} (is it a buffer of batch normalisation?); put the module "
                f"into eval mode, or {EAGER}"
            )
        out = func(*args, **kwargs)
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        # the call gave a value to Python: calls that use it will have it in the key
        if not made and not written:
            if depends and out is not None:
                raise ConfigurationError(
                    f"compile=True cannot be used with losses whose Python code reads values that "
                    f"depend on params, and these do so by {func} (through .item(), float() or an "
                    f"if); {EAGER}"
                )
            return out
        # an output that is a view of an argument shares its memory
        seen = {_storage(t) for t in given}
        self._fresh.update(_storage(t) for t in made if _storage(t) not in seen)
        places = tuple(self._new(t) for t in made)
        if depends:
            self._dependent.update(p.index for p in places)
            self._dependent.update(self._places[id(t)] for t in written if isinstance(t, Tensor))
        self._calls.append((func, *taken, places))
        self._touched.append(frozenset(_storage(t) for t in (*given, *made)))
        self._rewritten.update(_storage(t) for t in written if isinstance(t, Tensor))
        return out

    def _new(self, tensor: Tensor) -> "_Place":
        if id(tensor) not in self._places:
            self._places[id(tensor)] = len(self._alive)
            self._alive.append(tensor)
        return _Place(self._places[id(tensor)])

    def _place(self, tensor: Tensor) -> "_Place":
        known = id(tensor) in self._places
        place = self._new(tensor)
        if not known:
            self.constants[place.index] = tensor
        return place

    def close(self, results: Sequence[Tensor]) -> None:
        """Set the results, and release all tensors but the constants."""
        self._results = tuple(self._place(t) for t in results)
        self._alive.clear()

    def key(self) -> str:
        """The recording in words: equal keys compute the same function."""
        return repr((self._calls, tuple(self.constants), self._results))

    def replay(self, inputs: Sequence[Tensor], constants: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run the recorded operations on other tensors."""
        return self.results(self._calls, inputs, dict(zip(self.constants, constants, strict=True)))

    def split(self) -> tuple[list["RecordedCall"], list["RecordedCall"]]:
        """The calls that depend on constants alone, and all others.

        A call that shares memory with a call that writes is among the others, which run in order.
        """
        known = set(self.constants)
        once: list[RecordedCall] = []
        each: list[RecordedCall] = []
        for call, touched in zip(self._calls, self._touched, strict=True):
            _, args, kwargs, places = call
            needs = {p.index for p in tree_leaves((args, kwargs)) if isinstance(p, _Place)}
            if needs <= known and not touched & self._rewritten:
                known.update(p.index for p in places)
                once.append(call)
            else:
                each.append(call)
        return once, each

    def values(
        self, calls: Sequence["RecordedCall"], constants: Sequence[Tensor]
    ) -> dict[int, Tensor]:
        """The constants, and the results of calls that depend on constants alone, by place."""
        values = dict(zip(self.constants, constants, strict=True))
        self._run(calls, values)
        return values

    def results(
        self, calls: Sequence["RecordedCall"], inputs: Sequence[Tensor], known: dict[int, Tensor]
    ) -> tuple[Tensor, ...]:
        """The results, from some of the calls and the known values of all others."""
        values = known | dict(enumerate(inputs))
        self._run(calls, values)
        return tuple(values[p.index] for p in self._results)

    def _run(self, calls: Sequence["RecordedCall"], values: dict[int, Tensor]) -> None:
        for func, args, kwargs, places in calls:
            args, kwargs = tree_map_only(_Place, lambda p: values[p.index], (args, kwargs))
            out = func(*args, **kwargs)
            made = (t for t in tree_leaves(out) if isinstance(t, Tensor))
            values.update((p.index, t) for p, t in zip(places, made, strict=True))


@dataclasses.dataclass(frozen=True)
class _Place:
    """A placeholder for a tensor in a recording."""

    index: int


RecordedCall = tuple[Any, tuple[Any, ...], dict[str, Any], tuple[_Place, ...]]
"""An operation, its arguments with places instead of tensors, and the places of its outputs."""


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    """The arguments that an operation writes to."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield args[i] if i < len(args) else kwargs.get(argument.name)


def _draws(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation draws random numbers; attention without dropout does not."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    return "dropout_p" not in names or given.get("dropout_p", 0.0) != 0


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def refused(what: str, error: Exception) -> ConfigurationError:
    """An error of torch as one of this library, with advice."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return ConfigurationError(f"compile=True {what} ({type(error).__name__}: {lines[0]}); {EAGER}")
