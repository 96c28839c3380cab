"""A few-shot learner: what each task learns, and how the shared meta-parameters are learned."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.func import vmap

from equigrad.errors import ConfigurationError, ProblemError
from equigrad.estimators import Estimator
from equigrad.evaluation import Evaluation
from equigrad.fields import Checked, Count, expect
from equigrad.gradient import MetaGradient, meta_gradient
from equigrad.nn.batch_statistics import with_batch_statistics, with_statistics_of
from equigrad.nn.side_by_side import Batching, SideBySide
from equigrad.problems import Bilevel, Params, Regularizer
from equigrad.randomness import Stream
from equigrad.solvers import Solver
from equigrad.tasks.batch import TaskBatch
from equigrad.vectors import tracked

Statistics = Literal["query", "support"]


class MetaModel(Protocol):
    """A module divided into a task's parameters φ and the shared meta-parameters θ.

    `equigrad.nn.ComplexSynapse`, `Modulation`, `LearnedStart` and `LearnedRates` have this form.
    """

    @property
    def regularizer(self) -> Regularizer | None:
        """A further term of every task's inner loss."""
        ...

    def meta_params(self) -> dict[str, Tensor]:
        """Initial θ, as new leaves."""
        ...

    def start(self, meta_params: Params) -> dict[str, Tensor]:
        """Initial φ of a task."""
        ...

    def weights(self, params: Params, meta_params: Params) -> Params:
        """All weights of the module, by its own names."""
        ...

    def module(self, weights: Params | None = None) -> nn.Module:
        """A new copy of the module, with these weights or its own."""
        ...


@dataclass(frozen=True, kw_only=True)
class FewShotLearner(Checked):
    r"""Learns every task from its support set, and the shared meta-parameters from the query sets.

        min_θ mean_τ L(φ*_τ, θ, query_τ),    φ*_τ = argmin_φ L(φ, θ, support_τ) + R(φ, θ)

    (Zucchet et al., Eqs. 5 and 6). All tasks of a batch settle at once: their parameters are
    stacked, and the inner loss is the sum over tasks. With a fixed number of steps, each task
    settles as it would alone. A tolerance applies to all tasks of a chunk together, and a line
    search evaluates their sum; with `chunk_size=1`, tasks do not wait for each other.

    Attributes:
        model: the division into φ and θ: `ComplexSynapse(…, learn=("center",))`, `Modulation`,
            `LearnedStart` or `LearnedRates`.
        loss: `(outputs, targets) -> scalar` of one task, the mean over examples.
        outer_loss: another loss of the query set, such as one of smoothed labels; None for `loss`.
        solver: the solver of a task.
        estimator: the estimator of the meta-gradient.
        chunk_size: number of tasks that settle at once; None for all. Memory grows with it.
        statistics: the set from which batch normalisation takes its statistics for the outer loss.
            `query`: the whole query set, so that the output for one example depends on the others
            (transductive, as is common in the field). `support`: the support set.
        batching: how networks are computed side by side, as in `equigrad.nn.SideBySide`.

    Raises:
        ConfigurationError: chunk_size < 1, or a batching that the module does not allow.

    Example:
        >>> import equigrad as eg
        >>> net = nn.Linear(1, 1)
        >>> learner = FewShotLearner(
        ...     model=eg.nn.ComplexSynapse(net, strength=0.1, center="init", learn=("center",)),
        ...     loss=nn.functional.mse_loss,
        ...     solver=eg.GradientDescent(lr=0.1, max_steps=100),
        ...     estimator=eg.Contrastive(beta=0.1, scheme="symmetric"),
        ... )
        >>> x = torch.linspace(-1, 1, 8).reshape(2, 4, 1)  # two tasks
        >>> result = learner.meta_gradient(learner.model.meta_params(), TaskBatch((x, x), (x, -x)))
        >>> sorted(result.grads)
        ['center.bias', 'center.weight']
    """

    model: MetaModel
    loss: Callable[[Tensor, Tensor], Tensor]
    solver: Solver
    estimator: Estimator
    chunk_size: Count | None = None
    statistics: Statistics = "query"
    outer_loss: Callable[[Tensor, Tensor], Tensor] | None = None
    batching: Batching = "auto"
    network: SideBySide = field(init=False, repr=False)
    _reaches: dict[Stream, list[str]] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not hasattr(self.model, "weights"):
            raise ConfigurationError(
                f"model must say which parameters each task learns and which all tasks share, got "
                f"a plain {type(self.model).__name__}; wrap it in equigrad.nn.Modulation(…), "
                f"LearnedStart(…) or ComplexSynapse(…, center='init', learn=('center',))"
            )
        object.__setattr__(self, "network", SideBySide(self.model.module(), self.batching))

    def problem(self, tasks: TaskBatch) -> Bilevel:
        """All tasks as one problem, with losses summed over tasks."""
        return Bilevel(
            inner_loss=_SummedLoss(
                self, self.loss, second_order=self.estimator.traits.double_backward
            ),
            outer_loss=_SummedLoss(self, self.outer_loss or self.loss, second_order=False),
            regularizer=self.model.regularizer,
            inner_batches=[(*tasks.support, None)],
            outer_batches=[self._judged(tasks, self.statistics)],
            modules=(),
            reaches=self._reaches,
        )

    def start(self, meta_params: Params, tasks: int) -> dict[str, Tensor]:
        """Initial φ of a number of tasks."""
        start = self.model.start(meta_params)
        if not self.estimator.traits.sees_start:
            start = {name: p.detach() for name, p in start.items()}
        return {name: p.expand(tasks, *p.shape) for name, p in start.items()}

    @torch.inference_mode(False)
    def meta_gradient(self, meta_params: Params, tasks: TaskBatch) -> MetaGradient:
        """The gradient of the query loss, averaged over tasks.

        Args:
            meta_params: θ.
            tasks: the tasks.

        Returns:
            The result of `equigrad.meta_gradient`, where `params` has a row for each task,
            `outer_loss` is the mean over tasks, `gradient_evaluations` counts a gradient once for
            each task, and `phases` and `status` are those of the chunk with the largest residual.
        """
        chunks = tasks.chunks(1 if self.estimator.traits.one_system else self.chunk_size)
        if self._reaches is None:  # the same for all tasks, so found and checked once
            first, start = self.problem(chunks[0]), self.start(meta_params, len(chunks[0]))
            # a fixed seed, so that this draws nothing from torch's generator: a resumed process,
            # which also comes here once, would otherwise draw other numbers than this one
            known = Evaluation(first, start, meta_params, seed=0, solver=self.solver)
            with known as evaluation:
                object.__setattr__(self, "_reaches", evaluation.reaches.functions)
        results = [
            meta_gradient(
                self.problem(chunk),
                self.start(meta_params, len(chunk)),
                meta_params,
                solver=self.solver,
                estimator=self.estimator,
            )
            for chunk in chunks
        ]
        counts = [len(c) * r.gradient_evaluations for c, r in zip(chunks, results, strict=True)]
        worst = max(results, key=lambda result: result.phases[0].residual)
        return replace(
            worst,
            grads={n: sum(r.grads[n] for r in results) / len(tasks) for n in worst.grads},
            params={n: torch.cat([r.params[n] for r in results]) for n in worst.params},
            outer_loss=sum(r.outer_loss for r in results) / len(tasks),
            gradient_evaluations=sum(counts),
        )

    @torch.inference_mode(False)
    def settle(
        self, meta_params: Params, tasks: TaskBatch, *, steps: int | None = None
    ) -> dict[str, Tensor]:
        """The settled φ of every task, one row for each.

        Args:
            meta_params: θ.
            tasks: the tasks.
            steps: the most steps to take, instead of the solver's limit; 0 for the initial φ.
        """
        constants = {name: m.detach() for name, m in meta_params.items()}
        if steps == 0:
            return {n: p.detach() for n, p in self.start(constants, len(tasks)).items()}
        solver = self.solver if steps is None else replace(self.solver, max_steps=steps)
        settled = []
        for chunk in tasks.chunks(self.chunk_size):
            start = {n: p.detach() for n, p in self.start(constants, len(chunk)).items()}
            # no derivatives with respect to θ are needed
            problem = replace(self.problem(chunk), reaches={"inner": [*constants], "outer": []})
            with Evaluation(problem, start, constants) as evaluation:
                settled.append(evaluation.settle(solver).params)
        return {name: torch.cat([s[name] for s in settled]) for name in settled[0]}

    @torch.no_grad()
    def predict(
        self,
        params: Params,
        meta_params: Params,
        tasks: TaskBatch,
        *,
        statistics: Statistics | None = None,
    ) -> Tensor:
        """Outputs for the query sets.

        Args:
            params: φ, one row for each task.
            meta_params: θ.
            tasks: the tasks.
            statistics: replaces the learner's own setting.

        Returns:
            Outputs of shape tasks × n × outputs.
        """
        expect(Statistics | None, statistics=statistics)
        outputs, done = [], 0
        for chunk in tasks.chunks(self.chunk_size):
            own = {name: p[done : done + len(chunk)] for name, p in params.items()}
            done += len(chunk)
            x, _, reference = self._judged(chunk, statistics or self.statistics)
            weights = self.model.weights(own, meta_params)
            said = self.network(weights, x, reference=reference, training=False)
            outputs.append(said[:, reference:])
        return torch.cat(outputs)

    @staticmethod
    def _judged(tasks: TaskBatch, statistics: Statistics) -> tuple[Tensor, Tensor, int | None]:
        """Inputs and targets of the query sets, preceded by the inputs that give the statistics."""
        (x, _), (v, w) = tasks.support, tasks.query
        return (v, w, None) if statistics == "query" else (torch.cat([x, v], 1), w, x.shape[1])

    @torch.inference_mode(False)
    def adapt(
        self,
        meta_params: Params,
        support: tuple[Tensor, Tensor],
        *,
        statistics: Statistics | None = None,
    ) -> nn.Module:
        """Learn one new task, and return an ordinary module that has learned it.

        Args:
            meta_params: θ.
            support: inputs n × … and targets n × ….
            statistics: replaces the learner's own setting. With `support`, the module's batch
                normalisation has the statistics of the support set; with `query`, it uses those of
                each batch that it is called with.

        Returns:
            A copy of the model, in `eval` mode, with the weights for this task. With `support` its
            state has running statistics, even if the model kept none.
        """
        expect(Statistics | None, statistics=statistics)
        x, y = (tracked(t) for t in support)
        alone = TaskBatch((x[None], y[None]), (x[None], y[None]))
        params = {name: p[0] for name, p in self.settle(meta_params, alone).items()}
        module = self.model.module(self.model.weights(params, meta_params))
        if (statistics or self.statistics) == "query":
            return with_batch_statistics(module).eval()
        return with_statistics_of(module, x)


@dataclass(frozen=True)
class _SummedLoss:
    """The loss of a batch of tasks, as a function of all their parameters.

    Attributes:
        made_by: the learner. Its losses are checked once, although each batch makes new ones.
        loss: the loss of one task.
        second_order: whether its gradient will be differentiated.
    """

    made_by: FewShotLearner
    loss: Callable[[Tensor, Tensor], Tensor]
    second_order: bool

    def __call__(
        self, params: Params, meta_params: Params, batch: tuple[Tensor, Tensor, int | None]
    ) -> Tensor:
        learner, (x, y, reference) = self.made_by, batch
        weights = learner.model.weights(params, meta_params)
        outputs = learner.network(weights, x, reference=reference, second_order=self.second_order)
        dtype = next(iter(params.values())).dtype  # autocast gives outputs in a lower precision
        losses = vmap(self.loss)(outputs[:, reference:].to(dtype), y)
        if losses.ndim != 1:
            raise ProblemError(
                f"loss must return a scalar for each task (the mean over its examples), got shape "
                f"{tuple(losses.shape[1:])}"
            )
        return losses.sum()
