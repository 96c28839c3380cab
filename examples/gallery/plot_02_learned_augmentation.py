"""
Learn how strongly to augment
=============================

For anyone who guesses how far to rotate or shift training images. Rotations and shifts are
drawn from ranges whose widths are hyperparameters, and the validation loss tells in which direction
to change them. Here the training images are upright, those to classify rotated by up to 40 degrees.
"""

# %%
# 100 digits to learn from, each used five times: moved by fixed noise times the learned widths.
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import affine_grid, cross_entropy, grid_sample

import equigrad as eg

torch.manual_seed(0)
pixels, digits = (torch.tensor(array) for array in load_digits(return_X_y=True))
train, valid, test = torch.randperm(len(digits)).split([100, 400, 1297])


def moved(images, angle, across, down):  # by radians and by pixels
    rows = [angle.cos(), -angle.sin(), across / 4], [angle.sin(), angle.cos(), down / 4]
    matrix = torch.stack([torch.stack(row, 1) for row in rows], 1)
    grid = affine_grid(matrix, [len(images), 1, 8, 8], align_corners=False)
    return grid_sample(images.view(-1, 1, 8, 8), grid, align_corners=False).flatten(1)


x, net = pixels.float() / 16, eg.nn.Functional(eg.nn.tanh_network(64, [20], 10))
rotated = moved(x, torch.deg2rad(80 * torch.rand(len(x)) - 40), *torch.zeros(2, len(x)))
copies, noise = train.repeat(5), 2 * torch.rand(3, 500) - 1


def inner_loss(params, meta):
    images = moved(x[copies], *(meta["log"].exp()[:, None] * noise))
    decay = 3e-3 * sum(p.square().sum() for p in params.values())
    return cross_entropy(net(params, images), digits[copies]) + decay


problem = eg.Bilevel(inner_loss, lambda p, m: cross_entropy(net(p, rotated[valid]), digits[valid]))
meta = {"log": torch.tensor([0.2, 0.3, 0.3]).log().requires_grad_()}  # log widths
solver, adam = eg.LBFGS(tol=1e-3, max_steps=100), torch.optim.Adam(meta.values(), lr=0.2)
params, angles, scores = net.params(), [], []
for _ in range(9):
    result = eg.meta_gradient(problem, params, meta, solver=solver)
    params, hits = result.params, (net(result.params, rotated).argmax(1) == digits).double()
    angles.append(torch.rad2deg(meta["log"][0].exp()).item())
    scores.append([100 * hits[part].mean().item() for part in (valid, test)])
    result.assign()
    adam.step()
print(f"test images correct: {scores[0][1]:.1f} % before, {scores[-1][1]:.1f} % after")
figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
axes.plot(angles, [score[0] for score in scores], "o-", color="#0072B2", label="validation")
axes.plot(angles, [score[1] for score in scores], "^--", color="#D55E00", label="test")
axes.axvline(40, color="black", linestyle=":", label="rotation of the\nimages to classify")
axes.set(xlabel="learned rotation, up to (degrees)", ylabel="images correct (%)")
axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()
