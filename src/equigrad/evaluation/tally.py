"""The count of gradient evaluations of one meta-gradient, and its notes to the user."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Tally:
    """Counts the gradients of one meta-gradient and collects notes to the user.

    Attributes:
        gradient_evaluations: gradients of the inner or outer loss taken so far; a Hessian-vector
            product counts as two, and values without a gradient do not count.
        notes: what the user should know about this meta-gradient, one sentence each.
        error_notes: the notes that were made while its error was estimated.
    """

    gradient_evaluations: int = 0
    notes: list[str] = field(default_factory=list)
    error_notes: list[str] = field(default_factory=list)

    @property
    def sentences(self) -> list[str]:
        """All notes, those about the error last."""
        return [n for n in self.notes if n not in self.error_notes] + self.error_notes

    def spend(self, gradients: int) -> None:
        """Count a number of gradients."""
        self.gradient_evaluations += gradients

    def spend_each(self, gradients: int) -> Callable[[int], None]:
        """A function that counts velocities, each of which takes a number of gradients."""
        return lambda velocities: self.spend(gradients * velocities)

    @contextmanager
    def of_the_error(self) -> Iterator[None]:
        """A context whose notes are about the error estimate."""
        said = len(self.notes)
        yield
        self.error_notes += self.notes[said:]

    def note(self, *sentences: str) -> None:
        """Add notes for the user."""
        self.notes.extend(sentences)
