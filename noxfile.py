"""The matrix of versions, the docs and the package, by one command: `nox`.

Interpreters that are not installed are skipped. `nox -l` lists the sessions.
"""

import re
import shutil
from pathlib import Path

import nox

nox.options.error_on_missing_interpreters = False
nox.options.sessions = ["tests", "docs", "package"]

PYTHONS = ["3.11", "3.12", "3.13", "3.14"]
OLDEST = "2.9.0"
"""The torch that `pyproject.toml` claims at least; it has no wheels for Python 3.14."""


def torch_for(version: str) -> str:
    """What pip installs: of one version, or the newest."""
    return "torch" if version == "latest" else f"torch=={version}"


@nox.session(python=PYTHONS)
@nox.parametrize("torch", [OLDEST, "latest"])
def tests(session: nox.Session, torch: str) -> None:
    """The tests with the oldest and the newest torch; `nox -s tests -- -k words` hands words on."""
    if torch == OLDEST and session.python == "3.14":
        session.skip(f"torch {OLDEST} has no wheel for Python {session.python}")
    extras = "experiments,dev" if session.python == "3.14" else "experiments,search,dev"
    session.install(torch_for(torch), "-e", f".[{extras}]")  # Ray has no wheel for Python 3.14 yet
    session.run("python", "-c", "import sys, torch; print(sys.version, torch.__version__)")
    session.run(
        *("pytest", "-q", "--numprocesses", "auto", "--dist", "loadscope"),
        *session.posargs,
        env={"OMP_NUM_THREADS": "1"},
    )


@nox.session
def docs(session: nox.Session) -> None:
    """The pages, strictly: every warning is an error, and every script of the gallery runs."""
    session.install(".[experiments,docs]")
    session.run("sphinx-build", "-W", "--keep-going", "-b", "html", "docs", "site")


@nox.session
def package(session: nox.Session) -> None:
    """Wheel and sdist, built twice and checked; what the README promises, from the wheel alone."""
    session.install("build", "twine")
    shutil.rmtree("dist", ignore_errors=True)
    session.run("python", "-m", "build")
    again = Path(session.create_tmp()) / "again"
    session.run("python", "-m", "build", "--outdir", str(again))
    files = sorted(Path("dist").iterdir())
    for file in files:
        if file.read_bytes() != (again / file.name).read_bytes():
            session.error(f"{file.name}: a second build has other bytes")
    session.run("twine", "check", "--strict", *map(str, files))
    wheel = next(str(file.resolve()) for file in files if file.suffix == ".whl")
    example = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)[0]
    session.install("torch", wheel)
    with session.chdir(session.create_tmp()):
        session.run("equigrad", "--version")
        session.run("equigrad", "run", "digits", success_codes=[1])  # names the extra it needs
        session.install(f"{wheel}[experiments]")
        session.run("python", "-c", example)
        session.run("equigrad", "list")
        session.run("equigrad", "run", "digits", "--scale", "smoke", "--out", "digits")
