import subprocess
import sys

import pytest

PEAK = """
import resource, sys, torch, equigrad as eg
torch.set_num_threads(1)
big = 500_000  # 2 MB a copy: a stored trajectory of 1900 more steps would take 3.8 GB
problem = eg.Bilevel(
    lambda p, m: (p["w"] * m["scale"]).square().mean(), lambda p, m: (p["w"] - 1).square().mean()
)
eg.meta_gradient(
    problem, {"w": torch.ones(big)}, {"scale": torch.ones(())},
    solver=eg.GradientDescent(lr=0.1, momentum=0.9, max_steps=int(sys.argv[1])),
    estimator=eval(sys.argv[2]),
)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def peak_megabytes(steps: int, estimator: str) -> float:
    command = [sys.executable, "-c", PEAK, str(steps), estimator]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize(
    "estimator",
    ["eg.Contrastive(nudged_solver=eg.GradientDescent(lr=0.1, momentum=0.9, max_steps=20))"],
)
def test_peak_memory_does_not_grow_with_inner_steps(estimator):
    few, many = peak_megabytes(100, estimator), peak_megabytes(2000, estimator)
    assert many < few + 20  # ten copies of the parameters' 2 MB: the allocator's noise
