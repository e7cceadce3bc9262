"""Fine-tuning of the last blocks alone, and learning rates that decay from block to block."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medmerge_jax.merging.trees import flatten
from medmerge_jax.models import Preprocessing, get_spec
from medmerge_jax.models.layers import Conv, dense_head, global_average
from medmerge_jax.models.network import Network
from medmerge_jax.models.norm import BatchNorm
from medmerge_jax.training import parameterization
from medmerge_jax.training.accumulation import accumulated_step
from medmerge_jax.training.blocks import by_block
from medmerge_jax.training.step import Task, collapse, init_state, train_step

CLASSES = 3


@pytest.fixture
def batch(rng):
    return {
        "inputs": rng.integers(0, 256, (4, 16, 16, 3), np.uint8),
        "labels": rng.integers(0, CLASSES, 4).astype(np.int32),
    }


class Small(nn.Module):
    """A stem and two blocks, each a convolution with batch norm; and a head."""

    @nn.compact
    def __call__(self, x, train=False, use_running_average=True):
        for name in ("stem", "block1", "block2"):
            x = Conv(4, 3, 2, name=f"{name}_conv")(x)
            x = nn.relu(BatchNorm(name=f"{name}_norm")(x, use_running_average))
        return dense_head(4, CLASSES)(global_average(x))


def depth(path):
    return {"stem": 0, "block1": 1, "block2": 2, "head": 3}[path.split("/")[0].split("_")[0]]


@functools.cache
def initial():
    return jax.jit(Small().init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))


def start_of(**options):
    depths = {path: depth(path) for path in flatten(initial()["params"])}
    return by_block(parameterization.fine_tune(initial()), depths, **options)


def arguments(start, batch):
    network = Network(Small(), Preprocessing(size=16))
    task = Task(network, start.assemble, start.train_batch_norm, False, start.still_norms)
    frozen = jax.tree.map(jnp.asarray, start.frozen)
    return task, init_state(start), frozen, batch, *np.float32([1e-3, 1e-2]), jnp.ones(CLASSES)


def trained(start, batch, steps=1, take=train_step):
    task, state, *constants = arguments(start, batch)
    for _ in range(steps):
        state, loss = take(task, state, *constants)
    return state, float(loss)


def rate_scales(name, decay):
    spec = get_spec(name)
    leaves = spec.shapes(CLASSES)["params"]
    whole = parameterization.fine_tune({"params": leaves})
    start = by_block(whole, spec.depths(leaves), layer_decay=decay)
    scales = start.frozen["rate_scale"]["params"]
    assert set(scales) == set(leaves)
    return scales


@pytest.mark.parametrize(
    ("name", "last", "table"),
    [
        (
            "resnet20",
            10,
            {"conv1": 0, "bn1": 0, "layer1/0": 1, "layer1/2": 3, "layer2/0": 4, "layer3/2": 9,
             "head": 10},
        ),
        (
            "deit_tiny_patch16_224",
            13,
            {"cls_token": 0, "pos_embed": 0, "patch_embed": 0, "blocks/0": 1, "blocks/9": 10,
             "blocks/10": 11, "blocks/11": 12, "norm": 13, "head": 13},
        ),
    ],
)  # fmt: skip
def test_rates_are_those_of_a_table_by_hand(name, last, table):
    scales = rate_scales(name, 0.5)
    for place, depth in table.items():
        of_place = [x for path, x in scales.items() if f"{path}/".startswith(f"{place}/")]
        assert of_place, place
        assert set(of_place) == {2.0 ** (depth - last)}, place


def test_another_decay_is_no_other_program_and_none_changes_no_bit(batch):
    wanted, loss = trained(parameterization.fine_tune(initial()), batch, steps=3)
    found, same_loss = trained(start_of(layer_decay=1.0), batch, steps=3)
    compiled = train_step._cache_size()
    assert same_loss == loss
    by_path = [flatten({"x": one.trainable, "m": one.opt_state[0].mu}) for one in (found, wanted)]
    assert by_path[0].keys() == by_path[1].keys()
    assert all(same(by_path[0][path], leaf) for path, leaf in by_path[1].items())
    first = [trained(start_of(layer_decay=decay), batch)[0] for decay in (0.5, 1.0)]
    assert train_step._cache_size() == compiled
    for path, before in flatten(initial()["params"]).items():
        decayed, whole = (np.asarray(one.trainable["params"][path] - before) for one in first)
        np.testing.assert_allclose(decayed, whole * 0.5 ** (3 - depth(path)), rtol=1e-2, atol=1e-7)


def same(one, other):
    return np.asarray(one).tobytes() == np.asarray(other).tobytes()


def changed(before, after):
    """The depths at which leaves are no longer the same."""
    before, after = flatten(before), flatten(after)
    assert before.keys() == after.keys()
    return {depth(path) for path, leaf in before.items() if not same(leaf, after[path])}


@pytest.mark.parametrize("take", [train_step, accumulated_step])
def test_frozen_blocks_stay_to_the_bit(batch, take):
    start = start_of(blocks=1)
    given = (batch,) if take is accumulated_step else batch
    state, _ = trained(start, given, steps=2, take=take)
    params = collapse(start.assemble, state.trainable, start.frozen)
    assert changed(initial()["params"], params) == {2, 3}
    assert changed(initial()["batch_stats"], state.batch_stats) == {2}


def test_frozen_batch_norms_use_their_running_statistics_and_others_the_batchs(batch):
    start = start_of(blocks=1)
    assert start.still_norms == ("block1_norm", "stem_norm")
    losses = []
    for place in ("stem", "block1", "block2"):
        stats = start.batch_stats
        shifted = jax.tree.map(lambda leaf: leaf + 0.5, stats[f"{place}_norm"])
        stats = {**stats, f"{place}_norm": shifted}
        losses.append(trained(dataclasses.replace(start, batch_stats=stats), batch)[1])
    unchanged = trained(start, batch)[1]
    assert [loss == unchanged for loss in losses] == [False, False, True]


def test_what_is_frozen_has_no_moments_and_its_activations_are_not_kept(batch):
    sizes = []
    for blocks in (0, 1):
        start = start_of(blocks=blocks)
        given = arguments(start, batch)
        assert set(given[1].opt_state[0].mu["params"]) == set(start.trainable["params"])
        sizes.append(train_step.lower(*given).compile().memory_analysis().temp_size_in_bytes)
    assert sizes[1] < 0.7 * sizes[0]


def test_without_known_blocks_all_is_trained_at_one_rate():
    start = by_block(parameterization.fine_tune(initial()), {}, layer_decay=1.0)
    assert start.frozen == {"params": {}} and start.still_norms == ()
