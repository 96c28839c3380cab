"""Validation of fields and arguments by their annotations."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cache, reduce
from inspect import get_annotations
from math import inf
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Union, get_args, get_origin

from equigrad.construction import Constructed
from equigrad.errors import ConfigurationError, EquigradError
from equigrad.wording import meant, shown

Test = Callable[[Any], bool]

MOST = 2**63
"""Sizes, counts and seeds must be below this, so that they fit 64 bits."""


@dataclass(frozen=True, eq=False)
class Rule:
    """A condition on a value besides its type: `Annotated[float, Rule("above 0", holds)]`.

    Attributes:
        words: the condition in words, which follow those for the type.
        holds: whether a value of that type is allowed.
        remedy: advice if it is not.
    """

    words: str = ""
    holds: Test = lambda value: True
    remedy: str = ""

    def __repr__(self) -> str:
        """The condition in words, as signatures and `help` show annotations."""
        return self.words or self.remedy


def at_least(least: float) -> Rule:
    """A rule for values of at least this size."""
    return Rule(f"of at least {least}", lambda value: value >= least)


Positive = Annotated[float, Rule("above 0", lambda value: value > 0)]
NotNegative = Annotated[float, at_least(0)]
Share = Annotated[float, Rule("in (0, 1)", lambda value: 0 < value < 1)]
Damping = Annotated[float, Rule("in (0, 1]", lambda value: 0 < value <= 1)]
Momentum = Annotated[float, Rule("in [0, 1)", lambda value: 0 <= value < 1)]
Infinite = Annotated[Any, Rule("math.inf", lambda value: isinstance(value, float) and value == inf)]
Count = Annotated[int, at_least(1)]
CountFrom0 = Annotated[int, at_least(0)]
CountFrom2 = Annotated[int, at_least(2)]
Threads = Annotated[int, Rule("from 1 to 1024", lambda count: 1 <= count <= 1024)]

SOME = Rule(", at least one", lambda items: len(items) > 0)
DIFFERENT = Rule(", at least one and none twice", lambda items: len({*items}) == len(items) > 0)
Counts = Annotated[tuple[Count, ...], DIFFERENT]
Positives = Annotated[tuple[Positive, ...], DIFFERENT]


class Checked(metaclass=Constructed):
    """Base class of dataclasses whose fields are validated by their annotations.

    An argument that is not a field is refused, with a suggestion (`equigrad.construction`).
    Conditions on several fields are checked by `require`, in a `__post_init__` that calls this one
    first.

    Attributes:
        refusal: class attribute; the error to raise.
        scheduled: class attribute; the fields that may be a function instead. Their annotations do
            not say so, since a command line can only give values.
    """

    refusal: ClassVar[type[EquigradError]] = ConfigurationError
    scheduled: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        for name, kind in _fields(type(self)):
            value = getattr(self, name)
            given = name in self.scheduled and callable(value) and not isinstance(value, type)
            if not (given or kind.allows(value) or self._awaited(value)):
                who = f"{type(self).__name__}({name}={shown(value)})"
                raise self.refusal(f"{who}: {_refused(kind, name, value)}")

    @classmethod
    def _instead(cls, name: str, given: Mapping[str, Any]) -> str:
        """A sentence about where an argument that is not a field belongs; empty if unknown."""
        return ""

    def _awaited(self, value: object) -> bool:
        """Whether a value is a placeholder for one given later, which is not checked."""
        return False


def expect(annotation: Any, **arguments: object) -> None:
    """Raise a `ConfigurationError` unless the arguments satisfy an annotation.

    Example:
        >>> expect(Count | None, steps=3, tasks=None)
        >>> expect(Positive, lr="0.1")
        Traceback (most recent call last):
        equigrad.errors.ConfigurationError: lr must be a finite number above 0, got '0.1' (a str)
    """
    kind = _kind(annotation)
    for name, value in arguments.items():
        if not kind.allows(value):
            raise ConfigurationError(_refused(kind, name, value))


def require(holds: bool, message: str) -> None:
    """Raise a `ConfigurationError` unless a condition holds."""
    if not holds:
        raise ConfigurationError(message)


class _Kind(NamedTuple):
    """An annotation in the form in which it is checked."""

    options: tuple[str, ...]  # allowed values, in words
    typed: Test  # whether a value is of the right type
    allows: Test  # whether the value is allowed
    remedy: str = ""

    def __str__(self) -> str:
        *others, last = self.options
        comma = "," if last == "None" and len(others) == 1 else ""
        return f"{', '.join(others)}{comma} or {last}" if others else last


def _refused(kind: _Kind, name: str, value: Any) -> str:
    said = f"{name} must be {kind}, got {shown(value)}"
    if not (kind.typed(value) or value is None or isinstance(value, type)):
        shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
        said += f" ({_a(type(value).__name__)}{shape})"
    if kind.typed(value) and isinstance(value, Integral) and abs(int(value)) >= MOST:
        said += " (too large to compute with)"
    near = meant(value, [w.strip("'") for w in kind.options]) if isinstance(value, str) else ""
    return said + (f"; {kind.remedy}" if kind.remedy else "") + ("." if near else "") + near


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'AEIOUaeiou' else 'a'} {noun}"


@cache
def _fields(kind: type) -> list[tuple[str, _Kind]]:
    """The fields of a dataclass that its constructor takes, as it and its bases declare them.

    A class that changes only the default of a field keeps the annotation of its base.
    """
    given = {field.name for field in fields(kind) if field.init}
    declared: list[tuple[str, Any]] = []
    for base in kind.__mro__:
        with suppress(NameError):  # a user's class may use names that do not exist at run time
            found = get_annotations(base, eval_str=True).items()
            declared += [item for item in found if item[0] in given and item not in declared]
    return [(name, _kind(annotation)) for name, annotation in declared]


def _kind(annotation: Any) -> _Kind:
    """The check of an annotation; an unknown form allows any value."""
    origin, args = get_origin(annotation) or annotation, get_args(annotation)
    if origin is Annotated:
        return reduce(_limited, (r for r in args[1:] if isinstance(r, Rule)), _kind(args[0]))
    if origin in (Union, UnionType):
        return reduce(_either, map(_kind, args))
    if origin is Literal:
        words = tuple(map(repr, args))
        return _Kind(words, _is_a(str), lambda value: isinstance(value, str) and value in args)
    if origin in _FORMS:
        return _FORMS[origin](*args)
    abstract = getattr(origin, "_is_protocol", False)
    if isinstance(origin, type) and (not abstract or getattr(origin, "_is_runtime_protocol", 0)):
        return _typed(_a(origin.__name__), _is_a(origin))
    return _typed(ANYTHING, lambda value: True)


def _typed(words: str, typed: Test, allows: Test | None = None) -> _Kind:
    return _Kind((words,), typed, allows or typed)


def _limited(kind: _Kind, rule: Rule) -> _Kind:
    *others, last = kind.options
    words = f"{'' if last == ANYTHING else last} {rule.words}".strip().replace(" ,", ",")

    def allows(value: Any) -> bool:
        return kind.allows(value) and rule.holds(value)

    return _Kind((*others, words), kind.typed, allows, rule.remedy or kind.remedy)


def _either(one: _Kind, other: _Kind) -> _Kind:
    return _Kind(
        one.options + other.options,
        lambda value: one.typed(value) or other.typed(value),
        lambda value: one.allows(value) or other.allows(value),
        one.remedy or other.remedy,
    )


def _is_a(kind: Any) -> Test:
    return lambda value: isinstance(value, kind)


def _number(kind: type, *plain: type) -> Test:
    """Whether a value is a number of a kind; tensors and arrays without dimensions count."""

    def typed(value: Any) -> bool:
        if type(value) in plain:  # the common case, checked fast
            return True
        if getattr(value, "ndim", None) == 0:
            value = value.item()
        return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))

    return typed


def _sequence(*_: Any) -> _Kind:
    def typed(value: Any) -> bool:
        indexable = hasattr(value, "__getitem__") and hasattr(value, "__len__")
        return indexable and not isinstance(value, str) and getattr(value, "ndim", 1) > 0

    return _typed("an indexable sequence", typed)


def _tuple(*items: Any) -> _Kind:
    each = [_kind(item) for item in items if item is not ...]

    def allows(value: Any) -> bool:
        if not isinstance(value, tuple | list):
            return False
        kinds = each * len(value) if ... in items else each
        return len(value) == len(kinds) and all(
            kind.allows(item) for kind, item in zip(kinds, value, strict=True)
        )

    count = "" if ... in items else f"{len(each)} "
    words = f"a tuple of {count}values, each {' or '.join(dict.fromkeys(map(str, each)))}"
    return _typed(words, _is_a(tuple | list), allows)


def _mapping(names: Any = Any, values: Any = Any) -> _Kind:
    name, item = _kind(names), _kind(values)

    def allows(value: Any) -> bool:
        return isinstance(value, Mapping) and all(
            name.allows(n) and item.allows(v) for n, v in value.items()
        )

    return _typed(f"a mapping from {name} to {item}", _is_a(Mapping), allows)


ANYTHING = "anything"
_REAL, _WHOLE, _TRUTH = _number(Real, float, int), _number(Integral, int), _number(bool, bool)
_FORMS: dict[Any, Callable[..., _Kind]] = {
    Any: lambda: _typed(ANYTHING, lambda value: True),
    bool: lambda: _Kind(("True", "False"), _TRUTH, _TRUTH),
    int: lambda: _typed("a whole number", _WHOLE, lambda v: _WHOLE(v) and abs(int(v)) < MOST),
    float: lambda: _typed("a finite number", _REAL, lambda v: _REAL(v) and -inf < v < inf),
    str: lambda: _typed("a string", _is_a(str)),
    Path: lambda: _typed("a path", _is_a(str | PathLike)),
    NoneType: lambda: _typed("None", lambda value: value is None),
    Callable: lambda *_: _typed("a function", callable),
    type: lambda *_: _typed("a class", _is_a(type)),
    Sequence: _sequence,
    Mapping: _mapping,
    tuple: _tuple,
}
