"""How well tables are learned, beside scikit-learn's networks and trees, on the same test rows.

    EQUIGRAD_DATA=… python benchmarks/tables.py --out FILE.jsonl [--splits 5] [--only concrete]
    python benchmarks/tables.py --large [ROWS]

The tables are those below `tables` in the folder of data sets; `--made-up` takes others. Every
split is a line of FILE; what stands there is not measured again, so that a run can be stopped
at any time. Scores are R², or accuracy in percent, of the test rows: mean ± standard error over
splits, and of differences on the same rows. Seconds are of the processor, one thread each;
those of scikit-learn's network are a mean of two fits, one before ours and one after. The first
fit of a process, which imports what the others use, is not measured. `--large` reads a made-up
table of 100,000 rows and 50 columns beside pandas, and learns from it in fewer and in more
steps.
"""

import argparse
import csv
import json
import multiprocessing
import os
import resource
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median, stdev
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
LEARNERS = {
    "network": "network of scikit-learn",
    "single": "single strength",
    "learned": "learned strengths",
    "learned alone": "without the single one's networks",
    "trees": "boosted trees",
}


def written(folder: Path) -> Iterator[tuple[str, Path, str]]:
    for name, make in MADE_UP.items():
        x, y = make()
        path = folder / f"{name}.csv"
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*(f"x{i}" for i in range(x.shape[1])), "y"])
            writer.writerows([*row, target] for row, target in zip(x, y, strict=True))
        yield name, path, "y"


def of_sklearn(split: Any, learner: Any) -> dict[str, float]:
    (x, y), (x_test, y_test) = ((a.numpy() for a in part) for part in (split.train, split.test))
    began = time.process_time()
    learner.fit(x, y)
    seconds = time.process_time() - began
    score = learner.score(x_test, y_test)
    return {"score": 100 * score if isinstance(split.target, Classes) else score, "s": seconds}


def one_split(config: Tabular, seed: int) -> dict[str, dict[str, float]]:
    trainer: Any = config.trainer(seed)
    split = trainer.split
    classes = isinstance(split.target, Classes)
    network = MLPClassifier if classes else MLPRegressor
    trees = HistGradientBoostingClassifier if classes else HistGradientBoostingRegressor
    options = {"early_stopping": True, "max_iter": 1000, "random_state": seed}
    mlp = of_sklearn(split, network(hidden_layer_sizes=config.hidden, **options))
    began = time.process_time()
    single, strength = trainer.one_strength()
    halfway = time.process_time()
    learned, row = trainer.learn("contrastive", watched=False)
    ended = time.process_time()
    again = of_sklearn(split, network(hidden_layer_sizes=config.hidden, **options))
    own = {name: p[config.folds :] for name, p in learned.network.params.items()}
    alone = trainer.tested(own)[f"test_{split.target.score}"]
    return {
        "network": {**mlp, "s": (mlp["s"] + again["s"]) / 2},
        "single": {"score": single.test, "s": halfway - began, "strength": strength},
        "learned": {
            "score": row.test,
            "s": ended - began,
            "outer_steps": learned.state.step,
            "gradient_evaluations": row.gradient_evaluations,
        },
        "learned alone": {"score": alone, "s": ended - began},
        "trees": of_sklearn(split, trees(random_state=seed)),
    }


def spread(values: list[float], form: str) -> str:
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{fmean(values):{form}} ± {error:{form.replace('+', '')}}"


def show(name: str, lines: list[dict[str, Any]]) -> None:
    form = ".2f" if lines[0]["trees"]["score"] > 1 else ".3f"

    def scores(learner: str) -> list[float]:
        return [line[learner]["score"] for line in lines]

    def seconds(learner: str) -> float:
        return fmean(line[learner]["s"] for line in lines)

    cells = [spread(scores(learner), form) for learner in LEARNERS]
    for other in ("network", "single"):
        pairs = zip(scores("learned"), scores(other), strict=True)
        cells.append(spread([a - b for a, b in pairs], "+" + form))
    times = (seconds(learner) for learner in ("network", "learned", "trees"))
    ratio = f"{seconds('learned') / seconds('network'):.1f}"
    cells += [*(f"{t:.2f}" for t in times), ratio]
    print(f"| {name} | {len(lines)} | {' | '.join(cells)} |", flush=True)


def measure(words: argparse.Namespace) -> None:
    known = words.out.read_text().splitlines() if words.out.exists() else []
    lines = [json.loads(line) for line in known]
    heads = [*LEARNERS.values(), "gain on network", "on single", "s network", "s ours", "s trees"]
    print(f"| table | splits | {' | '.join(heads)} | times the network's |")
    print("| --- |" + " ---: |" * (len(heads) + 2))
    with tempfile.TemporaryDirectory() as folder:
        data = Path(os.environ.get("EQUIGRAD_DATA", "")) / "tables"
        public = ((name, data / f"{name}.csv", target) for name, target in TARGETS.items())
        warm = False
        for name, path, target in written(Path(folder)) if words.made_up else public:
            if words.only and name not in words.only:
                continue
            config = replace(Tabular(csv=path, target=target), device="cpu")
            for setting, value in words.setting:
                config = overlay(config, {setting: float(value) if "." in value else int(value)})
            done = {line["seed"]: line for line in lines if line["table"] == name}
            for seed in range(words.splits):
                if seed in done:
                    continue
                if not warm:
                    one_split(replace(config, outer_steps=1, hidden=(4,)), seed)
                    warm = True
                done[seed] = {"table": name, "seed": seed, **one_split(config, seed)}
                with words.out.open("a") as file:
                    file.write(json.dumps(done[seed]) + "\n")
            show(name, [done[seed] for seed in range(words.splits)])


def large(rows: int) -> None:
    """Seconds to load beside pandas, and peak memory for fewer and for more steps."""
    import pandas as pd

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.csv"
        made: Any = make_regression(rows, 49, n_informative=20, noise=10.0, random_state=0)
        x, y = made
        frame = pd.DataFrame(x, columns=pd.Index([f"x{i}" for i in range(49)]))
        frame.assign(y=y).to_csv(path, index=False)
        config = replace(Tabular(csv=path, target="y"), device="cpu", hidden=(16,))
        ratios = []
        for _ in range(5):
            began = time.process_time()
            pd.read_csv(path)
            halfway = time.process_time()
            config.load(torch.device("cpu"), torch.float32)
            ratios.append((time.process_time() - halfway) / (halfway - began))
        print(f"loading takes {median(ratios):.2f} times as long as pandas' read_csv (median of 5)")
        for outer_steps, steps in ((1, 4), (3, 12)):
            own = replace(config, outer_steps=outer_steps)
            own = replace(own, solver=replace(own.solver, max_steps=steps))
            context = multiprocessing.get_context("spawn")
            with context.Pool(1) as pool:
                peak, evaluations = pool.apply(peak_of, (own,))
            print(f"{evaluations:,} gradients: {peak:,.0f} MB at most")


def peak_of(config: Tabular) -> tuple[float, int]:
    torch.set_num_threads(1)
    _, row = config.trainer(0).learn("contrastive", watched=False)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, row.gradient_evaluations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("tables.jsonl"))
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--made-up", action="store_true")
    parser.add_argument("--large", type=int, nargs="?", const=100_000, metavar="ROWS")
    parser.add_argument(
        "--setting", nargs=2, action="append", default=[], metavar=("NAME", "VALUE")
    )
    words = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if words.large:
        large(words.large)
    else:
        measure(words)


if __name__ == "__main__":
    main()
