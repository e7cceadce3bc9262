"""MedMerge and LP-FT in PyTorch, written for speed: what the package is measured beside.

    python benchmarks/pytorch_recipe.py --recipe medmerge --data images --epochs 50 \
        --weights b.safetensors c.safetensors --head head.safetensors --workdir runs/pytorch \
        --cache runs/pytorch-cache --dtype bfloat16

What makes it fast: uint8 images that are decoded once, by the workers of a DataLoader, kept in a
file, and resident on the device; normalised there; channels last; on a GPU `torch.compile`,
bfloat16 autocast, TF32 and cuDNN's search for the fastest kernel; a fused AdamW; gradients set to
none; no value fetched inside an epoch; the features of a frozen backbone computed once. The stages,
the order of the images and the choice of the best epoch are the package's.

Nothing here imports JAX. `whole_recipe.py` runs it, `training_step.py` times its steps.
"""

import argparse
import contextlib
import copy
import dataclasses
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize

from medmerge_jax.runtime.cpu import keep_freed_memory

WEIGHT_DECAY = 1e-2
CHECKPOINT_SECONDS = 30.0
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main() -> None:
    """Trains, and writes weights and results.json into the workdir."""
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", choices=("medmerge", "lp_ft"), required=True)
    parser.add_argument("--architecture", default="densenet121")
    parser.add_argument("--data", type=Path, required=True, help="folder/<split>/<class>/<image>")
    parser.add_argument("--weights", type=Path, nargs=2, required=True, metavar=("B", "C"))
    parser.add_argument("--head", type=Path, required=True, help="weight and bias to start from")
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True, help="folder for decoded images")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=50, help="of each stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    parser.add_argument("--compile", default=default_compile(), help="mode, or off")
    options = parser.parse_args()

    options.workdir.mkdir(parents=True, exist_ok=True)
    run = Run(options, Settings.of_machine(options.compile, getattr(torch, options.dtype)))
    b, c = (load_network(options.architecture, path) for path in options.weights)
    replace_head(b, load_file(options.head))
    if options.recipe == "medmerge":
        run.train(merge_linear_probe(b, c), "merge_lp", 1e-4)
        collapse(b)
    else:
        run.probe(b, "lp", 1e-4)
    run.train(fine_tune(b), "ft", 1e-5)
    run.finish(b)


def default_compile() -> str:
    """The mode of `torch.compile`: on a GPU its default; off on a CPU, where it is optional."""
    return "default" if torch.cuda.is_available() else "off"


def allow_tf32(allowed: bool) -> None:
    """Whether a GPU may round float32 factors to TF32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def import_torchvision() -> ModuleType:
    """torchvision, also where its operators are not those of this PyTorch, as in CPU-only wheels.

    The networks need no operators of its own, but for names that it registers shapes for.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError:  # "operator torchvision::nms does not exist"
        if torch.version.cuda is not None:
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    module = importlib.import_module("torchvision")
    module.schemas_kept_alive = library
    return module


@dataclasses.dataclass(frozen=True)
class Settings:
    """Where and how to compute.

    Attributes:
      device: Of everything.
      dtype: Of the activations: float32, or bfloat16 by autocast.
      compile: Mode of `torch.compile`, or "off".
    """

    device: torch.device
    dtype: torch.dtype
    compile: str

    @classmethod
    def of_machine(cls, compile_mode: str, dtype: torch.dtype) -> "Settings":
        """On a GPU, if there is one."""
        torch.backends.cudnn.benchmark = True
        allow_tf32(True)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return cls(device, dtype, compile_mode)

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function in the computing dtype, compiled unless that is off."""

        def computed(*arguments: torch.Tensor) -> torch.Tensor:
            lower = self.dtype != torch.float32
            with torch.autocast(self.device.type, self.dtype, enabled=lower):
                return function(*arguments)

        if self.compile == "off":
            return computed
        return torch.compile(computed, mode=self.compile, dynamic=False)

    def wait(self) -> None:
        """Until the device has done what it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


HEADS = ("fc", "classifier", "head")
"""Names of the last layer in torchvision's ResNets and DenseNets, and in timm's transformers."""


def new_network(architecture: str, num_classes: int, seed: int) -> nn.Module:
    """A network of torchvision with random weights, residual branches damped as trained ones are.

    Undamped, fifty blocks of random weights multiply rounding errors beyond any use. Transformers
    are timm's, whose attention is PyTorch's fused one.
    """
    torch.manual_seed(seed)
    models = import_torchvision().models
    if architecture.startswith(("deit_", "vit_")):
        timm: Any = importlib.import_module("timm")
        return timm.create_model(architecture, num_classes=num_classes)  # type: ignore[no-any-return]
    network = getattr(models, architecture)(weights=None, num_classes=num_classes)
    for block in network.modules():
        if "BasicBlock" in type(block).__name__:
            block.bn2.weight.data.mul_(0.2)
        elif "Bottleneck" in type(block).__name__:
            block.bn3.weight.data.mul_(0.2)
    return network


def load_network(architecture: str, path: Path) -> nn.Module:
    """A network of `new_network` with the weights of a file."""
    state = load_file(path)
    (bias,) = (state[f"{name}.bias"] for name in HEADS if f"{name}.bias" in state)
    network = new_network(architecture, len(bias), seed=0)
    network.load_state_dict(state)
    return network


def save_network(network: nn.Module, path: Path) -> None:
    """Writes weights and running statistics as they are named."""
    save_file({name: x.contiguous() for name, x in network.state_dict().items()}, path)


def head_of(network: nn.Module) -> nn.Linear:
    """The last layer."""
    (head,) = (getattr(network, name) for name in HEADS if hasattr(network, name))
    return head  # type: ignore[no-any-return]


def replace_head(network: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Puts `weight` and `bias` of a head, for whatever number of classes, into the network."""
    head = head_of(network)
    head.weight, head.bias = nn.Parameter(tensors["weight"]), nn.Parameter(tensors["bias"])
    head.out_features = len(tensors["bias"])


def backbone_of(network: nn.Module) -> nn.Module:
    """A copy that returns the features which the head would get."""
    backbone = copy.deepcopy(network).requires_grad_(False)
    setattr(backbone, "fc" if hasattr(backbone, "fc") else "classifier", nn.Identity())
    return backbone


class Normalised(nn.Module):
    """A network that takes uint8 images (n, h, w, 3), or features as they are."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (MEAN, STD))
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("shift", -mean / std)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits, or what else the network makes."""
        if inputs.dtype != torch.uint8:
            return self.network(inputs)
        images = inputs.permute(0, 3, 1, 2)  # seen as channels first, it lies channels last
        return self.network(images.float() * self.scale + self.shift)


class Blend(nn.Module):
    """Makes w · b + (1 - w) · c of c's kernel, with a trained w for every filter.

    Written as c + w · (b - c), of which the difference is constant: on a CPU the fastest of four.
    """

    def __init__(self, b: torch.Tensor, c: torch.Tensor):
        super().__init__()
        self.register_buffer("difference", (b - c).detach())
        self.coefficients = nn.Parameter(torch.full((len(b), 1, 1, 1), 0.5))

    def forward(self, c: torch.Tensor) -> torch.Tensor:
        """The blended kernel, (c_out, c_in, h, w)."""
        return torch.addcmul(c, self.coefficients, self.difference)


def fine_tune(network: nn.Module) -> nn.Module:
    """Everything is trained."""
    return network.requires_grad_(True).train()


def merge_linear_probe(b: nn.Module, c: nn.Module) -> nn.Module:
    """`b` made to blend its kernels with c's; coefficients, batch norms and b's head are trained.

    Batch norms start as the mean of both.
    """
    b.requires_grad_(False)
    others = dict(c.named_modules())
    for name, module in list(b.named_modules()):
        other = others[name]
        if isinstance(module, nn.Conv2d):
            blend = Blend(module.weight, other.weight)
            module.weight.data.copy_(other.weight.data)
            parametrize.register_parametrization(module, "weight", blend)
        elif isinstance(module, nn.BatchNorm2d):
            for key in ("weight", "bias", "running_mean", "running_var"):
                getattr(module, key).data.lerp_(getattr(other, key).data, 0.5)
            module.requires_grad_(True)
    head_of(b).requires_grad_(True)
    return b.train()


def collapse(network: nn.Module) -> None:
    """Puts the blended kernels in the place of coefficients and parents."""
    for module in network.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")


class Step:
    """The training step of whatever parameters of a network want gradients."""

    def __init__(self, network: nn.Module, settings: Settings, learning_rate: float):
        self.network = network.to(settings.device, memory_format=torch.channels_last)
        self.trained = {n: p for n, p in self.network.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), learning_rate, weight_decay=WEIGHT_DECAY, fused=True
        )
        normalised = Normalised(self.network).to(settings.device)

        def loss(inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return functional.cross_entropy(normalised(inputs).float(), labels)

        self._loss = settings.compiled(loss)

    def __call__(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Steps, and returns the loss before."""
        loss = self._loss(inputs, labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


class Predict:
    """Logits or features in evaluation mode; all batches have one size."""

    def __init__(self, network: nn.Module, settings: Settings):
        self._network = network.to(settings.device, memory_format=torch.channels_last)
        normalised = Normalised(network).to(settings.device)
        self._compiled = settings.compiled(lambda inputs: normalised(inputs).float())

    @torch.no_grad()
    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """(n, outputs) float32."""
        was_training = self._network.training
        self._network.eval()
        outputs = self._compiled(inputs)
        self._network.train(was_training)
        return outputs

    def all(self, inputs: torch.Tensor, batch_size: int) -> torch.Tensor:
        """Of a whole split."""
        size = min(batch_size, len(inputs))
        parts = [self(inputs[i : i + size]) for i in range(0, len(inputs) - size + 1, size)]
        if rest := len(inputs) % size:
            parts.append(self(inputs[-size:])[-rest:])
        return torch.cat(parts)


@dataclasses.dataclass(frozen=True)
class Split:
    """Images or features, and labels, on the device."""

    inputs: torch.Tensor
    labels: torch.Tensor
    classes: list[str]


class Run:
    """The data and the stages of a recipe, with what they took."""

    def __init__(self, options: argparse.Namespace, settings: Settings):
        self.options, self.settings = options, settings
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.losses: dict[str, list[float]] = {}
        self._predicts: dict[int, Predict] = {}
        with self._timed("data"):
            self.splits = {name: self._split(name) for name in ("train", "val", "test")}

    def train(
        self, network: nn.Module, stage: str, rate: float, splits: dict[str, Split] | None = None
    ) -> None:
        """Trains what wants gradients, and leaves the weights of the best epoch."""
        splits = splits or self.splits
        with self._timed(stage):
            step = Step(network, self.settings, rate)
            predict = Predict(network, self.settings)
            best, state, saved = -1.0, {}, 0.0
            self.losses[stage] = []
            for epoch in range(self.options.epochs):
                self.losses[stage].append(self._epoch(step, splits["train"], stage, epoch))
                with self._first("compile", epoch == 0):
                    value = self._macro_f1(predict, splits["val"])
                if value > best:
                    best, state = value, copy.deepcopy(network.state_dict())
                last = epoch == self.options.epochs - 1
                if epoch == 0 or last or time.monotonic() - saved > CHECKPOINT_SECONDS:
                    self._checkpoint(stage, network, step, state)
                    saved = time.monotonic()
            network.load_state_dict(state)

    def probe(self, network: nn.Module, stage: str, rate: float) -> None:
        """Trains the head on features that are computed once."""
        size = self.options.batch_size
        with self._timed("features"):
            predict = Predict(backbone_of(network), self.settings)
            features = {
                name: dataclasses.replace(split, inputs=predict.all(split.inputs, size))
                for name, split in self.splits.items()
                if name != "test"
            }
            self.settings.wait()
        self.train(head_of(network), stage, rate, features)

    def finish(self, network: nn.Module) -> None:
        """Evaluates on the test split, and writes everything."""
        predict = Predict(network, self.settings)
        results = {
            "test_macro_f1": self._macro_f1(predict, self.splits["test"]),
            "losses": self.losses,
            "seconds": {**self.seconds, "after imports": time.perf_counter() - self.started},
        }
        save_network(network, self.options.workdir / "model.safetensors")
        (self.options.workdir / "results.json").write_text(json.dumps(results, indent=2) + "\n")

    def _epoch(self, step: Step, split: Split, stage: str, epoch: int) -> float:
        """The mean loss of an epoch's steps."""
        count, device = len(split.labels), self.settings.device
        size = min(self.options.batch_size, count)
        order = torch.from_numpy(epoch_order(count, self.options.seed, epoch)).to(device)
        rows = order[: count // size * size].reshape(-1, size)
        total = torch.zeros((), device=device)
        for index, batch in enumerate(rows):
            with self._first("compile", epoch == index == 0):
                total += step(split.inputs[batch], split.labels[batch])
        return total.item() / len(rows)

    def _macro_f1(self, predict: Predict, split: Split) -> float:
        from sklearn.metrics import f1_score

        logits = predict.all(split.inputs, self.options.batch_size)
        return float(f1_score(split.labels.cpu(), logits.argmax(1).cpu(), average="macro"))

    def _checkpoint(self, stage: str, network: nn.Module, step: Step, best: Any) -> None:
        with self._timed("checkpoints"):
            state = (network.state_dict(), step.optimizer.state_dict(), best)
            path = self.options.workdir / f"{stage}.pt"
            torch.save(state, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)

    def _split(self, name: str) -> Split:
        """Decoded by the workers of a DataLoader, or by an earlier run."""
        size = self.options.image_size
        folder = import_torchvision().datasets.ImageFolder(
            self.options.data / name, lambda image: decoded(image, size)
        )
        cached = self.options.cache / f"{name}.pt"
        if cached.exists():
            images = torch.load(cached)
        else:
            workers = len(os.sched_getaffinity(0))
            loader = torch.utils.data.DataLoader(folder, batch_size=32, num_workers=workers)
            images = torch.cat([batch for batch, _ in loader])
            cached.parent.mkdir(parents=True, exist_ok=True)
            torch.save(images, cached)
        device = self.settings.device
        return Split(images.to(device), torch.tensor(folder.targets).to(device), folder.classes)

    @contextlib.contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - started

    @contextlib.contextmanager
    def _first(self, what: str, counts: bool) -> Iterator[None]:
        """Times the first call of a compiled function, which compiles it."""
        if not counts or self.settings.compile == "off":
            yield
            return
        with self._timed(what):
            yield
            self.settings.wait()


def decoded(image: Image.Image, size: int) -> torch.Tensor:
    """uint8 (size, size, 3)."""
    resized = image.resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized))


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The package's order of an epoch, so that losses can be compared."""
    key = np.array([seed, epoch], np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(count), kind="stable")


def first_moments(step: Step) -> dict[str, torch.Tensor]:
    """AdamW's mean gradients, by the names that kernels have when they are not blended.

    Of coefficients, a filter's gradient stands at each number of its kernel.
    """
    moments = {}
    for name, parameter in step.trained.items():
        moment = step.optimizer.state[parameter]["exp_avg"]
        if name.endswith("coefficients"):
            name = name.replace("parametrizations.weight.0.coefficients", "weight")
            moment = moment.expand_as(step.network.get_submodule(name[: -len(".weight")]).weight)
        moments[name] = moment
    return moments


def conv_outputs(network: nn.Module, shape: Sequence[int]) -> list[tuple[nn.Module, torch.Size]]:
    """The convolutions and dense layers in the order that they compute, and their outputs' shapes.

    Args:
      network: Is not computed, only its shapes.
      shape: Of the images, (n, h, w, 3).
    """
    outputs: list[tuple[nn.Module, torch.Size]] = []
    network = copy.deepcopy(network).to("meta")
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda m, _, output: outputs.append((m, output.shape)))
    network(torch.empty(shape[0], 3, *shape[1:3], device="meta"))
    return outputs


if __name__ == "__main__":
    main()
