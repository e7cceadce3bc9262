"""What a recipe composes: the stages of one run, and what they leave."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from medmerge_jax.config import Config
from medmerge_jax.config import Stage as StageConfig
from medmerge_jax.data import Batches, DataSet, ImageHashes, make_batches
from medmerge_jax.errors import UserError
from medmerge_jax.evaluation.predict import predict
from medmerge_jax.images import Pixels
from medmerge_jax.images.augment import POLICIES
from medmerge_jax.merging import effective_coefficients
from medmerge_jax.merging.trees import flatten, unflatten, without_head
from medmerge_jax.models import LinearHead, create_model, get_spec, mergers
from medmerge_jax.models.network import Network
from medmerge_jax.models.preprocessing import Rendering
from medmerge_jax.recipes.calibration import calibration_images
from medmerge_jax.recipes.inputs import Parent
from medmerge_jax.runtime import processes
from medmerge_jax.storage import atomic
from medmerge_jax.storage.npz import read_npz
from medmerge_jax.storage.run_directory import RunDirectory
from medmerge_jax.training import parameterization
from medmerge_jax.training.loop import train_stage
from medmerge_jax.training.parameterization import Parameterization, Tree
from medmerge_jax.training.stage import Stage, StageResult


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What an experiment has before its sources are trained: its images, and other parents."""

    config: Config
    dataset: DataSet
    pixels: dict[str, Pixels]  # of each split
    fingerprint: str  # of labels, splits and pixels, wherever the files are
    parents: dict[str, Parent]  # by name
    hashes: ImageHashes  # of the images, and of those that the parents were trained on
    audit: dict[str, Any]  # see `data.audit`
    rendering: Rendering  # how the images' numbers became 8 bits


@dataclasses.dataclass(frozen=True)
class Inputs(Prepared):
    """What the runs of an experiment share: all parents, in merging order, and batches."""

    batches: dict[str, Batches]  # of each split
    class_weights: np.ndarray  # of the loss, see `inputs.loss_weights`
    mesh: jax.sharding.Mesh | None = None
    # Filled by linear probes: a parent's features, by (parent, split).
    features: dict[tuple[str, str], np.ndarray] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model and how it came about; what every stage starts from and returns."""

    variables: Tree  # of an ordinary model, with a head
    coefficients: Tree | None = None  # effective ones of the merge linear probe that led here
    stages: tuple[dict[str, Any], ...] = ()  # summaries of those that led here, in order
    # Variables after the epochs that a stage was to keep, by stage and epoch: "ft-3".
    kept: dict[str, Tree] = dataclasses.field(default_factory=dict)

    def after(
        self, result: StageResult, complete: Callable[[Tree], Tree] = lambda variables: variables
    ) -> "Trained":
        """What a stage has made of it; `complete` adds what the stage did not see."""
        stage = result.summary["name"]
        kept = {f"{stage}-{epoch}": complete(model) for epoch, model in result.kept.items()}
        return dataclasses.replace(
            self,
            variables=complete(result.variables),
            stages=(*self.stages, result.summary),
            kept={**self.kept, **kept},
        )


class Experiment:
    """The stages that a recipe composes, on one config, run directory and seed.

    Every method that trains resumes from the stage's checkpoints; a finished stage costs no
    more than reading its last one. What the stages leave is in what they return, not here.
    """

    def __init__(self, config: Config, directory: RunDirectory, inputs: Inputs):
        self.config = config
        self.directory = directory
        self.inputs = inputs
        self._spec = get_spec(config.architecture)
        self.preprocessing = dataclasses.replace(
            self._spec.preprocessing,
            size=config.image_size,
            resize=config.data.resize,
            rendering=inputs.rendering,
        )
        self._dtype = compute_dtype(config.precision)
        self._augmentation = POLICIES.get(config.augmentation)

    def start(self) -> Trained:
        """The parent `config.start` with a new head."""
        return Trained(self._with_new_head(self.inputs.parents[self.config.start][0]))

    def parents(self) -> list[Tree]:
        """All parents, in the order of their names."""
        return [variables for variables, _ in self.inputs.parents.values()]

    def fine_tune(self, model: Trained) -> Trained:
        """Trains everything."""
        start = parameterization.fine_tune(model.variables)
        return model.after(self._train("ft", start, self.config.ft))

    def aligned_parents(self) -> list[Tree]:
        """All parents, the units of all but the last in the order that fits the last's best."""
        *others, (last, last_card) = self.inputs.parents.values()
        aligned = [
            variables
            if "zeros" in (card["source"], last_card["source"])
            else mergers.align(self.config.architecture, last, variables, seed=self.config.seed)
            for variables, card in others
        ]
        return [*aligned, last]

    def merged(self) -> Trained:
        """What `config.merge_ft` makes of the parents, with a new head; merged once in a run."""
        file = self.directory.path / "merged.npz"
        if processes.from_first(file.exists):
            merged = unflatten(read_npz(file))
        else:
            merged = self._merge()
            self.directory.check_there()
            if processes.is_first():
                atomic.write_atomically(file, lambda out: np.savez(out, **flatten(merged)))
        return Trained(self._with_new_head(merged))

    def _merge(self) -> Tree:
        settings = self.config.merge_ft
        parents = {name: variables for name, (variables, _) in self.inputs.parents.items()}
        defaults = mergers.merger_options(settings.method)
        given = {n: value for n, value in settings.options.items() if value is not None}
        options: dict[str, Any] = {n: value for n, value in given.items() if n in defaults}
        if "multilabel" in defaults:
            cards = [card for _, card in self.inputs.parents.values()]
            options["multilabel"] = [bool(card.get("multilabel")) for card in cards]
        if "ancestor" in defaults:
            options["ancestor"] = parents.pop(settings.ancestor)
        try:
            return mergers.merge(
                settings.method,
                self.config.architecture,
                list(parents.values()),
                calibration_images(
                    self._network(num_classes=0),
                    self.inputs.batches["train"],
                    self.config.seed,
                    settings.num_images,
                ),
                heads="drop",
                recalibrate=settings.recalibrate,
                **options,
            )
        except ValueError as error:
            raise UserError(f"merge_ft, {settings.method} of {list(parents)}: {error}") from error

    def linear_probe(
        self, model: Trained, *, train_batch_norm: bool = False, shared_as: str = ""
    ) -> Trained:
        """Trains the head; on frozen features that are computed once where they do not change.

        They do where batch norms train too, where every epoch has other images, and where the
        model draws random numbers, as for dropout. Later probes of the very same backbone find its
        features by the name that they are shared as.
        """
        variables = model.variables
        if train_batch_norm or self._augmentation is not None or self._spec.rngs:
            start = parameterization.linear_probe(
                variables, train_batch_norm=train_batch_norm, role=self._spec.role
            )
            name = "lp_bn" if train_batch_norm else "lp"
            return model.after(self._train(name, start, self.config.lp))
        head = {"params": {"head": variables["params"]["head"]}}
        result = self._train(
            "lp",
            parameterization.fine_tune(head),
            self.config.lp,
            model=LinearHead(self.inputs.dataset.num_classes),
            batches=lambda split: self._feature_batches(variables, split, shared_as),
        )
        return model.after(
            result,
            lambda head: {**variables, "params": {**variables["params"], **head["params"]}},
        )

    def merge_linear_probe(self, parents: Sequence[Tree]) -> Trained:
        """Trains coefficients, batch norms and head; returns the collapsed model."""
        merge = self.config.merge
        start = parameterization.merge_linear_probe(
            parents,
            self._new_head(),
            **dataclasses.asdict(merge),
            role=self._spec.role,
        )
        result = self._train("merge_lp", start, self.config.lp)
        coefficients = effective_coefficients(
            result.trainable["coefficients"], len(parents), merge.constraint
        )
        return Trained(result.variables, coefficients).after(result)

    def logits(self, variables: Tree, split: str) -> np.ndarray:
        """(images, classes) float32 in evaluation mode."""
        return predict(self._network(), variables, self.inputs.batches[split])

    def _train(
        self,
        name: str,
        start: Parameterization,
        settings: StageConfig,
        model: Any = None,
        batches: Callable[[str], Batches] | None = None,
    ) -> StageResult:
        config = self.config
        stage = Stage(
            name=name,
            **dataclasses.asdict(settings),
            weight_decay=config.weight_decay,
            select=config.select.epoch,
            metric=config.select.metric,
            checkpoint_seconds=config.checkpoint_seconds,
            augmentation=self._augmentation,
            ordinal=self.inputs.dataset.ordered,
        )
        return train_stage(
            stage,
            start,
            self._network(model),
            batches or self.inputs.batches.__getitem__,
            self.directory,
            seed=config.seed,
            multilabel=self.inputs.dataset.multilabel,
            class_weights=self.inputs.class_weights,
        )

    def _network(self, model: Any = None, num_classes: int | None = None) -> Network:
        """Of the architecture with a head for the classes, unless something else is given."""
        if model is None:
            classes = self.inputs.dataset.num_classes if num_classes is None else num_classes
            model = create_model(self.config.architecture, num_classes=classes, dtype=self._dtype)
        # A head on features draws no random numbers.
        rngs = () if isinstance(model, LinearHead) else self._spec.rngs
        return Network(model, self.preprocessing, self.inputs.mesh, rngs)

    def _feature_batches(self, variables: Tree, split: str, shared_as: str) -> Batches:
        """The split as features of a frozen backbone."""
        batches = self.inputs.batches[split]
        features = self.inputs.features.get((shared_as, split))
        if features is None:
            features = predict(self._network(num_classes=0), without_head(variables), batches)
            if shared_as:
                self.inputs.features[shared_as, split] = features
        # A head on features takes no memory: there is nothing to accumulate.
        return make_batches(features, batches.labels, self.config.batch_size, mesh=self.inputs.mesh)

    def _with_new_head(self, variables: Tree) -> Tree:
        backbone = without_head(variables)
        return {**backbone, "params": {**backbone["params"], "head": self._new_head()}}

    def _new_head(self) -> Tree:
        """The same for every recipe of one seed."""
        head = LinearHead(self.inputs.dataset.num_classes)
        features = jnp.zeros((1, self._spec.num_features))
        params: Tree = head.init(jax.random.key(self.config.seed), features)["params"]["head"]
        return params


def compute_dtype(precision: str) -> Any:
    """bfloat16 on a GPU and float32 elsewhere, unless the config says which."""
    if precision == "auto":
        precision = "bfloat16" if jax.default_backend() == "gpu" else "float32"
    return jnp.dtype(precision).type
