"""Settings of a transformers Trainer as a solver."""

import math
from functools import partial
from typing import Any

import torch

from equigrad.errors import ConfigurationError
from equigrad.fields import Count, expect
from equigrad.solvers import TorchOptimizer


def trainer_settings(arguments: Any, examples: int) -> dict[str, Any]:
    """Arguments of `example_scores` that train as `transformers.TrainingArguments` say.

    This is AdamW with the learning-rate schedule, clipping, accumulation and number of batches of
    the arguments. Unlike in `Trainer`, weight decay also acts on biases and layer norms.

    Args:
        arguments: the `TrainingArguments`.
        examples: number of examples in the training set.

    Returns:
        `solver` and `batch_size`.

    Raises:
        ConfigurationError: the optimiser is not AdamW.

    Example:
        >>> from transformers import TrainingArguments  # doctest: +SKIP
        >>> arguments = TrainingArguments("out", learning_rate=1e-4)  # doctest: +SKIP
        >>> example_scores(
        ...     model, train, valid, **trainer_settings(arguments, len(train))
        ... )  # doctest: +SKIP
    """
    from transformers import get_scheduler  # installed, since the arguments come from it

    expect(Count, examples=examples)
    name = str(getattr(arguments.optim, "value", arguments.optim))
    if not name.startswith("adamw_torch"):
        raise ConfigurationError(
            f"optim={name!r} is not one of torch's AdamW optimizers; give example_scores a "
            f"TorchOptimizer with the class that you train with"
        )
    batch_size = arguments.per_device_train_batch_size
    accumulate = arguments.gradient_accumulation_steps
    batches = math.ceil(examples / batch_size)
    steps = arguments.max_steps
    if steps <= 0:
        steps = math.ceil(arguments.num_train_epochs * max(batches // accumulate, 1))
    solver = TorchOptimizer(
        optimizer=torch.optim.AdamW,
        options={
            "lr": arguments.learning_rate,
            "betas": (arguments.adam_beta1, arguments.adam_beta2),
            "eps": arguments.adam_epsilon,
            "weight_decay": arguments.weight_decay,
        },
        scheduler=partial(
            get_scheduler,
            arguments.lr_scheduler_type,
            num_warmup_steps=arguments.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=arguments.lr_scheduler_kwargs or None,
        ),
        clip_norm=arguments.max_grad_norm or None,
        accumulate=accumulate,
        max_steps=steps * accumulate,
    )
    return {"solver": solver, "batch_size": batch_size}
