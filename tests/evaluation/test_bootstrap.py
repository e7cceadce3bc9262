"""Intervals and paired differences against SciPy, against counting, and on planted truths."""

import dataclasses
import json

import numpy as np
import pytest
import scipy.stats
from scipy.special import log_softmax

from medmerge_jax.errors import UserError
from medmerge_jax.evaluation.bootstrap import metric_interval, paired_difference, paired_rows
from medmerge_jax.evaluation.metrics import METRICS, Metric
from medmerge_jax.evaluation.predictions import Predictions

MANY = 20000


def random_run(rng, count=120, classes=3, skill=1.0, labels=None, **kwargs):
    labels = rng.integers(0, classes, count) if labels is None else labels
    logits = rng.normal(size=(count, classes)) + skill * np.eye(classes)[labels]
    return Predictions(
        logits.astype(np.float32), labels, ids=tuple(map(str, range(count))), **kwargs
    )


def answers(right, labels):
    """Predictions of two classes, some of them right."""
    labels = np.asarray(labels)
    return Predictions(np.eye(2)[np.where(right, labels, 1 - labels)], labels)


def losses(run):
    logits = log_softmax(run.logits.astype(np.float64), axis=1)
    return -logits[np.arange(len(run)), run.labels]


@pytest.mark.parametrize(("method", "scipys"), [("percentile", "percentile"), ("bca", "BCa")])
def test_an_interval_is_scipys(rng, method, scipys):
    run = random_run(rng, skill=2.0)
    found = metric_interval(METRICS["loss"], run, resamples=MANY, method=method)
    wanted = scipy.stats.bootstrap(
        (losses(run),), np.mean, n_resamples=MANY, method=scipys, rng=1, batch=1000
    )
    # The ends are quantiles of 20,000 draws: known to about a hundredth of the interval.
    near = 0.03 * (wanted.confidence_interval.high - wanted.confidence_interval.low)
    assert found.value == pytest.approx(losses(run).mean())
    assert found.low == pytest.approx(wanted.confidence_interval.low, abs=near)
    assert found.high == pytest.approx(wanted.confidence_interval.high, abs=near)


def test_bca_differs_where_values_are_skewed(rng):
    """Or the test against SciPy would not tell the two methods apart."""
    run = random_run(rng, skill=4.0, count=30)
    simple, better = (
        metric_interval(METRICS["loss"], run, method=one) for one in ("percentile", "bca")
    )
    assert abs(better.high - simple.high) > 0.1 * (simple.high - simple.low)


def test_a_difference_of_one_seed_is_scipys(rng):
    labels = rng.integers(0, 3, 120)
    a, b = (random_run(rng, skill=skill, labels=labels) for skill in (1.0, 1.3))
    found = paired_difference(METRICS["loss"], [a], [b], resamples=MANY)
    wanted = scipy.stats.bootstrap(
        (losses(a), losses(b)),
        lambda x, y, axis: np.mean(x, axis) - np.mean(y, axis),
        n_resamples=MANY,
        method="percentile",
        paired=True,
        rng=1,
        batch=1000,
    )
    ends = wanted.confidence_interval
    near = 0.03 * (ends.high - ends.low)
    assert found.value == pytest.approx(np.mean(losses(a) - losses(b)))
    assert (found.low, found.high) == pytest.approx((ends.low, ends.high), abs=near)
    drawn = wanted.bootstrap_distribution
    share = 2 * min(np.mean(drawn <= 0), np.mean(drawn >= 0))
    assert found.p == pytest.approx(share, abs=4 * (share / MANY) ** 0.5 + 1e-4)


def test_images_that_come_in_threes_count_as_one_when_they_are_a_group(rng):
    run = random_run(rng, count=50)
    thrice = run.take(np.repeat(np.arange(50), 3))
    groups = np.repeat(rng.permutation(50), 3)
    of_images = [metric_interval(METRICS["macro_f1"], one) for one in (run, thrice)]
    width = [one.high - one.low for one in of_images]
    assert width[1] == pytest.approx(width[0] / 3**0.5, rel=0.15)
    in_order = metric_interval(METRICS["macro_f1"], thrice, np.repeat(np.arange(50), 3))
    assert in_order == dataclasses.replace(of_images[0], value=in_order.value)
    known = dataclasses.replace(thrice, groups=groups.astype(np.int32))
    named = metric_interval(METRICS["macro_f1"], thrice, [f"patient {one}" for one in groups])
    assert metric_interval(METRICS["macro_f1"], known).high == pytest.approx(named.high, abs=0.02)
    assert named.high - named.low == pytest.approx(width[0], rel=0.15)


def test_resamples_without_a_value_are_left_out_and_counted(rng):
    run = random_run(rng, classes=2, count=60, labels=(np.arange(60) == 7).astype(int))
    found = metric_interval(METRICS["macro_auc"], run, resamples=2000)
    assert found.resamples + found.undefined == 2000
    assert found.undefined / 2000 == pytest.approx((1 - 1 / 60) ** 60, abs=0.04)
    both = paired_difference(METRICS["macro_auc"], [run], [run], resamples=2000)
    assert both.undefined / 2000 == pytest.approx((1 - 1 / 60) ** 60, abs=0.04)
    assert (both.value, both.low, both.high, both.p) == (0.0, 0.0, 0.0, 1.0)
    alone = dataclasses.replace(run, labels=np.zeros(60, int))
    assert metric_interval(METRICS["macro_auc"], alone) is None
    assert paired_difference(METRICS["kappa"], [run], [run]) is None


def test_seeds_are_drawn_as_pairs():
    """Every image of a run is right or wrong alike, so that only the draw of the seeds matters."""
    labels = np.arange(10) % 2
    right, wrong = answers(np.full(10, True), labels), answers(np.full(10, False), labels)
    found = paired_difference(METRICS["accuracy"], [right, right], [right, wrong], resamples=MANY)
    # The differences of the seeds are 0 and 1: their means are 0, 1/2 and 1 in 1, 2, 1 of 4 draws.
    assert (found.value, found.low, found.high, found.seeds) == (0.5, 0.0, 1.0, 2)
    assert found.p == pytest.approx(2 / 4, abs=0.02)
    # Were seeds drawn for each recipe alone, differences would not always be zero here.
    same = paired_difference(METRICS["accuracy"], [right, wrong], [right, wrong])
    assert (same.low, same.high, same.p) == (0.0, 0.0, 1.0)


def test_p_is_never_zero():
    """However far apart two recipes are, so many resamples cannot tell a smaller one."""
    labels = np.arange(10) % 2
    right, wrong = answers(np.full(10, True), labels), answers(np.full(10, False), labels)
    found = paired_difference(METRICS["accuracy"], [right], [wrong], resamples=199)
    assert (found.value, found.low, found.p) == (1.0, 1.0, pytest.approx(2 / 200))


def test_images_are_drawn_once_for_all_seeds():
    """What two seeds get wrong together does not average out."""
    labels = np.arange(40) % 2
    half = answers(np.arange(40) < 20, labels)
    right = answers(np.full(40, True), labels)
    one = paired_difference(METRICS["accuracy"], [half], [right], resamples=4000)
    three = paired_difference(METRICS["accuracy"], [half] * 3, [right] * 3, resamples=4000)
    found, wanted = ((each.value, each.low, each.high) for each in (three, one))
    assert found == pytest.approx(wanted)


def test_a_metric_of_ones_own_is_resampled_image_by_image(rng):
    own = Metric(lambda p: float(np.mean(p.predicted == p.labels)))
    run = random_run(rng, count=30)
    assert metric_interval(own, run) == metric_interval(METRICS["accuracy"], run)


@pytest.mark.parametrize("change", ["ids", "labels", "number", "classes"])
def test_runs_of_other_images_are_refused(rng, change):
    run = random_run(rng, count=20)
    other = {
        "ids": lambda: dataclasses.replace(run, ids=("x", *run.ids[1:])),
        "labels": lambda: dataclasses.replace(run, labels=(run.labels + 1) % 3),
        "number": lambda: run.take(np.arange(19)),
        "classes": lambda: dataclasses.replace(run, logits=np.zeros((20, 4))),
    }[change]()
    text = {"ids": "run 0 of lp .* x in place of 0", "number": "19 other images than the 20"}
    with pytest.raises(UserError, match=text.get(change, "other labels or classes")):
        paired_rows([run], {"ft": [run], "lp": [other]})
    with pytest.raises(UserError, match="lp has 1 runs, and what it is compared with has 2"):
        paired_rows([run, run], {"lp": [run]})


def test_rows_of_saved_runs_are_json(rng, tmp_path):
    labels, groups = rng.integers(0, 3, 90), np.arange(90) // 2
    rows = {}
    for name, skill in (("reference", 0.5), ("lp", 0.5), ("ft", 2.0)):
        for seed in range(2):
            run = random_run(rng, labels=labels, skill=skill, count=90, groups=groups)
            run.save(tmp_path / f"{name}{seed}.npz")
        files = [tmp_path / f"{name}{seed}.npz" for seed in range(2)]
        rows[name] = [Predictions.load(file) for file in files]
    reference = rows.pop("reference")
    found = paired_rows(reference, rows)
    assert json.loads(json.dumps(found)) == found
    compared = [name for name in METRICS if METRICS[name].compared]
    assert {name: list(row) for name, row in found.items()} == {"lp": compared, "ft": compared}
    assert found["ft"]["kappa"] is None
    assert found["ft"]["accuracy"]["p"] < 0.05 < found["lp"]["accuracy"]["p"]
    single = paired_difference(METRICS["macro_auc"], rows["ft"], reference)
    assert found["ft"]["macro_auc"] == {
        "difference": single.value,
        "low": single.low,
        "high": single.high,
        "resamples": 1000,
        "undefined": 0,
        "p": single.p,
        "seeds": 2,
    }
    by_image = paired_difference(METRICS["macro_auc"], rows["ft"], reference, np.arange(90))
    assert (by_image.low, by_image.high) != (single.low, single.high)
    assert list(paired_rows(reference, rows, ["loss"])["lp"]) == ["loss"]


@pytest.mark.slow
def test_of_recipes_that_are_equal_the_interval_has_zero_as_often_as_it_says(rng):
    """And p is uniform. What a recipe does on an image it does with every seed, nearly."""
    found = []
    for repetition in range(400):
        labels = rng.integers(0, 2, 150)
        recipes = []
        for _ in "ab":
            of_recipe = 1.5 * np.eye(2)[labels] + rng.normal(size=(150, 2))
            seeds = [of_recipe + 0.2 * rng.normal(size=(150, 2)) for _ in range(3)]
            recipes.append([Predictions(logits, labels) for logits in seeds])
        found.append(paired_difference(METRICS["loss"], *recipes, seed=repetition, resamples=400))
    covered = np.mean([one.low <= 0 <= one.high for one in found])
    assert 0.91 < covered < 0.98
    assert scipy.stats.kstest([one.p for one in found], "uniform").pvalue > 0.001
