"""A progress bar of the outer loop in the terminal."""

import math

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from equigrad.gradient import MetaGradient
from equigrad.training.loop import Callback, OuterState


class ProgressBar(Callback):
    """A bar with the outer loss, the metrics and the residual; lines if there is no terminal.

    Args:
        title: text before the bar.
        console: the console to draw on.
        lines: number of lines that a whole run prints if the console is not a terminal.
    """

    def __init__(self, title: str, console: Console, lines: int = 5) -> None:
        self.title, self.console, self.lines = title, console, lines
        self._progress: Progress | None = None
        self._due = 0

    def on_start(self, state: OuterState) -> None:
        """Draw the bar."""
        if state.step:
            self.console.print(f"{self.title}: resuming after outer step {state.step}")
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[step]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=self.console,
                transient=True,
            )
            self._progress.start()
            self._task = self._progress.add_task(
                self.title, total=1.0, step=_step(state), numbers=""
            )
            self._progress.update(self._task, completed=state.share)
        self._due = int(state.share * self.lines)

    def on_step(self, state: OuterState, result: MetaGradient) -> None:
        """Move the bar."""
        numbers = _numbers(state)
        if self._progress is not None:
            self._progress.update(
                self._task, completed=state.share, step=_step(state), numbers=numbers
            )
            return
        before, self._due = self._due, int(state.share * self.lines)
        if self._due > before:
            line = f"{self.title} {_step(state)}  {numbers}"
            self.console.print(line, highlight=False, soft_wrap=True)

    def on_end(self, state: OuterState, error: BaseException | None) -> None:
        """Clear the bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _step(state: OuterState) -> str:
    return f"{state.step}/{state.steps}" if math.isfinite(state.steps) else f"{state.step}"


def _numbers(state: OuterState) -> str:
    hidden = {"outer_step", "gradient_norm", "gradient_evaluations", "seconds", "status", "uneasy"}
    return "  ".join(
        f"{name.replace('_accuracy', '').replace('_', ' ')} {value:.4g}"
        for name, value in state.history[-1].items()
        if name not in hidden
    )
