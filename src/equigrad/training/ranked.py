"""What is known of each training example or source, ranked, as a table."""

import csv
import io
from abc import abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from equigrad.errors import ConfigurationError
from equigrad.training.files import write_whole


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """A number for each training example, or each source; the lowest is the most harmful.

    Attributes:
        column: class attribute; what the numbers are called in a table.
        names: of the sources; the examples' numbers otherwise.
    """

    column: ClassVar[str]

    names: tuple[str, ...] = field(repr=False)

    @property
    @abstractmethod
    def values(self) -> Tensor:
        """The numbers."""

    def ranking(self) -> list[int]:
        """Numbers of the examples or sources, the most harmful one first."""
        return self.values.argsort(stable=True).tolist()

    def table(self) -> dict[str, list[Any]]:
        """Rank (1 is the most harmful), name and number by column, ranked."""
        order = self.ranking()
        return {
            "rank": list(range(1, len(order) + 1)),
            "example": [self.names[i] for i in order],
            self.column: [self.values[i].item() for i in order],
        }

    def save(self, path: Path | str) -> None:
        """Write the ranked table as `.csv`, or as `.parquet` where pandas and pyarrow are there.

        Raises:
            ConfigurationError: a path that ends in neither.
        """
        path = Path(path)
        if path.suffix == ".csv":
            text = io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(self.table())
            writer.writerows(zip(*self.table().values(), strict=True))
            write_whole(path, text.getvalue())
        elif path.suffix == ".parquet":
            import pandas

            content = io.BytesIO()
            pandas.DataFrame(self.table()).to_parquet(content, index=False)
            write_whole(path, content.getvalue())
        else:
            raise ConfigurationError(
                f"{self.column}s are saved as .csv or .parquet, got {path.name}"
            )
