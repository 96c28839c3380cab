"""Several processes learn as one does, and say so where one of them is lost."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import equigrad as eg
from equigrad.nn import ComplexSynapse
from equigrad.problems import Params
from equigrad.tasks import FewShotLearner, Sinusoids
from equigrad.training import Callback
from equigrad.training.decay import LinearDecay
from equigrad.training.few_shot import judge, learn_tasks, mean_squared_error
from equigrad.training.processes import Place, place, processes, shared_meta_gradient

TASKS = 5  # three for one process and two for the other


class Watched(Callback):
    def __init__(self) -> None:
        self.steps = 0

    def on_step(self, state, result) -> None:
        self.steps += 1


def learner() -> FewShotLearner:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 10), nn.Tanh(), nn.Linear(10, 1)).double()
    return FewShotLearner(
        model=ComplexSynapse(net, 0.1, center="init", learn=("center",)),
        loss=nn.functional.mse_loss,
        solver=eg.GradientDescent(lr=0.05, max_steps=10),
        estimator=eg.Contrastive(beta=0.1),
        batching="vmap",
    )


def left(one: FewShotLearner, theta: Params) -> float:
    return judge(one, theta, Sinusoids(seed=3), mean_squared_error, tasks=4, at_once=2).mean


def work() -> dict:
    """What has to be the same however many processes do it."""
    one = learner()
    meta_params = one.model.meta_params()
    batch = Sinusoids(seed=1).sample(TASKS, 0).to("cpu", torch.float64)
    result = shared_meta_gradient(one, meta_params, batch)
    watched = Watched()
    state = learn_tasks(
        one,
        meta_params,
        Sinusoids(seed=1),
        tasks=TASKS,
        optimizer=torch.optim.SGD(meta_params.values(), lr=0.1, momentum=0.9),
        steps=3,
        callbacks=[LinearDecay(0.1), watched],
    )
    timed = one.model.meta_params()  # each process has a clock of its own
    learn_tasks(
        one,
        timed,
        Sinusoids(seed=1),
        tasks=TASKS,
        optimizer=torch.optim.SGD(timed.values(), lr=0.01),
        steps=10**6,
        limit=0.3,
        validate=lambda theta: {"error": left(one, theta)},
        validate_every=10**6,
        callbacks=[LinearDecay(0.01)],
    )
    score = judge(one, meta_params, Sinusoids(seed=2), mean_squared_error, tasks=15, at_once=4)
    return {
        "grads": dict(result.grads),
        "numbers": torch.tensor(
            [result.outer_loss, score.mean, score.interval]
            + [float(row["outer_loss"]) for row in state.history]
        ),
        "counts": (result.gradient_evaluations, state.gradient_evaluations, score.tasks),
        "learned": {name: m.detach() for name, m in meta_params.items()},
        "timed": {name: m.detach() for name, m in timed.items()},
        "watched": watched.steps,
    }


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def torchruns(rank: int) -> dict[str, str]:
    """What torchrun tells the second of two processes, or the first."""
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    return place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": PORT}


PORT = free_port()


class Pair:
    """Two processes that do `work`, save it, and learn on without an end."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.processes = folder, []
        for rank in range(2):
            with self.said(rank).open("w") as words:
                command = [sys.executable, __file__, str(folder)]
                environment = os.environ | torchruns(rank)
                self.processes.append(subprocess.Popen(command, env=environment, stderr=words))

    def said(self, rank: int) -> Path:
        return self.folder / f"{rank}.txt"

    def wait_for(self, name: str) -> None:
        deadline = time.monotonic() + 60
        while not (self.folder / name).exists():
            assert all(p.poll() is None for p in self.processes), self.said(0).read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    pair = Pair(tmp_path_factory.mktemp("pair"))
    yield pair
    for process in pair.processes:
        process.kill()
        process.wait()


def test_two_processes_learn_as_one_does(pair) -> None:
    alone = work()
    pair.wait_for("stepped")
    first, second = (torch.load(pair.folder / f"{rank}.pt") for rank in range(2))
    for found in (first, second):
        assert found["counts"] == alone["counts"]
        torch.testing.assert_close(found["numbers"], alone["numbers"], rtol=1e-9, atol=0)
        for what in ("grads", "learned"):
            for name, value in alone[what].items():
                torch.testing.assert_close(found[what][name], value, rtol=1e-11, atol=1e-14)
    for what in ("learned", "timed"):
        assert all(first[what][n].equal(m) for n, m in second[what].items())
    assert (first["watched"], second["watched"], alone["watched"]) == (3, 0, 3)


def test_a_lost_process_ends_the_other_with_a_clear_error(pair) -> None:
    pair.wait_for("stepped")
    first, second = pair.processes
    second.kill()
    assert first.wait(30) == 3
    complaint = pair.said(0).read_text()
    assert "RunError: process 0 of 2 lost the others" in complaint
    assert "--resume" in complaint


def test_processes_that_part_ways_are_found_out(monkeypatch) -> None:
    monkeypatch.setattr("equigrad.training.processes.place", lambda: Place(0, 2))
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor: None)
    monkeypatch.setattr(
        "equigrad.training.processes.gathered", lambda mine: [mine, (mine[0] + 1, *mine[1:])]
    )
    one = learner()
    batch = Sinusoids(seed=1).sample(TASKS, 0).to("cpu", torch.float64)
    with pytest.raises(eg.RunError, match=r"no longer have the same meta-parameters.*acts = True"):
        shared_meta_gradient(one, one.model.meta_params(), batch)


def test_alone_nothing_is_joined(monkeypatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with processes() as here:
        assert here == place() == Place(0, 1)
        assert not torch.distributed.is_initialized()


def test_processes_that_do_not_come(monkeypatch) -> None:
    for name, value in (torchruns(1) | {"MASTER_PORT": free_port()}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(eg.RunError, match="process 1 of 2 could not join"), processes(timeout=1):
        pass


class Stepped(Callback):
    def __init__(self, folder: Path) -> None:
        self.file = folder / "stepped"

    def on_step(self, state, result) -> None:
        self.file.touch()


def main(folder: Path) -> None:
    """One of the two processes."""
    torch.set_num_threads(1)
    with processes(timeout=20) as here:
        torch.save(work(), folder / f"{here.rank}.pt")
        one = learner()
        meta_params = one.model.meta_params()
        learn_tasks(
            one,
            meta_params,
            Sinusoids(seed=1),
            tasks=TASKS,
            optimizer=torch.optim.SGD(meta_params.values(), lr=1e-6),
            steps=10**9,
            callbacks=[Stepped(folder)],
        )


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except eg.RunError as error:
        print(f"RunError: {error}", file=sys.stderr)
        raise SystemExit(3) from None
