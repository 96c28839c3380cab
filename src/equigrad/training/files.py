"""Files that are written completely or not at all, and read with checks."""

import io
import json
import os
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from equigrad.errors import RunError

DEEPEST = 100
"""The deepest nesting of JSON that is read; files of this library are not nested deeper."""


def load_json(content: bytes | str) -> Any:
    """Parse JSON.

    Raises:
        ValueError: it is invalid, or nested too deeply.
    """
    try:
        found = json.loads(content)
    except RecursionError:
        raise ValueError(f"it is nested more than {DEEPEST} levels deep") from None
    level = [found]
    for _ in range(DEEPEST):
        level = [item for value in level for item in _items(value)]
    if level:
        raise ValueError(f"it is nested more than {DEEPEST} levels deep")
    return found


def _items(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file so that a crash, a kill or a full disk leaves the old one unchanged.

    Args:
        path: the file; its folder must exist.
        content: the whole content.

    Raises:
        RunError: the file cannot be written.
    """
    draft = path.with_name(f".{path.name}.draft")
    try:
        with draft.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        kept = f"; {path.name} was not changed" if path.exists() else ""
        raise RunError(f"cannot write {path}: {error.strerror}{kept}") from error


def save_tensors(path: Path, content: Any) -> None:
    """Write a file as `torch.save` does, completely or not at all.

    Raises:
        RunError: the file cannot be written.
    """
    buffer = io.BytesIO()  # in memory, so that a full disk is reported as one
    torch.save(content, buffer)
    write_whole(path, buffer.getvalue())


def load_tensors(file: Path | IO[bytes]) -> Any:
    """Read tensors and plain values from a file of `save_tensors`, onto the CPU, executing no code.

    Raises:
        ValueError: a checksum in the file is wrong, which `torch.load` does not check.
        Exception: any error of torch and zipfile for a file that is not theirs.
    """
    with zipfile.ZipFile(file) as archive:
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"the checksum of {damaged} in it is wrong")
    if not isinstance(file, Path):
        file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)
