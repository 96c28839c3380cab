"""The Omniglot experiment: few-shot classification of characters, or of users' images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import cross_entropy

from equigrad.errors import ConfigurationError
from equigrad.estimators import Contrastive, Estimator, LeastControl
from equigrad.experiments.few_shot.harness import (
    TEST,
    VALIDATION,
    FewShot,
    Tasks,
)
from equigrad.experiments.few_shot.image_classes import image_folder
from equigrad.experiments.few_shot.meta_training import MetaTrainer
from equigrad.experiments.few_shot.methods import FEW_SHOT_METHODS, FewShotMethodName
from equigrad.experiments.few_shot.omniglot_classes import SplitName, omniglot
from equigrad.experiments.few_shot.task_figures import task_sheet
from equigrad.experiments.runs import figures
from equigrad.experiments.runs.experiment import one_of
from equigrad.experiments.runs.formats import text
from equigrad.experiments.runs.methods import PAPERS_RULE
from equigrad.experiments.runs.run_directory import describe
from equigrad.experiments.runs.run_folders import flat
from equigrad.fields import Count, CountFrom2, Positive, Rule
from equigrad.nn import conv4
from equigrad.nn.side_by_side import Batching
from equigrad.problems import Params
from equigrad.solvers import GradientDescent
from equigrad.tasks import ClassCollection, ClassSplit, NWayKShot
from equigrad.tasks.splits import split_classes
from equigrad.training.few_shot import accuracy
from equigrad.training.split import digest_of

EpisodeSettingName = Literal["5way1shot", "5way5shot", "20way1shot", "20way5shot"]
"""Ways and shots of Table 2."""

PUBLISHED: dict[FewShotMethodName, dict[EpisodeSettingName, tuple[float, float]]] = {
    "contrastive-synaptic": {
        "5way1shot": (98.11, 0.34),
        "5way5shot": (99.49, 0.16),
        "20way1shot": (94.16, 0.12),
        "20way5shot": (98.06, 0.26),
    },
    "contrastive-modulation": {
        "5way1shot": (98.05, 0.06),
        "5way5shot": (99.45, 0.04),
        "20way1shot": (94.24, 0.39),
        "20way5shot": (98.60, 0.27),
    },
}
"""The paper's own results in its Table 2: accuracy in percent and standard deviation."""

CHARACTER_SOLVER = GradientDescent(lr=0.4, max_steps=5)
CHARACTER_RULE = Contrastive(beta=1.0, scheme="symmetric", nudge="force", error=False)

SMOOTHING = Rule("in [0, 1)", lambda value: 0 <= value < 1)

SHARES = 0.64, 0.16
"""Shares of the user's classes for meta-training and validation; the others are for the test."""

ELSEWHERE = frozenset(
    {
        *("scale", "seed", "minutes", "checkpoint_every", "device", "dtype", "threads"),
        *("chunk_size", "batching", "validate_every", "validation_tasks", "test_tasks"),
    }
)
"""Settings in which a run may differ from the paper without changing its scale."""


@dataclass(frozen=True, kw_only=True)
class Omniglot(FewShot):
    """Learn to distinguish new characters from one or a few drawings of each.

    A convolutional network learns each task, a few characters that it has never seen, in a few
    steps; what tasks share is meta-learned on the tasks of other characters. The test's characters
    have no part in that, nor those of validation, by which the best is chosen. With --images, your
    own classes stand in the place of the characters.
    """

    score: ClassVar[str] = "accuracy"
    best: ClassVar[Literal["highest", "lowest"]] = "highest"
    metric = staticmethod(accuracy)
    loss = staticmethod(cross_entropy)

    # other defaults than those of FewShot, which says what they mean
    solver: GradientDescent = CHARACTER_SOLVER
    nudged_steps: Count = 3
    outer_steps: Count = 2000
    outer_lr: Positive = 5e-3
    decay: bool = True
    test_steps: Count | None = 20
    tasks: Count = 16
    batching: Batching = "grouped channels-last"

    setting: EpisodeSettingName = "5way1shot"
    """The column of Table 2 that presets way, shot and tasks."""

    way: CountFrom2 = 5
    """Number of classes in a task."""

    train_shot: Count | None = None
    """Number of support images of each class in meta-training; shot if None."""

    split: SplitName = "background-evaluation"
    """How characters are divided into those for meta-training, validation and test."""

    held_out: int = 100
    """Number of characters for validation; with 0, as in the paper, the last state is kept."""

    rotations: bool = True
    """Whether a character rotated by 90°, 180° or 270° is another class in meta-training."""

    images: Path | None = None
    """A folder with a subfolder of images for each class, to use instead of Omniglot."""

    colors: bool = False
    """Whether to keep the colours of your images."""

    skip_broken: bool = False
    """Leave out files that cannot be read; by default they are listed, and the run stops."""

    side: Count = 28
    """Height and width to which images are resized."""

    filters: Count = 32
    """Number of filters in each of the four convolutions."""

    pooling: bool = False
    """Halve images by max-pooling, as the paper does; otherwise by convolutions of stride 2."""

    estimator: Estimator = CHARACTER_RULE
    """Estimator of the meta-gradient; its class is preset by the method."""

    queries: Count = 5
    """Number of query images of each class in meta-training."""

    label_smoothing: Annotated[float, SMOOTHING] = 0.0
    """Label smoothing of the queries in meta-training: the share spread evenly over all classes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        conv4(filters=1, side=self.side, pooling=self.pooling)

    @classmethod
    def _preset(cls, method: FewShotMethodName, **chosen: str) -> Self:
        """The default settings of a scale and a column of Table 2."""
        setting = one_of(
            get_args(EpisodeSettingName), "setting", chosen.get("setting", "5way1shot")
        )
        way, shot = (int(part.removesuffix("shot")) for part in setting.split("way"))
        small = cls(
            setting=setting,
            way=way,
            shot=shot,
            # Reptile makes no use of queries (Nichol, Achiam, Schulman 2018)
            train_shot=(5 if shot == 1 else 10) if method == "reptile" else None,
            tasks=16 if way == 5 else 4,
        )
        if FEW_SHOT_METHODS[method].estimator is LeastControl:
            # second derivatives make a task dearer: rather more steps than more tasks in each
            small = replace(small, tasks=small.tasks // 4, nudged_steps=2)
        scale = chosen.get("scale", "small")
        if scale == "smoke":
            return replace(
                small,
                scale="smoke",
                filters=4,
                tasks=2,
                outer_steps=3,
                validate_every=2,
                validation_tasks=4,
                test_tasks=6,
            )
        if scale == "paper":
            return replace(
                small,
                scale="paper",
                filters=64,
                pooling=True,
                held_out=0,
                solver=GradientDescent(lr=0.01, momentum=0.9, nesterov=True, max_steps=200),
                estimator=replace(PAPERS_RULE, scheme="symmetric", matched=False),
                test_steps=None,
                nudged_steps=50 if method == "contrastive-modulation" else 100,
                strength=0.1,
                outer_steps=3750,
                outer_lr=1e-3,
                decay=False,
                tasks=32 if way == 5 else 16,
                queries=10 if small.train_shot == 10 else 15,
            )
        return small

    @property
    def name(self) -> str:
        """The name of the tasks, in a few words."""
        source = "Omniglot" if self.images is None else f"images in {Path(self.images).name}"
        return f"{source}, {self.way}-way {self.shot}-shot"

    @property
    def outer_loss(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """Cross-entropy with smoothed labels, if they are to be smoothed."""
        if self.label_smoothing == 0:
            return None
        return partial(cross_entropy, label_smoothing=self.label_smoothing)

    def network(self) -> Module:
        """A network of four convolutions and a readout."""
        return conv4(
            filters=self.filters,
            channels=3 if self.colors else 1,
            side=self.side,
            outputs=self.way,
            pooling=self.pooling,
        )

    def sources(self, device: torch.device, dtype: torch.dtype) -> Tasks:
        """Tasks of the characters, or of the user's classes."""
        split = self.classes()
        parts = {"training": split.train, "validation": split.validation, "test": split.test}
        there = {name: part for name, part in parts.items() if part is not None}
        for name, part in there.items() if self.images is not None else ():
            if len(part) < self.way:
                raise ConfigurationError(
                    f"a {self.way}-way task needs {self.way} classes, and {len(part)} are for "
                    f"{name} ({split.note}); take a smaller way, or more classes"
                )

        def tasks(
            part: ClassCollection, seed: int, shot: int, queries: int, rotations: bool
        ) -> NWayKShot:
            there = [examples.to(device, dtype) for examples in part]
            return NWayKShot(
                replace(part, examples=there),
                way=self.way,
                shot=shot,
                queries=queries,
                rotations=rotations,
                seed=seed,
            )

        return Tasks(
            train=tasks(
                split.train, self.seed, self.train_shot or self.shot, self.queries, self.rotations
            ),
            validation=None
            if split.validation is None
            else tasks(split.validation, VALIDATION, self.shot, self.test_queries, False),
            test=tasks(split.test, TEST, self.shot, self.test_queries, False),
            note=split.note,
            digest=digest_of(examples for part in there.values() for examples in part),
        )

    def classes(self) -> ClassSplit:
        """The classes for meta-training, for validation and for the test."""
        if self.images is None:
            return omniglot(self.split, side=self.side, held_out=self.held_out)
        found = image_folder(
            self.images,
            size=self.side,
            channels=3 if self.colors else 1,
            skip_broken=self.skip_broken,
        )
        train, validation = (round(share * len(found)) for share in SHARES)
        split = split_classes(
            found, train=train, validation=validation, test=len(found) - train - validation
        )
        return replace(split, note="\n".join([f"{self.images}: {split.note}", *found.notes]))

    def notes(self) -> Sequence[str]:
        """The settings in which the run differs from the paper."""
        if self.images is not None:
            return ()
        paper = type(self).preset(scale="paper", setting=self.setting, method=self.method)
        phases = Contrastive, LeastControl
        unused = set() if isinstance(self.estimator, phases) else {"nudged_steps"}
        unused |= set() if self.minutes is None else {"outer_steps"}
        here, there = (
            dict(
                flat(
                    {
                        field.name: describe(getattr(config, field.name))
                        for field in fields(config)
                        if field.name not in ELSEWHERE | unused
                    }
                )
            )
            for config in (self, paper)
        )
        changed = [
            f"{name} {text(value)} ({text(there.get(name))})"
            for name, value in here.items()
            if value != there.get(name)
        ]
        if self.minutes is not None:
            changed.append(f"{self.minutes:g} minutes ({paper.outer_steps:,} meta-steps)")
        if not changed:
            return ()
        return (f"scale {self.scale}, other than the paper's: {', '.join(changed)}",)

    def published(self) -> dict[str, float] | None:
        """The paper's results for a column of its Table 2, on these characters."""
        columns = PUBLISHED.get(self.method)
        if columns is None or self.images is not None or self.split != "background-evaluation":
            return None
        mean, deviation = columns[self.setting]
        return {"test_accuracy": mean, "test_accuracy_standard_deviation": deviation}

    def draw(self, trainer: MetaTrainer, meta_params: Params, folder: Path) -> None:
        """Draw the first test tasks, with the predictions for their queries."""
        like = next(iter(meta_params.values()))
        batch = trainer.tasks.test.sample(4, 0).to(like.device, like.dtype)
        params = trainer.tested.settle(meta_params, batch)
        said = trainer.tested.predict(params, meta_params, batch).argmax(-1)
        figures.save(task_sheet(batch, said, inverted=self.images is None), folder / "tasks.png")
