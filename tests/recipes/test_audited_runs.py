"""That a run says what its parents have seen of its test split, and leaves it out if asked."""

import json
import shutil
from pathlib import Path

import ml_collections
import numpy as np
import pytest
from helpers import small_layouts, tiny_config
from helpers.random_models import variables_of
from PIL import Image

import medmerge_jax as mm
from medmerge_jax.data.hashing import NEAR, load_hashes
from medmerge_jax.data.official import official_data_set
from medmerge_jax.models.preprocessing import Preprocessing
from medmerge_jax.recipes import prepare
from medmerge_jax.studies import run
from medmerge_jax.studies.checks import check_config

RENAMED = 4


def write_isic2019_with_ham10000(root, ham):
    """Most training images of HAM10000 under their names, some under others, and new ones."""
    ham_folder = ham / "ISIC2018_Task3_Training_Input"
    truth = ["image,MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK"]
    metadata = ["image,age_approx,anatom_site_general,lesion_id,sex"]
    for number, path in enumerate([*sorted(ham_folder.glob("*.jpg")), *[None] * 36]):
        name = path.stem if path else f"ISIC_{9000000 + number:07d}"
        target = root / "ISIC_2019_Training_Input" / f"{name}.jpg"
        if path is None:
            small_layouts.write_jpeg(target, small_layouts.noise(5000 + number))
        else:
            name = f"ISIC_{8000000 + number:07d}" if number < RENAMED else name
            pixels = np.asarray(Image.open(path))  # compressed once more
            small_layouts.write_jpeg(target.with_stem(name), pixels, quality=90)
        label = number % 8
        truth.append(",".join([name, *("1.0" if one == label else "0.0" for one in range(9))]))
        metadata.append(f"{name},50.0,anterior torso,,male")
    small_layouts.write_text(root / "ISIC_2019_Training_GroundTruth.csv", truth)
    small_layouts.write_text(root / "ISIC_2019_Training_Metadata.csv", metadata)


@pytest.fixture
def layouts(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDMERGE_JAX_CACHE", str(tmp_path / "cache"))
    small_layouts.ham10000_challenge(tmp_path / "ham10000")
    write_isic2019_with_ham10000(tmp_path / "isic2019", tmp_path / "ham10000")
    return tmp_path


def data(config, name, root, **fields):
    config.data = ml_collections.ConfigDict(config.data)
    config.data.update(kind="official", name=name, root=str(root / name), **fields)
    return config


def ham10000_config(root):
    config = data(tiny_config.get_config(), "ham10000", root)
    config.recipe = "ft"
    config.ft.epochs = 1
    return config


def isic2019_config(root, parent, **fields):
    config = data(tiny_config.get_config(), "isic2019", root, **fields)
    config.recipe = "lp"
    config.lp.epochs = 1
    config.parents = ml_collections.ConfigDict({"b": parent, "c": "random"})
    return config


def expected_overlap(root):
    """By name and in all, from the labels' tables alone."""
    trained = official_data_set("ham10000", root / "ham10000").splits["train"]
    names = {Path(example).stem for example in trained.ids}
    renamed = {f"ISIC_{8000000 + number:07d}" for number in range(RENAMED)}
    test = official_data_set("isic2019", root / "isic2019").splits["test"]
    stems = [Path(example).stem for example in test.ids]
    by_name = sum(stem in names for stem in stems)
    return by_name, by_name + sum(stem in renamed for stem in stems)


@pytest.mark.slow
def test_ham10000_inside_isic2019(layouts, capsys):
    by_name, total = expected_overlap(layouts)
    assert 0 < by_name < total
    run(ham10000_config(layouts), layouts / "runs" / "ham10000")
    capsys.readouterr()

    workdir = layouts / "runs" / "isic2019"
    results = run(isic2019_config(layouts, str(layouts / "runs" / "ham10000")), workdir)
    found = json.loads((workdir / "data_audit.json").read_text())["parents"]
    assert list(found) == ["b"]  # nobody knows what "random" was trained on: nothing
    assert found["b"]["training_images"] == 28
    assert found["b"]["test"]["by_id"] == by_name
    assert found["b"]["test"]["by_hash"] == found["b"]["test"]["images"] == total
    size = results["test"]["num_examples"]
    said = f"parent b was trained on {total} of {size} test images ({by_name} by name, {total}"
    assert said in capsys.readouterr().err
    assert said in (workdir / "report.html").read_text()

    workdir = layouts / "runs" / "clean"
    config = isic2019_config(layouts, str(layouts / "runs" / "ham10000"), exclude_overlap=True)
    cleaned = run(config, workdir)
    assert cleaned["test"]["num_examples"] == size - total
    assert sum(cleaned["data"]["counts"]["train"].values()) == sum(
        results["data"]["counts"]["train"].values()
    )
    found = json.loads((workdir / "data_audit.json").read_text())
    assert found["excluded"]["test"] == total
    assert found["parents"]["b"]["test"]["images"] == 0
    assert f"{total} test images that a parent was trained on are left out" in (
        (workdir / "report.html").read_text()
    )


@pytest.mark.slow
def test_sources_are_known_before_and_after_they_are_trained(layouts):
    _, total = expected_overlap(layouts)
    workdir = layouts / "runs" / "isic2019"
    config = isic2019_config(layouts, "source:b", exclude_overlap=True)
    # Itself it has seen nothing of HAM10000, but its parent has.
    middle = tiny_config.get_config()
    middle.recipe, middle.ft.epochs = "ft", 1
    middle.parents = ml_collections.ConfigDict({"b": "source:a", "c": "random"})
    config.sources = ml_collections.ConfigDict({"a": ham10000_config(layouts), "b": middle})
    first = run(config, workdir)
    audit = json.loads((workdir / "data_audit.json").read_text())
    assert audit["excluded"]["test"] == total
    hashes, _ = load_hashes(workdir / "sources" / "b" / "image_hashes.npz")
    assert hashes.splits.count("parent") == 28

    (workdir / "results.json").unlink()
    again = run(config, workdir)
    assert again["test"] == first["test"]
    assert json.loads((workdir / "data_audit.json").read_text()) == audit


def near(ours, theirs):
    """Which of our hashes is within the distance of any of theirs, bit by bit."""
    bits = np.unpackbits((ours[:, None] ^ theirs[None]).view(np.uint8), axis=2).sum(axis=2)
    return (bits <= NEAR).any(axis=1)


def test_a_model_directory_alone_is_audited_as_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MEDMERGE_JAX_CACHE", str(tmp_path / "cache"))
    config = tiny_config.get_config()
    config.recipe = "ft"

    def prepared(parent, **fields):
        config.parents.b = parent
        config.data.update(fields)
        return prepare.prepare(check_config(config), ["b"], tmp_path / "run", {})

    before = prepared("random")
    known = np.concatenate(
        [before.hashes.of("test").perceptual[:5], before.hashes.of("train").perceptual]
    )
    expected = near(before.hashes.of("test").perceptual, known)
    assert 5 <= expected.sum() < 12
    variables = variables_of(0, 4, tiny_config.ARCHITECTURE)
    told = mm.Model(
        tiny_config.ARCHITECTURE,
        variables,
        Preprocessing(16),
        provenance={"data_fingerprint": "f00d"},
        image_hashes=known,
    )
    mm.save_model(tmp_path / "model", told)
    shutil.copytree(tmp_path / "model", tmp_path / "sent")  # all that somebody else gets
    audit = prepared(str(tmp_path / "sent")).audit
    found = audit["parents"]["b"]
    assert found["training_images"] == len(np.unique(known, axis=0))
    assert found["test"]["by_hash"] == expected.sum()
    assert found["test"]["by_id"] == found["test"]["exact"] == 0
    assert f"parent b was trained on {expected.sum()} of 12 test images" in capsys.readouterr().err

    cleaned = prepared(str(tmp_path / "sent"), exclude_overlap=True)
    assert len(cleaned.dataset.splits["test"]) == 12 - expected.sum()
    # A model that is made of it inherits them.
    assert len(cleaned.hashes.training()) == 16 + len(np.unique(known, axis=0))

    (tmp_path / "sent" / "image_hashes.npz").unlink()
    assert prepared(str(tmp_path / "sent")).audit["parents"]["b"] is None
    assert "the training images of parent b are not known" in capsys.readouterr().err
