"""What two processes do in test_ranks.py: each check runs on both, and says what went wrong."""

import os
import traceback
from datetime import timedelta
from typing import Any

import rank_engines
import rank_habits
import rank_mishaps
import torch
import torch.distributed as dist
from rank_toolbox import CHECKS, SECONDS

PARTS = (rank_engines, rank_habits, rank_mishaps)
"""Whoever imports them finds their checks in `CHECKS`."""


def world(rank: int, size: int, store: str, names: list[str], results: Any) -> None:
    """One process; what it finds goes into `results[rank]`."""
    torch.set_num_threads(1)
    meet = f"file://{store}"
    timeout = timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", meet, rank=rank, world_size=size, timeout=timeout)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")  # others look for them
    for name in names:
        try:
            CHECKS[name]()
            results[rank, name] = "passed"
        except Exception:
            results[rank, name] = traceback.format_exc()
    dist.destroy_process_group()
