"""A learner of tasks: many at once are each on its own."""

import pytest
import torch
from torch import Tensor, nn

import equigrad as eg
from equigrad.nn import ComplexSynapse, LearnedRates, LearnedStart, Modulation
from equigrad.tasks import FewShotLearner, TaskBatch


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3)
    ).double()


def tasks(count: int = 4) -> TaskBatch:
    dice = torch.Generator().manual_seed(1)

    def examples(each: int) -> tuple[Tensor, Tensor]:
        y = torch.arange(3).repeat(each)
        noise = torch.randn(count, 3 * each, 1, 6, 6, generator=dice, dtype=torch.float64)
        return noise + y[:, None, None, None], y.expand(count, -1)

    return TaskBatch(support=examples(2), query=examples(3))


def synaptic(strength: float = 0.5) -> ComplexSynapse:
    return ComplexSynapse(network(), strength, center="init", learn=("center",))


def learner(model, estimator, **options) -> FewShotLearner:
    rate = model.rates if isinstance(model, LearnedRates) else 0.05
    solver = options.pop("solver", eg.GradientDescent(lr=rate, max_steps=5))
    return FewShotLearner(
        model=model,
        loss=nn.functional.cross_entropy,
        solver=solver,
        estimator=estimator,
        **{"batching": "vmap", **options},
    )


CASES = [
    (synaptic, eg.Contrastive(beta=0.01, scheme="symmetric")),
    (synaptic, eg.Contrastive(beta=0.1, nudge="force")),
    (lambda: ComplexSynapse(network(), 0.5, learn=("strength", "center")), eg.Contrastive()),
    (synaptic, eg.IMAML(damping=5.0)),
    (synaptic, eg.NeumannSeries(terms=4, alpha=0.05)),
    (lambda: Modulation(network()), eg.Contrastive(beta=0.01)),
    (lambda: LearnedStart(network()), eg.MAML()),
    (lambda: LearnedRates(network(), 0.05), eg.MAML()),
    (lambda: LearnedStart(network()), eg.FirstOrderMAML()),
    (lambda: LearnedStart(network()), eg.Reptile()),
]


@pytest.mark.parametrize(("make", "estimator"), CASES)
@pytest.mark.parametrize("statistics", ["query", "support"])
def test_a_batch_gives_the_mean_of_its_tasks_own_meta_gradients(
    make, estimator, statistics
) -> None:
    batch, model = tasks(), make()
    meta_params = model.meta_params()
    alone = learner(model, estimator, batching="loop", statistics=statistics)
    each = [alone.meta_gradient(meta_params, batch[i : i + 1]) for i in range(len(batch))]
    for batching in ("vmap", "grouped", "auto"):
        for chunk_size in (None, 3):
            result = learner(
                model, estimator, batching=batching, chunk_size=chunk_size, statistics=statistics
            ).meta_gradient(meta_params, batch)
            for name, grad in result.grads.items():
                mean = torch.stack([one.grads[name] for one in each]).mean(0)
                torch.testing.assert_close(grad, mean, rtol=1e-7, atol=1e-10)
            outer_loss = sum(one.outer_loss for one in each) / len(each)
            assert result.outer_loss == pytest.approx(outer_loss, rel=1e-10)
            # a task's first meta-gradient of a learner checks it, the others need not
            assert result.gradient_evaluations == sum(one.gradient_evaluations for one in each)
            assert result.params.keys() == model.start(meta_params).keys()
            assert all(len(p) == len(batch) for p in result.params.values())


def test_the_meta_gradient_is_that_of_the_settled_tasks_query_loss() -> None:
    """Against a central difference of tasks that are settled anew."""
    batch, model = tasks(2), synaptic(strength=2.0)
    solver = eg.LBFGS(tol=1e-10)
    meta_params = model.meta_params()
    one = learner(model, eg.Contrastive(beta=1e-3, scheme="symmetric"), solver=solver)
    grads = one.meta_gradient(meta_params, batch).grads
    torch.manual_seed(2)
    along = {name: torch.randn_like(m) for name, m in meta_params.items()}
    step = 1e-4

    def query_loss(sign: int) -> float:
        moved = {n: m.detach() + sign * step * along[n] for n, m in meta_params.items()}
        outputs = one.predict(one.settle(moved, batch), moved, batch)
        return nn.functional.cross_entropy(outputs.flatten(0, 1), batch.query[1].flatten()).item()

    expected = (query_loss(1) - query_loss(-1)) / (2 * step)
    found = sum((grads[name] * along[name]).sum().item() for name in grads)
    assert found == pytest.approx(expected, rel=1e-4)


def test_synaptic_meta_gradient_is_local() -> None:
    """∂/∂ω is -λ (φ⁺ - φ⁻) / 2β of each weight (Zucchet et al., Appendix B)."""
    batch, model = tasks(2), synaptic(strength=0.5)
    rule = eg.Contrastive(beta=0.1, scheme="symmetric", nudge="loss")
    meta_params = model.meta_params()
    result = learner(model, rule).meta_gradient(meta_params, batch)
    one = learner(model, rule)
    from equigrad.evaluation import Evaluation

    with Evaluation(one.problem(batch), one.start(meta_params, 2), meta_params) as evaluation:
        free = evaluation.settle(one.solver)
        up, down = (
            evaluation.settle_nudged(free, one.solver, beta, keep_momentum=True)
            for beta in (0.1, -0.1)
        )
    for name, grad in result.grads.items():
        weight = name.removeprefix("center.")
        expected = -0.5 * (up.params[weight] - down.params[weight]).mean(0) / 0.2
        torch.testing.assert_close(grad, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("statistics", ["query", "support"])
@pytest.mark.parametrize("make", [synaptic, lambda: Modulation(network())])
def test_an_adapted_module_says_what_the_batch_said(make, statistics) -> None:
    batch, model = tasks(3), make()
    one = learner(model, eg.Contrastive(), chunk_size=2, statistics=statistics)
    meta_params = model.meta_params()
    params = one.settle(meta_params, batch)
    torch.testing.assert_close(
        params["4.weight"], one.meta_gradient(meta_params, batch).params["4.weight"]
    )
    outputs = one.predict(params, meta_params, batch)
    module = one.adapt(meta_params, (batch.support[0][1], batch.support[1][1]))
    assert isinstance(module, nn.Sequential)
    torch.testing.assert_close(module(batch.query[0][1]).detach(), outputs[1])
    single = module(batch.query[0][1][:1]).detach()
    # by the support's statistics, an example's outputs depend on no other
    assert torch.allclose(single, outputs[1][:1]) == (statistics == "support")
    assert not any(p.requires_grad for p in params.values())


def test_adapted_modules_are_saved_and_loaded_as_any_other(tmp_path) -> None:
    batch, model = tasks(1), synaptic()
    one = learner(model, eg.Contrastive(), statistics="support")
    module = one.adapt(model.meta_params(), (batch.support[0][0], batch.support[1][0]))
    torch.save(module.state_dict(), tmp_path / "adapted.pt")
    again = network().eval()
    again.load_state_dict(torch.load(tmp_path / "adapted.pt", weights_only=True))
    x = batch.query[0][0]
    torch.testing.assert_close(again(x), module(x))


def test_steps_of_adaptation_other_than_the_solvers() -> None:
    model, batch = LearnedStart(network()), tasks()
    meta_params = model.meta_params()
    five = learner(model, eg.MAML())
    two = learner(model, eg.MAML(), solver=eg.GradientDescent(lr=0.05, max_steps=2))
    for name, p in five.settle(meta_params, batch, steps=2).items():
        assert p.equal(two.settle(meta_params, batch)[name])
    for name, p in five.settle(meta_params, batch, steps=0).items():
        assert p.equal(meta_params[name].expand(p.shape))
        assert not p.requires_grad


def test_rates_of_meta_sgd_are_learned_beside_the_start_of_maml() -> None:
    rates, start, batch = LearnedRates(network(), 0.05), LearnedStart(network()), tasks()
    meta = rates.meta_params()
    found = learner(rates, eg.MAML()).meta_gradient(meta, batch)
    maml = learner(start, eg.MAML()).meta_gradient(start.meta_params(), batch)
    for name, grad in maml.grads.items():
        torch.testing.assert_close(found.grads[f"start.{name}"], grad, rtol=1e-10, atol=1e-13)
    along = {n: torch.randn_like(m) if n.startswith("rate.") else 0.0 for n, m in meta.items()}

    def loss(shift: float) -> float:
        moved = {n: (m + shift * along[n]).detach() for n, m in meta.items()}
        params = learner(rates, eg.MAML()).settle(moved, batch)
        said = learner(rates, eg.MAML()).predict(params, moved, batch)
        losses = [
            nn.functional.cross_entropy(o, y) for o, y in zip(said, batch.query[1], strict=True)
        ]
        return torch.stack(losses).mean().item()

    expected = (loss(1e-5) - loss(-1e-5)) / 2e-5
    exact = sum((g * along[n]).sum().item() for n, g in found.grads.items() if "rate." in n)
    assert exact == pytest.approx(expected, rel=1e-6)


def test_bad_choices_are_named() -> None:
    with pytest.raises(
        eg.ConfigurationError, match=r"chunk_size must be a whole number of at least 1.*got 0"
    ):
        learner(synaptic(), eg.Contrastive(), chunk_size=0)
    with pytest.raises(
        eg.ProblemError, match="MAML computes the gradient with respect to the initialisation"
    ):
        learner(Modulation(network()), eg.MAML()).meta_gradient(
            Modulation(network()).meta_params(), tasks()
        )
    start = LearnedStart(network())
    with pytest.raises(
        eg.ProblemError, match="a converged solution does not depend on its initialisation"
    ):
        learner(start, eg.Contrastive()).meta_gradient(start.meta_params(), tasks())


def test_dropout_acts_in_meta_training_alone() -> None:
    batch = tasks(2)
    model = LearnedStart(nn.Sequential(network()[:4], nn.Dropout(0.5), nn.Linear(64, 3).double()))
    one = learner(model, eg.FirstOrderMAML(), batching="loop")
    theta = model.meta_params()
    losses = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        losses.append(one.meta_gradient(theta, batch).outer_loss)
    assert losses[0] != losses[1]
    params = one.settle(theta, batch)
    assert one.predict(params, theta, batch).equal(one.predict(params, theta, batch))
    module = one.adapt(theta, (batch.support[0][0], batch.support[1][0]))
    assert module(batch.query[0][0]).equal(module(batch.query[0][0]))


def test_what_is_not_a_learners_is_refused() -> None:
    rule = eg.Contrastive()
    with pytest.raises(eg.ConfigurationError, match=r"plain Sequential; wrap it in .*Modulation"):
        learner(network(), rule)
    with pytest.raises(eg.ConfigurationError, match="statistics must be 'query' or 'support'"):
        learner(synaptic(), rule, statistics="both")
    each = FewShotLearner(
        model=synaptic(),
        loss=nn.CrossEntropyLoss(reduction="none"),
        solver=eg.GradientDescent(max_steps=2),
        estimator=rule,
    )
    with pytest.raises(eg.ProblemError, match="loss must return a scalar for each task"):
        each.meta_gradient(each.model.meta_params(), tasks())
    x, y = tasks().support
    with pytest.raises(eg.ProblemError, match=r"query must be a pair .*got Tensor"):
        TaskBatch((x, y), x[:2])  # type: ignore[arg-type]
    with pytest.raises(eg.ProblemError, match=r"support must be a pair .*got 3 of them"):
        TaskBatch((x, y, y), (x, y))  # type: ignore[arg-type]
