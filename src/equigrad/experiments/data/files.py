"""Data files, found in the user's folder or downloaded once from a public address."""

import hashlib
import os
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equigrad.errors import DataError

FOLDER = "EQUIGRAD_DATA"
"""The environment variable that names the user's folder of data sets."""


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """A file of a data set, verified by a checksum or by the reader of its content.

    Attributes:
        name: path below the folder of data sets.
        url: public address.
        md5: checksum of the file as it is read; None if files with the same content differ.
        mirrors: other addresses, tried in turn if the first one fails.
        convert: converts the download into the file; None if they are the same.
        archive: whether the download is a tar archive that has the file under its name.

    Example:
        >>> DataFile(name="boston/boston_housing.csv", md5="0", url="https://example.org/b").name
        'boston/boston_housing.csv'
    """

    name: str
    url: str
    md5: str | None = None
    mirrors: tuple[str, ...] = ()
    convert: Callable[[bytes], bytes] | None = None
    archive: bool = False

    @property
    def withheld(self) -> bool:
        """Whether the user names a folder of data sets that lacks this file."""
        folder = os.environ.get(FOLDER)
        return bool(folder) and not (Path(folder or "") / self.name).is_file()

    def find(self) -> Path:
        """The file: `$EQUIGRAD_DATA/NAME` if that is set, else downloaded into the user's cache.

        Raises:
            DataError: it is missing, its checksum is wrong, or it cannot be downloaded.
        """
        folder = os.environ.get(FOLDER)
        if not folder:
            return self._cached()
        path = Path(folder) / self.name
        if self.withheld:
            raise DataError(
                f"{path} is not there, where {FOLDER} says that it is. Put it there, or unset "
                f"{FOLDER} to have it fetched from {self.url}"
            )
        self._verify(path, self._remedy)
        return path

    def damaged(self, path: Path, reason: object) -> DataError:
        """The error for a file whose content is not as expected."""
        return DataError(
            f"{path} is not the {Path(self.name).name} it should be: {reason}. {self._remedy}"
        )

    @property
    def _remedy(self) -> str:
        if os.environ.get(FOLDER):
            return f"Replace it, or unset {FOLDER} to have it fetched from {self.url}"
        return "Delete it to have it fetched again"

    def _cached(self) -> Path:
        path = _cache() / self.name
        if path.exists():
            self._verify(path, self._remedy)
            return path
        failures = []
        for url in (self.url, *self.mirrors):
            fetched = path.with_name(f".{path.name}.fetched")
            fetched.unlink(missing_ok=True)
            try:
                self._fetch(url, fetched)
                self._verify(fetched, f"{url} is not what it was; put the file into {FOLDER}")
                return fetched.replace(path)
            except (OSError, ValueError, DataError) as error:
                fetched.unlink(missing_ok=True)
                failures.append(f"{url}: {error}")
        raise DataError(
            f"cannot fetch {self.name} from {'; nor from '.join(failures)}. Try again, or put it "
            f"into a folder as {self.name} and set {FOLDER} to that folder"
        )

    def _fetch(self, url: str, target: Path) -> None:
        if self.archive:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(self._member(url))
        else:
            _retrieve(url, target, self.name)
        if self.convert is not None:
            target.write_bytes(self.convert(target.read_bytes()))

    def _member(self, url: str) -> bytes:
        """The file from the downloaded archive, which is downloaded once for all its files."""
        path = _cache() / url.rpartition("/")[2]
        if not path.exists():
            fetched = path.with_name(f".{path.name}.fetched")
            fetched.unlink(missing_ok=True)
            _retrieve(url, fetched, path.name)
            fetched.replace(path)
        try:
            with tarfile.open(path) as tar:
                member = tar.extractfile(self.name)
                if member is None:
                    raise KeyError(f"{self.name} is no file there")
                return member.read()
        except (KeyError, EOFError, OSError, zlib.error, tarfile.TarError) as error:
            raise DataError(
                f"cannot read {self.name} out of {path}: {error}. Delete it to have it fetched "
                f"again"
            ) from error

    def _verify(self, path: Path, remedy: str) -> None:
        try:
            with path.open("rb") as file:
                md5 = hashlib.file_digest(file, "md5").hexdigest()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        if self.md5 not in (None, md5):
            raise DataError(
                f"{path} is truncated or altered: {path.stat().st_size} bytes with md5 {md5}, "
                f"expected md5 {self.md5}. {remedy}"
            )


def _cache() -> Path:
    return Path(_pooch().os_cache("equigrad"))


def _retrieve(url: str, target: Path, title: str) -> None:
    _pooch().retrieve(
        url,
        known_hash=None,  # the known checksum is that after conversion
        fname=target.name,
        path=target.parent,
        progressbar=_Bar(title),
    )


class _Bar:
    """A progress bar in the interface of pooch, drawn by rich."""

    total = 0

    def __init__(self, title: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

        console = Console(stderr=True)
        columns = (TextColumn("fetching {task.description}"), BarColumn(), DownloadColumn())
        self._progress = Progress(*columns, console=console)
        self._task = self._progress.add_task(title, total=None)

    def update(self, amount: int) -> None:
        """Add downloaded bytes."""
        self._progress.start()
        self._progress.update(self._task, advance=amount, total=self.total or None)

    def reset(self) -> None:
        """Start again."""
        self._progress.update(self._task, completed=0)

    def close(self) -> None:
        """End the bar."""
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
