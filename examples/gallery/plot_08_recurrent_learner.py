"""
A recurrent learner: which sensors are broken?
==============================================

For anyone who learns from time series. A GRU learns to follow a signal from the recordings of 80
sensors, about half of them broken. Each gets a weight, learned on four that can be trusted.
"""

import matplotlib.pyplot as plt
import torch

import equigrad as eg

torch.manual_seed(0)


def recordings(count, noise=0.5):  # of a leaky average y of an input x
    x, lag = torch.randn(count, 10), torch.arange(10) - torch.arange(10)[:, None]
    return x[..., None], x @ (0.4 * 0.8**lag).triu() + noise * torch.randn(count, 10)


seen, trusted, test = recordings(80), recordings(4), recordings(200, noise=0)
broken = torch.rand(80) < 0.5
seen[1][broken] = torch.randn_like(seen[1][broken])
net = eg.nn.Functional(torch.nn.GRU(1, 8, batch_first=True))


def errors(params, recorded):  # the sum of eight units follows the signal
    return (net(params, recorded[0])[0].sum(2) - recorded[1]).square().mean(1)


def inner_loss(params, meta, recorded=seen):
    decay = 1e-2 * sum(p.square().sum() for p in params.values())
    return (2 * meta["logit"].sigmoid() * errors(params, recorded)).mean() + decay


def mse(problem, logit):
    settled = eg.settle(problem, net.params(), {"logit": logit}, solver=solver)
    return errors(settled.params, test).mean().item()


# %%
# Weights start at 1. After 100 steps the GRU is still far from rest; the printed status says so.
problem = eg.Bilevel(inner_loss, lambda params, meta: errors(params, trusted).mean())
alone = eg.Bilevel(lambda params, meta: inner_loss(params, meta, trusted), problem.outer_loss)
meta = {"logit": torch.zeros(80, requires_grad=True)}
solver = eg.GradientDescent(lr=0.1, momentum=0.9, nesterov=True, max_steps=100)
adam, rule = torch.optim.Adam(meta.values(), lr=0.5), eg.Contrastive()
how = {"solver": solver, "estimator": rule, "optimizer": adam, "steps": 8}
status = eg.training.learn(problem, net.params(), meta, **how).history[-1]["status"]
weight = 2 * meta["logit"].detach().sigmoid()
scores = mse(problem, torch.zeros(80)), mse(problem, meta["logit"]), mse(alone, torch.zeros(4))
print("test error {:.3f} before, {:.3f} after, {:.3f} by the trusted ones alone".format(*scores))
print(f"{((weight < 1) == broken).sum()} of 80 sensors judged rightly; {status}")
axes = plt.figure(figsize=(7, 3.5), layout="constrained").subplots()
axes.plot(weight[broken].sort()[0], "^", color="#D55E00", label="broken")
axes.plot(weight[~broken].sort()[0], "o", color="#0072B2", label="sound")
axes.set(xlabel="sensors, by their weights", ylabel="learned weight")
axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()
