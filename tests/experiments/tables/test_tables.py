"""Tables as people have them: read, understood or refused, with the line and the remedy."""

import math

import pytest
import torch

from equigrad.errors import ConfigurationError, DataError
from equigrad.experiments.tables import tables
from equigrad.experiments.tables.encoding import fit, read_target
from equigrad.experiments.tables.tables import read
from equigrad.training.scale import mean_and_scale
from equigrad.training.split import divide
from equigrad.training.targets import Classes, Numbers


def written(tmp_path, text, encoding="utf-8"):
    path = tmp_path / "table.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return path


def test_dialects_are_recognised(tmp_path):
    expected = {"a": ["1.5", "2"], "b c": ["x", "y, z"]}
    for text in (
        'a,b c\n1.5,x\n2,"y, z"\n',
        "a;b c\r\n1.5;x\r\n2;y, z\r\n",
        "a\tb c\n1.5\tx\n\n2\ty, z",
        "\n a | b c \n 1.5 | x\n2|y, z\n",
        '\ufeff"a","b c"\n"1.5","x"\n"2","y, z"\n',
    ):
        assert read(written(tmp_path, text)).columns == expected, text


def test_lines_are_those_of_the_file(tmp_path):
    text = 'a,b\n1,2\n\n"in two\nlines",3\n4,5\n'
    assert read(written(tmp_path, text)).lines == [2, 5, 6]
    assert read(written(tmp_path, text.replace("\n", "\r"))).lines == [2, 5, 6]


def test_a_header_may_have_delimiters_and_line_ends_in_quotes(tmp_path):
    text = '\n"multi\nline";"a; with, comma";y\n1;2;3\n'
    for path in (written(tmp_path, text), written(tmp_path, text.replace("\n", "\r\n"))):
        table = read(path)
        assert list(table.columns) == ["multi line", "a; with, comma", "y"]
        assert table.lines == [4]
    with pytest.raises(DataError, match=r"row that begins in line 1 cannot be read.*not closed"):
        read(written(tmp_path, '"a,b\n1,2\n'))


def test_decimal_commas_are_read_where_they_are_asked_for(tmp_path):
    path = written(tmp_path, "a;b\n1.234,5;x\n-0,5;y\n")
    assert read(path, decimal=",").numbers("a") == [1234.5, -0.5]
    table = read(path)
    with pytest.raises(DataError, match="say --decimal ,"):
        fit(table, target="b", missing="error")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1.234", 1234.0),
        ("-12.345.678,5", -12345678.5),
        ("-0,73", -0.73),
        ("31.12.2020", None),
        ("192.168.0.1", None),
        ("-0.73", None),
        ("0.730", None),  # no thousands begin with a zero
        ("1,5.000", None),
    ],
)
def test_points_under_decimal_commas_group_thousands_or_are_no_numbers(text, number):
    assert tables.as_number(text, ",") == number


def test_decimal_points_are_not_taken_for_text_under_decimal_commas(tmp_path):
    table = read(written(tmp_path, "a;y\n0.73;1\n-1.25;0\n"), decimal=",")
    with pytest.raises(DataError, match=r"'0.73' \(line 2\).*say --decimal \.;"):
        fit(table, target="y", missing="error")


def test_spaces_may_stand_before_quotes(tmp_path):
    assert read(written(tmp_path, 'a, "b, c"\n1, "x, y"\n')).columns["b, c"] == ["x, y"]
    tabs = read(written(tmp_path, "a\tb\n\t2\n"))  # an empty field is one
    assert tabs.columns == {"a": [""], "b": ["2"]}


def test_other_encodings_are_read_where_they_are_named(tmp_path):
    path = written(tmp_path, "straße,b\ncafé,1\n", "latin-1")
    with pytest.raises(DataError, match=r"line 1 is not utf-8.*--encoding latin-1"):
        read(path)
    assert read(path, encoding="latin-1").columns["straße"] == ["café"]
    lines = "".join(f"{i},ä\r\n" for i in range(9999))  # more than a block of the decoder
    with pytest.raises(DataError, match="line 10001 is not utf-8"):
        read(written(tmp_path, b"a,b\r\n" + lines.encode() + b"1,\xff\r\n2,3\r\n"))


def test_a_mark_of_utf_8_is_none_of_the_first_name_in_any_encoding(tmp_path):
    assert list(read(written(tmp_path, "\ufeffa,b\n1,2\n"), encoding="latin-1").columns) == [
        "a",
        "b",
    ]


def test_an_archive_is_no_wide_text(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"PK\x03\x04" + bytes(20))
    with pytest.raises(DataError, match="spreadsheet or a zip archive"):
        read(tmp_path / "t.csv", encoding="utf-16")
    with pytest.raises(DataError, match="unknown to Python"):
        read(tmp_path / "t.csv", encoding="\0")


def test_any_number_of_blank_lines_may_stand_before_the_header(tmp_path):
    table = read(written(tmp_path, "\n" * 150 + "a;b\n1;2\n"))
    assert (list(table.columns), table.lines) == (["a", "b"], [152])


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "UTF16"])
def test_wide_encodings_are_read_where_they_are_named(tmp_path, encoding):
    table = read(written(tmp_path, "straße\tb\r\n名前\t1\r\n", encoding), encoding=encoding)
    assert table.columns == {"straße": ["名前"], "b": ["1"]}
    with pytest.raises(DataError, match=r"line 1 is not utf-16 \(.*BOM\)"):
        read(written(tmp_path, "a,b\n1,2\n"), encoding="utf-16")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("a,b\n", "has a header \\('a', 'b'\\) and no rows"),
        ("a,b,a\n1,2,3\n", "several columns of the name 'a'"),
        ("a,b\n1,2\n1\n1,2,3\n", "header has 2 columns, other lines do not: line 3 .1., line 4"),
        ('a,b\n1,2\n"1,2\n3,4\n', "row that begins in line 3 cannot be read.*quote not closed"),
        (b"PK\x03\x04rest", "spreadsheet"),
        (b"\x1f\x8brest", "gzip"),
        ("a,b\n".encode("utf-16"), "UTF-16: say --encoding utf-16"),
        (b"a,b\n1,\x002\n", "zero bytes"),
        (b"a,b\n1,\xff\n", "line 2 is not utf-8"),
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
    for unknown in ("klingon", "hex"):
        with pytest.raises(DataError, match=f"encoding {unknown!r} is unknown"):
            read(written(tmp_path, "a,b\n1,2\n"), encoding=unknown)


def test_a_line_of_a_gigabyte_is_refused_without_reading_it(tmp_path):
    path = tmp_path / "long.csv"
    with path.open("wb") as file:
        file.write(b"a,b\n1,")
        file.seek(2**30)  # a hole: it takes no disk
        file.write(b"\n")
    with pytest.raises(DataError, match="zero bytes"):
        read(path)
    path.write_bytes(b"a,b\n1," + b"7" * (2 * tables.LONGEST_LINE) + b"\n")
    with pytest.raises(DataError, match="line 2 is longer than 1,048,576 characters"):
        read(path)


def fitted(text, tmp_path, **options):
    table = read(written(tmp_path, text))
    return fit(table, target="y", **{"missing": "error", **options}), table


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


def test_missing_values_are_named_or_imputed(tmp_path):
    text = "n,m,c,y\n1,1,a,0\n,2,b,0\n2,3,NA,0\n9,4,b,1\n"
    with pytest.raises(DataError, match=r"'n' .1, the first in line 3., 'c' .1, .*line 4"):
        fitted(text, tmp_path)[0][0].encode(read(written(tmp_path, text)))
    (encoding, _), table = fitted(text, tmp_path, missing="impute")
    assert encoding.inputs == ["n", "n is missing", "m", "c is missing", "c=a", "c=b"]
    x, _ = encoding.encode(table)
    mean, root = 14 / 4, math.sqrt(((1 - 3.5) ** 2 + 2 * (2 - 3.5) ** 2 + (9 - 3.5) ** 2) / 4)
    torch.testing.assert_close(x[1, :2], torch.tensor([(2 - mean) / root, 1]).double())
    assert x[:, 1].tolist() == [0, 1, 0, 0]
    assert x[:, 3].tolist() == [0, 0, 1, 0]
    # missing where nothing was when it was fitted: the median, or no category
    x, said = encoding.encode(read(written(tmp_path, "n,m,c\n1,?,a\n")))
    assert x[0, 2].item() == 0.0  # the median of 1 2 3 4 is their mean
    assert said == ["column 'm': 1 row without a value, taken as the median 2.5"]


def test_constant_columns_are_told_by_their_values_and_not_by_rounding(tmp_path):
    column = torch.tensor([0.1] * 12, dtype=torch.float64)
    assert 0 < column.std(correction=0) < 1e-16
    mean, scale = mean_and_scale(torch.stack([column, column.cumsum(0)], dim=1), "numbers")
    assert (mean[0].item(), scale[0].item()) == (0.1, 1.0)
    assert scale[1].item() == pytest.approx(0.1 * math.sqrt(143 / 12))  # of 0.1 … 1.2
    # one value and gaps; one value, written in several ways
    rows = "".join(f"{'0.1' if i else ''},{'5' if i else '5.0'},{i},0\n" for i in range(12))
    (encoding, notes), table = fitted("a,b,c,y\n" + rows, tmp_path, missing="impute")
    assert encoding.inputs == ["a", "a is missing", "c"]
    assert notes == ["left out, having one value only: 'b'"]
    assert encoding.encode(table)[0][:, 0].tolist() == [0.0] * 12


def test_numbers_too_large_for_a_deviation_are_named(tmp_path):
    with pytest.raises(DataError, match=r"column 'a': too large to standardise, up to 1e\+300"):
        fitted("a,y\n1e300,0\n-1e300,1\n", tmp_path)


def test_a_number_is_one_category_however_it_is_written(tmp_path):
    text = "c,y\n1,0\n1.0,1\n2.50,0.0\n2.5,1.0\n"
    (encoding, _), table = fitted(text, tmp_path, categorical=("c",))
    assert encoding.inputs == ["c=1", "c=2.5"]
    assert encoding.encode(table)[0].tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]
    target, y, _ = read_target(table, "y", "classification")
    assert target == Classes(("0", "1"))
    assert y.tolist() == [0, 1, 0, 1]
    assert target.read(["1.00", "0", "x"], [1.0, 0.0, None]) == [1, 0, None]
    # where some are text, 1.0 may be a name of its own
    mixed = read(written(tmp_path, "y\n1\n1.0\n1.0-beta\n"))
    assert read_target(mixed, "y", "classification")[0] == Classes(("1", "1.0", "1.0-beta"))


@pytest.mark.parametrize(
    ("cell", "rows", "options", "message"),
    [
        (
            "{i}",
            60,
            {"junk": "abc"},
            r"'n' should hold numbers, and 2 of its 62 .*'abc' \(line 62\)",
        ),
        ("{i}", 60, {"junk": "1,5"}, "say --decimal ,"),
        ("{i}", 60, {"junk": "inf"}, "'inf'"),
        ("id-{i}", 60, {}, "60 different texts in 60 of the 60 .*--ignore n, or .*--categorical n"),
        ("{i}.5%", 30, {}, "30 different texts in 30 of the 30 rows that are .* with a unit"),
        ("19{i}-01-02", 60, {}, "look like dates"),
        ("{d:02}.01.19{i}", 60, {}, "look like dates"),
        ("7", 30, {}, "no column to learn from"),
    ],
)
def test_columns_that_cannot_be_learned_from(tmp_path, cell, rows, options, message):
    lines = [cell.format(i=10 + i, d=1 + i % 28) for i in range(rows)]
    lines += [options["junk"]] * 2 if "junk" in options else []
    rows_ = "".join(f'"{value}",{i % 2}\n' for i, value in enumerate(lines))
    with pytest.raises(DataError, match=message):
        fitted("n,y\n" + rows_, tmp_path)


def test_as_many_categories_as_half_of_the_rows_are_taken(tmp_path):
    def of(texts):
        return fitted("n,y\n" + "".join(f"{t},{i % 2}\n" for i, t in enumerate(texts)), tmp_path)

    assert len(of("abcdeabcde")[0][0].inputs) == 5
    with pytest.raises(DataError, match="6 different texts in 10 of the 10 rows"):
        of("abcdefabcd")
    assert len(of("abcdefghi")[0][0].inputs) == 9  # too few to tell
    gaps = [f"remark {i}" if i < 10 else "" for i in range(90)]
    with pytest.raises(DataError, match="10 different texts in 10 of the 90 rows"):
        of(gaps)


@pytest.mark.parametrize(
    ("values", "grouped", "decimal"),
    [
        (["71,970", "8,237"], True, True),
        (["71,970", "8,237,100"], True, False),
        (["71,970", "950.5", "-8,237.25"], True, False),
        (["71,970", "8,23"], False, True),
        (["0,970", "8,237"], False, True),
    ],
)
def test_thousands_are_told_from_decimal_commas(tmp_path, values, grouped, decimal):
    table = read(written(tmp_path, "a;y\n" + "".join(f"{v};{i}\n" for i, v in enumerate(values))))
    for raises in (
        lambda: fit(table, target="y", missing="error"),
        lambda: read_target(table, "a", "regression"),
    ):
        with pytest.raises(DataError, match=r"'71,970'|'0,970'") as error:
            raises()
        assert ("grouped thousands, to be written without ','" in str(error.value)) == grouped
        assert ("say --decimal ," in str(error.value)) == decimal


def test_columns_are_what_they_are_said_to_be(tmp_path):
    lines = "".join(f"id-{i},{i % 3},{i},5,{i % 2}\n" for i in range(60))
    (encoding, notes), _ = fitted("id,code,n,k,y\n" + lines, tmp_path, categorical=("id", "code"))
    assert len(encoding.inputs) == 60 + 3 + 1
    assert "column 'n' holds whole numbers that are all different" in notes[0]
    assert notes[1] == "left out, having one value only: 'k'"


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
    target, read_values, how = read_target(table, "y", task)
    assert target == expected
    assert len(read_values) == len(values)
    assert how.startswith("classification" if isinstance(expected, Classes) else "regression")
    assert ("else --task" in how) == (task == "auto" and values[0] not in ("b", "True"))


@pytest.mark.parametrize(
    ("values", "task", "message"),
    [
        (["a"] * 9, "auto", "one class only, 'a'"),
        (["3.5"] * 9, "auto", "is 3.5 in every row"),
        ([*map(str, range(60)), "x"], "auto", r"1 of its 61 values are none: 'x' \(line 62\)"),
        (
            [*map(str, range(60)), "x"],
            "regression",
            r"1 of its 61 values are none: 'x' \(line 62\)",
        ),
        ([f"n{i}" for i in range(60)], "auto", "60 different values in 60 rows.* no classes"),
    ],
)
def test_targets_that_cannot_be_learned(tmp_path, values, task, message):
    table = read(written(tmp_path, "y\n" + "".join(f"{v}\n" for v in values)))
    with pytest.raises(DataError, match=message):
        read_target(table, "y", task)


def test_targets_of_pairs_are_classes_where_that_is_said(tmp_path):
    table = read(written(tmp_path, 'y\n"2,1"\n"3,2"\n"2,1"\n'))
    assert read_target(table, "y", "classification")[0] == Classes(("2,1", "3,2"))
    with pytest.raises(DataError, match=r"--decimal ,; else mend them, or say --task class") as e:
        read_target(table, "y", "auto")
    assert "--ignore" not in str(e.value)


def test_constant_targets_have_no_r2():
    """The deviation of 0.1 three times is not quite zero; the error is a tenth."""
    y = torch.tensor([0.1] * 3, dtype=torch.float64)
    found = Numbers().metrics(y[:, None] + 0.1, y)
    assert math.isnan(found["r2"])
    assert found["rmse"] == pytest.approx(0.1)


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
    with pytest.raises(DataError, match=r"rows for training and validation, .* or leave these out"):
        divide(torch.tensor([0, 1, 1]), **{**options, "test_share": 0}, names=("a", "b"))
    with pytest.raises(DataError, match=r"the data have too few rows .* one each: 2; add rows$"):
        divide(torch.zeros(2, dtype=torch.long), **options)
    with pytest.raises(ConfigurationError, match="100 samples were asked for, and there are 8"):
        divide(groups[:10], **{**options, "samples": 100})
    with pytest.raises(ConfigurationError, match=r"samples must be at least 2, .* got 1"):
        divide(groups[:10], **{**options, "samples": 1})
