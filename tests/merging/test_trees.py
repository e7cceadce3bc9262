import flax.core
import hypothesis
import hypothesis.strategies as st
import pytest

from medmerge_jax.merging import flatten, nest_like, network_order, unflatten
from medmerge_jax.merging.trees import without_head

_names = st.text("abc019_.é", min_size=1, max_size=4)
_trees = st.recursive(
    st.dictionaries(_names, st.integers(), min_size=1, max_size=4),
    lambda children: st.dictionaries(_names, st.integers() | children, min_size=1, max_size=4),
    max_leaves=12,
)


@hypothesis.given(_trees)
def test_unflatten_undoes_flatten(tree):
    assert unflatten(flatten(tree)) == tree
    assert nest_like(flatten(tree), tree) == tree


def test_paths_and_order_of_any_mapping():
    tree = flax.core.freeze({"layer1": {"0": {"conv2": {"kernel": 1}}}, "bn1": {"scale": 2}})
    assert flatten(tree) == {"layer1/0/conv2/kernel": 1, "bn1/scale": 2}
    assert list(flatten({"b": 1, "a": {"d": 2, "c": 3}})) == ["b", "a/d", "a/c"]


def test_the_backbone_is_all_but_the_head_of_every_collection():
    tree = {"params": {"conv1": {"kernel": 1}, "head": {"kernel": 2}}, "batch_stats": {"head": 3}}
    assert without_head(flax.core.freeze(tree)) == {
        "params": {"conv1": {"kernel": 1}},
        "batch_stats": {},
    }
    assert tree["params"]["head"] == {"kernel": 2}


def test_empty_mappings_leave_no_trace():
    assert flatten({}) == {}
    assert unflatten({}) == {}
    assert flatten({"a": {}, "b": {"c": {}, "d": 1}}) == {"b/d": 1}
    assert nest_like({"b/d": 1}, {"a": {}, "b": {"c": {}, "d": 0}}) == {"b": {"d": 1}}


def test_integer_keys_are_written_in_decimals_and_kept_by_nest_like():
    tree = {"layers": {0: {"kernel": 1}, 10: {"kernel": 2}}}
    flat = flatten(tree)
    assert flat == {"layers/0/kernel": 1, "layers/10/kernel": 2}
    assert nest_like(flat, tree) == tree
    assert unflatten(flat) == {"layers": {"0": {"kernel": 1}, "10": {"kernel": 2}}}


def test_keys_with_the_separator_are_haikus_and_come_back():
    tree = {"res_net/~/conv": {"w": 1}, "res_net/~/bn": {"scale": 2}}
    assert flatten(tree) == {"res_net/~/conv/w": 1, "res_net/~/bn/scale": 2}
    assert nest_like(flatten(tree), tree) == tree
    with pytest.raises(ValueError, match="two leaves have the path 'a/b'"):
        flatten({"a/b": 1, "a": {"b": 2}})


def test_like_a_frozen_dict_the_result_is_one():
    tree = flax.core.freeze({"conv1": {"kernel": 1}, "head": {"kernel": 2}})
    nested = nest_like(flatten(tree), tree)
    assert isinstance(nested, flax.core.FrozenDict) and nested == tree
    backbone = without_head(flax.core.freeze({"params": tree}))
    assert isinstance(backbone, flax.core.FrozenDict)


@pytest.mark.parametrize("key", ["", None, 1.5, ("a",), True])
def test_keys_that_cannot_be_part_of_a_path(key):
    with pytest.raises(ValueError, match="under 'conv/' cannot be part of a path"):
        flatten({"conv": {key: 1}})


def test_keys_that_make_the_same_path():
    with pytest.raises(ValueError, match="'a/0'"):
        flatten({"a": {0: 1, "0": 2}})


def test_not_a_mapping():
    with pytest.raises(ValueError, match="found list"):
        flatten([1, 2])


@pytest.mark.parametrize("paths", [("a", "a/b"), ("a/b", "a"), ("a/b/c", "a/b"), ("a/b", "a/b/c")])
def test_a_leaf_that_is_also_a_node(paths):
    with pytest.raises(ValueError, match="also the beginning of another path"):
        unflatten(dict.fromkeys(paths, 0))


@pytest.mark.parametrize("path", ["", "/a", "a/", "a//b", 3])
def test_not_a_path(path):
    with pytest.raises(ValueError, match="is not a path"):
        unflatten({path: 0})


def test_network_order_of_a_residual_network():
    ordered = [
        "conv1/kernel",
        "layer1/0/conv1/kernel",
        "layer1/0/conv2/kernel",
        "layer1/0/conv3/kernel",
        "layer1/0/downsample/0/kernel",
        "layer1/2/conv1/kernel",
        "layer1/10/conv1/kernel",
        "layer2/0/conv1/kernel",
        "layer10/0/conv1/kernel",
    ]
    assert sorted(sorted(ordered), key=network_order) == ordered


def test_network_order_of_a_densenet():
    ordered = [
        "features/conv0/kernel",
        "features/denseblock1/denselayer1/conv1/kernel",
        "features/denseblock1/denselayer1/conv2/kernel",
        "features/denseblock1/denselayer2/conv1/kernel",
        "features/denseblock1/denselayer12/conv1/kernel",
        "features/transition1/conv/kernel",
        "features/denseblock2/denselayer1/conv1/kernel",
        "features/transition2/conv/kernel",
        "features/denseblock3/denselayer1/conv1/kernel",
    ]
    assert sorted(sorted(ordered), key=network_order) == ordered
