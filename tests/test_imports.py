"""What is imported when, in fresh processes, and that the registry says what the classes say."""

import importlib
import inspect
import json
import pkgutil
import pydoc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import equigrad
from equigrad import experiments
from equigrad.experiments.registry import COMMANDS
from equigrad.experiments.runs.experiment import Experiment
from equigrad.experiments.runs.reproduction import Reproduction
from helpers import call_main

EXTRAS = {"pandas", "sklearn", "matplotlib", "ray", "rich", "tyro", "tensorboard"}

MOST = 92
"""Modules of equigrad that a run of digits imports: all compute something in it."""

LAZY = [
    *("", ".controllers", ".diagnostics", ".estimators", ".evaluation", ".nn", ".problems"),
    *(".solvers", ".tasks", ".testing", ".training"),
]


def imported_by(lines: str) -> set[str]:
    """The modules that a fresh process has after some lines."""
    report = "import json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", f"{lines}\n{report}"], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def called(*words: str) -> str:
    call = f"from equigrad.cli import main\ntry:\n    main({list(words)})\n"
    return f"{call}except SystemExit:\n    pass"


def families(modules: set[str]) -> set[str]:
    return {module.partition(".")[0] for module in modules}


def test_the_library_imports_no_experiment_and_none_of_the_extras():
    modules = imported_by("import equigrad")
    assert not {m for m in modules if m.startswith("equigrad.experiments")}
    assert "equigrad.experiments.tables.tables" not in modules
    assert not families(modules) & EXTRAS
    assert "torch" not in modules


@pytest.mark.parametrize("package", LAZY)
def test_every_name_of_a_lazy_package_is_there(package):
    module = importlib.import_module(f"equigrad{package}")
    assert len(dir(module)) > 4
    assert [name for name in dir(module) if not hasattr(module, name)] == []
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = module.no_such_name


def test_a_function_is_not_hidden_by_the_module_of_its_name():
    lines = "import equigrad.solvers.settle as _, equigrad.solvers as s; assert callable(s.settle)"
    assert "equigrad.solvers.settle" in imported_by(lines)


def test_names_come_by_a_star_and_help_shows_them():
    scope: dict[str, object] = {}
    exec("from equigrad import *", scope)
    assert scope["meta_gradient"] is equigrad.meta_gradient
    page = pydoc.plain(pydoc.render_doc(equigrad))
    assert "class Contrastive(" in page
    assert "meta_gradient(" in page


def test_a_file_may_name_a_class_that_nothing_has_imported():
    lines = """
from equigrad import Contrastive
from equigrad.experiments.runs.config_file import overlay
rule = overlay(Contrastive(), {"nudged_solver": {"type": "LBFGS"}})
assert type(rule.nudged_solver).__name__ == "LBFGS"
"""
    assert "equigrad.solvers.lbfgs" not in imported_by("from equigrad import Contrastive")
    assert "equigrad.solvers.lbfgs" in imported_by(lines)


@pytest.mark.parametrize("words", [[], ["--help"], ["--version"], ["run", "--help"], ["rnu"]])
def test_help_imports_no_more_than_the_names(words):
    modules = imported_by(called(*words))
    own = {m for m in modules if m.startswith("equigrad.experiments.")}
    assert own == {"equigrad.experiments.registry"}
    assert not families(modules) & (EXTRAS | {"torch"})


def test_a_run_imports_its_own_experiment_alone(tmp_path):
    words = ["run", "digits", "--scale", "smoke", "--device", "cpu", "--out", str(tmp_path / "r")]
    modules = imported_by(called(*words))
    assert (tmp_path / "r" / "result.json").exists()
    own = {m for m in modules if m.partition(".")[0] == "equigrad"}
    others = {c.place.partition(":")[0] for c in COMMANDS} - {"strengths.digits"}
    assert not own & {f"equigrad.experiments.{other}" for other in others}
    assert len(own) <= MOST
    assert "ray" not in families(modules)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: f"{c.verb}-{c.name}")
def test_the_registry_says_what_the_class_says(command):
    by_class = command.kind.name if command.verb == "reproduce" else command.kind.__name__.lower()
    assert command.name == by_class
    said = inspect.getdoc(type(command.defaults()))
    assert said is not None
    assert command.summary == said.splitlines()[0]
    assert list(inspect.signature(command.work).parameters)[-2:] == ["resume", "console"]


def concrete(kind: type) -> Iterator[type]:
    if not inspect.isabstract(kind) and kind.__module__.startswith("equigrad."):
        yield kind
    for child in kind.__subclasses__():
        yield from concrete(child)


def test_every_experiment_and_reproduction_has_a_command():
    for module in pkgutil.walk_packages(experiments.__path__, "equigrad.experiments."):
        if not module.name.endswith("ray_trials"):
            importlib.import_module(module.name)
    there = {*concrete(Experiment), *concrete(Reproduction)} - {Experiment}
    # by name: the command line makes subclasses of the same name, with other defaults
    known = {c.kind.__qualname__ for c in COMMANDS if c.verb != "search"}
    assert known == {kind.__qualname__ for kind in there}


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (["rnu"], "run"),
        (["reprodcue", "table1"], "reproduce"),
        (["run", "digit"], "digits"),
        (["search", "cifar"], "cifar10"),
        (["reproduce", "tabel1"], "table1"),
        (["run", "digits", "--estimator", "nystrm"], "nystrom"),
        (["run", "omniglot", "--method", "repitle"], "reptile"),
    ],
)
def test_mistyped_words_are_told_what_comes_near(words, near, capsys):
    code, said = call_main(*words, capsys=capsys)
    assert code == 2
    assert f"Did you mean {near!r}?" in said


def test_without_words_the_help_is_printed(capsys):
    alone = call_main(capsys=capsys)
    assert alone == call_main("--help", capsys=capsys)
    assert alone[0] == 0


@pytest.mark.parametrize("width", [80, 100, 140])
def test_the_list_keeps_its_columns(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    code, said = call_main("list", capsys=capsys)
    assert code == 0
    headings = "Estimator How gradients error Order Memory Needs Start"
    assert all(word in said for word in headings.split())
    assert "needed" in said


def test_no_file_has_more_than_four_hundred_lines():
    source = Path(equigrad.__file__).parent
    long = {p.name: n for p in source.rglob("*.py") if (n := len(p.read_text().splitlines())) > 400}
    assert not long
