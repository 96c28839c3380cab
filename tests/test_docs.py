"""The Python examples of the documentation run as they stand."""

import re
from pathlib import Path

import pytest

import equigrad as eg

DOCS = Path(__file__).parent.parent / "docs"


def run_examples(page, marked="eg.meta_gradient("):
    scopes = []
    for code in re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL):
        if marked not in code:  # a fragment
            continue
        scopes.append({})
        exec(compile(code, page, "exec"), scopes[-1])
    return scopes


@pytest.mark.parametrize("page", ["index.md", "estimators.md", "least-control.md"])
def test_examples_run(page):
    scopes = run_examples(page)
    assert scopes
    assert all(isinstance(scope["result"], eg.MetaGradient) for scope in scopes)


def test_the_page_on_example_scores_finds_the_wrong_labels():
    (scope,) = run_examples("example-scores.md", "example_scores(")
    assert {*scope["found"].ranking()[:3]} == {*scope["wrong"]}
    assert scope["found"].trusted


def test_the_accuracy_page_keeps_its_promise():
    (scope,) = run_examples("accuracy.md")
    result = scope["result"]
    meta = {"strength": scope["torch"].full((5,), 0.1).double()}
    exact = eg.meta_gradient(
        scope["problem"],
        {"w": scope["torch"].zeros(5).double()},
        meta,
        solver=eg.LBFGS(tol=1e-12),
        estimator=eg.ExactSolve(),
    ).grads["strength"]
    error = ((result.grads["strength"] - exact).norm() / exact.norm()).item()
    assert error <= result.error_estimate <= 1e-3


def test_the_page_on_equilibrium_layers_settles():
    scopes = run_examples("equilibrium-layers.md", "eg.nn.EquilibriumLayer(\n")
    assert len(scopes) == 2
    for scope in scopes:
        assert scope["layer"].phase.outcome == "converged"
        assert all(p.grad.any() for p in scope["layer"].parameters())


def test_the_page_on_own_data_learns_from_python():
    (scope,) = run_examples("own-data.md", "from equigrad.sklearn import")
    assert scope["scores"].mean() > 0.9
    assert scope["model"].strengths_["0.weight"].shape == (16, 13)


def test_the_page_on_least_control_has_a_gradient_of_shared_weights():
    (scope,) = run_examples("meta-learning-under-control.md", "learner.meta_gradient(")
    assert sorted(scope["result"].grads) == ["0.bias", "0.weight"]
    assert all(grad.any() for grad in scope["result"].grads.values())


def test_the_page_on_few_shot_learning_learns_to_learn():
    """From 20 % by chance; the classes of the test lie apart from those that were learned."""
    (scope,) = run_examples("few-shot.md", "learn_tasks(\n")
    assert scope["score"].mean > 60
    labels = scope["new"].query[1][0]
    assert (scope["answers"] == labels).float().mean() > 0.4
    one, (x, _) = scope["model"], scope["new"].query
    alone = [one(query[None]).argmax(-1).item() for query in x[0]]  # not transductive
    assert alone == scope["answers"].tolist()


def test_the_page_on_energy_based_networks_learns_digits():
    """From 10 % by chance; a linear classifier reaches about 95 %."""
    (scope,) = run_examples("energy-based-networks.md")
    assert scope["accuracy"] > 0.92


def test_the_recurrent_network_of_the_page_learns_digits():
    (scope,) = run_examples("settling-networks.md", marked="train_network(")
    assert scope["accuracy"] > 0.9
    assert scope["state"].step == 5 * (1400 // 50)
