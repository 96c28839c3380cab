"""A zoo of problems that are small enough for an exact gradient.

There are quadratics, linear models, kernels, networks, a transformer layer and a recurrent network;
the meta-parameters are strengths, centres, example weights or a kernel's width. Estimators are
compared on it (`equigrad reproduce accuracy`), and `Contrastive(rtol=…)` is tested on it.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import binary_cross_entropy_with_logits as logistic_loss
from torch.nn.functional import cross_entropy

from equigrad.estimators import ExactSolve
from equigrad.gradient import meta_gradient
from equigrad.nn import ComplexSynapse
from equigrad.problems import Bilevel, Params
from equigrad.solvers import LBFGS
from equigrad.testing.cases import Case
from equigrad.testing.quadratic import Quadratic


def quadratic(strength: float, draw: int = 0) -> Case:
    """The model of Appendix E, N = 50: a diagonal Hessian and a common centre θ."""
    model = Quadratic(dim=50, strength=strength, seed=draw)
    return known(f"quadratic, λ = {strength:g}", model.problem, model.params(), model.meta_params())


def stretched(condition: float, draw: int = 0) -> Case:
    """A rotated quadratic with curvatures spread evenly on a logarithmic scale.

    The outer loss is a distance, so that flat directions of the inner loss respond most to a nudge:
    β has to be small compared with the smallest curvature.
    """
    normal = Draw(3, draw)
    rotation, _ = torch.linalg.qr(normal(20, 20))
    curvatures = torch.logspace(0, -torch.tensor(condition).log10().item(), 20).double()
    hessian = rotation @ curvatures.diag() @ rotation.T
    target, goal = normal(20), normal(20)
    return known(
        f"quadratic, condition {condition:g}",
        Bilevel(
            lambda p, m: (
                0.5 * (p["phi"] - target) @ hessian @ (p["phi"] - target)
                - (m["force"] * p["phi"]).sum()
            ),
            lambda p, m: 0.5 * (p["phi"] - goal).square().mean(),
        ),
        {"phi": torch.zeros(20).double()},
        {"force": 0.1 * normal(20)},
    )


def ridge(draw: int = 0) -> Case:
    """Ridge regression with one strength for each feature."""
    x, y, v, w = regression(draw, features=20, examples=60)
    return known(
        "ridge",
        Bilevel(
            lambda p, m: (
                0.5 * (x @ p["w"] - y).square().mean() + 0.5 * pull(m["log_strength"], p["w"])
            ),
            lambda p, m: 0.5 * (v @ p["w"] - w).square().mean(),
        ),
        {"w": torch.zeros(20).double()},
        {"log_strength": torch.linspace(-5, -1, 20).double()},
    )


def logistic(draw: int = 0) -> Case:
    """l2-logistic regression with one strength for each feature."""
    x, y, v, w = regression(draw, features=15, examples=50)
    y, w = (y > 0).double(), (w > 0).double()
    return known(
        "logistic",
        Bilevel(
            lambda p, m: logistic_loss(x @ p["w"], y) + 0.5 * pull(m["log_strength"], p["w"]),
            lambda p, m: logistic_loss(v @ p["w"], w),
        ),
        {"w": torch.zeros(15).double()},
        {"log_strength": torch.full((15,), -4.0).double()},
    )


def softmax(draw: int = 0) -> Case:
    """Softmax regression with one strength for each class and feature."""
    x, y, v, w = classification(draw, features=8, classes=4, examples=60)
    return known(
        "softmax",
        Bilevel(
            lambda p, m: (
                cross_entropy(x @ p["w"] + p["b"], y)
                + 0.5 * pull(m["log_strength"], p["w"])
                + 5e-3 * p["b"].square().sum()
            ),
            lambda p, m: cross_entropy(v @ p["w"] + p["b"], w),
        ),
        {"w": torch.zeros(8, 4).double(), "b": torch.zeros(4).double()},
        {"log_strength": torch.full((8, 4), -3.0).double()},
    )


def poisson(draw: int = 0) -> Case:
    """Poisson regression with a common strength and one offset for each example."""
    normal = Draw(11, draw)
    x, truth = normal(40, 6), 0.4 * normal(6)
    counts = (x @ truth).exp().round()
    v, goal = normal(30, 6), normal(30).exp()

    def deviance(rate: Tensor, count: Tensor) -> Tensor:
        return (rate.exp() - count * rate).mean()

    return known(
        "poisson",
        Bilevel(
            lambda p, m: (
                deviance(x @ p["w"] + m["offset"], counts) + 0.5 * pull(m["log_strength"], p["w"])
            ),
            lambda p, m: deviance(v @ p["w"], goal),
        ),
        {"w": torch.zeros(6).double()},
        {"log_strength": torch.tensor(-3.0).double(), "offset": 0.1 * normal(40)},
    )


def kernel_ridge(draw: int = 0) -> Case:
    """Kernel ridge regression, where θ is the width of the kernel and the strength."""
    normal = Draw(5, draw)
    x, v = normal(40, 2), normal(40, 2)

    def field(z: Tensor) -> Tensor:
        return (2 * z[:, 0]).sin() * z[:, 1].cos()

    y, w = field(x) + 0.1 * normal(40), field(v)

    def kernel(a: Tensor, b: Tensor, m: Params) -> Tensor:
        distance = (a[:, None] - b[None]).square().sum(-1)
        return (-0.5 * distance * (-2 * m["log_width"]).exp()).exp()

    def inner(p: Params, m: Params) -> Tensor:
        # its minimiser solves (K + λI) a = y
        quadratic = p["a"] @ kernel(x, x, m) @ p["a"] + m["log_strength"].exp() * p["a"] @ p["a"]
        return (0.5 * quadratic - y @ p["a"]) / 40

    return known(
        "kernel ridge",
        Bilevel(inner, lambda p, m: 0.5 * (kernel(v, x, m) @ p["a"] - w).square().mean()),
        {"a": torch.zeros(40).double()},
        {"log_width": torch.tensor(-0.3).double(), "log_strength": torch.tensor(-2.0).double()},
    )


def reweighting(draw: int = 0) -> Case:
    """One weight for each training example, some of which are mislabelled (Ren et al. 2018)."""
    x, y, v, w = classification(draw, features=6, classes=3, examples=60)
    wrong = torch.arange(60) % 5 == 0
    y = torch.where(wrong, (y + 1) % 3, y)
    return known(
        "data re-weighting",
        Bilevel(
            lambda p, m: (
                (m["score"].sigmoid() * cross_entropy(x @ p["w"], y, reduction="none")).mean()
                + 0.01 * p["w"].square().sum()
            ),
            lambda p, m: cross_entropy(v @ p["w"], w),
        ),
        {"w": torch.zeros(6, 3).double()},
        {"score": torch.zeros(60).double()},
    )


def tanh_regression(draw: int = 0) -> Case:
    """A tanh network with one strength and one centre for each weight: Eq. 7's complex synapse."""
    x, y, v, w = regression(draw, features=3, examples=30, outputs=1)
    net = seeded(lambda: nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)))
    synapse = ComplexSynapse(net, strength=0.03, learn=("strength", "center"))
    return on_network("tanh network", synapse, half_squared_error, (x, y), (v, w))


def tanh_classification(draw: int = 0) -> Case:
    """A deeper tanh network with cross-entropy and one strength for each weight."""
    x, y, v, w = classification(draw, features=5, classes=3, examples=40)
    net = seeded(
        lambda: nn.Sequential(
            nn.Linear(5, 10), nn.Tanh(), nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 3)
        )
    )
    synapse = ComplexSynapse(net, strength=0.01)
    return on_network("deep tanh network", synapse, cross_entropy, (x, y), (v, w))


def convolution(draw: int = 0) -> Case:
    """A convolutional network on small images, with one strength for each weight."""
    normal = Draw(8, draw)
    x, v = normal(24, 1, 6, 6), normal(24, 1, 6, 6)
    y, w = ((z[:, 0, :3].mean((1, 2)) > z[:, 0, 3:].mean((1, 2))).long() for z in (x, v))
    net = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 2)
        )
    )
    synapse = ComplexSynapse(net, strength=0.02)
    return on_network("convolutional network", synapse, cross_entropy, (x, y), (v, w))


def transformer(draw: int = 0) -> Case:
    """A transformer layer that labels sequences, with one strength and centre for each weight."""
    normal = Draw(9, draw)
    x, v = normal(16, 5, 4), normal(16, 5, 4)
    y, w = ((z[:, 0, 0] * z[:, -1, 0] > 0).long() for z in (x, v))

    class Labeller(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(
                4, 2, 8, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            self.head = nn.Linear(4, 2)

        def forward(self, sequence: Tensor) -> Tensor:
            return self.head(self.layer(sequence).mean(1))

    synapse = ComplexSynapse(
        seeded(Labeller), strength=0.1, center="init", learn=("strength", "center")
    )
    return on_network("transformer layer", synapse, cross_entropy, (x, y), (v, w))


def recurrent(draw: int = 0) -> Case:
    """An LSTM that reads a sequence and predicts a number, with one strength for each weight."""
    normal = Draw(10, draw)
    x, v = normal(16, 6, 2), normal(16, 6, 2)
    y, w = (z[:, :, 0].cumsum(1)[:, -1:].tanh() for z in (x, v))

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(2, 5, batch_first=True)
            self.head = nn.Linear(5, 1)

        def forward(self, sequence: Tensor) -> Tensor:
            return self.head(self.lstm(sequence)[0][:, -1])

    synapse = ComplexSynapse(seeded(Reader), strength=0.02)
    return on_network("LSTM", synapse, half_squared_error, (x, y), (v, w))


ZOO: dict[str, Callable[..., Case]] = {
    "quadratic-1": partial(quadratic, 1.0),
    "quadratic-0.01": partial(quadratic, 0.01),
    "stretched-100": partial(stretched, 1e2),
    "stretched-10000": partial(stretched, 1e4),
    "ridge": ridge,
    "logistic": logistic,
    "softmax": softmax,
    "poisson": poisson,
    "kernel-ridge": kernel_ridge,
    "reweighting": reweighting,
    "tanh": tanh_regression,
    "deep-tanh": tanh_classification,
    "convolution": convolution,
    "transformer": transformer,
    "lstm": recurrent,
}
"""All problems by name, each a function of the number of its random draw (0 by default)."""


def known(
    name: str, problem: Bilevel, params: Params, meta_params: Params, *, near: float = 0.0
) -> Case:
    """A case with the exact gradient at a state settled to the limit of float64.

    Networks have several minima. With `near`, phases start at this distance per weight from the
    minimum whose gradient is known.
    """
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        settled = meta_gradient(
            problem,
            params,
            meta_params,
            solver=LBFGS(tol=1e-12, max_steps=20_000),
            estimator=ExactSolve(),
        )
    if settled.phases[0].residual > 1e-10:
        raise AssertionError(f"{name} does not settle: {settled.status}")
    if near:
        normal = Draw(0, 0)
        params = {n: p + near * normal(*p.shape) for n, p in settled.params.items()}
    solver = LBFGS(tol=1e-8, max_steps=10_000)
    return Case(name, problem, params, meta_params, solver, settled.grads)


def on_network(
    name: str,
    synapse: ComplexSynapse,
    loss: Callable[[Tensor, Tensor], Tensor],
    train: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
) -> Case:
    """A network with complex synapses, with training examples inside and others outside."""
    (x, y), (v, w) = train, validation
    problem = Bilevel(
        lambda p, m: loss(synapse(p, x), y),
        lambda p, m: loss(synapse(p, v), w),
        regularizer=synapse,
    )
    return known(name, problem, synapse.params(), synapse.meta_params(), near=0.03)


def half_squared_error(found: Tensor, wanted: Tensor) -> Tensor:
    """`½ mean (found - wanted)²`."""
    return 0.5 * (found - wanted).square().mean()


def pull(log_strength: Tensor, weights: Tensor) -> Tensor:
    """`Σ e^s w²`."""
    return (log_strength.exp() * weights.square()).sum()


class Draw:
    """Seeded normal numbers in float64, with a stream of its own for each problem and draw."""

    def __init__(self, stream: int, draw: int) -> None:
        self.generator = torch.Generator().manual_seed(stream + 1000 * draw)

    def __call__(self, *shape: int) -> Tensor:
        """The next numbers."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """A module with the same initial weights every time, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().double()


def regression(
    draw: int, *, features: int, examples: int, outputs: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and validation points of a noisy, slightly nonlinear function."""
    normal = Draw(6, draw)
    direction = normal(features)

    def sample() -> tuple[Tensor, Tensor]:
        x = normal(examples, features)
        y = x @ direction / features**0.5
        y = y + 0.3 * y.sin() + 0.3 * normal(examples)
        return x, y if outputs is None else y[:, None]

    return (*sample(), *sample())


def classification(
    draw: int, *, features: int, classes: int, examples: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and validation points of overlapping classes."""
    normal = Draw(7, draw)
    means = normal(classes, features)

    def sample() -> tuple[Tensor, Tensor]:
        y = torch.arange(examples) % classes
        return means[y] + normal(examples, features), y

    return (*sample(), *sample())
