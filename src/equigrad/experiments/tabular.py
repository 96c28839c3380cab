"""The user's own table: a regularisation strength for every weight of a network that reads it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import Module

from equigrad.data import tables
from equigrad.data.encoding import Missing, TaskName, fit, read_target, refuse_missing
from equigrad.data.split import Split, divide
from equigrad.data.tables import Decimal, Table, listed
from equigrad.data.targets import Classes, Numbers, Target
from equigrad.errors import ConfigurationError, DataError
from equigrad.estimators import Contrastive
from equigrad.experiments.model import Architecture, Model
from equigrad.experiments.strength_learning import LearningAlike, at_least
from equigrad.problem import Params
from equigrad.solvers import GradientDescent

LEARNER = GradientDescent(lr=0.02, momentum=0.9, nesterov=True, max_steps=400)
RULE = Contrastive(beta=0.1)


@dataclass(frozen=True, kw_only=True)
class OwnData(LearningAlike):
    """Data that the user brings, and how they are divided."""

    test_share: float = 0.2
    """Share of the rows that is held back and used for the test column alone."""

    training_share: float = 0.5
    """Share of the others that the network learns from; the rest judges it."""

    samples: int | None = None
    """Rows for training and validation together; all that are not for testing by default."""

    batch: int | None = 1000
    """Rows of a mini-batch at most; None for all at once."""

    outer_steps: int = 50
    """Steps of Adam on the strengths."""

    outer_lr: float = 0.01
    """Adam's step size."""

    solver: GradientDescent = LEARNER
    """How the network learns: the free phase, from the same start each time."""

    contrastive: Contrastive = RULE
    """The contrastive rule; its nudged phases settle like the free one, but for their length."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("test_share", "training_share"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigurationError(
                    f"{name} must be between 0 and 1, got {getattr(self, name)}"
                )
        for name in ("samples", "batch"):
            if (size := getattr(self, name)) is not None:
                at_least(1, name, size)

    @classmethod
    def _preset(cls, **chosen: str) -> Self:
        """The defaults of a scale; what has none is for the command line to ask for."""
        defaults = cls(**cls._asked_for())
        if chosen.get("scale") != "smoke":
            return defaults
        return replace(
            defaults,
            scale="smoke",
            outer_steps=3,
            solver=replace(defaults.solver, max_steps=20),
            nudged_steps=5,
        )

    @classmethod
    def _asked_for(cls) -> dict[str, Any]:
        """What stands for the options that have no default."""
        raise NotImplementedError

    def batch_sizes(self) -> tuple[int | None, int | None]:
        """Rows of a mini-batch for training and for validation; None for all at once."""
        return self.batch, self.batch


@dataclass(frozen=True, kw_only=True)
class Tabular(OwnData):
    """Learn a regularisation strength for every weight of a network that reads your own CSV file.

    Part of the rows is learned from, part judges what was learned, and every weight's strength
    follows the judges' gradient; the rest has the last word. Beside it: no regularisation, the best
    of 13 single strengths, and the other estimator, all on the same rows and start. The run leaves
    a model for `equigrad predict`.
    """

    csv: Path
    """The table: a header with the names of the columns, and rows."""

    target: str
    """The column that is predicted."""

    task: TaskName = "auto"
    """Whether the target is a class or a number; `auto` decides by its values, and says so."""

    ignore: tuple[str, ...] = ()
    """Columns to leave out."""

    categorical: tuple[str, ...] = ()
    """Columns whose values are names, also where they look like numbers."""

    missing: Missing = "error"
    """`error` names the columns with missing values; `impute` takes medians, tells the network
    where, and leaves out rows without a target; `drop` leaves out rows where anything is missing.
    """

    delimiter: str | None = None
    """What is between columns; by default whichever of , ; tab | divides the header."""

    encoding: str = "utf-8"
    """Of the file's text."""

    decimal: Decimal = "."
    """The decimal mark."""

    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden tanh layers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(width < 1 for width in self.hidden):
            raise ConfigurationError(f"hidden widths must be at least 1, got {self.hidden}")

    @classmethod
    def _asked_for(cls) -> dict[str, Any]:
        import tyro  # the command line's; whoever calls from Python says which table

        return {"csv": tyro.MISSING, "target": tyro.MISSING}

    @property
    def name(self) -> str:
        """The table and its target."""
        return f"{self.target} of {Path(self.csv).name}"

    def load(self, device: torch.device, dtype: torch.dtype) -> Split:
        """Rows drawn by the seed, encoded as those for training and validation have it."""
        table, notes = self._table()
        target, values, how = read_target(table, self.target, self.task)
        classes = isinstance(target, Classes)
        rows = divide(
            values if classes else torch.zeros(len(table), dtype=torch.long),
            test_share=self.test_share,
            training_share=self.training_share,
            samples=self.samples,
            seed=self.seed,
            names=target.names if classes else (),
        )
        fitted, more = fit(
            table.rows(rows.seen.tolist()),
            target=self.target,
            missing=self.missing,
            categorical=self.categorical,
        )
        inputs, unseen = fitted.encode(table)
        if not classes:
            target, values = standardised(values, rows.seen)
            for name, chosen in vars(rows).items():
                if values[chosen].unique().numel() < 2:
                    raise DataError(
                        f"{table.source}: the {name} rows of seed {self.seed} all have the same "
                        f"target; take another seed, or more rows"
                    )
            values = values.to(dtype)

        def part(chosen: Tensor) -> tuple[Tensor, Tensor]:
            return inputs[chosen].to(device, dtype), values[chosen].to(device)

        counts = [len(chosen) for chosen in vars(rows).values()]
        about = (
            f"{how}; {counts[0]:,} training, {counts[1]:,} validation and {counts[2]:,} test rows "
            f"of {table.source}; {inputs.shape[1]} inputs"
        )
        return Split(
            part(rows.train),
            part(rows.validation),
            part(rows.test),
            target=target,
            encoding=fitted,
            inputs=fitted.inputs,
            note="\n".join([about, *notes, *more, *unseen]),
        )

    def _table(self) -> tuple[Table, list[str]]:
        """The table without the columns and the rows that are to be left out."""
        path = Path(self.csv)
        table = tables.read(
            path, delimiter=self.delimiter, encoding=self.encoding, decimal=self.decimal
        )
        targets = table.column(self.target, "--target")
        for name in self.ignore:
            table.column(name, "--ignore")
        for name in self.categorical:
            table.column(name, "--categorical")
        if self.target in self.ignore:
            raise ConfigurationError(f"the target {self.target!r} cannot be left out with --ignore")
        kept = {n: column for n, column in table.columns.items() if n not in self.ignore}
        if "" in kept:
            raise DataError(
                f"column {list(kept).index('') + 1} of {path} has no name in the header; give it "
                f"one, or leave it out with --ignore ''"
            )
        table = replace(table, columns=kept)
        if self.missing == "error":
            refuse_missing(
                table,
                list(kept),
                "fill them in, or say --missing impute, --missing drop, or --ignore a column",
            )
            return table, []
        needed = [targets] if self.missing == "impute" else list(kept.values())
        whole = [
            i
            for i, values in enumerate(zip(*needed, strict=True))
            if not any(value in tables.MISSING for value in values)
        ]
        if not whole:
            raise DataError(f"{path} has no row without missing values in {listed(list(kept))}")
        gone = len(table) - len(whole)
        what = "without a target" if self.missing == "impute" else "with missing values"
        return table.rows(whole), [f"left out: {gone} rows {what}"] if gone else []

    def network(self, split: Split) -> Module:
        """Tanh layers."""
        return self._architecture(split).build()

    def _architecture(self, split: Split) -> Architecture:
        widths = {
            "inputs": split.train[0].shape[1],
            "hidden": list(self.hidden),
            "outputs": split.target.outputs,
        }
        return Architecture("tanh_network", widths)

    def model(self, split: Split, params: Params) -> Model:
        """What `equigrad predict` needs."""
        return Model(self._architecture(split), dict(params), split.target, split.encoding)


def standardised(values: Tensor, seen: Tensor) -> tuple[Target, Tensor]:
    """Numbers with zero mean and unit variance over the rows that were seen."""
    mean, deviation = values[seen].mean().item(), values[seen].std(correction=0).item()
    return Numbers(mean, deviation or 1.0), (values - mean) / (deviation or 1.0)
