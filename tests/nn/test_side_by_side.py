"""Copies of a network side by side: the same numbers whichever way they are computed."""

import pytest
import torch
from torch import nn

import equigrad as eg
from equigrad.nn import BatchStatistics, Functional, SideBySide, conv4
from equigrad.nn.side_by_side import Batching

BATCHINGS = ("vmap", "grouped", "grouped channels-last", "auto")


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 3))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Conv2d(4, 6, 3, groups=2, bias=False),
        nn.BatchNorm2d(6, affine=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, 3),
    )


def stacked(network: SideBySide, tasks: int) -> dict[str, torch.Tensor]:
    return {
        name: torch.stack([p * (1 + 0.3 * task) for task in range(tasks)]).requires_grad_()
        for name, p in network.params().items()
    }


@pytest.mark.parametrize(("make", "shape"), [(mlp, (4,)), (convolutional, (2, 8, 8))])
@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize("reference", [None, 3])
def test_every_way_gives_the_values_and_derivatives_of_one_copy_at_a_time(
    make, shape, batching, reference
) -> None:
    torch.manual_seed(0)
    model = make().double()
    x = torch.randn(3, 5, *shape, dtype=torch.float64)

    def both(batching) -> list[torch.Tensor]:
        network = SideBySide(model, batching)
        params = stacked(network, 3)
        out = network(params, x, reference=reference, second_order=True)
        first = torch.autograd.grad(out.sin().sum(), list(params.values()), create_graph=True)
        size = torch.stack([g.square().sum() for g in first]).sum()
        return [out, *first, *torch.autograd.grad(size, list(params.values()))]

    for found, expected in zip(both(batching), both("loop"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_a_copy_computes_what_the_module_computes() -> None:
    torch.manual_seed(0)
    model = convolutional()
    network = SideBySide(model, "grouped")
    params = stacked(network, 3)
    x = torch.randn(3, 5, 2, 8, 8)
    one = Functional(model)({name: p[1] for name, p in params.items()}, x[1])
    torch.testing.assert_close(network(params, x)[1], one, rtol=1e-4, atol=1e-5)


def test_parameters_of_the_modules_own_shape_are_shared() -> None:
    network = SideBySide(mlp(), "grouped")
    params = stacked(network, 3)
    x = torch.randn(3, 5, 4)
    params["2.weight"] = params["2.weight"][1].detach()
    apart = {**params, "2.weight": params["2.weight"].repeat(3, 1, 1)}
    torch.testing.assert_close(network(params, x), network(apart, x))


def test_statistics_of_the_first_rows_are_those_of_batch_normalisation_in_eval_mode() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3, momentum=1.0).double()
    nn.init.uniform_(norm.weight)
    nn.init.uniform_(norm.bias)
    x = torch.randn(9, 3, 4, 4, dtype=torch.float64)
    ours = BatchStatistics(norm)
    torch.testing.assert_close(ours(x), norm(x))
    ours.reference = 4
    norm(x[:4])
    assert norm.running_var is not None
    norm.running_var.mul_(63 / 64)  # torch remembers the unbiased variance of 4 · 16 values
    torch.testing.assert_close(ours(x), norm.eval()(x))


def test_any_module_goes_by_vmap_and_is_not_touched() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.change = nn.LayerNorm(4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.change(self.norm(x)).relu()

    layer = Residual()
    before = {name: p.clone() for name, p in layer.named_parameters()}
    x = torch.randn(3, 5, 6, 4)
    out = {}
    batchings: list[Batching] = ["vmap", "loop"]
    for batching in batchings:
        network = SideBySide(layer, batching)
        out[batching] = network(stacked(network, 3), x)
    torch.testing.assert_close(out["vmap"], out["loop"], rtol=1e-4, atol=1e-5)
    assert all(p is not before[n] and p.equal(before[n]) for n, p in layer.named_parameters())


def test_grouped_refuses_what_it_does_not_know() -> None:
    with pytest.raises(eg.ConfigurationError, match=r"batching='grouped'.*TransformerEncoderLayer"):
        SideBySide(nn.TransformerEncoderLayer(4, 2, 8), "grouped")
    with pytest.raises(eg.ConfigurationError, match="is not one"):
        SideBySide(nn.Sequential(nn.Flatten(2), nn.Linear(4, 2)), "grouped")
    network = SideBySide(mlp(), "grouped")
    with pytest.raises(eg.ConfigurationError, match="has 3 dimensions"):
        network(stacked(network, 2), torch.zeros(2, 5, 7, 4))
    with pytest.raises(eg.ConfigurationError, match="batching must be 'auto', 'loop'"):
        SideBySide(mlp(), "fast")  # type: ignore[arg-type]


def test_tied_weights_and_further_dimensions_go_another_way() -> None:
    tied = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    network = SideBySide(tied, "auto")
    params = stacked(network, 3)
    torch.testing.assert_close(
        network(params, torch.ones(3, 2, 5, 4)),
        SideBySide(tied, "loop")(params, torch.ones(3, 2, 5, 4)),
    )


def test_wrong_parameters_are_named() -> None:
    network = SideBySide(mlp())
    with pytest.raises(eg.ProblemError, match=r"has no '2.bias'"):
        network({n: p for n, p in network.params().items() if n != "2.bias"}, torch.ones(2, 5, 4))
    with pytest.raises(
        eg.ProblemError, match=r"'0.weight'.*must have shape \(6, 4\).*, got \(3, 6, 4\)"
    ):
        network(stacked(network, 3), torch.ones(2, 5, 4))


@pytest.mark.parametrize("pooling", [True, False])
@pytest.mark.parametrize("side", [28, 20, 17])
def test_conv4_takes_any_side(pooling, side) -> None:
    assert conv4(filters=2, side=side, outputs=7, pooling=pooling)(
        torch.zeros(2, 1, side, side)
    ).shape == (2, 7)
    assert sum(p.numel() for p in conv4(outputs=5).parameters()) == 112_261
    with pytest.raises(eg.ConfigurationError, match="at least 16 with pooling, got 15"):
        conv4(side=15)


def test_a_normalisation_in_two_places_stays_one() -> None:
    norm = nn.BatchNorm1d(4)
    shared = nn.Sequential(nn.Linear(4, 4), norm, nn.Sequential(nn.Tanh(), norm))
    network = SideBySide(shared)
    assert set(network.params()) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    x = torch.randn(2, 5, 4)
    one = network({n: p.expand(2, *p.shape) for n, p in network.params().items()}, x)
    torch.testing.assert_close(one[1], shared(x[1]))


class TestWhatBatchingsDoNotServe:
    """`auto` leaves out a batching that fails, and takes the loop."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

    class Branch(Gated):
        def forward(self, x):
            h = self.linear(x)
            return h.tanh() if h.sum().item() < 1e6 else h

    class Masked(Gated):
        def forward(self, x):
            h = self.linear(x)
            return h + h[h > 0].sum()

    class Unique(Gated):
        def forward(self, x):
            h = self.linear(x)
            return h / len(torch.nonzero(h))

    class Recurrent(Gated):
        def __init__(self):
            super().__init__()
            self.core = nn.GRU(3, 3, num_layers=2, bidirectional=True)

        def forward(self, x):
            return self.linear(self.core(x)[0][:, :3])

    @pytest.mark.parametrize("kind", [Branch, Masked, Unique, Recurrent])
    @pytest.mark.parametrize("second_order", [False, True])
    def test_auto_takes_the_loop(self, kind, second_order):
        torch.manual_seed(0)
        module = kind()
        x = torch.randn(3, 5, 3)
        auto, loop = (SideBySide(module, b) for b in ("auto", "loop"))
        params = {
            n: (p.expand(3, *p.shape) + 0.1).requires_grad_() for n, p in auto.params().items()
        }
        found, expected = (s(params, x, second_order=second_order) for s in (auto, loop))
        torch.testing.assert_close(found, expected)
        with torch.no_grad():
            torch.testing.assert_close(auto(params, x, training=False), expected)

    def test_the_modules_own_error_is_raised(self):
        net = SideBySide(nn.Linear(3, 2))
        params = {n: p.expand(2, *p.shape) for n, p in net.params().items()}
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            net(params, torch.ones(2, 5, 4))


@pytest.mark.parametrize("reference", [None, 3])
@pytest.mark.parametrize("batching", BATCHINGS)
def test_copies_that_share_their_convolutions(batching, reference) -> None:
    torch.manual_seed(0)
    model = convolutional().double()
    x = torch.randn(3, 5, 2, 8, 8, dtype=torch.float64)

    def both(batching) -> list[torch.Tensor]:
        network = SideBySide(model, batching)
        params = {
            name: p.requires_grad_() if name == "1.weight" or name.startswith("0.0.") else p
            for name, p in network.params().items()
        }
        for name, p in stacked(network, 3).items():
            if params[name].ndim < 4 and not name.startswith("0.0."):
                params[name] = p
        out = network(params, x, reference=reference)
        return [out, *torch.autograd.grad(out.sin().sum(), list(params.values()))]

    for found, expected in zip(both(batching), both("loop"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("batching", ["loop", "vmap", "auto"])
def test_what_a_module_keeps_of_a_call_is_forgotten(batching) -> None:
    """Every copy, of every call, is the module as it was given."""

    class Counting(nn.Linear):
        calls = 0

        def forward(self, input):
            self.calls = self.calls + 1
            self.last = input
            return super().forward(input) * self.calls

    torch.manual_seed(0)
    module = Counting(3, 2)
    network = SideBySide(module, batching)
    params = {n: p.expand(4, *p.shape) for n, p in network.params().items()}
    x = torch.randn(4, 5, 3)
    expected = nn.functional.linear(x, module.weight, module.bias)
    for _ in range(3):
        torch.testing.assert_close(network(params, x), expected)
    assert module.calls == 0


def test_channels_last_is_as_precise_as_other_layouts_where_it_is_differentiated_twice():
    """Torch's own batch normalisation of channels-last images rounds ten times as coarsely."""
    torch.manual_seed(0)
    norm = nn.Sequential(nn.BatchNorm2d(8))
    x = torch.randn(3, 15, 8, 28, 28) + 1

    def derivatives(batching, dtype):
        network = SideBySide(norm.to(dtype), batching)
        params = stacked(network, 3)
        out = network(params, x.to(dtype), second_order=True)
        first = torch.autograd.grad(out.sin().sum(), list(params.values()), create_graph=True)
        size = torch.stack([g.square().sum() for g in first]).sum()
        return [out, *first, *torch.autograd.grad(size, list(params.values()))]

    exact = derivatives("grouped", torch.float64)
    errors = {
        batching: max(
            ((found.double() - true).norm() / true.norm()).item()
            for found, true in zip(derivatives(batching, torch.float32), exact, strict=True)
        )
        for batching in ("grouped", "grouped channels-last")
    }
    assert errors["grouped channels-last"] < 2 * errors["grouped"]


@pytest.mark.parametrize(
    ("model", "shape", "tried"),
    [
        (mlp(), (3, 5, 4), [("_loop", 1), ("_grouped", 3)]),
        (mlp(), (3, 5, 7, 4), [("_loop", 1), ("_grouped", 3), ("_vmap", 3)]),
        (nn.LayerNorm(4), (3, 5, 4), [("_loop", 1), ("_vmap", 3)]),
        (
            convolutional(),
            (3, 5, 2, 8, 8),
            [("_loop", 1), ("_grouped", 3), ("_grouped_channels_last", 3)],
        ),
    ],
)
def test_auto_tries_the_loop_on_one_copy_and_vmap_last(model, shape, tried, monkeypatch) -> None:
    """A loop takes its time from copy to copy; a trial of all would hold the graphs of all."""
    seen = []

    def seconds(network, batching, params, x, second_order) -> float:
        assert {len(p) for p in params.values()} == {len(x)}
        seen.append((batching.__name__, len(x)))
        batching(params, x)
        return {"_loop": 1.0}.get(batching.__name__, 2.5)  # less than three times the one

    monkeypatch.setattr(SideBySide, "_seconds", seconds)
    network = SideBySide(model, "auto")
    network(stacked(network, 3), torch.randn(shape))
    assert seen == tried
    assert "_loop" not in {chosen.__name__ for chosen in network._chosen.values()}
