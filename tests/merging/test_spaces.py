import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.parameters import some_quick, some_slow

from medmerge_jax.merging import flatten, network_order, unflatten
from medmerge_jax.merging.spaces import find_spaces
from medmerge_jax.models import create_model, get_spec, list_models
from medmerge_jax.models.densenet import DenseNet
from medmerge_jax.models.resnet import BasicBlock, Bottleneck, CifarResNet, ResNet

ONE_OF_EACH_KIND = ("resnet18", "resnet50", "densenet121", "resnet20")
CONVOLUTIONAL = [n for n in list_models() if get_spec(n).spaces and get_spec(n).stem_norm]
ALL = some_quick(CONVOLUTIONAL, *ONE_OF_EACH_KIND)


@functools.cache
def shapes(name, num_classes=3):
    model = create_model(name, num_classes)
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)


def by_name(variables):
    return {space.name: space for space in find_spaces(variables)}


def places_of(space, path):
    return {
        (place.path, place.axis, place.role): place.positions.tolist()
        for place in space.places
        if place.path.endswith(path)
    }


@pytest.mark.parametrize("num_classes", some_slow((3, 0), 0))
@pytest.mark.parametrize("name", ALL)
def test_every_hidden_axis_is_some_spaces_exactly_once(name, num_classes):
    variables = shapes(name, num_classes)
    flat, counts, roles = flatten(variables), {}, {}
    for space in find_spaces(variables):
        for place in space.places:
            size = flat[place.path].shape[place.axis]
            assert place.positions.shape == (space.size,)
            count = counts.setdefault((place.path, place.axis), np.zeros(size, int))
            np.add.at(count, place.positions, 1)
            roles.setdefault((place.path, place.axis), set()).add(place.role)
    assert all(np.all(count == 1) for count in counts.values())

    wanted = {}
    for path, leaf in flat.items():
        if path.startswith("params/head"):
            wanted |= {(path, 0): {"in"}} if leaf.ndim == 2 else {}
        elif leaf.ndim == 4:
            # The first convolution reads the images' channels, which are no hidden units.
            wanted |= {(path, 2): {"in"}} if leaf.shape[2] > 3 else {}
            wanted[path, 3] = {"out"}
        else:
            wanted[path, 0] = {"scale"}
    assert roles == wanted


@pytest.mark.parametrize("name", ALL)
def test_spaces_are_in_network_order_and_named_after_their_first_producer(name):
    spaces = find_spaces(shapes(name))
    names = [space.name for space in spaces]
    assert names == sorted(names, key=network_order)
    assert len(set(names)) == len(names)
    for space in spaces:
        producers = [place.path for place in space.places if place.role == "out"]
        assert producers[0] == f"params/{space.name}/kernel"
        assert producers == sorted(producers, key=network_order)


SMALL = {
    "basic blocks": ResNet(BasicBlock, (2, 1, 1, 1), 0),
    "bottlenecks": ResNet(Bottleneck, (2, 1, 1, 1), 0),
    "padded shortcuts": CifarResNet(1, 0),
    "dense blocks": DenseNet((1, 2), 12, 24, 0),
}


def quickly(function):
    """Compiled sooner: it runs for a moment."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


@pytest.mark.parametrize(
    "name",
    some_quick([*SMALL, *ONE_OF_EACH_KIND], "dense blocks"),
)
def test_units_put_in_another_order_are_so_at_their_taps(name, rng):
    model = SMALL[name] if name in SMALL else create_model(name, 0)
    images = rng.normal(size=(2, 64, 64, 3)).astype(np.float32)
    variables = quickly(model.init)(jax.random.key(0), images)
    spaces = find_spaces(variables)
    orders = [rng.permutation(space.size) for space in spaces]
    flat = {path: np.array(leaf) for path, leaf in flatten(variables).items()}
    for space, order in zip(spaces, orders, strict=True):
        for place in space.places:
            units = np.moveaxis(flat[place.path], place.axis, 0)
            units[place.positions] = units[place.positions[order]]

    modules = {tap.module for space in spaces for tap in space.taps}

    @quickly
    def outputs(variables):
        _, state = model.apply(
            variables,
            images,
            capture_intermediates=lambda module, _: "/".join(module.path) in modules,
            mutable=["intermediates"],
        )
        return state["intermediates"]

    before = flatten(outputs(variables))
    after = flatten(outputs(unflatten(flat)))
    assert len(before) == len(modules)
    for space, order in zip(spaces, orders, strict=True):
        for tap in space.taps:
            (old,), (new,) = (found[f"{tap.module}/__call__"] for found in (before, after))
            wanted = old[..., tap.positions[order]]
            scale = float(jnp.abs(old).max())
            np.testing.assert_allclose(new[..., tap.positions], wanted, atol=1e-5 * scale)
            assert np.ptp(wanted, axis=-1).max() > 1e-2 * scale


def test_residual_stream_of_a_basic_resnet():
    spaces = by_name(shapes("resnet18"))
    stem = spaces["conv1"]
    assert {p.path for p in stem.places if p.role == "out"} == {
        "params/conv1/kernel",
        "params/layer1/0/conv2/kernel",
        "params/layer1/1/conv2/kernel",
    }
    assert {p.path for p in stem.places if p.role == "in"} == {
        "params/layer1/0/conv1/kernel",
        "params/layer1/1/conv1/kernel",
        "params/layer2/0/conv1/kernel",
        "params/layer2/0/downsample/0/kernel",
    }
    assert [(tap.module, tap.activation) for tap in stem.taps] == [
        ("bn1", "relu"),
        ("layer1/0", ""),
        ("layer1/1", ""),
    ]
    last = spaces["layer4/0/conv2"]
    assert [p.path for p in last.places if p.role == "in"] == [
        "params/layer4/1/conv1/kernel",
        "params/head/kernel",
    ]
    assert [p.path for p in last.places if p.role == "out"][:2] == [
        "params/layer4/0/conv2/kernel",
        "params/layer4/0/downsample/0/kernel",
    ]


def test_units_inside_a_block_are_a_space_of_their_own():
    space = by_name(shapes("resnet50"))["layer2/1/conv2"]
    assert [(p.path, p.axis, p.role) for p in space.places] == [
        ("params/layer2/1/conv2/kernel", 3, "out"),
        ("params/layer2/1/bn2/scale", 0, "scale"),
        ("params/layer2/1/bn2/bias", 0, "scale"),
        ("batch_stats/layer2/1/bn2/mean", 0, "scale"),
        ("batch_stats/layer2/1/bn2/var", 0, "scale"),
        ("params/layer2/1/conv3/kernel", 2, "in"),
    ]
    assert [(tap.module, tap.activation) for tap in space.taps] == [("layer2/1/bn2", "relu")]


def test_padded_shortcut_keeps_the_narrow_stream_in_the_middle():
    spaces = by_name(shapes("resnet20"))
    stem, second, third = (spaces[n] for n in ("conv1", "layer2/0/conv2", "layer3/0/conv2"))
    edges = [*range(8), *range(24, 32)]
    assert (stem.size, second.size, third.size) == (16, 16, 32)
    assert list(places_of(stem, "layer1/2/bn2/scale").values()) == [list(range(16))]
    assert list(places_of(stem, "layer2/1/bn2/var").values()) == [list(range(8, 24))]
    assert list(places_of(second, "layer2/1/bn2/var").values()) == [edges]
    assert list(places_of(stem, "head/kernel").values()) == [list(range(24, 40))]
    assert list(places_of(second, "head/kernel").values()) == [[16 + i for i in edges]]
    assert list(places_of(third, "head/kernel").values()) == [[*range(16), *range(48, 64)]]
    assert places_of(stem, "layer2/0/conv1/kernel") == {
        ("params/layer2/0/conv1/kernel", 2, "in"): list(range(16))
    }


def test_slices_of_a_concatenation():
    spaces = by_name(shapes("densenet121"))
    block = "features/denseblock1/denselayer"
    new = spaces[f"{block}2/conv2"]
    assert places_of(new, "kernel") == {
        (f"params/{block}2/conv2/kernel", 3, "out"): list(range(32)),
        **{(f"params/{block}{i}/conv1/kernel", 2, "in"): list(range(96, 128)) for i in range(3, 7)},
        ("params/features/transition1/conv/kernel", 2, "in"): list(range(96, 128)),
    }
    assert len(places_of(new, "norm1/mean")) == 4
    assert list(places_of(new, "transition1/norm/mean").values()) == [list(range(96, 128))]
    last = spaces["features/denseblock4/denselayer16/conv2"]
    assert list(places_of(last, "head/kernel").values()) == [list(range(992, 1024))]
    assert list(places_of(last, "norm5/scale").values()) == [list(range(992, 1024))]
    assert [(t.module, t.activation) for t in spaces["features/transition1/conv"].taps] == [
        ("features/transition1", "")
    ]


def test_without_statistics_or_head():
    variables = shapes("resnet20", 0)
    params_only = find_spaces({"params": variables["params"]})
    paths = {place.path for space in params_only for place in space.places}
    assert paths == {f"params/{path}" for path in flatten(variables["params"])}
    assert [s.name for s in params_only] == [s.name for s in find_spaces(variables)]


def changed(name, path, leaf):
    """The variables' shapes with the leaf at `path` removed, or replaced or added."""
    flat = flatten(shapes(name))
    flat.pop(path, None)
    return unflatten(flat | ({} if leaf is None else {path: leaf}))


@pytest.mark.parametrize(
    ("name", "path", "shape", "message"),
    [
        ("resnet18", "params/layer1/0/conv1/kernel", None, "known for ResNet .* and DenseNet"),
        ("resnet50", "params/layer2/0/conv2/kernel", None, "layer2/0/bn2.* has no part"),
        ("resnet18", "params/layer2/0/conv2/kernel", None, "layer2/0 has 1 convolutions; 2 or"),
        ("resnet18", "params/layer3/1/bn2/scale", None, "params/layer3/1/bn2/scale is absent"),
        ("resnet18", "batch_stats/bn1/var", None, "batch_stats/bn1/var is absent"),
        ("resnet18", "params/layer1/0/se/kernel", (64, 4), "layer1/0/se/kernel has no part"),
        ("resnet50", "params/layer1/0/conv2/kernel", (3, 3, 60, 64), r"64 channels .* axis 2"),
        ("resnet50", "params/layer1/0/conv2/kernel", (64, 64), r"\(64, 64\); \(height, width"),
        ("resnet50", "params/layer1/1/conv3/kernel", (1, 1, 64, 128), r"128\).*256 channels"),
        ("resnet50", "params/head/kernel", (64, 3), r"\(64, 3\), but 2048 channels"),
        ("densenet121", "params/features/conv0/kernel", None, "known for ResNet"),
        ("densenet121", "params/features/transition2/conv/kernel", None, "is absent"),
        (
            "densenet121",
            "params/features/denseblock2/denselayer3/norm1/scale",
            (128,),
            r"denselayer3/norm1/scale: shape \(128,\), but 192 channels were expected on axis 0",
        ),
    ],
)
def test_networks_that_are_not_known(name, path, shape, message):
    leaf = None if shape is None else jax.ShapeDtypeStruct(shape, jnp.float32)
    with pytest.raises(ValueError, match=message):
        find_spaces(changed(name, path, leaf))


def test_variables_without_params():
    with pytest.raises(ValueError, match='collection "params"'):
        find_spaces(shapes("resnet20")["params"])
