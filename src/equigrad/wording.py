"""Helpers for the wording of errors and notes."""

from collections.abc import Iterable
from difflib import get_close_matches


def counted(count: int, noun: str) -> str:
    """A count with its noun.

    Example:
        >>> counted(1, "row"), counted(2, "row")
        ('1 row', '2 rows')
    """
    return f"{count} {noun}{'' if count == 1 else 's'}"


def listed(names: Iterable[object], most: int = 20) -> str:
    """Names as part of a sentence, shortened if there are many."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(name) for name in names[:most]) + more


def shortened(text: str) -> str:
    """A value as text for an error, shortened."""
    return repr(text if len(text) <= 40 else f"{text[:40]}…")


def shown(value: object) -> str:
    """Any value as one line of text for an error."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:80]}…"


def meant(word: str, known: Iterable[str]) -> str:
    """A suggestion for an unknown word, after a space; empty if no known word is similar.

    Example:
        >>> meant("digit", ["digits", "mnist"]), meant("?", ["digits", "mnist"])
        (" Did you mean 'digits'?", '')
    """
    near = get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""
