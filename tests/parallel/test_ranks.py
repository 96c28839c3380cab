"""Two processes, each with half of the data, are one with all of it; or each says why not."""

import importlib.util
import multiprocessing
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from rank_checks import world
from rank_toolbox import CHECKS, ENGINES, RANKS

from equigrad.estimators import ESTIMATORS

NEEDS = {"accelerate": "accelerate", "fabric": "lightning_fabric"}
LAST = "a_rank_that_dies"

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch has no torch.distributed")


def missing(name: str) -> str | None:
    needed = NEEDS.get(name.rpartition("-")[2])
    return needed if needed and importlib.util.find_spec(needed) is None else None


@pytest.fixture(scope="module")
def found(request, tmp_path_factory) -> dict[tuple[int, str], str]:
    """What each of two processes says of each check that was asked for."""
    asked = {
        i.callspec.params["name"]
        for i in request.session.items
        if hasattr(i, "callspec") and i.path == Path(__file__) and "name" in i.callspec.params
    }
    names = [n for n in CHECKS if n in asked and n != LAST and missing(n) is None] + [LAST]
    store = str(tmp_path_factory.mktemp("ranks") / "meet")
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        results = manager.dict()
        workers = [
            context.Process(target=world, args=(rank, RANKS, store, names, results))
            for rank in range(RANKS)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(240)
            if worker.is_alive():  # a check hangs, which is what they are there to find
                worker.kill()
        return dict(results)


def table() -> str:
    """Estimators by engines, as the page on several processes has it."""
    served = {n: f.keywords.get("served") for n, f in CHECKS.items() if isinstance(f, partial)}
    lines = ["| estimator | " + " | ".join(ENGINES) + " |", "| --- |" + " --- |" * len(ENGINES)]
    for kind in ESTIMATORS:
        cells = ["yes" if served[f"{kind.__name__}-{e}"] else "–" for e in ENGINES]
        lines.append(f"| {kind.__name__} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def test_the_page_has_a_test_for_each_cell():
    page = Path(__file__).parents[2] / "docs" / "several-processes.md"
    assert table() in page.read_text()


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(name, found):
    if needed := missing(name):
        pytest.skip(f"{needed} is not installed")
    if torch.__version__ < "2.13" and (name.endswith("-DTensor") or name == "shards"):
        pytest.skip("the DTensors of older versions of torch fail at the mean of a loss")
    for rank in range(1 if name == LAST else RANKS):
        assert found.get((rank, name), "never ended") == "passed", f"rank {rank}"
