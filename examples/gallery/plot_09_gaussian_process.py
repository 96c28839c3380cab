"""
Hyperparameters of a Gaussian process
=====================================

For anyone who tunes kernels. Ten inverse length scales and the noise variance are learned from the
error on validation points. The process is small enough for autograd to differentiate its exact
solution, which tells how right the contrastive rule is.
"""

# %%
# Friedman's function depends on the first five inputs alone. Noise of variance 1 is added.
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import make_friedman1

import equigrad as eg

inputs, outputs = (torch.tensor(array) for array in make_friedman1(1200, noise=1, random_state=0))
x, valid_x, test_x = inputs.split([100, 100, 1000])
y, valid_y, test_y = (outputs - outputs[:100].mean()).split([100, 100, 1000])


def kernel(a, b, log):
    distance = (a * log[:10].exp())[:, None] - b * log[:10].exp()
    return 25 * torch.exp(-distance.square().sum(-1) / 2)


# %%
# The inner loss is the quadratic function that is smallest where (K + noise) a = y.
def inner_loss(params, meta):
    a, log = params["a"], meta["log"]
    return a @ (kernel(x, x, log) @ a + log[10].exp() * a) / 2 - a @ y


def error(params, meta, at=valid_x, values=valid_y):
    return (kernel(at, x, meta["log"]) @ params["a"] - values).square().mean()


meta, params = {"log": torch.zeros(11).double().requires_grad_()}, {"a": torch.zeros(100).double()}
problem, rule = eg.Bilevel(inner_loss, error), eg.Contrastive(rtol=1e-3)
adam, off, rmse = torch.optim.Adam(meta.values(), lr=0.2), [], []
for _ in range(13):
    result = eg.meta_gradient(problem, params, meta, solver=eg.LBFGS(), estimator=rule)
    params, gram = result.params, kernel(x, x, meta["log"]) + meta["log"][10].exp() * torch.eye(100)
    exact_loss = error({"a": torch.linalg.solve(gram, y)}, meta)
    truth = torch.autograd.grad(exact_loss, meta["log"])[0]
    off.append((result.grads["log"] - truth).norm().item() / truth.norm().item())
    rmse.append(error(params, meta, test_x, test_y).sqrt().item())
    result.assign()
    adam.step()
print(f"root mean squared error on test points: {rmse[0]:.2f} before, {rmse[-1]:.2f} after")
print(f"largest relative error of a hypergradient: {max(off):.0e}, where 1e-3 was asked for")
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
scales = meta["log"][:10].detach().exp().numpy()
left.bar(range(1, 11), scales, color=["#0072B2"] * 5 + ["#E69F00"] * 5)
left.set(xlabel="input (orange: no effect)", ylabel="inverse length scale", xticks=range(1, 11))
right.semilogy(off, "o-", color="#0072B2")
right.axhline(1e-3, color="black", linestyle=":")
right.set(xlabel="outer step", ylabel="relative error", title="hypergradient (dotted: asked for)")
plt.show()
