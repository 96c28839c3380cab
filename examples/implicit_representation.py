"""An image as an implicit layer: where a network settles, pixel by pixel.

    h = sin(W h + U γ(x) + b),    colour = C h + c

h is the state of a recurrent network at rest, γ(x) the Fourier features of a pixel's place. The
network is trained on mini-batches of pixels, by implicit differentiation or under least control,
and judged by the PSNR over the whole image. Needs matplotlib and scikit-learn:

    python examples/implicit_representation.py OUT.png --seconds 60
"""

import argparse
import time
from pathlib import Path

import torch
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

import equigrad as eg
from equigrad.problems import Params

SETTLING = 30
SOLVER = eg.Picard(tol=1e-3, max_steps=SETTLING)
TRAINERS: dict[str, eg.Estimator] = {
    "adjoint": eg.Adjoint(solver=SOLVER),
    "least control": eg.LeastControl(
        controller=eg.DynamicInversion(gain=0.0, proportional=0.1), start="params"
    ),
}


class ImplicitImage(nn.Module):
    """Colours of places in [-1, 1]², by a recurrent network at rest.

    Args:
        units: of the network.
        features: Fourier features of a place; twice as many inputs.
        frequency: standard deviation of their frequencies, in cycles over the image.
        contraction: spectral norm of W at the start, below 1 so that the network comes to rest.
    """

    def __init__(
        self, units: int = 128, features: int = 64, frequency: float = 3, contraction: float = 0.5
    ) -> None:
        super().__init__()
        self.register_buffer("frequencies", frequency * torch.pi * torch.randn(2, features))
        self.inward = nn.Linear(2 * features, units)
        w = torch.randn(units, units)
        self.recurrent = nn.Parameter(contraction * w / torch.linalg.matrix_norm(w, 2))
        self.readout = nn.Linear(units, 3)

    def encode(self, places: Tensor) -> Tensor:
        """Fourier features."""
        angles = places @ self.get_buffer("frequencies")
        return torch.cat([angles.sin(), angles.cos()], 1)

    def start(self, x: Tensor) -> dict[str, Tensor]:
        """Silence."""
        return {"h": x.new_zeros(len(x), len(self.recurrent))}

    def problem(self, x: Tensor, y: Tensor) -> eg.FixedPoint:
        """The network at rest on encoded places, judged by colours; losses are sums."""

        def relax(params: Params, theta: Params) -> dict[str, Tensor]:
            drive = x @ theta["inward.weight"].T + theta["inward.bias"]
            return {"h": torch.sin(params["h"] @ theta["recurrent"].T + drive)}

        def loss(params: Params, theta: Params) -> Tensor:
            return 0.5 * (self.colors(params, theta) - y).square().sum()

        names = ["recurrent", "inward.weight", "inward.bias"]
        outer = ["readout.weight", "readout.bias"]
        return eg.FixedPoint(
            relax, loss, modules=(), reaches={"inner": names, "outer": outer}, samples=True
        )

    def colors(self, params: Params, theta: Params) -> Tensor:
        """What the settled network says."""
        return params["h"] @ theta["readout.weight"].T + theta["readout.bias"]

    def theta(self) -> dict[str, nn.Parameter]:
        """What is learned, by name."""
        return dict(self.named_parameters())


def photograph(side: int) -> Tensor:
    """The middle of a photograph that comes with scikit-learn: side x side x 3, in [0, 1]."""
    pixels = torch.tensor(load_sample_image("china.jpg")).permute(2, 0, 1).float() / 255
    height, width = pixels.shape[1:]
    edge = (width - height) // 2
    square = pixels[None, :, :, edge : edge + height]
    return nn.functional.interpolate(square, (side, side), mode="area")[0].permute(1, 2, 0)


def places_of(side: int) -> Tensor:
    """The pixels' places, row by row."""
    along = torch.linspace(-1, 1, side)
    return torch.stack(torch.meshgrid(along, along, indexing="ij"), -1).reshape(-1, 2)


def psnr(found: Tensor, true: Tensor) -> float:
    """Peak signal to noise in decibels, for colours in [0, 1]."""
    return -10 * (found.clamp(0, 1) - true).square().mean().log10().item()


@torch.no_grad()
def picture(model: ImplicitImage, x: Tensor) -> Tensor:
    """Colours of all encoded places."""
    found = []
    for part in x.split(4096):
        problem = model.problem(part, part.new_zeros(len(part), 3))
        theta = {name: p.detach() for name, p in model.theta().items()}
        velocity = problem.velocity_at(theta, 0.0)
        h = model.start(part)
        for step in range(SETTLING):
            (move,) = velocity(h, step)[0]
            h = {"h": h["h"] + move}
        found.append(model.colors(h, theta))
    return torch.cat(found)


def fit(
    image: Tensor,
    estimator: eg.Estimator,
    *,
    seconds: float,
    batch: int = 256,
    lr: float = 3e-3,
    seed: int = 0,
    **network: float,
) -> tuple[ImplicitImage, float, int]:
    """Train for so many seconds of processor time: the network, its PSNR, and the steps it took."""
    torch.manual_seed(seed)
    model = ImplicitImage(**network)  # pyright: ignore[reportArgumentType]
    x, y = model.encode(places_of(len(image))), image.reshape(-1, 3)
    theta = model.theta()
    optimizer = torch.optim.Adam(theta.values(), lr=lr)
    began, steps = time.process_time(), 0
    while (spent := time.process_time() - began) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - spent / seconds)
        chosen = torch.randint(len(x), (batch,))
        problem = model.problem(x[chosen], y[chosen])
        result = eg.meta_gradient(
            problem, model.start(x[chosen]), theta, solver=SOLVER, estimator=estimator
        )
        for name, grad in result.grads.items():
            theta[name].grad = grad / batch
        optimizer.step()
        steps += 1
    return model, psnr(picture(model, x), y), steps


def main() -> None:
    """Fit the photograph by every trainer, and draw what each has made of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=60, help="processor time of each trainer")
    parser.add_argument("--side", type=int, default=48)
    chosen = parser.parse_args()
    import matplotlib.pyplot as plt

    image = photograph(chosen.side)
    figure, axes = plt.subplots(1, 1 + len(TRAINERS), figsize=(4 * (1 + len(TRAINERS)), 4.3))
    axes[0].imshow(image)
    axes[0].set_title(f"the photograph, {chosen.side} x {chosen.side}")
    for axis, (name, estimator) in zip(axes[1:], TRAINERS.items(), strict=True):
        model, reached, steps = fit(image, estimator, seconds=chosen.seconds)
        print(f"{name}: {reached:.2f} dB after {steps} steps in {chosen.seconds:g} s")
        found = picture(model, model.encode(places_of(chosen.side)))
        axis.imshow(found.view_as(image).clamp(0, 1))
        axis.set_title(f"{name}, {reached:.1f} dB")
    for axis in axes:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(chosen.out, dpi=80)


if __name__ == "__main__":
    main()
