"""The matrix of versions, the docs and the package, by one command: `nox`.

Interpreters that are not installed are skipped. `nox -l` lists the sessions.
"""

import re
from pathlib import Path

import nox

nox.options.error_on_missing_interpreters = False
nox.options.sessions = ["tests", "docs", "package"]

PYTHONS = ["3.11", "3.12", "3.13", "3.14"]
OLDEST = "2.5.1"
"""The torch that `pyproject.toml` claims at least; it has no wheels for newer Pythons than 3.12."""


def torch_for(version: str) -> str:
    """What pip installs: of one version, or the newest."""
    return "torch" if version == "latest" else f"torch=={version}"


@nox.session(python=PYTHONS)
@nox.parametrize("torch", [OLDEST, "latest"])
def tests(session: nox.Session, torch: str) -> None:
    """The tests with the oldest and the newest torch; `nox -s tests -- -k words` hands words on."""
    if torch == OLDEST and session.python in ("3.13", "3.14"):
        session.skip(f"torch {OLDEST} has no wheel for Python {session.python}")
    session.install(torch_for(torch), "-e", ".[experiments,dev]")
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
    """Wheel and sdist, checked; then the README's first example from the wheel in this session."""
    session.install("build", "twine")
    session.run("python", "-m", "build")
    files = sorted(str(path) for path in Path("dist").glob("equigrad-*"))
    session.run("twine", "check", "--strict", *files)
    wheel = next(file for file in files if file.endswith(".whl"))
    session.install("torch", wheel)
    session.run("python", "-c", "import equigrad; print(equigrad.__file__)")
    session.run("equigrad", "--version")
    session.install("scikit-learn")
    example = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)[0]
    with session.chdir(session.create_tmp()):
        session.run("python", "-c", example)
