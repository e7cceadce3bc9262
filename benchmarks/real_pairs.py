r"""MedMerge and its baselines on real images: two pairs of a medical source and a small target.

    python benchmarks/real_pairs.py dermoscopy --data DATA --workdir runs/dermoscopy \
        --weights resnet20-12fca82f.npz

- `dermoscopy`: source HAM10000's images from Vienna, seven diagnoses; target its images from
  another clinic (Rosendahl), the five diagnoses that have 20 images or more.
- `chest_x_ray`: source normal against pneumonia; target bacterial against viral pneumonia of
  30 % of the pneumonia patients, none of whom is in the source.

DATA holds the folders `skin_ham10000` and `cxr_kermany`, each with `split.csv`
(id,label,class,split,group,origin) and `jpeg*/<split>/<class>/<id>.jpg`.

Parent c is the file given with --weights (a CIFAR-10 ResNet); without it, parent c is trained
from scratch on the other pair's source. Parent b is trained from parent c on the source. The two
learning rates are chosen on the target's validation split, by the macro F1 of `lp_ft` from b plus
that of `medmerge`, with a seed that the comparison does not use. Then `compare` runs every
recipe on three seeds; with --mergers, `lp_ft`, `medmerge` and every merger of `mm.merge` instead.
Everything resumes when the same command is given again.
"""

import argparse
import collections
import csv
import itertools
import random
from pathlib import Path

import ml_collections
from results import RESULTS, output_option, write_table

import medmerge_jax as mm
from medmerge_jax.analysis import results_text
from medmerge_jax.config import default_config
from medmerge_jax.runtime import cpu
from medmerge_jax.runtime.progress import say
from medmerge_jax.storage import atomic
from medmerge_jax.studies.execute import run

FOLDERS = {"dermoscopy": "skin_ham10000", "chest_x_ray": "cxr_kermany"}
PAIRS = tuple(FOLDERS)
RARE = ("df", "vasc")  # fewer than 20 of the target's images
QUESTION = "Is MedMerge better than its baselines on the pair {}?"
LP_RATES = (1e-3, 1e-2)
FT_RATES = (1e-4, 1e-3)
TUNING_SEED = 100


def main() -> None:
    """Prints the rates that were tried and the table of the comparison."""
    cpu.prepare()
    options = _options()
    for workdir, source in parent_runs(options).items():
        say(results_text(run(source, workdir)))
    config = target(options)
    config.recipe = "compare"
    tried = {}
    for lp, ft in itertools.product(LP_RATES, FT_RATES):
        config.lp.learning_rate, config.ft.learning_rate = lp, ft
        tried[lp, ft] = [_tune(config, options.workdir, r) for r in ("lp_ft", "medmerge")]
        print(
            f"validation macro F1, lp {lp:g}, ft {ft:g}: lp_ft b {tried[lp, ft][0]:.4f}, ", end=""
        )
        print(f"medmerge {tried[lp, ft][1]:.4f}")
    config.lp.learning_rate, config.ft.learning_rate = max(
        tried, key=lambda rates: sum(tried[rates])
    )
    print(f"chosen: lp {config.lp.learning_rate:g}, ft {config.ft.learning_rate:g}\n")
    if options.mergers:
        config.compare.recipes = ("lp_ft", "medmerge", "medmerge_aligned", "merge_ft")
        config.compare.mergers = tuple(mm.list_mergers())
        config.merge_ft.ancestor = "c"  # parent b was trained from it
        config.merge_ft.options.weights = (0.7, 0.3)
    results = run(config, options.workdir / ("mergers" if options.mergers else "compare"))
    print(f"classes {results['data']['counts']}\n")
    text = results_text(results)
    name = f"{options.pair}{'_mergers' if options.mergers else ''}"
    output = options.output or RESULTS / f"real_pairs_{name}.md"
    answer = "The table is what the comparison printed; * marks the best of a column."
    write_table(output, QUESTION.format(name), answer, [], ["```\n" + text.strip() + "\n```"])


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which pair, its images and parents, and how they are trained; of all that runs on a pair."""
    parser.add_argument("pair", choices=PAIRS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--weights", type=Path, help="parent c; default: trained from scratch")
    parser.add_argument("--architecture", default="resnet20")
    parser.add_argument("--image-size", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=15, help="of each stage on the target")
    parser.add_argument("--parent-epochs", type=int, default=15, help="of parent b")
    parser.add_argument("--scratch-epochs", type=int, default=30, help="of parent c from scratch")
    parser.add_argument("--images", type=int, help="of each data set, at most; default: all")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--mergers", action="store_true", help="compare every merger instead")
    output_option(parser, None)
    return parser.parse_args()


def parent_runs(options: argparse.Namespace) -> dict[Path, ml_collections.ConfigDict]:
    """The configs that make the parents, by their workdirs, in the order in which they are run."""
    other = PAIRS[1 - PAIRS.index(options.pair)]
    parent_b, parent_c = _parents(options)
    runs = {}
    if options.weights is None:
        runs[parent_c] = _source(options, other, "random", options.scratch_epochs, 1e-3)
    runs[parent_b] = _source(options, options.pair, str(parent_c), options.parent_epochs, 1e-3)
    return runs


def target(options: argparse.Namespace) -> ml_collections.ConfigDict:
    """A config on the target, with its parents, which `parent_runs` makes."""
    config = _experiment(options, options.pair, "target")
    parent_b, parent_c = _parents(options)
    config.parents = ml_collections.ConfigDict({"b": str(parent_b), "c": str(parent_c)})
    config.data.fractions = (0.6, 0.2, 0.2)
    config.lp.epochs = config.ft.epochs = options.epochs
    return config


def set_table(
    data: ml_collections.ConfigDict,
    options: argparse.Namespace,
    folder: str,
    name: str,
    rows: list[tuple[str, str, str]],
) -> None:
    """Makes these images the data of a config, or the first ones of each label if all are many.

    Args:
      data: Of a config or of an entry of `evaluate_on`.
      options: Of the command.
      folder: Below `options.data`.
      name: Of the data, and of the table that is written.
      rows: File, label and group of each image.
    """
    if options.images:
        counts = collections.Counter(label for _, label, _ in rows)
        most = options.images // len(counts)
        rows = [row for label in counts for row in [r for r in rows if r[1] == label][:most]]
    table = options.workdir / "tables" / f"{name}.csv"
    text = "".join(f"{','.join(row)}\n" for row in [("filename", "label", "group"), *rows])
    atomic.write_text(table, text)
    data.name, data.kind = name, "table"
    data.root = str(next((options.data / folder).glob("jpeg*")))
    data.table = str(table)


def images_of(options: argparse.Namespace, folder: str) -> list[dict[str, str]]:
    """The lines of the table of a folder's images."""
    with (options.data / folder / "split.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def row_of(image: dict[str, str], label: str) -> tuple[str, str, str]:
    """File, label and group of an image, see `set_table`; the label is one of its columns."""
    return f"{image['split']}/{image['class']}/{image['id']}.jpg", image[label], image["group"]


def _parents(options: argparse.Namespace) -> tuple[Path, Path]:
    return options.workdir / "parent_b", options.weights or options.workdir / "parent_c"


def _source(
    options: argparse.Namespace, pair: str, start: str, epochs: int, learning_rate: float
) -> ml_collections.ConfigDict:
    config = _experiment(options, pair, "source")
    config.recipe = "ft"
    config.parents = ml_collections.ConfigDict({"c": start})
    config.start = "c"
    config.ft.epochs = epochs
    config.ft.learning_rate = learning_rate
    config.ft.schedule = "cosine"
    config.ft.warmup_epochs = 1.0
    return config


def _experiment(options: argparse.Namespace, pair: str, part: str) -> ml_collections.ConfigDict:
    config = default_config().unlock()
    config.architecture = options.architecture
    config.image_size = options.image_size
    config.batch_size = options.batch_size
    rows = _rows(pair, part, images_of(options, FOLDERS[pair]))
    set_table(config.data, options, FOLDERS[pair], f"{pair}_{part}", rows)
    return config.lock()


def _rows(pair: str, part: str, images: list[dict[str, str]]) -> list[tuple[str, str, str]]:
    """(file, label, group) of each image of the part."""
    if pair == "dermoscopy":
        images = [r for r in images if r["split"] != "test"]  # The official test set has no clinic.
        chosen = [r for r in images if (r["origin"] == "rosendahl") == (part == "target")]
        if part == "target":
            chosen = [r for r in chosen if r["class"] not in RARE]
        label = "class"
    else:
        patients = sorted({r["group"] for r in images if r["class"] == "pneumonia"})
        random.Random(0).shuffle(patients)
        target = set(patients[: round(0.3 * len(patients))])
        chosen = [r for r in images if (r["group"] in target) == (part == "target")]
        label = "origin" if part == "target" else "class"
    return [row_of(image, label) for image in chosen]


def _tune(config: ml_collections.ConfigDict, workdir: Path, recipe: str) -> float:
    """Validation macro F1 of one recipe at the config's learning rates."""
    trial = ml_collections.ConfigDict(config)
    trial.recipe, trial.seed = recipe, TUNING_SEED
    folder = f"{recipe}-lp{trial.lp.learning_rate:g}-ft{trial.ft.learning_rate:g}"
    return float(run(trial, workdir / "tuning" / folder)["val"]["macro_f1"])


if __name__ == "__main__":
    main()
