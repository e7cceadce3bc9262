"""What every published layout is read into, and what is known about it."""

import dataclasses
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from medmerge_jax.data.dataset import Split

ABOUT: dict[str, dict[str, Any]] = tomllib.loads(
    Path(__file__).with_name("about.toml").read_text("utf-8")
)
"""Description, citation, licence, homepage and instructions of the layouts, by name."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Records(Split):
    """A data set as its authors published it: all images, whatever their split.

    Attributes:
      classes: Names in the published order.
      splits: "train", "val" or "test" of each image as published; None where there is none.
      strata: Labels by which splits that are made are stratified; None: `labels`.
      notes: What was inferred, a sentence each.
    """

    classes: tuple[str, ...]
    splits: tuple[str, ...] | None = None
    strata: np.ndarray | None = None
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Layout:
    """A published layout.

    Attributes:
      name: In configs and in TFDS.
      read: Called with the folder, which holds what `instructions` say, and a variant, of which ""
        means the first; and with `uncertain` and `blank`, if it has them. Anything else is a
        UserError that names file and line.
      description: What the data set is.
      citation: BibTeX.
      licence: As stated by the publisher.
      homepage: Address.
      instructions: What to download, and how the folder then looks.
      variants: That `read` knows; the first is the default.
      channels: Of the images in TFDS: 1 where all are greyscale.
      multilabel: Whether an image has any number of classes, by variant.
      has_uncertain: Whether labels may be uncertain or blank.
      titles: See `DataSet`.
    """

    name: str
    read: Callable[..., Records]
    description: str
    citation: str
    licence: str
    homepage: str
    instructions: str
    variants: tuple[str, ...] = ("",)
    channels: int = 3
    multilabel: Callable[[str], bool] = lambda variant: False
    has_uncertain: bool = False
    titles: Mapping[str, str] = dataclasses.field(default_factory=dict)


def described(name: str, read: Callable[..., Records], **facts: Any) -> Layout:
    """The layout `name`, of which `ABOUT` says what it is; `facts` are the other fields."""
    return Layout(name=name, read=read, **ABOUT[name], **facts)
