"""`mm.merge`: every merger by its name, on one of the registered architectures."""

import dataclasses
import functools
import importlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_models, tiny_config
from helpers.parameters import some_slow
from helpers.tiny_config import ARCHITECTURE

import medmerge_jax as mm
from medmerge_jax import merging
from medmerge_jax.merging.trees import flatten, unflatten, without_head
from medmerge_jax.models import mergers, statistics, vit
from medmerge_jax.models.registry import MODELS, register

# For what is compiled to run a few times.
QUICK = {"xla_backend_optimization_level": 0}

variables_of = functools.partial(random_models.variables_of, architecture=ARCHITECTURE)


@pytest.fixture(scope="module", autouse=True)
def small_architecture():
    tiny_config.register_architecture()


@pytest.fixture(scope="module")
def parents():
    return variables_of(0), variables_of(1)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(2).normal(size=(12, 16, 16, 3)).astype(np.float32)


def options_of(method, num_parents):
    if method == "weighted":
        return {"weights": [1 / num_parents] * num_parents}
    whole = {"ties": {"density": 1.0}, "dare": {"drop": 0.0}}.get(method, {})  # nothing is dropped
    if "ancestor" in mergers.merger_options(method):
        return {"ancestor": variables_of(9), **whole}
    return {}


@functools.partial(jax.jit, static_argnums=0)
def logits(architecture, variables, images):
    return mm.create_model(architecture, num_classes=4).apply(variables, images, train=False)


def assert_trees_close(found, wanted, tolerance):
    found, wanted = flatten(found), flatten(wanted)
    assert found.keys() == wanted.keys()
    for path, leaf in wanted.items():
        scale = np.abs(leaf).max()
        np.testing.assert_allclose(found[path], leaf, rtol=0, atol=tolerance * scale, err_msg=path)


def test_names():
    assert mm.list_mergers() == [
        "uniform", "weighted", "slerp", "task_arithmetic", "ties", "dare", "fisher",
        "weight_matching", "activation_matching", "zipit", "matched_averaging",
    ]  # fmt: skip
    need_images = {name for name, entry in mergers.MERGERS.items() if entry.needs_images}
    assert need_images == {"fisher", "activation_matching", "zipit"}


def test_the_documentation_lists_all_mergers_with_their_options():
    lines = [line.strip() for line in mm.merge.__doc__.splitlines()]
    assert "- `uniform`: The mean." in lines
    assert "- `zipit` (alpha=0.3, beta=0.125): Hidden units merged across and within models " in (
        mm.merge.__doc__
    )
    for method in mm.list_mergers():
        assert any(line.startswith(f"- `{method}`") for line in lines)


def test_the_function_stays_a_function():
    """The program `medmerge_jax.merge` has the function's name, and is no module to import."""
    with pytest.raises(ImportError, match=r"the function is mm\.merge"):
        importlib.import_module("medmerge_jax.merge")
    assert mm.merge is mergers.merge
    one = variables_of(0)
    assert_trees_close(mm.merge("uniform", ARCHITECTURE, [one]), one, 0)


@pytest.mark.parametrize(
    ("method", "num_parents"),
    [
        # Each number of parents compiles another network where images are seen.
        pytest.param(name, n, marks=pytest.mark.slow if one.needs_images and n != 2 else ())
        for name, one in mergers.MERGERS.items()
        for n in ((1, 2) if name == "slerp" else (1, 2, 3))
    ],
)
def test_identical_parents_are_a_fixed_point(method, num_parents, images):
    one = variables_of(0)
    options = options_of(method, num_parents)
    merged = mm.merge(method, ARCHITECTURE, [one] * num_parents, images[:4], **options)
    assert_trees_close(merged, one, 5e-7)


@pytest.mark.parametrize("architecture", some_slow((ARCHITECTURE, "resnet20"), "resnet20"))
@pytest.mark.parametrize("method", ["weight_matching", "activation_matching", "zipit"])
def test_a_permuted_copy_is_the_same_network(method, architecture):
    one = variables_of(0, architecture=architecture)
    # Fewer would leave units that are awake at one place alone, and not to be told apart.
    images = np.random.default_rng(2).normal(size=(48, 16, 16, 3)).astype(np.float32)
    order = merging.random_permutations(merging.find_spaces(one), 3)
    merged = mm.merge(
        method, architecture, (one, merging.permute_variables(one, order)), images, batch_size=12
    )
    wanted = logits(architecture, one, images)
    found = logits(architecture, merged, images)
    difference = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    assert difference < 1e-5


@pytest.mark.parametrize("method", mergers.MERGERS)
def test_the_order_and_kind_of_arrays_do_not_matter(method, parents, images):
    """A model read from a file has its tensors in another order than one that JAX returned."""
    options = options_of(method, 2)
    if "ancestor" in options:  # a scale that does not make the ancestor vanish
        options["scale"] = 0.4
    found = []
    for kind in (jnp.asarray, np.asarray):
        flats = [flatten(parent) for parent in parents]
        paths = sorted(flats[0], reverse=kind is np.asarray)
        trees = [unflatten({path: kind(flat[path]) for path in paths}) for flat in flats]
        found.append(mm.merge(method, ARCHITECTURE, trees, images[:4], recalibrate=True, **options))
    assert_trees_close(*found, 0)


def test_methods_are_the_functions(parents, images):
    a, b = parents
    found = mm.merge("weighted", ARCHITECTURE, parents, weights=[0.25, 0.75])
    assert_trees_close(found, merging.weighted_average(parents, [0.25, 0.75]), 0)
    found = mm.merge("slerp", ARCHITECTURE, parents, t=0.2)
    assert_trees_close(found, merging.slerp(parents, 0.2), 0)
    ancestor = variables_of(9)
    found = mm.merge("task_arithmetic", ARCHITECTURE, parents, ancestor=ancestor, scale=0.4)
    assert_trees_close(found, merging.task_arithmetic(ancestor, parents, 0.4), 0)
    found = mm.merge("ties", ARCHITECTURE, parents, ancestor=ancestor, density=0.3, scale=0.4)
    assert_trees_close(found, merging.ties(ancestor, parents, density=0.3, scale=0.4), 0)
    found = mm.merge("dare", ARCHITECTURE, parents, ancestor=ancestor, drop=0.5, seed=3)
    assert_trees_close(found, merging.dare(ancestor, parents, drop=0.5, seed=3), 0)
    order = merging.weight_matching(a, b, seed=0)
    wanted = merging.weighted_average([a, merging.permute_variables(b, order)], [0.1, 0.9])
    found = mm.merge("weight_matching", ARCHITECTURE, parents, weights=[0.1, 0.9])
    assert_trees_close(found, wanted, 1e-6)
    found = mm.merge("matched_averaging", ARCHITECTURE, parents)
    assert_trees_close(found, merging.matched_averaging(parents), 0)


@pytest.mark.slow
def test_fisher_weights_are_of_each_parents_own_classes(parents, images):
    """Heads of other classes are used, then left out."""
    other = variables_of(5, num_classes=3)
    found = mm.merge("fisher", ARCHITECTURE, (parents[0], other), images[:3], heads="drop")
    fishers = []
    for variables, classes in ((parents[0], 4), (other, 3)):
        model = mm.create_model(ARCHITECTURE, num_classes=classes)
        total = jax.tree.map(np.zeros_like, variables["params"])

        def log_p(params, image, model=model, variables=variables):
            values = {**variables, "params": params}
            return jax.nn.log_softmax(model.apply(values, image[None], train=False))[0]

        jacobian = jax.jit(jax.jacrev(log_p), compiler_options=QUICK)
        log_p = jax.jit(log_p)
        for image in images[:3]:
            p = np.exp(log_p(variables["params"], image))
            total = jax.tree.map(
                lambda sum_, grads, p=p: sum_ + np.tensordot(p, np.square(grads), 1) / 3,
                total,
                jacobian(variables["params"], image),
            )
        fishers.append({"params": {k: v for k, v in total.items() if k != "head"}})
    backbones = [without_head(variables) for variables in (parents[0], other)]
    assert_trees_close(found, merging.fisher_average(backbones, fishers), 1e-4)
    assert "head" not in found["params"]


@pytest.mark.slow
def test_fisher_of_a_parent_with_several_labels(parents, images):
    """Its labels are independent, so that their Fisher informations add up."""
    a, b = parents
    found = mm.merge("fisher", ARCHITECTURE, parents, images[:2], multilabel=[False, True])
    wrong = mm.merge("fisher", ARCHITECTURE, parents, images[:2])
    model = mm.create_model(ARCHITECTURE, num_classes=4)
    total = jax.tree.map(np.zeros_like, b["params"])

    def logits(params, image):
        return model.apply({**b, "params": params}, image[None], train=False)[0]

    jacobian = jax.jit(jax.jacrev(logits), compiler_options=QUICK)
    logits = jax.jit(logits)
    for image in images[:2]:
        p = np.asarray(jax.nn.sigmoid(logits(b["params"], image)))
        # p (1 - p)² + (1 - p) p² = p (1 - p)
        total = jax.tree.map(
            lambda t, grads, p=p: t + np.tensordot(p * (1 - p), np.square(grads), 1) / 2,
            total,
            jacobian(b["params"], image),
        )
    first = mm.merge("fisher", ARCHITECTURE, [a], images[:2])
    assert_trees_close(first, a, 5e-7)
    bias = "params/head/bias"
    fishers = [{"params": merging.diagonal_fisher(softmax_of(a), a["params"], [images[:2]])}]
    fishers.append({"params": total})
    assert_trees_close(found, merging.fisher_average(parents, fishers), 1e-4)
    assert np.abs(flatten(found)[bias] - flatten(wrong)[bias]).max() > 1e-3


def softmax_of(variables):
    model = mm.create_model(ARCHITECTURE, num_classes=4)

    def log_probs(params, inputs):
        return jax.nn.log_softmax(model.apply({**variables, "params": params}, inputs, train=False))

    return log_probs


def test_recalibration(parents, images):
    """One batch of all images: its own mean and unbiased variance."""
    plain = mm.merge("uniform", ARCHITECTURE, parents)
    found = mm.merge("uniform", ARCHITECTURE, parents, images, recalibrate=True, batch_size=12)
    assert_trees_close(found["params"], plain["params"], 0)
    model = mm.create_model(ARCHITECTURE, num_classes=4)
    zeros = jax.tree.map(jnp.zeros_like, plain["batch_stats"])
    _, new = model.apply(
        {**plain, "batch_stats": zeros}, images, train=True, mutable=["batch_stats"]
    )
    wanted = jax.tree.map(lambda leaf: leaf * 10, new["batch_stats"])
    assert_trees_close(found["batch_stats"], wanted, 1e-5)


def test_statistics_of_a_model_without_any(parents, images):
    """Whatever they were: those of the batches."""
    variables = parents[0]
    bare = {"params": variables["params"], "batch_stats": {}}
    assert statistics.lacks_statistics(ARCHITECTURE, bare)
    assert not statistics.lacks_statistics(ARCHITECTURE, variables)
    found = statistics.with_statistics(ARCHITECTURE, bare, images, batch_size=6)
    wanted = mm.merge("uniform", ARCHITECTURE, [variables], images, recalibrate=True, batch_size=6)
    assert_trees_close(found, wanted, 1e-6)
    with pytest.raises(ValueError, match="images"):
        statistics.with_statistics(ARCHITECTURE, bare, images[0])


def test_dtypes(parents, images):
    halves = [jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), parent) for parent in parents]
    for method in ("uniform", "weight_matching", "zipit"):
        merged = mm.merge(method, ARCHITECTURE, halves, images)
        assert {leaf.dtype for leaf in flatten(merged).values()} == {jnp.dtype(jnp.bfloat16)}


def changed(variables, path, change):
    flat = flatten(variables)
    flat[path] = change(np.array(flat[path]))
    return unflatten(flat)


def put_nan(array):
    array.flat[3] = np.nan
    return array


BAD = {
    "other architecture": (
        lambda a: {**a, "params": {**a["params"], "layer4": a["params"]["layer3"]}},
        "params/layer4/0/.*absent in resnet8.*parent 1",
    ),
    "other width": (
        lambda a: changed(a, "params/layer1/0/conv1/kernel", lambda x: x[..., :8]),
        r"layer1/0/conv1/kernel: shape \(3, 3, 16, 16\).*shape \(3, 3, 16, 8\) in parent 1",
    ),
    "other classes": (
        lambda a: variables_of(1, num_classes=7),
        "the heads differ: parent 0 has 4 classes, parent 1 has 7 classes.*heads='drop'",
    ),
    "no head": (
        without_head,
        "parent 0 has 4 classes, parent 1 has no head",
    ),
    "NaN": (
        lambda a: changed(a, "params/layer2/0/conv1/kernel", put_nan),
        "params/layer2/0/conv1/kernel in parent 1: 1 of 4608 numbers are NaN",
    ),
    "NaN in the head": (
        lambda a: changed(a, "params/head/kernel", put_nan),
        "params/head/kernel in parent 1: 1 of 256 numbers are NaN",
    ),
    "integers": (
        lambda a: changed(a, "params/bn1/scale", lambda x: x.astype(np.int32)),
        "params/bn1/scale in parent 1 is of dtype int32; a floating-point array is wanted",
    ),
    "not variables": (
        lambda a: a["params"],
        'parent 1 is not a mapping with a collection "params"',
    ),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("method", ["uniform", "zipit"])
def test_parents_that_cannot_be_merged(parents, images, case, method):
    spoil, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        mm.merge(method, ARCHITECTURE, (parents[0], spoil(parents[1])), images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "zippit"}, "there is no merger 'zippit'; did you mean 'zipit'"),
        ({"architecture": "resnet21"}, "there is no model 'resnet21'"),
        ({"method": "slerp", "alpha": 1}, "'slerp' has no option 'alpha'; its options are t"),
        ({"alpha": 1}, "'uniform' has no option 'alpha'; it has none"),
        ({"method": "weighted"}, "'weighted' wants the option 'weights'"),
        ({"method": "weighted", "weights": [0.5, 0.6]}, "the weights sum to 1.1"),
        ({"method": "zipit", "images": None}, "the merger 'zipit' wants images"),
        ({"recalibrate": True, "images": None}, "recalibration wants images"),
        ({"images": np.zeros((3, 8, 8))}, r"images of shape \(3, 8, 8\); \(n, h, w, 3\)"),
        ({"images": np.zeros((0, 8, 8, 3))}, r"images of shape \(0, 8, 8, 3\)"),
        ({"images": np.zeros((2, 8, 8, 3), np.uint8)}, "images of dtype uint8.*normalised"),
        ({"images": np.full((2, 8, 8, 3), np.nan)}, "the images hold NaN"),
        ({"batch_size": 0}, "batch_size is 0; at least 1 is wanted"),
        ({"heads": "keep"}, "heads is 'keep'; one of merge, drop is wanted"),
        ({"parents": []}, "0 parents; one or more are wanted"),
        ({"parents": {"a": 1}}, "parents is a mapping; a sequence"),
        ({"method": "slerp", "parents": 3}, "3 parents; slerp is between two"),
    ],
)
def test_arguments_that_cannot_be_used(parents, images, arguments, message):
    given = {
        "method": "uniform",
        "architecture": ARCHITECTURE,
        "parents": parents,
        "images": images,
    }
    given |= arguments
    if given["parents"] == 3:
        given["parents"] = [*parents, parents[0]]
    method, architecture, models = (
        given.pop(name) for name in ("method", "architecture", "parents")
    )
    with pytest.raises(ValueError, match=message):
        mm.merge(method, architecture, models, **given)


def test_aligning_with_heads_keeps_the_function(parents):
    a, _ = parents
    order = merging.random_permutations(merging.find_spaces(a), 3)
    permuted = merging.permute_variables(a, order)
    assert_trees_close(mergers.align(ARCHITECTURE, a, permuted, heads="merge"), a, 0)
    with pytest.raises(ValueError, match="heads is 'keep'; one of merge, drop is wanted"):
        mergers.align(ARCHITECTURE, a, permuted, heads="keep")


def test_negative_weights_are_refused_before_there_are_parents():
    mergers.check_options("weighted", 2, {"weights": [1.5, -0.5]})  # an extrapolation
    with pytest.raises(ValueError, match="negative"):
        mergers.check_options("matched_averaging", 2, {"weights": [1.5, -0.5]})


def test_aligning_ignores_heads(parents):
    a, _ = parents
    order = merging.random_permutations(merging.find_spaces(a), 3)
    permuted = merging.permute_variables(a, order)
    other_head = {**permuted, "params": {**permuted["params"], "head": {"bias": np.zeros(9)}}}
    aligned = mergers.align(ARCHITECTURE, a, other_head)
    assert_trees_close(aligned, without_head(a), 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "slow", "exact": True, "steps": 3, "share": 1, "shares": (0.5, 1)}, ""),
        ({"mode": 1}, "'mode' is 1; str is wanted"),
        ({"exact": 1}, "'exact' is 1; bool is wanted"),
        ({"steps": 0.5}, "'steps' is 0.5; wanted: a whole number from 0 on"),
        ({"steps": 3.0}, "'steps' is 3.0; wanted: a whole number from 0 on"),  # range(3.0) fails
        ({"share": (0.5, 0.5)}, r"'share' is \(0.5, 0.5\); one number is wanted"),
        ({"share": True}, "'share' is True; wanted: finite numbers"),
        ({"shares": 0.5}, "'shares' is 0.5; a sequence with one number for each parent is wanted"),
        ({"shares": ("a", "b")}, "'shares' is .*; wanted: finite numbers"),
        ({"step": 1}, "the merger 'mine' has no option 'step'; its options are mode, exact, steps"),
    ],
)
def test_options_are_of_the_types_in_the_signature(monkeypatch, options, words):
    monkeypatch.setattr(mergers.MERGERS, "_entries", dict(mergers.MERGERS))

    @mergers.merger
    def mine(
        task,
        *,
        mode: str = "fast",
        exact: bool = False,
        steps: int = 1,
        share: float = 0.5,
        shares: Sequence[float] | None = None,
    ):
        raise AssertionError

    if not words:
        mergers.check_options("mine", 2, options)
    else:
        with pytest.raises(ValueError, match=words):
            mergers.check_options("mine", 2, options)


@pytest.fixture
def transformer():
    """Name of a small one."""
    name = "vit_of_one_block"
    build = functools.partial(vit.VisionTransformer, 8, 1, 2, grid=2)
    own = {"name": name, "build": build, "num_features": 8, "tie": functools.partial(vit.tie, 2)}
    own["spaces"] = functools.partial(vit.spaces, 2)
    register(dataclasses.replace(MODELS["deit_tiny_patch16_224"], **own))
    yield name
    del MODELS._entries[name]


def test_repaired_layers_have_the_parents_moments(transformer, rng):
    """Over images and tokens, each measured with those before it repaired."""
    images = rng.normal(size=(6, 32, 32, 3)).astype(np.float32)
    model = mm.create_model(transformer, 0)
    both = [random_models.variables_of(seed, 2, transformer) for seed in (0, 1)]
    options = {"weights": (0.25, 0.75), "heads": "drop", "batch_size": 3}
    merged = mm.merge("weighted", transformer, both, images, repair=True, **options)

    @jax.jit
    def outputs(variables):
        _, state = model.apply(variables, images, capture_intermediates=True)
        return state["intermediates"]

    b, c, found = (flatten(outputs(one)) for one in (*map(without_head, both), merged))
    layers = ["patch_embed/proj", *(f"blocks/0/{x}" for x in ("attn/qkv", "attn/proj"))]
    for layer in (*layers, "blocks/0/mlp/fc1", "blocks/0/mlp/fc2"):
        moments = []
        for one in (b, c, found):
            y = np.asarray(one[f"{layer}/__call__"][0])
            axes = tuple(range(y.ndim - 1))
            moments.append((y.mean(axes), y.std(axes)))
        for of_b, of_c, of_merged in zip(*moments, strict=True):
            wanted = 0.25 * of_b + 0.75 * of_c
            np.testing.assert_allclose(of_merged, wanted, rtol=1e-3, atol=1e-4, err_msg=layer)


def test_a_permuted_copy_has_nothing_to_repair(transformer, rng):
    """It would have, were units compared with those of the copy as it was."""
    images = rng.normal(size=(3, 32, 32, 3)).astype(np.float32)
    one = random_models.variables_of(0, 2, transformer)
    one = jax.tree.map(lambda x: x + rng.normal(0, 0.5, x.shape).astype(np.float32), one)
    spaces = vit.spaces(2, one)
    orders = merging.random_permutations(spaces, seed=1)
    copy = merging.permute_variables(one, orders, spaces)
    merged = mm.merge("weight_matching", transformer, (one, copy), images, repair=True)
    for path, leaf in flatten(merged).items():
        np.testing.assert_allclose(leaf, flatten(one)[path], rtol=1e-3, atol=1e-4, err_msg=path)


def test_moments_of_uneven_batches_are_those_of_all_images(rng):
    values = rng.normal(3, 2, (7, 5))
    parts = [(part.mean(0), part.var(0)) for part in (values[:4], values[4:])]
    mean, variance = statistics._joined(parts, [4, 3])
    np.testing.assert_allclose(mean, values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(variance, values.var(0), rtol=1e-12)


def test_repair_is_refused_where_it_makes_no_sense(transformer, parents, images):
    with pytest.raises(ValueError, match=f"{ARCHITECTURE} has batch norms: it is not repaired but"):
        mm.merge("uniform", ARCHITECTURE, parents, images, repair=True)
    with pytest.raises(ValueError, match="REPAIR wants images"):
        mm.merge("uniform", ARCHITECTURE, parents, repair=True)
    assert "zipit moves units" in mergers.repair_refusal("zipit", transformer)
    assert mergers.repair_refusal("uniform", transformer) == ""
