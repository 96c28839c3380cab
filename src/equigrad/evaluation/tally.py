"""What a meta-gradient has cost so far, and what its user should know about it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Tally:
    """Is told what was spent and what is worth saying, by all who work on a meta-gradient.

    Attributes:
        gradient_evaluations: gradients of the inner or the outer loss taken so far; a
            Hessian-vector product counts as two, values without a gradient do not count.
        notes: what the user should know about this meta-gradient, a sentence each.
        error_notes: those of them that were said as its error was estimated.
    """

    gradient_evaluations: int = 0
    notes: list[str] = field(default_factory=list)
    error_notes: list[str] = field(default_factory=list)

    def spend(self, gradients: int) -> None:
        """So many gradients were taken."""
        self.gradient_evaluations += gradients

    def spend_each(self, gradients: int) -> Callable[[int], None]:
        """What is to be told of velocities that take so many gradients each, as they are taken."""
        return lambda velocities: self.spend(gradients * velocities)

    @contextmanager
    def of_the_error(self) -> Iterator[None]:
        """What is noted meanwhile is about the error."""
        said = len(self.notes)
        yield
        self.error_notes += self.notes[said:]

    def note(self, *sentences: str) -> None:
        """The user should know this."""
        self.notes.extend(sentences)
