"""MedMerge and LP-FT are what an independent PyTorch implementation computes.

The same parents, head, batches and AdamW. The first gradients and the losses of 20 steps are
compared, and where the trained numbers end up, relative to the distance that they moved: Adam
divides by the gradient's size, so that where a gradient is near zero rounding decides its sign.

Rounding also decides the sign of an element before a ReLU that is all but zero, and each such
decision adds or takes away that element's whole gradient. The images are so few and small that in
float32 no element of the first step is that close, which a test makes sure of.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.torch_reference import cifar_resnet, relative_error, state

from medmerge_jax.data import ResidentBatches
from medmerge_jax.data.batches import epoch_order
from medmerge_jax.evaluation.predict import predict_step
from medmerge_jax.merging.trees import flatten, without_head
from medmerge_jax.models import LinearHead, create_model, get_spec
from medmerge_jax.models.network import Network
from medmerge_jax.storage.run_directory import RunDirectory
from medmerge_jax.training import parameterization
from medmerge_jax.training.loop import train_stage
from medmerge_jax.training.stage import Stage
from medmerge_jax.training.step import Task, collapse, init_state, train_step
from medmerge_jax.weights import variables_from_torch

NAME, CLASSES, STEPS, BATCH, SIZE = "resnet20", 5, 20, 8, 8
SPEC = get_spec(NAME)
WEIGHT_DECAY = 1e-2


@pytest.fixture(params=["float64", "float32"])
def dtype(torch, request):
    """Of everything on both sides."""
    torch.set_default_dtype(getattr(torch, request.param))
    with jax.enable_x64(request.param == "float64"):
        yield np.dtype(request.param)
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def parents(torch, dtype):
    """b and c in PyTorch: different kernels, batch norms and running statistics."""
    networks = []
    for seed in range(2):
        torch.manual_seed(seed)
        network = cifar_resnet(torch, 20, CLASSES)
        with torch.no_grad():
            for module in network.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_(0, 0.3)
                    module.running_mean.normal_(0, 0.2)
                    module.running_var.uniform_(0.5, 2)
            # As in trained networks, a residual branch adds little: rounding is not multiplied.
            for module in network.modules():
                if hasattr(module, "bn2"):
                    module.bn2.weight.mul_(0.2)
            for tensor in network.state_dict().values():
                tensor.copy_(tensor.float())  # what a file of weights holds
        networks.append(network)
    return networks


@pytest.fixture
def head(rng, dtype):
    leaves = {"kernel": rng.normal(0, 0.1, (64, CLASSES)), "bias": rng.normal(0, 0.1, CLASSES)}
    return {name: leaf.astype(dtype) for name, leaf in leaves.items()}


@pytest.fixture
def batches(rng, dtype):
    """Normalised images whose classes can be learned: a shade of its own for each."""
    labels = rng.integers(0, CLASSES, (STEPS, BATCH))
    noise = rng.normal(0, 1, (STEPS, BATCH, SIZE, SIZE, 3))
    images = (noise + labels[..., None, None, None] - CLASSES / 2).astype(dtype)
    return [
        {"inputs": x, "labels": y.astype(np.int32)} for x, y in zip(images, labels, strict=True)
    ]


@pytest.mark.slow  # of a small transformer it is in tests/models/test_vit.py
def test_merge_linear_probe(torch, dtype, parents, head, batches):
    variables = [flax_variables(parent, dtype) for parent in parents]
    start = parameterization.merge_linear_probe(variables, head)
    ours = train(start, create_model(NAME, CLASSES, dtype), batches, 1e-3)
    theirs = TorchMerge(torch, parents, head)
    wanted = torch_train(torch, theirs.trainable, theirs.loss, batches, 1e-3)
    compare(ours, wanted, dtype, "coefficients/", "params/")

    # The collapsed model is the blend, in evaluation mode too.
    images = batches[0]["inputs"]
    logits = predict_step(network_of(create_model(NAME, CLASSES, dtype)), ours["variables"], images)
    assert relative_error(logits, theirs.logits(images)) < (1e-6 if dtype == np.float64 else 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64"], indirect=True)
def test_an_anchored_merge_linear_probe(torch, dtype, parents, head, batches):
    """Another start, another rate of the coefficients, and decay towards where they started."""
    variables = [flax_variables(parent, dtype) for parent in parents]
    options = {"init": (0.75, 0.25), "learning_rate": 1e-2, "decay_to": "init"}
    start = parameterization.merge_linear_probe(variables, head, **options)
    # In the type of everything else, in which what is pulled a little towards a value is told.
    start = dataclasses.replace(
        start, **jax.tree.map(dtype.type, {k: getattr(start, k) for k in ("trainable", "frozen")})
    )
    ours = train(start, create_model(NAME, CLASSES, dtype), batches[:6], 2e-3)
    theirs = TorchMerge(torch, parents, head, first=0.75)
    own = {path: w for path, w in theirs.trainable.items() if path.startswith("coefficients/")}
    wanted = torch_train(torch, theirs.trainable, theirs.loss, batches[:6], 2e-3, own, 1e-2)
    compare(ours, wanted, dtype, "coefficients/", "params/")


@pytest.mark.slow  # in float32 both stages of MedMerge, which end in fine-tuning, are below
@pytest.mark.parametrize("dtype", ["float64"], indirect=True)
def test_linear_probe_then_fine_tuning(torch, dtype, parents, head, batches):
    variables = flax_variables(parents[0], dtype)
    backbone = without_head(variables)
    extractor = network_of(create_model(NAME, 0, dtype))
    features = [
        {**batch, "inputs": predict_step(extractor, backbone, batch["inputs"])} for batch in batches
    ]
    probe = parameterization.fine_tune({"params": {"head": head}})
    probed = train(probe, LinearHead(CLASSES), features, 1e-2)

    network = with_head(torch, parents[0], head)
    network.eval()  # the probe's backbone is frozen, its batch norms included
    trainable = {f"params/head/{key}": t for key, t in torch_head(network).items()}
    wanted = torch_train(torch, trainable, torch_loss(torch, network), batches, 1e-2)
    compare(probed, wanted, dtype, "params/")

    params = {**backbone["params"], **probed["variables"]["params"]}
    start = parameterization.fine_tune({**variables, "params": params})
    ours = train(start, create_model(NAME, CLASSES, dtype), batches, 1e-4)
    network.train()
    trainable = {torch_path(key): tensor for key, tensor in network.named_parameters()}
    wanted = torch_train(torch, trainable, torch_loss(torch, network), batches, 1e-4)
    compare(ours, wanted, dtype, "params/")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32"], indirect=True)
def test_both_stages_of_medmerge_through_the_loop(torch, dtype, parents, head, batches, tmp_path):
    images, labels = (
        np.concatenate([batch[key] for batch in batches]) for key in ("inputs", "labels")
    )
    data = ResidentBatches(images, labels, BATCH)
    directory = RunDirectory(tmp_path)
    network = network_of(create_model(NAME, CLASSES))

    def run(name, start, rate):
        result = train_stage(
            Stage(
                name=name, epochs=1, learning_rate=rate, select="last", weight_decay=WEIGHT_DECAY
            ),
            start,
            network,
            lambda split: data,
            directory,
            seed=7,
            multilabel=False,
            class_weights=np.ones(CLASSES),
        )
        return {
            "start": flatten(start.trainable),
            "end": flatten(result.trainable),
            "variables": result.variables,
        }

    variables = [flax_variables(parent, dtype) for parent in parents]
    probed = run("lp", parameterization.merge_linear_probe(variables, head), 1e-3)
    tuned = run("ft", parameterization.fine_tune(probed["variables"]), 1e-4)
    directory.close()

    rows = epoch_order(len(labels), 7, 0).reshape(STEPS, BATCH)
    shuffled = [{"inputs": images[row], "labels": labels[row]} for row in rows]
    theirs = TorchMerge(torch, parents, head)
    wanted = [torch_train(torch, theirs.trainable, theirs.loss, shuffled, 1e-3)]
    merged = theirs.collapsed()
    trainable = {torch_path(key): tensor for key, tensor in merged.named_parameters()}
    wanted.append(torch_train(torch, trainable, torch_loss(torch, merged), shuffled, 1e-4))
    for ours, torchs, record in zip((probed, tuned), wanted, directory.records(), strict=True):
        for kind in {path.split("/")[0] for path in ours["end"]}:
            assert moved_error(kind, ours, torchs) < 0.01
        assert record["train_loss"] == pytest.approx(np.mean(torchs["losses"]), rel=1e-4)
    merged.eval()
    with torch.no_grad():
        logits = merged(torch_images(torch, images)).numpy()
    found = predict_step(network, tuned["variables"], images)
    assert relative_error(found, logits) < 1e-3


@pytest.mark.parametrize("dtype", ["float64"], indirect=True)
def test_no_element_is_so_close_to_zero_that_rounding_decides(
    torch, dtype, parents, head, batches, monkeypatch
):
    relu, closest = torch.relu, []

    def watched(x):
        closest.append(x.detach().abs().min().item())
        return relu(x)

    monkeypatch.setattr(torch, "relu", watched)
    images = torch_images(torch, batches[0]["inputs"])
    with_head(torch, parents[0], head).train()(images)
    TorchMerge(torch, parents, head).forward(images)
    assert len(closest) == 2 * 19
    assert min(closest) > 1e-5  # of numbers near 1, a hundred times their rounding


def compare(ours, wanted, dtype, *kinds):
    """The three figures, over everything and for each kind of trained number."""
    exact = dtype == np.float64
    assert set(wanted["gradients"]) == set(ours["gradients"])
    losses = np.abs(np.asarray(ours["losses"]) / wanted["losses"] - 1).max()
    for kind in ("", *kinds):
        gradient = error(kind, ours["gradients"], wanted["gradients"])
        distance = moved_error(kind, ours, wanted)
        print(f"{dtype} {kind:13} gradient {gradient:.1e}, losses {losses:.1e}, end {distance:.1e}")
        assert gradient < (1e-7 if exact else 1e-4)
        assert distance < (1e-4 if exact else 0.01)
    assert losses < (1e-7 if exact else 1e-4)
    assert wanted["losses"][-1] < 0.9 * wanted["losses"][0]


# Ours, through the real step.


def network_of(model):
    return Network(model, SPEC.preprocessing)


def train(start, model, batches, rate):
    task = Task(network_of(model), start.assemble, start.train_batch_norm, False)
    weights = jnp.ones(CLASSES, jnp.float32)
    train_state, losses, gradients = init_state(start), [], None
    # The loss is a sum of its own type, so that the donated state keeps its types.
    loss_dtype = jax.tree.leaves(start.trainable)[0].dtype
    train_state = train_state._replace(loss_sum=jnp.zeros((), loss_dtype))
    rates = {part: start.learning_rate.get(part, rate) for part in start.trainable}
    numbers = jax.tree.map(loss_dtype.type, [rates, WEIGHT_DECAY])
    for batch in batches:
        train_state, loss = train_step(task, train_state, start.frozen, batch, *numbers, weights)
        losses.append(float(loss))
        if gradients is None:  # Adam's first moment is now a tenth of the first gradient
            gradients = jax.tree.map(
                lambda leaf: np.asarray(leaf) * 10, train_state.opt_state[0].mu
            )
    params = collapse(start.assemble, train_state.trainable, start.frozen)
    return {
        "gradients": flatten(gradients),
        "losses": losses,
        "start": flatten(start.trainable),
        "end": flatten(train_state.trainable),
        "variables": {"params": params, "batch_stats": train_state.batch_stats},
    }


def flax_variables(network, dtype):
    variables = variables_from_torch(NAME, state(network), "parent")
    return jax.tree.map(lambda leaf: np.asarray(leaf, dtype), variables)


def joined(flat, kind):
    flat = {path: np.ravel(leaf) for path, leaf in flat.items() if path.startswith(kind)}
    return np.concatenate([flat[path] for path in sorted(flat)]).astype(np.float64)


def error(kind, found, wanted):
    return relative_error(joined(found, kind), joined(wanted, kind))


def moved_error(kind, ours, wanted):
    """The distance of the two ends over the distance that PyTorch's moved."""
    start, ends = joined(ours["start"], kind), [joined(x["end"], kind) for x in (ours, wanted)]
    return np.linalg.norm(ends[0] - ends[1]) / np.linalg.norm(ends[1] - start)


# Theirs, in PyTorch's own names and layouts, with Flax's only to compare.


class TorchMerge:
    """The merge linear probe as the paper describes it, on PyTorch modules."""

    def __init__(self, torch, parents, head, first=0.5):
        self.torch = torch
        self.network = with_head(torch, parents[0], head)
        self.network.train()
        b, c = (dict(parent.named_parameters()) for parent in parents)
        self.kernels = {name: (b[name], c[name]) for name in b if b[name].ndim == 4}
        norms = [dict(parent.state_dict()) for parent in parents]
        with torch.no_grad():
            for name, tensor in self.network.state_dict().items():
                if "bn" in name and tensor.is_floating_point():
                    tensor.copy_(first * norms[0][name] + (1 - first) * norms[1][name])
        self.w = {
            name: torch.full((pair[0].shape[0],), first, requires_grad=True)
            for name, pair in self.kernels.items()
        }
        own = dict(self.network.named_parameters())
        self.trainable = {
            **{
                f"coefficients/{torch_path(n).removeprefix('params/')}": w
                for n, w in self.w.items()
            },
            **{torch_path(n): tensor for n, tensor in own.items() if n not in self.kernels},
        }

    def loss(self, images, labels):
        return self.torch.nn.functional.cross_entropy(self.forward(images), labels)

    def logits(self, images):
        self.network.eval()
        with self.torch.no_grad():
            return self.forward(torch_images(self.torch, images)).numpy()

    def collapsed(self):
        """The network with the blended kernels for its own, in training mode."""
        with self.torch.no_grad():
            for name, kernel in self._blended().items():
                self.network.get_parameter(name).copy_(kernel)
        return self.network.train()

    def forward(self, images):
        return self.torch.func.functional_call(self.network, self._blended(), (images,))

    def _blended(self):
        blended = {}
        for name, (b, c) in self.kernels.items():
            w = self.w[name][:, None, None, None]
            blended[name] = w * b.detach() + (1 - w) * c.detach()
        return blended


def torch_train(torch, trainable, loss_fn, batches, rate, own=(), own_rate=None):
    """What is among `own` has its own rate, and decays to where it starts."""
    others = [tensor for path, tensor in trainable.items() if path not in own]
    groups = [{"params": others}]
    anchors = {path: trainable[path].detach().clone() for path in own}
    if own:
        own = {path: trainable[path] for path in own}
        groups.append({"params": own.values(), "lr": own_rate, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=WEIGHT_DECAY)
    losses, gradients = [], None
    for batch in batches:
        optimizer.zero_grad()
        labels = torch.from_numpy(batch["labels"]).long()
        loss = loss_fn(torch_images(torch, batch["inputs"]), labels)
        loss.backward()
        if gradients is None:
            gradients = {path: flax_layout(t.grad) for path, t in trainable.items()}
        with torch.no_grad():
            for path, anchor in anchors.items():
                own[path].lerp_(anchor, own_rate * WEIGHT_DECAY)
        optimizer.step()
        losses.append(loss.item())
    end = {path: flax_layout(tensor.detach()) for path, tensor in trainable.items()}
    return {"gradients": gradients, "losses": losses, "end": end}


def torch_loss(torch, network):
    def loss(images, labels):
        return torch.nn.functional.cross_entropy(network(images), labels)

    return loss


def torch_images(torch, images):
    return torch.from_numpy(np.asarray(images)).permute(0, 3, 1, 2)


def with_head(torch, parent, head):
    """A copy of the parent with this head."""
    network = cifar_resnet(torch, 20, CLASSES)
    network.load_state_dict(parent.state_dict())
    with torch.no_grad():
        network.linear.weight.copy_(torch.from_numpy(head["kernel"].T.copy()))
        network.linear.bias.copy_(torch.from_numpy(head["bias"]))
    return network


def torch_head(network):
    return {"kernel": network.linear.weight, "bias": network.linear.bias}


def torch_path(name):
    """layer1.0.bn1.weight → params/layer1/0/bn1/scale."""
    *modules, leaf = name.split(".")
    if modules[-1].startswith("bn"):
        leaf = {"weight": "scale", "bias": "bias"}[leaf]
    else:
        leaf = {"weight": "kernel", "bias": "bias"}[leaf]
    modules = ["head" if module == "linear" else module for module in modules]
    return "/".join(["params", *modules, leaf])


def flax_layout(tensor):
    array = tensor.numpy().copy()
    return {2: lambda x: x.T, 4: lambda x: x.transpose(2, 3, 1, 0)}.get(array.ndim, lambda x: x)(
        array
    )


def test_paths_are_those_of_our_own_trees(torch, parents):
    names = {torch_path(name) for name, _ in parents[0].named_parameters()}
    params = variables_from_torch(NAME, state(parents[0]), "parent")["params"]
    assert names == {f"params/{path}" for path in flatten(params)}
