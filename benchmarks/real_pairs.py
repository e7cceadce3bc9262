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

PAIRS = ("dermoscopy", "chest_x_ray")
QUESTION = "Is MedMerge better than its baselines on the pair {}?"
LP_RATES = (1e-3, 1e-2)
FT_RATES = (1e-4, 1e-3)
TUNING_SEED = 100


def main() -> None:
    """Prints the rates that were tried and the table of the comparison."""
    cpu.prepare()
    options = _options()
    config = _comparison(options)
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


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pair", choices=PAIRS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--weights", type=Path, help="parent c; default: trained from scratch")
    parser.add_argument("--architecture", default="resnet20")
    parser.add_argument("--image-size", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=15, help="of each stage")
    parser.add_argument("--mergers", action="store_true", help="compare every merger instead")
    parser.add_argument("--scratch-epochs", type=int, default=30, help="of parent c from scratch")
    output_option(parser, None)
    return parser.parse_args()


def _comparison(options: argparse.Namespace) -> ml_collections.ConfigDict:
    """The comparison on the target; makes its parents first and leaves them in the workdir."""
    other = PAIRS[1 - PAIRS.index(options.pair)]
    parent_c = options.weights
    if parent_c is None:
        parent_c = options.workdir / "parent_c"
        run(_source(options, other, "random", options.scratch_epochs, 1e-3), parent_c)
    parent_b = options.workdir / "parent_b"
    source = _source(options, options.pair, str(parent_c), options.epochs, 1e-3)
    say(results_text(run(source, parent_b)))
    config = _experiment(options, options.pair, "target")
    config.recipe = "compare"
    config.parents = ml_collections.ConfigDict({"b": str(parent_b), "c": str(parent_c)})
    config.data.fractions = (0.6, 0.2, 0.2)
    config.lp.epochs = config.ft.epochs = options.epochs
    return config


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
    folder = options.data / {"dermoscopy": "skin_ham10000", "chest_x_ray": "cxr_kermany"}[pair]
    root = next(folder.glob("jpeg*"))
    table = options.workdir / "tables" / f"{pair}_{part}.csv"
    rows = _rows(pair, part, list(csv.DictReader((folder / "split.csv").open())))
    text = "".join(f"{','.join(row)}\n" for row in [("filename", "label", "group"), *rows])
    atomic.write_text(table, text)
    config = default_config().unlock()
    config.architecture = options.architecture
    config.image_size = options.image_size
    config.batch_size = options.batch_size
    config.data.name = f"{pair}_{part}"
    config.data.kind = "table"
    config.data.root = str(root)
    config.data.table = str(table)
    return config.lock()


def _rows(pair: str, part: str, images: list[dict[str, str]]) -> list[tuple[str, str, str]]:
    """(file, label, group) of each image of the part."""
    if pair == "dermoscopy":
        images = [r for r in images if r["split"] != "test"]  # The official test set has no clinic.
        chosen = [r for r in images if (r["origin"] == "rosendahl") == (part == "target")]
        if part == "target":
            chosen = [r for r in chosen if r["class"] not in ("df", "vasc")]
        label = "class"
    else:
        patients = sorted({r["group"] for r in images if r["class"] == "pneumonia"})
        random.Random(0).shuffle(patients)
        target = set(patients[: round(0.3 * len(patients))])
        chosen = [r for r in images if (r["group"] in target) == (part == "target")]
        label = "origin" if part == "target" else "class"
    return [(f"{r['split']}/{r['class']}/{r['id']}.jpg", r[label], r["group"]) for r in chosen]


def _tune(config: ml_collections.ConfigDict, workdir: Path, recipe: str) -> float:
    """Validation macro F1 of one recipe at the config's learning rates."""
    trial = ml_collections.ConfigDict(config)
    trial.recipe, trial.seed = recipe, TUNING_SEED
    folder = f"{recipe}-lp{trial.lp.learning_rate:g}-ft{trial.ft.learning_rate:g}"
    return float(run(trial, workdir / "tuning" / folder)["val"]["macro_f1"])


if __name__ == "__main__":
    main()
