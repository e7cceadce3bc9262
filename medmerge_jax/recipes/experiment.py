"""What a recipe composes: the stages of one run, and what they leave."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from medmerge_jax import weights
from medmerge_jax.config import Config
from medmerge_jax.config import Stage as StageConfig
from medmerge_jax.data import Batches, DataSet, ImageHashes, make_batches
from medmerge_jax.errors import UserError
from medmerge_jax.evaluation.predict import predict
from medmerge_jax.evaluation.predictions import Predictions, predictions_of
from medmerge_jax.images import Pixels
from medmerge_jax.images.augment import POLICIES
from medmerge_jax.merging import effective_coefficients
from medmerge_jax.merging.trees import flatten, unflatten, without_head
from medmerge_jax.models import LinearHead, create_model, get_spec, mergers
from medmerge_jax.models.network import Network
from medmerge_jax.models.preprocessing import Rendering
from medmerge_jax.models.statistics import recalibrated
from medmerge_jax.recipes.calibration import calibration_batches
from medmerge_jax.recipes.inputs import Parent
from medmerge_jax.recipes.sets import EvaluationSet
from medmerge_jax.runtime import processes
from medmerge_jax.storage import atomic
from medmerge_jax.storage.npz import read_npz
from medmerge_jax.storage.run_directory import RunDirectory
from medmerge_jax.training import parameterization, schedules
from medmerge_jax.training.blocks import by_block
from medmerge_jax.training.loop import train_stage
from medmerge_jax.training.parameterization import Parameterization, Tree
from medmerge_jax.training.stage import Stage, StageResult


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What an experiment has before its sources are trained: its images, and other parents."""

    config: Config
    folder: Path  # of the study, where the jobs are that parents name
    dataset: DataSet
    pixels: dict[str, Pixels]  # of each split
    fingerprint: str  # of labels, splits and pixels, wherever the files are
    parents: dict[str, Parent]  # by name
    hashes: ImageHashes  # of the images, and of those that the parents were trained on
    audit: dict[str, Any]  # see `data.audit`
    rendering: Rendering  # how the images' numbers became 8 bits
    further: dict[str, EvaluationSet]  # what the model is evaluated on besides, by name


@dataclasses.dataclass(frozen=True)
class Inputs(Prepared):
    """What the runs of an experiment share: all parents, in merging order, and batches."""

    batches: dict[str, Batches]  # of each split
    class_weights: np.ndarray  # of the loss, see `inputs.loss_weights`
    mesh: jax.sharding.Mesh | None = None
    # Filled by linear probes: by `Trained.backbone` and split.
    features: dict[tuple[str, str], np.ndarray] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model and how it came about; what every stage starts from and returns."""

    variables: Tree  # of an ordinary model, with a head
    coefficients: Tree | None = None  # effective ones of the merge linear probe that led here
    stages: tuple[dict[str, Any], ...] = ()  # summaries of those that led here, in order
    # Variables after the epochs that a stage was to keep, by stage and epoch: "ft-3".
    kept: dict[str, Tree] = dataclasses.field(default_factory=dict)
    backbone: str = ""  # names one that no stage has changed, so that its features are shared
    head: str = ""  # sha256 of the head that it began with: only models of one head make a soup
    opt_state: Any = None  # of the optimiser after the last stage, if that was to keep it
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)  # more for results.json

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
            opt_state=result.opt_state,
            backbone="",
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
        self._rngs = (*self._spec.rngs, *(["drop_path"] if config.drop_path else []))

    def start(self) -> Trained:
        """The parent `config.start`, with a new head or, if `config.head` says so, its own.

        Raises:
          UserError: Its own is of other classes, or there is none.
        """
        variables, card = self.inputs.parents[self.config.start]
        which = card.get("fingerprint", card["source"])
        backbone = f"{self.config.architecture} {self._dtype.__name__} {which}"
        if self.config.head == "new":
            return _with_head(variables, self._new_head(), backbone)
        classes, own = self.inputs.dataset.classes, card.get("classes")
        head = variables["params"].get("head")
        if head is None or len(head["bias"]) != len(classes) or list(own or classes) != [*classes]:
            has = "has no head" if head is None else f"has the classes {own or len(head['bias'])}"
            raise UserError(
                f"head = 'keep': parent {self.config.start} {has}, the data has {list(classes)}; "
                "head = 'new' begins with a new one"
            )
        return _with_head(variables, head, backbone)

    def parents(self) -> list[Tree]:
        """All parents, in the order of their names."""
        return [variables for variables, _ in self.inputs.parents.values()]

    def fine_tune(self, model: Trained, *, keep_optimizer: bool = False) -> Trained:
        """Trains everything, or the last blocks, as `config.ft` says."""
        start = self._fine_tuning(model.variables)
        result = self._train("ft", start, self.config.ft, keep_optimizer=keep_optimizer)
        return model.after(result)

    def generate(self, model: Trained) -> Trained:
        """Trains on what `fine_tune` did, at rates that fall and rise; keeps the minima.

        The optimiser goes on as it is. The model stays too; those of the minima are beside it.
        """
        fgg = self.config.fgg
        settings = StageConfig(
            fgg.learning_rate, fgg.epochs, keep=schedules.minima(fgg.epochs, fgg.cycle)
        )
        start = self._fine_tuning(model.variables, model.opt_state)
        cycle: dict[str, Any] = {"cycle": fgg.cycle, "lowest": fgg.lowest, "select": "last"}
        after = model.after(self._train("fgg", start, settings, **cycle))
        return dataclasses.replace(after, variables=model.variables)

    def _fine_tuning(self, variables: Tree, opt_state: Any = None) -> Parameterization:
        start = parameterization.fine_tune(variables, opt_state)
        depths, ft = self._spec.depths(start.trainable["params"]), self.config.ft
        return by_block(start, depths, blocks=ft.blocks, layer_decay=ft.layer_decay)

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
        return _with_head(merged, self._new_head())

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
                np.concatenate(list(self._calibration_batches(settings.num_images))),
                heads="drop",
                recalibrate=settings.recalibrate,
                repair=settings.repair,
                **options,
            )
        except ValueError as error:
            raise UserError(f"merge_ft, {settings.method} of {list(parents)}: {error}") from error

    def linear_probe(self, model: Trained, *, norms: str = "freeze") -> Trained:
        """Trains the head; on frozen features that are computed once where they do not change.

        They do where batch norms are not frozen (see `parameterization.NORMS`), where every epoch
        has other images, and where the model draws random numbers, as for dropout. Later probes of
        a parent's backbone find its features by its name.
        """
        variables = model.variables
        if norms != "freeze" or self._augmentation is not None or self._rngs:
            start = parameterization.linear_probe(variables, norms=norms, role=self._spec.role)
            name = {"freeze": "lp", "drift": "lp_drift", "train": "lp_bn"}[norms]
            return model.after(self._train(name, start, self.config.lp))
        head = {"params": {"head": variables["params"]["head"]}}
        result = self._train(
            "lp",
            parameterization.fine_tune(head),
            self.config.lp,
            model=LinearHead(self.inputs.dataset.num_classes),
            batches=lambda split: self._feature_batches(model, split),
        )
        return model.after(
            result,
            lambda head: {**variables, "params": {**variables["params"], **head["params"]}},
        )

    def merge_linear_probe(self, parents: Sequence[Tree]) -> Trained:
        """Trains coefficients, batch norms and head; returns the collapsed model."""
        merge, head = self.config.merge, self._new_head()
        start = parameterization.merge_linear_probe(
            parents,
            head,
            **dataclasses.asdict(merge),
            role=self._spec.role,
            tie=self._spec.tie,
        )
        result = self._train("merge_lp", start, self.config.lp)
        coefficients = effective_coefficients(
            result.trainable["coefficients"], len(parents), merge.constraint
        )
        began = Trained(result.variables, coefficients, head=_fingerprint(head))
        return began.after(result)

    def predictions(self, variables: Tree, split: str) -> Predictions:
        """Of a model, in evaluation mode."""
        logits = predict(self.network, variables, self.inputs.batches[split])
        return predictions_of(logits, self.inputs.dataset, split)

    @property
    def network(self) -> Network:
        """The architecture, with a head for the classes."""
        return self._network()

    def predictions_on(self, further: str, variables: Tree) -> Predictions:
        """On one of the further data sets, of the classes that it shares with the model."""
        one = self.inputs.further[further]
        return one.predictions(self._network(), variables, self.config)

    def _train(
        self,
        name: str,
        start: Parameterization,
        settings: StageConfig,
        model: Any = None,
        batches: Callable[[str], Batches] | None = None,
        **options: Any,
    ) -> StageResult:
        """Of a stage with these settings and options of `Stage`."""
        config = self.config
        common = {
            "group": next((x for x in ("lp", "ft") if getattr(config, x) is settings), "fgg"),
            "weight_decay": config.weight_decay,
            "select": config.select.epoch,
            "metric": config.select.metric,
            "checkpoint_seconds": config.checkpoint_seconds,
            "augmentation": self._augmentation,
            "ordinal": self.inputs.dataset.ordered,
        }
        of_all = {one.name: getattr(settings, one.name) for one in dataclasses.fields(StageConfig)}
        stage = Stage(name=name, **{**common, **options}, **of_all)
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
            config = self.config
            model = create_model(
                config.architecture, classes, self._dtype, drop_path=config.drop_path
            )
        # A head on features draws no random numbers.
        rngs = () if isinstance(model, LinearHead) else self._rngs
        return Network(model, self.preprocessing, self.inputs.mesh, rngs)

    def _feature_batches(self, model: Trained, split: str) -> Batches:
        """The split as features of a frozen backbone."""
        batches, name = self.inputs.batches[split], (model.backbone, split)
        features = self.inputs.features.get(name)
        if features is None:
            backbone = without_head(model.variables)
            features = predict(self._network(num_classes=0), backbone, batches)
            if model.backbone:
                self.inputs.features[name] = features
        # A head on features takes no memory: there is nothing to accumulate.
        return make_batches(features, batches.labels, self.config.batch_size, mesh=self.inputs.mesh)

    def recalibrated(self, variables: Tree, count: int) -> Tree:
        """Variables with running statistics of so many training images, see `recalibrate`."""
        batches = self._calibration_batches(count)
        return recalibrated(self.config.architecture, variables, batches, self._dtype)

    def _calibration_batches(self, count: int) -> Iterator[np.ndarray]:
        network, train = self._network(num_classes=0), self.inputs.batches["train"]
        return calibration_batches(network, train, self.config.seed, count)

    def _new_head(self) -> Tree:
        """The same for every recipe of one seed."""
        head = LinearHead(self.inputs.dataset.num_classes)
        features = jnp.zeros((1, self._spec.num_features))
        params: Tree = head.init(jax.random.key(self.config.seed), features)["params"]["head"]
        return params


def _with_head(variables: Tree, head: Tree, backbone: str = "") -> Trained:
    """A model, whose backbone may have a name that tells it from all others."""
    rest = without_head(variables)
    model = {**rest, "params": {**rest["params"], "head": head}}
    return Trained(model, head=_fingerprint(head), backbone=backbone)


def _fingerprint(head: Tree) -> str:
    return weights.model_fingerprint({"head": head})


def compute_dtype(precision: str) -> Any:
    """bfloat16 on a GPU and float32 elsewhere, unless the config says which."""
    if precision == "auto":
        precision = "bfloat16" if jax.default_backend() == "gpu" else "float32"
    return jnp.dtype(precision).type
