"""The examples of docs/any-learner.md, run as they stand, against implicit differentiation."""

import re
from pathlib import Path

import pytest

import equigrad as eg

PAGE = Path(__file__).parent.parent / "docs" / "any-learner.md"


def test_the_shortest_example_makes_a_solver():
    scope = {}
    exec(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[0], scope)
    assert scope["solver"].max_steps == 1


def example(title):
    section = PAGE.read_text().split(f"\n## {title}\n")[1]
    scope = {}
    exec(
        compile(re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0], str(PAGE), "exec"), scope
    )
    return scope


@pytest.mark.parametrize(
    ("title", "rtol"),
    [
        ("scipy", 1e-3),  # β² = 1e-4, by curvatures near one
        ("CMA-ES", 1e-2),  # β² = 2.5e-3
        ("scikit-learn", 1e-2),
    ],
)
def test_an_example_gives_the_meta_gradient(title, rtol, capsys):
    scope = example(title)
    result = scope["result"]
    exact = eg.meta_gradient(
        scope["problem"],
        scope["params"],
        scope["meta_params"],
        solver=eg.LBFGS(tol=1e-12),
        estimator=eg.ExactSolve(),
    )
    assert exact.phases[0].outcome == "converged"
    assert result.status.startswith("converged")
    assert "learner" not in result.status
    for name, grad in exact.grads.items():
        assert (result.grads[name] - grad).norm() <= rtol * grad.norm()
    assert "converged" in capsys.readouterr().out
    if title == "scikit-learn":
        assert (result.grads["weight"][:2] > 0).all()
        assert result.grads["weight"][2:].max() < result.grads["weight"][:2].min()
