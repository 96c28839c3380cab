"""What a run writes while it goes on: lines of JSON, and TensorBoard events."""

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
    """A line of JSON an outer step, flushed as it is written.

    Args:
        path: the file. On start it is made to hold the steps that the state has behind it, no
            more: what a killed run wrote after its last checkpoint will be written again.
    """

    def __init__(self, path: Path | str) -> None:
        expect(Path, path=path)
        self.path = Path(path)
        self._file: TextIO | None = None

    def on_start(self, state: OuterState) -> None:
        """Write what is known, and open for more."""
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in state.history))
        self._file = self.path.open("a")

    def on_step(self, state: OuterState, result: MetaGradient) -> None:
        """Write the step's line; all of them, where the file has been removed."""
        assert self._file is not None
        if not self.path.exists():  # removed under the run, which would write into nothing
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
    """Every number of a step's row as a TensorBoard scalar.

    Args:
        folder: where the event files go. Needs the package `tensorboard`.

    Raises:
        RunError: it cannot be written to, or is removed while the loop runs.
    """

    def __init__(self, folder: Path | str) -> None:
        expect(Path, folder=folder)
        self.folder = Path(folder)
        self._writer: SummaryWriter | None = None

    def on_start(self, state: OuterState) -> None:
        """Open the writer; steps that will be taken again are purged."""
        from torch.utils.tensorboard.writer import SummaryWriter

        try:
            self._writer = SummaryWriter(str(self.folder), purge_step=state.step)
        except OSError as error:
            raise RunError(f"cannot write events to {self.folder}: {error.strerror}") from error

    def on_step(self, state: OuterState, result: MetaGradient) -> None:
        """Write the step's numbers."""
        assert self._writer is not None
        if not self.folder.exists():
            raise RunError(f"{self.folder} is gone: it was removed while the run went on")
        row = state.history[-1]
        for name, value in row.items():
            if name != "outer_step" and not isinstance(value, str):
                self._writer.add_scalar(name, value, row["outer_step"])
        try:
            self._writer.flush()  # what its thread would write later, into a folder that is gone
        except OSError as error:
            raise RunError(
                f"{self.folder} is gone: it was removed while the run went on"
            ) from error

    def on_end(self, state: OuterState, error: BaseException | None) -> None:
        """Close the writer."""
        if self._writer is not None:
            if self.folder.exists():  # its thread would end in a traceback
                self._writer.close()
            self._writer = None
