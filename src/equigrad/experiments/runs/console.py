"""What a run says: to the terminal, and to a file in its folder."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

LOG = "log.txt"
"""The file, beside a run's other files."""


class LoggedConsole(Console):
    """A console that also appends what it prints to `log.txt`, as soon as the run's folder exists.

    Args:
        folder: of the run.
        **options: of the console; a quiet one still writes the file.
    """

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(**options)
        self._folder = folder

    def print(self, *objects: Any, **options: Any) -> None:
        """Print, and append the same lines a hundred columns wide."""
        super().print(*objects, **options)
        if not self._folder.is_dir():
            return
        # a full disk is for the files to complain of that matter
        with suppress(OSError), (self._folder / LOG).open("a", encoding="utf-8") as file:
            Console(file=file, width=100, markup=False).print(*objects, **options)
