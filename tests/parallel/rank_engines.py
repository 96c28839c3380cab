"""Every estimator under every engine: two processes equal one, or say why not."""

import functools
from collections.abc import Callable

import torch
from rank_toolbox import (
    CHECKS,
    ENGINES,
    SETTINGS,
    agree,
    alone,
    fully_sharded,
    learned_center,
    learned_start,
    plain,
    problem,
    refused,
    result,
    same,
    sharded,
)

import equigrad as eg
from equigrad.estimators import ESTIMATORS


def meets(kind: type[eg.Estimator], engine: Callable, *, served: bool) -> None:
    """Two processes equal one; or both refuse, in words that say why."""
    estimator = kind(**SETTINGS.get(kind.__name__, {}))
    make = problem
    if kind.traits.needs_start:
        make = learned_start
    elif kind is eg.IMAML:
        make = learned_center
    if not served:
        words = "forward" if kind is eg.ForwardMode else "start that is learned"
        refused(lambda: result(estimator, engine, make), words)
        return
    both = result(estimator, engine, make)
    agree(both)
    # differences of gradients, divided by their distance
    within = 1e-9 if kind.__name__ == "FiniteDifferenceT1T2" else 1e-10
    same(both, by_itself(kind, make), within)


@functools.cache
def by_itself(kind: type[eg.Estimator], make: Callable) -> eg.MetaGradient:
    """What one process with all the data finds."""
    return result(kind(**SETTINGS.get(kind.__name__, {})), alone, make)


for _kind in ESTIMATORS:
    for _name, _engine in ENGINES.items():
        _start = _kind.traits.needs_start
        _served = {sharded: not (_start or _kind is eg.ForwardMode), fully_sharded: not _start}.get(
            _engine, True
        )
        CHECKS[f"{_kind.__name__}-{_name}"] = functools.partial(
            meets, _kind, _engine, served=_served
        )


VARIANTS: dict[str, Callable[[Callable], eg.MetaGradient]] = {
    "symmetric": lambda e: result(eg.Contrastive(beta=1e-2, scheme="symmetric"), e),
    "force": lambda e: result(eg.Contrastive(beta=1e-2, nudge="force"), e),
    "unmatched": lambda e: result(eg.Contrastive(beta=1e-2, matched=False), e),
    "rtol": lambda e: result(
        eg.Contrastive(rtol=0.1), e, solver=eg.GradientDescent(lr=0.3, momentum=0.8, max_steps=40)
    ),
    "contrast products": lambda e: result(
        eg.ConjugateGradient(products="contrast", max_iterations=3), e
    ),
    "contrast steps": lambda e: result(eg.Unrolled(products="contrast"), e),
    "learned center": lambda e: result(eg.Contrastive(beta=1e-2), e, learned_center),
    "LBFGS": lambda e: result(eg.T1T2(), e, solver=eg.LBFGS(max_steps=8)),
    "AdamW": lambda e: result(
        eg.Contrastive(beta=1e-2),
        e,
        solver=eg.TorchOptimizer(
            optimizer=torch.optim.AdamW, options={"lr": 0.05, "weight_decay": 0.0}, max_steps=6
        ),
    ),
}


def variant(name: str, engine: Callable) -> None:
    both = VARIANTS[name](engine)
    agree(both)
    # products by contrast divide rounding errors by a distance of 1e-5
    loose = name in ("contrast products", "contrast steps", "LBFGS")
    same(both, VARIANTS[name](alone), 1e-8 if loose else 1e-10)


for _name in VARIANTS:
    CHECKS[f"{_name}-plain"] = functools.partial(variant, _name, engine=plain)
for _name in ("force", "AdamW", "LBFGS", "learned center"):
    CHECKS[f"{_name}-DTensor"] = functools.partial(variant, _name, engine=sharded)
    CHECKS[f"{_name}-FSDP2"] = functools.partial(variant, _name, engine=fully_sharded)
