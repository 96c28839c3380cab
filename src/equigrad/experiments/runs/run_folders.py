"""Reads run directories for the report, including unfinished and damaged ones."""

import io
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from equigrad.errors import RunError
from equigrad.experiments.runs.formats import is_number
from equigrad.training.files import load_json, load_tensors

T = TypeVar("T")

ENDS = ("result.json", "summary.json", "best.json")
"""Files that a run writes at its end; a reproduction writes a text besides its table."""

IN_TABLE = "trials"
"""A folder whose runs are rows of a table in the run above, and are not searched for."""

BY_LOOP = (
    "outer_step",
    "outer_loss",
    "residual",
    "error_estimate",
    "gradient_norm",
    "gradient_evaluations",
    "seconds",
    "status",
    "uneasy",
)
"""Values that the outer loop logs in each step; all others are metrics of the experiment."""


class RunFolder:
    """A folder with a `config.json`, and the readable content of its other files.

    Missing or damaged files raise no error, but are named in `damage`.

    Args:
        path: the folder.

    Attributes:
        about: the content of `config.json`.
        settings: the run's configuration, from `config.json`.
        history: the rows of `metrics.jsonl`.
        result: the content of `result.json`; empty if there is none.
        damage: one sentence for each file that cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.damage: list[str] = []
        self.about = self.read("config.json", json_object) or {}
        self.settings: dict[str, Any] = mapping(self.about.get("config"))
        if not self.damage and not (self.settings and self.about.get("experiment")):
            self.damage.append(
                "config.json does not belong to a run, because it names no experiment"
            )
        self.history, torn = self.read("metrics.jsonl", json_lines) or ([], [])
        if torn:
            self.damage.append(
                f"metrics.jsonl: {len(torn)} of {len(torn) + len(self.history)} lines, the first "
                f"of them line {torn[0]}, cannot be read and are left out"
            )
        self.result = self.read("result.json", json_object) or {}

    def __str__(self) -> str:
        return str(self.path)

    def read(self, name: str, reader: Callable[[bytes], T]) -> T | None:
        """The content of a file, by a reader; None if the file is missing or damaged."""
        try:
            return reader((self.path / name).read_bytes())
        except FileNotFoundError:
            return None
        except Exception as error:  # a damaged file raises errors of many kinds
            self.damage.append(f"{name} cannot be read ({type(error).__name__})")
            return None

    @property
    def files(self) -> list[str]:
        """Names of the files in the folder, without hidden ones."""
        return sorted(
            child.name
            for child in self.path.iterdir()
            if child.is_file() and not child.name.startswith(".")
        )

    @property
    def experiment(self) -> str:
        """The name of the experiment or reproduction."""
        return str(self.about.get("experiment", "unknown"))

    @property
    def seed(self) -> int | None:
        """The seed of the run, if there is a single one."""
        seed = self.settings.get("seed")
        return seed if isinstance(seed, int) else None

    @property
    def seeds(self) -> int | None:
        """N if the folder holds the runs of seeds 0 to N-1."""
        seeds = self.settings.get("seeds")
        return seeds if self.seed is not None and isinstance(seeds, int) else None

    @property
    def ended(self) -> bool:
        """Whether the files of the end of a run exist and can be read."""
        if (self.path / "result.json").exists():
            return bool(self.result)
        texts = (table.with_suffix(".md") for table in self.path.glob("*.csv"))
        return any(end.exists() for end in (*(self.path / name for name in ENDS), *texts))

    @property
    def steps_done(self) -> int:
        """The number of outer steps that were logged."""
        return 1 + max((row["outer_step"] for row in self.history), default=-1)

    @property
    def progress(self) -> str:
        """Whether the run has ended, and its progress if not."""
        if self.ended:
            return "finished"
        state = "result unreadable" if (self.path / "result.json").exists() else "unfinished"
        steps = self.settings.get("outer_steps")
        if self.seeds is not None or not isinstance(steps, int):
            return state
        return f"{state}, {self.steps_done} of {steps} outer steps"

    @property
    def metrics(self) -> dict[str, float]:
        """The final metrics of the run, by name."""
        return numbers(self.result.get("metrics"))

    @property
    def logged(self) -> dict[str, float]:
        """The metrics of the last outer step that was logged."""
        last = self.history[-1] if self.history else {}
        return {name: value for name, value in numbers(last).items() if name not in BY_LOOP}

    @property
    def uneasy(self) -> list[str]:
        """The status of outer steps whose phase failed, or that have remarks besides it."""
        return [str(row["status"]) for row in self.history if row.get("uneasy") and "status" in row]


def find_runs(folders: Sequence[Path]) -> list[RunFolder]:
    """The runs in some folders and below, each once, in order of path.

    Raises:
        RunError: a folder does not exist, or there is no run in any.
    """
    for folder in folders:
        if not folder.is_dir():
            raise RunError(
                f"{folder} is not a folder; give the folder of a run, or one that contains runs"
            )
    found: dict[Path, Path] = {}
    for folder in folders:
        for at, inside, files in os.walk(folder):
            if "config.json" in files:
                found.setdefault(Path(at).resolve(), Path(at))
                inside[:] = [name for name in inside if name != IN_TABLE]
    if not found:
        raise RunError(
            f"no run in {', '.join(map(str, folders))}: none of the folders there has a config.json"
        )
    return [RunFolder(path) for path in sorted(found.values())]


def mapping(value: Any) -> dict[str, Any]:
    """The value if it is a dictionary, else an empty dictionary."""
    return value if isinstance(value, dict) else {}


def numbers(value: Any) -> dict[str, float]:
    """The entries of a dictionary that are numbers."""
    return {name: entry for name, entry in mapping(value).items() if is_number(entry)}


def json_object(content: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: it is not a JSON object.
    """
    found = load_json(content)
    if not isinstance(found, dict):
        raise ValueError(f"expected a JSON object, got {type(found).__name__}")
    return found


def json_lines(content: bytes) -> tuple[list[dict[str, Any]], list[int]]:
    """The rows of `metrics.jsonl`, and the numbers of invalid lines, which a kill may leave."""
    rows, torn = [], []
    for i, line in enumerate(content.splitlines(), 1):
        try:
            row = json_object(line)
        except ValueError:
            row = {}
        if isinstance(row.get("outer_step"), int):
            rows.append(row)
        else:
            torn.append(i)
    return rows, torn


def tensors(content: bytes) -> dict[str, torch.Tensor]:
    """The meta-parameters in `learned.pt`; only tensors and plain values are loaded."""
    loaded = load_tensors(io.BytesIO(content))
    return {name: tensor.detach() for name, tensor in loaded["meta_params"].items()}


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The values in nested dictionaries, by dotted names.

    Example:
        >>> dict(flat({"solver": {"lr": 0.1, "tol": None}, "hidden": [8, 8]}))
        {'solver.lr': 0.1, 'solver.tol': None, 'hidden': [8, 8]}
    """
    if isinstance(value, dict) and value:
        for key, entry in value.items():
            yield from flat(entry, f"{name}.{key}" if name else str(key))
    else:
        yield name, value
