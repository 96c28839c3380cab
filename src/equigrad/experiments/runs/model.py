"""Saved models: `model.pt` files, and the model that `equigrad predict` uses."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

import equigrad
from equigrad import solvers
from equigrad.errors import RunError, SettlingWarning
from equigrad.experiments.data.images import Pixels
from equigrad.experiments.runs.config_file import overlay
from equigrad.experiments.runs.experiment import CHOOSERS, Training
from equigrad.experiments.runs.run_directory import describe
from equigrad.experiments.tables.encoding import Categorical, Encoding, Numeric
from equigrad.nn import lenet5, settling_networks, tanh_network
from equigrad.nn.committee import tanh_committee
from equigrad.solvers import Solver
from equigrad.solvers.phase import numbered
from equigrad.training.files import load_tensors, save_tensors
from equigrad.training.relaxation import settled_logits
from equigrad.training.targets import Classes, Numbers, Target

Configured = TypeVar("Configured", bound=Training)

PREDICTOR = "equigrad model 2"
"""The file format of a model for predictions."""

NETWORKS = {
    made.__name__: made
    for made in (
        tanh_network,
        lenet5,
        tanh_committee,
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
        name: name of the function that makes it.
        arguments: arguments of that function.
    """

    name: str
    arguments: Mapping[str, Any]

    def build(self) -> Any:
        """The network, with initial weights from torch's generator."""
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
"""The classes of which a model consists, besides tensors and plain values."""


@dataclass(frozen=True)
class Model:
    """A trained network, its target, and the encoding of its inputs.

    Attributes:
        architecture: architecture of the network.
        params: its weights.
        target: the kind of target that it predicts.
        encoding: turns the user's data into inputs.
        solver: settles the network for every input; None for a feed-forward network.
    """

    architecture: Architecture
    params: Mapping[str, Tensor]
    target: Target
    encoding: Encoding | Pixels
    solver: Solver | None = None

    def network(self) -> Any:
        """The network as a module with its weights, in their dtype."""
        with torch.random.fork_rng(devices=[]):
            network = self.architecture.build()
        network.to(next(iter(self.params.values())).dtype)
        network.load_state_dict(self.params)
        return network.eval()

    def outputs(self, x: Tensor) -> Tensor:
        """The outputs for some inputs, in the floating-point type of the weights.

        Warns:
            SettlingWarning: the network has not settled for some of the inputs.
        """
        found, unsettled = self.ask(x)
        if unsettled:
            warnings.warn(
                f"the network has not converged for {numbered(unsettled)} of {len(x)}, so its "
                f"outputs for these may be wrong",
                SettlingWarning,
                stacklevel=2,
            )
        return found

    def ask(self, x: Tensor) -> tuple[Tensor, list[int]]:
        """The outputs, and the indices of the inputs for which the network has not settled."""
        network = self.network()
        x = x.to(next(iter(self.params.values())))
        if self.solver is not None:
            return settled_logits(network, x, solver=self.solver)
        with torch.no_grad():
            return network(x), []

    def save(self, folder: Path) -> None:
        """Write the model to `model.pt` in a folder."""
        parts = {part: describe(getattr(self, part)) for part in PARTS}
        params = {name: p.detach().cpu() for name, p in self.params.items()}
        save_model(folder, PREDICTOR, params=params, **parts)


PARTS = ("architecture", "target", "encoding", "solver")


def save_model(folder: Path, form: str, **content: Any) -> None:
    """Write tensors and plain values to `model.pt` in a folder, under the name of their format."""
    save_tensors(folder / "model.pt", {"format": form, "equigrad": equigrad.__version__, **content})


@contextmanager
def saved_model(path: Path | str, form: str, *, what: str, saved: str) -> Iterator[dict[str, Any]]:
    """Read `model.pt` for the body of a `with` statement, which builds an object from it.

    No code in the file is executed.

    Args:
        path: a run's folder, or the file itself.
        form: name of its format.
        what: the object, in words, for errors.
        saved: when and by what it is saved, in words, for errors.

    Raises:
        RunError: there is no file, it is damaged or of another format, or the body fails.
    """
    path = Path(path)
    file = path / "model.pt" if path.is_dir() else path
    if not file.is_file():
        beside = sorted(path.glob("*/model.pt")) if path.is_dir() else []
        where = f"; there is one in {beside[0].parent}" if beside else ""
        raise RunError(f"there is no {file}: {saved}{where}")
    try:
        loaded = load_tensors(file)
        if loaded["format"] != form:
            raise ValueError(f"its format is {loaded['format']!r}, expected {form!r}")
        yield loaded
    except Exception as error:  # a damaged file raises errors of many kinds
        raise RunError(
            f"{file} cannot be read as {what} of equigrad ({type(error).__name__}: {error})"
        ) from error


def load_model(path: Path | str) -> Model:
    """The model in a run's folder, or in a file, of which no code is executed.

    Raises:
        RunError: there is no model, or it is damaged.
    """
    saved = (
        "a model is saved at the end of `equigrad run tabular`, `run folder` and `run equilibrium`"
    )
    with saved_model(path, PREDICTOR, what="a model", saved=saved) as loaded:
        parts = {part: _made(loaded.get(part)) for part in PARTS}
        model = Model(params=loaded["params"], **parts)
        model.network()  # raises if its weights do not fit
        return model


def restored(kind: type[Configured], written: Mapping[str, Any]) -> Configured:
    """An experiment's settings from their description by `describe`: a preset with changes.

    Raises:
        ConfigurationError: an unknown setting, or an invalid value.
    """
    words = {name: written[name] for name in CHOOSERS if isinstance(written.get(name), str)}
    return overlay(kind.preset(**words), written)


def _made(value: Any) -> Any:
    """The inverse of `describe` for the parts of a model."""
    if isinstance(value, list):
        return tuple(_made(item) for item in value)
    if not isinstance(value, dict):
        return value
    made = {key: _made(item) for key, item in value.items() if key != "type"}
    return KINDS[value["type"]](**made) if "type" in value else made
