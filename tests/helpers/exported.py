"""Exported models, loaded as their model cards say."""

import re

import numpy as np
import pytest


def code_for(folder, title):
    """What README.md says for a library."""
    text = (folder / "README.md").read_text()
    return re.search(rf"^{title}:\n\n```python\n(.*?)```", text, re.DOTALL | re.MULTILINE)[1]


def assert_has_our_logits(code, folder, images, model, monkeypatch):
    """Runs the README's lines in the folder."""
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(folder)
    names = {}
    exec(code.replace("the folder of this file", str(folder)), names)
    pixels, wanted = images
    look = model.preprocessing
    normalised = (pixels / np.float32(255) - np.float32(look.mean)) / np.float32(look.std)
    with torch.no_grad():
        found = names["model"](torch.from_numpy(normalised.transpose(0, 3, 1, 2).copy()))
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-5 * max(1, np.abs(wanted).max()))
