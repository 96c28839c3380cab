"""Which rule and β serve the digits best, judged by validation accuracy alone.

Every variant of the contrastive rule, and T1-T2, learns strengths on splits that no reported number
uses (seeds 100, 101, …), with the settings of `equigrad run digits` otherwise. Test images are not
looked at.

    python benchmarks/digits_defaults.py [--splits 3] [--outer-steps 100]
"""

import argparse
from dataclasses import replace

import numpy as np

import equigrad as eg
from equigrad.experiments.strengths.digits import Digits
from equigrad.experiments.strengths.strength_learning import Job
from equigrad.training.strengths import Recipe

RULE = replace(
    Digits().contrastive, nudged_solver=replace(Digits().solver, max_steps=Digits().nudged_steps)
)
VARIANTS: dict[str, eg.Estimator] = {
    "T1-T2": eg.T1T2(),
    **{f"plain forward, β {b}": replace(RULE, beta=b, matched=False) for b in (0.3, 1.0, 3.0)},
    **{f"matched forward, β {b}": replace(RULE, beta=b) for b in (0.1, 0.3, 1.0)},
    "matched forward, β 0.1, momentum reset": replace(RULE, beta=0.1, momentum="reset"),
    **{f"symmetric, β {b}": replace(RULE, beta=b, scheme="symmetric") for b in (0.03, 0.1, 0.3)},
}


def validation_accuracy(config: Digits, seed: int, estimator: eg.Estimator) -> float:
    job = Job(config, seed)
    learned = job.learn_by(
        Recipe(estimator, config.solver, config.outer_lr),
        outer_steps=config.outer_steps,
        initial_strength=config.initial_strength,
    )
    return learned.network.metrics["validation_accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--outer-steps", type=int, default=Digits().outer_steps)
    arguments = parser.parse_args()
    config = replace(Digits(), outer_steps=arguments.outer_steps)
    print("| rule | validation accuracy, % | by split |")
    print("| --- | ---: | --- |")
    for name, estimator in VARIANTS.items():
        found = [
            validation_accuracy(config, 100 + split, estimator) for split in range(arguments.splits)
        ]
        each = ", ".join(f"{value:.2f}" for value in found)
        print(f"| {name} | {np.mean(found):.2f} | {each} |", flush=True)


if __name__ == "__main__":
    main()
