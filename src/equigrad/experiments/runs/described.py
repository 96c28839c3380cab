"""Reads the user's file for commands that take one: a dictionary of arguments."""

import inspect
import runpy
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from equigrad.diagnostics.check import check_meta_gradient
from equigrad.errors import ConfigurationError


def examine(target: str, **options: Any) -> None:
    """Check the meta-gradient that a user's file describes; exit with code 1 if it is wrong."""
    described = read_description(target)
    known = set(inspect.signature(check_meta_gradient).parameters) - options.keys()
    if unknown := set(described) - known:
        raise ConfigurationError(f"{target} has {sorted(unknown)}, allowed are {sorted(known)}")
    if missing := {"problem", "params", "meta_params", "solver"} - set(described):
        raise ConfigurationError(f"{target} lacks {sorted(missing)}")
    progress = partial(print, file=sys.stderr)
    check = check_meta_gradient(**{"progress": progress, **described}, **options)
    print(check)
    if not check.passed:
        raise SystemExit(1)


def read_description(target: str) -> Mapping[str, Any]:
    """The dictionary in a user's file, or the one that a function in it returns."""
    path, _, name = target.rpartition(":")
    if not path or not name:
        raise ConfigurationError(f"say which problem of which file, as FILE.py:NAME, got {target}")
    sys.path.insert(0, str(Path(path).resolve().parent))  # for its local imports
    try:
        scope = runpy.run_path(path)
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error}") from error
    except Exception as error:
        raise ConfigurationError(f"{path} does not run: {type(error).__name__}: {error}") from error
    if name not in scope:
        raise ConfigurationError(f"{path} defines no {name!r}")
    described = scope[name]() if callable(scope[name]) else scope[name]
    if not isinstance(described, Mapping):
        raise ConfigurationError(
            f"{target} must be a dictionary of arguments by name, or a function that returns one; "
            f"got {type(described).__name__}"
        )
    return described
