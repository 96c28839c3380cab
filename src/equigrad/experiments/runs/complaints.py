"""Error messages of the command line for errors that the user can fix."""

from rich.console import Console

from equigrad.errors import ConfigurationError, EquigradError

MEMORY = ("can't allocate memory", "out of memory", "Storage size calculation overflowed")
"""Torch's messages if a tensor does not fit into memory."""


def complain(error: EquigradError) -> None:
    """Print an error that the user can fix to standard error."""
    complaints = Console(stderr=True)
    complaints.print(f"[bold red]error:[/] {type(error).__name__}:", end=" ")
    complaints.print(str(error), markup=False, highlight=False, soft_wrap=True)


def too_large(error: Exception) -> EquigradError | None:
    """Torch's message if a setting is too large for the memory or the dtype, else None."""
    said = (str(error).splitlines() or [""])[0]
    if isinstance(error, MemoryError) or any(words in said for words in MEMORY):
        return ConfigurationError(
            f"there is not enough memory ({said or 'MemoryError'}): use a smaller network, "
            f"smaller images or smaller batches"
        )
    if "without overflow" in said:
        return ConfigurationError(
            f"a setting is too large for the dtype ({said}): lower it, or use --dtype float64"
        )
    return None
