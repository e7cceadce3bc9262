"""What `mm.run` returns shows itself."""

import html.parser
import json
import pickle

import pytest

from medmerge_jax.analysis.results import Results

HOSTILE = '<script>alert("1")</script>'
RUN = {"recipe": "ft", "start": HOSTILE, "architecture": "resnet20", "seed": 0,
       "test": {"accuracy": 0.75, "macro_f1": 0.5, "num_examples": 8},
       "data": {"name": HOSTILE}}  # fmt: skip


class Seen(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.cells = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        assert not attributes
        self.tags.append(tag)

    def handle_data(self, data):
        self.cells.append(data)


@pytest.fixture
def results(tmp_path):
    return Results(RUN, tmp_path / "run")


def test_it_is_the_content_of_results_json(results, tmp_path):
    assert results == RUN and results.results == RUN
    assert type(results.results) is dict
    assert json.loads(json.dumps(results)) == RUN
    assert results.workdir == tmp_path / "run"
    again = pickle.loads(pickle.dumps(results))
    assert (again, again.workdir) == (results, results.workdir)


def test_a_notebook_shows_a_sentence_and_a_table_in_which_names_are_text(results):
    seen = Seen(results._repr_html_())
    assert set(seen.tags) == {"p", "table", "caption", "tr", "th", "td"}
    assert "0.7500" in seen.cells and "macro F1" in seen.cells
    assert any(HOSTILE in one and "macro F1 0.500" in one for one in seen.cells)
    assert seen.cells[-1] == f"report: {results.workdir / 'report.html'}"


def test_a_terminal_shows_the_table_and_where_the_report_is(results):
    lines = str(results).splitlines()
    assert repr(results) == str(results)
    assert any(line.split() == ["accuracy", "0.7500"] for line in lines)
    assert lines[-1] == f"report: {results.workdir / 'report.html'}"


def test_without_results_it_is_empty_and_says_so(tmp_path):
    nothing = Results({}, tmp_path)
    assert not nothing
    assert "no results yet" in str(nothing) and "no results yet" in nothing._repr_html_()
