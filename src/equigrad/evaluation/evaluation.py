"""The evaluation that one meta-gradient is computed in."""

from contextlib import ExitStack
from typing import Self

from equigrad.evaluation import derivatives, phases
from equigrad.evaluation.given import agreed_seed, check_given, gathered
from equigrad.evaluation.reaches import find_reaches
from equigrad.evaluation.scene import Judged, Scene
from equigrad.evaluation.stage import Stage
from equigrad.evaluation.start import Start
from equigrad.evaluation.tally import Tally
from equigrad.problems import Params, Problem
from equigrad.problems.lowered import lower_precision, lowered
from equigrad.solvers import Settled, Solver
from equigrad.vectors import tracked


class Evaluation(Scene):
    """The interface of estimators to a problem, for the computation of one meta-gradient.

    Like a file, it is open as soon as it is made, and is used in a `with` statement: on exit, also
    by an exception, it restores everything that the phases have changed.

    `Scene` documents its attributes. The functions of `phases` and `derivatives` are its methods.

    Args:
        problem: the problem.
        params: φ at the start of the free phase.
        meta_params: θ.
        settled: the end of the free phase, if it has run already.
        seed: seed of the random numbers which that free phase drew.
        solver: the solver, whose settings may depend on θ.
        before: the end of an earlier free phase, whose solver state and step count are continued.

    Raises:
        ProblemError: losses or parameters are invalid.
    """

    def __init__(
        self,
        problem: Problem,
        params: Params,
        meta_params: Params,
        settled: Settled | None = None,
        seed: int | None = None,
        solver: Solver | None = None,
        before: Settled | None = None,
    ) -> None:
        there = gathered(problem, params, meta_params)
        problem, params, meta_params = there.problem, there.params, there.meta_params
        ranks, tally = problem.ranks, Tally()
        with ranks.together():
            check_given(problem, params, meta_params, tally)
            start = Start(params, meta_params)
        if ranks.group is not None:
            seed = agreed_seed(problem, params, meta_params, seed, tally)
        given = [*params.values(), *meta_params.values()]
        lower, problem = lower_precision(given), lowered(problem, given)
        detached = {name: tracked(p).detach() for name, p in params.items()}
        constants = {name: tracked(m).detach() for name, m in meta_params.items()}
        tensors = [*detached.values(), *constants.values()]
        stage = Stage(problem.modules or (), tensors, seed, ranks)
        with ExitStack() as opened:
            opened.enter_context(stage)
            problem, streams = problem.drawing(stage.randomness, tensors[0].device)
            for drawn in streams:
                stage.on_exit(drawn.close)
            schedules = {} if solver is None else solver.schedules()
            reaches = find_reaches(problem, detached, constants, start, tally, schedules)
            opened.pop_all()
        super().__init__(
            problem=problem,
            params=detached,
            meta_params=constants,
            lower=lower,
            start=start,
            reaches=reaches,
            stage=stage,
            tally=tally,
            judged=Judged(),
            streams=tuple(streams),
            settled=settled,
            before=before,
            layouts=there.layouts,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stage.__exit__(*exception)

    settle = phases.settle
    settle_recorded = phases.settle_recorded
    settle_nudged = phases.settle_nudged
    settle_controlled = phases.settle_controlled
    beginning = phases.beginning
    outer_loss = derivatives.outer_loss
    outer_gradients = derivatives.outer_gradients
    meta_partial = derivatives.meta_partial
    contrast = derivatives.contrast
