import copy
import json
import os
import shutil
from typing import Any

import numpy
import pytest
import torch

import equigrad as eg
from equigrad.training import Callback, Checkpoint, JsonLines, TensorBoard, learn
from equigrad.training.checkpoint import load_checkpoint
from helpers import content_of_tensors, flipped


def ridge():
    """Ten noisy points, five features: the strength that the validation half asks for."""
    g = torch.Generator().manual_seed(4)
    x = torch.randn(20, 5, generator=g, dtype=torch.float64)
    y = x @ torch.randn(5, generator=g, dtype=torch.float64)
    y += 2 * torch.randn(20, generator=g, dtype=torch.float64)
    problem = eg.Bilevel(
        lambda p, m: (
            (x[:10] @ p["w"] - y[:10]).square().mean() + m["rho"].exp() * p["w"].square().sum()
        ),
        lambda p, m: (x[10:] @ p["w"] - y[10:]).square().mean(),
    )

    def validation_loss(rho: float) -> float:
        gram = x[:10].T @ x[:10] / 10 + torch.eye(5, dtype=torch.float64) * rho_exp(rho)
        w = torch.linalg.solve(gram, x[:10].T @ y[:10] / 10)
        return (x[10:] @ w - y[10:]).square().mean().item()

    return problem, validation_loss


def rho_exp(rho: float) -> float:
    return torch.tensor(rho).exp().item()


def go(steps=6, *, max_steps=60, callbacks=(), optimizer: Any = torch.optim.Adam, **options):
    problem, _ = ridge()
    meta = {"rho": torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)}
    return learn(
        problem,
        {"w": torch.zeros(5, dtype=torch.float64)},
        meta,
        solver=eg.GradientDescent(lr=0.1, momentum=0.9, nesterov=True, max_steps=max_steps),
        estimator=eg.Contrastive(beta=0.01, scheme="symmetric"),
        optimizer=optimizer(meta.values(), lr=0.2),
        steps=steps,
        callbacks=callbacks,
        **options,
    )


def test_finds_the_strength_that_minimises_the_validation_loss():
    state = go(steps=80, max_steps=300)
    _, validation_loss = ridge()
    grid = torch.linspace(-4, 4, 801).tolist()
    best = min(grid, key=validation_loss)
    assert state.meta_params["rho"].item() == pytest.approx(best, abs=0.1)


def test_cold_and_warm_start():
    starts = {"cold": [], "warm": []}
    for start, seen in starts.items():

        class Watch(Callback):
            def on_step(self, state, result, seen=seen):
                seen.append(result.phases[0].start_residual)

        go(steps=3, start=start, callbacks=[Watch()])
    assert starts["cold"][0] == starts["warm"][0]
    assert starts["warm"][2] < 0.2 * starts["cold"][2]


class Stop(Callback):
    """Leaves the loop by an error, as Ctrl-C would, after some steps."""

    def __init__(self, after):
        self.after = after

    def on_step(self, state, result):
        if state.step == self.after:
            raise KeyboardInterrupt


def bits(state):
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in state.history]
    return state.meta_params["rho"].item(), state.params["w"].tolist(), rows


@pytest.mark.parametrize("start", ["cold", "warm"])
@pytest.mark.parametrize("after", [1, 3, 4])
def test_interrupted_and_resumed_run_ends_with_the_same_bits(tmp_path, start, after):
    def draws(**options):  # its rows hold random numbers too
        return go(start=start, evaluate=lambda p: {"draw": torch.rand(()).item()}, **options)

    torch.manual_seed(3)
    whole = draws()
    path = tmp_path / "checkpoint.pt"
    torch.manual_seed(3)
    with pytest.raises(KeyboardInterrupt):
        draws(callbacks=[Checkpoint(path, every=3), Stop(after)])
    assert load_checkpoint(path, "")["state"]["step"] == after  # also between two writes
    torch.manual_seed(99)
    resumed = draws(callbacks=[Checkpoint(path, every=3, resume=True)])
    assert bits(resumed) == bits(whole)


def test_interrupt_in_the_middle_of_a_step_saves_the_step_before(tmp_path):
    path = tmp_path / "checkpoint.pt"

    class HalfStep(torch.optim.Adam):
        steps_taken = 0

        def step(self, closure=None):
            super().step(closure)
            HalfStep.steps_taken += 1
            if HalfStep.steps_taken == 3:
                raise KeyboardInterrupt  # θ has moved, the step is not done

    HalfStep.__name__ = "Adam"  # the state is Adam's, and Adam may go on with it
    with pytest.raises(KeyboardInterrupt):
        go(optimizer=HalfStep, callbacks=[Checkpoint(path, every=100)])
    assert load_checkpoint(path, "")["state"]["step"] == 2
    resumed = go(callbacks=[Checkpoint(path, resume=True)])
    assert bits(resumed) == bits(go())


def test_a_failing_callback_does_not_keep_the_checkpoint_from_being_written(tmp_path):
    class Broken(Callback):
        def on_end(self, state, error):
            raise ValueError("the logger is gone")

    path = tmp_path / "checkpoint.pt"
    with pytest.raises(ValueError, match="the logger is gone"):
        go(callbacks=[Checkpoint(path, every=100), Broken(), Stop(2)])
    assert load_checkpoint(path, "")["state"]["step"] == 2


def test_projection_follows_every_step():
    def project(meta_params):
        meta_params["rho"].data.clamp_(min=-2.05)

    assert go(steps=5, project=project).meta_params["rho"].item() == pytest.approx(-2.05)
    assert go(steps=5).meta_params["rho"].item() < -2.05


def test_json_lines_hold_each_step_once(tmp_path):
    log, path = tmp_path / "metrics.jsonl", tmp_path / "checkpoint.pt"
    with pytest.raises(KeyboardInterrupt):
        go(callbacks=[Checkpoint(path, every=1), JsonLines(log), Stop(3)])
    log.write_text(log.read_text() + '{"outer_step": 3, "half a li')  # killed while writing
    go(callbacks=[Checkpoint(path, resume=True), JsonLines(log)])
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["outer_step"] for row in rows] == list(range(6))
    assert {"outer_loss", "residual", "gradient_evaluations", "status"} <= rows[0].keys()


def test_rows_say_whether_a_status_has_more_than_the_phase():
    """That a phase ran its steps is none; that its gradient is far off is."""
    (well,) = go(steps=1, max_steps=400).history
    (ill,) = go(steps=1, max_steps=2).history
    assert "uneasy" not in well, well["status"]
    assert str(well["status"]).startswith("stopped")
    assert ill["uneasy"], ill["status"]
    assert "estimated error" in str(ill["status"])


def test_tensorboard_events_hold_the_numbers(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    state = go(callbacks=[TensorBoard(tmp_path)], evaluate=lambda p: {"size": 3.5})
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    losses = [event.value for event in events.Scalars("outer_loss")]
    assert losses == pytest.approx([row["outer_loss"] for row in state.history])
    assert events.Scalars("size")[0].value == 3.5


def damaged(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def foreign(path):
    torch.save({"weights": torch.ones(3)}, path)


def malicious(path):
    class Evil:
        def __reduce__(self):
            return (exec, ("raise SystemExit('ran')",))

    torch.save(Evil(), path)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (damaged, "cannot be read as a checkpoint"),
        (lambda path: path.write_text("not a checkpoint"), "cannot be read as a checkpoint"),
        (foreign, "is not a checkpoint of equigrad"),
        (malicious, "cannot be read as a checkpoint"),
    ],
)
def test_checkpoints_that_cannot_be_used_are_refused_and_kept(tmp_path, harm, message):
    path = tmp_path / "checkpoint.pt"
    go(steps=1, callbacks=[Checkpoint(path)])
    harm(path)
    before = path.read_bytes()
    with pytest.raises(eg.RunError, match=message):
        go(callbacks=[Checkpoint(path, resume=True)])
    assert path.read_bytes() == before


def test_a_checkpoint_with_a_flipped_bit_is_refused_by_name(tmp_path):
    """A checksum per tensor is in the file; torch.load would take the other number."""
    path = tmp_path / "checkpoint.pt"
    go(steps=1, callbacks=[Checkpoint(path)])
    whole = path.read_bytes()
    for at in content_of_tensors(whole):
        path.write_bytes(flipped(whole, at))
        with pytest.raises(eg.RunError, match=r"checkpoint\.pt cannot be read .*checksum"):
            go(callbacks=[Checkpoint(path, resume=True)])


def test_checkpoint_of_another_optimiser(tmp_path):
    path = tmp_path / "checkpoint.pt"
    go(steps=1, callbacks=[Checkpoint(path)])
    with pytest.raises(eg.RunError, match=r"does not fit this run .*Adam, here SGD"):
        go(optimizer=torch.optim.SGD, callbacks=[Checkpoint(path, resume=True)])


def test_checkpoint_of_a_run_with_other_settings(tmp_path):
    path = tmp_path / "checkpoint.pt"
    go(steps=1, callbacks=[Checkpoint(path, identity="lr 0.1")])
    with pytest.raises(eg.RunError, match=r"other settings.*\n.*lr 0.1\n.*lr 0.2"):
        go(callbacks=[Checkpoint(path, resume=True, identity="lr 0.2")])


def test_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"

    class FillDisk(Callback):
        def on_step(self, state, result):
            if state.step == 2:

                def full(*args, **kwargs):
                    raise OSError(28, "No space left on device")

                monkeypatch.setattr(os, "fsync", full)

    with pytest.raises(
        eg.RunError, match=r"No space left on device; checkpoint.pt was not changed"
    ):
        go(callbacks=[Checkpoint(path), FillDisk()])
    monkeypatch.undo()
    assert load_checkpoint(path, "")["state"]["step"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "steps must be a whole number of at least 0"),
        ({"steps": float("nan")}, "steps must be a whole number of at least 0, got nan"),
        ({"steps": 2.5}, "steps must be a whole number of at least 0, got 2.5"),
        ({"optimizer": lambda *_, lr: None}, "optimizer must be an Optimizer, got None"),
        ({"callbacks": [3]}, "callbacks must be a tuple of values, each a Callback"),
        ({"project": 3}, "project must be a function, or None, got 3"),
        ({"start": "hot"}, "'cold' or 'warm', got 'hot'"),
        (
            {"optimizer": lambda _, lr: torch.optim.Adam([torch.zeros(1, requires_grad=True)])},
            "does not update meta-parameter 'rho'",
        ),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(eg.ConfigurationError, match=message):
        go(**options)


def test_checkpoint_every():
    with pytest.raises(
        eg.ConfigurationError, match="every must be a whole number of at least 1, got 0"
    ):
        Checkpoint(None, every=0)  # pyright: ignore[reportArgumentType]


NAN = float("nan")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"steps": n}, "steps must be a whole number") for n in (NAN, 2.5, "3", None, 10**23)),
        *(({"callbacks": c}, "each a Callback, got") for c in (3, None, [3], [Callback], "log")),
        ({"optimizer": lambda tensors, lr: None}, "optimizer must be an Optimizer, got None"),
        ({"optimizer": lambda tensors, lr: lr}, "optimizer must be an Optimizer, got 0.2"),
        ({"evaluate": 3}, "evaluate must be a function, or None, got 3"),
        ({"evaluate": lambda params: 3}, "must return a dictionary of metrics, .*got 3"),
        ({"evaluate": lambda params: None}, "must return a dictionary of metrics, .*got None"),
        ({"evaluate": lambda params: {"a": "good"}}, "must return a dictionary of metrics"),
        ({"evaluate": lambda params: {"a": torch.ones(2)}}, "must return a dictionary of metrics"),
        ({"evaluate": lambda params: {3: 0.5}}, "must return a dictionary of metrics"),
    ],
)
def test_what_no_loop_can_be_made_of_is_named(options, message):
    with pytest.raises(eg.ConfigurationError, match=message):
        go(**options)


@pytest.mark.parametrize("which", ["params", "meta_params"])
@pytest.mark.parametrize("given", [None, 3, [torch.ones(5)], {}, {"w": 3.0}, {"w": None}])
def test_params_that_are_none_are_named(which, given):
    problem, _ = ridge()
    theta = {"rho": torch.zeros((), dtype=torch.float64, requires_grad=True)}
    start = {"w": torch.zeros(5, dtype=torch.float64)}
    with pytest.raises(eg.ProblemError, match=f"^{which}"):
        learn(
            problem,
            **{"params": start, "meta_params": theta, which: given},
            solver=eg.GradientDescent(max_steps=3),
            estimator=eg.Contrastive(),
            optimizer=torch.optim.SGD(theta.values()),
            steps=1,
        )


def test_metrics_may_be_numbers_of_torch_or_numpy(tmp_path):
    log = tmp_path / "metrics.jsonl"
    metrics = {"a": torch.tensor(2.0), "b": numpy.float32(0.5), "c": True, "d": NAN}
    state = go(steps=1, evaluate=lambda params: metrics, callbacks=[JsonLines(log)])
    assert [state.history[0][name] for name in "abc"] == [2.0, 0.5, True]
    assert json.loads(log.read_text())["a"] == 2.0


STATE = ("meta_params", "optimizer", "params", "step", "gradient_evaluations", "seconds", "copies")


@pytest.mark.parametrize("place", [(), ("state",), *[("state", n) for n in (*STATE, "history")]])
def test_a_checkpoint_whose_content_is_no_state_is_refused(tmp_path, place):
    path = tmp_path / "checkpoint.pt"
    go(steps=2, callbacks=[Checkpoint(path)])
    whole = torch.load(path, weights_only=True)
    for harm in (None, "x", NAN, [1], torch.ones(3), {"u": torch.ones(1)}):
        content = copy.deepcopy(whole)
        inner = content
        for name in place[:-1]:
            inner = inner[name]
        if place:
            inner[place[-1]] = harm
        torch.save(content if place else harm, path)
        with pytest.raises(eg.RunError, match=r"checkpoint\.pt (does not fit|is not a|belong)"):
            go(callbacks=[Checkpoint(path, resume=True)])
        if place:
            del inner[place[-1]]
            torch.save(content, path)
            with pytest.raises(eg.RunError, match=r"checkpoint\.pt (does not fit this|is not a)"):
                go(callbacks=[Checkpoint(path, resume=True)])


@pytest.mark.parametrize("place", ["meta_params", "params", "copies"])
def test_a_checkpoint_with_another_name_of_a_parameter_is_refused(tmp_path, place):
    path = tmp_path / "checkpoint.pt"

    class Keep(Callback):
        def on_step(self, state, result):
            state.copies["best"] = {n: m.detach().clone() for n, m in state.meta_params.items()}

    go(steps=2, callbacks=[Keep(), Checkpoint(path)])
    content = torch.load(path, weights_only=True)
    renamed = content["state"][place]
    renamed = renamed["best"] if place == "copies" else renamed
    name = next(iter(renamed))
    renamed[f"{name[:-1]}~"] = renamed.pop(name)
    torch.save(content, path)
    with pytest.raises(eg.RunError, match=f"does not fit this run .*{name[:-1]}~"):
        go(callbacks=[Checkpoint(path, resume=True)])


class Remove(Callback):
    """Removes something after a step."""

    def __init__(self, step, remove):
        self.step, self.remove = step, remove

    def on_step(self, state, result):
        if state.step == self.step:
            self.remove()


@pytest.mark.parametrize("watch", [Checkpoint, JsonLines, TensorBoard])
def test_a_folder_that_is_removed_under_a_run_is_named(tmp_path, watch, capfd):
    folder = tmp_path / "run"
    folder.mkdir()
    watching = watch(folder if watch is TensorBoard else folder / "file")
    with pytest.raises(eg.RunError, match=r"cannot write .*run/file|run was removed"):
        go(steps=4, callbacks=[watching, Remove(2, lambda: shutil.rmtree(folder))])
    assert "Traceback" not in capfd.readouterr().err


def test_a_log_that_is_removed_under_a_run_is_written_again(tmp_path):
    log = tmp_path / "metrics.jsonl"
    state = go(steps=4, callbacks=[JsonLines(log), Remove(2, log.unlink)])
    assert [json.loads(line) for line in log.read_text().splitlines()] == state.history


@pytest.mark.parametrize("watch", [Checkpoint, JsonLines, TensorBoard])
@pytest.mark.parametrize("path", [None, 3, 1.5])
def test_paths_that_are_none(watch, path):
    with pytest.raises(eg.ConfigurationError, match="must be a path, got"):
        watch(path)


def test_a_folder_for_events_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(eg.RunError, match="cannot write events to"):
        go(steps=1, callbacks=[TensorBoard(tmp_path / "file" / "run")])


def test_rows_have_the_error_estimate_of_their_step_and_none_without_one(tmp_path):
    seen = []

    class Watch(Callback):
        def on_step(self, state, result):
            seen.append(result.error_estimate)

    state = go(steps=3, callbacks=[Watch(), JsonLines(tmp_path / "rows.jsonl")])
    assert [row["error_estimate"] for row in state.history] == seen
    assert all(0 < e < 0.1 for e in seen)
    written = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["error_estimate"] for row in written] == seen
    problem, _ = ridge()
    meta = {"rho": torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)}
    silent = learn(
        problem,
        {"w": torch.zeros(5, dtype=torch.float64)},
        meta,
        solver=eg.GradientDescent(lr=0.1, max_steps=20),
        estimator=eg.Unrolled(),
        optimizer=torch.optim.Adam(meta.values(), lr=0.2),
        steps=2,
    )
    assert all("error_estimate" not in row for row in silent.history)
