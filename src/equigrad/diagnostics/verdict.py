"""The verdict on a hypergradient."""

from dataclasses import dataclass

from equigrad.diagnostics.references import Direction
from equigrad.gradient import MetaGradient


@dataclass(frozen=True)
class Check:
    """The verdict on a meta-gradient, to be printed.

    Attributes:
        result: the meta-gradient that was checked.
        directions: derivatives along random directions, estimated and re-solved.
        relative_error: `‖ĝ - g‖ / ‖g‖`, over all of θ if the exact solve was possible, else over
            the directions.
        cosine: cosine of ĝ and g, likewise.
        uncertainty: relative uncertainty of the reference; a smaller error is not significant.
        reference: the reference, in words.
        settled: whether the reference has settled; if not, it cannot judge the gradient.
        stable: whether φ returns after a small perturbation, as at a minimum.
        advice: what to change, one sentence each; empty if the check passed.
        rtol: the requested error.
        spent: gradient evaluations that the references took.
    """

    result: MetaGradient
    directions: tuple[Direction, ...]
    relative_error: float
    cosine: float
    uncertainty: float
    reference: str
    settled: bool
    stable: bool
    advice: tuple[str, ...]
    rtol: float
    spent: int

    @property
    def told(self) -> bool:
        """Whether the reference has settled at a minimum, with a small enough uncertainty."""
        certain = self.uncertainty <= 0.5 * max(self.rtol, self.relative_error)
        return self.settled and self.stable and certain

    @property
    def passed(self) -> bool:
        """Whether the error is at most `rtol`, by a reference that can judge it."""
        return self.told and self.relative_error <= self.rtol

    def __str__(self) -> str:
        verdict = "is right" if self.passed else "is WRONG"
        verdict = verdict if self.told else "cannot be judged"
        lines = [
            f"The meta-gradient {verdict}: relative error {self.relative_error:.2g}, cosine "
            f"{self.cosine:.6f}, asked for {self.rtol:.2g}",
            f"  reference   {self.reference}, uncertain by {self.uncertainty:.1g}",
            f"  free phase  {self.result.phases[0]}",
            *(f"  β = {phase.beta:<7g} {phase}" for phase in self.result.phases[1:]),
            f"  gradients   {self.result.gradient_evaluations} for the estimate, "
            f"{self.spent} for the references",
            "  along random unit directions of θ:   estimated     re-solved",
            *(
                f"{'':39}{d.estimated:>13.6g} {d.reference:>13.6g} ± {d.uncertainty:.1g}"
                for d in self.directions
            ),
            *(f"→ {sentence}" for sentence in self.advice),
        ]
        return "\n".join(lines)
