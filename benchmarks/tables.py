"""How well tables are learned, beside scikit-learn's networks and trees, on the same test rows.

    EQUIGRAD_DATA=… python benchmarks/tables.py [--splits 5] [--only concrete] [--made-up]

The tables are those below `tables` in the folder of data sets. `--made-up` takes others, on which
the defaults were chosen. Scores are R², or accuracy in percent, of the test rows: mean ± standard
error over splits. Seconds are of the processor, one thread each, the search for the best single
strength included.
"""

import argparse
import csv
import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from sklearn.datasets import (
    load_breast_cancer,
    load_diabetes,
    load_wine,
    make_classification,
    make_friedman1,
    make_friedman2,
    make_friedman3,
    make_regression,
)
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.neural_network import MLPClassifier, MLPRegressor

from equigrad.experiments.runs.config_file import overlay
from equigrad.experiments.strengths.tabular import Tabular
from equigrad.training.targets import Classes

TARGETS = {
    "concrete": "Concrete compressive strength(MPa, megapascals)",
    "energy": "Y1",
    "auto-mpg": "mpg",
    "hitters": "Salary",
    "california-housing": "median_house_value",
    "seoul-bikes": "Rented Bike Count",
    "wine-red": "quality",
    "penguins": "species",
    "german-credit": "credit_risk",
    "telco-churn": "Churn",
}
MADE_UP = {
    "friedman1": lambda: make_friedman1(600, 20, noise=1.0, random_state=1),
    "friedman2": lambda: make_friedman2(300, noise=100.0, random_state=1),
    "friedman3": lambda: make_friedman3(1000, noise=0.1, random_state=1),
    "classes": lambda: make_classification(
        800, 20, n_informative=5, n_classes=3, flip_y=0.05, random_state=1
    ),
    "linear": lambda: make_regression(200, 30, n_informative=8, noise=30.0, random_state=1),
    "diabetes": lambda: load_diabetes(return_X_y=True),
    "cancer": lambda: load_breast_cancer(return_X_y=True),
    "wine": lambda: load_wine(return_X_y=True),
}
LEARNERS = ("network of scikit-learn", "single strength", "strength per weight", "boosted trees")


def written(folder: Path) -> Iterator[tuple[str, Path, str]]:
    for name, make in MADE_UP.items():
        x, y = make()
        path = folder / f"{name}.csv"
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*(f"x{i}" for i in range(x.shape[1])), "y"])
            writer.writerows([*row, target] for row, target in zip(x, y, strict=True))
        yield name, path, "y"


def of_sklearn(split: Any, learner: Any) -> tuple[float, float]:
    (x, y), (x_test, y_test) = ((a.numpy() for a in part) for part in (split.train, split.test))
    began = time.process_time()
    learner.fit(x, y)
    seconds = time.process_time() - began
    score = learner.score(x_test, y_test)
    return 100 * score if isinstance(split.target, Classes) else score, seconds


def one_split(config: Tabular, seed: int) -> list[tuple[float, float]]:
    trainer = config.trainer(seed)
    split = trainer.split
    classes = isinstance(split.target, Classes)
    network = MLPClassifier if classes else MLPRegressor
    trees = HistGradientBoostingClassifier if classes else HistGradientBoostingRegressor
    options = {"early_stopping": True, "max_iter": 1000, "random_state": seed}
    mlp = network(hidden_layer_sizes=config.hidden, **options)
    began = time.process_time()
    single, _ = trainer.one_strength()
    halfway = time.process_time()
    _, learned = trainer.learn("contrastive", watched=False)
    ended = time.process_time()
    return [
        of_sklearn(split, mlp),
        (single.test, halfway - began),
        (learned.test, ended - began),
        of_sklearn(split, trees(random_state=seed)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--made-up", action="store_true")
    parser.add_argument(
        "--setting", nargs=2, action="append", default=[], metavar=("NAME", "VALUE")
    )
    words = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"| table | {' | '.join(f'{name} | s' for name in LEARNERS)} |")
    print("| --- |" + " ---: |" * (2 * len(LEARNERS)))
    with tempfile.TemporaryDirectory() as folder:
        data = Path(os.environ.get("EQUIGRAD_DATA", "")) / "tables"
        public = ((name, data / f"{name}.csv", target) for name, target in TARGETS.items())
        for name, path, target in written(Path(folder)) if words.made_up else public:
            if words.only and name not in words.only:
                continue
            config = replace(Tabular(csv=path, target=target), device="cpu")
            for setting, value in words.setting:
                config = overlay(config, {setting: float(value) if "." in value else int(value)})
            found = [one_split(config, seed) for seed in range(words.splits)]
            cells = []
            for learner in zip(*found, strict=True):
                scores, seconds = zip(*learner, strict=True)
                form = ".2f" if max(scores) > 1 else ".3f"
                error = stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else 0.0
                cells += [f"{fmean(scores):{form}} ± {error:{form}}", f"{fmean(seconds):.1f}"]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
