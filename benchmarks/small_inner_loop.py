"""1000 steps of a 13-20-1 network: eager, by compiled steps, and as a `jax.jit` `lax.scan`.

A free phase on 354 rows: tanh, mean squared error, a strength for every weight, Nesterov steps. The
three are interleaved and end at the same parameters, which is checked. Compiling is timed apart:
into an empty cache of torch's, and again from the cache on disk, as a new process finds it.

    python benchmarks/small_inner_loop.py [--rounds 20] [--dtype float32] [--jax-python PYTHON]

JAX runs in a process of its own, one thread, by any Python that has it; without it, its line says
so.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import equigrad as eg
from equigrad.evaluation import Evaluation
from equigrad.solvers import compiled

STEPS, LR, MOMENTUM, STRENGTH, ROWS = 1000, 0.02, 0.9, 0.01, 354


class Job:
    """The loop, and how it is run by equigrad."""

    def __init__(self, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(ROWS, 13, dtype=dtype)
        self.y = torch.randn(ROWS, 1, dtype=dtype)
        net = nn.Sequential(nn.Linear(13, 20), nn.Tanh(), nn.Linear(20, 1)).to(dtype)
        self.synapse = eg.nn.ComplexSynapse(net, strength=STRENGTH)

    def settle(self, compile: bool) -> tuple[float, list[Tensor]]:
        """Seconds of one phase of a new problem, and the parameters at its end."""
        synapse, x, y = self.synapse, self.x, self.y
        problem = eg.Bilevel(
            lambda params, meta_params: mse_loss(synapse(params, x), y),
            lambda params, meta_params: mse_loss(synapse(params, x), y),
            regularizer=synapse,
        )
        solver = eg.GradientDescent(
            lr=LR, momentum=MOMENTUM, nesterov=True, max_steps=STEPS, compile=compile
        )
        with Evaluation(problem, synapse.params(), synapse.meta_params()) as evaluation:
            began = time.perf_counter()
            settled = evaluation.settle(solver)
            return time.perf_counter() - began, list(settled.params.values())


class Jax:
    """The same loop in a process of its own."""

    def __init__(self, job: Job, python: str) -> None:
        flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        self._process = subprocess.Popen(
            [python, str(Path(__file__).with_name("small_inner_loop_jax.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            text=True,
        )
        self.answer: dict[str, Any] = self._ask(
            {
                "x": job.x.tolist(),
                "y": job.y.tolist(),
                "params": [p.tolist() for p in job.synapse.params().values()],
                "dtype": str(job.x.dtype).removeprefix("torch."),
                "lr": LR,
                "momentum": MOMENTUM,
                "strength": STRENGTH,
                "steps": STEPS,
            }
        )

    def _ask(self, what: object) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(what), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def seconds(self) -> float:
        """One run."""
        return self._ask(None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--jax-python", default=sys.executable)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    job = Job(getattr(torch, arguments.dtype))
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        first, ours = job.settle(compile=True)
        compiled._compiled.clear()
        again, _ = job.settle(compile=True)
    contenders: dict[str, Callable[[], float]] = {
        "eager": lambda: job.settle(compile=False)[0],
        "compile=True": lambda: job.settle(compile=True)[0],
    }
    jax = Jax(job, arguments.jax_python)
    _, eager = job.settle(compile=False)
    ends = [eager, ours]
    if "version" in jax.answer:
        contenders["jax.jit of lax.scan"] = jax.seconds
        ends.append([torch.tensor(p, dtype=job.x.dtype) for p in jax.answer["params"]])
    for end in ends[1:]:
        tolerance = 1e-3 if arguments.dtype == "float32" else 1e-9
        for one, other in zip(end, eager, strict=True):
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(arguments.rounds):
        for name, run in contenders.items():
            seconds[name].append(run())

    *_, reference = seconds.values()
    compiling = {"compile=True": f"{first:.1f} ({again:.1f} from disk)"}
    version = jax.answer.get("version", "not installed")
    if "compile" in jax.answer:
        compiling["jax.jit of lax.scan"] = f"{jax.answer['compile']:.1f}"
    print(f"torch {torch.__version__}, jax {version}, {arguments.dtype}, one thread")
    print(f"{arguments.rounds} rounds, ms for {STEPS} steps; the last column by the best round\n")
    print("| 1000 steps | best, ms | median, ms | first call, s | best / JAX |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, row in seconds.items():
        ratio = f"{min(row) / min(reference):.2f}" if "version" in jax.answer else "–"
        print(
            f"| {name} | {1e3 * min(row):.0f} | {1e3 * statistics.median(row):.0f} "
            f"| {compiling.get(name, '–')} | {ratio} |"
        )


if __name__ == "__main__":
    main()
