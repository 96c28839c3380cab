"""How near each estimator comes to the exact gradient of an equilibrium layer: the docs' table.

Random cells `tanh(W h + b + x)` of 20 units, with W far from symmetric and symmetric, scaled to a
given spectral norm; a batch of 16; the loss `½‖h* - y‖²`. Mean over cells of the cosine and of the
relative error of the whole gradient (weights and inputs), in float64, against `ExactSolve`.

    python benchmarks/map_estimators.py [--cells 20]
"""

import argparse
from collections.abc import Mapping

import torch
from torch import Tensor, nn

import equigrad as eg

UNITS, SAMPLES = 20, 16
SETTLED = eg.Anderson(tol=1e-10, max_steps=500)


class Cell(nn.Module):
    """`tanh(W h + b + x)`, ‖W‖ = norm."""

    def __init__(self, norm: float, symmetric: bool) -> None:
        super().__init__()
        weight = torch.randn(UNITS, UNITS).double()
        weight = weight + weight.T if symmetric else weight
        self.weight = nn.Parameter(norm * weight / torch.linalg.matrix_norm(weight, 2))
        self.bias = nn.Parameter(0.1 * torch.randn(UNITS).double())

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        """One step."""
        return torch.tanh(h @ self.weight.T + self.bias + x)


class EnergyCell(Cell):
    """The same for a symmetric W, by its primitive function."""

    activation = staticmethod(torch.tanh)

    def primitive(self, h: Tensor, x: Tensor) -> Tensor:
        """`½ hᵀWh + hᵀ(b + x)`, summed over samples."""
        return 0.5 * (h * (h @ self.weight.T)).sum() + (h * (self.bias + x)).sum()


ROWS: Mapping[str, eg.Estimator] = {
    "`Adjoint()`": eg.Adjoint(),
    "`GMRES()`": eg.GMRES(max_iterations=300, restart=100),
    "`T1T2()`: Jacobian-free": eg.T1T2(),
    "`NeumannSeries(terms=2)`": eg.NeumannSeries(terms=2, tol=10),
    "`NeumannSeries(terms=5)`": eg.NeumannSeries(terms=5, tol=10),
    "`NeumannSeries(terms=20)`": eg.NeumannSeries(terms=20, tol=10),
    "`PhantomGradient(steps=5, damping=0.5)`": eg.PhantomGradient(steps=5, damping=0.5),
    "`PhantomGradient(steps=5, damping=1)`": eg.PhantomGradient(steps=5, damping=1.0),
    "`Contrastive()`": eg.Contrastive(),
    '`Contrastive(nudge="loss", beta=0.1)`': eg.Contrastive(nudge="loss", beta=0.1),
    '`Contrastive(nudge="loss", beta=1e-3)`': eg.Contrastive(nudge="loss", beta=1e-3),
}


def gradient(cell: nn.Module, x: Tensor, y: Tensor, estimator: eg.Estimator) -> Tensor:
    """Of `½‖h* - y‖²` by the weights and by x, as a vector."""
    layer = eg.nn.EquilibriumLayer(cell, solver=SETTLED, estimator=estimator, unsettled="raise")
    loss = 0.5 * (layer(x) - y).square().sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [x, *cell.parameters()])])


def row(estimator: eg.Estimator, cells: int, norm: float, symmetric: bool) -> str:
    """Mean cosine and error on random cells, as two cells of a table."""
    if estimator.traits.energy and not symmetric:
        return "– | –"
    kind = EnergyCell if estimator.traits.energy else Cell
    cosines, errors = [], []
    for seed in range(cells):
        torch.manual_seed(seed)
        cell = kind(norm, symmetric)
        x, y = torch.randn(2, SAMPLES, UNITS).double()
        x.requires_grad_()
        exact = gradient(cell, x, y, eg.ExactSolve())
        found = gradient(cell, x, y, estimator)
        cosines.append(torch.cosine_similarity(found, exact, dim=0).item())
        errors.append(((found - exact).norm() / exact.norm()).item())
    return f"{sum(cosines) / cells:.4f} | {sum(errors) / cells:.1e}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cells", type=int, default=20)
    words = parser.parse_args()
    print("| estimator | cosine, any W | error | cosine, symmetric W | error |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, estimator in ROWS.items():
        parts = [row(estimator, words.cells, 0.9, symmetric) for symmetric in (False, True)]
        print(f"| {name} | {' | '.join(parts)} |")


if __name__ == "__main__":
    main()
