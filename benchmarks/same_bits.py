"""Whether a change of the code has left every number of the experiments as it was, to the bit.

Runs each experiment of the registry at scale `smoke`, and the figures and tables on grids of a few
points, with seed 0, in float32, on one thread. Of what they leave it keeps the numbers of every
JSON and CSV file (times and versions aside), all tensors of `model.pt`, `learned.pt` and
`checkpoint.pt`, and, where no time is drawn or printed, checksums of texts and of pictures.

    python benchmarks/same_bits.py --save FILE       # before the change
    python benchmarks/same_bits.py --against FILE    # after it, same machine: 1 where they differ

`--only WORD …` takes the runs whose name contains one of the words. A few minutes on two CPU cores.
"""

import argparse
import csv
import hashlib
import json
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console

from equigrad.experiments.registry import COMMANDS
from equigrad.experiments.runs.predict import predict_images, predict_table

WITH_TIMES = ("learning.png", "table1.md", "table2.md", "equilibrium.md", "accuracy.md")
"""Files that show such numbers."""

UNLIKE = {*("seconds", "test_seconds", "minutes", "megabytes"), *("started", "versions", "command")}
"""Names of what differs each time, or from machine to machine."""

Run = tuple[str, dict[str, str], dict[str, Any]]
"""What is run, the words that choose its defaults, and settings beside them."""

RUNS: dict[str, Run] = {
    "digits": ("run digits", {}, {}),
    "digits nystrom": ("run digits", {"estimator": "nystrom"}, {"compare": False}),
    "digits seeds": ("run digits", {}, {"seeds": 2, "outer_steps": 1}),
    "mnist-10": ("run mnist", {}, {}),
    "mnist-30000": ("run mnist", {"setting": "mnist-30000"}, {"compare": False}),
    "cifar10": ("run cifar10", {}, {}),
    "tabular number": ("run tabular", {}, {"csv": "table.csv", "target": "height"}),
    "tabular class": (
        *("run tabular", {}),
        {"csv": "table.csv", "target": "kind", "missing": "impute"},
    ),
    "folder": ("run folder", {}, {"images": "images", "size": 16}),
    "sinusoid": ("run sinusoid", {}, {}),
    "omniglot": ("run omniglot", {}, {}),
    "omniglot imaml": ("run omniglot", {"method": "imaml"}, {}),
    "omniglot control": ("run omniglot", {"method": "least-control-modulation"}, {}),
    "omniglot images": (
        "run omniglot",
        {},
        {"images": "images", "way": 2, "side": 16, "queries": 2, "test_queries": 4},
    ),
    "equilibrium": ("run equilibrium", {}, {}),
    "representation": ("run representation", {}, {}),
    "matched-phases": (
        *("reproduce matched-phases", {}),
        {"seeds": 2, "dim": 5, "steps": (5, 20), "smallest_exponent": -3},
    ),
    "fig1": ("reproduce fig1", {}, {}),
    "fig2": (
        *("reproduce fig2", {}),
        {
            "steps": (50, 100),
            "betas": (0.1, 1.0),
            "total_steps": 100,
            "shares": (0.5, 0.75),
            "smallest_exponent": -1,
            "per_decade": 1,
        },
    ),
    "figS1": ("reproduce figS1", {}, {}),
    "figS2": ("reproduce figS2", {}, {}),
    "figS3": ("reproduce figS3", {}, {"draws": 3, "dim": 6, "steps": (5, 10), "per_decade": 2}),
    "figS4": ("reproduce figS4", {}, {"draws": 3, "dim": 6, "steps": (1, 5, 20)}),
    "figS5": ("reproduce figS5", {}, {"draws": 3, "dim": 6, "steps": (4, 12, 20), "per_decade": 2}),
    "figS6": ("reproduce figS6", {}, {"draws": 3, "dim": 6, "total_steps": 8}),
    "accuracy": (
        *("reproduce accuracy", {}),
        {"problems": ("quadratic-1", "ridge"), "rtols": (1e-2, 1e-4), "repeats": 1, "tuned": False},
    ),
    "table1": (
        "reproduce table1",
        {},
        {"scale": "smoke", "seeds": 2, "only": ("mnist-1", "cifar-50")},
    ),
    "table2": ("reproduce table2", {}, {}),
    "fig3": ("reproduce fig3", {}, {}),
    "equilibrium table": ("reproduce equilibrium", {}, {}),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--save", type=Path)
    choice.add_argument("--against", type=Path)
    parser.add_argument("--only", nargs="*", default=[""])
    words = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for name in RUNS:
        if any(word in name for word in words.only):
            began = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a few steps settle little
                found[name] = outcome(name, Path(folder))
            print(f"{name}: {len(found[name])} values, {time.perf_counter() - began:.1f} s")
    if words.save is not None:
        torch.save(found, words.save)
        return 0
    known = torch.load(words.against, weights_only=True)
    differing = [
        f"{name}: {line}" for name in found for line in differences(known[name], found[name])
    ]
    print("\n".join(differing) or "the same bits")
    return int(bool(differing))


def outcome(name: str, folder: Path) -> dict[str, Any]:
    """All values that a run leaves, by file and name."""
    bring_data(folder)
    spelled, chosen, changes = RUNS[name]
    command = next(c for c in COMMANDS if f"{c.verb} {c.name}" == spelled)
    own = {k: folder / v if k in ("csv", "images") else v for k, v in changes.items()}
    config = command.defaults(scale="smoke", **chosen)
    everywhere = {"threads": 1, "device": "cpu"}
    there = {field.name for field in fields(config)}
    config = replace(config, **{k: v for k, v in everywhere.items() if k in there}, **own)
    out, quiet = folder / "run", Console(quiet=True)
    command.work(config, out, resume=False, console=quiet)
    if "csv" in own:
        predict_table(
            *(out, folder / "table.csv"),
            out=out / "said.csv",
            delimiter=None,
            encoding="utf-8",
            decimal=None,
            header="yes",
            console=quiet,
        )
    elif "images" in own and spelled == "run folder":
        predict_images(
            out, folder / "images", out=out / "said.csv", skip_broken=False, console=quiet
        )
    return {
        f"{path.relative_to(out)} {key}".strip(): value.replace(str(folder), "")
        if isinstance(value, str)
        else value
        for path in sorted(out.rglob("*"))
        if path.name not in WITH_TIMES
        for key, value in values(path)
    }


def bring_data(folder: Path) -> None:
    """A table and a folder of images, drawn by a fixed seed."""
    draw = random.Random(0)
    rows = [("width", "colour", "height", "kind")]
    for _ in range(60):
        width, colour = draw.gauss(0, 1), draw.choice(["red", "blue", ""])
        kind = "big" if width > 0 else "small"
        rows.append((f"{width:.3f}", colour or "grey", f"{width**2 + draw.random():.3f}", kind))
    (folder / "table.csv").write_text("\n".join(map(",".join, rows)) + "\n")
    for i in range(72):
        place = folder / "images" / f"class{i % 12}" / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        shades = bytes(min(255, draw.randrange(200) + 4 * (i % 12)) for _ in range(3 * 16 * 16))
        Image.frombytes("RGB", (16, 16), shades).save(place)


def values(path: Path) -> Iterator[tuple[str, Any]]:
    """What a file says, by name."""
    if path.suffix == ".pt":
        yield from flat(torch.load(path, map_location="cpu", weights_only=True))
    elif path.suffix == ".json":
        yield from flat(json.loads(path.read_text()))
    elif path.suffix == ".csv":
        with path.open() as file:
            yield from flat(list(csv.DictReader(file)))
    elif path.suffix == ".md":
        yield "", hashlib.sha256(" ".join(path.read_text().split()).encode()).hexdigest()
    elif path.suffix == ".png":
        yield "", hashlib.sha256(Image.open(path).tobytes()).hexdigest()


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The tensors and numbers within, by dotted name; times and versions are left out."""
    if isinstance(value, Mapping):
        entries = [(k, v) for k, v in value.items() if k not in UNLIKE]
    elif isinstance(value, list | tuple):
        entries = list(enumerate(value))
    elif isinstance(value, str) and name.rpartition(".")[2] in ("identity", "format", "equigrad"):
        return
    else:
        yield name, value
        return
    for key, entry in entries:
        yield from flat(entry, f"{name}.{key}".strip("."))


def differences(known: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    """A line a value that is not as it was."""
    for key in {**known, **found}:
        if key not in found or key not in known:
            yield f"{key} is {'gone' if key in known else 'new'}"
        elif not alike(known[key], found[key]):
            yield f"{key}: {brief(known[key], found[key])}"


def alike(one: Any, other: Any) -> bool:
    """Whether two values have the same bits; NaN is like NaN."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = (one.dtype, one.shape) == (other.dtype, other.shape)
        return same and one.numpy().tobytes() == other.numpy().tobytes()
    return type(one) is type(other) and repr(one) == repr(other)


def brief(one: Any, other: Any) -> str:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.shape != other.shape:
            return f"shape {tuple(one.shape)}, now {tuple(other.shape)}"
        return f"differs by {(one.double() - other.double()).abs().max().item():.2g} at most"
    return f"was {one!r}, is {other!r}"


if __name__ == "__main__":
    sys.exit(main())
