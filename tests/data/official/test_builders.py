"""Every layout through TFDS, and by `official_data_set`: every label, split and pixel."""

import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from helpers import small_layouts
from helpers.programs import with_helpers

from medmerge_jax.data import BUILDERS, official_data_set
from medmerge_jax.data.official import LAYOUTS
from medmerge_jax.errors import UserError

TFDS_SPLITS = {"train": "train", "val": "validation", "test": "test"}


def prepare(name, root, data_dir):
    builder = tfds.builder(name, data_dir=data_dir)
    config = tfds.download.DownloadConfig(manual_dir=root)
    builder.download_and_prepare(download_config=config)
    return builder


@pytest.mark.parametrize("case", small_layouts.CASES)
def test_labels_splits_and_pixels(case, tmp_path):
    expected = small_layouts.CASES[case](tmp_path / "manual")
    name = case.split(" ")[0]
    builder = prepare(name, tmp_path / "manual", tmp_path / "tfds")
    dataset = official_data_set(
        name.split("/")[0], tmp_path / "manual", variant=name.partition("/")[2]
    )
    # Read as a stranger would, without this package's builder.
    again = tfds.builder_from_directory(builder.data_path)
    assert again.info.file_format.value == "array_record"
    assert list(again.info.metadata["classes"]) == list(dataset.classes)
    if not dataset.multilabel:
        assert again.info.features["label"].names == list(dataset.classes)
    read = {}
    for split, tfds_split in TFDS_SPLITS.items():
        examples = list(again.as_data_source(split=tfds_split))
        assert len(examples) == again.info.splits[tfds_split].num_examples > 0
        assert {one["id"].decode() for one in examples} == set(dataset.splits[split].ids)
        for one in examples:
            read[one["id"].decode()] = (split, one)
    assert sum(map(len, dataset.splits.values())) == len(read)
    assert read.keys() == expected.keys()
    for example, (split, one) in read.items():
        wanted = expected[example]
        np.testing.assert_array_equal(one["label"], wanted.label)
        assert one["group"].decode() == wanted.group
        # Only a validation or test split that the publisher does not give is taken from train.
        published = {one.split for one in expected.values()}
        assert wanted.split in (None, split) or (wanted.split == "train" and split not in published)
        pixels = wanted.pixels if wanted.pixels.ndim == 3 else wanted.pixels[..., None]
        np.testing.assert_array_equal(one["image"], np.broadcast_to(pixels, one["image"].shape))
        assert one["image"].dtype == np.uint8
    groups = [
        {one["group"] for home, one in read.values() if home == split and one["group"]}
        for split in TFDS_SPLITS
    ]
    assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]
    for split in dataset.splits.values():
        for row, example in enumerate(split.ids):
            np.testing.assert_array_equal(split.labels[row], expected[example].label)
            if split.pixels is not None:
                np.testing.assert_array_equal(split.pixels[row], expected[example].pixels)
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_a_builder_says_of_itself(name, tmp_path):
    builder = tfds.builder(name, data_dir=tmp_path)
    assert type(builder) is BUILDERS[name] is tfds.builder_cls(name)
    assert name in tfds.list_builders(with_community_datasets=False)
    info, layout = builder.info, LAYOUTS[name]
    assert info.homepage == layout.homepage and info.homepage.startswith("https://")
    assert info.description == layout.description.strip()
    assert info.citation == layout.citation.strip() and info.citation.startswith("@")
    assert info.redistribution_info.license == layout.licence.strip()
    assert layout.instructions == builder.MANUAL_DOWNLOAD_INSTRUCTIONS
    assert info.supervised_keys == ("image", "label")
    assert list(builder.builder_configs) == [one for one in layout.variants if one]


def test_importing_the_package_registers_the_builders_and_leaves_those_of_tfds():
    code = (
        "import medmerge_jax.data, sys, tensorflow_datasets as tfds\n"
        "for name in ('aptos2019', 'chexpert', 'cifar10', 'mnist'):\n"
        "    print(tfds.builder_cls(name).__module__)\n"
        "sys.exit('tensorflow' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    ours = "medmerge_jax.data.official.builders"
    assert result.stdout.split() == [
        ours, ours, ours, "tensorflow_datasets.image_classification.mnist",
    ]  # fmt: skip


def test_the_instructions_are_said_where_nothing_is(tmp_path):
    with pytest.raises(UserError, match="train_images/000c1434d8d7"):
        prepare("aptos2019", tmp_path / "nothing", tmp_path / "tfds")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "readme").write_text("nothing else")
    with pytest.raises(UserError, match=r"train\.csv: there is no such file[^$]*train_images/000"):
        prepare("aptos2019", tmp_path / "empty", tmp_path / "tfds")


def test_an_unreadable_image_is_named(tmp_path):
    expected = small_layouts.aptos2019(tmp_path / "manual")
    name = list(expected)[7]
    (tmp_path / "manual" / "train_images" / f"{name}.png").write_text("not an image")
    with pytest.raises(UserError, match=f"{name}.png: is not an image"):
        prepare("aptos2019", tmp_path / "manual", tmp_path / "tfds")


def test_an_image_that_is_cut_short_is_not_stored(tmp_path):
    """Its header is whole, so that it would be found by whoever reads what was built."""
    expected = small_layouts.aptos2019(tmp_path / "manual")
    path = tmp_path / "manual" / "train_images" / f"{list(expected)[7]}.png"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=f"{path.name}: cannot be decoded"):
        prepare("aptos2019", tmp_path / "manual", tmp_path / "tfds")


def test_files_that_need_no_change_are_stored_as_they_are(tmp_path):
    small_layouts.eyepacs(tmp_path / "manual")
    builder = prepare("eyepacs", tmp_path / "manual", tmp_path / "tfds")
    undecoded = {"image": tfds.decode.SkipDecoding()}
    same = {}
    for split in TFDS_SPLITS.values():
        for one in builder.as_data_source(split=split, decoders=undecoded):
            name = one["id"].decode()
            folder = "train" if int(name.split("_")[0]) < 10 + 3 * 16 else "test"
            stored = (tmp_path / "manual" / folder / f"{name}.jpeg").read_bytes()
            same[name] = one["image"] == stored
    # Patient 13's images lie on their sides.
    assert {name for name, kept in same.items() if not kept} == {"13_left", "13_right"}


@pytest.mark.parametrize("given", [{}, {"manual_dir": "not/there"}])
def test_a_folder_that_is_not_given_or_not_there_is_one_error(tmp_path, given):
    builder = tfds.builder("aptos2019", data_dir=tmp_path / "tfds")
    config = tfds.download.DownloadConfig(**given)
    with pytest.raises(UserError, match=r"(?s)aptos2019 is read from .*manual_dir=FOLDER.*train"):
        builder.download_and_prepare(download_config=config)


@pytest.mark.slow
def test_the_test_case_of_tfds():
    pytest.importorskip("dill")
    command = [sys.executable, "-m", "helpers.tfds_case"]
    result = subprocess.run(command, env=with_helpers(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Ran 40 tests" in result.stderr and result.stderr.rstrip().endswith("\nOK")
