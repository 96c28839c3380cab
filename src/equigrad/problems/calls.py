"""The user's functions, and calls that do not fit them."""

import inspect
from collections.abc import Callable
from typing import Any

from equigrad.errors import ProblemError


def given(function: Any) -> Any:
    """The user's own function, which autocast and samples that are held have wrapped."""
    while hasattr(function, "function"):
        function = function.function
    return function


def refuse_call(name: str, function: Callable[..., Any], batches: str | None, count: int) -> None:
    """Raise a `ProblemError` where a function cannot be called with so many arguments.

    Args:
        name: what the function is called.
        function: the user's.
        batches: the argument of the problem that makes it see a batch; None where there is none.
        count: of arguments: params and meta_params, and a batch where there are batches.
    """
    try:
        signature = inspect.signature(given(function))
    except (TypeError, ValueError):  # of a function that is not Python's own
        return
    try:
        signature.bind(*range(count))
    except TypeError:
        words = ("params", "meta_params", "batch")[:count]
        why, mend = "", "let it take these"
        if count == 3:
            why = f", since there are {batches}"
            mend = f"let it take the batch, or leave out {batches}"
        elif batches is not None and len(signature.parameters) == 3:
            why = f", since there are no {batches}"
            mend = f"give {batches}, a sequence of what it takes third, or let it take these two"
        raise ProblemError(
            f"{name} is called as {name}({', '.join(words)}){why}, and takes {signature}: {mend}"
        ) from None
