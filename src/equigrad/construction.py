"""Constructors that explain a wrong argument and suggest the one that was meant."""

import inspect
from abc import ABCMeta
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from equigrad.wording import listed, meant, shown


class Constructed(ABCMeta):
    """Metaclass of dataclasses whose constructors explain a wrong call.

    A class names its error as `refusal`, and may say by `_instead` where else an argument belongs.
    """

    if not TYPE_CHECKING:  # type checkers read the dataclass instead

        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            """Make an object, or say why not."""
            try:
                return super().__call__(*args, **kwargs)
            except TypeError:
                if said := _faults(cls, args, kwargs):
                    raise cls.refusal(f"{cls.__name__} {said}") from None
                raise

        @property
        def __signature__(cls) -> inspect.Signature:
            """The dataclass's, which the call above would hide."""
            signature = inspect.signature(cls.__init__)
            own = list(signature.parameters.values())[1:]
            return signature.replace(parameters=own, return_annotation=inspect.Signature.empty)


def _faults(cls: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """The faults of a call, in words; empty if the error is not about its arguments."""
    parameters = inspect.signature(cls).parameters
    places = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    taken = places[: len(args)]
    said = []
    if surplus := args[len(places) :]:
        most = f"{len(places)} arguments" if places else "no argument"
        said.append(f"takes {most} by position, got {', '.join(map(shown, surplus))}.")
    for name in kwargs:
        if name not in parameters:
            said.append(f"has no {name!r}.{cls._instead(name, kwargs) or meant(name, parameters)}")
        elif name in taken:
            said.append(f"was given {name!r} twice, by position and by name.")
    missing = [name for name, p in parameters.items() if p.default is p.empty]
    missing = [name for name in missing if name not in kwargs and name not in taken]
    if missing:
        said.append(f"lacks {listed(missing)}.")
    if not said:
        return ""
    return " It ".join([*said, f"takes {', '.join(parameters) or 'nothing'}"])
