"""Files that are either whole or not there."""

import io
import os
from pathlib import Path
from typing import Any

import torch

from equigrad.errors import RunError


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file such that a crash, a kill or a full disk leaves the old one as it was.

    Args:
        path: the file; its folder must exist.
        content: all of it.

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
        kept = f"; {path.name} is as it was before" if path.exists() else ""
        raise RunError(f"cannot write {path}: {error.strerror}{kept}") from error


def as_bytes(state: Any) -> bytes:
    """What `torch.save` would write: made in memory, so that a full disk is reported as one."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()
