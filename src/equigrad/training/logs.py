"""Logs of the outer loop: JSON lines and TensorBoard events."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from equigrad.errors import RunError
from equigrad.fields import expect
from equigrad.gradient import MetaGradient
from equigrad.training.files import write_whole
from equigrad.training.loop import Callback, OuterState

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter


class JsonLines(Callback):
    """Writes one line of JSON for each outer step, flushed at once.

    Args:
        path: the file. On start it is cut to the steps of the state's history: steps that a killed
            run logged after its last checkpoint will be taken and logged again.
    """

    def __init__(self, path: Path | str) -> None:
        expect(Path, path=path)
        self.path = Path(path)
        self._file: TextIO | None = None

    def on_start(self, state: OuterState) -> None:
        """Write the steps so far, and open the file for more."""
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in state.history))
        self._file = self.path.open("a")

    def on_step(self, state: OuterState, result: MetaGradient) -> None:
        """Write the step's line, or all lines if the file has been removed."""
        assert self._file is not None
        if not self.path.exists():  # the file was removed during the run
            self._file.close()
            self.on_start(state)
            return
        try:
            self._file.write(json.dumps(state.history[-1]) + "\n")
            self._file.flush()
        except OSError as error:
            raise RunError(f"cannot write {self.path}: {error}") from error

    def on_end(self, state: OuterState, error: BaseException | None) -> None:
        """Close the file."""
        if self._file is not None:
            self._file, file = None, self._file
            try:
                file.close()
            except OSError:
                if error is None:
                    raise


class TensorBoard(Callback):
    """Writes every number of a step's row as a TensorBoard scalar.

    Args:
        folder: folder of the event files. Needs the package `tensorboard`.

    Raises:
        RunError: the folder cannot be written to, or is removed while the loop runs.
    """

    def __init__(self, folder: Path | str) -> None:
        expect(Path, folder=folder)
        self.folder = Path(folder)
        self._writer: SummaryWriter | None = None

    def on_start(self, state: OuterState) -> None:
        """Open the writer; later steps of an earlier run are purged."""
        from torch.utils.tensorboard.writer import SummaryWriter

        try:
            self._writer = SummaryWriter(str(self.folder), purge_step=state.step)
        except OSError as error:
            raise RunError(f"cannot write events to {self.folder}: {error.strerror}") from error

    def on_step(self, state: OuterState, result: MetaGradient) -> None:
        """Write the step's numbers."""
        assert self._writer is not None
        if not self.folder.exists():
            raise RunError(
                f"{self.folder} was removed while the run went on, so nothing can be written there"
            )
        row = state.history[-1]
        for name, value in row.items():
            if name != "outer_step" and not isinstance(value, str):
                self._writer.add_scalar(name, value, row["outer_step"])
        try:
            self._writer.flush()  # its thread might write later, when the folder is gone
        except OSError as error:
            raise RunError(
                f"{self.folder} was removed while the run went on, so nothing can be written there"
            ) from error

    def on_end(self, state: OuterState, error: BaseException | None) -> None:
        """Close the writer."""
        if self._writer is not None:
            if self.folder.exists():  # without the folder, its thread would fail
                self._writer.close()
            self._writer = None
