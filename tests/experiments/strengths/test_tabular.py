"""Strengths from one's own table: what a run leaves, what `predict` says, what is refused."""

import csv
import io
import json
from dataclasses import replace

import pytest
import torch

from equigrad.errors import DataError
from equigrad.experiments.runs import figures
from equigrad.experiments.runs.model import PREDICTOR, load_model
from equigrad.experiments.runs.report import report
from equigrad.experiments.strengths.tabular import Tabular
from equigrad.nn import ComplexSynapse
from equigrad.training.split import held_back
from equigrad.training.targets import Classes
from helpers import call_main, content_of_tensors, flipped

SMOKE = ["--scale", "smoke", "--hidden", "8", "--device", "cpu"]


def fruit(path, rows=90, seed=0):
    """Apples are red and round, pears green and long, plums blue; prices follow the size."""
    random = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, 3, generator=random).tolist()
    colors = {"apple": "red", "pear": "green", "plum": "blue"}
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["length", "color", "weight", "price", "kind"])
        for i in range(rows):
            kind = list(colors)[i % 3]
            length = 5 + 3 * (i % 3 == 1) + noise[i][0]
            color = colors[kind] if i % 7 else "brown"
            weight = 100 + 20 * noise[i][1]
            price = 1000 + 100 * length + 10 * noise[i][2]
            writer.writerow([length, color, weight, price, kind])
    return path


def table_of(text):
    return list(csv.DictReader(io.StringIO(text)))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run on kinds and one on prices."""
    from equigrad.cli import main

    folder = tmp_path_factory.mktemp("fruit")
    path = fruit(folder / "fruit.csv")
    for target, out in (("kind", "kinds"), ("price", "prices")):
        words = ["run", "tabular", "--csv", path, "--target", target, *SMOKE]
        words += ["--no-compare", "--out", folder / out, "--solver.max-steps", "60"]
        main([str(word) for word in words])
    return folder


def test_run_says_and_leaves_what_it_should(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fruit(tmp_path / "fruit.csv")
    words = ["run", "tabular", "--csv", "fruit.csv", "--target", "price", *SMOKE, "--out", "run"]
    code, said = call_main(*words, capsys=capsys)
    assert code == 0
    assert "regression, the target 'price' being numbers with 90 values" in said
    assert "72 rows to learn from in 2 folds and 18 test rows of fruit.csv" in said
    assert "validation R²" in said
    for label in ("unregularised", "best single strength", "T1–T2", "contrastive"):
        assert label in said
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["experiment"] == "tabular"
    assert set(result["metrics"]) == {
        f"{part}_{name}" for part in ("validation", "test") for name in ("r2", "rmse")
    }
    assert set(result["single_strength"]) == {"strength", *result["metrics"]}
    assert result["data"][0].startswith("regression")
    assert (tmp_path / "run" / "strengths.png").read_bytes().startswith(b"\x89PNG")
    code, again = call_main(*words, "--resume", capsys=capsys)
    assert code == 0
    assert f"{result['metrics']['test_r2']:.3f}" in again


def test_numbers_are_scored_in_their_own_units(run_folder):
    """R² and RMSE of the table, from the predictions and the prices as they were written."""
    config = replace(Tabular.preset(scale="smoke"), csv=run_folder / "fruit.csv", target="price")
    config = replace(config, hidden=(8,), solver=replace(config.solver, max_steps=60))
    split = config.trainer(0).split
    assert split.test is not None
    model = load_model(run_folder / "prices")
    predicted = torch.tensor(model.target.answers(model.outputs(split.test[0]))["prediction"])
    shape = torch.tensor(split.target.answers(split.test[1][:, None])["prediction"])
    metrics = json.loads((run_folder / "prices" / "result.json").read_text())["metrics"]
    error = (predicted - shape).square().mean().item()
    assert metrics["test_rmse"] == pytest.approx(error**0.5, rel=1e-4)
    assert metrics["test_r2"] == pytest.approx(1 - error / shape.var(correction=0).item(), rel=1e-4)
    assert 1000 < shape.mean() < 3000


def test_predictions_are_the_runs_own(run_folder):
    """The mean of the folds' networks, by hand from learned.pt, and as a model."""
    config = replace(
        Tabular.preset(scale="smoke"), csv=run_folder / "fruit.csv", target="kind", hidden=(8,)
    )
    job = config.trainer(0)
    params = torch.load(run_folder / "kinds" / "learned.pt", weights_only=True)["params"]
    model = load_model(run_folder / "kinds")
    synapse = ComplexSynapse(job.network)
    for x, _ in (job.split.train, *job.split.judges.values()):
        members = [synapse({n: p[k] for n, p in params.items()}, x) for k in range(4)]
        torch.testing.assert_close(model.outputs(x), torch.stack(members).mean(0))


def test_columns_in_any_order_and_more_of_them(run_folder, tmp_path, capsys):
    rows = table_of((run_folder / "fruit.csv").read_text())
    with (tmp_path / "other.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["note", "weight", "price", "color", "length"], delimiter=";")
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {n: row[n] for n in ("weight", "price", "color", "length")} | {"note": "ripe"}
            )
    outs = []
    for path in (run_folder / "fruit.csv", tmp_path / "other.csv"):
        out = tmp_path / f"{path.stem}.out"
        code, said = call_main(
            "predict", run_folder / "kinds", "--csv", path, "--out", out, capsys=capsys
        )
        assert code == 0, said
        outs.append(out.read_text())
    assert outs[0] == outs[1]
    assert "columns that the model does not use: 'note'" in said
    assert "90 predictions saved" in said
    code, said = call_main(
        "predict", run_folder / "kinds", "--csv", path, "--out", out, capsys=capsys
    )
    assert code == 2
    assert "nothing is overwritten" in said


def test_predict_scores_where_the_target_is_there(run_folder, tmp_path, capsys):
    from equigrad.cli import main

    main(["predict", str(run_folder / "kinds"), "--csv", str(run_folder / "fruit.csv")])
    out, err = capsys.readouterr()
    predicted = table_of(out)
    truth = table_of((run_folder / "fruit.csv").read_text())
    right = sum(p["prediction"] == t["kind"] for p, t in zip(predicted, truth, strict=True))
    assert f"accuracy {100 * right / 90:.4g} % on 90 with a known target" in err
    assert right > 60
    assert [int(p["row"]) for p in predicted] == list(range(1, 91))
    for p in predicted[:5]:
        probabilities = {n: float(p[f"p({n})"]) for n in ("apple", "pear", "plum")}
        assert sum(probabilities.values()) == pytest.approx(1)
        assert max(probabilities, key=lambda n: probabilities[n]) == p["prediction"]


def test_predict_names_what_it_does_not_know(run_folder, tmp_path, capsys):
    path = tmp_path / "new.csv"

    def said_of(text, model="kinds"):
        path.write_text(text)
        return call_main("predict", run_folder / model, "--csv", path, capsys=capsys)

    code, said = said_of("length,color,weight,price,kind\n5,purple,100,9,fig\n6,red,90,9,apple\n")
    assert code == 0
    assert "column 'color': 1 row of unseen category 'purple'" in said
    assert "not scored, because the model does not know the target 'fig'" in said
    assert "on 1 with a known target" in said
    code, said = said_of("length,weight,price\n5,100,9\n")
    assert (code, "lacks the columns 'color'" in said) == (2, True)
    code, said = said_of("length,color,weight,price\n,red,100,9\n")
    assert (code, "'length': 1 row without a value, taken as" in said) == (0, True)
    code, said = said_of("length,color,weight,price\nlong,red,100,9\n")
    assert (code, "no numbers, taken as missing: 'long' (row 1)" in said) == (0, True)


def test_numbers_are_read_with_the_models_decimal_mark(tmp_path, capsys):
    """1.234 with a decimal comma is 1234, with a point 1.234."""
    path = tmp_path / "comma.csv"
    path.write_text("a;y\n" + "".join(f"{i}.{i}34,5;{1000 * i},5\n" for i in range(1, 10)))
    config = Tabular(csv=path, target="y", task="regression", decimal=",", hidden=(2,))
    split = config.load(torch.device("cpu"), torch.float32)
    own = {n: p.expand(4, *p.shape) for n, p in config.network(split).named_parameters()}
    config.model(split, own).save(tmp_path)

    def said_of(text, *words):
        (tmp_path / "new.csv").write_text(text)
        words = ["--csv", tmp_path / "new.csv", "--delimiter", ";", *words]
        code, said = call_main("predict", tmp_path / "model.pt", *words, capsys=capsys)
        assert code == 0
        return said

    assert said_of("a\n1.234\n") == said_of("a\n1234\n") != said_of("a\n1,234\n")
    assert said_of("a\n1.234\n", "--decimal", ".") == said_of("a\n1,234\n")


def test_what_is_no_number_in_a_test_row_counts_as_missing(tmp_path):
    path = fruit(tmp_path / "fruit.csv")
    config = Tabular(csv=path, target="price")
    lines = path.read_text().splitlines()
    place = 1 + int(divided(config, path)[0])
    lines[place] = f"long,{lines[place].partition(',')[2]}"
    path.write_text("\n".join(lines))
    split = config.load(torch.device("cpu"), torch.float32)
    assert f"no numbers, taken as missing: 'long' (row {place})" in split.note
    assert split.test is not None
    assert split.test[0].isfinite().all()


def test_one_row_is_scored_without_r2(run_folder, tmp_path, capsys):
    path = tmp_path / "new.csv"
    path.write_text("length,color,weight,kind,price\n5,red,100,apple,1500\n")
    code, said = call_main("predict", run_folder / "prices", "--csv", path, capsys=capsys)
    assert (code, "r2" in said) == (0, False)
    assert "rmse" in said
    assert "on 1 with a known target" in said


def test_targets_too_large_to_standardise_are_named(tmp_path):
    path = tmp_path / "large.csv"
    path.write_text("a,y\n" + "".join(f"{i},{i}e300\n" for i in range(20)))
    with pytest.raises(DataError, match=r"the target 'y': values .* too large to be standardised"):
        Tabular(csv=path, target="y").load(torch.device("cpu"), torch.float32)


def test_models_that_cannot_be_asked(run_folder, tmp_path, capsys):
    def said_of(model):
        return call_main("predict", model, "--csv", run_folder / "fruit.csv", capsys=capsys)

    code, said = said_of(tmp_path)
    assert (code, "a model is saved at the end of" in said) == (2, True)
    code, said = said_of(run_folder)
    assert (code, "there is one in" in said) == (2, True)
    broken = tmp_path / "model.pt"
    whole = (run_folder / "kinds" / "model.pt").read_bytes()
    for content in (b"", b"junk", whole[:500]):
        broken.write_bytes(content)
        code, said = said_of(broken)
        assert (code, "cannot be read as a model" in said) == (2, True)
    for at in content_of_tensors(whole):
        broken.write_bytes(flipped(whole, at))
        code, said = said_of(broken)
        assert (code, f"{broken} cannot be read" in said, "checksum" in said) == (2, True, True)
    later = torch.load(run_folder / "kinds" / "model.pt", weights_only=True)
    renamed = {f"{name}x": p for name, p in later["params"].items()}
    torch.save({**later, "params": renamed}, broken)
    code, said = said_of(broken)
    assert (code, "cannot be read as a model" in said) == (2, True)
    torch.save({**later, "format": "equigrad model 9"}, broken)
    code, said = said_of(broken)
    assert (code, PREDICTOR in said) == (2, True)


def test_test_rows_have_no_say(tmp_path):
    """Other test rows, the same model to the bit."""
    path = fruit(tmp_path / "fruit.csv")
    config = replace(
        Tabular.preset(scale="smoke"), csv=path, target="price", hidden=(8,), compare=False
    )
    job = config.trainer(0)
    rows = divided(config, path)
    lines = path.read_text().splitlines()
    for i in rows.tolist():
        lines[1 + i] = f"99,purple,5,{77777 + i},pear"
    path.write_text("\n".join(lines))
    other = config.trainer(0)
    assert other.split.test is not None
    assert job.split.test is not None
    assert not torch.equal(job.split.test[0], other.split.test[0])
    one, two = (
        config.model(j.split, j.learn("contrastive")[0].network.params) for j in (job, other)
    )
    assert one.encoding == two.encoding
    assert one.target == two.target
    assert all(torch.equal(p, two.params[name]) for name, p in one.params.items())


def divided(config, path):
    """The test rows."""
    count = len(path.read_text().splitlines()) - 1
    return held_back(torch.zeros(count), config.test_share, 0)[0]


def test_report_tells_tables_apart_and_finds_no_damage(run_folder, tmp_path):
    page = report([run_folder], tmp_path / "page.html").read_text()
    assert "cannot be read" not in page
    for heading in ("test accuracy, %", "test R²", "test RMSE", "kind", "price"):
        assert heading in page


def test_a_stopped_run_resumes_to_the_same_bits(run_folder, tmp_path, capsys, monkeypatch):
    from equigrad.training import folded

    monkeypatch.chdir(tmp_path)
    words = ["run", "tabular", "--csv", run_folder / "fruit.csv", "--target", "kind", *SMOKE]
    words += ["--no-compare", "--checkpoint-every", "1", "--outer-steps", "4"]
    assert call_main(*words, "--out", "whole", capsys=capsys)[0] == 0
    steps = []
    judge = folded.FoldedLearner.tested

    def stops(self, params):
        steps.append(1)
        if len(steps) == 3:  # the first look is at the single strength
            raise KeyboardInterrupt
        return judge(self, params)

    monkeypatch.setattr(folded.FoldedLearner, "tested", stops)
    code, said = call_main(*words, "--out", "stopped", capsys=capsys)
    assert (code, "--out stopped --resume" in said) == (130, True)
    assert not (tmp_path / "stopped" / "model.pt").exists()
    monkeypatch.setattr(folded.FoldedLearner, "tested", judge)
    code, said = call_main(*words, "--out", "stopped", "--resume", capsys=capsys)
    assert (code, "resuming after outer step 1" in said) == (0, True)
    one, two = (load_model(tmp_path / name) for name in ("whole", "stopped"))
    assert all(torch.equal(p, two.params[name]) for name, p in one.params.items())


def test_data_that_change_under_a_run_are_noticed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = fruit(tmp_path / "fruit.csv")
    words = ["run", "tabular", "--csv", path, "--target", "kind", *SMOKE, "--no-compare"]
    assert call_main(*words, "--out", "run", capsys=capsys)[0] == 0
    (tmp_path / "run" / "result.json").unlink()
    fruit(path, seed=1)
    code, said = call_main(*words, "--out", "run", "--resume", capsys=capsys)
    assert (code, "the data have changed since the run in run began" in said) == (2, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Missing from equigrad run tabular: --csv"),
        (["--csv", "gone.csv", "--target", "kind"], "cannot read gone.csv"),
        (["--csv", "fruit.csv", "--target", "knid"], "no column of the table, which has 'length',"),
        (["--csv", "fruit.csv", "--target", "knid"], "Did you mean 'kind'?"),
        (["--csv", "fruit.csv", "--target", "kind", "--ignore", "colour"], "mean 'color'?"),
        (
            ["--csv", "fruit.csv", "--target", "kind", "--ignore", "kind"],
            "--ignore 'kind' is the target",
        ),
        (["--csv", "fruit.csv", "--target", "kind", "--categorical", "kind"], "is the target; say"),
        (
            [
                "--csv",
                "fruit.csv",
                "--target",
                "kind",
                "--ignore",
                "color",
                "--categorical",
                "color",
            ],
            "--categorical 'color' is left out by --ignore",
        ),
        (["--csv", "fruit.csv", "--target", "kind", "--test-share", "1"], "in (0, 1), got 1"),
        (["--csv", "fruit.csv", "--target", "kind", "--hidden", "0"], "of at least 1, got (0,)"),
        (["--csv", "fruit.csv", "--target", "kind", "--task", "regression"], "is no number: 'ap"),
        (["--csv", "one.csv", "--target", "kind"], "has the value 'pear' only"),
        (["--csv", "few.csv", "--target", "kind"], "class of one or two rows: 'fig'"),
        (["--csv", "bare.csv", "--target", "kind"], "--target column_2 --header no"),
    ],
)
def test_wrong_words_end_with_code_2(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    fruit(tmp_path / "fruit.csv")
    (tmp_path / "one.csv").write_text("a,kind\n" + "".join(f"{i},pear\n" for i in range(20)))
    (tmp_path / "few.csv").write_text("a,kind\n1,pear\n2,fig\n3,pear\n4,pear\n")
    (tmp_path / "bare.csv").write_text("5.1,3\n4.9,2\n5.3,3\n")
    code, said = call_main("run", "tabular", "--scale", "smoke", *words, capsys=capsys)
    assert code == 2
    assert message in said
    assert not (tmp_path / "runs").exists()


def test_rows_are_left_out_as_it_is_said(tmp_path):
    path = tmp_path / "gaps.csv"
    lines = [f"{i * 3 % 40},{'' if i == 3 else i * i % 7},{'' if i == 5 else i}" for i in range(40)]
    path.write_text("\n".join(["a,b,y", *lines]))
    config = Tabular(csv=path, target="y", task="regression")
    for missing, note, kept in (
        ("impute", "left out: 1 row without a target", 39),
        ("drop", "left out: 2 rows with missing values", 38),
    ):
        split = replace(config, missing=missing).load(torch.device("cpu"), torch.float32)
        assert note in split.note
        assert split.test is not None
        assert len(split.train[1]) + len(split.test[1]) == kept


def test_one_input_is_said_to_be_one(tmp_path):
    path = tmp_path / "one.csv"
    path.write_text("a,y\n" + "".join(f"{i * 3 % 20}.5,{i % 2}\n" for i in range(20)))
    split = Tabular(csv=path, target="y").load(torch.device("cpu"), torch.float32)
    assert "; 1 input\n" in f"{split.note}\n"


def test_letters_that_the_font_lacks_are_no_warning(tmp_path, recwarn):
    figures.strength_learning(
        tmp_path / "strengths.png",
        history=[{"outer_step": 0, "validation_accuracy": 50, "test_accuracy": 50}],
        strengths={"weight": torch.ones(2, 1)},
        title="名前",
        target=Classes(),
        inputs=["名前"],
    )
    assert [str(w.message) for w in recwarn if "Glyph" in str(w.message)] == []
