"""
Equilibrium propagation and backpropagation
===========================================

For anyone who studies how brains or analogue hardware could learn. A Hopfield network settles to
its answer, is nudged towards the right one, and changes each weight by the activities at its two
ends. A feed-forward network of the same size learns by backpropagation for comparison.
"""

# %%
# Handwritten digits. Both networks have 100 hidden units and learn by the squared error.
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import equigrad as eg

torch.manual_seed(0)
pixels, digits = (torch.tensor(array) for array in load_digits(return_X_y=True))
train, valid, test = torch.randperm(len(digits)).split([1000, 300, 497])
x, targets = pixels.float() / 16, nn.functional.one_hot(digits).float()
hopfield = eg.nn.Hopfield.fully_connected([64, 100, 10])
layered = nn.Sequential(nn.Linear(64, 100), nn.Hardtanh(0, 1), nn.Linear(100, 10))
adams = [torch.optim.Adam(net.parameters(), lr=3e-3) for net in (hopfield, layered)]
meta, settling = dict(hopfield.named_parameters()), eg.Picard(max_steps=15)
rule = eg.Contrastive(beta=0.1, nudged_solver=eg.Picard(max_steps=5))


def accuracies(index):
    problem = hopfield.problem(x[index], targets[index])
    states = eg.settle(problem, hopfield.start(x[index]), meta, solver=settling).params
    answers = hopfield.logits(states, meta), layered(x[index])
    return [100 * (a.argmax(1) == digits[index]).double().mean().item() for a in answers]


# %%
# Eight passes through the training images, with the same batches and steps for both.
before, course = accuracies(test), [accuracies(valid)]
for _ in range(8):
    for batch in train[torch.randperm(1000)].split(50):
        problem, start = hopfield.problem(x[batch], targets[batch]), hopfield.start(x[batch])
        result = eg.meta_gradient(problem, start, meta, solver=settling, estimator=rule)
        result.assign()  # the loss is a sum over samples, and Adam does not mind
        layered.zero_grad()
        (layered(x[batch]) - targets[batch]).square().sum().backward()
        for adam in adams:
            adam.step()
    course.append(accuracies(valid))
axes = plt.figure(figsize=(8, 3.5), layout="constrained").subplots()
after, styles = accuracies(test), (("o-", "#0072B2"), ("^--", "#D55E00"))
for i, name in enumerate(("equilibrium propagation", "backpropagation")):
    print(f"test images correct, {name}: {before[i]:.1f} % before, {after[i]:.1f} % after")
    axes.plot([both[i] for both in course], styles[i][0], color=styles[i][1], label=name)
axes.set(xlabel="passes through the training images", ylabel="validation images correct (%)")
axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()
