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


NOT_RUN = {
    "energy-based-networks.md": "run by a test of its own below",
    "few-shot.md": "needs a folder of a run, and is run below",
    "representation.md": "needs a folder of a run",
    "several-processes.md": "needs processes that torchrun joins",
    "speed.md": "compiles for half a minute; tests of compiled steps run the like",
}


@pytest.mark.parametrize("page", sorted(p.name for p in DOCS.glob("*.md")))
def test_the_code_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    if page in NOT_RUN:
        pytest.skip(NOT_RUN[page])
    monkeypatch.chdir(tmp_path)
    scope = {"__name__": page}
    for code in re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL):
        exec(compile(code, page, "exec"), scope)


def test_five_minutes_end_in_a_better_validation_loss_and_a_gradient_to_trust(capsys):
    scope = {}
    for code in re.findall(r"```python\n(.*?)```", (DOCS / "start.md").read_text(), re.DOTALL):
        exec(compile(code, "start.md", "exec"), scope)
    before, after = map(float, re.findall(r"validation loss ([\d.]+)", capsys.readouterr().out))
    assert after < 0.9 * before
    assert scope["result"].error_estimate < 0.1


def test_a_page_is_short_enough_to_be_read():
    """Reproductions apart, which are looked up."""
    index = (DOCS / "index.md").read_text()
    guides, _, reproductions = index.partition(":caption: Reproductions")
    assert reproductions
    for name in re.findall(r"(?m)^([a-z0-9-]+)$", guides):
        words = len((DOCS / f"{name}.md").read_text().split())
        assert words <= 1200, f"{name}: {words} words"


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


def test_the_page_on_argmin_gives_its_gradients():
    (scope,) = run_examples("argmin.md", "eg.argmin(")
    grads = [p.grad for p in scope["net"].parameters()]
    assert all(grad.any() for grad in grads)
    assert scope["log"].grad.any()
    assert scope["fit"].gradient.error_estimate < 0.1
    (scope,) = run_examples("argmin.md", "eg.fixed_point(")
    assert scope["rest"].phase.outcome == "converged"
    assert scope["w"].grad.any()


def test_the_page_on_learned_rates_has_a_gradient_of_each():
    (scope,) = run_examples("learned-rates.md")
    result = scope["result"]
    assert sorted(result.grads) == ["bias", "weight"]
    assert all(grad < 0 for grad in result.grads.values())  # larger steps would do better


def test_the_page_on_equilibrium_layers_settles():
    scopes = run_examples("equilibrium-layers.md", "eg.nn.EquilibriumLayer(\n")
    assert len(scopes) == 2
    for scope in scopes:
        assert scope["layer"].phase.outcome == "converged"
        assert all(p.grad.any() for p in scope["layer"].parameters())


def test_the_page_on_own_data_learns_from_python():
    (scope,) = run_examples("own-data.md", "from equigrad.sklearn import")
    assert scope["scores"].mean() > 0.9
    assert scope["model"].strengths_["0.weight"].shape == (1, 13)


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
