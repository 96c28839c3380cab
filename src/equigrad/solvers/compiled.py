"""Several steps of a phase as one function: by torch's compiler, or as a CUDA graph.

One evaluation of the velocity is recorded, operation by operation, at the start of every phase; the
function is looked up by what was recorded. So a loss may be a new closure in every call, and
whatever it reads (a batch, a flag, a module's mode) may change between phases: tensors are inputs
of the function, anything else is part of its key.

A CUDA graph replays the recorded kernels without Python between them. What does not depend on φ is
a graph of its own, which is replayed once a phase.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from equigrad.errors import ConfigurationError, EquigradError
from equigrad.problems import Params, Velocity
from equigrad.solvers.solver import Solver

BACKEND = "inductor"
"""Which of `torch._dynamo.list_backends()` compiles."""

KEPT = 64
"""How many compiled functions are kept."""

Compiled = Callable[..., Sequence[Tensor]]

_compiled: dict[tuple[Any, ...], Compiled] = {}
_graphs: dict[tuple[Any, ...], Compiled] = {}

_NO_OBJECTIVE: Any = None
"""A differentiable solver does not look around."""

_EAGER = "use compile=False"

GRAPHS_KEPT = 16
"""How many CUDA graphs are kept: each holds the memory of its steps."""


class CompiledSteps:
    """`solver.check_every` steps at once, on the tensors of one phase.

    Args:
        velocity: of the phase, the same at every step.
        params: the leaves.
        state: the solver's state.
        solver: a differentiable one.
        step: number of the first step.
        count: is told how many velocities the phase takes; those that compiling takes are none.

    Attributes:
        steps: how many it takes.

    Raises:
        ConfigurationError: the velocity draws random numbers, changes a tensor that is not its
            own, depends on values of φ by Python's control flow, or cannot be compiled.
    """

    def __init__(
        self,
        velocity: Velocity,
        params: Params,
        state: list[Tensor],
        solver: Solver,
        step: int,
        count: Callable[[int], None],
    ) -> None:
        self.steps = solver.check_every
        self._leaves, self._counted = len(params), count
        moving = [*params.values(), *state]
        rule = dataclasses.replace(solver, max_steps=1, tol=None)

        def record() -> tuple[_Recording, list[Tensor], tuple[Any, ...]]:
            recording = _record(velocity, params, step)
            tensors = [t.detach() for t in (*moving, *recording.constants.values())]
            layouts = tuple((t.shape, t.stride(), t.dtype, t.device) for t in tensors)
            return recording, tensors, (BACKEND, rule, len(params), recording.key(), layouts)

        on_cuda = all(p.device.type == "cuda" for p in params.values())
        graphed = solver.compile == "graph" or on_cuda
        known: dict[tuple[Any, ...], Compiled] = _graphs if graphed else _compiled
        recording, tensors, key = record()
        if key not in known:  # what is evaluated first may fill caches, and differ by that
            recording, tensors, key = record()
        function = known.get(key)
        if function is None:
            limit = GRAPHS_KEPT if graphed else KEPT
            if len(known) >= limit:
                del known[next(iter(known))]
                warnings.warn(
                    f"compile={solver.compile!r} has made more than {limit} different steps. A "
                    f"number that changes from call to call is part of them: make it a tensor",
                    stacklevel=2,
                )
            make = GraphedSteps if graphed else _compile
            function = make(recording, tensors, len(params), solver)
            if _check(function(*tensors), velocity, params, state, solver, step):
                known[key] = function
        self._function, self._tensors = function, tensors
        self._moved: list[Tensor] = []

    def begin(self) -> tuple[Tensor, ...]:
        """The velocity where the phase stands; the steps are taken, but the phase not yet moved."""
        self._counted(1)
        results = self._function(*self._tensors)
        self._moved = list(results[self._leaves :])
        return tuple(results[: self._leaves])

    def finish(self) -> None:
        """Move the phase to where the steps ended."""
        self._counted(self.steps - 1)
        torch._foreach_copy_(self._tensors[: len(self._moved)], self._moved)


def _record(velocity: Velocity, params: Params, step: int) -> "_Recording":
    """One evaluation of the velocity."""
    recording = _Recording(params.values())
    try:
        with recording:
            moves, _ = velocity(params, step)
    except (EquigradError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise _refused("cannot follow the losses", error) from error
    recording.close(moves)
    return recording


def _compile(
    recording: "_Recording", tensors: list[Tensor], count: int, solver: Solver
) -> Compiled:
    """Several steps as a function of the leaves, the solver's state and all constants."""
    from torch._dynamo import lookup_backend  # takes seconds, which only those who compile pay
    from torch.fx.experimental.proxy_tensor import make_fx

    moving = len(tensors) - len(recording.constants)

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        leaves, state = list(inputs[:count]), list(inputs[count:moving])
        velocities = []
        for _ in range(solver.check_every):
            velocities.append(recording.replay(leaves, inputs[moving:]))
            leaves, state = [p.clone() for p in leaves], [s.clone() for s in state]
            solver.update(leaves, velocities[-1], state, _NO_OBJECTIVE)
        return *velocities[0], *leaves, *state

    try:
        graph = make_fx(run)(*tensors)
        return lookup_backend(BACKEND)(graph, list(tensors))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        needs = "; on a CPU it needs a C++ compiler" if tensors[0].device.type == "cpu" else ""
        raise _refused(f"failed in torch's compiler{needs}", error) from error


class GraphedSteps:
    """Several steps as a CUDA graph, on tensors of its own.

    Args:
        recording: one evaluation of the velocity.
        tensors: the leaves, the solver's state and all constants, as a phase has them.
        count: how many leaves there are.
        solver: a differentiable one; with `compile="inductor"` torch's compiler makes one
            velocity, and the graph holds what it has made.
    """

    def __init__(
        self, recording: "_Recording", tensors: list[Tensor], count: int, solver: Solver
    ) -> None:
        moving = len(tensors) - len(recording.constants)
        self._own = [_with_layout_of(t) for t in tensors]
        self._moving, self._constants = self._own[:moving], self._own[moving:]
        self._loaded: list[tuple[Tensor, int]] = []
        once, each = recording.split()
        leaves, state = self._moving[:count], self._moving[count:]
        self._load(tensors)
        self._prepare = _capture(lambda: recording.values(once, self._constants))
        self._prepared = self._prepare()
        velocity: Callable[[], Sequence[Tensor]] = lambda: recording.results(  # noqa: E731
            each, leaves, self._prepared
        )
        if solver.compile == "inductor":
            velocity = _compiled_velocity(recording, each, leaves, self._prepared)

        def several() -> tuple[Tensor, ...]:
            first = velocity()
            kept = tuple(v.clone() for v in first)  # a velocity may be a view of a leaf
            solver.update(leaves, tuple(first), state, _NO_OBJECTIVE)
            for _ in range(solver.check_every - 1):
                solver.update(leaves, tuple(velocity()), state, _NO_OBJECTIVE)
            return kept

        self._steps = _capture(several)

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The velocity where the steps start, then leaves and state where they end."""
        if self._load(tensors):
            self._prepared = self._prepare()
        return *self._steps(), *self._moving

    def _load(self, tensors: Sequence[Tensor]) -> bool:
        """Take over a phase's tensors; constants only where they have changed.

        Returns:
            Whether a constant has changed.
        """
        moving = len(self._moving)
        torch._foreach_copy_(self._moving, list(tensors[:moving]))
        given = tensors[moving:]
        loaded = [(t, t._version) for t in given]
        same = len(loaded) == len(self._loaded) and all(
            t is known and version == then
            for (t, version), (known, then) in zip(loaded, self._loaded, strict=True)
        )
        if not same:
            for own, constant in zip(self._constants, given, strict=True):
                _span(own).copy_(_span(constant))
            self._loaded = loaded
        return not same


def _compiled_velocity(
    recording: "_Recording", calls: list["_Call"], leaves: list[Tensor], known: dict[int, Tensor]
) -> Callable[[], Sequence[Tensor]]:
    """One velocity by torch's compiler, on the tensors as they are in memory."""
    from torch._dynamo import lookup_backend
    from torch.fx.experimental.proxy_tensor import make_fx

    places, inputs = list(known), [*leaves, *known.values()]

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        moving, rest = tensors[: len(leaves)], tensors[len(leaves) :]
        return recording.results(calls, moving, dict(zip(places, rest, strict=True)))

    try:
        function = lookup_backend(BACKEND)(make_fx(run)(*inputs), inputs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise _refused("failed in torch's compiler", error) from error
    return lambda: function(*inputs)


def _capture(run: Callable[[], Any]) -> Callable[[], Any]:
    """What runs again on the same memory, and returns the same tensors, filled anew."""
    if not torch.cuda.is_available():
        raise ConfigurationError(f'compile="graph" needs tensors on a CUDA device; {_EAGER}')
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(side):  # libraries set themselves up, which cannot be captured
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The CUDA Graph is empty")  # views, or nothing
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                results = run()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise _refused("cannot capture the steps as a CUDA graph", error) from error

    def replay() -> Any:
        graph.replay()
        return results

    return replay


def _span(tensor: Tensor) -> Tensor:
    """The stretch of memory that a tensor looks at, as a vector."""
    if tensor.numel() == 0:
        return tensor.new_empty(0)
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.detach().as_strided((1 + reach,), (1,), tensor.storage_offset())


def _with_layout_of(tensor: Tensor) -> Tensor:
    """A new tensor of the same shape and strides, which may overlap; not filled."""
    return torch.empty_like(_span(tensor)).as_strided(tensor.shape, tensor.stride())


def _check(
    compiled: Sequence[Tensor],
    velocity: Velocity,
    params: Params,
    state: list[Tensor],
    solver: Solver,
    step: int,
) -> bool:
    """Compare with as many steps in eager mode: what was not seen cannot have been recorded.

    Returns:
        Whether there was something to compare: steps that diverge at once tell nothing.
    """
    leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    values, own = list(leaves.values()), [s.clone() for s in state]
    for i in range(solver.check_every):
        solver.update(values, velocity(leaves, step + i)[0], own, _NO_OBJECTIVE)
    ours = list(compiled[len(params) : 2 * len(params)])
    start = [p.detach() for p in params.values()]
    off, moved, size = (
        torch.stack([n.double() for n in torch._foreach_norm(tensors)]).norm().item()
        for tensors in (torch._foreach_sub(ours, values), torch._foreach_sub(values, start), start)
    )
    rounding = 1e3 * torch.finfo(start[0].dtype).eps * (size + moved)
    if off > 1e-3 * moved + rounding:
        raise ConfigurationError(
            f"compile=True: {solver.check_every} compiled steps end {off:.1e} away from eager "
            f"ones, which moved params by {moved:.1e}. The losses compute something that torch "
            f"does not see, in numpy for example; {_EAGER}"
        )
    return math.isfinite(moved)


class _Recording(TorchDispatchMode):
    """Every operation of torch on the way from `inputs` to a result, below autograd.

    Attributes:
        constants: the tensors that were there before, by place.
    """

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        super().__init__()
        self._alive = list(inputs)  # an id stands for a tensor only while it is alive
        self._places = {id(t): i for i, t in enumerate(self._alive)}
        self._dependent = set(self._places.values())
        self._fresh: set[int] = set()
        self._calls: list[_Call] = []
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
                f"compile=True needs losses without random numbers, and these call {func}: they "
                f"would have to be drawn anew at every step; {_EAGER}"
            )
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        taken = tree_map_only(Tensor, self._place, (args, kwargs))
        depends = any(self._places[id(t)] in self._dependent for t in given)
        written = [t for part in _written(func, args, kwargs) for t in tree_leaves(part)]
        if any(_storage(t) not in self._fresh for t in written if isinstance(t, Tensor)):
            raise ConfigurationError(
                f"compile=True needs losses that change no tensor, and these change one by {func} "
                f"(a buffer of batch normalisation?); put the module into eval mode, or {_EAGER}"
            )
        out = func(*args, **kwargs)
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if not made and not written:
            if depends and out is not None:
                raise ConfigurationError(
                    f"compile=True needs losses whose Python code does not look at values that "
                    f"depend on params, and these call {func} (.item(), if, float()); {_EAGER}"
                )
            return out
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
        """Say what the results are, and let go of everything but the constants."""
        self._results = tuple(self._place(t) for t in results)
        self._alive.clear()

    def key(self) -> str:
        """What was done, in words: equal keys compute the same function."""
        return repr((self._calls, tuple(self.constants), self._results))

    def replay(self, inputs: Sequence[Tensor], constants: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The same operations on other tensors."""
        return self.results(self._calls, inputs, dict(zip(self.constants, constants, strict=True)))

    def split(self) -> tuple[list["_Call"], list["_Call"]]:
        """The calls that depend on constants alone, and all others.

        A call on memory that any call writes to is none of the first: it is done in its place.
        """
        known = set(self.constants)
        once: list[_Call] = []
        each: list[_Call] = []
        for call, touched in zip(self._calls, self._touched, strict=True):
            _, args, kwargs, places = call
            needs = {p.index for p in tree_leaves((args, kwargs)) if isinstance(p, _Place)}
            if needs <= known and not touched & self._rewritten:
                known.update(p.index for p in places)
                once.append(call)
            else:
                each.append(call)
        return once, each

    def values(self, calls: Sequence["_Call"], constants: Sequence[Tensor]) -> dict[int, Tensor]:
        """What calls that need no more than constants compute, and the constants, by place."""
        values = dict(zip(self.constants, constants, strict=True))
        self._run(calls, values)
        return values

    def results(
        self, calls: Sequence["_Call"], inputs: Sequence[Tensor], known: dict[int, Tensor]
    ) -> tuple[Tensor, ...]:
        """The results by some of the calls, where those of the others are known."""
        values = known | dict(enumerate(inputs))
        self._run(calls, values)
        return tuple(values[p.index] for p in self._results)

    def _run(self, calls: Sequence["_Call"], values: dict[int, Tensor]) -> None:
        for func, args, kwargs, places in calls:
            args, kwargs = tree_map_only(_Place, lambda p: values[p.index], (args, kwargs))
            out = func(*args, **kwargs)
            made = (t for t in tree_leaves(out) if isinstance(t, Tensor))
            values.update((p.index, t) for p, t in zip(places, made, strict=True))


@dataclasses.dataclass(frozen=True)
class _Place:
    """Stands for a tensor in a recording."""

    index: int


_Call = tuple[Any, tuple[Any, ...], dict[str, Any], tuple[_Place, ...]]
"""An operation, its arguments with places for tensors, and the places of what it makes."""


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


def _refused(what: str, error: Exception) -> ConfigurationError:
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return ConfigurationError(f"compile=True {what} ({type(error).__name__}: {lines[0]}); {_EAGER}")
