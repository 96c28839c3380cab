"""The command line over the experiments."""

import argparse
import dataclasses
import functools
import inspect
import os
import runpy
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from equigrad.errors import ConfigurationError, EquigradError, RunError
from equigrad.freed_memory import keep_freed_memory

try:
    import tyro
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
except ImportError as error:
    raise SystemExit(
        f"the command line needs the extra packages of equigrad[experiments] ({error}): "
        f"pip install 'equigrad[experiments]'"
    ) from error

if TYPE_CHECKING:
    from equigrad.training.processes import Place


@dataclass(frozen=True)
class Command:
    """`equigrad VERB NAME`: a config with defaults that some words choose, and its work."""

    verb: str
    name: str
    defaults: Callable[..., Any]
    work: Callable[..., object]

    @property
    def summary(self) -> str:
        """The first line of the config's documentation."""
        return (self.defaults().__doc__ or "").splitlines()[0]


def commands() -> list[Command]:
    """All that can be run or reproduced."""
    from equigrad.experiments import (
        accuracy,
        boston,
        bound,
        digits,
        equilibrium,
        equilibrium_table,
        few_shot,
        first_phase,
        folder,
        images,
        matched_phases,
        omniglot,
        quadratic,
        representation,
        search,
        sinusoid,
        strength_learning,
        table1,
        table2,
        tabular,
    )
    from equigrad.experiments.reproduction import reproduce

    of_images = (digits.Digits, images.Mnist, images.Cifar10)
    of_own_data = (tabular.Tabular, folder.Folder)
    reproductions = (
        matched_phases.MatchedPhases,
        bound.Fig1,
        boston.Fig2,
        bound.FigS1,
        bound.FigS2,
        quadratic.FigS3,
        quadratic.FigS4,
        quadratic.FigS5,
        quadratic.FigS6,
        accuracy.Accuracy,
        table1.Table1,
        table2.Table2,
        first_phase.Fig3,
        equilibrium_table.EquilibriumTable,
    )
    return [
        *(
            Command("run", experiment.__name__.lower(), experiment.preset, strength_learning.run)
            for experiment in (*of_images, *of_own_data)
        ),
        Command("run", "sinusoid", sinusoid.Sinusoid.preset, sinusoid.run),
        Command("run", "omniglot", omniglot.Omniglot.preset, few_shot.run),
        Command("run", "equilibrium", equilibrium.Equilibrium.preset, equilibrium.run),
        Command("run", "representation", representation.Representation.preset, representation.run),
        *(
            Command(
                "search",
                experiment.__name__.lower(),
                functools.partial(search.preset, experiment),
                search.search,
            )
            for experiment in of_images
        ),
        *(Command("reproduce", figure.name, figure.preset, reproduce) for figure in reproductions),
    ]


VERBS = {
    "run": "run an experiment",
    "search": "search an experiment's hyperparameters",
    "reproduce": "reproduce a figure or table",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `equigrad`: exit code 2 for what the user can mend, 130 for Ctrl-C."""
    if arguments is None:  # the process is ours
        arguments = sys.argv[1:]
        keep_freed_memory()
    try:
        dispatch(arguments)
    except EquigradError as error:
        complaints = Console(stderr=True)
        complaints.print(f"[bold red]error:[/] {type(error).__name__}:", end=" ")
        complaints.print(str(error), markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # whoever read our words, `head` for example, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None


def dispatch(arguments: Sequence[str]) -> None:
    """Find the command that the first two words name, and hand it the others."""
    known = commands()
    parser = argparse.ArgumentParser(
        prog="equigrad",
        description="Meta-gradients through anything that settles.",
        epilog="`equigrad run digits --help` shows a command's options.",
    )
    verbs = parser.add_subparsers(
        dest="verb",
        required=True,
        metavar="{run,search,reproduce,predict,report,check,list}",
    )
    for verb, help_text in VERBS.items():
        group = verbs.add_parser(verb, help=help_text)
        names = group.add_subparsers(dest="name", required=True, metavar="NAME")
        for command in (c for c in known if c.verb == verb):
            names.add_parser(command.name, help=command.summary, add_help=False)
    predict = verbs.add_parser("predict", help="ask the model that a run has saved")
    predict.add_argument("model", metavar="RUN", type=Path, help="a run's folder, or its model.pt")
    asked = predict.add_mutually_exclusive_group(required=True)
    asked.add_argument("--csv", type=Path, help="rows to predict the target of")
    asked.add_argument("--images", metavar="DIR", type=Path, help="images to predict the class of")
    predict.add_argument(
        "--out", type=Path, help="file of the predictions; standard output by default"
    )
    predict.add_argument("--delimiter", help="between columns; found in the header by default")
    predict.add_argument("--encoding", default="utf-8", help="of the file's text")
    predict.add_argument(
        "--decimal", choices=(".", ","), metavar="MARK", help="a point or a comma; as in the run"
    )
    predict.add_argument("--skip-broken", action="store_true", help="leave out broken images")
    verbs.add_parser("list", help="list what can be run and reproduced, and the estimators")
    check = verbs.add_parser("check", help="compare your meta-gradient with re-solved references")
    check.add_argument(
        "target",
        metavar="FILE.py:NAME",
        help="a dictionary of check_meta_gradient's arguments, or a function that returns one",
    )
    check.add_argument("--rtol", type=float, default=1e-2, help="relative error to pass")
    check.add_argument("--directions", type=int, default=3, help="directions to re-solve along")
    check.add_argument("--seed", type=int, default=0, help="draws the directions")
    report = verbs.add_parser("report", help="write a page about the runs in some folders")
    report.add_argument(
        "folders", metavar="DIR", nargs="+", type=Path, help="folder of a run, or one above runs"
    )
    report.add_argument(
        "--out", metavar="FILE.html", type=Path, help="the page; report.html in the first DIR"
    )

    of_experiment = bool(arguments) and arguments[0] in VERBS
    words = parser.parse_args(arguments[:2] if of_experiment else arguments)
    if words.verb == "list":
        show(known)
        return
    if words.verb == "check":
        examine(words.target, rtol=words.rtol, directions=words.directions, seed=words.seed)
        return
    if words.verb == "report":
        from equigrad.experiments.report import report as write_report

        print(f"written to {write_report(words.folders, words.out)}")
        return
    if words.verb == "predict":
        ask(words)
        return
    for command in known:
        if (command.verb, command.name) == (words.verb, words.name):
            execute(command, arguments)


def show(known: Sequence[Command]) -> None:
    """Print the commands and the estimators."""
    from equigrad.estimators.table import HEADINGS, LEGEND, rows

    console = Console()
    table = Table(box=None, show_header=False)
    for command in known:
        table.add_row(f"equigrad {command.verb} {command.name}", command.summary)
    console.print(table)
    headings = (heading[0].upper() + heading[1:] for heading in HEADINGS)
    estimators = Table(*headings, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    estimators.columns[0].no_wrap = True
    for column, texts in zip(estimators.columns, zip(HEADINGS, *rows(), strict=True), strict=True):
        column.min_width = max(len(word) for text in texts for word in text.split())
    for row in rows():
        estimators.add_row(*row)
    console.print(estimators)
    console.print(LEGEND)


def ask(words: argparse.Namespace) -> None:
    """Predictions of a saved model; notes go where they do not mix with them."""
    from equigrad.experiments.predict import predict_images, predict_table

    console = Console(stderr=True)
    if words.images is not None:
        predict_images(
            words.model,
            words.images,
            out=words.out,
            skip_broken=words.skip_broken,
            console=console,
        )
        return
    predict_table(
        words.model,
        words.csv,
        out=words.out,
        delimiter=words.delimiter,
        encoding=words.encoding,
        decimal=words.decimal,
        console=console,
    )


def examine(target: str, **options: Any) -> None:
    """Check the problem that a user's file describes; exit code 1 where it is wrong."""
    from equigrad.check import check_meta_gradient

    path, _, name = target.rpartition(":")
    if not path or not name:
        raise ConfigurationError(f"say which problem of which file, as FILE.py:NAME, got {target}")
    sys.path.insert(0, str(Path(path).resolve().parent))  # what the file imports from beside it
    try:
        scope = runpy.run_path(path)
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error}") from error
    except Exception as error:
        raise ConfigurationError(f"{path} does not run: {type(error).__name__}: {error}") from error
    if name not in scope:
        raise ConfigurationError(f"{path} defines no {name!r}")
    described = scope[name]() if callable(scope[name]) else scope[name]
    if not isinstance(described, Mapping):
        raise ConfigurationError(
            f"{target} must be a dictionary with problem, params, meta_params, solver and, if you "
            f"like, estimator, or a function that returns one; got {type(described).__name__}"
        )
    known = set(inspect.signature(check_meta_gradient).parameters) - options.keys()
    if unknown := set(described) - known:
        raise ConfigurationError(f"{target} has {sorted(unknown)}, allowed are {sorted(known)}")
    if missing := {"problem", "params", "meta_params", "solver"} - set(described):
        raise ConfigurationError(f"{target} lacks {sorted(missing)}")
    check = check_meta_gradient(**described, **options)
    print(check)
    if not check.passed:
        raise SystemExit(1)


def execute(command: Command, arguments: Sequence[str]) -> None:
    """Read the command's options and do its work; `CHOOSERS` or a file decide the defaults."""
    from equigrad.experiments.config_file import CHOOSERS, read_config
    from equigrad.experiments.run_directory import default_directory
    from equigrad.training.processes import processes

    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("config", *CHOOSERS):
        peek.add_argument(f"--{name}", default=argparse.SUPPRESS)
    chosen = vars(peek.parse_known_args(arguments)[0])
    file = chosen.pop("config", None)
    if file is None:
        defaults = command.defaults(**chosen)
    else:
        defaults = read_config(Path(file), command.defaults, chosen)

    def work(
        options: Any,
        config: Annotated[
            Path | None,
            tyro.conf.arg(help="A run's config.json or a search's best.json, for the defaults."),
        ] = None,
        out: Annotated[
            Path | None, tyro.conf.arg(help="Folder of the run; a new one under runs/ by default.")
        ] = None,
        resume: Annotated[
            bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help="Go on with the run in --out.")
        ] = False,
    ) -> None:
        if resume and out is None:
            raise RunError("nothing to resume in a new folder; name the run with --out")
        if resume and out is not None and not out.exists():
            raise RunError(f"nothing to resume in {out}: there is no such folder")
        with processes() as here, folder_of(here, out, resume) as given:
            folder = given or default_directory(command.name)
            console = Console(quiet=not here.leads, markup=False)
            try:
                command.work(options, folder, resume=resume, console=console)
            except KeyboardInterrupt:
                if here.leads:
                    say_how_to_resume(arguments, folder)
                raise
        console.print(f"saved in {folder}", highlight=False, soft_wrap=True)

    order_options(type(getattr(defaults, "experiment", defaults)))
    work.__annotations__["options"] = Annotated[type(defaults), tyro.conf.arg(name="")]
    work.__defaults__ = (defaults, None, None, False)
    tyro.cli(
        work,
        prog=f"equigrad {command.verb} {command.name}",
        description=inspect.getdoc(type(defaults)),
        args=list(arguments[2:]),
        config=(tyro.conf.AvoidSubcommands,),
    )


def order_options(kind: type) -> None:
    """Put what chooses the defaults first, for help, and last what all experiments have alike."""
    from equigrad.experiments.config_file import CHOOSERS
    from equigrad.experiments.experiment import Experiment

    known: dict[str, Any] = getattr(kind, "__dataclass_fields__", {})
    first = [*CHOOSERS, "seed", "seeds"]
    alike = [field.name for field in dataclasses.fields(Experiment)]
    own = [name for name in known if name not in (*first, *alike)]
    for name in dict.fromkeys([*first, *own, *alike]):  # all of them, so that this is the order
        if name in known:
            known[name] = known.pop(name)


@contextmanager
def folder_of(here: "Place", out: Path | None, resume: bool) -> Iterator[Path | None]:
    """The run's folder for the process that leads; a passing one for those that compute with it."""
    from equigrad.training.processes import gathered

    with tempfile.TemporaryDirectory() as passing:
        folder = out if here.leads else Path(passing) / "run"
        if resume and out is not None and folder is not None and folder != out:
            shutil.copytree(out, folder)
        gathered(None)  # none begins to write before all have read
        yield folder


def say_how_to_resume(arguments: Sequence[str], folder: Path) -> None:
    """Print the command that goes on with a stopped run, where there is something to go on with."""
    if not folder.exists():
        print("stopped before the run began", file=sys.stderr)
        return
    kept = [a for a in arguments if a != "--resume"]
    if not any(a == "--out" or a.startswith("--out=") for a in kept):
        kept += ["--out", str(folder)]
    command = shlex.join(["equigrad", *kept, "--resume"])
    print(f"stopped; go on with:\n  {command}", file=sys.stderr)


if __name__ == "__main__":
    main()
