# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false
"""The steps of `equigrad_one_loop.py` as one jitted scan of JAX, to compare methods at equal cost.

No line of equigrad runs here: what differs between the two is the price of Python and of torch.
"""

import jax
import jax.numpy as jnp
from benchmark_utils.stochastic_jax_solver import StochasticJaxSolver


class Solver(StochasticJaxSolver):
    """Contrast of states that are nudged and move with the outer variable, in JAX."""

    name = "equigrad-scan"
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
        **StochasticJaxSolver.parameters,
    }

    @property
    def nudges(self):
        """The nudging strengths of the two states."""
        return jnp.array([0.0, self.beta] if self.scheme == "forward" else [self.beta, -self.beta])

    def init(self):
        inner = jnp.stack([self.inner_var0] * 2)
        self.inner_var, self.outer_var = self.inner_var0, self.outer_var0
        return {
            "states": inner,
            "memory": jnp.zeros_like(inner),
            "outer_memory": jnp.zeros_like(self.outer_var0),
            "inner_var": self.inner_var0,
            "outer_var": self.outer_var0,
            "step": jnp.array(0.0),
            "samplers": (self.state_inner_sampler, self.state_outer_sampler),
        }

    def get_step(self, inner_sampler, outer_sampler):
        nudges = self.nudges

        def losses(state, outer_var, nudge, starts):
            inner, outer = starts
            return self.f_inner(state, outer_var, inner) + nudge * self.f_outer(
                state, outer_var, outer
            )

        def slopes(argnums):
            return jax.vmap(jax.grad(losses, argnums=argnums), in_axes=(0, None, 0, None))

        by_state, by_outer, by_both = slopes(0), slopes(1), slopes((0, 1))

        def drawn(carry):
            inner, outer = carry["samplers"]
            one, *_, inner = inner_sampler(inner)
            other, *_, outer = outer_sampler(outer)
            return (one, other), {**carry, "samplers": (inner, outer)}

        def step(carry, _):
            rate = self.step_size / (1 + carry["step"]) ** self.decay
            for k in range(1, self.n_inner_steps + 1):
                starts, carry = drawn(carry)
                at = carry["states"], carry["outer_var"], nudges, starts
                if self.together and k == self.n_inner_steps:
                    grads, seen = by_both(*at)
                else:
                    grads = by_state(*at)
                memory = self.momentum * carry["memory"] + grads
                carry = {**carry, "memory": memory, "states": carry["states"] - rate * memory}
            if not self.together:
                seen = by_outer(carry["states"], carry["outer_var"], nudges, starts)
            contrast = (seen[1] - seen[0]) / (nudges[1] - nudges[0])
            memory = self.momentum * carry["outer_memory"] + contrast
            outer_var = carry["outer_var"] - rate / self.outer_ratio * memory
            shown = carry["states"][0] if self.scheme == "forward" else carry["states"].mean(0)
            after = {"outer_memory": memory, "outer_var": outer_var, "inner_var": shown}
            return {**carry, **after, "step": carry["step"] + 1}, None

        return step
