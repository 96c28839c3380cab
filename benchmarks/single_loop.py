"""MNIST cleaning in one loop, beside settling anew at every outer step.

    EQUIGRAD_DATA=… python benchmarks/single_loop.py [--seconds 60] [--seed 0]

5,000 training images of which half have another label, drawn at random, 5,000 validation images,
10,000 test images; a linear softmax network with ridge 1e-3; a weight σ(θ_i) for every training
image. Every method has the same seconds. Step sizes were chosen by the validation loss at seed 100.
Printed at shares of the time: images seen (gradient evaluations times the images in each),
validation loss, test accuracy, and F1 of "this label is flipped" (σ(θ_i) < 1/2); small-loss ranking
and training on the right labels alone for comparison.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

import equigrad as eg
from equigrad.experiments.data import mnist
from equigrad.problems import Params
from equigrad.training import Callback, learn
from equigrad.training.directions import AdaptiveBeta, Contrasts, Direction, LinearSystem
from equigrad.training.single_loop import learn_jointly

SIZE, BATCH, RIDGE = 5000, 64, 1e-3
SHARES = (0.02, 0.05, 0.1, 0.25, 0.5, 1.0)


class Cleaning:
    """Data, losses, and what is measured of a θ and a φ."""

    def __init__(self, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        images, test = mnist.load(), mnist.load(mnist.TEST)
        kept = torch.randperm(len(images.labels), generator=draw)[: 2 * SIZE]
        x = images.pixels[kept].flatten(1).float() / 255
        y = images.labels[kept]
        self.x, self.valid_x, self.valid_y = x[:SIZE], x[SIZE:], y[SIZE:]
        self.flipped = torch.zeros(SIZE, dtype=torch.bool)
        self.flipped[torch.randperm(SIZE, generator=draw)[: SIZE // 2]] = True
        other = (y[:SIZE] + torch.randint(1, 10, (SIZE,), generator=draw)) % 10
        self.right, self.y = y[:SIZE], torch.where(self.flipped, other, y[:SIZE])
        self.test_x, self.test_y = test.pixels.flatten(1).float() / 255, test.labels
        order = torch.randperm(SIZE, generator=draw)
        self.batches = list(order.split(BATCH))
        self.valid_batches = list(torch.randperm(SIZE, generator=draw).split(BATCH))

    def inner(self, params: Params, meta: Params, rows: Tensor) -> Tensor:
        """The weighted loss of some training images, with the ridge."""
        logits = functional.linear(self.x[rows], params["weight"], params["bias"])
        losses = functional.cross_entropy(logits, self.y[rows], reduction="none")
        ridge = RIDGE * params["weight"].square().sum()
        return (meta["w"][rows].sigmoid() * losses).mean() + ridge

    def outer(self, params: Params, meta: Params, rows: Tensor) -> Tensor:
        """The loss of some validation images."""
        logits = functional.linear(self.valid_x[rows], params["weight"], params["bias"])
        return functional.cross_entropy(logits, self.valid_y[rows])

    def problem(self, *, batches: bool) -> eg.Bilevel:
        """On mini-batches, or on all images at once."""
        everything = [torch.arange(SIZE)]
        return eg.Bilevel(
            self.inner,
            self.outer,
            inner_batches=self.batches if batches else everything,
            outer_batches=self.valid_batches if batches else everything,
        )

    def start(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """φ at zero, and θ at zero: all weights are a half."""
        params = {"weight": torch.zeros(10, 784), "bias": torch.zeros(10)}
        return params, {"w": torch.zeros(SIZE, requires_grad=True)}

    def judged(self, params: Params, weights: Tensor | None) -> str:
        """Validation loss, test accuracy and F1, as cells of a table."""
        with torch.no_grad():
            loss = self.outer(params, {}, torch.arange(SIZE)).item()
            logits = functional.linear(self.test_x, params["weight"], params["bias"])
            accuracy = (logits.argmax(1) == self.test_y).float().mean().item()
        if weights is None:
            return f"{loss:.4f} | {accuracy:.2%} | –"
        said = weights < 0
        hit = (said & self.flipped).sum().item()
        f1 = 2 * hit / max(said.sum().item() + self.flipped.sum().item(), 1)
        return f"{loss:.4f} | {accuracy:.2%} | {f1:.3f}"


class Clock(Callback):
    """Ends a loop when its time is up, and keeps φ and θ at shares of it."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.seen = seconds, {}

    def on_step(self, state: eg.training.OuterState, result: eg.MetaGradient) -> None:
        """Keep what there is, once for every share."""
        for share in SHARES:
            if share not in self.seen and state.seconds >= share * self.seconds:
                weights = state.meta_params["w"].detach().clone()
                seen = state.gradient_evaluations
                self.seen[share] = (result.params, weights, state.step, seen)
        state.ends = state.seconds >= self.seconds


def single_loop(
    data: Cleaning,
    clock: Clock,
    direction: Direction,
    lr: float,
    outer_lr: float,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
) -> None:
    """One loop over mini-batches."""
    params, meta = data.start()
    learn_jointly(
        data.problem(batches=True),
        params,
        meta,
        solver=eg.GradientDescent(lr=lr),
        direction=direction,
        optimizer=optimizer(meta.values(), lr=outer_lr),
        steps=10**9,
        callbacks=[clock],
    )


def settle_anew(data: Cleaning, clock: Clock, estimator: eg.Estimator, outer_lr: float) -> None:
    """Settle on all images at every outer step, from where the last one ended."""
    params, meta = data.start()
    learn(
        data.problem(batches=False),
        params,
        meta,
        solver=eg.LBFGS(tol=1e-4, max_steps=200),
        estimator=estimator,
        optimizer=torch.optim.Adam(meta.values(), lr=outer_lr),
        steps=10**9,
        start="warm",
        callbacks=[clock],
    )


METHODS = {
    "one loop, contrast, both gradients together, Adam": lambda d, c: single_loop(
        d, c, Contrasts(beta=0.1, together=True), 0.3, 0.3, torch.optim.Adam
    ),
    "one loop, contrast (F2SA), β = 0.1": lambda d, c: single_loop(
        d, c, Contrasts(beta=0.1), 0.3, 1000.0
    ),
    "one loop, symmetric, β = 0.1": lambda d, c: single_loop(
        d, c, Contrasts(beta=0.1, scheme="symmetric"), 0.3, 1000.0
    ),
    "one loop, β by BOME's rule": lambda d, c: single_loop(
        d, c, Contrasts(beta=AdaptiveBeta()), 0.3, 1000.0
    ),
    "one loop, linear system (SOBA)": lambda d, c: single_loop(d, c, LinearSystem(), 0.3, 1000.0),
    "settled anew, contrastive": lambda d, c: settle_anew(d, c, eg.Contrastive(), 0.3),
    "settled anew, conjugate gradients": lambda d, c: settle_anew(
        d, c, eg.ConjugateGradient(tol=1e-2), 0.3
    ),
}


def trained(data: Cleaning, rows: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """φ settled on some images, all with the weight one."""
    x, y = data.x[rows], labels[rows]

    def loss(params: Params, meta: Params) -> Tensor:
        logits = functional.linear(x, params["weight"], params["bias"])
        return functional.cross_entropy(logits, y) + RIDGE * params["weight"].square().sum()

    problem = eg.Bilevel(loss, lambda params, meta: (params["weight"] * meta["w"].sum()).sum())
    params, meta = data.start()
    return eg.settle(problem, params, meta, solver=eg.LBFGS(tol=1e-4, max_steps=500)).params


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="beginnings of methods' names")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = Cleaning(options.seed)
    everything = torch.arange(SIZE)
    print("| method | seconds | outer steps | images, millions | validation loss | test | F1 |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    plain = trained(data, everything, data.y)
    print(f"| all labels alike | – | – | – | {data.judged(plain, None)} |")
    losses = functional.cross_entropy(
        functional.linear(data.x, plain["weight"], plain["bias"]), data.y, reduction="none"
    )
    ranked = losses.median() - losses  # half of them are known to be flipped
    kept = trained(data, everything[ranked >= 0], data.y)
    print(f"| the half of smallest loss | – | – | – | {data.judged(kept, ranked)} |")
    clean = trained(data, everything[~data.flipped], data.y)
    print(f"| the right labels alone | – | – | – | {data.judged(clean, None)} |", flush=True)
    for name, run in METHODS.items():
        if options.only and not any(name.startswith(o) for o in options.only):
            continue
        clock, began = Clock(options.seconds), time.perf_counter()
        run(data, clock)
        size = BATCH if name.startswith("one loop") else SIZE
        for share, (params, weights, step, gradients) in clock.seen.items():
            row = (
                f"| {name} | {share * options.seconds:.1f} | {step} | {gradients * size / 1e6:.2f}"
            )
            print(f"{row} | {data.judged(params, weights)} |", flush=True)
        print(f"<!-- {time.perf_counter() - began:.0f} s -->")


if __name__ == "__main__":
    main()
