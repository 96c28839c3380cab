"""A network that has learned, with all it takes to ask it: what `equigrad predict` reads."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import equigrad
from equigrad import solvers
from equigrad.errors import RunError, SettlingWarning
from equigrad.experiments.data.images import Pixels
from equigrad.experiments.runs.run_directory import describe
from equigrad.experiments.tables.encoding import Categorical, Encoding, Numeric
from equigrad.nn import lenet5, settling_networks, tanh_network
from equigrad.solvers import Solver
from equigrad.solvers.phase import numbered
from equigrad.training.relaxation import settled_logits
from equigrad.training.targets import Classes, Numbers, Target

FORMAT = "equigrad model 1"
NETWORKS = {
    made.__name__: made
    for made in (
        tanh_network,
        lenet5,
        settling_networks.relaxing_tanh_network,
        settling_networks.recurrent_tanh_network,
        settling_networks.hopfield_network,
        settling_networks.convolutional_equilibrium_network,
        settling_networks.convolutional_hopfield_network,
    )
}


@dataclass(frozen=True)
class Architecture:
    """A network of the library, by name.

    Attributes:
        name: of the function that makes it.
        arguments: of that function.
    """

    name: str
    arguments: Mapping[str, Any]

    def build(self) -> Any:
        """The network, a module, with a start that torch's generator draws."""
        return NETWORKS[self.name](**self.arguments)


OF_MAPS = (
    *(solvers.Anderson, solvers.Broyden, solvers.GradientDescent),
    *(solvers.GradientFlow, solvers.Picard),
)
KINDS = {
    kind.__name__: kind
    for kind in (
        *(Architecture, Classes, Numbers, Encoding, Numeric, Categorical, Pixels),
        *OF_MAPS,
    )
}
"""What a model is made of beside tensors and plain values."""


@dataclass(frozen=True)
class Model:
    """A network that has learned, what it predicts, and how its inputs are had.

    Attributes:
        architecture: of the network.
        params: its weights.
        target: what it predicts.
        encoding: turns what a user has into inputs.
        solver: settles the network for every input; None for one that computes in a sweep.
    """

    architecture: Architecture
    params: Mapping[str, Tensor]
    target: Target
    encoding: Encoding | Pixels
    solver: Solver | None = None

    def network(self) -> Any:
        """The network, a module with its weights, in the type it has learned in."""
        with torch.random.fork_rng(devices=[]):
            network = self.architecture.build()
        network.to(next(iter(self.params.values())).dtype)
        network.load_state_dict(self.params)
        return network.eval()

    def outputs(self, x: Tensor) -> Tensor:
        """What the network says of inputs, in the type it has learned in.

        Warns:
            SettlingWarning: it has not settled for some of them.
        """
        found, unsettled = self.ask(x)
        if unsettled:
            warnings.warn(
                f"the network has not settled for {numbered(unsettled)} of {len(x)}, and what it "
                f"says of these may be wrong",
                SettlingWarning,
                stacklevel=2,
            )
        return found

    def ask(self, x: Tensor) -> tuple[Tensor, list[int]]:
        """What the network says, and the numbers of the inputs for which it has not settled."""
        network = self.network()
        x = x.to(next(iter(self.params.values())))
        if self.solver is not None:
            return settled_logits(network, x, solver=self.solver)
        with torch.no_grad():
            return network(x), []

    def plain(self) -> dict[str, Any]:
        """Tensors and plain values only, so that it loads with `weights_only=True`."""
        return {
            "format": FORMAT,
            "equigrad": equigrad.__version__,
            "params": {name: p.detach().cpu() for name, p in self.params.items()},
            **{part: describe(getattr(self, part)) for part in PARTS},
        }


PARTS = ("architecture", "target", "encoding", "solver")


@contextmanager
def reading(path: Path | str, what: str, form: str, saved: str) -> Iterator[dict[str, Any]]:
    """What a run has left in `model.pt`, for a body that makes something of it.

    Args:
        path: a run's folder, or the file itself.
        what: is made of it, in words.
        form: its format, by name.
        saved: when and by what, in words.

    Raises:
        RunError: there is none, it has another format, or the body fails. Nothing is executed.
    """
    path = Path(path)
    file = path / "model.pt" if path.is_dir() else path
    if not file.is_file():
        beside = sorted(path.glob("*/model.pt")) if path.is_dir() else []
        where = f"; there is one in {beside[0].parent}" if beside else ""
        raise RunError(f"{file} is not there: {saved}{where}")
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
        if loaded["format"] != form:
            raise ValueError(f"its format is {loaded['format']!r}, expected {form!r}")
        yield loaded
    except Exception as error:  # torch.load raises half a dozen kinds for a damaged file
        raise RunError(
            f"{file} cannot be read as {what} of equigrad ({type(error).__name__}: {error})"
        ) from error


def load_model(path: Path | str) -> Model:
    """The model in a run's folder, or in a file; nothing of it is executed.

    Raises:
        RunError: there is none, or it is damaged.
    """
    saved = (
        "a model is saved at the end of `equigrad run tabular`, `run folder` and `run equilibrium`"
    )
    with reading(path, "a model", FORMAT, saved) as loaded:
        return Model(params=loaded["params"], **{part: _made(loaded.get(part)) for part in PARTS})


def _made(value: Any) -> Any:
    """The inverse of `describe` for what a model is made of."""
    if isinstance(value, list):
        return tuple(_made(item) for item in value)
    if not isinstance(value, dict):
        return value
    made = {key: _made(item) for key, item in value.items() if key != "type"}
    return KINDS[value["type"]](**made) if "type" in value else made
