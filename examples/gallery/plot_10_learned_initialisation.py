"""
Learned initialisations: the contrastive rule and MAML
======================================================

For anyone who has ten examples of a task and many other tasks. From tasks that are sine curves,
both methods learn where the weights of a network should start. MAML differentiates through five
steps of learning; the contrastive rule lets the learner take ten, and needs first derivatives only.
"""

# %%
# Both have the same network, tasks and outer optimiser. The contrastive rule learns a centre, at
# which the weights start and to which they are weakly pulled.
import matplotlib.pyplot as plt
import torch

import equigrad as eg
from equigrad.tasks import FewShotLearner, Sinusoids
from equigrad.training.few_shot import judge, learn_tasks, mean_squared_error

torch.manual_seed(0)
network, loss = eg.nn.tanh_network(1, [40, 40], 1), torch.nn.functional.mse_loss
maml = FewShotLearner(
    model=eg.nn.LearnedStart(network),
    loss=loss,
    solver=eg.GradientDescent(lr=0.02, max_steps=5),
    estimator=eg.MAML(),
)
contrastive = FewShotLearner(
    model=eg.nn.ComplexSynapse(network, strength=0.01, center="init", learn=("center",)),
    loss=loss,
    solver=eg.GradientDescent(lr=0.02, max_steps=10),
    estimator=eg.Contrastive(beta=0.1),
)

# %%
# 150 outer steps of ten tasks, then 100 new tasks: ten points to learn from, 50 others to judge.
train, test = Sinusoids(seed=0), Sinusoids(seed=1, queries=50)
figure, axes = plt.subplots(figsize=(8, 3.5), layout="constrained")
counts = (0, 1, 2, 5, 10, 20)


def judged(name, learner, meta, style):
    scores = [judge(learner, meta, test, mean_squared_error, tasks=100, steps=n) for n in counts]
    print(f"mean squared error after 10 steps, {name}: {scores[4].mean:.2f}")
    axes.semilogy(counts, [score.mean for score in scores], style, label=name)


judged("not meta-learned", maml, maml.model.meta_params(), "D:k")
axes.set_prop_cycle(color=["#D55E00", "#0072B2"])
for name, learner, style in (("MAML", maml, "s--"), ("contrastive", contrastive, "o-")):
    meta = learner.model.meta_params()
    adam = torch.optim.Adam(meta.values(), lr=0.01)
    state = learn_tasks(learner, meta, train, tasks=10, optimizer=adam, steps=150)
    judged(f"{name}, {state.gradient_evaluations:,} gradients", learner, meta, style)
axes.set(xticks=counts, xlabel="steps of learning a new task", ylabel="mean squared error")
axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()
