"""Where the numbers of a run go beside metrics.jsonl, as `config.log_to` says.

metrics.jsonl is their one home: a logger that fails while a run is at work is left out from there
on, and the run goes on.
"""

import contextlib
import dataclasses
import importlib.util
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from medmerge_jax.errors import UserError
from medmerge_jax.registry import Registry
from medmerge_jax.runtime.progress import say
from medmerge_jax.storage import atomic

IDS_FILE = "loggers.json"
"""In a run directory: by which a service knows the run, so that it goes on there when resumed."""

PROJECT = "medmerge"
"""Names the project or experiment, unless the service's own variable does."""


@dataclasses.dataclass(frozen=True)
class About:
    """What a logger is told of a run; none of it says on whose machine it is."""

    folder: Path  # the run directory, where a logger may leave files
    name: str = ""
    study: str = ""  # that it is a part of
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def known_as(self, service: str) -> str:
        """The id of the run in a service; "" of a new one."""
        path = self.folder / IDS_FILE
        known = atomic.read_json(path) if path.exists() else {}
        return str(known.get(service, ""))

    def remember(self, service: str, known_as: str) -> None:
        """Keeps the id for when the run is resumed."""
        path = self.folder / IDS_FILE
        known = atomic.read_json(path) if path.exists() else {}
        atomic.write_json(path, {**known, service: known_as})


class Logger(Protocol):
    """An open one; any of its methods may raise whatever its package does."""

    def log(self, stage: str, epoch: int, values: Mapping[str, float]) -> None:
        """Takes what is known of an epoch, which after a kill it may have been told before."""

    def close(self, results: Mapping[str, float] | None) -> None:
        """Ends it; with the metrics of a finished run by `split/metric`, None of an unfinished."""


@dataclasses.dataclass(frozen=True)
class LoggerEntry:
    """An entry of `LOGGERS`."""

    open: Callable[[About], Logger]
    module: str  # that it needs
    extra: str  # which brings it
    hint: str = ""  # what to do where it cannot be opened


LOGGERS: Registry[LoggerEntry] = Registry("logger")
"""By the values of `log_to`."""


def check_loggers(names: Sequence[str]) -> None:
    """Raises a UserError if the package of one is not installed."""
    for name in names:
        entry = LOGGERS[name]
        if importlib.util.find_spec(entry.module) is None:
            raise UserError(
                f"log_to has {name!r}, whose package {entry.module} is missing; pip install "
                f"'medmerge-jax[{entry.extra}]', or in a clone pip install -e '.[{entry.extra}]', "
                "brings it"
            )


class Loggers:
    """Those of a run that is at work.

    Args:
      names: Values of `log_to`.
      about: The run.

    Raises:
      UserError: One cannot be opened.
    """

    def __init__(self, names: Sequence[str], about: About):
        self._open: dict[str, Logger] = {}
        for name in dict.fromkeys(names):
            try:
                self._open[name] = LOGGERS[name].open(about)
            except UserError:
                raise
            except Exception as error:
                raise UserError(
                    f"log_to has {name!r}, which cannot be opened ({_short(error)}); "
                    f"{LOGGERS[name].hint}or leave it out of log_to"
                ) from error

    def log(self, record: Mapping[str, Any]) -> None:
        """Tells all of them the numbers of a line of metrics.jsonl."""
        values = {name: value for name, value in record.items() if _is_number(value)}
        epoch = values.pop("epoch")
        for name, logger in list(self._open.items()):
            with self._left_out_if_it_fails(name):
                logger.log(record["stage"], epoch, values)

    def close(self, results: Mapping[str, Any] | None = None) -> None:
        """Ends all of them; `results` is the content of results.json of a finished run."""
        told = None if results is None else dict(_numbers(results))
        for name, logger in list(self._open.items()):
            with self._left_out_if_it_fails(name):
                logger.close(told)
        self._open.clear()

    @contextlib.contextmanager
    def _left_out_if_it_fails(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if LOGGERS[name].module == "tensorboardX":  # which writes into the run directory
                raise
            self._open.pop(name, None)
            say(
                f"warning: {name} is left out from here on ({_short(error)}); metrics.jsonl goes "
                "on, and a resumed run tries it again"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(error: Exception) -> str:
    """On one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _numbers(results: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The metrics of a run on its splits and on further data sets."""
    sets = {split: results.get(split) for split in ("val", "test")}
    for split, metrics in {**sets, **results.get("evaluate_on", {})}.items():
        for name, value in (metrics or {}).items():
            if _is_number(value):
                yield f"{split}/{name}", value


class _TensorBoard:
    """Event files in the run directory; none if nothing is logged."""

    def __init__(self, about: About):
        self._folder = about.folder / "events"
        self._writer: Any = None

    def log(self, stage: str, epoch: int, values: Mapping[str, float]) -> None:
        if self._writer is None:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), write_to_disk=True)
        for name, value in values.items():
            self._writer.add_scalar(f"{stage}/{name}", value, epoch)
        self._writer.flush()

    def close(self, results: Mapping[str, float] | None) -> None:
        del results
        if self._writer is not None:
            self._writer.close()


class _WandB:
    """Weights & Biases. Of the machine, its user and his code it is told nothing."""

    def __init__(self, about: About):
        import wandb

        known_as = about.known_as("wandb") or secrets.token_hex(8)
        about.remember("wandb", known_as)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=known_as,
            resume="allow",
            name=about.name,
            group=about.study or None,
            config=dict(about.config),
            dir=str(about.folder),
            settings=wandb.Settings(
                console="off",
                disable_code=True,
                disable_git=True,
                host="-",
                reinit="create_new",  # one that the user has open in a notebook stays open
                silent=True,
                x_disable_machine_info=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_save_requirements=False,
            ),
        )
        self._stages: set[str] = set()

    def log(self, stage: str, epoch: int, values: Mapping[str, float]) -> None:
        if stage not in self._stages:  # epochs are those of a stage, and may come twice
            self._stages.add(stage)
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/epoch")
        named = {f"{stage}/{name}": value for name, value in values.items()}
        self._run.log({**named, f"{stage}/epoch": epoch})

    def close(self, results: Mapping[str, float] | None) -> None:
        self._run.summary.update(dict(results or {}))
        self._run.finish(exit_code=int(results is None))


class _MLflow:
    """MLflow, by the client that says of a run what it is told to, and nothing of its machine."""

    def __init__(self, about: About):
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        self._client, known_as = MlflowClient(), about.known_as("mlflow")
        if known_as:
            self._client.update_run(known_as, status="RUNNING")
            self._id = known_as
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        if self._client.get_experiment_by_name(name) is None:
            with contextlib.suppress(MlflowException):  # another process may have made it now
                self._client.create_experiment(name)
        experiment: Any = self._client.get_experiment_by_name(name)  # which is there now
        number = experiment.experiment_id
        tags = {"study": about.study} if about.study else {}
        self._id = self._client.create_run(number, run_name=about.name, tags=tags).info.run_id
        about.remember("mlflow", self._id)
        for field, value in _flat(about.config):
            self._client.log_param(self._id, field, value)

    def log(self, stage: str, epoch: int, values: Mapping[str, float]) -> None:
        self._tell({f"{stage}/{name}": value for name, value in values.items()}, epoch)

    def close(self, results: Mapping[str, float] | None) -> None:
        self._tell(results or {}, 0)
        self._client.set_terminated(self._id, "KILLED" if results is None else "FINISHED")

    def _tell(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        found = [Metric(_key(name), float(value), now, step) for name, value in values.items()]
        if found:
            self._client.log_batch(self._id, metrics=found)


_MOST_OF_A_VALUE = 500
"""Characters of a parameter, which all of MLflow's stores take."""


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield _key(f"{prefix}{name}"), str(value)[:_MOST_OF_A_VALUE]


def _key(name: str) -> str:
    """As MLflow takes them: each part like a file's name."""
    return re.sub(r"[^\w\-. /]|(?<=/)\.+(?=/|$)|^[./]+", "_", name)


LOGGERS.add("tensorboard", LoggerEntry(_TensorBoard, "tensorboardX", "train"))
LOGGERS.add(
    "wandb",
    LoggerEntry(_WandB, "wandb", "wandb", "give WANDB_API_KEY, set WANDB_MODE=offline, "),
)
LOGGERS.add(
    "mlflow",
    LoggerEntry(_MLflow, "mlflow", "mlflow", "MLFLOW_TRACKING_URI names a server or a database, "),
)
