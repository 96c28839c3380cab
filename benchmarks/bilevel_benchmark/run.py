# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false
"""benchopt/benchmark_bilevel, with equigrad beside its solvers.

    git clone https://github.com/benchopt/benchmark_bilevel
    pip install benchopt jax scikit-learn joblib
    EQUIGRAD_DATA=… python benchmarks/bilevel_benchmark/run.py benchmark_bilevel quadratic all
    EQUIGRAD_DATA=… python benchmarks/bilevel_benchmark/run.py benchmark_bilevel mnist all

`grid` runs every solver with every setting for one seed, `best` the setting of each that came
lowest for other seeds, `show` prints the table of these, and `all` does one after the other; about
a quarter of an hour a panel on one core that does nothing else. `--only` picks solvers. Runs are
kept in `equigrad-runs/` of the benchmark, and repeated ones are left out.

Two things differ from `benchopt run`. Seconds are those of the processor instead of the wall, so
that whatever else runs on the machine does not count. And the clock waits for JAX: its functions
return before they have computed, and the benchmark's clock stops when they return.
"""

import argparse
import contextlib
import gzip
import hashlib
import itertools
import os
import pickle
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).parent
DATA = {"quadratic": "simulated", "mnist": "mnist[ratio=0.5]"}
SECONDS = {
    "quadratic": {"grid": 3.0, "best": 6.0},
    "mnist": {"grid": 5.0, "best": 10.0},
}
STEPS = {
    "quadratic": [
        {"step_size": step, "outer_ratio": ratio}
        for step, ratio in ((0.03, 0.1), (0.1, 0.3), (0.1, 1.0))
    ],
    "mnist": [
        {"step_size": step, "outer_ratio": ratio}
        for step, ratio in ((0.01, 1e-5), (0.1, 1e-4), (0.1, 1e-3))
    ],
}
SOLVERS = {
    "F2SA": ("F2SA", {"eval_freq": [16]}),
    "BOME": ("BOME", {}),
    "SOBA": ("SOBA", {"eval_freq": [64]}),
    "SABA": ("SABA", {"eval_freq": [64]}),
    "StocBiO": ("StocBiO", {"eval_freq": [16]}),
    "MRBO": ("MRBO", {"eval_freq": [16]}),
    "AmIGO": ("AmIGO", {"eval_freq": [16]}),
    "equigrad": ("equigrad", {"together": [True], "eval_freq": [32]}),
    "equigrad, all samples": (
        "equigrad",
        {
            "together": [True],
            "batch_size": ["full"],
            "scheme": ["symmetric"],
            "momentum": [0.5],
            "decay": [0.0],
            "eval_freq": [2],
        },
    ),
}
GROWTH = {"quadratic": 0.01, "mnist": 1.0}
"""Of F2SA's λ at every step, as the benchmark's own files of best settings have it."""
SOLVERS |= {
    label.replace("equigrad", "its scan in JAX"): (f"{name}-scan", settings)
    for label, (name, settings) in SOLVERS.items()
    if name == "equigrad"
}


def prepare(benchmark: Path) -> None:
    """Put the solvers and MNIST where the benchmark looks for them, and have it count our way."""
    for name in ("equigrad_one_loop.py", "equigrad_scan.py"):
        shutil.copy(HERE / name, benchmark / "solvers" / name)
    os.chdir(benchmark)
    if not Path("mnist.pkl").exists():
        Path("mnist.pkl").write_bytes(pickle.dumps(mnist()))
    import benchopt.callback
    import benchopt.runner
    import benchopt.stopping_criterion
    import jax

    clock = SimpleNamespace(perf_counter=time.process_time, time=time.process_time)
    for module in (benchopt.callback, benchopt.runner, benchopt.stopping_criterion):
        module.time = clock  # pyright: ignore[reportAttributeAccessIssue]
    ask = benchopt.callback._Callback.__call__

    def wait(callback):
        jax.block_until_ready([vars(callback.solver).get(n) for n in ("inner_var", "outer_var")])
        return ask(callback)

    benchopt.callback._Callback.__call__ = wait


def mnist() -> dict:
    """The archives of MNIST, as the benchmark's own loader keeps them."""
    import numpy as np

    parts = {"training": "train", "test": "t10k"}
    found = {}
    for part, prefix in parts.items():
        for kind, offset, shape in (("images-idx3", 16, (-1, 784)), ("labels-idx1", 8, (-1,))):
            (path,) = Path(os.environ["EQUIGRAD_DATA"]).rglob(f"{prefix}-{kind}-ubyte.gz")
            data = np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=offset)
            found[f"{part}_{kind[:6]}"] = data.reshape(shape)
    return found


def runs(panel: str, only: list[str] | None):
    """Every setting of every solver, by the solver's label."""
    for label, (name, settings) in SOLVERS.items():
        if only and label not in only:
            continue
        for steps in STEPS[panel]:
            for values in itertools.product(*settings.values()):
                chosen = {**steps, **dict(zip(settings, values, strict=True))}
                if name == "F2SA":
                    chosen["delta_lmbda"] = GROWTH[panel]
                yield label, name, chosen


def file_of(panel: str, stage: str, name: str, settings: dict, seed: int) -> Path:
    """Where a run is kept."""
    key = repr((name, sorted(settings.items(), key=str), seed))
    return Path(f"equigrad-runs/{panel}-{stage}-{hashlib.sha1(key.encode()).hexdigest()[:12]}.pkl")


def measured(panel: str, stage: str, name: str, settings: dict, seed: int):
    """A run's curve: seconds, value and the calls of the benchmark's callback."""
    import pandas as pd
    from benchopt import run_benchmark

    kept = file_of(panel, stage, name, settings, seed)
    if not kept.exists():
        spec = ",".join(f"{k}={v}" for k, v in {**settings, "random_state": seed}.items())
        spec = spec if name != "BOME" else spec.split(",eval_freq")[0]
        with contextlib.suppress(RuntimeError):  # benchopt's word for a run that diverged
            run_benchmark(
                ".",
                solver_names=[f"{name}[{spec}]"],
                dataset_names=[DATA[panel]],
                max_runs=10**6,
                timeout=SECONDS[panel][stage],
                plot_result=False,
                display=False,
                show_progress=False,
                no_cache=True,
                output_file=kept.stem,
            )
        columns = ["stop_val", "time", "objective_value"]
        output = Path(f"outputs/{kept.stem}.parquet")
        diverged = pd.DataFrame([[0, 0.0, float("inf")]], columns=columns)
        kept.parent.mkdir(exist_ok=True)
        (pd.read_parquet(output)[columns] if output.exists() else diverged).to_pickle(kept)
    return pd.read_pickle(kept)


def last(curve, seconds: float = float("inf")) -> float:
    """The median of the last values before a time; infinite where they are not numbers."""
    import numpy as np

    values = curve[curve.time <= seconds].objective_value.to_numpy()
    values = values[-max(1, min(5, len(values) // 4)) :]
    return float(np.median(values)) if np.isfinite(values).all() else float("inf")


def chosen(panel: str, only: list[str] | None) -> dict[str, tuple[str, dict]]:
    """The setting of each solver that came lowest in the grid."""
    found: dict[str, tuple[float, str, dict]] = {}
    for label, name, settings in runs(panel, only):
        if file_of(panel, "grid", name, settings, 1).exists():
            value = last(measured(panel, "grid", name, settings, 1))
            if label not in found or value < found[label][0]:
                found[label] = value, name, settings
    return {label: (name, settings) for label, (_, name, settings) in found.items()}


def show(panel: str, seeds: list[int], only: list[str] | None) -> None:
    """The median over seeds at shares of the time, the lowest first."""
    import numpy as np

    at = [SECONDS[panel]["best"] * share for share in (0.1, 0.25, 0.5, 1.0)]
    print("| solver | " + " | ".join(f"{t:g} s" for t in at) + " | steps | settings |")
    print("| --- |" + " ---: |" * (len(at) + 1) + " --- |")
    rows = []
    for label, (name, settings) in chosen(panel, only).items():
        curves = [
            measured(panel, "best", name, settings, seed)
            for seed in seeds
            if file_of(panel, "best", name, settings, seed).exists()
        ]
        if curves:
            medians = [float(np.median([last(c, t) for c in curves])) for t in at]
            steps = int(np.median([c.stop_val.max() for c in curves])) * settings.get(
                "eval_freq", 1
            )
            rows.append((medians[-1], label, medians, steps, settings))
    for _, label, medians, steps, settings in sorted(rows, key=lambda row: row[0]):
        cells = " | ".join(f"{m:.3g}" for m in medians)
        said = ", ".join(f"{k} {v}" for k, v in settings.items() if k != "eval_freq")
        print(f"| {label} | {cells} | {steps} | {said} |")


def main() -> None:
    """Run, or print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("benchmark", type=Path)
    parser.add_argument("panel", choices=DATA)
    parser.add_argument("stage", choices=("all", "grid", "best", "show"))
    parser.add_argument("--only", nargs="*", help="names of solvers, as the table has them")
    parser.add_argument("--seeds", nargs="*", type=int, default=[2, 3, 4], help="of best and show")
    options = parser.parse_args()
    sys.path.insert(0, str(options.benchmark.resolve()))
    prepare(options.benchmark.resolve())
    if options.stage in ("all", "grid"):
        for _, name, settings in runs(options.panel, options.only):
            measured(options.panel, "grid", name, settings, 1)
    if options.stage in ("all", "best"):
        for name, settings in chosen(options.panel, options.only).values():
            for seed in options.seeds:
                measured(options.panel, "best", name, settings, seed)
    if options.stage in ("all", "show"):
        show(options.panel, options.seeds, options.only)


if __name__ == "__main__":
    main()
