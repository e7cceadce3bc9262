"""What differs from the papers."""

import importlib.util
from pathlib import Path

import pytest

from medmerge_jax.analysis.published import FISSION_FUSION, MEDMERGE, differences, published
from medmerge_jax.config import Config, default_config, fields, parse, to_json

CONFIGS = Path(__file__).parents[2] / "configs"


def recorded(config):
    return to_json(parse(config))


def config_of(name, variant=""):
    spec = importlib.util.spec_from_file_location("config_file", CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return recorded(module.get_config(variant))


@pytest.mark.parametrize(
    "name",
    ["aptos", "isic2019:resnet50", "rsna_pneumonia:compare",
     "fission_fusion/ham10000", "fission_fusion/cifar10:grid"],
)  # fmt: skip
def test_the_configs_of_the_papers_do_not_differ(name):
    config = config_of(*name.split(":"))
    assert list(differences(config)) == []
    paper = FISSION_FUSION if name.startswith("fission") else MEDMERGE
    assert published(config) is paper


def test_papers_name_fields_that_there_are():
    paths = {one.path for one in fields(Config())}
    for paper in (MEDMERGE, FISSION_FUSION):
        assert set(paper.settings) - paths <= {"parents.c"}


def test_what_differs_is_listed_with_all_values():
    config = default_config()
    config.lp.epochs, config.batch_size, config.augmentation = 3, 8, "heavy"
    config.parents.c = "/home/ann/runs/secret/other.pth"
    config.merge_ft.options.beta, config.merge_ft.options.alpha = None, 0.5
    config.data.root, config.checkpoint_seconds = "/home/ann/images", 1.0
    assert list(differences(recorded(config))) == [
        ["merge_ft.options", "-", "{}", '{"alpha": 0.5}'],
        ["lp.epochs", "50", "50", "3"],
        ["batch_size", "-", "64", "8"],
        ["augmentation", "none", "none", "heavy"],
        ["parents.c", "imagenet", "-", "other.pth"],
    ]


def test_a_split_by_patient_differs_where_patients_are_known():
    config = recorded(default_config())
    config["data"]["kind"] = "official"
    row = ["data.split_by", "image", "group", "group"]
    assert list(differences(config, grouped=True)) == [row]
    assert list(differences(config, grouped=False)) == []


def test_members_are_compared_with_what_their_study_was():
    config = config_of("fission_fusion/ham10000", "grid")
    config |= {"recipe": "ft", "augmentation": "medium", "parents": {"warmup": "job:warmup"}}
    assert list(differences(config)) == []
    assert [row[0] for row in differences({**config, "batch_size": 64})] == ["batch_size"]


def test_a_config_of_an_earlier_version():
    assert list(differences({"recipe": "medmerge", "parents": {"c": "imagenet"}})) == []
