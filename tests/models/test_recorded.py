"""The models compute what PyTorch computed when it was asked, also where it is not installed."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from helpers.parameters import some_quick
from helpers.torch_reference import reference, relative_error

from medmerge_jax.merging.trees import unflatten
from medmerge_jax.models import create_model, get_spec
from medmerge_jax.models.densenet import DenseNet
from medmerge_jax.models.registry import MODELS, register
from medmerge_jax.models.resnet import Bottleneck, ResNet
from medmerge_jax.weights import variables_from_torch, variables_to_torch

CLASSES = 3
SMALL = {  # as whom, what, and its features
    "bottlenecks": ("resnet50", functools.partial(ResNet, Bottleneck, (1, 1)), 512),
    "dense blocks": ("densenet121", functools.partial(DenseNet, (2, 2), 8, 16), 32),
}
"""Networks that compile in a moment, of two stages."""
RECORDED = {
    "bottlenecks": [[-0.26156734, 0.51040324, 0.18697926], [-0.24453201, 0.50652499, 0.18340337]],
    "dense blocks": [[0.188739, -0.18071846, -0.206993], [0.19451384, -0.192136, -0.22263064]],
    "resnet20": [[0.32684822, 0.14202295, -1.08334881], [0.31093451, 0.11732733, -1.05904862]],
    "resnet18": [[-0.07198315, 0.43000975, -0.38643792], [-0.0413547, 0.44219411, -0.41740981]],
    "resnet50": [[0.0326723, 1.0142956, -0.249748], [0.01251689, 0.99735763, -0.24172958]],
    "densenet121": [[-0.13655733, 0.015578, 0.31115523], [-0.13799821, 0.01672208, 0.31266511]],
}
"""PyTorch's logits of two images in float64, by model."""


@pytest.fixture(scope="module", autouse=True)
def small_networks():
    for name, (kind, build, num_features) in SMALL.items():
        spec = get_spec(kind)
        register(dataclasses.replace(spec, name=name, build=build, num_features=num_features))
    yield
    for name in SMALL:
        del MODELS._entries[name]


def numbers(shape, key):
    """Uniform in ±1 and the same with every version of NumPy."""
    raw = np.random.Philox(key=key).random_raw(int(np.prod(shape)))
    return (raw / 2.0**63 - 1).reshape(shape)


def tensors_of(name):
    """A state dict whose numbers depend on the tensors' order and shapes alone."""
    shapes = get_spec(name).shapes(CLASSES)
    zeros = {
        part: unflatten({path: np.zeros(leaf.shape) for path, leaf in leaves.items()})
        for part, leaves in shapes.items()
    }
    tensors = variables_to_torch(name, zeros)
    for key, (path, tensor) in enumerate(tensors.items()):
        if tensor.ndim > 1:  # no layer shrinks what it is given much, nor does it grow much
            values = numbers(tensor.shape, key) * (2 / np.prod(tensor.shape[1:])) ** 0.5
        elif path.endswith(("running_var", "weight")):
            values = 1 + 0.5 * numbers(tensor.shape, key)
        else:
            values = 0.2 * numbers(tensor.shape, key)
        if tensor.ndim:
            tensors[path] = values.astype(np.float32)
    return tensors


def images_of(name):
    side = 32 if name == "resnet20" else 48
    return numbers((2, side, side, 3), 10**6).astype(np.float32)


@pytest.mark.parametrize("name", some_quick(RECORDED, *SMALL, "resnet20"))
def test_logits_are_those_that_were_recorded(name):
    variables = variables_from_torch(name, tensors_of(name), "x")
    apply = jax.jit(create_model(name, CLASSES).apply)
    assert relative_error(apply(variables, images_of(name)), RECORDED[name]) < 1e-5


def network_of(torch, torchvision, name):
    models = torchvision.models
    if name == "dense blocks":
        return models.DenseNet(8, (2, 2), 16, num_classes=CLASSES)
    if name != "bottlenecks":
        return reference(torch, torchvision, name, CLASSES)
    network = models.ResNet(models.resnet.Bottleneck, [1, 1, 1, 1])
    network.layer3 = network.layer4 = torch.nn.Identity()
    network.fc = torch.nn.Linear(512, CLASSES)
    return network


@pytest.mark.parametrize("name", RECORDED)
def test_what_is_recorded_is_pytorchs(torch, torchvision, name):
    network = network_of(torch, torchvision, name).eval()
    network.load_state_dict({k: torch.tensor(x) for k, x in tensors_of(name).items()})
    images = torch.tensor(images_of(name).transpose(0, 3, 1, 2))
    with torch.no_grad():
        wanted = network.double()(images.double()).numpy()
    np.testing.assert_allclose(RECORDED[name], wanted, atol=1e-8)
