"""From a published layout, as downloaded, to results."""

from pathlib import Path

import ml_collections
import numpy as np
import pytest
from helpers import small_layouts, tiny_config

from medmerge_jax.errors import UserError
from medmerge_jax.recipes.inputs import load_data, missing_data
from medmerge_jax.studies import run
from medmerge_jax.studies.checks import check_config


@pytest.fixture
def config(tmp_path):
    config = tiny_config.get_config()
    config.data = ml_collections.ConfigDict(config.data)
    config.data.update(kind="official", name="eyepacs", root=str(tmp_path / "eyepacs"))
    return config


def test_fields_reach_the_data_set(config, tmp_path):
    expected = small_layouts.eyepacs(tmp_path / "eyepacs")
    check_config(config)
    assert not missing_data(config.data)
    by_group = load_data(config, tmp_path)
    config.data.split_by = "image"
    by_image = load_data(config, tmp_path)
    assert by_group.fingerprint() != by_image.fingerprint()
    config.data.split_seed = 1
    assert load_data(config, tmp_path).fingerprint() != by_image.fingerprint()
    config.data.variant = "kaggle"
    assert len(load_data(config, tmp_path).splits["test"]) == 16
    rows = [
        f"{name}.jpeg,{one.label},{('train', 'val', 'test')[row % 3]}"
        for row, (name, one) in enumerate(expected.items())
    ]
    config.data.split_table = str(tmp_path / "splits.csv")
    assert missing_data(config.data) == [
        f"data.split_table = {tmp_path}/splits.csv: there is no such file or folder"
    ]
    Path(config.data.split_table).write_text("\n".join(["filename,class,split", *rows, ""]))
    assert not missing_data(config.data)
    dataset = load_data(config, tmp_path)
    assert [len(dataset.splits[name]) for name in ("train", "val", "test")] == [16, 16, 16]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "eyepac"}, "data.name = 'eyepac'.*did you mean 'eyepacs'"),
        ({"variant": "x"}, "data.variant = 'x'.*one of pooled, kaggle is wanted"),
        ({"split_by": "patient"}, "data.split_by = 'patient': .*one of group, image"),
        ({"kind": "folder", "variant": "kaggle"}, "data.variant = 'kaggle': is only for"),
        ({"kind": "folder", "blank": "zero"}, r"data\.uncertain, data\.blank: are only for"),
        ({"blank": "nothing"}, "data.blank = 'nothing': .*zero, one, unknown"),
        ({"missing_labels": "skip"}, "data.missing_labels = 'skip': .*error, drop"),
        ({"kind": "folder", "split_table": "x.csv"}, r"data.split_table = 'x\.csv': is only for"),
    ],
)
def test_fields_that_cannot_be_used(config, options, message):
    config.data.update(options)
    with pytest.raises(UserError, match=message):
        check_config(config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "variant", "write"),
    [
        ("rsna_pneumonia", "", small_layouts.rsna_pneumonia),
        ("chexpert", "ignore", small_layouts.chexpert_ignore),
    ],
)
def test_from_the_download_to_results(config, tmp_path, name, variant, write):
    expected = write(tmp_path / name)
    config.data.update(name=name, variant=variant, root=str(tmp_path / name))
    if name == "chexpert":
        config.select.metric = "macro_auc"
    results = run(config, tmp_path / "run")
    counts = results["data"]["counts"]
    wanted = np.array([one.label for one in expected.values()])
    if wanted.ndim == 1:
        wanted = np.eye(len(results["data"]["classes"]))[wanted]
    for index, one in enumerate(results["data"]["classes"]):
        assert sum(split[one] for split in counts.values()) == np.nansum(wanted[:, index])
    assert 0 <= results["test"]["accuracy"] <= 1
