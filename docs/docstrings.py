"""How docstrings become pages: an extension of griffe, which reads them for mkdocstrings."""

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Shows examples as code, and a link in place of the list that `mm.merge` makes at run time."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Changes the docstring of one function or class."""
        if obj.docstring:
            text = re.sub(
                r"^(>>> .*(?:\n.+)*)", r"```pycon\n\1\n```", obj.docstring.value, flags=re.M
            )
            text = text.replace("{mergers}", "They are on the page *The mergers compared*.")
            obj.docstring.value = text
