"""The console of a run, which prints to the terminal and to a log file."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

LOG = "log.txt"
"""The log file in the run's folder."""


class LoggedConsole(Console):
    """A console that also appends its output to `log.txt`, once the run's folder exists.

    Args:
        folder: folder of the run.
        **options: options of the console; a quiet one still writes the file.
    """

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(**options)
        self._folder = folder

    def print(self, *objects: Any, **options: Any) -> None:
        """Print, and append the same lines to the log, a hundred columns wide."""
        super().print(*objects, **options)
        if not self._folder.is_dir():
            return
        # a full disk is reported by the files that matter
        with suppress(OSError), (self._folder / LOG).open("a", encoding="utf-8") as file:
            Console(file=file, width=100, markup=False).print(*objects, **options)
