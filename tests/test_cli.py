"""The command line as people use it: in processes, with wrong words, Ctrl-C and kills."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import equigrad as eg
from equigrad.cli import say_how_to_resume
from equigrad.experiments.runs.complaints import too_large
from equigrad.training import loop
from helpers import call_main

RUN = [sys.executable, "-c", "from equigrad.cli import main; main()"]
SMOKE = ["run", "digits", "--scale", "smoke", "--device", "cpu"]


def equigrad(*arguments: object, cwd: Path, check: bool = True):
    done = subprocess.run(
        [*RUN, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"},
    )
    if check:
        assert done.returncode == 0, done.stderr
    return done


def same_but_for_time(one: Path, other: Path) -> bool:
    a, b = (torch.load(path / "learned.pt", weights_only=True) for path in (one, other))
    rows = []
    for path in (one, other):
        lines = (path / "metrics.jsonl").read_text().splitlines()
        rows.append([{**json.loads(line), "seconds": 0} for line in lines])
    tensors = [
        torch.equal(a[part][name], b[part][name])
        for part in ("params", "meta_params")
        for name in a[part]
    ]
    return all(tensors) and rows[0] == rows[1]


def test_help_and_list_read_well(tmp_path):
    top = equigrad("--help", cwd=tmp_path).stdout
    assert "run" in top
    assert "reproduce" in top
    options = equigrad("run", "digits", "--help", cwd=tmp_path).stdout
    assert "--solver.lr" in options
    assert "--contrastive.beta" in options
    assert "default: 0.1" in options
    listed = equigrad("list", cwd=tmp_path).stdout
    assert "equigrad run digits" in listed
    assert "equigrad reproduce matched-phases" in listed


def test_run_leaves_everything_that_reproduces_it(tmp_path):
    done = equigrad(*SMOKE, "--out", "run", "--solver.lr", "0.02", cwd=tmp_path)
    for words in (
        "seed 0 contrastive: ",
        "unregularised",
        "best single strength",
        "T1–T2",
        "contrastive",
        "saved in run",
    ):
        assert words in done.stdout
    run = tmp_path / "run"
    config = json.loads((run / "config.json").read_text())
    assert config["config"]["solver"]["lr"] == 0.02
    assert config["config"]["seed"] == 0
    assert "torch" in config["versions"]
    result = json.loads((run / "result.json").read_text())
    design = "experiment estimator seed scale metrics paper outer_steps gradient_evaluations"
    assert {*design.split(), "seconds", "device", "versions"} == result.keys()
    assert result["estimator"] == "contrastive"
    assert (run / "strengths.png").read_bytes().startswith(b"\x89PNG")
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
    assert list(run.glob("events.out.tfevents*"))
    assert (run / "t1t2" / "result.json").exists()
    # nothing is overwritten
    again = equigrad(*SMOKE, "--out", "run", cwd=tmp_path, check=False)
    assert again.returncode == 2
    assert "nothing is overwritten" in again.stderr
    # and a resume of what has ended finds its numbers
    resumed = equigrad(*SMOKE, "--out", "run", "--solver.lr", "0.02", "--resume", cwd=tmp_path)
    table = [line for line in done.stdout.splitlines() if "contrastive" in line and "│" in line]
    assert table[-1] in resumed.stdout


def test_seeds_are_runs_of_their_own(tmp_path):
    equigrad(*SMOKE, "--seeds", 2, "--no-compare", "--out", "both", cwd=tmp_path)
    equigrad(*SMOKE, "--seed", 1, "--no-compare", "--out", "one", cwd=tmp_path)
    assert same_but_for_time(tmp_path / "both" / "seed-1", tmp_path / "one")
    assert not same_but_for_time(tmp_path / "both" / "seed-0", tmp_path / "one")
    summary = json.loads((tmp_path / "both" / "summary.json").read_text())
    assert len(summary["contrastive"]) == 2


def test_any_estimator_with_knobs_of_its_own_stands_beside_the_contrastive_rule(tmp_path):
    words = ["--estimator", "nystrom", "--other.rank", 7]
    done = equigrad(*SMOKE, *words, "--out", "run", cwd=tmp_path)
    assert "per weight, Nystrom" in done.stdout
    assert "per weight, contrastive" in done.stdout
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert (config["other"]["type"], config["other"]["rank"]) == ("Nystrom", 7)
    # what seven Hessian columns cost beyond the free phase is the rank
    spent = json.loads((tmp_path / "run" / "result.json").read_text())["gradient_evaluations"]
    other = equigrad(*SMOKE, "--estimator", "nystrom", "--no-compare", "--out", "ten", cwd=tmp_path)
    more = json.loads((tmp_path / "ten" / "result.json").read_text())["gradient_evaluations"]
    rank = json.loads((tmp_path / "ten" / "config.json").read_text())["config"]["other"]["rank"]
    assert "Nystrom" in other.stdout
    assert more - spent == 2 * 3 * (rank - 7)  # a column is two gradients, in three outer steps


LONG = [*SMOKE, "--no-compare", "--outer-steps", "8", "--checkpoint-every", "2"]
LONG += ["--solver.max-steps", "200"]


def started(folder: Path, lines: int) -> subprocess.Popen:
    """A run that has logged some steps."""
    process = subprocess.Popen(
        [*RUN, *LONG, "--out", "run"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell's background jobs inherit an ignored Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    log = folder / "run" / "metrics.jsonl"
    for _ in range(6000):
        if log.exists() and len(log.read_text().splitlines()) >= lines:
            return process
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError("the run did not start")


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    equigrad(*LONG, "--out", "run", cwd=folder)
    return folder / "run"


@pytest.mark.parametrize(
    ("sign", "lines"), [(signal.SIGINT, 1), (signal.SIGKILL, 1), (signal.SIGKILL, 5)]
)
def test_stopped_run_resumes_to_the_same_bits(tmp_path, whole_run, sign, lines):
    process = started(tmp_path, lines)
    process.send_signal(sign)
    _, complaint = process.communicate(timeout=180)
    if sign == signal.SIGINT:
        assert process.returncode == 130
        assert "--out run --resume" in complaint
        assert "Traceback" not in complaint
    assert not (tmp_path / "run" / "result.json").exists()
    equigrad(*LONG, "--out", "run", "--resume", cwd=tmp_path)
    assert same_but_for_time(tmp_path / "run", whole_run)


def test_help_begins_with_what_chooses_and_ends_with_where_to_compute(tmp_path):
    said = equigrad("run", "equilibrium", "--help", cwd=tmp_path).stdout
    options = ["--setting ", "--method ", "--seed ", "--epochs ", "--hidden ", "--device "]
    places = [said.index(option) for option in options]
    assert places == sorted(places)


def test_names_with_brackets_are_names(tmp_path, capsys):
    """`[m]` and `[/s]` are units of a column, and neither a style nor the end of one."""
    rows = "\n".join(f"{i % 7},{i % 5}" for i in range(40))
    (tmp_path / "units.csv").write_text(f"x [m],y [/s]\n{rows}\n")
    words = ["--csv", tmp_path / "units.csv", "--target", "y [/s]", "--task", "regression"]
    _, said = call_main(
        "run",
        "tabular",
        *words,
        "--scale",
        "smoke",
        "--no-compare",
        "--out",
        tmp_path / "r",
        capsys=capsys,
    )
    assert "y [/s] of units.csv" in said


def test_a_run_stopped_before_it_began_is_not_to_be_resumed(tmp_path, capsys):
    say_how_to_resume(["run", "digits"], tmp_path / "gone")
    assert capsys.readouterr().err == "stopped before the run began\n"
    say_how_to_resume(["run", "digits"], tmp_path)
    assert capsys.readouterr().err.endswith(f"equigrad run digits --out {tmp_path} --resume\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "seven"], "seven"),
        (["--seed", "-1"], "seed must be a whole number of at least 0, got -1"),
        (["--seed", "7", "--seeds", "2"], "give only one of them"),
        (["--seeds", "0"], "seeds must be a whole number of at least 1, or None, got 0"),
        (["--solver.lr", "0"], "lr must be a finite number above 0, got 0"),
        (["--contrastive.beta", "0"], "beta must be a finite number other than 0"),
        (["--contrastive.points", "1"], "points must be a whole number of at least 2, got 1"),
        (["--solver.max-steps", "None"], "needs max_steps, tol > 0, or both"),
        (["--estimator", "guess"], "guess"),
        (["--scale", "huge"], "huge"),
        (["--resume"], "--resume needs the folder of the run; name it with --out"),
        (["--resume", "--out", "gone"], "cannot resume gone: there is no such folder"),
        (["--outer-steps", "0"], "outer_steps must be a whole number of at least 1, got 0"),
        (["--solver.lr", "1e6", "--no-compare", "--out", "run"], "Lower the solver's step size"),
    ],
)
def test_wrong_words_end_with_code_2(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, said = call_main(*SMOKE, *arguments, capsys=capsys)
    assert code == 2
    assert message in said


DEEP = 200_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"experiment": ', "is not JSON"),
        ("[" * DEEP, "nested more than 100 levels deep"),
        ('{"config":' * DEEP, "nested more than 100 levels deep"),
        ('{"config":' * 150 + "1" + "}" * 150, "nested more than 100 levels deep"),
        ("null", "must contain a JSON object, got NoneType"),
        ('{"experiment": "digits", "config": 3}', "has no configuration"),
        ('{"experiment": "digits", "config": {"seed": 1e23}}', "seed must be int, got 1e+23"),
        (
            '{"experiment": "digits", "config": {"seed": 100000000000000000000000}}',
            "(too large to compute with)",
        ),
        ('{"experiment": "digits", "config": {"seed": ' + "1" * 5000 + "}}", "is not JSON"),
    ],
)
def test_a_file_of_settings_that_is_none_is_named(tmp_path, monkeypatch, capsys, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.json").write_text(content)
    code, said = call_main(*SMOKE, "--config", "mine.json", capsys=capsys)
    assert (code, "mine.json" in said or "Digits" in said) == (2, True)
    assert message in said


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--seed", 10**23, "(too large to compute with)"),
        ("--seed", 2**64, "(too large to compute with)"),
        ("--threads", 10**23, "threads must be a whole number from 1 to 1024"),
        ("--threads", 2**31, "threads must be a whole number from 1 to 1024"),
        ("--hidden", 10**23, "hidden must be a tuple of values, each a whole number"),
        ("--hidden", 9 * 10**18, "there is not enough memory"),
        ("--outer-steps", 10**23, "(too large to compute with)"),
        ("--outer-lr", 1e39, "a setting is too large for the dtype"),
        ("--initial-strength", 1e39, "a setting is too large for the dtype"),
    ],
)
def test_numbers_that_nothing_can_be_computed_with(
    tmp_path, monkeypatch, capsys, option, value, message
):
    monkeypatch.chdir(tmp_path)
    code, said = call_main(*SMOKE, option, value, "--out", "run", capsys=capsys)
    assert code == 2
    assert message in said


@pytest.mark.parametrize(
    ("error", "known"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("value cannot be converted to type float without overflow"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (RuntimeError(), False),
    ],
)
def test_what_is_too_large_is_said_and_other_errors_are_kept(error, known):
    assert isinstance(too_large(error), eg.ConfigurationError) == known


@pytest.mark.parametrize("name", ["result.json", "baselines.json", "config.json"])
def test_damaged_files_of_a_run_are_named(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    words = [*SMOKE, "--out", "run"]
    assert call_main(*words, capsys=capsys)[0] == 0
    for content in ("{", "[]", "", "[" * DEEP, "{}", '{"metrics": 3, "config": 3}'):
        (tmp_path / "run" / name).write_text(content)
        code, said = call_main(*words, "--resume", capsys=capsys)
        assert (code, "give another --out" in said) == (2, True)


def test_a_folder_that_is_removed_under_a_run(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    evaluate, steps = loop._row, iter(range(9))

    def remove(*row):
        if next(steps) == 1:
            shutil.rmtree(tmp_path / "run")
        return evaluate(*row)

    monkeypatch.setattr(loop, "_row", remove)
    code, said = call_main(*SMOKE, "--checkpoint-every", 100, "--out", "run", capsys=capfd)
    assert code == 2
    assert "RunError: cannot write run/t1t2/metrics.jsonl: No such file" in said
    assert "Traceback" not in said


def test_folders_that_cannot_be_used(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    for out in ("file", "file/run", "/proc/run"):
        code, said = call_main(*SMOKE, "--out", out, capsys=capsys)
        assert code == 2
        assert "give another --out" in said
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    code, said = call_main(*SMOKE, "--out", "other", "--resume", capsys=capsys)
    assert code == 2
    assert "contains no run" in said
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["thesis.tex"]


def test_damaged_and_foreign_checkpoints(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [*SMOKE, "--no-compare", "--out", "run"]
    assert call_main(*words, capsys=capsys)[0] == 0
    run = tmp_path / "run"
    (run / "result.json").unlink()
    for content in (b"", b"junk", (run / "checkpoint.pt").read_bytes()[:500]):
        (run / "checkpoint.pt").write_bytes(content)
        code, said = call_main(*words, "--resume", capsys=capsys)
        assert code == 2
        assert "cannot be read as a checkpoint" in said
        assert (run / "checkpoint.pt").read_bytes() == content
    code, said = call_main(*words, "--resume", "--seed", 3, capsys=capsys)
    assert code == 2
    assert "seed: there 0, here 3" in said


def test_a_quiet_run_says_nothing_and_leaves_its_words_in_the_folder(tmp_path, capsys):
    words = ("run", "digits", "--scale", "smoke", "--no-compare", "--quiet")
    code, said = call_main(*words, "--out", tmp_path / "run", capsys=capsys)
    assert (code, said) == (0, "")
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "contrastive 3/3" in log
    assert "saved in" in log


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_a_shell_completes_commands_and_experiments(shell, capsys):
    code, said = call_main("--completion", shell, capsys=capsys)
    assert code == 0
    assert all(word in said for word in ("reproduce", "digits", "table2", "csv"))
