"""The published layouts as builders of TensorFlow Datasets, without TensorFlow.

    import tensorflow_datasets as tfds
    import medmerge_jax.data

    builder = tfds.builder("aptos2019", data_dir="tfds")
    config = tfds.download.DownloadConfig(manual_dir="aptos2019")  # as downloaded
    builder.download_and_prepare(download_config=config)
    train = builder.as_data_source(split="train")  # "validation", "test"

Labels and splits are those of `official_data_set`, splits by group.
"""

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core import registered

from medmerge_jax.data.dataset import Split
from medmerge_jax.data.official.published import LAYOUTS, official_data_set
from medmerge_jax.data.official.records import Layout
from medmerge_jax.errors import UserError
from medmerge_jax.images.decode import full_image, is_upright

_SPLITS = {"train": "train", "val": "validation", "test": "test"}
"""Our names of the splits, and those of TFDS."""

_TFDS_HAS = ("chexpert", "cifar10", "cifar100")
"""Builders of TFDS that need TensorFlow; `tfds.builder` gives ours in their place."""


_MODES = {1: "L", 3: "RGB"}
"""Pillow's modes by the number of channels."""


class OfficialBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """What the builders of all layouts have in common.

    An example is {"id": text, "image": (h, w, channels), "label": class index, or float32
    (classes,) of 0, 1 and NaN (unknown) with several labels per image, "group": text, empty if
    unknown}. Image files that hold what the example does are stored as they are, others as PNG.
    """

    VERSION = tfds.core.Version("1.0.0")
    # Without this TFDS looks for this file with a package that it does not always install.
    code_path = tfds.core.Path(__file__)
    LAYOUT: Layout

    def __init__(self, *, file_format: Any = "array_record", **options: Any):
        super().__init__(file_format=file_format, **options)

    @property
    def _variant(self) -> str:
        return "" if self.builder_config is None else self.builder_config.name

    def _info(self) -> tfds.core.DatasetInfo:
        layout = self.LAYOUT
        features = {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(shape=(None, None, layout.channels)),
            # `_split_generators` sets the names of the classes, which it reads from the data.
            "label": tfds.features.Tensor(shape=(None,), dtype=np.float32)
            if layout.multilabel(self._variant)
            else tfds.features.ClassLabel(),
            "group": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=layout.description,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            homepage=layout.homepage,
            citation=layout.citation,
            license=layout.licence,
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        layout = self.LAYOUT
        folder = _manual_folder(dl_manager, layout)
        dataset = official_data_set(layout.name, folder, variant=self._variant)
        dataset.check()
        if not dataset.multilabel:
            self.info.features["label"].names = list(dataset.classes)
        self.info.metadata["classes"] = list(dataset.classes)
        return {
            _SPLITS[name]: self._generate_examples(split) for name, split in dataset.splits.items()
        }

    def _generate_examples(self, split: Split) -> Iterator[tuple[str, dict[str, Any]]]:
        for row, example in enumerate(split.ids):
            if split.pixels is None:
                image = _image_file(split.paths[row], self.LAYOUT.channels)
            else:
                image = _png(Image.fromarray(split.pixels[row]), self.LAYOUT.channels)
            yield (
                example,
                {
                    "id": example,
                    "image": image,
                    "label": split.labels[row],
                    "group": "" if split.groups is None else split.groups[row],
                },
            )


def _manual_folder(dl_manager: Any, layout: Layout) -> str:
    """The folder as downloaded, which TFDS only asserts to be there."""
    try:
        return os.fspath(dl_manager.manual_dir)
    except AssertionError as error:
        raise UserError(
            f"{layout.name} is read from the folder as downloaded, and there is none: give it, "
            "builder.download_and_prepare(download_config=tfds.download.DownloadConfig("
            f"manual_dir=FOLDER)). What is wanted:\n{layout.instructions.rstrip()}"
        ) from error


def _image_file(path: Path, channels: int) -> Path | io.BytesIO:
    """The file itself where TFDS decodes it as this program does; otherwise a PNG of the image.

    It is decoded in either case, or a damaged file would show when somebody reads what was built.
    """
    decoded = full_image(path)
    with (
        contextlib.suppress(OSError, SyntaxError, ValueError),
        Image.open(path, formats=("JPEG", "PNG")) as image,
    ):
        plain = image.format in ("JPEG", "PNG") and image.mode == _MODES[channels]
        if plain and not image.has_transparency_data and is_upright(image):
            return path
    return _png(decoded, channels)


def _png(image: Image.Image, channels: int) -> io.BytesIO:
    file = io.BytesIO()
    image.convert(_MODES[channels]).save(file, "PNG")
    file.seek(0)
    return file


def _builder(layout: Layout) -> type[OfficialBuilder]:
    """The builder of a layout; a layout with variants has a config for each."""
    variants = [variant for variant in layout.variants if variant]
    body = {
        "__doc__": f"{layout.description}\n\n{layout.instructions}",
        "__module__": __name__,
        "name": layout.name,
        "LAYOUT": layout,
        "MANUAL_DOWNLOAD_INSTRUCTIONS": layout.instructions,
        "BUILDER_CONFIGS": [tfds.core.BuilderConfig(name=variant) for variant in variants],
    }
    title = "".join(word.capitalize() for word in layout.name.split("_"))
    skip = layout.name in _TFDS_HAS
    with registered.skip_registration() if skip else contextlib.nullcontext():
        return type(title, (OfficialBuilder,), body)


class _Provider:
    """Finds the builders whose names TFDS has too; TFDS asks it first."""

    def has_dataset(self, name: str) -> bool:
        return name in _TFDS_HAS

    def get_builder_cls(self, name: str) -> type[OfficialBuilder]:
        return BUILDERS[name]


BUILDERS = {name: _builder(layout) for name, layout in LAYOUTS.items()}
"""All builders, by name."""

registered.add_dataset_builder_provider(_Provider(), 0)
