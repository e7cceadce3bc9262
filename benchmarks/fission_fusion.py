r"""FissionFusion beside a grid's greedy soup, and MedMerge, on the real pairs of `real_pairs.py`.

    python benchmarks/fission_fusion.py dermoscopy --data DATA --workdir runs/ff_dermoscopy \
        --weights resnet20-12fca82f.npz

The paper (arXiv 2403.13341) claims that hierarchical soups of FGG's models are better than a greedy
soup of a grid's, in and out of distribution, for a fifth of the epochs. Rows:

- the grid: 8 learning rates, 3 augmentations and 2 seeds from a linear probe of parent `--start`;
  its best single model by validation, beside it the best by test, an oracle; its soups, of which
  the greedy one is what all rows are compared with. GoU and GoG of the grid, by learning rate, tell
  the soups' share from that of FGG;
- FGG: a fine-tuning and five further models for each learning rate, and its soups;
- MedMerge: the best by validation of `--medmerge-rates`. Anchored: parent b alone at first
  (`merge.init` = 1, 0), its coefficients at 1, 10 and 100 times the probe's learning rate;
- FGG whose warm-up is MedMerge's first stage, see `grid.warmup`.

Settings are the published ones (`configs/fission_fusion`) but for the network, the batch and the
epochs, and all learning rates but the warm-up's are ten times the published ones, which are for
ResNet-50; `real_pairs` chose 1e-3 for dermoscopy, which is also the published warm-up's. DATA holds
the folders of `real_pairs` and, for dermoscopy, `skin_isic_uda1`. Out of distribution are, of
models of Rosendahl's images: the test images of ISIC 2018, which stem from other clinics too and
which no parent has seen, in the same five classes; and the archive UDA-1, where akiec, bcc and mel
count as malignant, bkl and nv as benign. There is no further archive of bacterial and viral
pneumonia.

Everything resumes when the same command is given again, and goes on with more `--seeds`, a number
of them. Once the parents are trained, a second process of the same command shares the work. What a
finished study came to, the classes that each row predicts, is kept in --seeds-folder, and it is
not run again, on no machine: seconds are comparable only if one machine ran them all. With
`--dry` nothing is run but three short trials, from which the time is estimated; with `--partial`
nothing is trained: what is finished is kept, and the table is of that; `--smoke` tries everything
in a few minutes, and its table is left in the workdir.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from real_pairs import FOLDERS, RARE, add_options, images_of, parent_runs, row_of, set_table, target
from results import RESULTS, Row, output_option, write_table

from medmerge_jax.config import Config, default_evaluate_on
from medmerge_jax.evaluation.bootstrap import paired_rows
from medmerge_jax.evaluation.metrics import METRICS
from medmerge_jax.evaluation.predictions import Predictions
from medmerge_jax.runtime import cpu
from medmerge_jax.runtime.progress import say
from medmerge_jax.storage import atomic
from medmerge_jax.studies.checks import check_config
from medmerge_jax.studies.execute import run
from medmerge_jax.studies.fission_fusion import published_config
from medmerge_jax.studies.jobs import plan

METRIC = "macro_f1"
QUESTION = "Is FissionFusion better than a grid's greedy soup on the pair {}?"
RATES = (1e-2, 5e-3, 1e-3, 5e-4, 1e-4, 5e-5, 1e-5, 1e-6)
POLICIES = ("minimal", "medium", "heavy")
FACTORS = (1, 10, 100)
VAL, TEST = "val", "test"

ROWS = {
    "grid, best single by validation": ("grid", VAL),
    "grid, best single by test (oracle)": ("grid", TEST),
    **{f"grid + {soup}": ("grid", f"soups/{soup}") for soup in ("uniform", "greedy", "GoU", "GoG")},
    "FGG, best base by validation": ("fgg", VAL),
    **{f"FGG + {soup}": ("fgg", f"soups/{soup}") for soup in ("uniform", "greedy", "GoU", "GoG")},
    "MedMerge": ("medmerge", VAL),
    **{f"MedMerge, anchored, {factor}x": (f"anchored{factor}", VAL) for factor in FACTORS},
    "MedMerge + FGG, best base by validation": ("medmerge_fgg", VAL),
    "MedMerge + FGG + GoG": ("medmerge_fgg", "soups/GoG"),
}
"""Study and job of each row; a split is that by which the best of the single models is chosen."""

REFERENCE, CLAIMED = "grid + greedy", "FGG + GoG"

Studies = Mapping[tuple[int, str], ml_collections.ConfigDict]
"""Configs by seed and name."""


def main() -> None:
    """Runs all studies, seed by seed, and writes their table."""
    cpu.prepare()
    options = _options()
    studies = _studies(options)
    if options.dry:
        _say_plan(options, studies)
        return
    if options.partial:
        for seed in range(options.seeds):
            _keep(options, studies, seed)
    else:
        for workdir, config in parent_runs(options).items():
            run(config, workdir)
        for (seed, name), config in studies.items():
            if not _rows_of(name) & set(_kept(options, seed)["rows"]):
                say(f"seed {seed}, {name}")
                run(config, _folder(options, seed, name))
                _keep(options, studies, seed)
    _write(options, studies)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.set_defaults(epochs=50)
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--start", choices=("b", "c"), default="c", help="of the grid and of FGG")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="of fine-tuning")
    parser.add_argument("--augmentations", nargs="+", choices=POLICIES, default=POLICIES)
    parser.add_argument(
        "--grid-seeds",
        type=int,
        nargs="+",
        default=[2],
        help="how many the grid has, for each seed; the last number is also for those after it",
    )
    parser.add_argument("--warmup-rate", type=float, default=1e-3)
    parser.add_argument("--warmup-epochs", type=int, default=10)
    parser.add_argument("--fgg-epochs", type=int, default=17)
    parser.add_argument("--fgg-rate", type=float, default=1e-4, help="the highest")
    parser.add_argument("--medmerge-rates", type=float, nargs="+", default=(1e-3, 1e-4))
    parser.add_argument("--dry", action="store_true", help="say what would be run")
    parser.add_argument("--partial", action="store_true", help="the table of what is finished")
    parser.add_argument("--smoke", action="store_true", help="everything with tiny numbers")
    parser.add_argument("--seeds-folder", type=Path, help="default: results/fission_fusion")
    output_option(parser, None)
    options = parser.parse_args()
    if options.smoke:
        tiny = {"seeds": 1, "grid_seeds": [1], "images": 60, "medmerge_rates": (1e-3,)}
        tiny |= {"rates": (1e-3, 1e-4), "augmentations": ("minimal",)}
        epochs = ("epochs", "parent_epochs", "scratch_epochs", "warmup_epochs", "fgg_epochs")
        vars(options).update(tiny, **dict.fromkeys(epochs, 1))
    folder = options.workdir if options.smoke else RESULTS
    options.output = options.output or folder / f"fission_fusion_{options.pair}.md"
    options.seeds_folder = options.seeds_folder or folder / "fission_fusion"
    return options


def _studies(options: argparse.Namespace) -> Studies:
    """All that is run beside the parents, in order: what a seed has is complete before the next."""
    studies, first = {}, 0
    for seed in range(options.seeds):
        grid = _base(options, seed)
        grid.recipe, grid.soup.group_by = "grid_search", "ft.learning_rate"
        grid.grid.augmentations = tuple(options.augmentations)
        count = [*options.grid_seeds, *options.grid_seeds[-1:] * seed][seed]
        grid.grid.seeds, first = tuple(range(first, first + count)), first + count
        studies[seed, "grid"] = grid
        studies[seed, "fgg"] = _base(options, seed)
        merged = _base(options, seed)
        merged.grid.warmup = "merge_lp"
        studies[seed, "medmerge_fgg"] = merged
        studies[seed, "medmerge"] = _medmerge(options, seed)
        for factor in FACTORS:
            anchored = _medmerge(options, seed)
            anchored.merge.init = (1.0, 0.0)
            anchored.merge.learning_rate = factor * options.warmup_rate
            studies[seed, f"anchored{factor}"] = anchored
    return studies


def _base(options: argparse.Namespace, seed: int) -> ml_collections.ConfigDict:
    """FissionFusion with the published settings, but for those that the options have."""
    own = target(options)
    config = published_config(own.data.name, "", metric=METRIC)
    config.architecture, config.image_size, config.help = own.architecture, own.image_size, ""
    config.data, config.parents = own.data, own.parents
    config.start, config.seed, config.batch_size = options.start, seed, options.batch_size
    config.lp.learning_rate, config.lp.epochs = options.warmup_rate, options.warmup_epochs
    config.ft.epochs = options.epochs
    config.grid.learning_rates = tuple(options.rates)
    config.fgg.epochs = options.fgg_epochs
    config.fgg.learning_rate, config.fgg.lowest = options.fgg_rate, options.fgg_rate / 1000
    with config.unlocked():
        config.evaluate_on = _out_of_distribution(options)
    return config


def _medmerge(options: argparse.Namespace, seed: int) -> ml_collections.ConfigDict:
    """A fine-tuning from MedMerge's first stage for each rate, trained as FGG's bases are."""
    config = _base(options, seed)
    config.recipe = "grid_search"
    config.grid.warmup = "merge_lp"
    config.grid.learning_rates = tuple(options.medmerge_rates)
    config.grid.augmentations, config.grid.seeds = (config.augmentation,), (seed,)
    return config


def _out_of_distribution(options: argparse.Namespace) -> ml_collections.ConfigDict:
    sets: dict[str, ml_collections.ConfigDict] = {}
    if options.pair == "dermoscopy":
        ham10000, uda1 = FOLDERS[options.pair], "skin_isic_uda1"
        of_test = [image for image in images_of(options, ham10000) if image["split"] == "test"]
        of_test = [image for image in of_test if image["class"] not in RARE]
        sets["isic2018"] = _evaluate_on(options, ham10000, "isic2018_test", of_test)
        sets["uda1"] = _evaluate_on(options, uda1, "uda1", images_of(options, uda1))
        groups = {"benign": ("bkl", "nv"), "malignant": ("akiec", "bcc", "mel")}
        sets["uda1"].classes = ml_collections.ConfigDict(groups)
    return ml_collections.ConfigDict(sets)


def _evaluate_on(
    options: argparse.Namespace, folder: str, name: str, images: list[dict[str, str]]
) -> ml_collections.ConfigDict:
    one = default_evaluate_on()
    set_table(one.data, options, folder, name, [row_of(image, "class") for image in images])
    one.split = "all"
    return one


def _folder(options: argparse.Namespace, seed: int, study: str) -> Path:
    workdir: Path = options.workdir / f"seed{seed}" / study
    return workdir


# What would be run.


def _say_plan(options: argparse.Namespace, studies: Studies) -> None:
    """Jobs, epochs at most and the time that their steps take."""
    configs = {f"seed {seed}, {name}": config for (seed, name), config in studies.items()}
    parents = {path.name: config for path, config in parent_runs(options).items()}
    processor, wall = _seconds_of_a_step(options)
    total = [0, 0, 0]
    for name, config in (parents | configs).items():
        jobs = [job.config for job in plan(check_config(config)).values()]
        epochs = [_most_epochs(job) for job in jobs]
        steps = sum(e * _steps(job) for e, job in zip(epochs, jobs, strict=True))
        numbers = (len(jobs), sum(epochs), steps)
        total = [a + b for a, b in zip(total, numbers, strict=True)]
        print(f"{name}: {numbers[0]} jobs, {numbers[1]} epochs at most, {numbers[2]} steps")
    print(
        f"In all {total[0]} jobs, {total[1]} epochs at most, {total[2]} steps of {processor:.3f} s "
        f"of processor time ({wall:.3f} s on the clock, with their share of the validation): "
        f"{total[2] * processor / 3600:.1f} CPU hours, {total[2] * wall / 3600:.1f} on the clock. "
        "Early stopping makes it less; compiling, soups, evaluations and reports come on top."
    )


def _most_epochs(job: Config) -> int:
    """Of all stages, if none is ended early; what is no other recipe here is a warm-up."""
    generated = job.ft.epochs + job.fgg.epochs
    return {"ft": job.ft.epochs, "fgg": generated, "soup": 0}.get(job.recipe, job.lp.epochs)


def _steps(config: Config) -> int:
    """Of an epoch."""
    images = len(Path(config.data.table).read_text().splitlines()) - 1
    return max(1, round(images * config.data.fractions[0]) // config.batch_size)


def _seconds_of_a_step(options: argparse.Namespace) -> tuple[float, float]:
    """Of processor time and on the clock, from runs of few and of some more epochs.

    What is not epochs is in both of them; the first run is for what is compiled.
    """
    trial = _base(options, 0)
    trial.recipe = "ft"
    trial.parents, trial.start = ml_collections.ConfigDict({"c": "random"}), "c"
    with trial.unlocked():
        trial.evaluate_on = ml_collections.ConfigDict()
    times = []
    for epochs in (1, 1, 5):
        trial.ft.epochs = epochs
        with tempfile.TemporaryDirectory() as folder:
            began = time.process_time(), time.perf_counter()
            run(trial, folder)
            times.append((time.process_time() - began[0], time.perf_counter() - began[1]))
    steps = (5 - 1) * _steps(check_config(trial))
    processor, wall = ((b - a) / steps for a, b in zip(*times[1:], strict=True))
    return processor, wall


# The table.


@dataclasses.dataclass(frozen=True)
class Entry:
    """Of a row and a seed: what the model predicts, and what lies behind it.

    Data sets are "" for the test images, and the names of those out of distribution.
    """

    labels: Mapping[str, list[int]]  # by data set
    predicted: Mapping[str, list[int]]
    epochs: int  # of all jobs behind the row but the warm-up
    warmup: int
    seconds: float

    def predictions(self, further: str) -> Predictions:
        """For metrics of classes alone: logits are 1 for the class and 0."""
        labels, predicted = (np.array(of[further]) for of in (self.labels, self.predicted))
        return Predictions(np.eye(max(*labels, *predicted) + 1)[predicted], labels)

    def score(self, further: str) -> float | None:
        """The metric on a data set."""
        return METRICS[METRIC](self.predictions(further))


def _rows_of(study: str) -> set[str]:
    return {title for title, (name, _) in ROWS.items() if name == study}


def _file(options: argparse.Namespace, seed: int) -> Path:
    file: Path = options.seeds_folder / f"{options.pair}_seed{seed}.json"
    return file


def _kept(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """What the finished studies of a seed came to, on this machine or another."""
    file = _file(options, seed)
    nothing: dict[str, Any] = {"rows": {}, "failed": []}
    return json.loads(file.read_text()) if file.exists() else nothing


def _keep(options: argparse.Namespace, studies: Studies, seed: int) -> None:
    """Writes what is finished; labels are the same in all rows, and stand there once."""
    before = _kept(options, seed)
    entries = {title: _of_seed(options, studies, seed, title) for title in ROWS}
    rows = {title: dataclasses.asdict(entry) for title, entry in entries.items() if entry}
    labels = [row.pop("labels") for row in rows.values()]
    described = _described(options, studies, seed)
    kept = {
        "notes": before.get("notes", described.get("notes")),
        "failed": sorted({*before["failed"], *described.get("failed", ())}),
        "labels": before.get("labels", next(iter(labels), None)),
        "rows": {**before["rows"], **rows},
    }
    if rows:
        atomic.write_text(_file(options, seed), json.dumps(kept))


def _write(options: argparse.Namespace, studies: Studies) -> None:
    missing = [
        f"{name} of seed {seed}"
        for seed, name in studies
        if not _rows_of(name) & set(_kept(options, seed)["rows"])
        and not (_folder(options, seed, name) / "results.json").exists()
    ]
    found = {title: _entries(options, studies, title) for title in ROWS}
    found = {title: entries for title, entries in found.items() if entries}
    if not found:
        raise SystemExit("nothing is finished; without --partial it is run")
    sets = ["", *next(iter(studies.values())).evaluate_on]
    compared = {further: _compared(found, further) for further in sets}
    rows = [_row(title, entries, compared) for title, entries in found.items()]
    notes = [*_notes(options, studies)]
    if missing:
        notes.insert(0, f"Not finished: {', '.join(missing)}.")
    write_table(
        options.output,
        QUESTION.format(options.pair),
        f"{'Not finished. ' if missing else ''}{_answer(found, compared)}",
        rows,
        notes,
    )


def _entries(options: argparse.Namespace, studies: Studies, title: str) -> dict[int, Entry]:
    """Of a row, by seed, as far as they are finished."""
    entries = {}
    for seed in range(options.seeds):
        kept = _kept(options, seed)
        if title in kept["rows"]:
            entries[seed] = Entry(labels=kept["labels"], **kept["rows"][title])
        elif (entry := _of_seed(options, studies, seed, title)) is not None:
            entries[seed] = entry
    return entries


def _of_seed(options: argparse.Namespace, studies: Studies, seed: int, title: str) -> Entry | None:
    """None if the study is not finished, or has no such job."""
    study, job = ROWS[title]
    folder = _folder(options, seed, study)
    if not (folder / "results.json").exists():
        return None
    return _entry(studies[seed, study], folder, job)


def _entry(config: ml_collections.ConfigDict, folder: Path, name: str) -> Entry | None:
    """None if there is no such job, as with one learning rate only, or it failed."""
    jobs = plan(check_config(config))
    results = {
        job: json.loads(path.read_text())
        for job in jobs
        if (path := folder / job / "results.json").exists()
    }
    behind = {job for job in jobs if job.startswith(("grid/", "fgg/"))}
    if split := name if name in (VAL, TEST) else "":
        singles = sorted(behind & set(results))
        name = max(singles, key=lambda job: results[job][split][METRIC] or 0.0, default="")
    if name not in results:
        return None
    behind.add(name)
    while new := {one for job in behind for one in jobs[job].after} - behind:
        behind |= new
    done = [results[job] for job in behind if job in results]
    stages = [stage for one in done for stage in one["stages"]]
    epochs = sum(stage["epochs"] for stage in stages if stage["name"] in ("ft", "fgg"))
    warmup = sum(stage["epochs"] for stage in stages) - epochs
    said = {
        further: Predictions.load(
            folder / name / (f"predictions-{further}.npz" if further else "predictions.npz")
        )
        for further in ("", *config.evaluate_on)
    }
    return Entry(
        {further: one.labels.tolist() for further, one in said.items()},
        {further: one.predicted.tolist() for further, one in said.items()},
        epochs,
        warmup,
        round(sum(one["wall_seconds"] for one in done)),
    )


def _compared(
    found: Mapping[str, Mapping[int, Entry]], further: str
) -> dict[str, dict[str, float] | None]:
    """By how much each row differs from the reference on the seeds of both, see `paired_rows`."""
    differences: dict[str, dict[str, float] | None] = {}
    reference = found.get(REFERENCE, {})
    for title, entries in found.items():
        seeds = sorted(set(entries) & set(reference))
        if title != REFERENCE and seeds:
            ours = {title: [entries[seed].predictions(further) for seed in seeds]}
            theirs = [reference[seed].predictions(further) for seed in seeds]
            differences[title] = paired_rows(theirs, ours, [METRIC])[title][METRIC]
    return differences


def _row(
    title: str,
    entries: Mapping[int, Entry],
    compared: Mapping[str, Mapping[str, dict[str, float] | None]],
) -> Row:
    row: dict[str, Any] = {"row": title}
    for further, differences in compared.items():
        name = further or "test"
        row[f"{name}: macro F1"] = _mean([one.score(further) for one in entries.values()], 3)
        row[f"{name}: above {REFERENCE}"] = _difference(differences.get(title))
    row["epochs"] = _mean([one.epochs for one in entries.values()], 0)
    row["warm-up's"] = _mean([one.warmup for one in entries.values()], 0)
    row["s"] = _mean([one.seconds for one in entries.values()], 0)
    row["seeds"] = len(entries)
    return row


def _mean(values: Sequence[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.mean(known):.{digits}f}" if known else "–"


def _difference(found: Mapping[str, float] | None) -> str:
    if found is None:
        return "–"
    return f"{found['difference']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"


def _answer(
    found: Mapping[str, Mapping[int, Entry]],
    compared: Mapping[str, Mapping[str, dict[str, float] | None]],
) -> str:
    """Whether the claim holds, of the test images and of each further data set."""
    parts = []
    for further, differences in compared.items():
        one, name = differences.get(CLAIMED), further or "test"
        if one is not None:
            verdict = "yes" if one["low"] > 0 else "no" if one["high"] < 0 else "not told apart"
            parts.append(f"{name}: {verdict}, {CLAIMED} is {_difference(one)} above {REFERENCE}")
    if not parts:
        return f"{CLAIMED} and {REFERENCE} have no finished seed in common"
    ours, theirs = (sum(one.epochs for one in found[row].values()) for row in (CLAIMED, REFERENCE))
    of_each = (ours / len(found[CLAIMED])) / (theirs / len(found[REFERENCE]))
    return f"{'; '.join(parts)}. FGG takes {100 * of_each:.0f} % of the grid's epochs."


def _notes(options: argparse.Namespace, studies: Studies) -> list[str]:
    """The settings, and what the columns mean."""
    described = [
        kept if (kept := _kept(options, seed))["rows"] else found
        for seed in range(options.seeds)
        if (found := _described(options, studies, seed)) or _kept(options, seed)["rows"]
    ]
    first, *others = [one["notes"] for one in described]
    if differing := [notes for notes in others if notes != first]:
        raise SystemExit(f"seeds were run with other settings: {first} and {differing[0]}")
    failed = [line for one in described for line in one["failed"]]
    return [
        *first,
        "In parentheses: 95 % of a paired bootstrap over seeds and images. Epochs and seconds are "
        "of all jobs behind a row, for each seed; the warm-up's epochs are apart, its seconds are "
        "not, and the parents' training is in neither.",
        *([f"Failed, and left out of soups: {', '.join(failed)}."] if failed else []),
    ]


def _described(options: argparse.Namespace, studies: Studies, seed: int) -> dict[str, list[str]]:
    """Settings and data of a seed, and what failed in it; empty before anything is finished."""
    results = {
        name: json.loads(path.read_text())
        for number, name in studies
        if number == seed and (path := _folder(options, seed, name) / "results.json").exists()
    }
    if not results:
        return {}
    data = next(iter(results.values()))["data"]
    rates = ", ".join(f"{rate:g}" for rate in options.rates)
    others = "; ".join(
        f"{name}, {one['images']} images" for name, one in data["evaluate_on"].items()
    )
    notes = [
        f"{options.architecture}, {options.image_size} px, batch {options.batch_size}; grid and "
        f"FGG start from parent {options.start}. Warm-up: {options.warmup_epochs} epochs, "
        f"{options.warmup_rate:g}. Fine-tuning: at most {options.epochs} epochs at {rates}. FGG: "
        f"{options.fgg_epochs} epochs, {options.fgg_rate:g} at most. MedMerge's fine-tuning: "
        f"{', '.join(f'{rate:g}' for rate in options.medmerge_rates)}. Grid: "
        f"{', '.join(options.augmentations)}, and for each rate "
        f"{', '.join(map(str, options.grid_seeds))} seeds (the last number also for seeds after "
        f"it). Parents are trained for {options.parent_epochs} epochs.",
        f"Target: {data['counts']}. Out of distribution: "
        f"{others or 'no other archive has these classes'}.",
    ]
    failed = [
        f"{n} of seed {seed}: {job}" for n, one in results.items() for job in one.get("failed", ())
    ]
    return {"notes": notes, "failed": failed}


if __name__ == "__main__":
    main()
