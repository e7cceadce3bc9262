"""JSON that this program can write again, and no other."""

import pytest

from medmerge_jax.errors import UserError
from medmerge_jax.storage.atomic import read_json, write_json


def test_what_is_written_is_read(tmp_path):
    value = {"a": [1, 2.5, -1e300, None, True, "ü😀"], "b": {"c": {}}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value


@pytest.mark.parametrize(
    "text",
    [
        "NaN", "[Infinity]", '{"a": -Infinity}', "1e400", "[-1e999]", "[" * 100_000,
        '{"a":' * 100_000,
        "[" * 60 + "]" * 60, '"\\ud800"', '{"\\udc00": 1}', "9" * 5000, "", "{", "\x00",
    ],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_what_could_not_be_written_is_refused(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        read_json(path)
    assert len(str(caught.value)) < 300


def test_errors_quote_no_more_than_can_be_read():
    error = UserError("first\n" + "x" * 100_000 + "\nlast")
    lines = str(error).split("\n")
    assert [len(line) for line in lines] == [5, 1005, 4]
