"""The gallery's scripts run, are short, keep what they promise, and end in one labelled picture."""

import re
import runpy
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest

GALLERY = Path(__file__).parent.parent / "examples" / "gallery"

LEAST_GAIN = {
    "01_hyper_cleaning": (r"before: .*?([\d.]+)%.*?after: .*?([\d.]+)%", 2),
    "02_learned_augmentation": (r"([\d.]+) % before, ([\d.]+) % after", 8),
    "03_deblurring": (r"guess: ([\d.]+) dB.*learned: ([\d.]+) dB", 1),
    "04_class_imbalance": (r"equal: ([\d.]+)%.*learned: ([\d.]+)%", 15),
    "05_equilibrium_propagation": (r"propagation: ([\d.]+) % before, ([\d.]+) % after", 80),
    "06_least_control": (r"([\d.]+) % before, ([\d.]+) % after", 75),
    "07_black_box": (r"before: ([\d.]+)%.*after: ([\d.]+)%", 3),
    "08_recurrent_learner": (r"([\d.]+) before, ([\d.]+) after", -0.05),
    "09_gaussian_process": (r"([\d.]+) before, ([\d.]+) after", -0.5),
    "10_learned_initialisation": (r"not meta-learned: ([\d.]+)\n.*contrastive.*: ([\d.]+)\n", -3),
}
"""What is said before and after, and how far the second number has to be from the first: about half
of what it is, so that rounding of other machines is allowed for. Errors fall, scores rise."""


def test_every_script_is_run():
    assert {f"plot_{name}.py" for name in LEAST_GAIN} == {p.name for p in GALLERY.glob("*.py")}


@pytest.mark.parametrize("name", LEAST_GAIN)
def test_script(name, capsys, monkeypatch):
    script = GALLERY / f"plot_{name}.py"
    assert len(script.read_text().splitlines()) <= 60
    matplotlib.use("Agg")
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.extend(map(plt.figure, plt.get_fignums())))
    try:
        runpy.run_path(str(script))
        (figure,) = shown
        for axes in figure.axes:
            pictured = axes.images and axes.get_title()
            scale = axes.get_label() == "<colorbar>" and axes.get_ylabel()
            assert pictured or scale or (axes.get_xlabel() and axes.get_ylabel())
    finally:
        plt.close("all")
    pattern, least = LEAST_GAIN[name]
    before, after = map(float, re.search(pattern, capsys.readouterr().out, re.DOTALL).groups())
    assert (after - before) / least >= 1
