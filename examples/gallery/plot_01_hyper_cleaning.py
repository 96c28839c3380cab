"""
Find wrong labels: a weight for every example
=============================================

For anyone whose training labels are partly wrong and who has a few that can be trusted. Each of 800
training images gets a weight, learned so that a classifier trained on the weighted images does well
on 200 trusted ones. The weights then tell which labels to doubt.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

import equigrad as eg

torch.manual_seed(0)
pixels, digits = (torch.tensor(array) for array in load_digits(return_X_y=True))
train, trusted, test = torch.randperm(len(digits)).split([800, 200, 797])
x, labels = pixels.float() / 16, digits.clone()
flipped = torch.rand(800) < 0.4  # and labelled as another digit
labels[train[flipped]] = (digits[train] + torch.randint(1, 10, (800,)))[flipped] % 10

# %%
# The inner loss trains a softmax classifier on weighted images; the outer loss judges it.
net = eg.nn.Functional(torch.nn.Linear(64, 10))


def loss(params, index, weight=1.0, decay=0.0):
    losses = cross_entropy(net(params, x[index]), labels[index], reduction="none")
    return (weight * losses).mean() + decay * params["weight"].square().sum()


problem = eg.Bilevel(
    inner_loss=lambda params, meta: loss(params, train, meta["logit"].sigmoid(), decay=1e-3),
    outer_loss=lambda params, meta: loss(params, trusted),
)
meta = {"logit": torch.zeros(800, requires_grad=True)}  # every weight is a half
solver, adam = eg.LBFGS(tol=1e-4), torch.optim.Adam(meta.values(), lr=0.3)
how = {"solver": solver, "estimator": eg.Contrastive(), "optimizer": adam, "steps": 30}
eg.training.learn(problem, net.params(), meta, start="warm", **how)

# %%
# A label is doubted if its weight has fallen. Leave those out, and take the trusted images in.
weight, kept = meta["logit"].detach().sigmoid(), torch.ones(1000)
f1 = 2 * ((weight < 0.5) & flipped).sum() / ((weight < 0.5).sum() + flipped.sum())
everything = torch.cat([train, trusted])
fit = eg.Bilevel(lambda p, m: loss(p, everything, m["kept"], 1e-3), problem.outer_loss)
for when in ("before", "after"):
    params = eg.settle(fit, net.params(), {"kept": kept}, solver=solver).params
    correct = (net(params, x[test]).argmax(1) == digits[test]).double().mean()
    print(f"{when}: {kept.sum():.0f} training images, {correct:.1%} of the test images correct")
    kept[:800] = (weight >= 0.5).float()
print(f"flipped labels found: F1 = {f1:.2f}")
figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
groups, colors = [weight[~flipped].numpy(), weight[flipped].numpy()], ["#0072B2", "#E69F00"]
axes.hist(groups, 20, color=colors, label=["correct label", "flipped label"])
axes.set(xlabel="learned weight", ylabel="images", title="Where 800 weights have gone")
axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()
