"""The example of several processes, as a user starts it."""

import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "several_processes.py"


def free_port() -> str:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return str(place.getsockname()[1])


def started_by(*words: str) -> str:
    """What it prints, without the launcher's own lines."""
    environment = {n: v for n, v in os.environ.items() if n not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, *words, str(SCRIPT)],
        env=environment | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return "\n".join(line for line in done.stdout.splitlines() if "example" in line)


@pytest.fixture(scope="module")
def alone() -> str:
    """What one process prints."""
    return started_by()


def test_torchrun_prints_the_same(alone):
    port = free_port()
    by_two = started_by(
        "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"
    )
    assert by_two == alone
    assert "weighs less than a true one in" in alone


@pytest.mark.skipif(find_spec("accelerate") is None, reason="accelerate is not installed")
def test_accelerate_prints_the_same(alone):
    launch = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes=2")
    assert started_by(*launch, f"--main_process_port={free_port()}") == alone
