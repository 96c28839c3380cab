"""Stop anywhere, go on with the same bits."""

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
    """Saves the state of an outer loop, and goes on from it.

    Writes every `every` steps, at the end, and when the loop is left by Ctrl-C or an error: then
    the state after the last whole step. What is there after a kill at any moment resumes to the
    same bits as a run that was never stopped, on the same machine and number of threads.

    Args:
        path: the file.
        every: outer steps between two writes.
        resume: load `path` on start, where it exists.
        identity: what makes this run this run (its configuration); a checkpoint with another
            identity is refused.

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
        """Load, where there is something to load."""
        if self.resume and self.path.exists():
            loaded = load_checkpoint(self.path, self.identity)
            try:
                state.load_state_dict(loaded["state"])
            except Exception as error:  # what is no state raises one of half a dozen kinds
                raise RunError(
                    f"{self.path} does not fit this run ({type(error).__name__}: {error}); give "
                    f"another --out"
                ) from error
            self._saved_step = state.step
        self._keep(state)

    def on_step(self, state: OuterState, result: MetaGradient) -> None:
        """Keep the state, and write it when it is time."""
        self._keep(state)
        if state.step % self.every == 0:
            self._write()

    def on_end(self, state: OuterState, error: BaseException | None) -> None:
        """Write the last whole step, unless it is written."""
        if self._whole is not None and not isinstance(error, RunError):
            self._write()

    def _keep(self, state: OuterState) -> None:
        # a copy: an interrupt in the middle of the next step may not leak into it
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
    """Read a checkpoint, trusting nothing: only tensors and plain values are loaded.

    Raises:
        RunError: the file is damaged, is not a checkpoint, or has another identity.
    """
    remedy = "Start anew with another --out, or without --resume"
    try:
        loaded = load_tensors(path)
    except Exception as error:  # a damaged file raises one of half a dozen kinds
        reason = f"damaged, or not one: {type(error).__name__}: {error}"
        raise RunError(f"{path} cannot be read as a checkpoint ({reason}). {remedy}") from error
    if not isinstance(loaded, dict) or loaded.get("format") != CHECKPOINT:
        raise RunError(f"{path} is not a checkpoint of equigrad ('{CHECKPOINT}'). {remedy}")
    if (there := loaded.get("identity")) != identity:
        raise RunError(
            f"{path} belongs to a run with other settings.\n  there: {there}\n"
            f"  here:  {identity}\nResume with the settings it was started with. {remedy}"
        )
    return loaded
