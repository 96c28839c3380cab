"""
Learn loss weights for rare classes
===================================

For anyone with many examples of some classes and few of others. Each class gets a weight in the
training loss, learned so that a classifier does well on validation images with all classes alike.
For comparison: the usual recipe, a weight inversely proportional to the number of examples.
"""

# %%
# Handwritten digits: 60 images of every even one to learn from, and 4 of every odd one.
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

import equigrad as eg

torch.manual_seed(0)
pixels, digits = (torch.tensor(array) for array in load_digits(return_X_y=True))
pool, valid, test = torch.randperm(len(digits)).split([800, 200, 797])
count = torch.tensor([60, 4] * 5)
train = torch.cat([pool[digits[pool] == digit][:n] for digit, n in enumerate(count)])
x, net = pixels.float() / 16, eg.nn.Functional(torch.nn.Linear(64, 10))

# %%
# The inner loss is a weighted cross-entropy; the outer loss has no weights.


def inner_loss(params, meta):
    losses = cross_entropy(net(params, x[train]), digits[train], reduction="none")
    decay = 3e-3 * params["weight"].square().sum()
    return (meta["log_weight"].exp()[digits[train]] * losses).mean() + decay


problem = eg.Bilevel(inner_loss, lambda p, m: cross_entropy(net(p, x[valid]), digits[valid]))
meta, solver = {"log_weight": torch.zeros(10, requires_grad=True)}, eg.LBFGS(tol=1e-4)
adam = torch.optim.Adam(meta.values(), lr=0.2)
how = {"solver": solver, "estimator": eg.Contrastive(), "optimizer": adam, "start": "warm"}
eg.training.learn(problem, net.params(), meta, steps=30, **how)

# %%
# Train once more by each set of weights. The test images are used for the first time.
axes = plt.figure(figsize=(8, 3.5), layout="constrained").subplots()
weights = {"equal": torch.ones(10), "inverse to frequency": len(train) / 10 / count}
weights["learned"] = meta["log_weight"].detach().exp()
looks = zip(("D", "^", "o"), ("#000000", "#E69F00", "#0072B2"), strict=True)
for (what, weight), (marker, color) in zip(weights.items(), looks, strict=True):
    theta = {"log_weight": weight.log()}
    params = eg.settle(problem, net.params(), theta, solver=solver).params
    correct = (net(params, x[test]).argmax(1) == digits[test]).double().mean()
    print(f"weights {what}: {correct:.1%} of the test images correct")
    label = f"{what}: {correct:.1%} correct"
    axes.plot(weight, marker, color=color, fillstyle="none", label=label)
axes.set(xlabel="digit", ylabel="weight in the loss", yscale="log", xticks=range(10))
axes.legend(title="weights", loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()
