"""The models compute what their PyTorch originals compute, forwards and backwards.

Errors are per tensor: the norm of the difference over the norm of PyTorch's.

ReLU and max-pooling make gradients discontinuous: where rounding decides a sign or a maximum, two
correct float32 programs disagree by an element's whole gradient. (PyTorch's own float32 gradients
differ from its float64 ones by up to 5e-2 in some tensor of a ResNet-18.) So gradients are
compared twice: in float32 with PyTorch's decisions imposed on both, of which no more than rounding
explains may differ from ours; and in float64, where no decision is that close, as they are.
"""

import collections
import contextlib
import copy
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.torch_reference import (
    CIFAR_MODELS,
    IMAGENET_MODELS,
    reference,
    relative_error,
    state,
)

from medmerge_jax.models import create_model, densenet, resnet
from medmerge_jax.models.layers import max_pool
from medmerge_jax.weights import variables_from_torch, variables_to_torch

TOLERANCE = 1e-4
TOLERANCE_64 = 1e-10
QUICK_FORWARDS = ("resnet18", "resnet50", "densenet121", "resnet20")
QUICK_BACKWARDS = ("resnet20",)
# One of each kind, backwards: the others are more or wider ones of the same blocks, whose numbers
# and widths a forward pass shows. Their gradients would take most of the tests' time, and are
# compared too with MEDMERGE_JAX_PARITY=full, and those of DenseNet-121 in float32.
BACKWARDS = {"float32": (*QUICK_BACKWARDS, "resnet50"), "float64": QUICK_FORWARDS}
FULL = os.environ.get("MEDMERGE_JAX_PARITY") == "full"
CLASSES = 5
# These networks compile for long and compute for a moment.
COMPILER_OPTIONS = {"xla_backend_optimization_level": 0}


MODELS = IMAGENET_MODELS + CIFAR_MODELS


def slow_unless(quick, names):
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def backwards(dtype):
    names = slow_unless(QUICK_BACKWARDS, MODELS if FULL else BACKWARDS[dtype])
    return pytest.mark.parametrize("name", names)


@pytest.fixture
def case(torch, torchvision, request, rng):
    """The PyTorch network, images (4, size, size, 3) and labels (4,)."""
    name = request.getfixturevalue("name")
    size = 32 if name in CIFAR_MODELS else 64
    images = rng.normal(size=(4, size, size, 3)).astype(np.float32)
    return reference(torch, torchvision, name, CLASSES), images, np.arange(4) % CLASSES


@pytest.mark.parametrize("name", slow_unless(QUICK_FORWARDS, MODELS))
def test_evaluation_matches_pytorch(torch, case, name):
    network, images, _ = case
    variables = variables_from_torch(name, state(network), "the reference")
    network.eval()
    with torch.no_grad():
        wanted = network(to_torch(torch, images)).numpy()

    found = jitted(create_model(name, CLASSES).apply)(variables, images)

    assert found.dtype == jnp.float32
    assert relative_error(found, wanted) <= TOLERANCE


@backwards("float32")
def test_training_matches_pytorch(torch, case, name, monkeypatch):
    network, images, labels = case
    variables = variables_from_torch(name, state(network), "the reference")
    decisions = Decisions(torch)
    with decisions.recorded():
        wanted = torch_step(torch, network, images, labels)

    decisions.impose(monkeypatch)
    found, disagreements = jax_step(name, variables, images, labels, decisions)

    assert largest_error(found, wanted) <= TOLERANCE
    closeness, fraction = disagreements
    assert closeness <= 1e-4  # only where the input is this close to the kink ...
    assert fraction <= 1e-4  # ... and in no more than this part of the elements


@backwards("float64")
def test_gradients_match_pytorch_in_float64(torch, case, name):
    network, images, labels = case
    variables = variables_from_torch(name, state(network), "the reference")
    wanted = torch_step(torch, copy.deepcopy(network).double(), images, labels)

    with jax.enable_x64(True):
        variables = jax.tree.map(lambda leaf: leaf.astype(np.float64), variables)
        found, _ = jax_step(name, variables, images.astype(np.float64), labels)

    assert largest_error(found, wanted) <= TOLERANCE_64


def to_torch(torch, images):
    return torch.tensor(images.transpose(0, 3, 1, 2))


def jitted(function):
    return jax.jit(function, compiler_options=COMPILER_OPTIONS)


def torch_step(torch, network, images, labels):
    """Logits, gradients and updated statistics of one training pass, by name."""
    network.train()
    dtype = next(network.parameters()).dtype
    logits = network(to_torch(torch, images).to(dtype))
    torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).backward()
    return {
        "logits": logits.detach().numpy(),
        **{name: parameter.grad.numpy() for name, parameter in network.named_parameters()},
        **{name: value for name, value in state(network).items() if "running" in name},
    }


def jax_step(name, variables, images, labels, decisions=None):
    """The same of ours, under PyTorch's names; and how far `decisions` are not ours."""
    dtype = images.dtype
    model = create_model(name, CLASSES, dtype=dtype)

    def loss_fn(params):
        logits, updated = model.apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
        )
        losses = -jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels]
        disagreements = decisions.disagreements() if decisions else None
        return jnp.mean(losses), (logits, updated["batch_stats"], disagreements)

    step = jitted(jax.value_and_grad(loss_fn, has_aux=True))
    (_, (logits, statistics, disagreements)), gradients = step(variables["params"])
    tree = {"params": gradients, "batch_stats": statistics}
    tensors = variables_to_torch(name, tree, dtype=dtype)
    assert logits.dtype == dtype
    tensors = {key: value for key, value in tensors.items() if value.ndim}
    return {"logits": np.asarray(logits), **tensors}, disagreements


def largest_error(found, wanted):
    assert found.keys() == wanted.keys()
    return max(relative_error(found[name], wanted[name]) for name in wanted)


class Decisions:
    """Which elements PyTorch's ReLUs pass and which its max-pooling picks, in order of calls."""

    def __init__(self, torch):
        self.torch = torch
        self.masks = collections.deque()
        self.indices = collections.deque()
        self.differing = []

    @contextlib.contextmanager
    def recorded(self):
        torch, functional = self.torch, self.torch.nn.functional
        record = self

        class Recorder(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                kwargs = kwargs or {}
                if function in (torch.relu, torch.relu_, functional.relu):
                    record.masks.append(to_numpy(args[0] > 0))
                    kwargs = {}
                    function, args = torch.relu, args[:1]
                elif function is functional.max_pool2d:
                    kwargs = {**kwargs, "return_indices": True}
                    result, indices = functional.max_pool2d_with_indices(*args, **kwargs)
                    record.indices.append(to_numpy(indices))
                    return result
                return function(*args, **kwargs)

        with Recorder():
            yield

    def impose(self, monkeypatch):
        monkeypatch.setattr(nn, "relu", self.relu)
        for models in (densenet, resnet):
            monkeypatch.setattr(models, "max_pool", self.max_pool)

    def relu(self, x):
        mask = self.masks.popleft()
        self.differing.append((jnp.abs(x), (x > 0) != mask))
        return x * mask

    def max_pool(self, x):
        indices = self.indices.popleft()
        flat = x.reshape(x.shape[0], -1, x.shape[-1])
        taken = jnp.take_along_axis(flat, indices.reshape(x.shape[0], -1, x.shape[-1]), 1)
        taken = taken.reshape(indices.shape)
        maxima = max_pool(x)
        self.differing.append((maxima - taken, maxima != taken))
        return taken

    def disagreements(self):
        """Largest distance of a differing element from its kink, and the part that differs."""
        assert not self.masks
        assert not self.indices
        closeness = [jnp.max(jnp.where(differs, x, 0)) for x, differs in self.differing]
        count = sum(jnp.sum(differs) for _, differs in self.differing)
        return jnp.max(jnp.stack(closeness)), count / sum(x.size for x, _ in self.differing)


def to_numpy(tensor):
    return tensor.detach().permute(0, 2, 3, 1).numpy()
