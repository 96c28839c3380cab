"""Schedules, clipping, accumulation, and going on from the last outer step's state."""

import dataclasses
from functools import partial
from typing import Any, Literal

import pytest
import torch
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

import equigrad as eg

X = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)).double()
Y = torch.randn(12, generator=torch.Generator().manual_seed(1)).double()
BATCHES = [slice(0, 5), slice(5, 9), slice(9, 12)]


def inner(p, m, batch):
    fit = (X[batch] @ p["w"] - Y[batch]).square().mean()
    return fit + m["l"].exp() * p["w"].square().sum()


def outer(p, m):
    return (p["w"] - 1).square().sum()


PROBLEM = eg.Bilevel(inner, outer, inner_batches=BATCHES)


def start():
    return {"w": torch.zeros(4).double()}, {"l": torch.tensor(-1.0).double()}


def warm_up(optimizer):
    parts = [LinearLR(optimizer, 0.1, 1.0, 5), ExponentialLR(optimizer, 0.99)]
    return SequentialLR(optimizer, parts, [5])


SETUPS = [
    {"optimizer": SGD, "options": {"lr": 0.05, "momentum": 0.9}, "scheduler": warm_up},
    {
        "optimizer": AdamW,
        "options": {"lr": 0.05},
        "scheduler": partial(CosineAnnealingLR, T_max=99),
    },
    {"optimizer": Adam, "options": {"lr": 0.05}, "clip_norm": 0.3, "clip_value": 0.25},
    {"optimizer": SGD, "options": {"lr": 0.1, "momentum": 0.5}, "accumulate": 3},
    {
        "optimizer": SGD,
        "options": {"lr": 0.1, "momentum": 0.5},
        "accumulate": 2,
        "clip_norm": 0.5,
        "scheduler": partial(ExponentialLR, gamma=0.97),
    },
]


class Plain:
    """The training loop as people write it."""

    def __init__(
        self, optimizer, options, scheduler=None, clip_norm=None, clip_value=None, accumulate=1
    ):
        self.w = torch.zeros(4).double().requires_grad_()
        self.optimizer = optimizer([self.w], **options)
        self.schedule = scheduler and scheduler(self.optimizer)
        self.clip_norm, self.clip_value, self.accumulate = clip_norm, clip_value, accumulate

    def train(self, steps, first, beta=0.0, force: Any = 0.0):
        meta = start()[1]
        for t in range(first, first + steps):
            loss = inner({"w": self.w}, meta, BATCHES[t % 3]) + beta * (self.w * force).sum()
            (loss / self.accumulate).backward()
            if (t + 1) % self.accumulate:
                continue
            if self.clip_value:
                torch.nn.utils.clip_grad_value_([self.w], self.clip_value)
            if self.clip_norm:
                torch.nn.utils.clip_grad_norm_([self.w], self.clip_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.schedule:
                self.schedule.step()
        return self.w.detach().clone()


@pytest.mark.parametrize("setup", SETUPS)
def test_phases_are_the_plain_training_loop(setup):
    """The free phase, and nudged ones that go on: moments, rates and waiting gradients."""
    free, nudged, beta = 41, 10, 0.1
    solver = eg.TorchOptimizer(**setup, max_steps=free)
    rule = eg.Contrastive(
        beta=beta, scheme="forward", nudged_solver=dataclasses.replace(solver, max_steps=nudged)
    )
    found = eg.meta_gradient(PROBLEM, *start(), solver=solver, estimator=rule)

    ends = []
    for strength in (0.0, beta):
        plain = Plain(**setup)
        settled = plain.train(free, 0)
        ends.append(plain.train(nudged, free, strength, 2 * (settled - 1)))
    torch.testing.assert_close(found.params["w"], settled, rtol=1e-10, atol=1e-12)
    slopes = [torch.tensor(-1.0).double().exp() * w.square().sum() for w in ends]
    assert found.grads["l"].item() == pytest.approx(
        ((slopes[1] - slopes[0]) / beta).item(), rel=1e-7
    )


@pytest.mark.parametrize("setup", SETUPS)
def test_the_next_outer_step_goes_on_from_the_state(setup):
    solver = eg.TorchOptimizer(**setup, max_steps=20)
    rule = eg.Contrastive(beta=0.1, nudged_solver=dataclasses.replace(solver, max_steps=6))
    params, meta = start()
    result = None
    for _ in range(2):
        result = eg.meta_gradient(
            PROBLEM, params, meta, solver=solver, estimator=rule, previous=result
        )
        params = result.params
    torch.testing.assert_close(params["w"], Plain(**setup).train(40, 0), rtol=1e-10, atol=1e-12)


def test_what_cannot_go_on_is_refused():
    solver = eg.TorchOptimizer(optimizer=SGD, options={"lr": 0.05}, max_steps=20)
    result = eg.meta_gradient(PROBLEM, *start(), solver=solver)
    other = eg.GradientDescent(lr=0.05)
    with pytest.raises(eg.ConfigurationError, match="cannot continue from previous"):
        eg.meta_gradient(PROBLEM, *start(), solver=other, previous=result)
    with pytest.raises(eg.ConfigurationError, match="Unrolled needs all steps"):
        eg.meta_gradient(PROBLEM, *start(), solver=other, estimator=eg.Unrolled(), previous=result)


class TestSchedulesThatEnd:
    def result(self, scheduler, momentum: Literal["keep", "reset"] = "keep", **changed):
        nudged_scheduler = changed.pop("nudged_scheduler", scheduler)
        solver = eg.TorchOptimizer(
            optimizer=SGD, options={"lr": 0.05}, max_steps=30, scheduler=scheduler
        )
        nudged = dataclasses.replace(solver, max_steps=12, scheduler=nudged_scheduler, **changed)
        rule = eg.Contrastive(beta=0.1, nudged_solver=nudged, momentum=momentum)
        return eg.meta_gradient(PROBLEM, *start(), solver=solver, estimator=rule)

    zero = staticmethod(partial(LinearLR, start_factor=1.0, end_factor=0.0, total_iters=30))

    def test_at_zero_leave_nothing_to_contrast(self):
        with pytest.raises(eg.ConfigurationError, match=r"0\.0% of its largest.*momentum='reset'"):
            self.result(self.zero)

    def test_at_zero_serve_with_what_the_message_advises(self):
        again = self.result(self.zero, momentum="reset")
        constant = self.result(self.zero, nudged_scheduler=None)
        assert min(again.grads["l"].abs(), constant.grads["l"].abs()) > 1e-3

    def test_near_zero_are_named(self):
        low = partial(LinearLR, start_factor=1.0, end_factor=0.002, total_iters=30)
        assert "has fallen to 0.2% of its largest value" in self.result(low).status
        assert "largest value" not in self.result(warm_up).status

    def test_of_a_fixed_length_are_too_short(self):
        cycle = partial(OneCycleLR, max_lr=0.1, total_steps=30)
        with pytest.raises(eg.ConfigurationError, match="scheduler has no more steps"):
            self.result(cycle)

    def test_phases_too_short_for_a_step_are_refused(self):
        with pytest.raises(
            eg.ConfigurationError, match=r"accumulate=16 .*max_steps=12 batches, too few"
        ):
            self.result(None, accumulate=16)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"scheduler": ReduceLROnPlateau}, "ReduceLROnPlateau, which needs a metric"),
        (
            {"scheduler": lambda optimizer: None},
            "takes the optimizer and returns .*LRScheduler.*returned NoneType",
        ),
        ({"scheduler": 3}, "scheduler must be a function"),
        ({"clip_norm": 0.0}, "clip_norm must be a finite number above 0"),
        ({"accumulate": 0}, "accumulate must be a whole number of at least 1"),
        ({"optimizer": torch.optim.LBFGS, "accumulate": 2}, "cannot accumulate"),
    ],
)
def test_bad_settings_are_refused(wrong, words):
    with pytest.raises(eg.ConfigurationError, match=words):
        eg.TorchOptimizer(**{"optimizer": SGD, **wrong})
