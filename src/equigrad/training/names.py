"""Numbers and texts as names of classes and categories."""

from collections.abc import Sequence


def name_of(number: float) -> str:
    """A number as a name, the same however it was written.

    Example:
        >>> name_of(1.0), name_of(0.5), name_of(-0.0)
        ('1', '0.5', '0')
    """
    return repr(number + 0.0).removesuffix(".0")  # adding zero turns -0 into 0


def places(
    names: Sequence[str], texts: Sequence[str], numbers: Sequence[float | None]
) -> list[int | None]:
    """Where texts stand among names, as they are written or as numbers; None for nowhere."""
    place = {name: i for i, name in enumerate(names)}
    return [
        place.get(text, None if number is None else place.get(name_of(number)))
        for text, number in zip(texts, numbers, strict=True)
    ]
