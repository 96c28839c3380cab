"""Reads the user's file for commands that take one: a dictionary of arguments, or a problem."""

import inspect
import runpy
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from equigrad.diagnostics.check import check_meta_gradient
from equigrad.errors import ConfigurationError, EquigradError
from equigrad.problems import Problem

BESIDE = "params", "meta_params", "solver", "estimator"
"""Names that are read from a file beside a problem that is given without its arguments."""


def examine(target: str, **options: Any) -> None:
    """Check the meta-gradient that a user's file describes; exit with code 1 if it is wrong."""
    described = read_description(target)
    known = set(inspect.signature(check_meta_gradient).parameters) - options.keys()
    if unknown := set(described) - known:
        raise ConfigurationError(f"{target} has {sorted(unknown)}, allowed are {sorted(known)}")
    if missing := {"problem", "params", "meta_params", "solver"} - set(described):
        raise ConfigurationError(
            f"{target} lacks {sorted(missing)}: put them into the dictionary, or for a problem "
            f"that is given alone, into its file under these names"
        )
    progress = partial(print, file=sys.stderr)
    check = check_meta_gradient(**{"progress": progress, **described}, **options)
    print(check)
    if not check.passed:
        raise SystemExit(1)


def read_description(target: str) -> Mapping[str, Any]:
    """The dictionary in a user's file, or what a function in it returns.

    A problem stands for its dictionary, with `params`, `meta_params`, `solver` and `estimator` as
    the file names them.
    """
    path, _, name = target.rpartition(":")
    if not path or not name:
        raise ConfigurationError(f"say which problem of which file, as FILE.py:NAME, got {target}")
    sys.path.insert(0, str(Path(path).resolve().parent))  # for its local imports
    try:
        scope = runpy.run_path(path)
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error}") from error
    except (Exception, SystemExit) as error:
        raise ConfigurationError(f"{path} does not run: {type(error).__name__}: {error}") from error
    if name not in scope:
        raise ConfigurationError(f"{path} defines no {name!r}")
    described = _called(scope[name], target) if callable(scope[name]) else scope[name]
    if isinstance(described, Problem):
        return {"problem": described, **{n: scope[n] for n in BESIDE if n in scope}}
    if not isinstance(described, Mapping):
        raise ConfigurationError(
            f"{target} must be a dictionary of arguments by name, a problem, or a function that "
            f"returns one of them; got {type(described).__name__}"
        )
    return described


def _called(function: Callable[..., Any], target: str) -> Any:
    """What a user's function returns; its errors are named."""
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise ConfigurationError(
            f"{target} is called without arguments, and does not allow that: {error}. Name a "
            f"dictionary of arguments, a problem, or a function that returns one of them"
        ) from error
    try:
        return function()
    except EquigradError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigurationError(
            f"{target} does not run: {type(error).__name__}: {error}"
        ) from error
