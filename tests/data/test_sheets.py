import pytest

from medmerge_jax.data.sheets import read_any_sheet, read_table
from medmerge_jax.errors import UserError


def write(tmp_path, content):
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    return path


def test_rows_know_their_lines(tmp_path):
    path = write(tmp_path, b'\xef\xbb\xbfid,x\r\na, 1.0 \r\n\r\n"b\nc",0\r\n')
    rows = read_table(path, ["id", "x"])
    assert rows == [{"id": "a", "x": "1.0"}, {"id": "b\nc", "x": "0"}]
    assert [row.line for row in rows] == [2, 5]
    assert [row.number("x", (0, 1)) for row in rows] == [1, 0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"id,y\na,1\n", "'x' is wanted"),
        (b"id,x,x\na,1,1\n", "'x' is wanted, once"),
        (b"id;x\na;1\n", "semicolons"),
        (b"id,x\na,1,2\n", "line 2: has 3 fields"),
        (b"id,x\n", "no rows"),
        ("id,x\nä,1\n".encode("utf-16"), "UTF-8"),
    ],
)
def test_malformed(tmp_path, content, message):
    with pytest.raises(UserError, match=message) as caught:
        read_table(write(tmp_path, content), ["id", "x"])
    assert "a.csv" in str(caught.value)


@pytest.mark.parametrize("value", ["", "yes", "2", "nan", "inf", "1e999"])
def test_numbers_are_those_allowed(tmp_path, value):
    path = write(tmp_path, f"id,x\na,{value}\n".encode())
    (row,) = read_table(path, ["id", "x"])
    with pytest.raises(UserError, match=r"a\.csv, line 2: column 'x' holds .*one of 0, 1"):
        row.number("x", (0, 1))


def test_a_delimiter_that_the_file_names_is_the_one(tmp_path):
    """Also where commas alone would give all rows as many cells."""
    sheet = read_any_sheet(write(tmp_path, b"sep=;\r\nid;x, y\r\na;1, 2\r\n"))
    assert (sheet.header, sheet.rows) == (["id", "x, y"], [{"id": "a", "x, y": "1, 2"}])
    assert sheet.rows[0].line == 3


def test_a_folder_is_no_image(tmp_path):
    (row,) = read_table(write(tmp_path, b"id\na\n"), ["id"])
    (tmp_path / "a.png").mkdir()
    with pytest.raises(UserError, match=r"there is no image .*a\.png"):
        row.image_file(tmp_path / "a.png")
    (tmp_path / "a.jpg").write_bytes(b"x")
    assert row.image_file(tmp_path / "a.png", tmp_path / "a.jpg") == tmp_path / "a.jpg"
