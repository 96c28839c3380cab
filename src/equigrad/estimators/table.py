"""The estimators side by side, from their own traits."""

from equigrad.estimators import ESTIMATORS

HEADINGS = ("estimator", "how", "further gradients", "error at equilibrium", "needs")


def rows() -> list[tuple[str, ...]]:
    """A row an estimator, under `HEADINGS`."""
    return [
        (
            estimator.__name__,
            estimator.traits.idea,
            estimator.traits.cost,
            estimator.traits.error,
            "a double backward" if estimator.traits.double_backward else "first order only",
        )
        for estimator in ESTIMATORS
    ]


def as_markdown() -> str:
    """The table of the docs."""
    lines = [HEADINGS, tuple("---" for _ in HEADINGS), *rows()]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
