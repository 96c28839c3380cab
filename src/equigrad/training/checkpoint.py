"""Checkpoints of the outer loop, from which a stopped run continues with the same bits."""

import copy
from pathlib import Path
from typing import Any

from equigrad.errors import RunError
from equigrad.fields import Count, expect
from equigrad.gradient import MetaGradient
from equigrad.training.files import load_tensors, save_tensors
from equigrad.training.loop import Callback, OuterState

CHECKPOINT = "equigrad checkpoint 1"
"""The format of the file."""


class Checkpoint(Callback):
    """Saves the state of an outer loop, and continues from it.

    It writes the state after the last complete step: every `every` steps, at the end, and when
    Ctrl-C or an error ends the loop. A run that was killed at any moment resumes to the same bits
    as one that was never stopped, on the same machine with the same number of threads.

    Args:
        path: the file.
        every: number of outer steps between two writes.
        resume: whether to load `path` on start, if it exists.
        identity: identifies the run (by its configuration); a checkpoint with another identity is
            refused.

    Raises:
        ConfigurationError: every < 1.
        RunError: the file is damaged, is not a checkpoint, or is another run's.
    """

    def __init__(
        self, path: Path | str, every: int = 1, *, resume: bool = False, identity: str = ""
    ) -> None:
        expect(Count, every=every)
        expect(Path, path=path)
        self.path, self.every = Path(path), every
        self.resume, self.identity = resume, identity
        self._whole: dict[str, Any] | None = None
        self._saved_step = -1

    def on_start(self, state: OuterState) -> None:
        """Load the checkpoint, if there is one and the run resumes."""
        if self.resume and self.path.exists():
            loaded = load_checkpoint(self.path, self.identity)
            try:
                state.load_state_dict(loaded["state"])
            except Exception as error:  # an invalid state raises errors of many kinds
                raise RunError(
                    f"{self.path} does not fit this run ({type(error).__name__}: {error}); give "
                    f"another --out"
                ) from error
            self._saved_step = state.step
        self._keep(state)

    def on_step(self, state: OuterState, result: MetaGradient) -> None:
        """Keep the state, and write it every `every` steps."""
        self._keep(state)
        if state.step % self.every == 0:
            self._write()

    def on_end(self, state: OuterState, error: BaseException | None) -> None:
        """Write the last complete step, unless it has been written."""
        if self._whole is not None and not isinstance(error, RunError):
            self._write()

    def _keep(self, state: OuterState) -> None:
        # a copy, so that an interrupt in the middle of the next step does not change it
        whole = state.state_dict()
        history = list(whole.pop("history"))  # its rows do not change
        self._whole = {**copy.deepcopy(whole), "history": history}

    def _write(self) -> None:
        assert self._whole is not None
        if self._whole["step"] == self._saved_step:
            return
        content = {"format": CHECKPOINT, "identity": self.identity, "state": self._whole}
        save_tensors(self.path, content)
        self._saved_step = self._whole["step"]


def load_checkpoint(path: Path, identity: str) -> dict[str, Any]:
    """Read a checkpoint safely: only tensors and plain values are loaded.

    Raises:
        RunError: the file is damaged, is not a checkpoint, or has another identity.
    """
    remedy = "Start anew with another --out, or without --resume"
    try:
        loaded = load_tensors(path)
    except Exception as error:  # a damaged file raises errors of many kinds
        reason = f"the file is damaged or is not a checkpoint: {type(error).__name__}: {error}"
        raise RunError(f"{path} cannot be read as a checkpoint ({reason}). {remedy}") from error
    if not isinstance(loaded, dict) or loaded.get("format") != CHECKPOINT:
        raise RunError(f"{path} is not a checkpoint of equigrad ('{CHECKPOINT}'). {remedy}")
    if (there := loaded.get("identity")) != identity:
        raise RunError(
            f"{path} belongs to a run with other settings.\n  there: {there}\n  here:  "
            f"{identity}\nResume with the settings that it was started with. {remedy}"
        )
    return loaded
