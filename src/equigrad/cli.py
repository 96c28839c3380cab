"""The command line, which runs the experiments."""

import argparse
import dataclasses
import inspect
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from equigrad import __version__
from equigrad.errors import EquigradError, RunError
from equigrad.wording import meant

if TYPE_CHECKING:
    from equigrad.experiments.registry import Command
    from equigrad.training.processes import Place

VERBS = {
    "run": "run an experiment",
    "search": "search an experiment's hyperparameters",
    "reproduce": "reproduce a figure or table",
}


SHELLS = ("bash", "zsh", "tcsh")
"""Shells for which `shtab` writes completion scripts."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `equigrad`: exit code 2 for errors that the user can fix, 130 for Ctrl-C."""
    ours = arguments is None  # the command line's own process, and not a test's
    try:
        dispatch(sys.argv[1:] if arguments is None else arguments, ours=ours)
    except EquigradError as error:
        from equigrad.experiments.runs.complaints import complain

        complain(error)
        raise SystemExit(2) from None
    except (MemoryError, RuntimeError) as error:
        from equigrad.experiments.runs.complaints import complain, too_large

        if (beyond := too_large(error)) is None:
            raise
        complain(beyond)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader of our output, `head` for example, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None


def dispatch(arguments: Sequence[str], *, ours: bool) -> None:
    """Find the command that the first two arguments name, and run it with the others.

    Args:
        arguments: the arguments after `equigrad`.
        ours: whether the process is our own, so that its settings may be changed.
    """
    from equigrad.experiments.registry import COMMANDS

    parser, verbs = parsers(COMMANDS)
    if not arguments:
        parser.print_help()
        return
    verb = arguments[0]
    if verb.startswith("--completion"):
        print_completion(parser, arguments)
        return
    refuse_unknown(parser, "command", verb, verbs)
    named = {command.name: command for command in COMMANDS if command.verb == verb}
    if named and len(arguments) > 1:
        refuse_unknown(verbs[verb], "experiment or figure", arguments[1], named)
    words = parser.parse_args(arguments[:2] if named else arguments)
    require_extras()
    if ours:
        from rich.console import Console

        with Console(stderr=True, quiet="--quiet" in arguments).status("loading torch"):
            from equigrad.freed_memory import keep_freed_memory  # here: it imports torch

            keep_freed_memory()
    if words.verb == "list":
        from equigrad.experiments.runs.listing import show

        show(COMMANDS)
    elif words.verb == "check":
        from equigrad.experiments.runs.described import examine

        examine(words.target, rtol=words.rtol, directions=words.directions, seed=words.seed)
    elif words.verb == "scores":
        score(words, arguments)
    elif words.verb == "report":
        from equigrad.experiments.registry import paper_tables
        from equigrad.experiments.runs.report import report as write_report

        as_markdown = words.out is not None and words.out.suffix == ".md"
        tables = paper_tables() if as_markdown else ()
        print(f"written to {write_report(words.folders, words.out, tables)}")
    elif words.verb == "predict":
        ask(words)
    else:
        execute(named[words.name], arguments)


def parsers(
    commands: Sequence["Command"],
) -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """The parser of the first arguments, and the parsers of further arguments by verb."""
    parser = argparse.ArgumentParser(
        prog="equigrad",
        description="Meta-gradients through anything that settles.",
        epilog="`equigrad run digits --help` shows a command's options.",
    )
    parser.add_argument("--version", action="version", version=f"equigrad {__version__}")
    parser.add_argument(
        "--completion", choices=SHELLS, help="print a completion script for this shell"
    )
    verbs = parser.add_subparsers(
        dest="verb",
        required=True,
        metavar="{run,search,reproduce,scores,predict,report,check,list}",
    )
    for verb, help_text in VERBS.items():
        group = verbs.add_parser(verb, help=help_text)
        names = group.add_subparsers(dest="name", required=True, metavar="NAME")
        for command in (c for c in commands if c.verb == verb):
            names.add_parser(command.name, help=command.summary, add_help=False)
    predict = verbs.add_parser("predict", help="predict with the model that a run has saved")
    predict.add_argument("model", metavar="RUN", type=Path, help="a run's folder, or its model.pt")
    asked = predict.add_mutually_exclusive_group(required=True)
    asked.add_argument("--csv", type=Path, help="rows to predict the target of")
    asked.add_argument("--images", metavar="DIR", type=Path, help="images to predict the class of")
    predict.add_argument(
        "--out", type=Path, help="file for the predictions; standard output by default"
    )
    predict.add_argument("--delimiter", help="the character between columns; detected by default")
    predict.add_argument("--encoding", help="encoding of the file; detected by default")
    predict.add_argument(
        "--header", choices=("auto", "yes", "no"), default="yes", help="whether there is a header"
    )
    predict.add_argument(
        "--decimal", choices=(".", ","), metavar="MARK", help="decimal mark; by default the run's"
    )
    predict.add_argument("--skip-broken", action="store_true", help="leave out unreadable images")
    scores = verbs.add_parser("scores", help="score training examples by a trusted validation set")
    scores.add_argument(
        "target",
        metavar="FILE.py:NAME",
        help="a dictionary of example_scores's arguments, or a function that returns one",
    )
    scores.add_argument(
        "--learn",
        metavar="N",
        type=int,
        help="learn weights instead, in N outer steps (arguments of learn_weights)",
    )
    scores.add_argument(
        "--out", metavar="DIR", type=Path, required=True, help="folder for the scores"
    )
    scores.add_argument("--resume", action="store_true", help="resume the runs in --out")
    verbs.add_parser("list", help="list all experiments, figures, tables and estimators")
    check = verbs.add_parser("check", help="compare your meta-gradient with references")
    check.add_argument(
        "target",
        metavar="FILE.py:NAME",
        help="a dictionary of check_meta_gradient's arguments, a problem whose params, meta_params "
        "and solver the file has under these names, or a function that returns one of them",
    )
    check.add_argument("--rtol", type=float, default=1e-2, help="largest relative error")
    check.add_argument("--directions", type=int, default=3, help="number of random directions")
    check.add_argument("--seed", type=int, default=0, help="seed of the random directions")
    report = verbs.add_parser("report", help="write a report of the runs in some folders")
    report.add_argument(
        "folders", metavar="DIR", nargs="+", type=Path, help="folder of a run or of runs"
    )
    report.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        help="file of the report; report.html in the first DIR by default. FILE.md writes the "
        "papers' tables, cell by cell, beside the results of the runs",
    )
    return parser, verbs.choices


def print_completion(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Print a shell's completion script of commands, experiments and figures."""
    require_extras("shtab")
    import shtab

    peek = argparse.ArgumentParser(prog=parser.prog, allow_abbrev=False)
    peek.add_argument("--completion", choices=SHELLS)
    print(shtab.complete(parser, peek.parse_args(arguments).completion))


def refuse_unknown(
    parser: argparse.ArgumentParser, what: str, word: str, known: Collection[str]
) -> None:
    """Exit with code 2 if a word is neither an option nor a known name."""
    if not word.startswith("-") and word not in known:
        parser.error(f"there is no {what} {word!r}.{meant(word, known)} See `equigrad list`.")


def require_extras(*more: str) -> None:
    """Exit if packages are missing that everything but the help needs."""
    missing = [package for package in ("rich", "tyro", *more) if find_spec(package) is None]
    if missing:
        raise SystemExit(
            f"the command line needs packages that are not installed ({', '.join(missing)}): pip "
            f"install 'equigrad[experiments]'"
        )


def ask(words: argparse.Namespace) -> None:
    """Predict with a saved model; notes go to standard error, apart from predictions."""
    from rich.console import Console

    from equigrad.experiments.runs.predict import predict_images, predict_table

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
        header=words.header,
        console=console,
    )


def score(words: argparse.Namespace, arguments: Sequence[str]) -> None:
    """Score the training examples that a user's file describes."""
    from rich.console import Console

    from equigrad.experiments.runs.described import read_description
    from equigrad.experiments.runs.example_scores import score as score_examples

    try:
        score_examples(
            read_description(words.target),
            words.out,
            resume=words.resume,
            console=Console(),
            learn=words.learn,
        )
    except KeyboardInterrupt:
        say_how_to_resume(arguments, words.out)
        raise
    print(f"saved in {words.out}")


def execute(command: "Command", arguments: Sequence[str]) -> None:
    """Parse the command's options and run it; `CHOOSERS` or a file determine the defaults."""
    import tyro

    from equigrad.experiments.runs.console import LoggedConsole
    from equigrad.experiments.runs.experiment import CHOOSERS
    from equigrad.experiments.runs.run_directory import default_directory
    from equigrad.training.processes import processes

    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("config", *CHOOSERS):
        peek.add_argument(f"--{name}", default=argparse.SUPPRESS)
    chosen = vars(peek.parse_known_args(arguments)[0])
    file = chosen.pop("config", None)
    if file is None:
        defaults = command.defaults(**chosen)
    else:
        from equigrad.experiments.runs.config_file import read_config

        defaults = read_config(Path(file), command.defaults, chosen)

    def work(
        options: Any,
        config: Annotated[
            Path | None,
            tyro.conf.arg(help="A run's config.json or a search's best.json, for defaults."),
        ] = None,
        out: Annotated[
            Path | None, tyro.conf.arg(help="Folder of the run; a new one under runs/ by default.")
        ] = None,
        resume: Annotated[
            bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help="Resume the run in --out.")
        ] = False,
        quiet: Annotated[
            bool,
            tyro.conf.FlagCreatePairsOff,
            tyro.conf.arg(help="Print nothing; log.txt in the run's folder is still written."),
        ] = False,
    ) -> None:
        if resume and out is None:
            raise RunError("--resume needs the folder of the run; name it with --out")
        if resume and out is not None and not out.exists():
            raise RunError(f"cannot resume {out}: there is no such folder")
        with processes() as here, folder_of(here, out, resume) as given:
            folder = given or default_directory(command.name)
            console = LoggedConsole(folder, quiet=quiet or not here.leads, markup=False)
            try:
                command.work(options, folder, resume=resume, console=console)
            except KeyboardInterrupt:
                if here.leads:
                    say_how_to_resume(arguments, folder)
                raise
        console.print(f"saved in {folder}", highlight=False, soft_wrap=True)

    order_options(type(getattr(defaults, "experiment", defaults)))
    work.__annotations__["options"] = Annotated[type(defaults), tyro.conf.arg(name="")]
    work.__defaults__ = (defaults, None, None, False, False)
    tyro.cli(
        work,
        prog=f"equigrad {command.verb} {command.name}",
        description=inspect.getdoc(type(defaults)),
        args=list(arguments[2:]),
        config=(tyro.conf.AvoidSubcommands,),
    )


def order_options(kind: type) -> None:
    """Order the options for the help: first those that choose defaults, last the common ones."""
    from equigrad.experiments.runs.experiment import CHOOSERS, Experiment

    known: dict[str, Any] = getattr(kind, "__dataclass_fields__", {})
    first = [*CHOOSERS, "seed", "seeds"]
    alike = [field.name for field in dataclasses.fields(Experiment)]
    own = [name for name in known if name not in (*first, *alike)]
    for name in dict.fromkeys([*first, *own, *alike]):  # reinserting all fields sets their order
        if name in known:
            known[name] = known.pop(name)


@contextmanager
def folder_of(here: "Place", out: Path | None, resume: bool) -> Iterator[Path | None]:
    """The run's folder for the leading process; a temporary one for the other processes."""
    from equigrad.training.processes import gathered

    with tempfile.TemporaryDirectory() as passing:
        folder = out if here.leads else Path(passing) / "run"
        if resume and out is not None and folder is not None and folder != out:
            shutil.copytree(out, folder)
        gathered(None)  # no process writes before all have read
        yield folder


def say_how_to_resume(arguments: Sequence[str], folder: Path) -> None:
    """Print the command that resumes a stopped run, if there is anything to resume."""
    if not folder.exists():
        print("stopped before the run began", file=sys.stderr)
        return
    kept = [a for a in arguments if a != "--resume"]
    if not any(a == "--out" or a.startswith("--out=") for a in kept):
        kept += ["--out", str(folder)]
    command = shlex.join(["equigrad", *kept, "--resume"])
    print(f"stopped; to resume, run:\n  {command}", file=sys.stderr)


if __name__ == "__main__":
    main()
