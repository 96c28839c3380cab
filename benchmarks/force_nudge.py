"""How near the force of the validation loss is to the loss itself, by β, on a line of Table 1.

    python benchmarks/force_nudge.py mnist-1 --seed 100

One free phase of the paper's own settings at the first outer step; then the strengths' gradient by
force for each β, beside that by the loss nudge at β = 0.1 with matched phases. Its cosine, its norm
relative to that, and the share of strengths with the same sign: Adam's first step sees signs alone.
"""

import argparse
from dataclasses import replace

import torch
from torch import Tensor

from equigrad import Contrastive, meta_gradient, settle
from equigrad.experiments.strengths.strength_learning import StrengthTrainer
from equigrad.experiments.strengths.table1 import Table1
from equigrad.nn import ComplexSynapse

BETAS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


def main() -> None:
    """Print a line for each β and each kind of phases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("line", choices=("mnist-1", "mnist-10", "cifar-50"))
    parser.add_argument("--seed", type=int, default=100)
    words = parser.parse_args()
    torch.set_num_threads(1)
    table = replace(Table1.preset(scale="paper"), threads=1)
    config = table.experiment(words.line, "contrastive", words.seed)
    trainer, recipe = StrengthTrainer(config, words.seed), config.recipe("contrastive")
    rule = recipe.estimator
    assert isinstance(rule, Contrastive)
    synapse = ComplexSynapse(trainer.network, strength=config.initial_strength or 0.0)
    meta_params, problem = synapse.meta_params(), trainer.problem(synapse)
    free = settle(problem, synapse.params(), meta_params, solver=recipe.solver)

    def gradient(estimator: Contrastive) -> Tensor:
        found = meta_gradient(
            problem,
            synapse.params(),
            meta_params,
            solver=recipe.solver,
            estimator=estimator,
            settled=free,
        )
        return torch.cat([g.flatten() for g in found.grads.values()])

    by_loss = gradient(replace(rule, nudge="loss", beta=0.1, matched=True))
    print("| phases | β | cosine | norm | same sign |\n| --- | ---: | ---: | ---: | ---: |")
    for matched in (True, False):
        for beta in BETAS:
            by_force = gradient(replace(rule, nudge="force", beta=beta, matched=matched))
            cosine = torch.cosine_similarity(by_force, by_loss, dim=0).item()
            norm = (by_force.norm() / by_loss.norm()).item()
            signs = (by_force * by_loss > 0).float().mean().item()
            phases = "matched" if matched else "plain"
            print(f"| {phases} | {beta:g} | {cosine:.2f} | {norm:.2f} | {signs:.2f} |", flush=True)


if __name__ == "__main__":
    main()
