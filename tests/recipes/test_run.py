"""Every recipe and every option of it, from a config to results, on the smallest real run."""

import dataclasses
import json
from unittest import mock

import ml_collections
import numpy as np
import pytest
from helpers import tiny_config, tiny_network
from helpers.random_models import variables_of
from helpers.tiny_config import ARCHITECTURE
from PIL import Image

import medmerge_jax as mm
from medmerge_jax import merging
from medmerge_jax.config import Select, parse
from medmerge_jax.data import DataSet, Split
from medmerge_jax.data.splits import SPLITS
from medmerge_jax.errors import UserError
from medmerge_jax.images.augment import POLICIES
from medmerge_jax.merging.trees import flatten
from medmerge_jax.recipes import experiment, inputs
from medmerge_jax.recipes.prepare import _check_metric, prepare
from medmerge_jax.studies import execute, run
from medmerge_jax.studies.checks import check_config
from medmerge_jax.training.stage import Stage
from medmerge_jax.weights import load_parent, save_weights


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDMERGE_JAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def config():
    return tiny_config.get_config()


def test_a_parent_whose_value_is_a_source_s_name_is_not_that_source(config, tmp_path):
    checked = check_config(config)
    alone = prepare(checked, ["b", "c"], tmp_path, {})
    assert prepare(checked, ["b", "c"], tmp_path, {"random": alone}).audit == alone.audit


ONE_LAYER = {"architecture": tiny_network.ARCHITECTURE}


def coefficients(workdir):
    with np.load(workdir / "coefficients.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


@pytest.mark.slow
def test_compare(tmp_path, monkeypatch):
    computed = []
    monkeypatch.setattr(experiment, "predict", spy(experiment.predict, computed))
    results = run(tiny_config.get_config("compare"), tmp_path / "run")
    starts = {(row["recipe"], row["start"]) for row in results["table"]}
    probes = {(recipe, parent) for recipe in ("ft", "lp", "lp_ft", "lp_bn_ft") for parent in "bc"}
    assert starts == probes | {("medmerge", "b+c")}
    for row in results["table"]:
        part = "medmerge" if row["recipe"] == "medmerge" else f"{row['recipe']}-{row['start']}"
        values = []
        for seed in (0, 1):
            folder = tmp_path / "run" / part / f"seed{seed}"
            values.append(json.loads((folder / "results.json").read_text())["test"]["accuracy"])
        assert row["accuracy"]["values"] == values
        assert row["accuracy"]["mean"] == pytest.approx(np.mean(values))
        assert row["accuracy"]["std"] == pytest.approx(np.std(values, ddof=1))
    # The features of each parent are computed once for both recipes and seeds that probe them.
    assert sum(network.model.num_classes == 0 for network, *_ in computed) == 2 * 2
    # b is trained from c, which is trained from nothing.
    card = json.loads((tmp_path / "run" / "sources" / "b" / "results.json").read_text())
    assert card["parents"]["c"]["source"] == "c"


@pytest.mark.parametrize(
    ("options", "parents", "shape"),
    [
        ({**ONE_LAYER, "merge.constraint": "clip"}, 2, (8,)),
        *(
            pytest.param(*one, marks=pytest.mark.slow)
            for one in (
                ({"merge.constraint": "clip", "class_weights": "balanced"}, 3, (2, 16)),
                ({}, 2, (16,)),
                ({"merge.granularity": "layer"}, 2, ()),
                ({"merge.granularity": "slice"}, 2, (3, 16)),
                ({"merge.granularity": "parameter", "merge.constraint": "sigmoid"}, 2,
                 (3, 3, 3, 16)),
                ({"merge.train_batch_norm": False, "select.epoch": "last"}, 3, (2, 16)),
            )
        ),
    ],
)  # fmt: skip
def test_ablations_of_the_merge(config, tmp_path, options, parents, shape):
    tiny_network.register_architecture()
    config.update_from_flattened_dict(options)
    config.parents = ml_collections.ConfigDict(
        {"b": "random", "c": "random", **({"a": "zeros"} if parents == 3 else {})}
    )
    results = run(config, tmp_path / "run")
    found = coefficients(tmp_path / "run")
    assert len(found) == (1 if "architecture" in options else 7)
    assert next(iter(found.values())).shape == shape
    start = 1 / parents if options.get("merge.constraint") != "sigmoid" else 0.5
    moved = np.concatenate([np.ravel(value) for value in found.values()]) - start
    assert 0 < np.abs(moved).max() < 0.1
    assert [stage["name"] for stage in results["stages"]] == ["merge_lp", "ft"]
    if parents == 3:
        assert results["parents"]["a"] == {"source": "zeros"}


@pytest.mark.slow
def test_several_labels_from_a_table(config, tmp_path):
    rng = np.random.default_rng(0)
    lines = ["image,opacity,effusion,patient"]
    (tmp_path / "images").mkdir()
    for index in range(40):
        labels = rng.integers(0, 2, 2)
        pixels = np.clip(rng.normal(60 + 80 * labels[0], 20, (16, 16)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{index}.png")
        known = labels[1] if index % 4 else ""
        lines.append(f"{index}.png,{labels[0]},{known},p{index // 2}")
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    config.data.kind = "table"
    config.data.root, config.data.table = str(tmp_path / "images"), str(tmp_path / "labels.csv")
    config.data.label_columns = ("opacity", "effusion")
    config.data.multilabel = True
    config.data.fractions = (0.6, 0.2, 0.2)
    config.class_weights = "balanced"
    config.select.metric = "macro_auc"
    results = run(config, tmp_path / "run")
    assert results["data"]["classes"] == ["opacity", "effusion"]
    assert results["test"]["macro_auc"] is not None
    with np.load(tmp_path / "run" / "predictions.npz") as predictions:
        assert predictions["labels"].shape == predictions["logits"].shape
        assert predictions["labels"].shape[1] == 2


@pytest.mark.slow
def test_loaders_and_workdirs_do_not_change_a_bit(config, tmp_path):
    models = []
    for loader in ("resident", "stream"):
        config.data.loader = loader
        run(config, tmp_path / loader)
        models.append(flatten(load_parent(tmp_path / loader, ARCHITECTURE)[0]))
    for path in models[0]:
        np.testing.assert_array_equal(models[0][path], models[1][path], err_msg=path)


@pytest.mark.slow
def test_a_probe_of_augmented_images_is_not_one_of_features(config, tmp_path, monkeypatch):
    """The head sees other images every epoch; the backbone stays, and what is evaluated too."""
    computed, models = [], {}
    monkeypatch.setattr(experiment, "predict", spy(experiment.predict, computed))
    config.recipe, config.select.epoch = "lp", "last"
    for augmentation in ("none", "minimal", "heavy"):
        config.augmentation = augmentation
        results = run(config, tmp_path / augmentation)
        models[augmentation] = flatten(load_parent(tmp_path / augmentation, ARCHITECTURE)[0])
        features = [network for network, *_ in computed if network.model.num_classes == 0]
        assert len(features) == (2 if augmentation == "none" else 0)
        assert [stage["name"] for stage in results["stages"]] == ["lp"]
        computed.clear()
    for path, leaf in models["none"].items():
        same = [np.array_equal(models[name][path], leaf) for name in ("minimal", "heavy")]
        assert same == [not path.startswith("params/head")] * 2, path


@pytest.mark.slow
def test_epochs_that_are_kept_are_models(config, tmp_path):
    config.recipe, config.select.epoch = "lp_ft", "last"
    config.lp.keep, config.ft.keep = (1,), (1, 2)
    run(config, tmp_path / "run")
    kept = {path.name: path for path in (tmp_path / "run" / "kept").iterdir()}
    assert set(kept) == {"lp-1", "ft-1", "ft-2"}
    models = {name: flatten(load_parent(path, ARCHITECTURE)[0]) for name, path in kept.items()}
    final = flatten(load_parent(tmp_path / "run", ARCHITECTURE)[0])
    for path, leaf in final.items():
        np.testing.assert_array_equal(models["ft-2"][path], leaf, err_msg=path)
    start = flatten(inputs.random_variables(check_config(config)))
    same = {path for path, leaf in start.items() if np.array_equal(models["lp-1"][path], leaf)}
    assert same == start.keys()  # the probe trains the head alone
    assert not np.array_equal(models["ft-1"]["params/conv1/kernel"], final["params/conv1/kernel"])


def test_random_parents_are_not_the_same_network(config, tmp_path):
    config.parents = {"b": "random", "c": "random"}
    checked = check_config(config)
    both = [inputs.load_parent(checked, name, tmp_path) for name in "bc"]
    (b, of_b), (c, of_c) = both
    assert (of_b["source"], of_c["source"]) == ("random, seed 0", "random, seed 0, number 2")
    kernels = [flatten(one)["params/conv1/kernel"] for one in (b, c)]
    assert not np.array_equal(*kernels)
    alone = flatten(inputs.random_variables(checked))
    np.testing.assert_array_equal(kernels[0], alone["params/conv1/kernel"])


@pytest.mark.slow
def test_from_python(config, tmp_path):
    """With what a config file returns or what that was parsed to; the workdir may be a text."""
    config.recipe = "lp"
    results = mm.run(config, str(tmp_path / "run"))
    assert results["recipe"] == "lp"
    assert mm.run(check_config(config), tmp_path / "run") == results
    with pytest.raises(UserError, match="recipe = 'pl'"):
        mm.run({**config.to_dict(), "recipe": "pl"}, tmp_path / "run")


def test_fields_reach_the_stages(config, tmp_path, monkeypatch):
    stages = []

    def capture(stage, *_, **__):
        stages.append(stage)
        raise InterruptedError

    monkeypatch.setattr(experiment, "train_stage", capture)
    config.recipe = "ft"
    config.ft.update(patience=3, patience_delta=0.25, keep=(2,), schedule="cosine")
    config.ft.warmup_epochs, config.weight_decay = 0.5, 0.125
    config.augmentation, config.select.metric = "minimal", "accuracy"
    with pytest.raises(InterruptedError):
        run(config, tmp_path / "run")
    (stage,) = stages
    assert stage == Stage(
        name="ft", group="ft", epochs=2, learning_rate=1e-3, schedule="cosine", warmup_epochs=0.5,
        weight_decay=0.125, select="best", metric="accuracy", checkpoint_seconds=0.0,
        augmentation=POLICIES["minimal"], patience=3, patience_delta=0.25, keep=(2,), ordinal=True,
    )  # fmt: skip


@pytest.mark.slow
def test_a_run_that_goes_on_does_not_merge_again(config, tmp_path, monkeypatch):
    config.recipe, config.merge_ft.method = "merge_ft", "uniform"
    expected = run(config, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(experiment.Experiment, "fine_tune", interrupt)
        run(config, tmp_path / "run")
    monkeypatch.setattr(experiment.mergers, "merge", interrupt)
    assert run(config, tmp_path / "run")["test"] == expected["test"]
    models = [flatten(load_parent(tmp_path / name, ARCHITECTURE)[0]) for name in ("whole", "run")]
    for path, leaf in models[0].items():
        np.testing.assert_array_equal(models[1][path], leaf, err_msg=path)


@pytest.mark.slow
def test_mergers_are_rows_of_a_comparison(tmp_path):
    config = tiny_config.get_config("compare")
    config.compare.recipes, config.compare.seeds = ("merge_ft", "medmerge_aligned"), (0,)
    config.compare.mergers = ("task_arithmetic", "weight_matching", "zipit")
    config.merge_ft.ancestor, config.merge_ft.num_images = "c", 12
    results = run(config, tmp_path / "run")
    assert [row["recipe"] for row in results["table"]] == [
        "merge_ft task_arithmetic",
        "merge_ft weight_matching",
        "merge_ft zipit",
        "medmerge_aligned",
    ]
    for method in config.compare.mergers:
        part = tmp_path / "run" / f"merge_ft-{method}" / "seed0"
        found = json.loads((part / "results.json").read_text())
        assert (found["recipe"], found["method"]) == ("merge_ft", method)
        assert [stage["name"] for stage in found["stages"]] == ["lp", "ft"]
        assert json.loads((part / "config.json").read_text())["config"]["merge_ft"]["method"] == (
            method
        )
    assert "merge_ft zipit" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "which"), [("medmerge_aligned", "b"), ("merge_ft", "c")])
def test_a_permuted_parent_is_aligned(config, tmp_path, recipe, which):
    """To the last parent's units, or the first's: it is then that parent twice, to the bit."""
    parent = variables_of(0, architecture=ARCHITECTURE)
    permuted = merging.permute_variables(
        parent, merging.random_permutations(merging.find_spaces(parent), 1)
    )
    config.recipe = recipe
    outcomes = []
    for name, other in (("copy", parent), ("permuted", permuted)):
        for part in "bc":
            variables = other if part == which else parent
            save_weights(tmp_path / name / f"{part}.safetensors", ARCHITECTURE, variables)
        config.parents = ml_collections.ConfigDict(
            {part: str(tmp_path / name / f"{part}.safetensors") for part in "bc"}
        )
        run(config, tmp_path / name / "run")
        with np.load(tmp_path / name / "run" / "predictions.npz") as predictions:
            outcomes.append(predictions["logits"])
    np.testing.assert_array_equal(outcomes[0], outcomes[1])


def test_zeros_alone_are_no_parents(config, tmp_path):
    config.parents = ml_collections.ConfigDict({"b": "zeros", "c": "zeros"})
    with pytest.raises(UserError, match="all are zeros"):
        run(config, tmp_path / "run")


def test_images_smaller_than_the_model_takes_are_refused(config, tmp_path):
    config.architecture, config.image_size = "densenet121", 28
    with pytest.raises(UserError, match="image_size = 28: densenet121 takes images of 29 pixels"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_cannot_be_used_is_refused_before_a_source_is_trained(tmp_path):
    config = tiny_config.get_config("compare")
    broken = tmp_path / "images" / "train" / "0" / "broken.png"
    broken.parent.mkdir(parents=True)
    broken.write_text("no image")
    for split, label in ((split, label) for split in ("train", "val", "test") for label in "01"):
        folder = tmp_path / "images" / split / label
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(folder / "good.png")
    config.data.kind, config.data.root = "folder", str(tmp_path / "images")
    with pytest.raises(UserError, match=r"broken\.png"):
        run(config, tmp_path / "run")
    assert not list(tmp_path.rglob("checkpoints"))
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.slow
def test_a_parent_that_changed_since_is_not_mixed_in(config, tmp_path, monkeypatch):
    config.recipe = "ft"
    run(config, tmp_path / "b")
    config.parents.b = str(tmp_path / "b")
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(experiment.Experiment, "predictions", interrupt)
        run(config, tmp_path / "run")
    other = tiny_config.get_config()
    other.recipe, other.seed = "ft", 1
    run(other, tmp_path / "other")
    (tmp_path / "b").rename(tmp_path / "before")
    (tmp_path / "other").rename(tmp_path / "b")
    with pytest.raises(UserError, match="another parent b: its weights have changed"):
        run(config, tmp_path / "run")
    (tmp_path / "b").rename(tmp_path / "other")
    (tmp_path / "before").rename(tmp_path / "b")
    results = run(config, tmp_path / "run")
    assert results["test"]["num_examples"] == 12
    assert results["wall_seconds"] > sum(stage["seconds"] for stage in results["stages"]) > 0


def interrupt(*_):
    raise InterruptedError


def test_sources_that_start_from_each_other(tmp_path):
    config = tiny_config.get_config("compare")
    config.sources.c.parents.c = "source:b"
    with pytest.raises(UserError, match="start from each other"):
        run(config, tmp_path / "run")


def test_class_weights(config, tmp_path):
    config.class_weights = "balanced"
    dataset = inputs.load_data(config, tmp_path)
    counts = np.bincount(dataset.splits["train"].labels)
    weights = inputs.loss_weights(config, dataset)
    np.testing.assert_allclose(weights * counts, counts.sum() / len(counts), rtol=1e-6)


def spy(function, calls):
    def call(*args):
        calls.append(args)
        return function(*args)

    return call


def test_epochs_are_not_selected_by_an_order_that_means_nothing(config, tmp_path):
    config.data.synthetic.kind = "lesion"
    config.select.metric = "kappa"
    with pytest.raises(UserError, match=r"'kappa': .*clinic_2, keratosis, .*data\.ordinal = True"):
        run(config, tmp_path / "run")
    config.data.kind, config.data.root = "folder", str(tmp_path / "run" / "data" / "clinic_2")
    config.data.name = "skin"
    for ordinal, ordered in ((None, False), (True, True)):
        config.data.ordinal = ordinal
        dataset = inputs.load_data(parse(config), tmp_path)
        assert (dataset.name, dataset.ordered) == ("skin", ordered)


@pytest.mark.parametrize("metric", ["macro_auc", "kappa"])
def test_a_metric_that_can_never_be_defined_is_refused_before_training(metric):
    config = parse(tiny_config.get_config())
    labels = (
        np.array([[0.0, 1.0], [1.0, 0.0]], np.float32) if metric == "kappa" else np.zeros(4, int)
    )
    split = Split(tuple("wxyz")[: len(labels)], (), labels)
    dataset = DataSet("d", ("a", "b"), metric == "kappa", dict.fromkeys(SPLITS, split))
    chosen = dataclasses.replace(config, select=Select("best", metric))
    with pytest.raises(UserError, match=f"select.metric = '{metric}' can never be defined on d"):
        _check_metric(chosen, dataset)
    _check_metric(dataclasses.replace(config, select=Select("last", metric)), dataset)
    _check_metric(dataclasses.replace(config, select=Select("best", "loss")), dataset)


def test_a_dry_run_checks_everything_and_trains_nothing(config, tmp_path, capfd):
    assert run(config, tmp_path / "run", dry_run=True) == {}
    said = capfd.readouterr().err
    assert "dry run: config, paths, images (train 16, val 8, test 12, all decoded)" in said
    assert "nothing was trained, so whether the batches fit into memory" in said
    assert not [p for p in tmp_path.glob("run/*") if p.name not in ("data", ".lock")]
    config.parents.b = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="nowhere: there is no such file"):
        run(config, tmp_path / "run", dry_run=True)
    with pytest.raises(UserError, match="workdir is empty"):
        run(config, "")


def test_the_architecture_is_that_of_the_parents(config, tmp_path, capfd):
    save_weights(tmp_path / "b.safetensors", "resnet20", variables_of(0))
    config.architecture, config.parents.b = "", str(tmp_path / "b.safetensors")
    found = inputs.with_architecture(check_config(config))
    assert found.architecture == "resnet20"
    assert "architecture resnet20: as parent b says; config.architecture" in capfd.readouterr().err
    config.parents.b = "imagenet"
    with pytest.raises(UserError, match="architecture is empty, and no parent says one: set it"):
        inputs.with_architecture(check_config(config))
    for name, one in (("b", "resnet20"), ("c", "resnet32")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.safetensors").touch()
        (folder / "model.json").write_text(json.dumps({"architecture": one}))
        config.parents[name] = str(folder)
    with pytest.raises(UserError, match="b is a resnet20, c is a resnet32"):
        inputs.with_architecture(check_config(config))


def test_the_architecture_of_a_source_is_that_of_the_source_it_starts_from(config, tmp_path):
    """Here "a" starts from "z", so that the order is not that of the names."""
    save_weights(tmp_path / "b.safetensors", "resnet20", variables_of(0))
    config = parse(tiny_config.get_config("compare"))
    source = dataclasses.replace(config.sources["c"], architecture="", start="c")
    sources = {
        "a": dataclasses.replace(source, parents={"c": "source:z"}),
        "z": dataclasses.replace(source, parents={"c": str(tmp_path / "b.safetensors")}),
    }
    parents = {"b": "source:a", "c": "source:z"}
    config = dataclasses.replace(config, architecture="", parents=parents, sources=sources)
    checked = mock.Mock(side_effect=StopIteration)
    with mock.patch.object(execute.prepare, "check_paths", checked), pytest.raises(StopIteration):
        run(config, tmp_path / "run")
    found, names = checked.call_args.args
    assert names == ["b", "c"]
    assert found.architecture == "resnet20"
    assert {one.architecture for one in found.sources.values()} == {"resnet20"}
    round_about = dataclasses.replace(source, parents={"c": "source:a"})
    circle = dataclasses.replace(config, sources={**sources, "z": round_about})
    with pytest.raises(UserError, match=r"\['a', 'z'\] start from each other"):
        run(circle, tmp_path / "run")
