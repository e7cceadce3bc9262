import re

import ml_dtypes
import numpy as np
import pytest
from helpers.parameters import some_quick

from medmerge_jax.errors import UserError
from medmerge_jax.merging.trees import without_head
from medmerge_jax.models import list_models
from medmerge_jax.weights import names, variables_from_torch, variables_to_torch
from medmerge_jax.weights.names import fitting_architectures, variables_and_notes


# Of the others all that have their stem are traced, which takes seconds.
@pytest.mark.parametrize("name", some_quick(list_models(), "resnet20"))
def test_names_go_there_and_back(name, make_variables, assert_same):
    variables = make_variables(name)
    tensors = variables_to_torch(name, variables)
    assert_same(variables_from_torch(name, tensors, "x"), variables)
    twins = {name.replace("vit_", "deit_"), name.replace("deit_", "vit_"), name}
    assert set(fitting_architectures({"": tensors})) == twins & set(list_models())


@pytest.mark.parametrize(
    ("name", "num_classes"),
    [
        *(("resnet20", n) for n in (1, 2)),
        *(
            pytest.param(name, n, marks=pytest.mark.slow)  # all models are traced
            for name, counts in (("resnet20", (0, 1000)), ("densenet121", (0, 1, 2, 1000)))
            for n in counts
        ),
    ],
)
def test_any_head_or_none(name, num_classes, make_variables, assert_same):
    variables = make_variables(name, num_classes)
    tensors = variables_to_torch(name, variables)
    head = {"resnet20": "linear.weight", "densenet121": "classifier.weight"}[name]
    assert (head in tensors) == (num_classes > 0)
    assert fitting_architectures({"": tensors}) == [name]
    assert_same(variables_from_torch(name, tensors, "x"), variables)


def test_layouts(variables):
    tensors = variables_to_torch("resnet20", variables)
    kernel = variables["params"]["layer2"]["0"]["conv1"]["kernel"]
    np.testing.assert_array_equal(tensors["layer2.0.conv1.weight"][3, 1], kernel[:, :, 1, 3])
    np.testing.assert_array_equal(tensors["linear.weight"], variables["params"]["head"]["kernel"].T)
    assert tensors["bn1.num_batches_tracked"].dtype == np.int64
    assert tensors["bn1.num_batches_tracked"].shape == ()


@pytest.fixture
def no_hint(monkeypatch):
    """Errors do not say what a tensor fits, for which all architectures are traced."""
    monkeypatch.setattr(names, "fitting_architectures", lambda state_dicts: [])


@pytest.mark.slow
def test_old_densenet_names(make_variables, assert_same, no_hint):
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
    with pytest.raises(UserError, match=f"twice: .*norm.1.weight and {new}"):
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
    tensors["layer3.9.weight"] = np.zeros((1, 2), np.float32)
    tensors["conv1.weight"] = tensors["conv1.weight"][:, :2]
    with pytest.raises(UserError) as error:
        variables_from_torch("resnet20", tensors, "some.pth")
    message = str(error.value)
    assert "some.pth: the tensors do not fit resnet20" in message
    assert "missing: layer1.0.bn1.running_var (16,)" in message
    assert "extra: layer3.9.weight (1, 2)" in message
    assert "misshapen: conv1.weight is (16, 2, 3, 3), wanted (16, 3, 3, 3)" in message


HEADS = {
    "no bias": {"linear.weight": (5, 64)},
    "no weight": {"linear.bias": (5,)},
    "another width": {"linear.weight": (5, 7), "linear.bias": (5,)},
    "two layers": {"linear.0.weight": (9, 64), "linear.0.bias": (9,), "linear.2.weight": (5, 9)},
    "a convolution": {"linear.weight": (5, 64, 1, 1), "linear.bias": (5,)},
}


@pytest.mark.parametrize("kind", HEADS)
def test_heads_of_other_kinds_are_left_out_and_said(variables, assert_same, capsys, kind):
    backbone = variables_to_torch("resnet20", without_head(variables))
    head = {name: np.ones(shape, np.float32) for name, shape in HEADS[kind].items()}
    found = variables_from_torch("resnet20", {**backbone, **head}, "x.pth")
    assert_same(found, without_head(variables))
    assert f"x.pth: its head ({next(iter(head))}" in capsys.readouterr().err


def test_a_head_behind_dropout_is_taken(variables, assert_same):
    tensors = variables_to_torch("resnet20", variables)
    behind = {name.replace("linear.", "linear.1."): leaf for name, leaf in tensors.items()}
    assert_same(variables_from_torch("resnet20", behind, "x"), variables)


def test_what_is_beside_the_network_is_left_out_and_said(variables, assert_same, capsys):
    tensors = variables_to_torch("resnet20", variables)
    beside = {
        "projector.0.weight": np.ones((4, 64), np.float32),
        "queue": np.ones((8, 4), np.float32),
        "n_averaged": np.zeros((), np.int64),
        "elsewhere.num_batches_tracked": np.zeros((), np.int64),
    }
    assert_same(variables_from_torch("resnet20", {**tensors, **beside}, "x.pth"), variables)
    said = capsys.readouterr().err
    assert "3 tensors beside the network are left out: projector.0.weight, queue, n_avera" in said


@pytest.mark.parametrize(
    "prefix",
    [
        "model.",
        "net.",
        "backbone.",
        "encoder.",
        "resnet.",
        "_orig_mod.",
        "module.module.",
        "m.n.o.",
    ],
)
def test_prefixes_are_taken_off_and_said(variables, assert_same, capsys, prefix):
    tensors = variables_to_torch("resnet20", variables)
    prefixed = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    assert_same(variables_from_torch("resnet20", prefixed, "x.pth"), variables)
    assert f"x.pth: its names begin with '{prefix}', which is taken off" in capsys.readouterr().err


def test_a_head_outside_of_the_prefix_is_left_out(variables, assert_same, capsys):
    tensors = variables_to_torch("resnet20", variables)
    wrapped = {f"{'' if 'linear' in n else 'encoder.'}{n}": leaf for n, leaf in tensors.items()}
    assert_same(variables_from_torch("resnet20", wrapped, "x.pth"), without_head(variables))
    assert "2 tensors beside the network are left out" in capsys.readouterr().err


def test_two_prefixes_that_fit_are_refused_with_both(variables, make_variables, assert_same):
    other = make_variables("resnet20", seed=1)
    names = {"module.encoder_q.": variables, "module.encoder_k.": other}
    tensors = {
        f"{prefix}{name}": tensor
        for prefix, tree in names.items()
        for name, tensor in variables_to_torch("resnet20", tree).items()
    }
    with pytest.raises(UserError, match=r"'module\.encoder_q', 'module\.encoder_k'.*x\.pth::mod"):
        variables_from_torch("resnet20", tensors, "x.pth")
    for choice, tree in (("module.encoder_q", variables), ("module.encoder_k", other)):
        found, _ = variables_and_notes("resnet20", {"": tensors}, "x.pth", choice)
        assert_same(found, tree)
    with pytest.raises(UserError, match=r"is called 'encoder_z'; there is module\.encoder_q"):
        variables_and_notes("resnet20", {"": tensors}, "x.pth", "encoder_z")


def test_of_several_models_the_one_that_is_no_average_is_taken_and_said(
    variables, make_variables, assert_same
):
    other = make_variables("resnet20", seed=1)
    state_dicts = {
        "state_dict_ema": variables_to_torch("resnet20", other),
        "state_dict": variables_to_torch("resnet20", variables),
        "optimizer.extra": {"a": np.ones(2, np.float32)},
    }
    found, notes = variables_and_notes("resnet20", state_dicts, "x.pth")
    assert_same(found, variables)
    assert "holds 2 models, state_dict, state_dict_ema; 'state_dict' is taken" in notes[0]
    found, notes = variables_and_notes("resnet20", state_dicts, "x.pth", "state_dict_ema")
    assert_same(found, other)
    assert not notes


def test_grey_stems_are_spread_over_three_channels(variables, capsys):
    tensors = variables_to_torch("resnet20", variables)
    grey = tensors["conv1.weight"][:, :1]
    found = variables_from_torch("resnet20", {**tensors, "conv1.weight": grey}, "x.pth")
    kernel = found["params"]["conv1"]["kernel"]
    assert kernel.shape == (3, 3, 3, 16)
    np.testing.assert_allclose(kernel.sum(axis=2), grey[:, 0].transpose(1, 2, 0), rtol=1e-6)
    assert "takes one channel" in capsys.readouterr().err


def test_weights_of_torchxrayvision(make_variables, capsys):
    """One channel, and thresholds beside the network."""
    tensors = variables_to_torch("densenet121", make_variables("densenet121"))
    tensors["features.conv0.weight"] = tensors["features.conv0.weight"][:, :1]
    tensors["op_threshs"] = np.zeros(5, np.float32)
    found = variables_from_torch("densenet121", tensors, "x.pth")
    assert found["params"]["features"]["conv0"]["kernel"].shape == (7, 7, 3, 64)
    assert found["params"]["head"]["bias"].shape == (5,)
    said = capsys.readouterr().err
    assert "takes one channel" in said
    assert "1 tensors beside the network are left out: op_threshs" in said


def test_other_networks_are_refused_by_name(make_variables, no_hint):
    tensors = variables_to_torch("resnet18", make_variables("resnet18"))
    kernel = tensors["conv1.weight"]
    for change, words in (
        ({"conv1.weight": np.zeros((64, 4, 7, 7), np.float32)}, "four channels"),
        ({"conv1.weight": kernel[:, :, :3, :3]}, "stem of 3 x 3"),
        ({"conv1.0.weight": kernel[:, :, :3, :3]}, "ResNet-D or -C"),
        ({"layer1.0.se.fc1.weight": np.zeros((4, 64), np.float32)}, "squeeze-and-excitation"),
        ({"conv1.weight": np.zeros((64, 3, 7, 7, 7), np.float32)}, "volumes"),
    ):
        with pytest.raises(UserError, match=f"of another network: .*{words}"):
            variables_from_torch("resnet18", {**tensors, **change}, "x")


def test_negative_variances_are_refused(variables):
    tensors = variables_to_torch("resnet20", variables)
    tensors["bn1.running_var"] = -tensors["bn1.running_var"]
    with pytest.raises(UserError, match=r"x: tensor 'bn1\.running_var' holds a negative variance"):
        variables_from_torch("resnet20", tensors, "x")


def test_parameters_without_statistics_are_refused_with_the_mend(variables):
    tensors = variables_to_torch("resnet20", variables)
    parameters = {name: leaf for name, leaf in tensors.items() if "running" not in name}
    words = r"(?s)no running statistics, which evaluation needs.*estimate_statistics = True"
    with pytest.raises(UserError, match=words):
        variables_from_torch("resnet20", parameters, "x")


def test_on_request_all_statistics_may_lack(variables, assert_same):
    tensors = variables_to_torch("resnet20", variables)
    parameters = {name: leaf for name, leaf in tensors.items() if "running" not in name}
    bare = {name: leaf for name, leaf in parameters.items() if "num_batches" not in name}
    wanted = {"params": variables["params"], "batch_stats": {}}
    for some in (parameters, bare, {f"module.{name}": leaf for name, leaf in bare.items()}):
        assert_same(variables_and_notes("resnet20", {"": some}, "x", lacking=True)[0], wanted)
    assert_same(variables_and_notes("resnet20", {"": tensors}, "x", lacking=True)[0], variables)
    assert fitting_architectures({"": bare}, lacking=True) == ["resnet20"]
    assert fitting_architectures({"": bare}) == []
    partly = {**bare, "bn1.running_mean": tensors["bn1.running_mean"]}
    for some, words in ((partly, "missing: bn1.running_var"), ({}, "missing: bn1.bias")):
        with pytest.raises(UserError, match=words):
            variables_and_notes("resnet20", {"": some}, "x", lacking=True)


MONAI = [(r"(denselayer\d+)\.", r"\1.layers."), (r"^classifier\.", "class_layers.out.")]
CHEXNET = [
    (r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2"),
    (r"^classifier\.", "classifier.0."),
    (r"^", "module.densenet121."),
]
RADIMAGENET = [
    (r"^conv1\.", "0."), (r"^bn1\.", "1."), (r"^layer1\.", "4."), (r"^layer2\.", "5."),
    (r"^layer3\.", "6."), (r"^layer4\.", "7."), (r"^(\d)", r"backbone.\1"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "spelling", "name"),
    [
        ("densenet121", MONAI, "features.denseblock1.denselayer1.layers.norm1.weight"),
        ("resnet20", [(r"^linear\.", "fc.")], "fc.weight"),
        *(
            pytest.param(*one, marks=pytest.mark.slow)
            for one in (
                ("densenet121", CHEXNET, "module.densenet121.features.transition1.conv.weight"),
                ("resnet50", RADIMAGENET, "backbone.4.0.conv1.weight"),
                ("resnet50", [(r"\.downsample\.", ".shortcut.")], "layer1.0.shortcut.0.weight"),
            )
        ),
    ],
    ids=["MONAI", "fc", "CheXNet", "RadImageNet", "shortcut"],
)  # fmt: skip
def test_names_of_other_libraries(make_variables, assert_same, architecture, spelling, name):
    variables = make_variables(architecture)
    if spelling is RADIMAGENET:  # has none
        variables = without_head(variables)
    spelled = {}
    for usual, tensor in variables_to_torch(architecture, variables).items():
        for pattern, theirs in spelling:
            usual = re.sub(pattern, theirs, usual)
        spelled[usual] = tensor
    assert name in spelled
    assert_same(variables_from_torch(architecture, spelled, "x"), variables)
    assert architecture in fitting_architectures({"": spelled})


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
