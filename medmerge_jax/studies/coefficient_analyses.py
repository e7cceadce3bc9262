"""The command analyse, of run directories: what merges have learned, over depth and training."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from medmerge_jax.analysis.coefficients import Depth, Target, Trajectory, depth, trajectory
from medmerge_jax.analysis.csv_files import write_csv
from medmerge_jax.analysis.layer_figures import depth_figure, rank_figure, trajectory_figure
from medmerge_jax.analysis.rank import LEAST, rank_correlation
from medmerge_jax.config import completed
from medmerge_jax.errors import UserError
from medmerge_jax.evaluation.metrics import METRICS, titles
from medmerge_jax.storage import atomic
from medmerge_jax.storage.npz import read_npz
from medmerge_jax.storage.run_directory import COEFFICIENTS, RunDirectory
from medmerge_jax.studies.state import JobStates

_FILE = "coefficients.npz"


class Merge(NamedTuple):
    """A finished run that has learned coefficients."""

    folder: Path
    name: str  # of the job in its study; "" of a single run
    config: dict[str, Any]  # without its seed
    parents: tuple[str, ...]  # names, but "zeros" of a parent of zeros

    def coefficients(self) -> dict[str, np.ndarray]:
        """By path of the kernel."""
        return read_npz(self.folder / _FILE)


def merges_in(folder: Path) -> list[Merge]:
    """The merges of a run directory or of a study, in the order of the study's jobs.

    Raises:
      UserError: There is none.
    """
    names = [""] if (folder / _FILE).exists() else list(JobStates(folder).read())
    found = [_merge(folder / name, name) for name in names if (folder / name / _FILE).exists()]
    if not found:
        raise UserError(
            f"{folder}: there are no learned coefficients; a finished run of the recipe medmerge "
            f"or merge_lp ({_FILE}), or a study with such runs, is wanted"
        )
    return found


def _merge(folder: Path, name: str) -> Merge:
    directory = RunDirectory(folder)
    results, recorded = (directory.read_json(file) for file in ("results.json", "config.json"))
    if results is None or recorded is None:
        raise UserError(f"{folder}: the run is not finished; finish it, or leave it out")
    try:
        config = completed(recorded["config"])
        del config["seed"]
        cards = sorted(results["parents"].items())
        parents = ["zeros" if card.get("source") == "zeros" else name for name, card in cards]
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}: config.json or results.json is not as this program writes it "
            f"({type(error).__name__}: {error})"
        ) from error
    return Merge(folder, name, config, tuple(parents))


def grouped(label: str, merges: Sequence[Merge]) -> dict[str, list[Merge]]:
    """Merges that differ in nothing but their seed, by what they are called.

    Args:
      label: Of the study or run.
      merges: In it.
    """
    groups: dict[str, list[Merge]] = {}
    for one in merges:
        groups.setdefault(json.dumps(one.config, sort_keys=True), []).append(one)
    if len(groups) == 1:
        return {label: list(merges)}
    # The folder of the seeds, as "medmerge" of medmerge/seed0.
    return {
        f"{label}: {of[0].name.rpartition('/')[0] if len(of) > 1 else of[0].name}": of
        for of in groups.values()
    }


def depth_maps(sources: Mapping[str, Path], out: Path) -> Depth:
    """The coefficients of runs and studies by depth; writes depth.png, depth.csv and depth.json.

    Args:
      sources: Run directories and studies by what they are called.
      out: The folder.
    """
    targets = [
        Target(name, of[0].parents, tuple(one.coefficients() for one in of))
        for label, folder in sources.items()
        for name, of in grouped(label, merges_in(folder)).items()
    ]
    found = depth(targets)
    columns = (found.mean, found.inside, found.between)
    write_csv(
        out / "depth.csv",
        ["row", "parent", "layer", "mean", "deviation_inside", "deviation_between_seeds", "seeds"],
        [
            [found.rows[row], found.parents[row], layer, *of, found.seeds[row]]
            for row in range(len(found.rows))
            for layer, of in zip(
                found.layers, np.stack([x[row] for x in columns], axis=1).tolist(), strict=True
            )
        ],
    )
    depth_figure(found, out / "depth.png")
    rows = zip(found.rows, found.parents, found.seeds, strict=True)
    results = {
        "rows": [{"row": row, "parent": of, "seeds": seeds} for row, of, seeds in rows],
        "layers": len(found.layers),
        "parents": found.num_parents,
    }
    atomic.write_json(out / "depth.json", results)
    return found


def trajectories(sources: Mapping[str, Path], out: Path) -> list[Trajectory]:
    """Coefficients over training, a row for each run; writes trajectory.png, .csv and .json.

    Args:
      sources: Run directories and studies by what they are called.
      out: The folder.
    """
    found = []
    for label, folder in sources.items():
        for one in merges_in(folder):
            records = RunDirectory(one.folder).records(COEFFICIENTS)
            if not records:
                raise UserError(
                    f"{one.folder}: has no {COEFFICIENTS}, as runs of an earlier version; run the "
                    "merge again in a new --workdir"
                )
            name = f"{label}: {one.name}" if one.name else label
            found.append(trajectory(name, one.parents, records))
    if others := [one.label for one in found if one.layers != found[0].layers]:
        raise UserError(
            f"{others[0]}: has other layers than {found[0].label}; draw runs of another "
            "architecture by themselves"
        )
    write_csv(
        out / "trajectory.csv",
        ["run", "parent", "epoch", "layer", "mean", "deviation", "least", "greatest"],
        [
            [one.label, parent, int(epoch), layer, *one.values[:, row, column, number].tolist()]
            for one in found
            for number, parent in enumerate(one.parents)
            for row, epoch in enumerate(one.epochs)
            for column, layer in enumerate(one.layers)
        ],
    )
    trajectory_figure(found, out / "trajectory.png")
    runs = [{"run": of.label, "parents": of.parents, "epochs": len(of.epochs)} for of in found]
    atomic.write_json(out / "trajectory.json", {"runs": runs})
    return found


class _Point(NamedTuple):
    """A target of a rank correlation."""

    coefficients: dict[str, float]  # mean weight of the first parent by layer
    score: float  # by how much fine-tuning from it is better than from the other
    parents: tuple[str, ...]


def ranks(
    sources: Mapping[str, Path], out: Path, metric: str = "macro_f1", recipe: str = "medmerge"
) -> dict[str, Any]:
    """Correlates coefficients with fine-tuning scores; writes rank.png, rank.csv and rank.json.

    Args:
      sources: Comparisons (recipe `compare`) by what they are called, each with fine-tuning from
        both parents and the merge: a target each, of which the means over seeds count.
      out: The folder.
      metric: Of the test images, by which fine-tuning is compared.
      recipe: Of the merge.

    Returns:
      What rank.json has.

    Raises:
      UserError: There are fewer than three, or one of them lacks something.
    """
    if len(sources) < LEAST:
        raise UserError(
            f"{len(sources)} comparisons; {LEAST} or more are wanted, each of another target: of "
            "two every rank correlation is 1 or -1"
        )
    points = {label: _point(folder, metric, recipe) for label, folder in sources.items()}
    first = next(iter(points.values()))
    for label, point in points.items():
        if point.parents != first.parents or point.coefficients.keys() != first.coefficients.keys():
            raise UserError(
                f"{label}: merges {' and '.join(point.parents)} in {len(point.coefficients)} "
                f"layers, and the first {' and '.join(first.parents)} in "
                f"{len(first.coefficients)}; all must have the same parents and architecture"
            )
    layers = list(first.coefficients)
    values = np.array([list(point.coefficients.values()) for point in points.values()])
    scores, means = np.array([point.score for point in points.values()]), values.mean(axis=1)
    found = rank_correlation(layers, values, scores)
    whole = rank_correlation(["all"], means[:, None], scores)
    b, c = first.parents
    results = {
        "metric": metric,
        "parents": [b, c],
        "targets": [
            {"target": label, "score": point.score, "mean": float(mean)}
            for (label, point), mean in zip(points.items(), means, strict=True)
        ],
        "all_layers": {"rho": _plain(whole.rho[0]), "p": _plain(whole.p[0])},
        "layers": [
            {"layer": layer, "rho": _plain(rho), "p": _plain(p), "p_of_any": _plain(p_of_any)}
            for layer, rho, p, p_of_any in zip(
                layers, found.rho, found.p, found.p_of_any, strict=True
            )
        ],
        "warning": found.warning(),
    }
    write_csv(
        out / "rank.csv",
        ["layer", "rho", "p", "p_of_any_layer"],
        zip(layers, *(x.tolist() for x in (found.rho, found.p, found.p_of_any)), strict=True),
    )
    title = titles().get(metric, metric)
    labels = (f"mean weight of {b}", f"{title} of fine-tuning: from {b} minus from {c}")
    rank_figure(found, means, scores, list(points), labels, out / "rank.png")
    atomic.write_json(out / "rank.json", results)
    return results


def _plain(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _point(folder: Path, metric: str, recipe: str) -> _Point:
    """The target of a comparison."""
    merges = [one for one in merges_in(folder) if one.config["recipe"] == recipe]
    groups = grouped("", merges)
    if len(groups) != 1 or not merges:
        raise UserError(
            f"{folder}: {len(groups) if merges else 0} merges by the recipe {recipe}; one, with "
            "any number of seeds, is wanted"
        )
    parents = merges[0].parents
    if len(parents) != 2 or "zeros" in parents:
        raise UserError(
            f"{folder}: its merge is of {', '.join(parents)}; two parents that can be fine-tuned "
            "are wanted"
        )
    found = depth([Target("", parents, tuple(one.coefficients() for one in merges))])
    from_b, from_c = (_fine_tuned(folder, parent, metric) for parent in parents)
    sign = 1 if METRICS[metric].higher_is_better else -1
    means = dict(zip(found.layers, found.mean[0].tolist(), strict=True))
    return _Point(means, sign * (from_b - from_c), parents)


def _fine_tuned(folder: Path, parent: str, metric: str) -> float:
    """The mean metric of fine-tuning from a parent."""
    results = RunDirectory(folder).read_json("results.json") or {}
    for row in results.get("table", ()):
        if (row.get("recipe"), row.get("start")) == ("ft", parent) and row.get(metric):
            return float(row[metric]["mean"])
    raise UserError(
        f"{folder}: its table has no {metric} of ft from {parent}; a finished comparison whose "
        "compare.recipes have ft is wanted"
    )
