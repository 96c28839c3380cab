"""The JAX side of `small_inner_loop.py`: a jitted `lax.scan`, run when a line arrives.

Needs jax alone. The first line is the loop as JSON; the answer to it is the seconds of compiling
and the parameters at the end, the answer to every further line the seconds of one run.
"""

import json
import sys
import time
from typing import Any


def main() -> None:
    job = json.loads(sys.stdin.readline())
    try:
        import jax  # pyright: ignore[reportMissingImports]
        import jax.numpy as jnp  # pyright: ignore[reportMissingImports]
    except ImportError:
        print(json.dumps({"missing": "jax"}), flush=True)
        return
    jax.config.update("jax_enable_x64", job["dtype"] == "float64")
    x, y = (jnp.asarray(job[name], job["dtype"]) for name in ("x", "y"))
    lr, momentum, strength = job["lr"], job["momentum"], job["strength"]

    def loss(params: Any) -> Any:
        w1, b1, w2, b2 = params
        error = jnp.tanh(x @ w1.T + b1) @ w2.T + b2 - y
        return (error**2).mean() + 0.5 * strength * sum((p**2).sum() for p in params)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        params, buffers = carry
        gradients = jax.grad(loss)(params)
        buffers = [momentum * m + g for m, g in zip(buffers, gradients, strict=True)]
        moves = [g + momentum * m for g, m in zip(gradients, buffers, strict=True)]
        return ([p - lr * v for p, v in zip(params, moves, strict=True)], buffers), None

    loop = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=job["steps"])[0])
    start = [jnp.asarray(p, job["dtype"]) for p in job["params"]]
    carry = (start, [jnp.zeros_like(p) for p in start])

    def seconds() -> float:
        began = time.perf_counter()
        jax.block_until_ready(loop(carry))
        return time.perf_counter() - began

    answer = {"version": jax.__version__, "compile": seconds() - seconds()}
    answer["params"] = [p.tolist() for p in loop(carry)[0]]
    print(json.dumps(answer), flush=True)
    for _ in sys.stdin:
        print(seconds(), flush=True)


if __name__ == "__main__":
    main()
