"""Settings read from JSON: a run's `config.json`, a search's `best.json`, or a part of one."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from equigrad import controllers, estimators, solvers
from equigrad.errors import ConfigurationError
from equigrad.experiments.runs.experiment import CHOOSERS
from equigrad.training.files import load_json

CONVERTED: dict[Any, Any] = {float: int | float, Path: str}
"""The JSON types of Python types that differ; other types are read unchanged."""


def read_config(path: Path, preset: Callable[..., Any], chosen: Mapping[str, str]) -> Any:
    """The configuration in a file: the `config.json` of a run, or the `best.json` of a search.

    Args:
        path: a JSON file, `{"experiment": NAME, "config": {…}}`. Settings that its config leaves
            out keep the values of `preset`.
        preset: returns the defaults for the values of `CHOOSERS`.
        chosen: the values of `CHOOSERS` that the command line gives, by name.

    Raises:
        ConfigurationError: the file cannot be read, belongs to another experiment, has an unknown
            setting or a value of the wrong type, or chooses another preset than the command line.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from equigrad.experiments.strengths.digits import Digits
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder) / "mine.json"
        ...     _ = file.write_text('{"experiment": "digits", "config": {"solver": {"lr": 0.02}}}')
        ...     solver = read_config(file, Digits.preset, {}).solver
        >>> solver.lr, solver.max_steps
        (0.02, 500)
    """
    content = read_object(path)
    changes = content.get("config")
    if not isinstance(changes, dict):
        raise ConfigurationError(
            f"{path} has no configuration; give the config.json of a run, or the best.json of a "
            f"search"
        )
    name = type(preset()).__name__.lower()
    if content.get("experiment") != name:
        raise ConfigurationError(
            f"{path} is the configuration of {content.get('experiment')!r}, not of {name!r}"
        )
    there = dict(_choosers(changes))
    for chooser, word in chosen.items():
        if there.get(chooser, word) != word:
            raise ConfigurationError(
                f"--{chooser} is {word} on the command line, but {there[chooser]} in {path}; "
                f"leave out one of the two"
            )
    try:
        return overlay(preset(**{**there, **chosen}), changes)
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from error


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a user's file.

    Raises:
        ConfigurationError: the file cannot be read, or is not a JSON object.
    """
    try:
        content = load_json(path.read_bytes())
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigurationError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path} must contain a JSON object, got {type(content).__name__}")
    return content


def overlay(config: Any, changes: Mapping[str, Any], where: str = "") -> Any:
    """A dataclass with some fields changed to values from JSON.

    Args:
        config: the dataclass.
        changes: values by field name; an object if the field is itself a dataclass. The object may
            name another class of the field's kind under `type`.
        where: path to `config`, for error messages.

    Raises:
        ConfigurationError: an unknown field, or an invalid value.

    Example:
        >>> from equigrad import Contrastive
        >>> rule = overlay(Contrastive(), {"beta": 1, "nudged_solver": {"type": "LBFGS"}})
        >>> rule.beta, type(rule.nudged_solver).__name__
        (1.0, 'LBFGS')
    """
    return _made(type(config), config, changes, where)


def at_paths(values: Mapping[str, Any]) -> dict[str, Any]:
    """The argument `changes` of `overlay`, from values by dotted path.

    Example:
        >>> at_paths({"solver.lr": 0.1, "solver.max-steps": 5, "seed": 1})
        {'solver': {'lr': 0.1, 'max_steps': 5}, 'seed': 1}
    """
    nested: dict[str, Any] = {}
    for path, value in values.items():
        *parents, last = path.replace("-", "_").split(".")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ConfigurationError(
                    f"{path} cannot be given together with a path that it begins with"
                )
        place[last] = value
    return nested


def _choosers(changes: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in changes.items():
        if isinstance(value, dict):
            yield from _choosers(value)
        elif name in CHOOSERS and isinstance(value, str):
            yield name, value


def _made(kind: type, default: Any, changes: Mapping[str, Any], where: str) -> Any:
    """A dataclass of a kind, from its description; fields that are left out are as in `default`."""
    if "type" in changes:
        _import_all_kinds()
    kinds = {k.__name__: k for k in _family(kind)}
    start: Any = default if isinstance(default, kind) else None
    name = changes.get("type", kind.__name__ if start is None else type(start).__name__)
    if name not in kinds:
        raise ConfigurationError(f"{where}type must be one of {', '.join(kinds)}, got {name!r}")
    made = kinds[name]
    hints = get_type_hints(made)
    fields = [field.name for field in dataclasses.fields(made) if field.init]
    values = {}
    for key, given in changes.items():
        if key == "type":
            continue
        if key not in fields:
            raise ConfigurationError(
                f"there is no {where}{key}; {made.__name__} has {', '.join(fields)}"
            )
        values[key] = _read(hints[key], given, getattr(start, key, None), f"{where}{key}")
    if start is not None and type(start) is made:
        return dataclasses.replace(start, **values)
    try:
        return made(**values)
    except (TypeError, ConfigurationError) as error:
        raise ConfigurationError(f"{where.rstrip('.')}: {error}") from error


def _import_all_kinds() -> None:
    """Import all classes that a file may name, so that they can be found as subclasses."""
    for package in (controllers, estimators, solvers):
        for name in dir(package):
            getattr(package, name)


def _family(kind: type) -> Iterator[type]:
    if dataclasses.is_dataclass(kind):
        yield kind
    for child in kind.__subclasses__():
        yield from _family(child)


def _read(hint: Any, given: Any, default: Any, where: str) -> Any:
    """A value of an annotated type, from JSON."""
    kinds: tuple[Any, ...] = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    for kind in kinds:
        if isinstance(given, dict) and isinstance(kind, type) and any(_family(kind)):
            return _made(kind, default, given, f"{where}.")
        if isinstance(given, list) and get_origin(kind) is tuple:
            item = get_args(kind)[0]
            return tuple(_read(item, g, None, f"{where}[{i}]") for i, g in enumerate(given))
        if _fits(kind, given):
            return kind(given) if kind in CONVERTED else given
    words = " or ".join(_word(kind) for kind in kinds)
    raise ConfigurationError(f"{where} must be {words}, got {given!r}")


def _fits(kind: Any, given: Any) -> bool:
    if get_origin(kind) is Literal:
        return any(given == word and type(given) is type(word) for word in get_args(kind))
    if get_origin(kind) is Mapping:  # a mapping of tensors, for example, cannot be JSON
        return given == {}
    if kind in CONVERTED:
        return isinstance(given, CONVERTED[kind]) and not isinstance(given, bool)
    return type(given) is kind


def _word(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    if kind is NoneType:
        return "null"
    return kind.__name__ if isinstance(kind, type) else str(kind)
