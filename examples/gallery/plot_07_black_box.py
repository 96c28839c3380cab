"""
A learner from scikit-learn: which inputs matter?
=================================================

For anyone whose learner is not written in PyTorch. Logistic regression of scikit-learn is used as
it is, and every input gets a scale, learned on validation images. A step fits the learner four
times: twice as usual, and twice with a little weight on the validation images.
"""

# %%
# Two digits side by side, of which the left one is asked for. 100 pairs to learn from.
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import cross_entropy

import equigrad as eg

torch.manual_seed(0)
pixels, y = (torch.tensor(array) for array in load_digits(return_X_y=True))
pairs = torch.stack([pixels, pixels[torch.randperm(len(y))]], 1).view(-1, 2, 8, 8) / 16
x = pairs.transpose(1, 2).reshape(-1, 128)  # eight rows of 16 pixels
known, test = torch.randperm(len(y)).split([500, 1297])
train, valid = known.split([100, 400])


def learner(objective, start):
    scaled = x[known] * objective.meta_params["log"].exp()
    weight = torch.cat([torch.ones(100), torch.full((400,), objective.beta)])
    model = LogisticRegression(tol=1e-8, solver="newton-cg").fit(scaled, y[known], weight)
    return {"coef": model.coef_, "intercept": model.intercept_}


# %%
# The losses say in PyTorch what the learner minimises.
def loss(params, meta, index):
    logits = (x[index] * meta["log"].exp()) @ params["coef"].T + params["intercept"]
    return cross_entropy(logits, y[index], reduction="sum")


problem = eg.Bilevel(
    inner_loss=lambda p, m: loss(p, m, train) + p["coef"].square().sum() / 2,
    outer_loss=lambda p, m: loss(p, m, valid),
)
start = {"coef": torch.zeros(10, 128).double(), "intercept": torch.zeros(10).double()}
meta, solver = {"log": torch.zeros(128).double().requires_grad_()}, eg.BlackBox(learner, tol=1e-3)
adam = torch.optim.Adam(meta.values(), lr=0.1)
rule = eg.Contrastive(beta=1e-3, scheme="forward", points=3)  # no weight is negative
eg.training.learn(problem, start, meta, solver=solver, estimator=rule, optimizer=adam, steps=20)
for when, inputs in (("before", x), ("after", x * meta["log"].detach().exp())):
    tried = [LogisticRegression(C=c, max_iter=2000) for c in (0.1, 1, 10, 100, 1000)]
    scores = [m.fit(inputs[train], y[train]).score(inputs[valid], y[valid]) for m in tried]
    score = tried[scores.index(max(scores))].score(inputs[test], y[test])
    print(f"{when}: {score:.1%} of the test images correct, with the best of five values of C")
figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
picture = axes.imshow(inputs[train].std(0).view(8, 16).numpy(), cmap="cividis")
figure.colorbar(picture, label="spread of the scaled input")
axes.set(xlabel="column (0 to 7: the digit asked for)", ylabel="row", title="Which pixels count")
plt.show()
