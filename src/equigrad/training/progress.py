"""How far it is, on the terminal."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from equigrad.gradient import MetaGradient
from equigrad.training.loop import Callback, OuterState


class ProgressBar(Callback):
    """A bar with the outer loss, the metrics and the residual; lines where there is no terminal.

    Args:
        title: stands before the bar.
        console: where to draw.
        lines: how many lines a whole run prints where the console is not a terminal.
    """

    def __init__(self, title: str, console: Console, lines: int = 5) -> None:
        self.title, self.console, self.lines = title, console, lines
        self._progress: Progress | None = None

    def on_start(self, state: OuterState) -> None:
        """Draw the bar."""
        if state.step:
            self.console.print(f"{self.title}: going on after outer step {state.step}")
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=self.console,
                transient=True,
            )
            self._progress.start()
            self._task = self._progress.add_task(
                self.title, total=state.steps, completed=state.step, numbers=""
            )

    def on_step(self, state: OuterState, result: MetaGradient) -> None:
        """Move the bar."""
        numbers = _numbers(state)
        if self._progress is not None:
            self._progress.update(self._task, completed=state.step, numbers=numbers)
        elif state.step % max(1, state.steps // self.lines) == 0:
            line = f"{self.title} {state.step}/{state.steps}  {numbers}"
            self.console.print(line, highlight=False, soft_wrap=True)

    def on_end(self, state: OuterState, error: BaseException | None) -> None:
        """Clear the bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _numbers(state: OuterState) -> str:
    hidden = {"outer_step", "gradient_norm", "gradient_evaluations", "seconds", "status"}
    return "  ".join(
        f"{name.replace('_accuracy', '').replace('_', ' ')} {value:.4g}"
        for name, value in state.history[-1].items()
        if name not in hidden
    )
