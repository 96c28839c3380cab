"""`Contrastive(rtol=…)` on draws of the zoo on which none of its constants was chosen."""

import torch

import equigrad as eg
from equigrad.testing.zoo import ZOO

SLOW = ("transformer", "deep-tanh", "lstm")


def main() -> None:
    torch.set_num_threads(1)
    missed, ratios = 0, []
    for draw in range(1, 6):
        for name, make in ZOO.items():
            if name in SLOW:
                continue
            case = make(draw)
            for rtol in (1e-1, 1e-2, 1e-3, 1e-5):
                result = eg.meta_gradient(
                    case.problem,
                    case.params,
                    case.meta_params,
                    solver=eg.LBFGS(),
                    estimator=eg.Contrastive(rtol=rtol),
                )
                error = case.relative_error(result.grads)
                missed += error > rtol
                ratios.append((result.error_estimate or 0.0) / error)
    within = sum(1 <= ratio <= 30 for ratio in ratios)
    print(f"{len(ratios)} runs: {missed} errors above rtol; the estimate is 1 to 30 times the")
    print(f"error in {within}, from {min(ratios):.2g} to {max(ratios):.3g} times")


if __name__ == "__main__":
    main()
