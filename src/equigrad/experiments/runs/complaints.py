"""What the command line says of errors that the user can mend."""

from rich.console import Console

from equigrad.errors import ConfigurationError, EquigradError

MEMORY = ("can't allocate memory", "out of memory", "Storage size calculation overflowed")
"""What torch says where a tensor finds no room."""


def complain(error: EquigradError) -> None:
    """Say on standard error what the user can mend."""
    complaints = Console(stderr=True)
    complaints.print(f"[bold red]error:[/] {type(error).__name__}:", end=" ")
    complaints.print(str(error), markup=False, highlight=False, soft_wrap=True)


def too_large(error: Exception) -> EquigradError | None:
    """What torch's error says, where a setting is too large for the memory or for the dtype."""
    said = (str(error).splitlines() or [""])[0]
    if isinstance(error, MemoryError) or any(words in said for words in MEMORY):
        return ConfigurationError(
            f"there is not enough memory ({said or 'MemoryError'}): lower what sets the size of "
            f"the network, the images or a batch"
        )
    if "without overflow" in said:
        return ConfigurationError(
            f"a setting is too large for the dtype ({said}): lower it, or take --dtype float64"
        )
    return None
