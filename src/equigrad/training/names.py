"""Numbers and texts as names of classes and categories."""

from collections.abc import Sequence


def name_of(number: float) -> str:
    """The name of a number, the same for every way of writing it.

    Example:
        >>> name_of(1.0), name_of(0.5), name_of(-0.0)
        ('1', '0.5', '0')
    """
    return repr(number + 0.0).removesuffix(".0")  # adding zero turns -0 into 0


def places(
    names: Sequence[str], texts: Sequence[str], numbers: Sequence[float | None]
) -> list[int | None]:
    """The indices of texts among names, matched as text or number; None without a match."""
    place = {name: i for i, name in enumerate(names)}
    return [
        place.get(text, None if number is None else place.get(name_of(number)))
        for text, number in zip(texts, numbers, strict=True)
    ]
