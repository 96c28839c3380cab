# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false
"""equigrad's one loop as a solver of benchopt/benchmark_bilevel: copy it into its `solvers/`.

The benchmark's losses are functions of JAX. Here JAX computes them and their gradients, torch sees
the results through DLPack without a copy, and `learn_jointly` does all else as for any problem.
"""

from functools import partial

import jax
import numpy as np
import torch
from benchmark_utils import constants
from benchopt import BaseSolver
from benchopt.stopping_criterion import SufficientProgressCriterion

import equigrad as eg
from equigrad.training import Callback, Contrasts, learn_jointly


class Solver(BaseSolver):
    """Contrast of states that are nudged and move with the outer variable, by equigrad.

    With `scheme="forward"` and mini-batches it is F2SA (Kwon et al. 2023) at a fixed λ = 1/β, with
    the same batches for both states; `symmetric` has an error of order β² instead of β.
    """

    name = "equigrad"
    stopping_criterion = SufficientProgressCriterion(
        patience=constants.PATIENCE, strategy="callback"
    )
    parameters = {
        "step_size": [0.1],
        "outer_ratio": [1.0],
        "batch_size": [64],
        "beta": [0.1],
        "scheme": ["forward"],
        "momentum": [0.0],
        "decay": [0.5],
        "n_inner_steps": [1],
        "together": [True],
        "eval_freq": [16],
        "random_state": [1],
    }
    requirements = ["pip::equigrad", "jax", "jaxlib"]

    @staticmethod
    def get_next(stop_val):
        return stop_val + 1

    def set_objective(
        self, f_inner, f_outer, n_inner_samples, n_outer_samples, inner_var0, outer_var0
    ):
        self.start = inner_var0, outer_var0
        order = np.random.RandomState(self.random_state)

        def loss(f, n):
            """The loss of a batch that starts at a sample, and its batches in random order."""
            size = n if self.batch_size == "full" else self.batch_size
            starts = order.permutation(np.arange(0, n, size)).tolist()
            at = partial(f, batch_size=size)
            forms = {
                (z, x): jax.jit(_with_slopes(at, [i for i, asked in enumerate((z, x)) if asked]))
                for z in (False, True)
                for x in (False, True)
            }
            return lambda p, m, start: _Loss.apply(p["z"], m["x"], start, forms), starts

        inner, inner_batches = loss(f_inner, n_inner_samples)
        outer, outer_batches = loss(f_outer, n_outer_samples)
        self.problem = eg.Bilevel(
            inner, outer, inner_batches=inner_batches, outer_batches=outer_batches
        )
        self.run_once(2)

    def run(self, callback):
        z, x = (torch.from_numpy(np.array(v)) for v in self.start)
        meta = {"x": x.requires_grad_()}
        self.inner_var, self.outer_var = self.start
        if not callback():
            return
        optimizer = torch.optim.SGD(
            meta.values(), lr=self.step_size / self.outer_ratio, momentum=self.momentum
        )
        try:
            learn_jointly(
                self.problem,
                {"z": z},
                meta,
                solver=eg.GradientDescent(
                    lr=lambda _, step: self.step_size / (1 + step) ** self.decay,
                    momentum=self.momentum,
                ),
                direction=Contrasts(beta=self.beta, scheme=self.scheme, together=self.together),
                optimizer=optimizer,
                steps=10**9,
                inner_steps=self.n_inner_steps,
                callbacks=[_Shown(self, callback), _Decays(self.decay)],
            )
        except eg.SettlingError:  # it diverges: show that
            self.outer_var = np.full_like(self.outer_var, np.inf)
            callback()

    def get_result(self):
        return {"inner_var": self.inner_var, "outer_var": self.outer_var}


def _with_slopes(f, argnums):
    """The loss, and its gradients by the variables of these numbers."""

    def both(z, x, start):
        if not argnums:
            return f(z, x, start=start), ()
        return jax.value_and_grad(lambda z, x: f(z, x, start=start), argnums=argnums)(z, x)

    return both


class _Loss(torch.autograd.Function):
    """A loss of JAX, with the gradients that somebody waits for."""

    @staticmethod
    def forward(ctx, z, x, start, forms):
        ctx.asked = tuple(ctx.needs_input_grad[:2])
        value, grads = forms[ctx.asked](_there(z), _there(x), start)
        ctx.save_for_backward(*(torch.from_dlpack(g) for g in grads))
        return torch.from_dlpack(value)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, cotangent):
        grads = iter(ctx.saved_tensors)
        z, x = (cotangent * next(grads) if asked else None for asked in ctx.asked)
        return z, x, None, None


def _there(tensor):
    return jax.dlpack.from_dlpack(tensor.detach().contiguous())


class _Shown(Callback):
    """Shows the benchmark where the variables are, every so many steps, until it has enough."""

    def __init__(self, solver, callback):
        self.solver, self.callback = solver, callback

    def on_step(self, state, result):
        if state.step % self.solver.eval_freq == 0:
            self.solver.inner_var = result.params["z"].numpy()
            self.solver.outer_var = state.meta_params["x"].detach().numpy()
            state.stopped = not self.callback()


class _Decays(Callback):
    """The outer step size falls with a power of the number of steps."""

    def __init__(self, exponent):
        self.exponent = exponent

    def on_start(self, state):
        self.first = state.optimizer.param_groups[0]["lr"]

    def on_step(self, state, result):
        lr = self.first / (1 + state.step) ** self.exponent
        state.optimizer.param_groups[0]["lr"] = lr
