"""An architecture that the package does not know: one file, registered from outside."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.parameters import some_quick

import medmerge_jax as mm
from medmerge_jax.errors import UserError
from medmerge_jax.merging.trees import flatten
from medmerge_jax.models import BatchNorm, Preprocessing, get_spec, list_models
from medmerge_jax.models.layers import Conv, dense_head, global_average
from medmerge_jax.models.network import Network
from medmerge_jax.models.norm import resolve
from medmerge_jax.models.registry import MODELS, ModelSpec, leaf_role, register
from medmerge_jax.training import parameterization
from medmerge_jax.training.accumulation import accumulated_step
from medmerge_jax.training.step import Task, init_state, train_step
from medmerge_jax.weights import read_tensors

CLASSES = 3


class Plain(nn.Module):
    """Two convolutions with batch norms and dropout, one channel of attention, and a head."""

    num_classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train=False, use_running_average=None):
        average = resolve(train, use_running_average)
        x = nn.relu(BatchNorm(self.dtype, name="bn1")(Conv(8, 3, name="conv1")(x), average))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        x = nn.relu(BatchNorm(self.dtype, name="bn2")(Conv(8, 3, name="conv2")(x), average))
        x = global_average(x) * nn.sigmoid(nn.Dense(8, name="gate")(global_average(x)))
        return dense_head(8, self.num_classes)(x) if self.num_classes else x


@pytest.fixture(scope="module")
def plain():
    spec = ModelSpec(
        name="plain",
        build=Plain,
        num_features=8,
        preprocessing=Preprocessing(size=16),
        torch_head="classifier.1",
        rngs=("dropout",),
    )
    register(spec)
    yield spec
    del MODELS._entries["plain"]


@pytest.fixture
def variables(plain):
    return [
        mm.create_model("plain", CLASSES).init(jax.random.key(seed), jnp.zeros((1, 16, 16, 3)))
        for seed in (0, 1)
    ]


def test_it_is_a_model_like_the_others(plain):
    assert "plain" in list_models() and get_spec("plain") is plain
    with pytest.raises(ValueError, match="there is a model 'plain' already"):
        register(dataclasses.replace(plain))


def test_its_weights_have_pytorchs_names_and_layouts(variables, tmp_path):
    path = tmp_path / "plain.safetensors"
    mm.save_weights(path, "plain", variables[0])
    tensors = read_tensors(path)
    assert tensors["conv1.weight"].shape == (8, 3, 3, 3)
    assert tensors["classifier.1.weight"].shape == (CLASSES, 8)
    assert tensors["gate.weight"].shape == (8, 8)
    again = mm.load_weights("plain", path)
    jax.tree.map(np.testing.assert_array_equal, again, jax.device_get(variables[0]))


def test_roles_say_what_a_probe_trains_and_what_is_merged(variables):
    roles = {path: leaf_role(path, leaf) for path, leaf in flatten(variables[0]["params"]).items()}
    assert roles["conv2/kernel"] == "kernel" and roles["head/bias"] == "head"
    assert roles["bn2/scale"] == "norm" and roles["gate/kernel"] == "other"
    start = parameterization.merge_linear_probe(variables, variables[0]["params"]["head"])
    assert set(start.trainable["coefficients"]) == {"conv1/kernel", "conv2/kernel"}
    assert {"head/kernel", "bn1/bias"} <= set(start.trainable["params"])
    assert "gate/kernel" in start.frozen["params"]


def test_roles_are_the_specs_own(variables):
    def role(path, leaf):
        return "kernel" if path == "gate/kernel" else "other" if "conv" in path else "head"

    head = variables[0]["params"]["head"]
    start = parameterization.merge_linear_probe(variables, head, role=role)
    assert set(start.trainable["coefficients"]) == {"gate/kernel"}
    probe = parameterization.linear_probe(variables[0], role=role)
    assert "bn1/scale" in probe.trainable["params"]
    assert set(probe.frozen["params"]) == {"conv1/kernel", "conv2/kernel", "gate/kernel"}


def test_what_permutes_units_wants_to_know_them(plain, variables):
    with pytest.raises(ValueError, match="the hidden units of plain are not known"):
        mm.merge("weight_matching", "plain", variables)
    assert mm.merge("uniform", "plain", variables)


def steps_of(model, start, rngs, keys, accumulate=1):
    """Losses of a step on each of the keys, from the same state."""
    rng = np.random.default_rng(0)
    batch = {
        "inputs": rng.normal(size=(8, 16, 16, 3)).astype(np.float32),
        "labels": np.arange(8, dtype=np.int32) % CLASSES,
    }
    network = Network(model, None, rngs=rngs)
    task = Task(network, start.assemble, start.train_batch_norm, False)
    constants = (jnp.float32(0.0), jnp.float32(0.0), jnp.ones(CLASSES))
    losses, state = [], init_state(start)
    for key in keys:
        if accumulate > 1:
            rows = [slice(i, None, accumulate) for i in range(accumulate)]
            parts = tuple({name: x[part] for name, x in batch.items()} for part in rows)
            state, loss = accumulated_step(task, state, start.frozen, parts, *constants, key)
        else:
            state, loss = train_step(task, state, start.frozen, batch, *constants, key)
        losses.append(float(loss))
    return losses, state


@pytest.mark.parametrize("accumulate", [1, 2])
def test_dropout_acts_while_the_batch_norms_are_frozen(plain, variables, accumulate):
    model = mm.create_model("plain", CLASSES)
    start = parameterization.linear_probe(variables[0])
    one, other = jax.random.key(1), jax.random.key(2)
    # With a learning rate of 0 only what is drawn differs: by step, and by the epoch's key.
    losses, state = steps_of(model, start, ("dropout",), [one, one, other], accumulate)
    assert len(set(losses)) == 3
    assert steps_of(model, start, ("dropout",), [one, one, other], accumulate)[0] == losses
    jax.tree.map(np.testing.assert_array_equal, state.batch_stats, variables[0]["batch_stats"])


def test_each_part_of_a_batch_has_draws_of_its_own(plain, variables):
    """Two parts of the same images: with the first one's draws, the loss would be the first's."""
    model, start = mm.create_model("plain", CLASSES), parameterization.linear_probe(variables[0])
    rng = np.random.default_rng(0)
    part = {
        "inputs": rng.normal(size=(4, 16, 16, 3)).astype(np.float32),
        "labels": np.arange(4, dtype=np.int32) % CLASSES,
    }
    constants = (jnp.float32(0.0), jnp.float32(0.0), jnp.ones(CLASSES), jax.random.key(1))
    network = Network(model, None, rngs=("dropout",))
    task = Task(network, start.assemble, start.train_batch_norm, False)
    once, *more = (
        float(accumulated_step(task, init_state(start), start.frozen, (part,) * n, *constants)[1])
        for n in (1, 1, 2)
    )
    assert more[0] == once
    assert more[1] != pytest.approx(once, rel=1e-5)


def test_a_model_that_draws_wants_a_key(plain, variables):
    start = parameterization.linear_probe(variables[0])
    with pytest.raises(ValueError, match="draws dropout: the epoch's key is wanted"):
        steps_of(mm.create_model("plain", CLASSES), start, ("dropout",), [None])


def test_evaluation_draws_nothing(variables):
    model = mm.create_model("plain", CLASSES)
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 3))
    logits = [model.apply(variables[0], images) for _ in range(2)]
    np.testing.assert_array_equal(*logits)


def test_batch_norms_and_dropout_are_switched_apart(variables):
    model = mm.create_model("plain", CLASSES)
    images = np.random.default_rng(0).normal(size=(4, 16, 16, 3))
    rngs = {"dropout": jax.random.key(0)}

    def updates(**options):
        return model.apply(variables[0], images, mutable=["batch_stats"], **options)[1]

    def unchanged(updated):
        before = flatten(variables[0]["batch_stats"])
        after = flatten(updated["batch_stats"])
        return all(np.array_equal(before[path], after[path]) for path in before)

    assert not unchanged(updates(train=True, rngs=rngs))
    assert unchanged(updates(train=True, use_running_average=True, rngs=rngs))
    assert not unchanged(updates(train=False, use_running_average=False))
    assert unchanged(updates(train=False))


@pytest.mark.parametrize(
    "name", some_quick(("resnet20", "resnet18", "resnet50", "densenet121"), "resnet20", "resnet18")
)
def test_every_leaf_has_a_role_and_a_name_in_pytorch(name):
    spec = get_spec(name)
    leaves = spec.shapes(num_classes=2)
    roles = {path: spec.role(path, leaf) for path, leaf in leaves["params"].items()}
    assert set(roles.values()) == {"kernel", "norm", "head"}
    names = [spec.torch_name(c, path) for c, flat in leaves.items() for path in flat]
    assert len(set(names)) == len(names)
    with pytest.raises(UserError, match=f"params has 'conv1/thing', which {name} has not"):
        spec.torch_name("params", "conv1/thing")


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("resnet20", 9), ("deit_tiny_patch16_224", 12)],
)
def test_the_stem_the_blocks_and_what_is_behind_them_have_depths(name, blocks):
    spec = get_spec(name)
    assert spec.num_blocks == blocks
    depths = spec.depths(spec.shapes(2)["params"])
    assert set(depths.values()) == set(range(blocks + 2))
    assert depths["head/kernel"] == blocks + 1
    # Nothing but the order of the blocks' own numbers is needed: without a head they are the same.
    for path, depth in spec.depths(spec.shapes(0)["params"]).items():
        assert depth == depths[path]


def test_a_model_whose_blocks_are_not_said_has_none(plain):
    assert plain.num_blocks == 0 and plain.depths(["conv1/kernel"]) == {}
    with pytest.raises(UserError, match=r"drop_path is 0\.1: plain has no stochastic depth"):
        mm.create_model("plain", CLASSES, drop_path=0.1)
