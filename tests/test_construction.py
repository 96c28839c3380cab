"""A call that makes an object says what was wrong with it, for every class that users make."""

import copy
import dataclasses
import inspect
import pickle
import pydoc
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import equigrad as eg
from equigrad.fields import Positive
from test_fields import CLASSES, make

ADAM: Any = torch.optim.Adam


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_an_argument_that_is_no_field_is_named(kind):
    right = make(kind)
    with pytest.raises(kind.refusal, match=f"^{kind.__name__} has no 'qzx'"):
        dataclasses.replace(right, qzx=3)
    names = list(inspect.signature(kind).parameters)
    for name in names:
        with pytest.raises(kind.refusal, match=f"has no '{name}x'. .*{name}") as caught:
            kind(**{f"{name}x": 1})
        assert caught.value.__cause__ is None
        assert str(caught.value).endswith(f"It takes {', '.join(names)}")


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_too_many_arguments_without_a_name_are_named(kind):
    places = [
        n for n, p in inspect.signature(kind).parameters.items() if p.kind is not p.KEYWORD_ONLY
    ]
    with pytest.raises(kind.refusal, match=f"^{kind.__name__} takes .* by position, got 0.25"):
        kind(*[0.5] * len(places), 0.25)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_what_is_missing_is_named_and_nothing_else_is_needed(kind):
    needed = [n for n, p in inspect.signature(kind).parameters.items() if p.default is p.empty]
    if not needed:
        kind()
        return
    with pytest.raises(kind.refusal, match=f"^{kind.__name__} lacks '{needed[0]}'"):
        kind()


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_signatures_and_help_are_plain(kind):
    names = {f.name for f in dataclasses.fields(kind) if f.init}
    assert {*inspect.signature(kind).parameters} == names
    for said in (str(inspect.signature(kind)), pydoc.render_doc(kind)):
        assert "Rule(" not in said
        assert "<lambda>" not in said
        assert " at 0x" not in said


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda kind: kind(steps=3),
            "has no 'steps'. Did you mean 'max_steps'? It takes max_steps",
        ),
        (lambda kind: kind(0.1), "takes no argument by position, got 0.1. It takes max_steps"),
        (lambda kind: kind(0.1, lrs=1), "got 0.1. It has no 'lrs'. Did you mean 'lr'? It takes"),
    ],
)
def test_what_was_meant_is_said(call, message):
    with pytest.raises(eg.ConfigurationError) as caught:
        call(eg.GradientDescent)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda kind: kind(ADAM, lr=1e-3), "go into options={'lr': 0.001}. It lacks 'optimizer'"),
        (lambda kind: kind(optimizer=ADAM, fused=True), "go into options={'fused': True}"),
        (lambda kind: kind(optimizer=ADAM, weight_decay=0.1), "options={'weight_decay': 0.1}"),
        (lambda kind: kind(optimizer=ADAM, max_step=3), "Did you mean 'max_steps'?"),
        (lambda kind: kind(optimizer=3, lr=0.1), "go into options={'lr': 0.1}"),
    ],
)
def test_arguments_of_an_optimizer_go_into_its_options(call, message):
    with pytest.raises(eg.ConfigurationError) as caught:
        call(eg.TorchOptimizer)
    assert message in str(caught.value)


def test_a_problem_says_it_with_its_own_error():
    loss: Any = lambda p, m: p["w"]  # noqa: E731
    kind: Any = eg.Bilevel
    with pytest.raises(
        eg.ProblemError, match=r"Bilevel has no 'inner'\. Did you mean 'inner_loss'"
    ):
        kind(inner=loss, outer_loss=loss)
    with pytest.raises(eg.ProblemError, match="was given 'inner_loss' twice"):
        kind(loss, loss, inner_loss=loss)
    with pytest.raises(eg.ProblemError, match="takes 9 arguments by position, got 5"):
        kind(loss, loss, *[None] * 5, False, None, 5)


def test_other_errors_are_those_of_the_users_class():
    @dataclass(frozen=True, kw_only=True)
    class Mine(eg.Picard):
        rate: Positive = 1.0

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.rate > 1:
                len(self.rate)  # pyright: ignore

    assert Mine(rate=0.5).rate == 0.5
    with pytest.raises(TypeError, match="has no len"):
        Mine(rate=2)
    with pytest.raises(eg.ConfigurationError, match=r"^Mine has no 'rat'\. Did you mean 'rate'"):
        Mine(rat=2)  # pyright: ignore
    abstract: Any = eg.Solver
    with pytest.raises(TypeError, match="abstract"):
        abstract()


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_objects_can_still_be_copied_and_sent(kind):
    if issubclass(kind, eg.tasks.FewShotLearner):
        return
    right = make(kind)
    for twin in (copy.copy(right), pickle.loads(pickle.dumps(right))):
        for field in dataclasses.fields(kind):
            mine, its = getattr(right, field.name), getattr(twin, field.name)
            assert torch.equal(mine, its) if isinstance(mine, torch.Tensor) else mine == its


def loss(p, m):
    return (p["w"] - m["t"]).square().sum()


def with_batch(p, m, batch):
    return (p["w"] - m["t"] - batch).square().sum()


class AsMethod:
    def loss(self, p, m, batch):
        return with_batch(p, m, batch)


def fails_inside(p, m):
    return loss(p)  # type: ignore


BATCHES = [torch.ones(1)]


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (
            lambda: eg.Bilevel(loss, loss, inner_batches=BATCHES),
            "inner_loss is called as inner_loss(params, meta_params, batch) because "
            "inner_batches are given, but its signature is (p, m): add a third parameter for the "
            "batch, or leave out inner_batches",
        ),
        (
            lambda: eg.Bilevel(loss, loss, outer_batches=BATCHES),
            "outer_loss is called as outer_loss",
        ),
        (
            lambda: eg.Bilevel(with_batch, loss),
            "no inner_batches are given, but its signature is (p, m, batch): pass",
        ),
        (
            lambda: eg.Bilevel(loss, with_batch),
            "no outer_batches are given, but its signature is (p, m, batch): pass",
        ),
        (
            lambda: eg.Bilevel(AsMethod().loss, loss),
            "no inner_batches are given, but its signature is (p, m, batch)",
        ),
        (
            lambda: eg.Bilevel(lambda p: p, loss),
            "(params, meta_params), but its signature is (p): change it to accept",
        ),
        (
            lambda: eg.FixedPoint(with_batch, loss),
            "map is called as map(params, meta_params) becau",
        ),
        (
            lambda: eg.EnergyBased(with_batch, loss, torch.tanh),
            "its signature is (p, m, batch): change it to accept these",
        ),
    ],
)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_loss_that_cannot_be_called_so_is_named(problem, message, autocast):
    start, theta = {"w": torch.zeros(1)}, {"t": torch.ones(1)}
    with torch.autocast("cpu", enabled=autocast), pytest.raises(eg.ProblemError) as caught:
        eg.meta_gradient(problem(), start, theta, solver=eg.Picard(max_steps=2))
    assert message in str(caught.value)


def test_an_error_inside_a_loss_is_its_own():
    start, theta = {"w": torch.zeros(1)}, {"t": torch.ones(1)}
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'm'"):
        eg.meta_gradient(
            eg.Bilevel(fails_inside, loss), start, theta, solver=eg.GradientDescent(max_steps=2)
        )
