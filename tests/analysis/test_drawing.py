"""Figures as papers want them: sizes, colours, formats, and nothing of the machine in them."""

import getpass
import hashlib
import itertools
import os
import re
import subprocess
import sys
import zlib
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from helpers.drawn_predictions import drawn as drawn_predictions
from matplotlib.text import Text

from medmerge_jax.analysis import (
    coefficient_heatmap,
    comparison_figure,
    confusion_matrix_figure,
    curves,
    drawing,
    figures,
    learning_curves,
    reliability_diagram,
    threshold_curves,
)

DRAW = """
import sys
from pathlib import Path
from medmerge_jax.analysis import confusion_matrix_figure
import numpy as np
confusion_matrix_figure(np.array([[3, 1], [0, 2]]), ["no", "yes"], Path(sys.argv[1]))
"""


ALL = drawing.FORMATS


@pytest.fixture(autouse=True)
def all_formats(monkeypatch):
    monkeypatch.setattr(drawing, "FORMATS", ALL)


def draw(path):
    confusion_matrix_figure(np.array([[3, 1], [0, 2]]), ["no", "yes"], path)
    return digests(path)


def digests(path):
    files = [path.with_suffix(f".{name}") for name in ALL]
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


@pytest.mark.slow
def test_the_same_figure_is_the_same_files_in_any_process(tmp_path):
    expected = draw(tmp_path / "a.png")
    other = tmp_path / "elsewhere" / "c.png"
    environment = {**os.environ, "PYTHONHASHSEED": "77", "USER": "someone", "TZ": "Asia/Tokyo"}
    subprocess.run([sys.executable, "-c", DRAW, str(other)], env=environment, check=True)
    assert digests(other) == expected


def test_the_style_of_the_user_is_neither_used_nor_changed(tmp_path):
    expected = draw(tmp_path / "a.png")
    with matplotlib.rc_context({"font.size": 20, "axes.grid": True, "figure.facecolor": "red"}):
        assert draw(tmp_path / "b.png") == expected
        assert matplotlib.rcParams["font.size"] == 20


def test_files_say_neither_who_nor_when_nor_where(tmp_path):
    draw(tmp_path / "a.png")
    pdf = (tmp_path / "a.pdf").read_bytes()
    streams = re.findall(rb"stream\r?\n(.*?)\r?\nendstream", pdf, re.DOTALL)
    plain = [zlib.decompressobj().decompress(one) for one in streams if one[:1] == b"x"]
    content = b"".join([pdf, *plain, *((tmp_path / f"a.{x}").read_bytes() for x in ("png", "svg"))])
    for text in (str(tmp_path), "Date", "atplotlib v", f"/{getpass.getuser()}/"):
        assert text.encode() not in content, text
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert pdf[:5] == b"%PDF-"
    assert b"/Type3" not in pdf  # which journals refuse
    root = ElementTree.parse(tmp_path / "a.svg").getroot()
    assert float(root.attrib["width"].removesuffix("pt")) <= 72 * drawing.PAGE


def every_figure(folder):
    """One of each kind, as few as they can be."""
    weights = {"conv1/kernel": np.array([0.4]), "layer1/0/conv1/kernel": np.array([0.6])}
    coefficient_heatmap({"isic": weights}, folder / "coefficients.png")
    records = [
        {"stage": stage, "epoch": 1, "learning_rate": 1e-4, "train_loss": 1.0, "val_accuracy": 0.5}
        for stage in ("lp", "ft")
    ]
    learning_curves(records, folder / "curves.png")
    value = {"mean": 0.5, "std": 0.1, "values": [0.4, 0.6]}
    rows = [{"recipe": name, "start": "b", "macro_f1": value} for name in ("ft", "lp")]
    comparison_figure(rows, "macro_f1", folder / "comparison.png", "lp from b")
    confusion_matrix_figure(np.eye(3, dtype=int), ["a", "b", "c"], folder / "matrix.png")
    threshold_curves(drawn_predictions(3), folder / "thresholds.png")
    reliability_diagram(drawn_predictions(3), 1.5, folder / "reliability.png")


def test_all_text_is_of_8_points_and_no_figure_wider_than_a_page(tmp_path, monkeypatch):
    written = []
    for module in (figures, curves):
        monkeypatch.setattr(module, "save_figure", lambda figure, *_: written.append(figure))
    every_figure(tmp_path)
    assert len(written) == 6
    for figure in written:
        figure.draw_without_rendering()
        texts = [text for text in figure.findobj(Text) if text.get_text().strip()]
        assert len(texts) > 4
        assert {text.get_fontsize() for text in texts} == {drawing.FONT}, texts
        assert figure.get_figwidth() <= drawing.PAGE


@pytest.mark.parametrize("kind", ["deuteranopia", "protanopia"])
def test_neighbouring_colours_are_told_apart_by_colour_blind_readers(kind):
    # Viénot, Brettel & Mollon (1999), on linear RGB.
    mixes = {
        "deuteranopia": [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
        "protanopia": [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
    }
    codes = [[int(code[i : i + 2], 16) / 255 for i in (1, 3, 5)] for code in drawing.COLOURS]
    seen = np.clip(np.power(codes, 2.2) @ np.transpose(mixes[kind]), 0, 1) ** (1 / 2.2)
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 0.14


def test_lines_of_one_colour_have_other_dashes():
    looks = {(drawing.colour(number), drawing.dashes(number)) for number in range(15)}
    assert len(looks) == 15
