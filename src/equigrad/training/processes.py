"""Tasks shared among several processes, started by torchrun."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist

from equigrad.errors import RunError
from equigrad.gradient import MetaGradient
from equigrad.problems import Params
from equigrad.training.loop import Callback, OuterState
from equigrad.vectors import flatten, unflatten

if TYPE_CHECKING:
    from equigrad.tasks import FewShotLearner, TaskBatch


@dataclass(frozen=True)
class Place:
    """The rank of this process, and the number of processes.

    Attributes:
        rank: from 0; the process of rank 0 logs and saves.
        world_size: number of processes.
    """

    rank: int = 0
    world_size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that logs and saves."""
        return self.rank == 0


def place() -> Place:
    """The rank of this process; rank 0 of one if no processes have been joined.

    Example:
        >>> place()
        Place(rank=0, world_size=1)
    """
    if not (dist.is_available() and dist.is_initialized()):
        return Place()
    return Place(dist.get_rank(), dist.get_world_size())


@contextmanager
def processes(*, timeout: float = 1800.0) -> Iterator[Place]:
    """Join the other processes that torchrun has started; does nothing without torchrun.

    Inside, `learn_tasks` and `judge` share their tasks, and all processes have to call them in the
    same way. They communicate by gloo on CPUs and by nccl on CUDA, where each process uses the
    device of its local rank.

    Args:
        timeout: seconds that a process waits for the slowest of the others before that counts as
            lost. A share of a batch, or of the tasks of a test, must take less time.

    Raises:
        RunError: the others cannot be joined; or, in later communication, one is lost.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Place()
        return
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    with _together("could not join"):
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    try:
        yield place()
    finally:
        gc.collect()  # whatever holds the group, whose threads would outlive Python
        dist.destroy_process_group()


@contextmanager
def _together(what: str) -> Iterator[None]:
    """Turn an error of communication into one that says what happened and what to do."""
    try:
        yield
    except RuntimeError as error:  # the base class of torch.distributed's errors
        rank, size = (os.environ.get(name, "?") for name in ("RANK", "WORLD_SIZE"))
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RunError(
            f"process {rank} of {size} {what} the others ({reason}). One of them failed, was "
            f"killed, or took longer than the timeout; its own output may say more. Start all of "
            f"them again; with --resume they go on from the last checkpoint"
        ) from error


def gathered(mine: Any) -> list[Any]:
    """The values of all processes, in the order of their ranks.

    Args:
        mine: anything that can be pickled.

    Raises:
        RunError: a process is lost.
    """
    found: list[Any] = [mine]
    if (size := place().world_size) > 1:
        found = [None] * size
        with _together("lost"):
            dist.all_gather_object(found, mine)
    return found


def agreed(value: Any) -> Any:
    """The value of the process of rank 0.

    Args:
        value: anything that can be pickled; the values of the other processes are ignored.

    Raises:
        RunError: a process is lost.
    """
    if place().world_size == 1:
        return value
    said = [value]
    with _together("lost"):
        dist.broadcast_object_list(said, src=0)
    return said[0]


def shared_meta_gradient(
    learner: "FewShotLearner", meta_params: Params, tasks: "TaskBatch"
) -> MetaGradient:
    """`learner.meta_gradient`, with the tasks shared among all processes.

        ∇_θ = Σ_r (n_r / n) ∇_θ^{(r)}        n_r of n tasks on the process of rank r

    Args:
        learner: the learner, the same in every process.
        meta_params: θ, the same in every process.
        tasks: the whole batch, the same in every process.

    Returns:
        The meta-gradient of the whole batch, the same in every process; `params` are those of the
        process's own tasks.

    Raises:
        ConfigurationError: there are fewer tasks than processes.
        RunError: a process is lost, or has another θ.
    """
    here = place()
    if here.world_size == 1:
        return learner.meta_gradient(meta_params, tasks)
    own = tasks.share(here.rank, here.world_size)
    result = learner.meta_gradient(meta_params, own)
    weight = len(own) / len(tasks)
    total = flatten([weight * grad for grad in result.grads.values()])
    with _together("lost"):
        dist.all_reduce(total)
    theta = float(flatten([m.detach() for m in meta_params.values()]).double().sum())
    counted = weight * result.outer_loss, result.gradient_evaluations
    said = gathered((theta, *counted, result.phases, result.status))
    thetas, losses, evaluations, phases, statuses = zip(*said, strict=True)
    if len(set(thetas)) > 1:
        raise RunError(
            f"the processes no longer have the same meta-parameters (the sums of their entries "
            f"are {thetas}). Whatever changes meta-parameters or the optimizer must do so in all "
            f"processes; a callback that does must set acts = True"
        )
    worst = max(range(here.world_size), key=lambda rank: phases[rank][0].residual)
    return replace(
        result,
        grads=dict(zip(result.grads, unflatten(total, list(result.grads.values())), strict=True)),
        outer_loss=sum(losses),
        gradient_evaluations=sum(evaluations),
        phases=phases[worst],
        status=statuses[worst],
    )


class InStep(Callback):
    """Keeps processes in step: all use the initial state and the clock of rank 0."""

    acts: ClassVar[bool] = True

    def on_start(self, state: OuterState) -> None:
        """Copy the initial state of rank 0, which may come from a checkpoint."""
        there = agreed(state.state_dict() if place().leads else None)
        if not place().leads:
            state.load_state_dict(there)

    def on_step(self, state: OuterState, result: MetaGradient) -> None:
        """Copy the time of rank 0."""
        state.seconds = agreed(state.seconds)
