"""What the stages of a recipe start from, up to their first steps."""

import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from helpers import tiny_config, tiny_network
from helpers.random_models import variables_of
from helpers.tiny_config import ARCHITECTURE

from medmerge_jax import merging
from medmerge_jax.config import Config, parse
from medmerge_jax.data import DataSet, ResidentBatches, Split
from medmerge_jax.data.splits import SPLITS
from medmerge_jax.errors import UserError
from medmerge_jax.images import read_image
from medmerge_jax.merging.trees import flatten, unflatten, without_head
from medmerge_jax.models import LinearHead, get_spec, statistics
from medmerge_jax.models.preprocessing import PLAIN
from medmerge_jax.recipes import experiment, inputs, prepare
from medmerge_jax.recipes.recipes import RECIPES, needed_parents
from medmerge_jax.storage.run_directory import RunDirectory
from medmerge_jax.studies import run
from medmerge_jax.training.stage import StageResult
from medmerge_jax.weights import (
    model_fingerprint,
    read_tensors,
    save_weights,
    write_safetensors,
)


@pytest.fixture
def first_stage(tmp_path, monkeypatch):
    """Runs a config up to its first stage, and returns what that was to start from."""
    monkeypatch.setenv("MEDMERGE_JAX_CACHE", str(tmp_path / "cache"))
    starts = []

    def capture(stage, start, *_, **__):
        starts.append(start)
        raise InterruptedError

    def call(recipe, parents, seed=0, architecture=ARCHITECTURE, **fields):
        config = tiny_config.get_config()
        config.recipe, config.seed, config.architecture = recipe, seed, architecture
        config.update_from_flattened_dict(fields)
        paths = {}
        for name, variables in parents.items():
            paths[name] = variables
            if not isinstance(variables, str):
                paths[name] = str(tmp_path / f"{name}.safetensors")
                save_weights(paths[name], architecture, variables)
        config.parents = ml_collections.ConfigDict(paths)
        monkeypatch.setattr(experiment, "train_stage", capture)
        with pytest.raises(InterruptedError):
            run(config, tmp_path / f"{recipe} {seed} {len(starts)}")
        return starts[-1]

    return call


def random_parent(seed, num_classes=4):
    tiny_config.register_architecture()
    return variables_of(seed, num_classes, ARCHITECTURE)


def head_of(start):
    return unflatten(start.trainable["params"])["head"]


@pytest.mark.parametrize("recipe", ["ft", "lp", "medmerge"])
def test_every_recipe_of_a_seed_starts_with_one_new_head(first_stage, recipe):
    parents = {"b": random_parent(0, num_classes=2), "c": random_parent(1, num_classes=2)}
    classes = head_of(first_stage("ft", parents))["bias"].shape[0]
    for seed in (0, 1):
        head = LinearHead(classes).init(jax.random.key(seed), jnp.zeros((1, 64)))["params"]["head"]
        found = head_of(first_stage(recipe, parents, seed))
        for name, leaf in head.items():
            np.testing.assert_array_equal(found[name], leaf)


def test_the_backbone_is_the_parents_of_the_start(first_stage):
    parents = {"b": random_parent(0), "c": random_parent(1)}
    for start, wanted in parents.items():
        found = first_stage("ft", parents, start=start)
        for path, leaf in flatten(wanted["params"]).items():
            if not path.startswith("head/"):
                np.testing.assert_array_equal(flatten(found.trainable["params"])[path], leaf)
        for path, leaf in flatten(wanted["batch_stats"]).items():
            np.testing.assert_array_equal(flatten(found.batch_stats)[path], leaf)


def test_fine_tuning_trains_the_blocks_at_the_rates_that_the_config_says(first_stage):
    start = first_stage("ft", {"b": random_parent(0)}, **{"ft.blocks": 2, "ft.layer_decay": 0.5})
    scales = start.frozen["rate_scale"]["params"]
    assert set(scales) == set(start.trainable["params"])
    by_part = {path.split("/")[0]: float(scale) for path, scale in scales.items()}
    assert by_part == {"layer2": 0.25, "layer3": 0.5, "head": 1.0}
    assert start.still_norms == ("bn1", "layer1/0/bn1", "layer1/0/bn2")


def test_parents_are_merged_in_the_order_of_their_names(first_stage):
    parents = {name: random_parent(seed) for seed, name in enumerate("dbc")}
    start = first_stage("medmerge", parents)
    kernels = [tree["conv1/kernel"] for tree in start.frozen["parents"]]
    for kernel, name in zip(kernels, "bcd", strict=True):
        np.testing.assert_array_equal(kernel, parents[name]["params"]["conv1"]["kernel"])
    # A config that was made in Python may have them in any order.
    made = Config(recipe="medmerge", parents={"c": "zeros", "b": "random"})
    assert needed_parents(made) == ["b", "c"]


def test_a_parent_that_a_job_has_made_has_its_place_among_the_others(tmp_path, monkeypatch):
    """Although it is loaded later than those that were there before."""
    monkeypatch.setenv("MEDMERGE_JAX_CACHE", str(tmp_path / "cache"))
    parents = {name: random_parent(seed) for seed, name in enumerate("abc")}
    for name, variables in parents.items():
        save_parent(tmp_path / name / "model.safetensors", variables)
    config = tiny_config.get_config()
    config.recipe = "medmerge"
    values = {"a": "job:a", "b": str(tmp_path / "b"), "c": "job:c"}
    config.parents = ml_collections.ConfigDict(values)
    prepared = prepare.prepare(parse(config), list(values), tmp_path, {})
    assert list(prepared.parents) == ["b"]
    loaded = prepare.load_inputs(prepared).parents
    assert list(loaded) == ["a", "b", "c"]
    for name, (variables, _) in loaded.items():
        found, wanted = (tree["params"]["conv1"]["kernel"] for tree in (variables, parents[name]))
        np.testing.assert_array_equal(found, wanted)


def test_a_merge_starts_as_its_fields_say(first_stage):
    parents = {name: random_parent(seed) for seed, name in enumerate("cb")}
    fields = {"init": (1.0, 0.0), "learning_rate": 0.5, "decay_to": "none"}
    start = first_stage("medmerge", parents, **{f"merge.{n}": x for n, x in fields.items()})
    assert start.learning_rate == {"coefficients": 0.5}
    assert start.weight_decay == {"coefficients": 0.0}
    found = {**start.assemble(start.trainable, start.frozen)}
    for path, leaf in flatten(without_head({"params": parents["b"]["params"]})["params"]).items():
        np.testing.assert_array_equal(found[path], leaf)


def test_to_zeros_nothing_is_aligned(first_stage):
    parents = {"b": random_parent(0), "c": random_parent(1), "z": "zeros"}
    start = first_stage("medmerge_aligned", parents)
    *others, zeros = (flatten(tree) for tree in start.frozen["parents"])
    for found, name in zip(others, "bc", strict=True):
        for path, kernel in found.items():
            np.testing.assert_array_equal(kernel, flatten(parents[name]["params"])[path])
    assert not any(np.any(kernel) for kernel in zeros.values())


def test_zeros_are_aligned_to_nothing(first_stage):
    last = random_parent(0)
    order = merging.random_permutations(merging.find_spaces(last), 1)
    other = merging.permute_variables(last, order)
    parents = {"a": "zeros", "b": other, "c": last}
    start = first_stage("medmerge_aligned", parents)
    zeros, *others = (flatten(tree) for tree in start.frozen["parents"])
    assert not any(np.any(kernel) for kernel in zeros.values())
    for found in others:
        for path, kernel in found.items():
            np.testing.assert_array_equal(kernel, flatten(last["params"])[path])
    # The zeros' batch norms are the others' mean, in the order that those came in.
    for path, leaf in flatten(start.batch_stats).items():
        ours, theirs = (flatten(tree["batch_stats"])[path] for tree in (last, other))
        np.testing.assert_allclose(leaf, ((ours + theirs) / 2 + 2 * ours) / 3, rtol=1e-5, atol=1e-6)


def test_statistics_that_a_parent_lacks_are_estimated_on_request(first_stage, tmp_path):
    """On the first training images in the order of the seed, before anything is merged."""
    tiny_network.register_architecture()
    tiny = tiny_network.ARCHITECTURE
    whole, other = (variables_of(seed, architecture=tiny) for seed in (0, 1))
    save_weights(tmp_path / "whole.safetensors", tiny, whole)
    tensors = read_tensors(tmp_path / "whole.safetensors")
    bare = {name: leaf for name, leaf in tensors.items() if "running" not in name}
    write_safetensors(tmp_path / "bare.safetensors", bare)
    parents = {"b": str(tmp_path / "bare.safetensors"), "c": other}
    with pytest.raises(UserError, match="estimate_statistics = True"):
        first_stage("ft", parents, architecture=tiny)
    start = first_stage("ft", parents, architecture=tiny, estimate_statistics=True)
    wanted = statistics.with_statistics(tiny, whole, drawn_images(tmp_path, tiny))
    for path, leaf in flatten(wanted["batch_stats"]).items():
        np.testing.assert_allclose(flatten(start.batch_stats)[path], leaf, rtol=1e-4, atol=1e-5)


def save_parent(path, variables):
    save_weights(path, ARCHITECTURE, variables)
    return path


def drawn_images(folder, architecture):
    """All training images of the first run that drew them, normalised."""
    preprocessing = get_spec(architecture).preprocessing
    paths = sorted(next(folder.glob("ft*/data/*/train")).rglob("*.png"))
    pixels = np.stack([read_image(path, 16) for path in paths])
    normalised = (pixels / 255 - preprocessing.mean) / preprocessing.std
    return normalised.astype(np.float32)


def experiment_on(config, tmp_path, parents=(), batches=()):
    given = types.SimpleNamespace(
        rendering=PLAIN, parents=dict(parents), dataset=DataSet("x", ("a", "b"), False, {}),
        batches=dict(batches), class_weights=np.ones(2), mesh=None, features={},
    )  # fmt: skip
    return experiment.Experiment(parse(config), RunDirectory(tmp_path / "run"), given)


def started(tmp_path, head, variables, **card):
    config = tiny_config.get_config()
    config.head, config.seed = head, 3
    parents = {"b": (variables, {"source": "x", **card})}
    return experiment_on(config, tmp_path, parents).start()


def test_the_start_keeps_its_head_or_has_a_new_one_of_the_seed(tmp_path):
    variables = random_parent(0, num_classes=2)
    new = LinearHead(2).init(jax.random.key(3), jnp.zeros((1, 64)))["params"]["head"]
    for kind, wanted in (("keep", variables["params"]["head"]), ("new", new)):
        model = started(tmp_path, kind, variables, classes=["a", "b"])
        jax.tree.map(np.testing.assert_array_equal, model.variables["params"]["head"], wanted)
        assert model.head == model_fingerprint({"head": wanted})


@pytest.mark.parametrize(
    ("num_classes", "card", "words"),
    [
        (2, {"classes": ["b", "a"]}, "has the classes .'b', 'a'."),
        (3, {}, "has the classes 3, the data has .'a', 'b'."),
        (0, {}, "has no head"),
    ],
)
def test_a_head_of_other_classes_is_not_kept(tmp_path, num_classes, card, words):
    parent = random_parent(0, num_classes)
    with pytest.raises(UserError, match=f"head = 'keep': parent b {words}"):
        started(tmp_path, "keep", parent, **card)
    started(tmp_path, "new", parent, **card)


def test_features_are_shared_by_models_whose_backbone_has_one_name(tmp_path, monkeypatch):
    """Not by those of none, as merged ones, nor after a stage, which may have changed it."""
    computed, seen = [], []

    def predict(network, variables, batches):
        computed.append(variables)
        return np.full((4, 64), len(computed), np.float32)

    def train_stage(stage, start, network, batches, *_, **__):
        seen.append(int(next(batches("train").epoch(0, 0))["inputs"][0, 0]))
        return StageResult({"params": unflatten(start.trainable["params"])}, {}, {"name": "lp"})

    monkeypatch.setattr(experiment, "predict", predict)
    monkeypatch.setattr(experiment, "train_stage", train_stage)
    pixels, labels = np.zeros((4, 16, 16, 3), np.uint8), np.arange(4) % 2
    batches = {"train": ResidentBatches(pixels, labels, 2)}
    one = experiment_on(tiny_config.get_config(), tmp_path, batches=batches)
    variables = random_parent(0, num_classes=2)
    named, nameless = (experiment.Trained(variables, backbone=name) for name in ("of c", ""))
    probed = one.linear_probe(named)
    for model in (named, nameless, nameless, probed):
        one.linear_probe(model)
    assert seen == [1, 1, 2, 3, 4]


def test_generation_goes_on_from_the_fine_tuned_model_and_its_optimizer(tmp_path, monkeypatch):
    """And leaves that model; those of the minima are beside it."""
    stages, results = {}, {}

    def train_stage(stage, start, *_, **__):
        stages[stage.name] = stage, start
        model = {
            "params": jax.tree.map(lambda leaf: leaf + 1, unflatten(start.trainable["params"])),
            "batch_stats": start.batch_stats,
        }
        kept = dict.fromkeys(stage.keep, model)
        optimizer = f"that of {stage.name}" if stage.keep_optimizer else None
        results[stage.name] = StageResult(model, {}, {"name": stage.name}, kept, optimizer)
        return results[stage.name]

    monkeypatch.setattr(experiment, "train_stage", train_stage)
    config = tiny_config.get_config()
    config.fgg.epochs, config.fgg.cycle, config.fgg.lowest = 5, 4, 1e-7
    one = experiment_on(config, tmp_path, parents={"b": (random_parent(0), {"source": "x"})})
    found = RECIPES["fgg"].function(one)

    tuned, (stage, start) = results["ft"].variables, stages["fgg"]
    assert start.opt_state == "that of ft"
    jax.tree.map(
        np.testing.assert_array_equal, unflatten(start.trainable["params"]), tuned["params"]
    )
    assert (stage.epochs, stage.cycle, stage.lowest, stage.keep) == (5, 4, 1e-7, (1, 5))
    assert (stage.select, stage.learning_rate) == ("last", config.fgg.learning_rate)
    assert found.variables is tuned
    assert list(found.kept) == ["fgg-1", "fgg-5"]
    assert [one["name"] for one in found.stages] == ["ft", "fgg"]


def test_class_weights_of_several_labels_count_what_is_known():
    labels = np.array([[1, np.nan], [0, 1], [0, 0], [0, np.nan], [0, 0]], np.float32)
    ids = tuple("abcde")
    split = Split(ids, ids, labels)
    dataset = DataSet("x-rays", ("opacity", "effusion"), True, dict.fromkeys(SPLITS, split))
    config = tiny_config.get_config()
    config.class_weights = "balanced"
    np.testing.assert_allclose(inputs.loss_weights(config, dataset), [4 / 1, 2 / 1])
    config.class_weights = "by_frequency"  # 1 and 1 positives of 5 and 3 known
    np.testing.assert_allclose(inputs.loss_weights(config, dataset), [[1.0, 1.0]])
    labels[1, 0] = 1  # (2 − n + 1.5) / 2
    np.testing.assert_allclose(inputs.loss_weights(config, dataset), [[0.75, 1.25]])
    one = DataSet("x-rays", ("a", "b", "c"), False, {"train": Split(ids, ids, np.array([0, 0, 1]))})
    np.testing.assert_allclose(inputs.loss_weights(config, one), [0.5, 1.0, 1.5])
