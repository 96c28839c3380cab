"""Where the file of a data set is: in the user's folder, or fetched once from its public home."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equigrad.errors import DataError

FOLDER = "EQUIGRAD_DATA"
"""The environment variable that names the user's folder of data sets."""


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """A file of a data set, known by its checksum.

    Attributes:
        name: path below the folder of data sets.
        md5: checksum of the file as it is read.
        url: public home.
        convert: turns what the home holds into the file; None where they are the same.

    Example:
        >>> DataFile(name="boston/boston_housing.csv", md5="0", url="https://example.org/b").name
        'boston/boston_housing.csv'
    """

    name: str
    md5: str
    url: str
    convert: Callable[[bytes], bytes] | None = None

    def find(self) -> Path:
        """The file: `$EQUIGRAD_DATA/NAME` where that is set, else fetched into the user's cache.

        Raises:
            DataError: it is missing, its checksum is another, or it cannot be fetched.
        """
        folder = os.environ.get(FOLDER)
        if not folder:
            return self._cached()
        path = Path(folder) / self.name
        if not path.is_file():
            raise DataError(
                f"{path} is not there, where {FOLDER} says that it is. Put it there, or unset "
                f"{FOLDER} to have it fetched from {self.url}"
            )
        self._verify(path, f"Replace it, or unset {FOLDER} to have it fetched from {self.url}")
        return path

    def _cached(self) -> Path:
        pooch = _pooch()
        path = Path(pooch.os_cache("equigrad")) / self.name
        if path.exists():
            self._verify(path, "Delete it to have it fetched again")
            return path
        fetched = path.with_name(f".{path.name}.fetched")
        fetched.unlink(missing_ok=True)
        try:
            pooch.retrieve(
                self.url,
                known_hash=None,  # of what the file is after conversion, the checksum is known
                fname=fetched.name,
                path=fetched.parent,
                progressbar=_Bar(self.name),
            )
            if self.convert is not None:
                fetched.write_bytes(self.convert(fetched.read_bytes()))
        except (OSError, ValueError) as error:
            raise DataError(
                f"cannot fetch {self.name} from {self.url}: {error}. Try again, or put it into a "
                f"folder as {self.name} and set {FOLDER} to that folder"
            ) from error
        try:
            self._verify(fetched, f"{self.url} is not what it was; put the file into {FOLDER}")
        except DataError:
            fetched.unlink()
            raise
        return fetched.replace(path)

    def _verify(self, path: Path, remedy: str) -> None:
        try:
            with path.open("rb") as file:
                md5 = hashlib.file_digest(file, "md5").hexdigest()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        if md5 != self.md5:
            raise DataError(
                f"{path} is truncated or altered: {path.stat().st_size} bytes with md5 {md5}, "
                f"expected md5 {self.md5}. {remedy}"
            )


class _Bar:
    """What pooch drives while it fetches, drawn by rich."""

    total = 0

    def __init__(self, title: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

        console = Console(stderr=True)
        columns = (TextColumn("fetching {task.description}"), BarColumn(), DownloadColumn())
        self._progress = Progress(*columns, console=console)
        self._task = self._progress.add_task(title, total=None)

    def update(self, amount: int) -> None:
        """Some bytes more."""
        self._progress.start()
        self._progress.update(self._task, advance=amount, total=self.total or None)

    def reset(self) -> None:
        """Begin again."""
        self._progress.update(self._task, completed=0)

    def close(self) -> None:
        """All is there."""
        self._progress.stop()


def _pooch() -> Any:
    try:
        import pooch
    except ImportError as error:
        raise DataError(
            f"fetching data needs the extra packages of equigrad[experiments] ({error}): "
            f"pip install 'equigrad[experiments]', or set {FOLDER} to a folder with the data"
        ) from error
    pooch.get_logger().setLevel("WARNING")
    return pooch
