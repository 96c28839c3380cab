"""Training setups that people have: the gradient is right, or an error says what to change."""

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import equigrad as eg

X, V = torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(0)).double().unbind()
Y, W = torch.randn(2, 12, generator=torch.Generator().manual_seed(1)).double().unbind()


def ridge(loss=lambda p, x, y: (x @ p["w"] - y).square().mean(), dtype=torch.float64):
    """A penalty's strength as θ; φ at zero."""
    x, y, v, w = (t.to(dtype) for t in (X, Y, V, W))
    problem = eg.Bilevel(
        lambda p, m: loss(p, x, y) + m["l"].exp() * p["w"].square().sum(),
        lambda p, m: (v @ p["w"] - w).square().mean(),
    )
    return problem, {"w": torch.zeros(4, dtype=dtype)}, {"l": torch.tensor(-1.0, dtype=dtype)}


DESCENT = eg.GradientDescent(lr=0.2, max_steps=200)


class TestWeightDecayInTheOptimiser:
    @pytest.mark.parametrize(
        ("optimizer", "options"),
        [
            (torch.optim.Adam, {"lr": 0.02, "weight_decay": 0.2}),
            (torch.optim.RMSprop, {"lr": 0.02, "weight_decay": 0.2}),
            (torch.optim.NAdam, {"lr": 0.02, "weight_decay": 0.2}),
        ],
    )
    @pytest.mark.parametrize("estimator", [eg.Nystrom(), eg.GMRES(), eg.T1T2()])
    def test_that_adds_to_the_gradient_is_refused(self, optimizer, options, estimator):
        solver = eg.TorchOptimizer(optimizer=optimizer, options=options, max_steps=50)
        with pytest.raises(eg.ConfigurationError, match=r"weight_decay=0\.2.*0\.1 \* sum"):
            eg.meta_gradient(*ridge(), solver=solver, estimator=estimator)

    @pytest.mark.parametrize(
        ("optimizer", "options"),
        [
            (torch.optim.AdamW, {"lr": 0.02}),
            (torch.optim.Adam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
            (torch.optim.NAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
        ],
    )
    def test_that_acts_beside_it_is_named(self, optimizer, options):
        solver = eg.TorchOptimizer(optimizer=optimizer, options=options, max_steps=50)
        result = eg.meta_gradient(*ridge(), solver=solver, estimator=eg.GMRES())
        assert "weight_decay" in result.status

    @pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.LBFGS])
    def test_none_is_not_mentioned(self, optimizer):
        solver = eg.TorchOptimizer(optimizer=optimizer, options={"lr": 0.05}, max_steps=50)
        result = eg.meta_gradient(*ridge(), solver=solver, estimator=eg.GMRES())
        assert "decay" not in result.status

    def test_moved_into_the_loss_as_advised_it_is_right(self):
        decay = 0.2
        problem, params, meta = ridge()
        inside = eg.Bilevel(
            lambda p, m: problem.inner_loss(p, m) + decay / 2 * p["w"].square().sum(),
            problem.outer_loss,
        )
        solver = eg.TorchOptimizer(optimizer=torch.optim.SGD, options={"lr": 0.1}, max_steps=500)
        found = eg.meta_gradient(inside, params, meta, solver=solver, estimator=eg.GMRES())

        def settled(strength):
            w = torch.zeros(4, dtype=torch.float64, requires_grad=True)
            optimiser = torch.optim.SGD([w], lr=0.1, weight_decay=decay)
            for _ in range(500):
                optimiser.zero_grad()
                problem.inner_loss({"w": w}, {"l": strength}).backward()
                optimiser.step()
            return problem.outer_loss({"w": w.detach()}, {}).item()

        h = 1e-3
        central = (settled(meta["l"] + h) - settled(meta["l"] - h)) / (2 * h)
        assert found.grads["l"].item() == pytest.approx(central, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "estimator",
    [eg.ExactSolve(), eg.GMRES(), eg.GMRES(restart=2), eg.Nystrom(rank=4), eg.NeumannSeries()],
)
def test_implicit_estimators_in_sixteen_bits(dtype, estimator):
    exact = eg.meta_gradient(*ridge(), solver=DESCENT, estimator=eg.ExactSolve())
    found = eg.meta_gradient(*ridge(dtype=dtype), solver=DESCENT, estimator=estimator)
    assert found.grads["l"].dtype == dtype
    assert found.grads["l"].item() == pytest.approx(exact.grads["l"].item(), rel=0.1)
    assert "float32" in found.status


def test_products_in_sixteen_bits_do_not_overflow():
    """A vector beyond what float16 can hold."""
    problem, params, meta = ridge(dtype=torch.float16)
    steep = eg.Bilevel(problem.inner_loss, lambda p, m: 3e4 * p["w"].sum())
    flat = eg.Bilevel(problem.inner_loss, lambda p, m: p["w"].sum())
    large, small = (
        eg.meta_gradient(p, params, meta, solver=DESCENT, estimator=eg.ExactSolve()).grads["l"]
        for p in (steep, flat)
    )
    assert large.isfinite()
    assert large.item() == pytest.approx(3e4 * small.item(), rel=0.05)


class TestEmbeddings:
    @staticmethod
    def problem(module):
        ids = torch.arange(12).reshape(4, 3) % 5
        target = torch.linspace(-1, 1, 4).double().unsqueeze(1)
        return eg.Bilevel(
            lambda p, m: (
                m["l"].exp() * (torch.func.functional_call(module, p, ids) - target) ** 2
            ).mean(),
            lambda p, m: (
                (torch.func.functional_call(module, p, ids.flip(1)) - target).pow(2).mean()
            ),
        )

    @staticmethod
    def module(kind=nn.Embedding, **options):
        torch.manual_seed(0)
        return nn.Sequential(kind(5, 2, **options), nn.Flatten(), nn.LazyLinear(1)).double()

    @pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
    @pytest.mark.parametrize(
        "estimator",
        [
            eg.Contrastive(beta=0.1),
            eg.Contrastive(beta=0.1, scheme="symmetric", nudge="force"),
            eg.FiniteDifferenceT1T2(),
        ],
    )
    def test_sparse_gradients_count_as_dense_ones(self, kind, estimator):
        found = []
        for sparse in (False, True):
            module = self.module(kind, sparse=sparse)
            module(torch.zeros(1, 3, dtype=torch.long))
            params = {n: p.detach() for n, p in module.named_parameters()}
            meta = {"l": torch.tensor(0.0).double()}
            found.append(
                eg.meta_gradient(
                    self.problem(module),
                    params,
                    meta,
                    solver=eg.GradientDescent(lr=0.1, max_steps=30),
                    estimator=estimator,
                ).grads["l"]
            )
        torch.testing.assert_close(*found)

    @pytest.mark.parametrize("estimator", [eg.T1T2(), eg.Unrolled()])
    def test_sparse_gradients_are_differentiated_again(self, estimator):
        self.test_sparse_gradients_count_as_dense_ones(nn.Embedding, estimator)

    @pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
    def test_that_write_into_their_weights_are_refused(self, kind):
        with pytest.raises(eg.ProblemError, match=r"'0' has max_norm=0\.5.*max_norm=None"):
            self.problem(self.module(kind, max_norm=0.5))

    @pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
    def test_that_hold_a_row_from_learning_are_served(self, kind):
        module = self.module(kind, padding_idx=0)
        module(torch.zeros(1, 3, dtype=torch.long))
        params = {n: p.detach() for n, p in module.named_parameters()}
        meta = {"l": torch.tensor(0.0).double()}
        for estimator in (eg.Contrastive(beta=0.01, scheme="symmetric"), eg.T1T2()):
            result = eg.meta_gradient(
                self.problem(module), params, meta, solver=DESCENT, estimator=estimator
            )
            assert "autograd" not in result.status

    def test_that_are_frozen_may_be_renormed(self):
        module = self.module(max_norm=0.5)
        module[0].weight.requires_grad_(False)
        assert self.problem(module).modules == (module,)


class TestForwardMode:
    @pytest.mark.parametrize(
        "loss",
        [
            lambda p, x, y: mse_loss(x @ p["w"], y),
            lambda p, x, y: mse_loss(input=x @ p["w"], target=y, reduction="sum") / 12,
            lambda p, x, y: nn.MSELoss()(x @ p["w"], y),
            lambda p, x, y: mse_loss(y, x @ p["w"]),
            lambda p, x, y: mse_loss((x @ p["w"]).sigmoid(), y),
        ],
    )
    def test_mse_loss(self, loss):
        found = eg.meta_gradient(*ridge(loss), solver=DESCENT, estimator=eg.ForwardMode())
        exact = eg.meta_gradient(*ridge(loss), solver=DESCENT, estimator=eg.Unrolled())
        torch.testing.assert_close(found.grads, exact.grads)


class TestTensorsThatNothingSettles:
    @pytest.mark.parametrize(
        ("tensor", "words"),
        [
            (torch.ones(4, dtype=torch.complex64), "is complex"),
            (torch.ones(4, device="meta"), "meta device"),
            (torch.ones(4).to_sparse(), "to_dense"),
            (torch.ones(4, dtype=torch.int64), "has no gradient"),
        ],
    )
    @pytest.mark.parametrize("place", ["params", "meta_params"])
    def test_parameters(self, tensor, words, place):
        problem, params, meta = ridge()
        given = {"params": params, "meta_params": meta}
        name = next(iter(given[place]))
        given[place] = {name: tensor}
        with pytest.raises(eg.ProblemError, match=rf"{place}\['{name}'\].*{words}"):
            eg.meta_gradient(problem, given["params"], given["meta_params"], solver=DESCENT)

    def test_complex_losses(self):
        _, params, meta = ridge()
        problem = eg.Bilevel(
            lambda p, m: (p["w"] * m["l"] * 1j).exp().sum(), lambda p, m: p["w"].sum()
        )
        with pytest.raises(eg.ProblemError, match=r"inner_loss returns a complex number"):
            eg.meta_gradient(problem, params, meta, solver=DESCENT)


def test_a_nudge_that_rounding_swallows_is_no_gradient():
    """Under autocast, where no phase can tell the nudged loss from the free one."""
    problem, params, meta = ridge(dtype=torch.float32)
    hidden = eg.Bilevel(
        lambda p, m: (
            (X.float() @ p["w"] - Y.float()).square().mean() + m["l"].exp() * p["w"].square().sum()
        ),
        problem.outer_loss,
    )
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(eg.SettlingError, match="bfloat16"):
        eg.meta_gradient(
            hidden,
            params,
            meta,
            solver=eg.LBFGS(tol=1e-4, max_steps=50),
            estimator=eg.Contrastive(beta=1e-4),
        )
