"""Training steps beside PyTorch's: fine-tuning, merge linear probe, linear probe.

    taskset -c 0,1 python benchmarks/training_step.py --models resnet50 --batch-sizes 4
    python benchmarks/training_step.py                      # on a GPU: both networks, 64 and 128

The steps are the package's own `train_step` on its own parameterizations, and those of
`pytorch_recipe.py`. Both have the same weights and images, and take one step first, in float32: the
script stops unless losses, gradients (AdamW's first moments) and running statistics agree. Then
each takes its steps in turn, in blocks. A linear probe has two parts: the features of the images,
computed once, and a step on them.

Expected, before the first run: the merge linear probe takes as long as fine-tuning, because the
gradient of a coefficient is a sum over its kernel's; on a GPU both are bound by memory, since
batch norms and activations are read more often than the floor says.
"""

import collections
import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import beside_pytorch
import jax
import jax.numpy as jnp
import numpy as np
import pytorch_recipe
import torch
from beside_pytorch import Peak, Work, forward_work, training_work
from measuring import Cost, Side, interleave, median, ratio, spread
from results import by_row, write_table

import medmerge_jax as mm
from medmerge_jax.evaluation.predict import predict_step
from medmerge_jax.merging.trees import flatten, unflatten, without_head
from medmerge_jax.models import LinearHead, get_spec
from medmerge_jax.models.network import Network
from medmerge_jax.training import parameterization
from medmerge_jax.training.parameterization import Parameterization, Tree
from medmerge_jax.training.step import Task, init_state, train_step
from medmerge_jax.weights import variables_to_torch

QUESTION = "How long does a training step take beside PyTorch's?"
CLASSES = 5
RATE = 1e-4
TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 2e-2
"""In float32. Gradients differ more: of millions of elements before a ReLU, rounding decides the
sign of a few, and so whether their whole gradient counts. What is forgotten or wrong differs more;
tests/training/test_method_parity.py compares in float64."""

FINE_TUNE, MERGE, FEATURES, HEAD = (
    "fine-tune",
    "merge linear probe",
    "linear probe: features",
    "linear probe: step",
)
SIDES = ("JAX", "PyTorch")


def main() -> None:
    """Prints the table, and writes it."""
    beside_pytorch.prepare_process()
    parser = beside_pytorch.parser(__doc__, "training_step")
    sizes = "64,128" if torch.cuda.is_available() else "4"
    parser.add_argument("--batch-sizes", type=beside_pytorch.listed(int), default=sizes)
    options = parser.parse_args()
    dtype = options.dtype
    peak = Peak.of_machine(getattr(torch, dtype))
    notes = [beside_pytorch.described(options, peak)]
    rows, raw = [], []
    for model in options.models:
        for batch_size in options.batch_sizes:
            case = Case(model, batch_size, options.image_size, dtype, options.compile)
            checked = case if dtype == "float32" else dataclasses.replace(
                case, dtype="float32", batch_size=min(8, batch_size), compile="off"
            )  # fmt: skip
            notes.append(f"{model}, batch {batch_size}: {check(checked)}")
            costs = measure(case, options.blocks, options.steps)
            rows += table(case, costs, peak)
            raw.append({**dataclasses.asdict(case), "costs": as_json(costs)})
            answer = by_row(rows, ["model, batch", "stage"], "JAX / PyTorch")
            write_table(options.output, QUESTION, f"JAX / PyTorch: {answer}.", rows, notes, raw=raw)


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
      architecture: A name of `mm.list_models()`.
      batch_size: Images in a step.
      image_size: Their sides.
      dtype: Of activations.
      compile: Of PyTorch, see `pytorch_recipe.Settings`.
    """

    architecture: str
    batch_size: int
    image_size: int
    dtype: str
    compile: str

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the images."""
        return (self.batch_size, self.image_size, self.image_size, 3)

    def images(self) -> np.ndarray:
        """Noise, uint8."""
        return np.random.default_rng(0).integers(0, 256, self.shape, np.uint8)

    def labels(self) -> np.ndarray:
        """int32 (n,), every class in turn."""
        return np.arange(self.batch_size, dtype=np.int32) % CLASSES


class JaxStep:
    """The package's step on one batch, again and again."""

    def __init__(self, task: Task, start: Parameterization, inputs: Any, labels: np.ndarray):
        self.task, self.frozen = task, jax.device_put(start.frozen)
        self.state, self.loss = init_state(start), jnp.zeros(())
        self.batch = jax.device_put({"inputs": inputs, "labels": labels})
        self.class_weights = jnp.ones(CLASSES)
        self.scalars = np.float32([RATE, pytorch_recipe.WEIGHT_DECAY])

    def __call__(self) -> None:
        """Dispatches a step."""
        self.state, self.loss = train_step(
            self.task, self.state, self.frozen, self.batch, *self.scalars, self.class_weights
        )

    def wait(self) -> None:
        """For the last step."""
        jax.block_until_ready(self.state)


class JaxFeatures:
    """The package's prediction with a network without a head."""

    def __init__(self, network: Network, variables: Tree, images: np.ndarray):
        self.network, self.variables = network, jax.device_put(variables)
        self.images, self.outputs = jax.device_put(images), jnp.zeros(())

    def __call__(self) -> None:
        """Dispatches a batch."""
        self.outputs = predict_step(self.network, self.variables, self.images)

    def wait(self) -> None:
        """For the last batch."""
        self.outputs.block_until_ready()


class TorchStep:
    """PyTorch's step on one batch, again and again."""

    def __init__(self, network: torch.nn.Module, settings: Any, inputs: Any, labels: np.ndarray):
        self.step = pytorch_recipe.Step(network, settings, RATE)
        self.inputs = torch.from_numpy(np.array(inputs)).to(settings.device)
        self.labels = torch.from_numpy(labels).long().to(settings.device)
        self.loss, self.wait = torch.zeros(()), settings.wait

    def __call__(self) -> None:
        """Dispatches a step."""
        self.loss = self.step(self.inputs, self.labels)


class TorchFeatures:
    """PyTorch's prediction with a network without a head."""

    def __init__(self, network: torch.nn.Module, settings: Any, images: np.ndarray):
        self.predict = pytorch_recipe.Predict(network, settings)
        self.images = torch.from_numpy(images).to(settings.device)
        self.outputs, self.wait = torch.zeros(()), settings.wait

    def __call__(self) -> None:
        """Dispatches a batch."""
        self.outputs = self.predict(self.images)


@contextlib.contextmanager
def parents(case: Case) -> Iterator[list[Path]]:
    """Weights of two networks, as files that both sides read."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{name}.safetensors") for name in "bc"]
        for seed, path in enumerate(paths):
            network = pytorch_recipe.new_network(case.architecture, CLASSES, seed)
            pytorch_recipe.save_network(network, path)
        yield paths


def jax_sides(case: Case, paths: Sequence[Path]) -> dict[str, Any]:
    """The package's steps, by stage."""
    spec = get_spec(case.architecture)
    b, c = (mm.load_weights(case.architecture, path) for path in paths)
    dtype = jnp.dtype(case.dtype)
    model, backbone = (mm.create_model(case.architecture, n, dtype) for n in (CLASSES, 0))
    head = {"params": {"head": b["params"]["head"]}}
    images, labels = case.images(), case.labels()

    def step(model: Any, start: Parameterization, inputs: Any) -> JaxStep:
        network = Network(model, spec.preprocessing)
        task = Task(
            network,
            start.assemble,
            start.train_batch_norm,
            multilabel=False,
        )
        return JaxStep(task, start, inputs, labels)

    features = JaxFeatures(Network(backbone, spec.preprocessing), without_head(b), images)
    features()
    merge = parameterization.merge_linear_probe([b, c], b["params"]["head"])
    return {
        FINE_TUNE: step(model, parameterization.fine_tune(b), images),
        MERGE: step(model, merge, images),
        FEATURES: features,
        HEAD: step(LinearHead(CLASSES), parameterization.fine_tune(head), features.outputs),
    }


def torch_sides(case: Case, paths: Sequence[Path], features: Any) -> dict[str, Any]:
    """PyTorch's steps, by stage; the head's on the given features."""
    dtype = getattr(torch, case.dtype)
    settings = pytorch_recipe.Settings.of_machine(case.compile, dtype)
    images, labels = case.images(), case.labels()

    def parent(number: int) -> torch.nn.Module:
        return pytorch_recipe.load_network(case.architecture, paths[number])

    head = (get_spec(case.architecture).torch_head, pytorch_recipe.head_of(parent(0)))
    probe = torch.nn.Sequential(collections.OrderedDict([head]))
    return {
        FINE_TUNE: TorchStep(pytorch_recipe.fine_tune(parent(0)), settings, images, labels),
        MERGE: TorchStep(
            pytorch_recipe.merge_linear_probe(parent(0), parent(1)), settings, images, labels
        ),
        FEATURES: TorchFeatures(pytorch_recipe.backbone_of(parent(0)), settings, images),
        HEAD: TorchStep(pytorch_recipe.fine_tune(probe), settings, features, labels),
    }


def all_sides(case: Case) -> dict[str, dict[str, Any]]:
    """{side: {stage: step}}, freshly started."""
    with parents(case) as paths:
        ours = jax_sides(case, paths)
        features = np.asarray(ours[FEATURES].outputs)
        return dict(zip(SIDES, (ours, torch_sides(case, paths, features)), strict=True))


def check(case: Case) -> str:
    """Takes one step on both sides, and says how far they differ.

    Raises:
      SystemExit: Too far.
    """
    pytorch_recipe.allow_tf32(False)
    with jax.default_matmul_precision("highest"):
        ours, theirs = all_sides(case).values()
        for step in (*ours.values(), *theirs.values()):
            step()
            step.wait()
    pytorch_recipe.allow_tf32(True)
    differences = {
        "features": relative_difference(
            {"": ours[FEATURES].outputs}, {"": theirs[FEATURES].outputs}
        )
    }
    for stage in (FINE_TUNE, MERGE, HEAD):
        mine, other = ours[stage], theirs[stage]
        differences[f"{stage}: loss"] = relative_difference({"": mine.loss}, {"": other.loss})
        gradients, statistics = by_torch_name(case, mine.state)
        differences[f"{stage}: gradients"] = relative_difference(
            gradients, pytorch_recipe.first_moments(other.step)
        )
        buffers = dict(other.step.network.named_buffers())
        running = {name: buffers[name] for name in statistics if name in buffers}
        differences[f"{stage}: statistics"] = relative_difference(
            {name: statistics[name] for name in running}, running
        )
    allowed = {
        name: GRADIENT_TOLERANCE if name.endswith("gradients") else TOLERANCE
        for name in differences
    }
    # What is not a number is not allowed either.
    if not all(differences[name] <= allowed[name] for name in differences):
        listed = "\n".join(
            f"  {name}: {differences[name]:.1e}, allowed {allowed[name]}" for name in differences
        )
        raise SystemExit(f"{case}: the sides differ:\n{listed}")
    worst = max(differences, key=differences.__getitem__)
    return f"the sides agree; what differs most is {worst}, by {differences[worst]:.0e}"


def by_torch_name(case: Case, state: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """AdamW's first moments, and running statistics.

    Moments are zero where nothing is trained; those of coefficients stand at each number of their
    kernels, as `pytorch_recipe.first_moments` has them.
    """
    model = mm.create_model(case.architecture, CLASSES)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *case.shape[1:])))
    moments = state.opt_state[0].mu
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    params = flatten(zeros["params"]) | flatten(moments["params"])
    for path, leaf in flatten(moments.get("coefficients", {})).items():
        params[path] = np.broadcast_to(leaf, params[path].shape)
    variables = {
        "params": unflatten(params),
        "batch_stats": state.batch_stats or zeros["batch_stats"],
    }
    tensors = variables_to_torch(case.architecture, variables)
    statistics = {name for name in tensors if ".running_" in name}
    trained = {name for name in tensors if np.any(tensors[name])} - statistics
    return {n: tensors[n] for n in trained}, {n: tensors[n] for n in statistics}


def relative_difference(arrays: dict[str, Any], reference: dict[str, Any]) -> float:
    """Of all arrays together, relative to the norm of the reference."""
    if arrays.keys() != reference.keys():
        raise SystemExit(f"only one side has {sorted(arrays.keys() ^ reference.keys())}")
    reference = {name: np.asarray(tensor.cpu()) for name, tensor in reference.items()}
    error = sum(np.sum((np.asarray(arrays[name]) - reference[name]) ** 2) for name in reference)
    norm = sum(np.sum(array**2) for array in reference.values())
    return float(np.sqrt(error / norm)) if reference else 0.0


def measure(case: Case, blocks: int, steps: int) -> dict[tuple[str, str], list[Cost]]:
    """{(stage, side): costs}."""
    sides = [
        Side((stage, name), step, step.wait)
        for name, by_stage in all_sides(case).items()
        for stage, step in by_stage.items()
    ]
    return interleave(sorted(sides, key=lambda side: side.name), blocks, steps)


def floors(case: Case) -> dict[str, Work]:
    """What each stage cannot do without."""
    network = pytorch_recipe.new_network(case.architecture, CLASSES, seed=0)
    head = pytorch_recipe.head_of(network)
    itemsize = jnp.dtype(case.dtype).itemsize
    features = case.batch_size * head.in_features
    return {
        FINE_TUNE: training_work(network, case.shape, itemsize, weight_passes=8),
        MERGE: training_work(network, case.shape, itemsize, weight_passes=4),
        FEATURES: forward_work(network, case.shape, itemsize),
        HEAD: Work(4 * features * CLASSES, 4 * (2 * features + 8 * head.weight.numel())),
    }


def table(case: Case, costs: dict[tuple[str, str], list[Cost]], peak: Peak) -> list[dict[str, str]]:
    """A row for each stage."""
    rows = []
    for stage, work in floors(case).items():
        ours, theirs = (costs[stage, name] for name in SIDES)
        row = {
            "model, batch": f"{case.architecture}, {case.batch_size}",
            "stage": stage,
            "floor: operations, bytes (ms)": f"{work.operations / peak.operations * 1e3:.3g}, "
            f"{work.bytes / peak.bandwidth * 1e3:.3g}",
        }
        for name, blocks in zip(SIDES, (ours, theirs), strict=True):
            row[f"{name} ms"] = spread([cost.wall for cost in blocks], 1e-3, digits=2)
            row[f"{name} images/s"] = f"{case.batch_size / median(blocks):.4g}"
            row[f"{name} CPU ms"] = f"{median(blocks, 'cpu') * 1e3:.3g}"
            row[f"{name} page faults"] = f"{median(blocks, 'faults'):.0f}"
        row["JAX / PyTorch"] = spread(ratio(ours, theirs), digits=2)
        row["in CPU time"] = spread(ratio(ours, theirs, "cpu"), digits=2)
        fine_tune = costs[FINE_TUNE, "JAX"]
        row["beside fine-tune"] = spread(ratio(ours, fine_tune), digits=2)
        rows.append(row)
    return rows


def as_json(costs: dict[tuple[str, str], list[Cost]]) -> list[dict[str, Any]]:
    """All blocks."""
    return [
        {"stage": stage, "side": side, "blocks": [dataclasses.asdict(cost) for cost in blocks]}
        for (stage, side), blocks in costs.items()
    ]


if __name__ == "__main__":
    main()
