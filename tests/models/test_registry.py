import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.parameters import some_quick

from medmerge_jax.errors import UserError
from medmerge_jax.merging.trees import flatten
from medmerge_jax.models import BatchNorm, LinearHead, create_model, get_spec, list_models
from medmerge_jax.models.resnet import CifarResNet


@pytest.mark.parametrize("name", some_quick(list_models(), "resnet18", "resnet20"))
def test_shapes_follow_the_registry(name):
    spec = get_spec(name)
    images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
    with_head = jax.eval_shape(create_model(name, 5).init, jax.random.key(0), images)
    backbone = create_model(name, 0)
    without = jax.eval_shape(backbone.init, jax.random.key(0), images)

    assert with_head["params"].pop("head")["kernel"].shape == (spec.num_features, 5)
    assert jax.tree.structure(with_head) == jax.tree.structure(without)
    assert jax.eval_shape(backbone.apply, without, images).shape == (2, spec.num_features)


def test_models_are_hashable_by_value():
    one, same = (create_model("densenet121", 5, dtype) for dtype in (jnp.float32, "float32"))
    assert one == same
    assert hash(one) == hash(same)
    assert one != create_model("densenet121", 5, jnp.bfloat16)
    assert one != create_model("densenet169", 5)


@pytest.mark.parametrize(
    ("typo", "nearest"), [("resnet51", "resnet5"), ("DenseNet121", "densenet121")]
)
def test_unknown_names_suggest_the_nearest(typo, nearest):
    with pytest.raises(UserError, match=f"no model '{typo}'; did you mean '{nearest}"):
        create_model(typo, 5)


def test_a_name_that_is_like_none_is_told_all():
    with pytest.raises(UserError, match=r"no model ''; one of resnet20, .*densenet201.* is wanted"):
        create_model("", 5)


@pytest.mark.parametrize("name", some_quick(("resnet20", "resnet50", "densenet121"), "resnet20"))
def test_images_down_to_the_smallest(name):
    model, spec = create_model(name, 0), get_spec(name)
    for side in range(spec.min_size, spec.min_size + 4):
        images = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
        features, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
        assert features.shape == (2, spec.num_features)


def test_images_too_small_for_a_densenet_are_refused():
    images = jax.ShapeDtypeStruct((2, 28, 64, 3), jnp.float32)
    with pytest.raises(UserError, match=r"\(2, 28, 64, 3\): this DenseNet takes 29 x 29 pixels"):
        jax.eval_shape(create_model("densenet121", 0).init, jax.random.key(0), images)


def test_negative_number_of_classes_is_refused():
    with pytest.raises(UserError, match="num_classes is -1"):
        create_model("resnet20", -1)


def test_bfloat16_keeps_parameters_statistics_and_logits_float32(rng):
    images = rng.normal(size=(4, 16, 16, 3)).astype(np.float32)
    model = CifarResNet(1, 3, jnp.bfloat16)
    variables = jax.jit(model.init)(jax.random.key(0), images)

    def apply(variables):
        return model.apply(variables, images, train=True, mutable=["batch_stats"])

    logits, updated = jax.jit(apply)(variables)
    exact_model = CifarResNet(1, 3)
    exact = jax.jit(lambda v: exact_model.apply(v, images, train=True, mutable=False))(variables)

    leaves = jax.tree.leaves((variables, updated, logits))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float32)}
    assert not np.array_equal(logits, exact)
    np.testing.assert_allclose(logits, exact, atol=0.1)


def test_statistics_change_only_in_training_and_only_when_mutable(rng):
    norm, x = BatchNorm(), rng.normal(3, 2, size=(6, 5, 5, 4)).astype(np.float32)
    variables = norm.init(jax.random.key(0), x, use_running_average=False)
    assert not variables["batch_stats"]["mean"].any()

    normalised = norm.apply(variables, x, use_running_average=False)
    np.testing.assert_allclose(np.mean(normalised, (0, 1, 2)), 0, atol=1e-6)
    _, updated = norm.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2), ddof=1)
    np.testing.assert_allclose(updated["batch_stats"]["mean"], 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(updated["batch_stats"]["var"], 0.9 + 0.1 * var, rtol=1e-5)

    _, kept = norm.apply(variables, x, use_running_average=True, mutable=["batch_stats"])
    assert jax.tree.all(jax.tree.map(np.array_equal, kept["batch_stats"], variables["batch_stats"]))


def test_large_means_leave_the_variance_exact(rng):
    """E[x²] - E[x]² in float32 would lose this variance altogether."""
    x = (1000 + 0.1 * rng.normal(size=(64, 8, 8, 2))).astype(np.float32)
    norm = BatchNorm()
    variables = norm.init(jax.random.key(0), x, use_running_average=False)
    normalised = norm.apply(variables, x, use_running_average=False)
    wanted = x.astype(np.float64)
    wanted = (wanted - wanted.mean((0, 1, 2))) / np.sqrt(wanted.var((0, 1, 2)) + 1e-5)
    np.testing.assert_allclose(normalised, wanted, atol=2e-3)


def test_linear_head_is_the_head_of_the_models(rng):
    images = rng.normal(size=(2, 16, 16, 3)).astype(np.float32)
    model = CifarResNet(1, 3)
    variables = jax.jit(model.init)(jax.random.key(0), images)
    params = dict(variables["params"])
    head = {"params": {"head": params.pop("head")}}
    backbone = jax.jit(CifarResNet(1, 0).apply)
    features = backbone({**variables, "params": params}, images)

    wanted = jax.jit(model.apply)(variables, images)
    np.testing.assert_allclose(LinearHead(3).apply(head, features), wanted, rtol=1e-6)
    fresh = flatten(LinearHead(3).init(jax.random.key(1), features))
    assert fresh.keys() == {"params/head/kernel", "params/head/bias"}
    assert all(np.abs(leaf).max() <= 64**-0.5 and leaf.any() for leaf in fresh.values())
