"""
Least control: learn to make do without a teacher
=================================================

For anyone who studies learning in brains or in controlled systems. While a network settles, a
controller pushes all of its neurons so that the answer is better. Each weight learns from the push
that its neuron gets, and as the network learns the controller has less to do.
"""

# %%
# Handwritten digits, and a network whose 74 neurons settle.
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits

import equigrad as eg

torch.manual_seed(0)
pixels, digits = (torch.tensor(array) for array in load_digits(return_X_y=True))
train, valid, test = torch.randperm(len(digits)).split([1000, 300, 497])
x, solver = pixels.float() / 16, eg.Anderson(tol=1e-3, max_steps=60)
net = eg.nn.Relaxing(eg.nn.tanh_network(64, [32, 32], 10))
meta, adam = dict(net.named_parameters()), torch.optim.Adam(net.parameters(), lr=3e-3)
rule = eg.LeastControl(controller=eg.DynamicInversion(), start="params")


def accuracy(index):  # without control, in percent
    problem, start = net.problem(x[index], digits[index]), net.start(x[index])
    states = eg.settle(problem, start, meta, solver=solver).params
    return 100 * (net.logits(states, meta).argmax(1) == digits[index]).double().mean().item()


# %%
# At the controlled equilibrium the control is minus the network's own velocity, f(h) - h.
before, course, control = accuracy(test), [accuracy(valid)], []
for _ in range(10):
    for batch in train[torch.randperm(1000)].split(50):
        problem, start = net.problem(x[batch], digits[batch]), net.start(x[batch])
        result = eg.meta_gradient(problem, start, meta, solver=solver, estimator=rule)
        with torch.no_grad():
            moved = problem.map(result.params, meta)
            push = [moved[name] - state for name, state in result.params.items()]
        control.append(torch.cat(push, 1).norm(dim=1).mean().item())
        result.assign()
        adam.step()
    course.append(accuracy(valid))
print(f"test images correct: {before:.1f} % before, {accuracy(test):.1f} % after")
print(f"mean control of an image: {control[0]:.3f} at first, {control[-1]:.3f} at last")
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
left.plot(control, color="#0072B2")
left.set(xlabel="outer step", ylabel="control of an image (norm)", ylim=0)
right.plot(course, "o-", color="#D55E00")
right.set(xlabel="passes through the training images", ylabel="validation images correct (%)")
plt.show()
