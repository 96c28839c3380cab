"""Files that are either whole or not there."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from equigrad.errors import RunError


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file such that a crash, a kill or a full disk leaves the old one as it was.

    Args:
        path: the file; its folder must exist.
        write: writes the content to the open file that it is handed.

    Raises:
        RunError: the file cannot be written.
    """
    draft = path.with_name(f".{path.name}.draft")
    try:
        with draft.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        draft.unlink(missing_ok=True)
        kept = f"; {path.name} is as it was before" if path.exists() else ""
        raise RunError(f"cannot write {path}: {error}{kept}") from error


def write_text(path: Path, text: str) -> None:
    """`write_whole` for text."""
    write_whole(path, lambda file: file.write(text.encode()))
