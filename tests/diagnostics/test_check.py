"""Does the check find what is wrong, and pass what is right?"""

import pytest
import torch

import equigrad as eg
from equigrad.testing import CASES, MAP_CASES, Quadratic, logistic_case, start_case
from helpers import call_main


def check(quadratic, steps, estimator, **options):
    return eg.check_meta_gradient(
        quadratic.problem,
        quadratic.params(),
        quadratic.meta_params(),
        solver=quadratic.solver(steps),
        estimator=estimator,
        **options,
    )


@pytest.mark.parametrize(
    ("steps", "estimator", "advice"),
    [
        (30, eg.Contrastive(beta=1e-3), "Settle longer: the free phase"),
        (
            400,
            eg.Contrastive(beta=0.5, scheme="forward", nudge="loss"),
            "too large for the curvature",
        ),
        (
            60,
            eg.Contrastive(beta=1e-3, matched=False, scheme="forward", nudge="loss"),
            "Use matched=True",
        ),
        (30, eg.Unrolled(), "Settle longer: the free phase"),
        (400, eg.T1T2(), "the error of T1T2 itself"),
        (
            400,
            eg.Contrastive(beta=1e-3, nudged_solver=eg.GradientDescent(lr=0.9, max_steps=2)),
            "give them more steps",
        ),
    ],
)
def test_what_is_wrong_is_found(quadratic, steps, estimator, advice):
    found = check(quadratic, steps, estimator)
    assert not found.passed
    assert "WRONG" in str(found)
    assert any(advice in sentence for sentence in found.advice), found.advice
    # the reported error is the true one
    true = quadratic.relative_error(found.result.grads["theta"])
    assert found.relative_error == pytest.approx(true, rel=1e-3)


def test_beta_too_small_for_float32():
    found = check(Quadratic(dtype=torch.float32), 400, eg.Contrastive(beta=1e-5))
    assert any("too small for torch.float32" in sentence for sentence in found.advice)


def test_beta_too_small_is_known_by_the_rounding_where_halving_it_says_otherwise():
    """Logistic regression, where half of this β has a smaller error by chance."""
    case = logistic_case(torch.float32)
    found = eg.check_meta_gradient(
        case.problem,
        case.params,
        case.meta_params,
        solver=case.solver,
        estimator=eg.Contrastive(beta=1e-7),
        rtol=1e-4,
    )
    assert "is too small for torch.float32" in found.advice[0]


@pytest.mark.parametrize("build", [*CASES, *MAP_CASES], ids=lambda build: build.__name__)
def test_what_is_right_passes(build):
    case = build(torch.float64)
    contrastive = eg.Contrastive(beta=1e-3, scheme="symmetric")
    found = eg.check_meta_gradient(
        case.problem,
        case.params,
        case.meta_params,
        solver=case.solver,
        estimator=contrastive if case.problem.energy else eg.GMRES(),
        rtol=1e-4,
    )
    assert found.passed, found
    assert found.advice == ()
    assert found.cosine > 1 - 1e-8
    for direction in found.directions:
        assert direction.estimated == pytest.approx(direction.reference, rel=1e-3)


def test_without_a_double_backward_differences_are_the_reference(quadratic):
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return 0.5 * x.square()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, *grads):  # pyright: ignore[reportIncompatibleMethodOverride]
            return grads[0] * ctx.saved_tensors[0]

    problem = eg.Bilevel(
        lambda p, m: Opaque.apply(p["w"] - m["c"].tanh()).sum(),
        lambda p, m: p["w"].cosh().log().sum(),
    )
    meta = {"c": torch.linspace(-1, 1, 5, dtype=torch.float64)}
    found = eg.check_meta_gradient(
        problem,
        {"w": torch.zeros(5, dtype=torch.float64)},
        meta,
        solver=eg.GradientDescent(lr=0.5, max_steps=100),
        estimator=eg.Contrastive(beta=1e-4, scheme="symmetric"),
    )
    assert found.passed
    assert "exact" not in found.reference


@pytest.mark.parametrize("estimator", [eg.T1T2(), eg.Contrastive()])
def test_a_reference_that_has_not_settled_does_not_pass_judgement(estimator):
    h = torch.tensor([1.0, 1e-4], dtype=torch.float64)
    problem = eg.Bilevel(
        lambda p, m: 0.5 * (h * (p["w"] - m["c"]).square()).sum(),
        lambda p, m: 0.5 * (p["w"] - 1).square().sum(),
    )
    found = eg.check_meta_gradient(
        problem,
        {"w": torch.zeros(2, dtype=torch.float64)},
        {"c": torch.full((2,), 2.0, dtype=torch.float64)},
        solver=eg.GradientDescent(lr=1.0, max_steps=100),
        estimator=estimator,
    )
    assert not found.passed
    assert "is right" not in str(found)
    assert all(direction.reference != 0 for direction in found.directions)


def test_random_state_is_as_before(quadratic):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    check(quadratic, 20, eg.Contrastive())
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("options", [{"directions": 0}, {"rtol": 0.0}, {"budget": 0}])
def test_bad_options(quadratic, options):
    (name,) = options
    with pytest.raises(eg.ConfigurationError, match=f"^{name} must be a (whole|finite) number"):
        check(quadratic, 20, eg.Contrastive(), **options)


FILE = """
import torch, equigrad as eg
from equigrad.testing import Quadratic
q = Quadratic()
right = {"problem": q.problem, "params": q.params(), "meta_params": q.meta_params(),
         "solver": q.solver(400), "estimator": eg.ConjugateGradient()}
def wrong():
    return {**right, "estimator": eg.T1T2()}
number = 3
odd = {**right, "speed": 1}
less = {"problem": q.problem}

problem, params, meta_params = q.problem, q.params(), q.meta_params()
solver, estimator = right["solver"], right["estimator"]


class Factory:
    def __call__(self):
        return right


def factory():
    return problem


def needy(scale):
    return right


def broken():
    raise ValueError("no data")


def leaving():
    raise SystemExit(0)


factory_object, module = Factory(), torch.nn.Linear(2, 2)
"""

ALONE = """
from equigrad.testing import Quadratic

problem = Quadratic().problem
"""

MAP = """
import torch, equigrad as eg

problem = eg.FixedPoint(
    map=lambda p, m: {"h": torch.tanh(m["w"] * p["h"] + 0.5)},
    outer_loss=lambda p, m: (p["h"] - 0.8).square().sum(),
)
energy = eg.EnergyBased(
    primitive=lambda p, m: (m["w"] * p["h"].square() + p["h"]).sum() / 2,
    outer_loss=lambda p, m: (p["h"] - 0.8).square().sum(),
    activation=torch.tanh,
)
params = {"h": torch.zeros(2, dtype=torch.float64)}
meta_params = {"w": torch.tensor(0.4, dtype=torch.float64)}
solver, estimator = eg.Picard(tol=1e-10), eg.Adjoint()
"""


@pytest.mark.parametrize(
    ("target", "code", "words"),
    [
        ("mine.py:right", 0, "The meta-gradient is right"),
        ("mine.py:wrong", 1, "The meta-gradient is WRONG: relative error 0.8"),
        ("mine.py:number", 2, "must be a dictionary"),
        ("mine.py:odd", 2, "has ['speed']"),
        ("mine.py:less", 2, "lacks ['meta_params', 'params', 'solver']"),
        ("mine.py:absent", 2, "defines no 'absent'"),
        ("gone.py:right", 2, "cannot read gone.py"),
        ("mine.py", 2, "as FILE.py:NAME, got mine.py"),
        ("mine.py:problem", 0, "The meta-gradient is right"),
        ("mine.py:factory", 0, "The meta-gradient is right"),
        ("mine.py:factory_object", 0, "The meta-gradient is right"),
        ("map.py:problem", 0, "The meta-gradient is right"),
        ("map.py:energy", 0, "The meta-gradient is right"),
        ("alone.py:problem", 2, "into its file under these names"),
        ("mine.py:needy", 2, "missing a required argument: 'scale'"),
        ("mine.py:module", 2, "missing 1 required positional argument"),
        ("mine.py:broken", 2, "mine.py:broken does not run: ValueError: no data"),
        ("mine.py:leaving", 2, "mine.py:leaving does not run: SystemExit: 0"),
        ("leaves.py:right", 2, "leaves.py does not run: SystemExit: 0"),
    ],
)
def test_on_the_command_line(tmp_path, monkeypatch, capsys, target, code, words):
    files = {"mine": FILE, "alone": ALONE, "map": MAP, "leaves": "raise SystemExit(0)"}
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    ended, said = call_main("check", target, capsys=capsys)
    assert ended == code
    assert words in said


def test_an_initialisation_has_no_gradient_at_equilibrium_to_compare_with():
    case = start_case(torch.float64)
    with pytest.raises(
        eg.ProblemError,
        match=r"depends on meta-parameter 'phi'.*does not depend on its initialisation",
    ):
        eg.check_meta_gradient(
            case.problem, case.params, case.meta_params, solver=case.solver, estimator=eg.MAML()
        )


@pytest.mark.parametrize(("entries", "directions"), [(1, 1), (2, 2), (3, 3), (5, 3)])
def test_no_direction_is_re_solved_twice(entries, directions):
    def inner_loss(p, m):
        return 0.5 * (p["w"] - m["a"] - m["b"].sum()).square().sum()

    theta = {
        "a": torch.tensor(0.3, dtype=torch.float64),
        "b": torch.linspace(0.5, 1.5, entries - 1, dtype=torch.float64),
    }
    if entries == 1:
        theta = {"a": theta["a"]}

        def inner_loss(p, m):
            return 0.5 * (p["w"] - m["a"]).square().sum()

    check = eg.check_meta_gradient(
        eg.Bilevel(inner_loss, lambda p, m: p["w"].square().sum()),
        {"w": torch.ones(2, dtype=torch.float64)},
        theta,
        solver=eg.GradientDescent(lr=0.5, tol=1e-9),
    )
    assert check.passed
    assert len(check.directions) == directions
    if entries <= 3:  # the axes: each is one entry of the gradient
        flat = torch.cat([g.reshape(-1) for g in check.result.grads.values()])
        assert [d.estimated for d in check.directions] == pytest.approx(flat.tolist())


@pytest.mark.parametrize("seed", [10**23, 2**64, 0.5, float("nan"), None])
def test_a_seed_that_is_none_is_named(seed):
    q = Quadratic()
    with pytest.raises(eg.ConfigurationError, match=r"^seed must be a whole number, got"):
        eg.check_meta_gradient(
            q.problem, q.params(), q.meta_params(), solver=q.solver(3), seed=seed
        )
