"""The directory of a run: its settings and results, and the checks before it is resumed."""

import dataclasses
import json
import os
import platform
import sys
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from equigrad.errors import RunError
from equigrad.experiments.runs.experiment import Experiment
from equigrad.training.device import pick_device
from equigrad.training.files import load_json, write_whole


class RunDirectory:
    """A folder that holds one run.

    `config.json` has all settings that reproduce it; `metrics.jsonl`, TensorBoard events and
    `checkpoint.pt` are written during the run; `result.json` and figures at its end.

    Args:
        path: the folder, made if it is missing.
        config: the settings, a dataclass.
        resume: whether to continue the run in the folder. If not, the folder must be empty.

    Raises:
        RunError: the folder cannot be written, or holds another run or other files.
    """

    def __init__(self, path: Path, config: Any, *, resume: bool = False) -> None:
        self.path = path
        self.identity = json.dumps(describe(config), sort_keys=True)
        try:
            path.mkdir(parents=True, exist_ok=True)
            occupied = any(not child.name.startswith(".") for child in path.iterdir())
        except OSError as error:
            raise RunError(f"cannot use {path} for a run: {error}; give another --out") from error
        if occupied and not resume:
            raise RunError(
                f"{path} is not empty, and nothing is overwritten. Add --resume to resume the run "
                f"in it, or give another --out"
            )
        if occupied:
            self._check_same()
        else:
            self._write_config(config)

    @property
    def result(self) -> dict[str, Any] | None:
        """The content of `result.json`; None while the run has not ended."""
        return self.read_json("result.json")

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The content of a JSON file; None if there is no such file."""
        path = self.path / name
        return _read(path) if path.exists() else None

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file, completely or not at all."""
        write_whole(self.path / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def end(self, config: Experiment, **found: Any) -> dict[str, Any]:
        """Write `result.json`, with the results and the experiment's name."""
        whose = {
            "experiment": type(config).__name__.lower(),
            "seed": config.seed,
            "scale": config.scale,
        }
        where = {"device": str(pick_device(config.device)), "versions": versions()}
        result = {**whose, **found, **where}
        self.write_json("result.json", result)
        return result

    def keep_to_data(self, digest: str) -> None:
        """Record a checksum of the data at the start of the run, and refuse other data later.

        Raises:
            RunError: the data have changed since the run began.
        """
        began = self.read_json("data.json")
        if began is not None and began["sha256"] != digest:
            raise RunError(
                f"the data have changed since the run in {self.path} began; use the original "
                f"data, or give another --out"
            )
        self.write_json("data.json", {"sha256": digest})

    def _write_config(self, config: Any) -> None:
        content = {
            "experiment": type(config).__name__.lower(),
            "config": describe(config),
            "versions": versions(),
            "command": " ".join(["equigrad", *sys.argv[1:]]),
            "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        }
        self.write_json("config.json", content)

    def _check_same(self) -> None:
        path = self.path / "config.json"
        if not path.exists():
            raise RunError(f"{self.path} contains no run (no config.json); give another --out")
        there = _read(path).get("config")
        here = json.loads(self.identity)
        if there != here:
            changes = "\n".join(_differences(there, here)) or "  (unreadable)"
            raise RunError(
                f"{self.path} contains a run with other settings:\n{changes}\nResume with the "
                f"settings that it was started with, or give another --out"
            )


def describe(value: Any) -> Any:
    """A dataclass and its content as plain values, each dataclass with the name of its class."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, dict):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [describe(item) for item in value]
    if isinstance(value, str | int | float | bool | None):
        return value
    return str(value)


def versions() -> dict[str, str]:
    """The versions of software that a run's numbers depend on, and its hardware."""
    found = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    for package in ("equigrad", "torch", "numpy", "scikit-learn"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """The processor's model, where the system says it, and its cores."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    model = next(names, "") or platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores"


def default_directory(name: str) -> Path:
    """A new path `runs/NAME-DATE-TIME`."""
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


class _Content(dict[str, Any]):
    """The content of a JSON file."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        super().__init__(content)
        self._path = path

    def __missing__(self, key: str) -> Any:
        raise RunError(f"{self._path} is damaged: it has no {key!r}; give another --out")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = load_json(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}); give another --out") from error
    return _Content(path, content)


def _differences(there: Any, here: Any, name: str = "") -> list[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        return [
            line
            for key in {**there, **here}
            for line in _differences(there.get(key), here.get(key), f"{name}.{key}".strip("."))
        ]
    return [] if there == here else [f"  {name}: there {there!r}, here {here!r}"]
