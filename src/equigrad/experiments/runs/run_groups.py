"""Groups of runs that differ only by the seed, with means and standard errors."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from equigrad.experiments.runs.formats import duration, mean_and_error, shown, with_error
from equigrad.experiments.runs.run_folders import RunFolder, numbers

SECTION = ("setting", "scale", "csv", "target", "images", "image")
"""Settings that put runs of the same experiment into different sections."""

BESIDE = ("seed", "seeds", "compare", "checkpoint_every")
"""Settings that do not affect the result of a run, other than by the seed."""


@dataclass(frozen=True)
class OverviewNumber:
    """A number of the overview, with a text below it and a standard error."""

    number: str
    below: str = ""
    difference: str = ""


@dataclass
class Group:
    """Runs with the same settings except for the seed.

    Attributes:
        family: the folder that holds the runs of all seeds, if there is one.
        runs: in order of path, including `family` if it is a run with the same settings.
        label: the difference to other groups.
    """

    family: RunFolder | None
    runs: list[RunFolder] = field(default_factory=list)
    label: str = ""

    @property
    def seeded(self) -> list[RunFolder]:
        """The runs without the folder that holds those of all seeds."""
        return [run for run in self.runs if run.seeds is None]

    @property
    def missing(self) -> list[int]:
        """Seeds that were requested but have no folder."""
        there = {run.seed for run in self.seeded}
        asked = (self.family.seeds if self.family else None) or 0
        return [seed for seed in range(asked) if seed not in there]

    @property
    def finished(self) -> list[RunFolder]:
        """The runs that have ended."""
        return [run for run in self.seeded if run.ended]

    @property
    def status(self) -> str:
        """Whether all runs have ended, and the progress of the others."""
        if len(self.finished) == len(self.seeded) and not self.missing:
            return "finished"
        several = len(self.seeded) + len(self.missing) > 1
        lines = [
            f"seed {run.seed}: {run.progress}" if several else run.progress
            for run in self.seeded
            if not run.ended
        ]
        lines += [f"seed {seed}: missing" for seed in self.missing]
        if several:
            total = len(self.seeded) + len(self.missing)
            lines.insert(0, f"{len(self.finished)} of {total} seeds finished")
        return "; ".join(lines)

    @property
    def seeds(self) -> str:
        """The seeds of the runs that have ended, or of all runs if none has."""
        seeds = (run.seed for run in self.finished or self.seeded)
        return ", ".join(str(seed) for seed in seeds if seed is not None)

    def mean(self, read: Callable[[RunFolder], float | None]) -> tuple[float, float | None] | None:
        """Mean and standard error over the runs that have ended; None if there is no number."""
        values = [value for run in self.finished if (value := read(run)) is not None]
        return mean_and_error(values) if values else None

    @property
    def gradients(self) -> str:
        """Mean number of gradient evaluations of a run."""
        found = self.mean(lambda run: numbers(run.result).get("gradient_evaluations"))
        return "" if found is None else f"{found[0]:,.0f}"

    @property
    def time(self) -> str:
        """Mean time of a run."""
        found = self.mean(lambda run: numbers(run.result).get("seconds"))
        return "" if found is None else duration(found[0])

    @property
    def device(self) -> str:
        """The device of the runs."""
        devices = (str(run.result["device"]) for run in self.finished if "device" in run.result)
        return ", ".join(dict.fromkeys(devices))

    def cell(self, metric: str) -> OverviewNumber:
        """A metric next to the paper's value."""
        found = self.mean(lambda run: run.metrics.get(metric))
        if found is None:
            last = [
                f"{shown(run.logged[metric])} at step {run.steps_done}"
                for run in self.seeded
                if metric in run.logged
            ]
            return OverviewNumber("", "; ".join(last))
        paper = next(
            (p for run in self.finished if metric in (p := numbers(run.result.get("paper")))), None
        )
        if paper is None:
            return OverviewNumber(with_error(*found))
        published = with_error(paper[metric], paper.get(f"{metric}_standard_error"))
        return OverviewNumber(
            with_error(*found), f"paper {published}", f"{found[0] - paper[metric]:+.2f}"
        )


def grouped(folders: Sequence[RunFolder]) -> dict[str, list[Group]]:
    """Groups of runs by the title of their section, in order of path."""
    families = {folder.path: folder for folder in folders if folder.seeds is not None}
    sections: dict[str, dict[str, list[Group]]] = {}
    for run in folders:
        family = next(
            (families[at] for at in (run.path, *run.path.parents) if at in families), None
        )
        title = ", ".join(
            [
                run.experiment,
                *(f"{word} {run.settings[word]}" for word in SECTION if run.settings.get(word)),
            ]
        )
        alike = {k: v for k, v in run.settings.items() if k not in BESIDE}
        # a run without readable settings is a group of its own
        key = json.dumps([str(family), alike or str(run)], sort_keys=True)
        same = sections.setdefault(title, {}).setdefault(key, [])
        for group in same:  # a second run of a seed starts another group
            if all((other.seed, other.seeds) != (run.seed, run.seeds) for other in group.runs):
                break
        else:
            same.append(group := Group(family))
        group.runs.append(run)
    return {
        title: [group for groups in keyed.values() for group in groups]
        for title, keyed in sections.items()
    }
