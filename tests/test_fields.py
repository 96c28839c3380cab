"""Every field of every solver, estimator, controller, problem and sampler refuses a wrong value."""

import inspect
import math
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, replace
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch

import equigrad as eg
from equigrad.fields import DIFFERENT, Checked, Count, Positive, Rule, expect
from equigrad.nn import LearnedStart
from equigrad.solvers.update_rules import UPDATE_RULES

NUMBERS = (float, int)
GIVEN: dict[str, Any] = {
    "optimizer": torch.optim.SGD,
    "images_by_class": torch.rand(5, 20, 3),
    "model": LearnedStart(torch.nn.Linear(1, 1)),
    "solver": eg.Picard(),
    "estimator": eg.Contrastive(),
    "rule": UPDATE_RULES[torch.optim.SGD],
    "options": {},
}
"""Values of fields without a default; others are functions."""


def concrete(kind: type) -> Iterator[type]:
    for child in kind.__subclasses__():
        if child.__module__.startswith("equigrad.") and "experiments" not in child.__module__:
            if not inspect.isabstract(child):
                yield child
            yield from concrete(child)


for package in (eg, eg.controllers, eg.estimators, eg.nn, eg.solvers, eg.tasks, eg.training):
    for exported in dir(package):
        getattr(package, exported)  # imports it: packages are lazy

CLASSES = sorted(set(concrete(Checked)), key=lambda kind: kind.__name__)


def make(kind: Any) -> Any:
    needed = [
        f.name for f in fields(kind) if f.init and {f.default, f.default_factory} == {MISSING}
    ]
    return kind(**{name: GIVEN.get(name, torch.tanh) for name in needed})


def options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def hints(kind: type) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Every field that is given, with what its annotation allows."""
    found = get_type_hints(kind)
    for field in fields(kind):
        if field.init:
            yield field.name, options(found[field.name])


def wrong(allowed: tuple[Any, ...]) -> Iterator[Any]:
    """Values that fit none of what is allowed, for fields that are numbers, words or yes and no."""
    words = [word for kind in allowed if get_origin(kind) is Literal for word in get_args(kind)]
    if not words and not {*allowed} & {*NUMBERS, bool}:
        return
    yield from (math.nan, math.inf, -math.inf, 1j, "0.1", "no", [], torch.ones(3), np.ones(3))
    yield from (torch.tensor(math.nan), np.float32("nan"), torch.ones, float)
    yield from (word[:-1] for word in words)
    yield from () if NoneType in allowed else (None,)
    yield from (1, 0) if bool in allowed else (True, np.True_)
    yield from (
        () if float in allowed else (10**40, -(2**63), 2.5, np.float64(2.5), torch.tensor(2.5))
    )


CHECKED = [
    pytest.param(kind, name, list(wrong(allowed)), id=f"{kind.__name__}-{name}")
    for kind in CLASSES
    for name, allowed in hints(kind)
    if [*wrong(allowed)]
]


def test_no_family_is_left_out():
    exported = {getattr(eg, name) for name in dir(eg)}
    for base in (eg.Solver, eg.Estimator, eg.controllers.Controller, eg.Problem):
        family = {kind for kind in exported if isinstance(kind, type) and issubclass(kind, base)}
        assert family - {base} <= {*CLASSES}
        assert len(family) > 2
    assert {eg.tasks.NWayKShot, eg.tasks.Sinusoids, eg.tasks.FewShotLearner} <= {*CLASSES}


@pytest.mark.parametrize(("kind", "name", "values"), CHECKED)
def test_a_wrong_value_is_named(kind, name, values):
    right = make(kind)
    for value in values:
        if name in kind.scheduled and value is torch.ones:  # a function of θ and the step, maybe
            continue
        with pytest.raises(eg.EquigradError) as caught:
            replace(right, **{name: value})
        said = str(caught.value)
        assert said.startswith(f"{kind.__name__}({name}=")
        assert f"): {name} must be " in said


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_numbers_may_be_of_torch_or_numpy(kind):
    right = make(kind)
    for name, allowed in hints(kind):
        value = getattr(right, name)
        if type(value) in NUMBERS and {*allowed} & {*NUMBERS}:
            for same in (torch.tensor(value), np.asarray(value), np.asarray(value)[()]):
                assert getattr(replace(right, **{name: same}), name) == same
        elif type(value) is bool:
            replace(right, **{name: np.bool_(value)})


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_a_field_that_is_an_object_refuses_a_number(kind):
    right = make(kind)
    for name, allowed in hints(kind):
        plain = {*allowed} & {*NUMBERS, bool, Any} or getattr(allowed[0], "_is_protocol", False)
        if not plain and get_origin(allowed[0]) is not Literal:
            with pytest.raises(eg.EquigradError, match=f"{name} must be .*, got 3"):
                replace(right, **{name: 3})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda lr: eg.GradientDescent(lr=lr("0.1")),
            "GradientDescent(lr='0.1'): lr must be a finite number above 0, got '0.1' (a str)",
        ),
        (
            lambda lr: eg.GradientDescent(lr=lr(torch.ones(3))),
            "GradientDescent(lr=tensor([1., 1., 1.])): lr must be a finite number above 0, got "
            "tensor([1., 1., 1.]) (a Tensor of shape (3,))",
        ),
        (
            lambda any: eg.Contrastive(scheme=any("symetric")),
            "Contrastive(scheme='symetric'): scheme must be 'forward', 'symmetric' or "
            "'holomorphic', got 'symetric'. Did you mean 'symmetric'?",
        ),
        (
            lambda any: eg.Adjoint(solver=any(eg.Picard)),
            "Adjoint(solver=the class Picard): solver must be a Solver, got the class Picard",
        ),
        (
            lambda any: eg.GradientFlow(tau=any({"w": 0})),
            "GradientFlow(tau={'w': 0}): tau must be a finite number above 0 or a mapping from a "
            "string to a finite number above 0, got {'w': 0}",
        ),
    ],
)
def test_the_error_in_full(make, message):
    with pytest.raises(eg.ConfigurationError) as caught:
        make(lambda value: value)
    assert str(caught.value) == message


def test_what_tuples_hold():
    counts = Annotated[tuple[Count, ...], DIFFERENT]
    for fine in ((1, 2), [1, 2], (5,)):
        expect(counts, counts=fine)
    for bad in ((), (1, 1), (0,), (1.5,), 3, "12", None, torch.ones(2)):
        with pytest.raises(eg.ConfigurationError, match="each a whole number of at least 1, at"):
            expect(counts, counts=bad)
    with pytest.raises(eg.ConfigurationError, match="a tuple of 2 values, each a finite number"):
        expect(tuple[float, float], pair=(1.0,))


def test_the_remedy_is_that_of_the_rule():
    small = Annotated[Positive | None, Rule("below 1", lambda x: x is None or x < 1, "halve it")]
    expect(small, x=0.5, y=None)
    with pytest.raises(eg.ConfigurationError, match=r"got 2; halve it$"):
        expect(small, x=2)


def test_fields_of_a_users_solver():
    class Unknown:
        pass

    @dataclass(frozen=True, kw_only=True)
    class Mine(eg.Picard):
        rate: Positive = 1.0
        other: "Unknown | int" = 3  # a name that is not there when the class is looked at
        anything: Any = None

    @dataclass(frozen=True, kw_only=True)
    class Other(eg.Picard):
        check_every: int = 5

    with pytest.raises(
        eg.ConfigurationError, match=r"^Other\(check_every=0\): .* at least 1, got 0"
    ):
        Other(check_every=0)
    assert Mine(other=Unknown()).check_every == 1
    with pytest.raises(eg.ConfigurationError, match=r"^Mine\(damping=2\): damping must be"):
        Mine(damping=2)
