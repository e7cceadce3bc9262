"""Which jobs a study has, before any is run."""

import importlib.util
from pathlib import Path

import pytest

from medmerge_jax.config import default_config
from medmerge_jax.errors import UserError
from medmerge_jax.studies.checks import check_config
from medmerge_jax.studies.jobs import plan

CONFIGS = Path(__file__).parents[2] / "configs" / "fission_fusion"
METRICS = {
    "aptos": "macro_f1", "ham10000": "macro_f1", "rsna_pneumonia": "macro_f1",
    "chexpert": "macro_auc", "cifar10": "accuracy", "cifar100": "accuracy",
}  # fmt: skip
RATES = (1e-3, 5e-4, 1e-4, 5e-5, 1e-5, 5e-6, 1e-6, 1e-7)


def published(name, variant=""):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return check_config(module.get_config(variant))


@pytest.mark.parametrize("name", METRICS)
def test_the_published_fission_fusion(name):
    config = published(name)
    assert (config.soup.metric, config.soup.recalibrate) == (METRICS[name], "never")
    jobs = plan(config)
    warm = jobs["warmup"].config
    assert (warm.recipe, warm.augmentation, warm.head) == ("lp_drift", "minimal", "new")
    assert (warm.lp.learning_rate, warm.lp.epochs, warm.lp.schedule) == (1e-3, 10, "cosine")
    bases = [job for job in jobs.values() if job.config.recipe == "fgg"]
    assert [job.config.ft.learning_rate for job in bases] == list(RATES)
    for job in bases:
        one = job.config
        assert (one.augmentation, one.seed, one.batch_size, one.weight_decay) == (
            "heavy", 1, 128, 1e-2,
        )  # fmt: skip
        assert (one.ft.epochs, one.ft.patience, one.ft.patience_delta) == (50, 8, 1e-3)
        assert (one.fgg.epochs, one.fgg.learning_rate, one.fgg.lowest) == (17, 1e-5, 1e-8)
        assert (one.head, one.select.metric, job.after) == ("keep", "loss", ("warmup",))
    everything = jobs["soups/greedy"].config.parents
    assert len(everything) == 48
    assert sorted(jobs["soups/uniform-lr1e-07"].config.parents.values()) == sorted(
        f"job:fgg/lr1e-07{end}"
        for end in ("", "::fgg-1", "::fgg-5", "::fgg-9", "::fgg-13", "::fgg-17")
    )
    assert len(jobs["soups/GoU"].after) == len(jobs["soups/GoG"].after) == 8


@pytest.mark.parametrize("name", METRICS)
def test_the_published_grid(name):
    jobs = plan(published(name, "grid"))
    members = [job.config for job in jobs.values() if job.name.startswith("grid/")]
    assert len(members) == 48
    points = {(one.ft.learning_rate, one.augmentation, one.seed) for one in members}
    assert points == {
        (rate, policy, seed)
        for rate in RATES
        for policy in ("minimal", "medium", "heavy")
        for seed in (0, 1)
    }
    assert {one.recipe for one in members} == {"ft"}
    assert len(jobs["soups/greedy"].after) == 48


def test_the_labels_of_chexpert_that_are_not_known_are_masked():
    config = published("chexpert")
    assert (config.data.uncertain, config.data.blank) == ("unknown", "unknown")
    assert config.class_weights == "by_frequency"


def test_axes_of_any_field_and_groups_by_any_field():
    config = default_config().unlock()
    config.recipe, config.parents.b = "grid_search", "b.pth"
    config.grid.learning_rates, config.grid.augmentations = (1e-3, 1e-4), ("none",)
    config.grid.seeds = (3,)
    config.grid.axes = ("weight_decay=0.01|0.1", "batch_size=8|16")
    config.soup.group_by = "weight_decay"
    jobs = plan(check_config(config))
    members = [job for job in jobs.values() if job.name.startswith("grid/")]
    assert len(members) == 8
    assert "grid/lr0.0001-none-seed3-weight_decay0.1-batch_size16" in jobs
    groups = jobs["soups/GoG"].config.parents
    assert set(groups) == {"weight_decay0.01", "weight_decay0.1"}
    for value in (0.01, 0.1):
        (soup,) = [jobs[f"soups/greedy-weight_decay{value}"]]
        assert len(soup.after) == 4
        assert {jobs[name].config.weight_decay for name in soup.after} == {value}


def test_a_merged_start_is_the_warm_up_of_all_parents():
    config = default_config().unlock()
    config.recipe, config.parents.b = "fission_fusion", "b.pth"
    config.grid.warmup = "merge_lp"
    jobs = plan(check_config(config))
    assert set(jobs["warmup"].config.parents) == {"b", "c"}
    assert jobs["fgg/lr0.001"].config.parents == {"warmup": "job:warmup"}


def test_jobs_do_not_know_how_many_others_there_are():
    config = default_config().unlock()
    config.recipe, config.parents.b = "compare", "b.pth"
    config.study.workers, config.compare.seeds = 7, (5, 6)
    one = plan(check_config(config))["ft-b/seed5"].config
    assert (one.seed, one.recipe) == (5, "ft")
    assert (one.study.workers, one.compare.seeds, one.sources) == (1, (0, 1, 2), {})


def test_sources_come_in_order_and_never_in_a_circle():
    config = default_config().unlock()
    config.recipe = "medmerge"
    config.parents.b, config.parents.c = "source:b", "source:c"
    for name, start in (("b", "source:c"), ("c", "random")):
        source = default_config().unlock()
        source.recipe, source.start = "ft", "c"
        source.parents = type(source)({"c": start})
        config.sources[name] = source
    assert list(plan(check_config(config))) == ["sources/c", "sources/b", ""]
    config.sources.c.parents.c = "source:b"
    with pytest.raises(UserError, match=r"sources \['b', 'c'\] start from each other"):
        plan(check_config(config))


@pytest.mark.parametrize(
    ("given", "wanted"), [("if_better", "never"), ("never", "never"), ("always", "always")]
)
def test_a_soup_of_folds_chooses_nothing_by_images_that_its_members_know(given, wanted):
    config = default_config().unlock()
    config.recipe, config.parents.b, config.soup.recalibrate = "fold_soup", "b.pth", given
    soup = plan(check_config(config))["soups/uniform"].config.soup
    assert (soup.kind, soup.recalibrate) == ("uniform", wanted)
