"""Tables as people have them: read and understood, with what was done about their faults said."""

import math
import os
import time
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch

from equigrad.errors import ConfigurationError, DataError
from equigrad.experiments.strengths.tabular import Tabular
from equigrad.experiments.tables.encoding import Categorical, fit
from equigrad.experiments.tables.reading import Table, as_numbers, read
from equigrad.experiments.tables.target import read_target
from equigrad.training.scale import mean_and_scale
from equigrad.training.split import divide, held_back
from equigrad.training.targets import Classes, Numbers

CPU = torch.device("cpu")
TARGETS = {
    "concrete": "Concrete compressive strength(MPa, megapascals) ",
    "energy": "Y1",
    "auto-mpg": "mpg",
    "hitters": "Salary",
    "california-housing": "median_house_value",
    "seoul-bikes": "Rented Bike Count",
    "wine-red": "quality",
    "penguins": "species",
    "german-credit": "credit_risk",
    "telco-churn": "Churn",
}
NAMES = {
    "auto-mpg": "hardly any two rows have the same: 'name'",
    "hitters": "left out: 59 rows without a target",
    "seoul-bikes": "'Date': dates (%d/%m/%Y), of which year, month, weekday are inputs",
    "telco-churn": "'TotalCharges': 11 missing values",
}
"""What has to be said of a table."""


def written(tmp_path, text, encoding="utf-8"):
    path = tmp_path / "table.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return path


def columns(table: Table) -> dict[str, list]:
    return {name: table.frame[name].tolist() for name in table.frame.columns}


@pytest.mark.parametrize("name", TARGETS)
def test_public_tables_load_with_the_target_alone(name):
    if not (folder := os.environ.get("EQUIGRAD_DATA")):
        pytest.skip("EQUIGRAD_DATA names no folder of data sets")
    path = Path(folder) / "tables" / f"{name}.csv"
    split = Tabular(csv=path, target=TARGETS[name]).load(CPU, torch.float32)
    assert split.test is not None
    rows = len(split.train[1]) + len(split.test[1])
    frame = pandas.read_csv(path, sep=None, engine="python", skipinitialspace=True)
    frame.columns = frame.columns.str.strip()
    assert rows == frame[TARGETS[name].strip()].notna().sum()
    assert split.train[0].isfinite().all()
    assert isinstance(split.target, Classes) == (
        name in ("wine-red", "penguins", "german-credit", "telco-churn")
    )
    assert NAMES.get(name, "") in split.note


def test_dialects_are_recognised(tmp_path):
    expected = {"a": [1.5, 2.0], "b c": ["x", "y, z"]}
    for text in (
        'a,b c\n1.5,x\n2,"y, z"\n',
        "a;b c\r\n1.5;x\r\n2;y, z\r\n",
        "a\tb c\n1.5\tx\n\n2\ty, z",
        "\n a | b c \n 1.5 | x\n2|y, z\n",
        '\ufeff"a","b c"\n"1.5","x"\n"2","y, z"\n',
    ):
        assert columns(read(written(tmp_path, text))) == expected, text
    wide = written(tmp_path, "a\tb c\n1.5\tx\n2\ty, z\n", "utf-16")
    assert columns(read(wide)) == expected


def test_what_is_no_utf_8_is_read_as_latin_1_and_that_is_said(tmp_path):
    path = written(tmp_path, "straße,b\ncafé,1\n", "latin-1")
    table = read(path)
    assert columns(table) == {"straße": ["café"], "b": [1]}
    assert "read as Latin-1" in table.notes[0]
    with pytest.raises(DataError, match="cannot be read as utf-8"):
        read(path, encoding="utf-8")


def test_decimal_commas_are_found(tmp_path):
    table = read(written(tmp_path, "a;b\n1.234,5;x\n-0,5;y\n"))
    assert table.numbers("a").tolist() == [1234.5, -0.5]
    assert "decimal commas" in table.notes[0]
    grouped = read(written(tmp_path, 'a,b\n"71,970",1\n"8,237,100",2\n'))
    assert grouped.numbers("a").tolist() == [71970, 8237100]


@pytest.mark.parametrize(
    ("text", "decimal", "number"),
    [
        ("1.234", ",", 1234.0),
        ("-12.345.678,5", ",", -12345678.5),
        ("-0,73", ",", -0.73),
        ("31.12.2020", ",", None),
        ("192.168.0.1", ",", None),
        ("-0.73", ",", None),
        ("0.730", ",", None),  # no thousands begin with a zero
        ("1,5.000", ",", None),
        ("1,234.5", ".", 1234.5),
        ("1e3", ".", 1000.0),
        ("inf", ".", None),
        ("12 kg", ".", None),
    ],
)
def test_numbers_are_what_their_marks_say(text, decimal, number):
    found = as_numbers(pandas.Series([text, text]), decimal).tolist()
    assert found == [number] * 2 if number is not None else all(map(math.isnan, found))


def test_faults_of_a_file_are_mended_and_named(tmp_path):
    table = read(written(tmp_path, "a,b,a\n1,2,3\n1,2,3,4\n5,6,7\n"))
    assert columns(table) == {"a": [1, 5], "b": [2, 6], "a.1": [3, 7]}
    said = "\n".join(table.notes)
    for note in ("more fields than the header: lines '3'", "called 'a.1'"):
        assert note in said
    named = read(written(tmp_path, "a,b\nrow1,1,2\nrow2,3,4\n"))  # as R writes row names
    assert columns(named) == {"a": [1, 3], "b": [2, 4]}
    assert "for which the header has no name" in named.notes[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("a,b\n", "has a header \\('a', 'b'\\) and no rows"),
        ('a,b\n1,2\n"1,2\n3,4\n', "cannot be read as CSV .*is a quote not closed"),
        (b"PK\x03\x04rest", "spreadsheet"),
        (b"\x1f\x8b", "gzip"),
        (b"a,b\n1,\x002\n", "zero bytes"),
    ],
)
def test_what_is_no_table_is_named(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read(written(tmp_path, text))


def test_files_that_are_not_there(tmp_path):
    for path in (tmp_path / "gone.csv", tmp_path):
        with pytest.raises(DataError, match=f"cannot read {path}"):
            read(path)
    with pytest.raises(DataError, match="delimiter must be one character"):
        read(written(tmp_path, "a,b\n1,2\n"), delimiter=";;")
    with pytest.raises(DataError, match="cannot be read as klingon"):
        read(written(tmp_path, "a,b\n1,2\n"), encoding="klingon")


def test_a_first_row_of_numbers_is_asked_about(tmp_path):
    path = written(tmp_path, "".join(f"{i * 7 % 30}.5,{i % 7},kind{i % 2}\n" for i in range(30)))
    with pytest.raises(DataError, match="is mostly numbers") as error:
        Tabular(csv=path, target="kind").load(CPU, torch.float32)
    command = f"equigrad run tabular --csv {path} --target column_3 --header no"
    assert str(error.value).endswith(command)
    split = Tabular(csv=path, target="column_3", header="no").load(CPU, torch.float32)
    assert split.inputs == ["column_1", "column_2"]
    named = Tabular(csv=path, target="kind0", header="yes").load(CPU, torch.float32)
    assert named.inputs == ["0.5", "0"]


def test_all_questions_are_asked_at_once_with_a_command(tmp_path):
    path = written(tmp_path, "height,kind,weight\n" + "1,a,2\n2,b,3\n" * 9)
    config = Tabular(csv=path, target="knid", ignore=("wait", "weight"), categorical=("weight",))
    with pytest.raises(DataError) as error:
        config.load(CPU, torch.float32)
    asked = str(error.value).splitlines()
    assert len(asked) == 5
    assert "--target 'knid' is no column" in asked[0]
    assert "--ignore 'wait' is no column" in asked[1]
    assert "--categorical 'weight' is left out by --ignore" in asked[2]
    assert asked[4].strip() == f"equigrad run tabular --csv {path} --target kind --ignore weight"


def fitted(text, tmp_path, **options):
    table = read(written(tmp_path, text))
    return fit(table, target="y", **options), table


def test_encoding_by_hand(tmp_path):
    text = "n,c,y\n1,a,0\n2,b,0\n3,a,0\n6,b,1\n"
    (encoding, notes), table = fitted(text, tmp_path)
    assert encoding.inputs == ["n", "c=a", "c=b"]
    assert notes == []
    x, said = encoding.encode(table)
    root = math.sqrt(3.5)  # mean 3, squares 4 1 0 9
    expected = [[-2 / root, 1, 0], [-1 / root, 0, 1], [0, 1, 0], [3 / root, 0, 1]]
    torch.testing.assert_close(x, torch.tensor(expected, dtype=torch.float64))
    assert said == []
    # other rows, other columns, in another order: the same numbers
    other = read(written(tmp_path, "extra,c,n\n0,z,1\n0,b,6\n"))
    x, said = encoding.encode(other)
    torch.testing.assert_close(x[0], torch.tensor([-2 / root, 0, 0], dtype=torch.float64))
    torch.testing.assert_close(x[1], torch.tensor(expected[3], dtype=torch.float64))
    assert said == ["column 'c': 1 row of unseen category 'z'"]
    with pytest.raises(DataError, match="lacks the columns 'c' that the network learned from"):
        encoding.encode(read(written(tmp_path, "n\n1\n")))


def test_missing_and_odd_values_are_imputed_and_named(tmp_path):
    rows = "".join(f"{i % 11},a,{i}.5\n{i % 11},b,{i}.25\n" for i in range(12))
    text = f"n,c,y\n{rows},a,3\nabc,,4\n#N/A,b,5\n"
    (encoding, notes), table = fitted(text, tmp_path)
    assert encoding.inputs == ["n", "n is missing", "c=a", "c=b", "c is rare"]
    x, said = encoding.encode(table)
    assert x[-3:, 1].tolist() == [1, 1, 1]
    assert x[-2, 2:].tolist() == [0, 0, 1]
    assert said == ["column 'n': no numbers, taken as missing: 'abc' (row 26)"]
    values = np.array([i % 11 for i in range(12) for _ in range(2)])
    filled = np.append(values, [np.median(values)] * 3)
    assert x[-1, 0].item() == pytest.approx((np.median(values) - filled.mean()) / filled.std())
    assert "column 'n': 3 missing values taken as the median 4.5" in notes[0]
    # missing where nothing was when it was fitted: the median
    (encoding, _), _ = fitted("n,y\n1,0\n2,1\n4,3\n", tmp_path)
    x, said = encoding.encode(read(written(tmp_path, "n\n?\n2\n")))
    assert x[0].item() == x[1].item()
    assert said == ["column 'n': 1 row without a value, taken as 2, the median"]


def test_dates_become_year_month_and_weekday(tmp_path):
    """Days 1 apart over two years; %d/%m/%Y since there are days after the twelfth."""
    days = pandas.date_range("2023-12-25", periods=60)
    rows = "".join(f"{day:%d/%m/%Y},{i}.5\n" for i, day in enumerate(days))
    (encoding, notes), table = fitted("day,y\n" + rows, tmp_path)
    assert encoding.inputs == ["day year", "day month", "day weekday"]
    assert notes == ["column 'day': dates (%d/%m/%Y), of which year, month, weekday are inputs"]
    x, _ = encoding.encode(table)
    weekday = np.array([day.weekday() for day in days], dtype=float)
    np.testing.assert_allclose(x[:, 2], (weekday - weekday.mean()) / weekday.std())
    hours = "".join(f"2024-01-02 {i % 24:02}:00,{i}.5\n" for i in range(60))
    assert fitted("at,y\n" + hours, tmp_path)[0][0].inputs == ["at hour"]


def test_rare_categories_share_an_input_as_new_ones_do(tmp_path):
    texts = ["red"] * 50 + ["blue"] * 45 + ["pink", "teal", "gray", "lime", "navy"]
    rows = "".join(f"{text},{i}.5\n" for i, text in enumerate(texts))
    (encoding, notes), table = fitted("c,y\n" + rows, tmp_path)
    assert encoding.inputs == ["c=blue", "c=red", "c is rare"]
    assert "5 rare values in 5 rows share one input, such as" in notes[0]
    assert encoding.encode(table)[0][-1].tolist() == [0, 0, 1]
    x, said = encoding.encode(read(written(tmp_path, "c\nmauve\n")))
    assert (x.tolist(), said) == ([[0, 0, 1]], [])


def test_what_says_nothing_or_too_much_is_left_out(tmp_path):
    rows = "".join(f"{i},id-{i},5,{i * i % 17},{i * 7 % 31}.5,{i * 7 % 31}.50\n" for i in range(60))
    (encoding, notes), _ = fitted("row,id,k,n,y,copy\n" + rows, tmp_path)
    assert encoding.inputs == ["n"]
    assert notes == [
        "left out, as it numbers the rows: 'row'",
        "left out, being text of which hardly any two rows have the same: 'id'",
        "left out, having one value only: 'k'",
        "left out, as it equals the target 'y': 'copy'",
    ]
    with pytest.raises(DataError, match=r"no column to learn from .*one value only: 'k'"):
        fitted("k,y\n5,1\n5,2\n", tmp_path)


def test_a_number_is_one_category_however_it_is_written(tmp_path):
    text = "c,y\n" + "1,0\n1.0,1\n2.50,0.0\n2.5,1.0\n" * 3
    (encoding, _), table = fitted(text, tmp_path, categorical=("c",))
    assert encoding.columns == (Categorical("c", ("1", "2.5")),)
    assert encoding.encode(table)[0][:4].tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]
    target, _, y, _ = read_target(table, "y", "classification")
    assert target == Classes(("0", "1"))
    assert y[:4].tolist() == [0, 1, 0, 1]
    assert target.read(["1.00", "0", "x"], [1.0, 0.0, None]) == [1, 0, None]


@pytest.mark.parametrize(
    ("values", "task", "expected"),
    [
        (["b", "a"] * 5, "auto", Classes(("a", "b"))),
        (["True", "False"] * 5, "auto", Classes(("False", "True"))),
        (["10", "9", "9"] * 5, "auto", Classes(("9", "10"))),
        (["1", "2"] * 5, "regression", Numbers()),
        ([str(i) for i in range(12)], "auto", Numbers()),
        (["0.5", "1.5"] * 5, "auto", Numbers()),
        (["0.5", "1.5"] * 5, "classification", Classes(("0.5", "1.5"))),
    ],
)
def test_targets_are_classes_or_numbers(tmp_path, values, task, expected):
    table = read(written(tmp_path, "y\n" + "".join(f"{v}\n" for v in values)))
    target, rows, read_values, notes = read_target(table, "y", task)
    assert target == expected
    assert len(read_values) == len(rows) == len(values)
    assert notes[0].startswith("classification" if isinstance(expected, Classes) else "regression")
    assert ("else --task" in notes[0]) == (task == "auto" and values[0] not in ("b", "True"))


def test_rows_without_a_target_and_tiny_classes_are_left_out(tmp_path):
    table = read(written(tmp_path, "a,y\n" + "1,p\n2,q\n" * 5 + "3,r\n4,r\n5,\n"))
    target, rows, y, notes = read_target(table, "y", "auto")
    assert (target, len(rows), len(y)) == (Classes(("p", "q")), 10, 10)
    assert notes[1:] == [
        "left out: 1 row without a target",
        "left out: 2 rows where the target is a class of one or two rows: 'r'",
    ]
    text = "y\n" + "".join(f"{i}\n" for i in range(60)) + "many\n"
    target, rows, _, notes = read_target(read(written(tmp_path, text)), "y", "auto")
    assert (target, len(rows)) == (Numbers(), 60)
    assert notes[1] == "left out: 1 row where the target is no number: 'many'"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["a"] * 9, "has the value 'a' only"),
        (["3.5"] * 9, "has the value '3.5' only"),
        ([f"n{i}" for i in range(60)], "no value, .*60 rows where the target is a class of one"),
    ],
)
def test_targets_that_cannot_be_learned(tmp_path, values, message):
    table = read(written(tmp_path, "y,a\n" + "".join(f"{v},1\n" for v in values)))
    with pytest.raises(DataError, match=message):
        read_target(table, "y", "auto")


def test_a_large_table_is_read_in_twice_the_time_of_pandas(tmp_path):
    """100,000 rows × 50 columns, four of them text; by the processor's clock, the best of three."""
    random = np.random.default_rng(0)
    frame = pandas.DataFrame(random.normal(size=(100_000, 46))).add_prefix("x").round(6)
    for name in ("color", "size", "shop", "day"):
        frame[name] = random.choice(["red", "green", "blue", "pink"], len(frame))
    path = tmp_path / "large.csv"
    frame.to_csv(path, index=False)

    def seconds(reading):
        began = time.process_time()
        reading(path)
        return time.process_time() - began

    ours, theirs = (min(seconds(r) for _ in range(3)) for r in (read, pandas.read_csv))
    assert ours < 2 * theirs


def test_constant_columns_are_told_by_their_values_and_not_by_rounding():
    column = torch.tensor([0.1] * 12, dtype=torch.float64)
    assert 0 < column.std(correction=0) < 1e-16
    mean, scale = mean_and_scale(torch.stack([column, column.cumsum(0)], dim=1), "numbers")
    assert (mean[0].item(), scale[0].item()) == (0.1, 1.0)
    assert scale[1].item() == pytest.approx(0.1 * math.sqrt(143 / 12))  # of 0.1 … 1.2


def test_numbers_too_large_for_a_deviation_are_named(tmp_path):
    with pytest.raises(DataError, match=r"column 'a': values up to 1e\+300 are too large"):
        fitted("a,y\n1e300,0\n-1e300,1\n", tmp_path)


def test_constant_targets_have_no_r2():
    """The deviation of 0.1 three times is not quite zero; the error is a tenth."""
    y = torch.tensor([0.1] * 3, dtype=torch.float64)
    found = Numbers().metrics(y[:, None] + 0.1, y)
    assert math.isnan(found["r2"])
    assert found["rmse"] == pytest.approx(0.1)


def test_rows_that_are_held_back_have_every_class():
    groups = torch.tensor([0] * 100 + [1] * 20 + [2] * 3)
    test, seen = held_back(groups, 0.2, seed=0)
    assert groups[test].bincount().tolist() == [20, 4, 1]
    assert sorted([*test.tolist(), *seen.tolist()]) == list(range(123))
    assert not torch.equal(test, held_back(groups, 0.2, seed=1)[0])


def test_every_class_has_its_share_of_every_part():
    groups = torch.tensor([0] * 100 + [1] * 20 + [2] * 3)
    parts = divide(groups, test_share=0.2, training_share=0.5, samples=None, seed=0)
    counts = [groups[rows].bincount(minlength=3).tolist() for rows in vars(parts).values()]
    assert counts == [[40, 8, 1], [40, 8, 1], [20, 4, 1]]
    assert sorted(torch.cat(list(vars(parts).values())).tolist()) == list(range(123))
    # in an order that mini-batches can be cut from
    assert len(groups[parts.train][:10].unique()) > 1
    other = divide(groups, test_share=0.2, training_share=0.5, samples=None, seed=1)
    assert not torch.equal(parts.train, other.train)
    few = divide(groups, test_share=0.2, training_share=0.5, samples=30, seed=0)
    assert torch.equal(few.test, parts.test)
    assert groups[few.seen].bincount(minlength=3).tolist() == [24, 4, 2]  # of 80, 16 and 2


@pytest.mark.parametrize(
    ("counts", "samples", "train", "validation"),
    [([95, 5], 10, [4, 1], [4, 1]), ([10, 10, 10], 8, None, None), ([10, 10], 4, [1, 1], [1, 1])],
)
def test_as_many_samples_as_asked_for_and_two_of_each_class(counts, samples, train, validation):
    groups = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    rows = divide(groups, test_share=0.2, training_share=0.5, samples=samples, seed=0)
    assert len(rows.seen) == samples
    for part, expected in ((rows.train, train), (rows.validation, validation)):
        found = groups[part].bincount(minlength=len(counts)).tolist()
        assert min(found) >= 1
        assert expected in (None, found)


def test_parts_that_cannot_be_drawn():
    groups = torch.tensor([0] * 10 + [1] * 2)
    options = {"test_share": 0.2, "training_share": 0.5, "samples": None, "seed": 0}
    with pytest.raises(DataError, match=r"too few rows for training, validation and test.*b \(2\)"):
        divide(groups, **options, names=("a", "b"))
    with pytest.raises(DataError, match=r"rows for training and validation, .* or leave out these"):
        divide(torch.tensor([0, 1, 1]), **{**options, "test_share": 0}, names=("a", "b"))
    with pytest.raises(DataError, match=r"the data have too few rows .* needs one: 2; add rows$"):
        divide(torch.zeros(2, dtype=torch.long), **options)
    with pytest.raises(
        ConfigurationError, match="100 samples were requested, but there are only 8"
    ):
        divide(groups[:10], **{**options, "samples": 100})
    with pytest.raises(ConfigurationError, match=r"samples must be at least 2, .* got 1"):
        divide(groups[:10], **{**options, "samples": 1})
