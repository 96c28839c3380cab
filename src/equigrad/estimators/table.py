"""The table that compares all estimators, from their traits."""

from equigrad.estimators import ESTIMATORS, Traits

HEADINGS = (
    "estimator",
    "how",
    "further gradients",
    "remaining error",
    "order",
    "memory",
    "needs",
    "start",
)

LEGEND = (
    "T: steps of the free phase. K: steps of a nudged phase, or iterations, terms, columns or "
    "pairs. Order: of the error in β with p points, for the forward; symmetric; holomorphic "
    "scheme. Needs: E an energy, S a symmetric Jacobian (a Hessian), Q convergence to an "
    "equilibrium, 2 second derivatives. Start: whether the gradient includes the path through the "
    "initialisation of params (seen), or is that path alone (needed)."
)
"""The meaning of the letters in the table."""


def rows() -> list[tuple[str, ...]]:
    """One row for each estimator, under `HEADINGS`."""
    return [(estimator.__name__, *_cells(estimator.traits)) for estimator in ESTIMATORS]


def _cells(traits: Traits) -> tuple[str, ...]:
    energy = traits.energy and not traits.symmetric
    needs = (
        ("E", energy),
        ("S", traits.symmetric),
        ("Q", traits.equilibrium),
        ("2", traits.double_backward),
    )
    start = "needed" if traits.needs_start else "seen" if traits.sees_start else "–"
    return (
        traits.idea,
        traits.cost,
        traits.error,
        traits.order,
        traits.memory,
        " ".join(letter for letter, needed in needs if needed) or "–",
        start,
    )


def as_markdown() -> str:
    """The table in Markdown, for the docs."""
    lines = [HEADINGS, tuple("---" for _ in HEADINGS), *rows()]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
