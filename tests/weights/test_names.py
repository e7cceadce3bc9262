import re

import ml_dtypes
import numpy as np
import pytest

from medmerge_jax.errors import UserError
from medmerge_jax.merging.trees import without_head
from medmerge_jax.models import list_models
from medmerge_jax.weights import variables_from_torch, variables_to_torch
from medmerge_jax.weights.names import fitting_architectures

ONE_OF_EACH_KIND = ("resnet18", "resnet50", "densenet121", "resnet20")


@pytest.mark.parametrize(
    "name",
    [
        n if n in ONE_OF_EACH_KIND else pytest.param(n, marks=pytest.mark.slow)
        for n in list_models()
    ],
)
def test_names_go_there_and_back(name, make_variables, assert_same):
    variables = make_variables(name)
    tensors = variables_to_torch(name, variables)
    assert_same(variables_from_torch(name, tensors, "x"), variables)
    assert fitting_architectures(tensors, "x") == [name]


@pytest.mark.parametrize("num_classes", [0, 1, 2, 1000])
@pytest.mark.parametrize("name", ["resnet20", "densenet121"])
def test_any_head_or_none(name, num_classes, make_variables, assert_same):
    variables = make_variables(name, num_classes)
    tensors = variables_to_torch(name, variables)
    head = {"resnet20": "linear.weight", "densenet121": "classifier.weight"}[name]
    assert (head in tensors) == (num_classes > 0)
    assert fitting_architectures(tensors, "x") == [name]
    assert_same(variables_from_torch(name, tensors, "x"), variables)


def test_layouts(variables):
    tensors = variables_to_torch("resnet20", variables)
    kernel = variables["params"]["layer2"]["0"]["conv1"]["kernel"]
    np.testing.assert_array_equal(tensors["layer2.0.conv1.weight"][3, 1], kernel[:, :, 1, 3])
    np.testing.assert_array_equal(tensors["linear.weight"], variables["params"]["head"]["kernel"].T)
    assert tensors["bn1.num_batches_tracked"].dtype == np.int64
    assert tensors["bn1.num_batches_tracked"].shape == ()


def test_old_densenet_names(make_variables, assert_same):
    variables = make_variables("densenet121")
    tensors = variables_to_torch("densenet121", variables)
    old = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", name): tensor
        for name, tensor in tensors.items()
        if not name.endswith("num_batches_tracked")
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    assert_same(variables_from_torch("densenet121", old, "x"), variables)

    new = "features.denseblock1.denselayer1.norm1.weight"
    with pytest.raises(UserError, match=f"old.pth: tensor '{new}' is there twice"):
        variables_from_torch("densenet121", {**old, new: tensors[new]}, "old.pth")


def test_prefix_of_data_parallel(variables, assert_same):
    tensors = variables_to_torch("resnet20", variables)
    prefixed = {f"module.{name}": tensor for name, tensor in tensors.items()}
    assert_same(variables_from_torch("resnet20", prefixed, "x"), variables)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_floats_become_float32(variables, dtype):
    tensors = variables_to_torch("resnet20", variables)
    narrow = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    found = variables_from_torch("resnet20", narrow, "x")["params"]["head"]["bias"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, narrow["linear.bias"].astype(np.float32))


def test_every_kind_of_mismatch_is_listed(variables):
    tensors = variables_to_torch("resnet20", variables)
    del tensors["layer1.0.bn1.running_var"]
    tensors["layer9.weight"] = np.zeros((1, 2), np.float32)
    tensors["conv1.weight"] = tensors["conv1.weight"][:, :2]
    with pytest.raises(UserError) as error:
        variables_from_torch("resnet20", tensors, "some.pth")
    message = str(error.value)
    assert "some.pth: the tensors do not fit resnet20" in message
    assert "missing: layer1.0.bn1.running_var (16,)" in message
    assert "extra: layer9.weight (1, 2)" in message
    assert "misshapen: conv1.weight is (16, 2, 3, 3), wanted (16, 3, 3, 3)" in message


@pytest.mark.parametrize("gone", ["linear.weight", "linear.bias"])
def test_half_a_head_is_refused(variables, gone):
    tensors = variables_to_torch("resnet20", variables)
    del tensors[gone]
    with pytest.raises(UserError, match=rf"missing: {gone}"):
        variables_from_torch("resnet20", tensors, "x")


def test_counters_of_no_norm_are_extra(variables):
    tensors = variables_to_torch("resnet20", variables)
    tensors["elsewhere.num_batches_tracked"] = np.zeros((), np.int64)
    with pytest.raises(UserError, match=r"extra: elsewhere.num_batches_tracked"):
        variables_from_torch("resnet20", tensors, "x")


def test_the_architecture_that_fits_is_named(variables):
    tensors = variables_to_torch("resnet20", variables)
    with pytest.raises(UserError, match=r"do not fit resnet56(.|\n)*They fit resnet20"):
        variables_from_torch("resnet56", tensors, "x")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(variables, bad):
    tensors = variables_to_torch("resnet20", variables)
    tensors["bn1.bias"] = tensors["bn1.bias"].copy()
    tensors["bn1.bias"][2] = bad
    with pytest.raises(UserError, match=r"x.npz: tensor 'bn1.bias' has 1 values"):
        variables_from_torch("resnet20", tensors, "x.npz")


def test_values_beyond_float32_are_refused(variables):
    tensors = variables_to_torch("resnet20", variables)
    tensors["bn1.bias"] = np.full(16, 1e300)
    with pytest.raises(UserError, match=r"tensor 'bn1.bias' has 16 values"):
        variables_from_torch("resnet20", tensors, "x")


@pytest.mark.parametrize("dtype", [np.int64, np.bool_, np.complex64, "V2", "U3"])
def test_tensors_that_are_not_floats_are_refused(variables, dtype):
    tensors = variables_to_torch("resnet20", variables)
    tensors["bn1.bias"] = np.zeros(16, dtype)
    with pytest.raises(UserError, match=r"tensor 'bn1.bias' is .*; floating point is wanted"):
        variables_from_torch("resnet20", tensors, "x")


def test_variables_of_another_model_are_not_written(variables):
    del variables["batch_stats"]["bn1"]
    with pytest.raises(UserError, match=r"missing: bn1\.running_mean"):
        variables_to_torch("resnet20", variables)
    with pytest.raises(UserError, match="params has 'a/b/other', which resnet20 has not"):
        variables_to_torch("resnet20", {"params": {"a": {"b": {"other": np.zeros(1)}}}})


def test_headless_variables_are_written_headless(variables):
    tensors = variables_to_torch("resnet20", without_head(variables))
    assert not [name for name in tensors if name.startswith("linear")]
