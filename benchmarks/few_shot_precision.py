"""Meta-gradients of Omniglot's tasks in bf16, beside those in float32.

The settings of a scale and the learner at its start, batches of tasks one after the other: the
cosine of the two meta-gradients (mean, least), the ratio of their lengths, and that of their
seconds, the least of the interleaved batches.

    python benchmarks/few_shot_precision.py [--scale small] [--batches 5] [--tasks 16]
"""

import argparse
import time
from dataclasses import replace
from statistics import fmean
from typing import Any, get_args

import torch

from equigrad.estimators import Contrastive
from equigrad.experiments.few_shot.meta_training import MetaTrainer
from equigrad.experiments.few_shot.methods import FewShotMethodName
from equigrad.experiments.few_shot.omniglot import Omniglot
from equigrad.freed_memory import keep_freed_memory
from equigrad.training.precision import Precision, computing_in

BOTH: tuple[Precision, Precision] = "float32", "bf16"


def lowered(config: Omniglot, batches: int) -> list[str]:
    """Cosines, ratio of lengths and ratio of seconds, as cells of a table."""
    trainer = MetaTrainer(config)
    meta_params = trainer.learner.model.meta_params()
    flat: dict[str, list[torch.Tensor]] = {name: [] for name in BOTH}
    seconds: dict[str, list[float]] = {name: [] for name in BOTH}
    for draw in range(batches):
        batch = trainer.tasks.train.sample(config.tasks, draw).to(trainer.device, torch.float32)
        for precision in BOTH:
            with computing_in(precision, trainer.device):
                began = time.perf_counter()
                grads = trainer.learner.meta_gradient(meta_params, batch).grads.values()
                flat[precision].append(torch.cat([g.flatten() for g in grads]).double().cpu())
                seconds[precision].append(time.perf_counter() - began)
    pairs = list(zip(*flat.values(), strict=True))
    cosines = [torch.cosine_similarity(full, low, dim=0).item() for full, low in pairs]
    lengths = fmean((low.norm() / full.norm()).item() for full, low in pairs)
    ratio = min(seconds["bf16"]) / min(seconds["float32"])
    return [f"{fmean(cosines):.3f}", f"{min(cosines):.3f}", f"{lengths:.2f}", f"{ratio:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", default="small")
    parser.add_argument("--batches", type=int, default=5)
    parser.add_argument("--tasks", type=int)
    parser.add_argument("--methods", nargs="+", default=get_args(FewShotMethodName)[:-1])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    print(f"torch {torch.__version__}, scale {arguments.scale}, {arguments.batches} batches\n")
    print("| method | nudge | cosine | least | length | seconds |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for method in arguments.methods:
        config = Omniglot.preset(scale=arguments.scale, method=method)
        if arguments.tasks is not None:
            config = replace(config, tasks=arguments.tasks)
        rule: Any = config.estimator
        nudges = ("force", "loss") if isinstance(rule, Contrastive) else (None,)
        for nudge in nudges:
            own = config if nudge is None else replace(config, estimator=replace(rule, nudge=nudge))
            cells = " | ".join(lowered(own, arguments.batches))
            print(f"| {method} | {nudge or '–'} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
