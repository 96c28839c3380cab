"""Compiled steps: eager's numbers and reports, compiled once, and refused where they cannot be."""

import dataclasses
import shutil

import pytest
import torch
from torch.nn.functional import dropout, mse_loss
from torch.utils._pytree import tree_leaves

import equigrad as eg
from equigrad.errors import ConfigurationError, SettlingError
from equigrad.evaluation import Evaluation
from equigrad.solvers import compiled, graphs

X = torch.tensor([[1.0, 0.2], [-0.4, 0.9], [0.3, -0.7]], dtype=torch.float64)
Y = torch.tensor([0.5, -0.3, 0.8], dtype=torch.float64)
SOLVER = eg.GradientDescent(lr=0.2, momentum=0.8, nesterov=True, max_steps=14, check_every=3)


@pytest.fixture
def compilations(monkeypatch):
    """Compiles without a C++ compiler, into an empty cache, and counts."""
    counted = []
    original = compiled._compile

    def counting(*args):
        counted.append(args)
        return original(*args)

    monkeypatch.setattr(compiled, "BACKEND", "eager")
    monkeypatch.setattr(compiled, "_compiled", {})
    monkeypatch.setattr(compiled, "_compile", counting)
    return counted


def params():
    return {"w": torch.tensor([0.3, -0.2], dtype=torch.float64)}


def meta_params(strength=0.1):
    return {"strength": torch.tensor(strength, dtype=torch.float64)}


def predict(params):
    return torch.tanh(X @ params["w"])


def problem(target=Y, scale=1.0):
    def inner(params, meta):
        pull = meta["strength"] * params["w"].square().sum()
        return scale * mse_loss(predict(params), target) + pull

    return eg.Bilevel(inner, lambda params, meta: mse_loss(predict(params), -target))


def synapse_problem():
    torch.manual_seed(0)
    synapse = eg.nn.ComplexSynapse(torch.nn.Linear(2, 1).double(), strength=0.1, center="init")
    inner = lambda params, meta: mse_loss(synapse(params, X).squeeze(), Y)  # noqa: E731
    outer = lambda params, meta: synapse(params, X).square().mean()  # noqa: E731
    return eg.Bilevel(inner, outer, regularizer=synapse), synapse.params(), synapse.meta_params()


def relaxing_network():
    def step(params, meta):
        return {"w": torch.tanh(0.5 * params["w"] + meta["strength"])}

    problem = eg.FixedPoint(step, lambda params, meta: params["w"].square().sum())
    return problem, params(), meta_params()


def assert_the_same(case, solver, estimator):
    eager = eg.meta_gradient(*case, solver=solver, estimator=estimator)
    compiling = dataclasses.replace(solver, compile=True)
    ours = eg.meta_gradient(*case, solver=compiling, estimator=estimator)
    for found, expected in ((ours.params, eager.params), (ours.grads, eager.grads)):
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-10, atol=1e-10)
    assert ours.gradient_evaluations == eager.gradient_evaluations
    for phase, expected in zip(ours.phases, eager.phases, strict=True):
        near = {
            name: pytest.approx(getattr(expected, name), rel=1e-9, abs=1e-12)
            for name in ("start_residual", "residual")
        }
        assert dataclasses.asdict(phase) == dataclasses.asdict(expected) | near


@pytest.mark.parametrize(
    ("case", "solver", "estimator"),
    [
        (
            (problem(), params(), meta_params()),
            SOLVER,
            eg.Contrastive(points=3, scheme="forward", nudge="loss"),
        ),
        # a whole number of chunks, a phase shorter than one, a tolerance, another start of momentum
        (
            (problem(), params(), meta_params()),
            dataclasses.replace(SOLVER, max_steps=9),
            eg.Contrastive(
                nudged_solver=dataclasses.replace(SOLVER, max_steps=3),
                scheme="forward",
                nudge="loss",
            ),
        ),
        (
            (problem(), params(), meta_params()),
            dataclasses.replace(SOLVER, max_steps=None, tol=1e-6),
            eg.Contrastive(momentum="reset", scheme="forward", nudge="loss"),
        ),
        (synapse_problem(), SOLVER, eg.Contrastive(nudge="force", scheme="forward")),
        (relaxing_network(), eg.GradientDescent(lr=1, tol=1e-9, check_every=2), eg.GMRES()),
    ],
    ids=["nudged", "whole chunks", "tolerance", "force and synapse", "fixed point"],
)
def test_numbers_and_reports_are_those_of_eager_steps(compilations, case, solver, estimator):
    assert_the_same(case, solver, estimator)
    assert compilations


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what torch's compiler imports
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's compiler needs g++")
def test_the_default_back_end(monkeypatch):
    monkeypatch.setattr(compiled, "_compiled", {})
    quadratic = eg.Bilevel(
        lambda params, meta: (meta["strength"] * params["w"].square()).sum(),
        lambda params, meta: params["w"].sum(),
    )
    solver = dataclasses.replace(SOLVER, check_every=2, max_steps=5)
    assert_the_same((quadratic, params(), meta_params()), solver, eg.T1T2())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what torch's compiler imports
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's compiler needs g++")
def test_the_loop_of_the_compiler_stops_where_single_steps_do(monkeypatch):
    """Under a tolerance; with data that share memory, and params that are not contiguous."""
    monkeypatch.setattr(compiled, "_compiled", {})
    first = X[:2]

    def inner(params, meta):
        fits = mse_loss(X @ params["w"], X) + mse_loss(first @ params["w"], -first)
        return fits + meta["strength"] * params["w"].square().sum()

    bilevel = eg.Bilevel(inner, lambda params, meta: params["w"].square().sum())
    start = {"w": torch.tensor([[0.3, -0.2], [0.1, 0.4]], dtype=torch.float64).mT}
    solver = dataclasses.replace(SOLVER, max_steps=2000, tol=1e-7, check_every=4)
    assert_the_same((bilevel, start, meta_params()), solver, eg.T1T2())


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 13, 30, 31])
def test_a_phase_takes_exactly_its_steps(compilations, limit, monkeypatch):
    monkeypatch.setattr(compiled, "LONGEST", 10)
    solver = dataclasses.replace(SOLVER, max_steps=limit)
    assert_the_same((problem(), params(), meta_params()), solver, eg.T1T2())


def test_samples_settle_each_by_its_own_norm_in_compiled_steps(compilations):
    """Three samples of curvatures 1, 1/2 and 1/20, of which the last decides."""
    rates = torch.tensor([1.0, 0.5, 0.05], dtype=torch.float64)

    def inner(params, meta):
        return ((params["w"] - meta["strength"]).square().sum(1) * rates).sum()

    bilevel = eg.Bilevel(inner, lambda p, m: p["w"].square().sum(), samples=True)
    start = {"w": torch.ones(3, 2, dtype=torch.float64)}
    solver = eg.GradientDescent(lr=0.3, tol=1e-6, max_steps=2000, check_every=4)
    settled = [
        eg.settle(bilevel, start, meta_params(), solver=dataclasses.replace(solver, compile=way))
        for way in (False, True)
    ]
    assert settled[0].phase.steps == settled[1].phase.steps
    torch.testing.assert_close(settled[0].params["w"], settled[1].params["w"])


def test_compiles_once_for_all_of_an_outer_loop(compilations):
    for strength, beta in ((0.1, 0.1), (0.2, -0.1), (0.3, 0.5)):
        # a new problem, new data, another θ and β: none of them is part of the code
        case = problem(Y + strength), params(), meta_params(strength)
        assert_the_same(case, SOLVER, eg.Contrastive(beta=beta, scheme="forward", nudge="loss"))
    assert len(compilations) == 2  # of the free phase, and of a nudged one


def test_a_number_that_the_loss_reads_cannot_go_stale(compilations):
    for scale in (1.0, 0.5):
        assert_the_same((problem(scale=scale), params(), meta_params()), SOLVER, eg.T1T2())
    assert len(compilations) == 2


def test_a_phase_that_diverges_says_what_it_says_in_eager_mode(compilations):
    said = []
    for compile in (False, True):
        solver = dataclasses.replace(SOLVER, lr=1e60, max_steps=30, compile=compile)
        with pytest.raises(SettlingError, match="diverged: its residual") as caught:
            eg.meta_gradient(problem(), params(), meta_params(), solver=solver)
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert compilations


def drops(params, meta):
    return dropout(predict(params) * meta["strength"], 0.5).sum()


STATISTICS = torch.zeros(3, dtype=torch.float64)


def keeps_statistics(params, meta):
    STATISTICS.view(3).mul_(0.9)
    return (predict(params) * meta["strength"]).sum()


def looks(params, meta):
    error = mse_loss(predict(params) * meta["strength"], Y)
    return error if error < 1 else error.sqrt()


class Unseen(torch.autograd.Function):
    """Computes where torch does not see it."""

    @staticmethod
    def forward(ctx, w):
        ctx.save_for_backward(w)
        return w.square().sum()

    @staticmethod
    def backward(ctx, *grad_outputs):
        (w,) = ctx.saved_tensors
        return torch.from_numpy(2 * w.numpy())


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (drops, "losses that draw random numbers"),
        (keeps_statistics, "losses that change a tensor in place"),
        (looks, "reads values"),
        (lambda params, meta: Unseen.apply(params["w"]) + meta["strength"], "outside of torch"),
    ],
    ids=["dropout", "buffer", "branch", "numpy"],
)
def test_what_would_not_be_the_same_at_every_step_is_refused(compilations, loss, reason):
    outer = lambda params, meta: params["w"].sum()  # noqa: E731
    solver = dataclasses.replace(SOLVER, compile=True)
    with pytest.raises(ConfigurationError, match=f"{reason}.*compile=False"):
        eg.meta_gradient(eg.Bilevel(loss, outer), params(), meta_params(), solver=solver)


def test_what_needs_every_single_step_is_refused():
    solver = dataclasses.replace(SOLVER, compile=True)
    inner = lambda params, meta, batch: mse_loss(predict(params)[batch], Y[batch])  # noqa: E731
    outer = lambda params, meta: (params["w"] * meta["strength"]).sum()  # noqa: E731
    batched = eg.Bilevel(inner, outer, inner_batches=[[0], [1, 2]])
    with pytest.raises(ConfigurationError, match=r"2 mini-batches.*compile=False"):
        eg.meta_gradient(batched, params(), meta_params(), solver=solver)
    with pytest.raises(ConfigurationError, match=r"every single step.*compile=False"):
        eg.meta_gradient(problem(), params(), meta_params(), solver=solver, estimator=eg.Unrolled())
    with pytest.raises(ConfigurationError, match=r"LBFGS.*compile=False"):
        eg.LBFGS(compile=True)


def test_a_compiler_that_is_not_there(compilations, monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "nowhere")
    solver = dataclasses.replace(SOLVER, compile=True)
    with pytest.raises(ConfigurationError, match=r"C\+\+ compiler.*compile=False"):
        eg.meta_gradient(problem(), params(), meta_params(), solver=solver)


@pytest.fixture
def graphed(monkeypatch):
    """What is captured on a GPU runs anew here, into the same tensors; lists what ran."""
    runs = []

    def capture(run):
        results = run()

        def replay():
            runs.append(run)
            for kept, new in zip(tree_leaves(results), tree_leaves(run()), strict=True):
                graphs._span(kept).copy_(graphs._span(new))
            return results

        return replay

    monkeypatch.setattr(graphs, "_capture", capture)
    monkeypatch.setattr(compiled, "_graphs", {})
    return runs


GRAPHED = dataclasses.replace(SOLVER, compile="graph")


@pytest.mark.parametrize("build", [problem, synapse_problem])
def test_steps_on_tensors_of_their_own_are_eager_ones(build, graphed):
    made = build()
    bilevel, start, meta = made if isinstance(made, tuple) else (made, params(), meta_params())
    rule = eg.Contrastive(beta=0.1, scheme="symmetric", nudge="loss")
    eager, own = (
        eg.meta_gradient(bilevel, start, meta, solver=solver, estimator=rule)
        for solver in (SOLVER, GRAPHED)
    )
    for name, grad in eager.grads.items():
        torch.testing.assert_close(own.grads[name], grad, rtol=1e-12, atol=1e-14)
    assert own.gradient_evaluations == eager.gradient_evaluations
    assert graphed


def test_what_does_not_depend_on_params_is_computed_once_a_phase(graphed):
    features = torch.randn(3, 3, dtype=torch.float64)

    def inner(params, meta):
        return mse_loss(torch.tanh(features @ X).mul(meta["strength"]) @ params["w"], Y)

    bilevel = eg.Bilevel(inner, lambda params, meta: params["w"].square().sum())
    solver = dataclasses.replace(GRAPHED, max_steps=30)
    with Evaluation(bilevel, params(), meta_params()) as evaluation:
        evaluation.settle(solver)
        first = len(graphed)
        evaluation.settle(solver)
    once = [run for run in graphed[first:] if isinstance(run(), dict)]
    assert len(once) == 1
    assert len(graphed) - first - len(once) == 9 + 3  # the last three steps one by one


def test_a_new_batch_is_seen_by_steps_that_are_kept(graphed):
    for target in (Y, -Y, 2 * Y):
        eager, own = (
            eg.meta_gradient(
                problem(target), params(), meta_params(), solver=solver, estimator=eg.T1T2()
            )
            for solver in (SOLVER, GRAPHED)
        )
        torch.testing.assert_close(own.params["w"], eager.params["w"], rtol=1e-13, atol=0)
    assert len(compiled._graphs) == 1


def test_memory_that_a_call_writes_to_is_prepared_in_its_place(graphed):
    def inner(params, meta):
        table = torch.zeros(2, dtype=torch.float64)
        table[0] = meta["strength"]
        table[1] = params["w"][0]
        return (table * params["w"]).square().sum() + params["w"].square().sum()

    bilevel = eg.Bilevel(inner, lambda params, meta: params["w"].sum())
    eager, own = (
        eg.meta_gradient(bilevel, params(), meta_params(), solver=solver, estimator=eg.T1T2())
        for solver in (SOLVER, GRAPHED)
    )
    torch.testing.assert_close(own.params["w"], eager.params["w"], rtol=1e-13, atol=0)


def test_inputs_that_overlap_themselves_keep_their_layout(graphed):
    wide = Y[:, None].expand(3, 2)

    def inner(params, meta):
        return mse_loss(wide * params["w"], X) + meta["strength"] * params["w"].square().sum()

    bilevel = eg.Bilevel(inner, lambda params, meta: params["w"].sum())
    eager, own = (
        eg.meta_gradient(bilevel, params(), meta_params(), solver=solver, estimator=eg.T1T2())
        for solver in (SOLVER, GRAPHED)
    )
    torch.testing.assert_close(own.params["w"], eager.params["w"], rtol=1e-13, atol=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_a_graph_needs_a_card():
    with pytest.raises(ConfigurationError, match="CUDA device"):
        eg.meta_gradient(problem(), params(), meta_params(), solver=GRAPHED, estimator=eg.T1T2())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cuda_graph_ends_where_eager_steps_do():
    torch.set_default_device("cuda")
    try:
        net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        synapse = eg.nn.ComplexSynapse(net.double(), strength=0.1)
        x, y = X.cuda(), Y.cuda()
        bilevel = eg.Bilevel(
            lambda p, m: mse_loss(synapse(p, x).squeeze(), y),
            lambda p, m: synapse(p, x).square().mean(),
            regularizer=synapse,
        )
        eager, graph = (
            eg.meta_gradient(
                bilevel,
                synapse.params(),
                synapse.meta_params(),
                solver=solver,
                estimator=eg.Contrastive(beta=0.1, scheme="forward", nudge="loss"),
            )
            for solver in (SOLVER, GRAPHED)
        )
    finally:
        torch.set_default_device("cpu")
    for name, grad in eager.grads.items():
        torch.testing.assert_close(graph.grads[name], grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("word", ["cuda", 1.5, None])
def test_a_way_of_compiling_that_is_not_one_is_named(word):
    with pytest.raises(ConfigurationError, match="compile must be True, False"):
        dataclasses.replace(SOLVER, compile=word)
