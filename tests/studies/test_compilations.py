"""The members of a grid share what was compiled, whatever they differ in."""

import pytest

from medmerge_jax.studies import run, worker
from medmerge_jax.training.step import train_step


@pytest.fixture
def compiled_by(events, monkeypatch):
    """How many programs each job compiled, by its name."""
    counts, run_recipe = {}, worker.run_recipe

    def counting(config, directory, inputs, **options):
        before = events["compiled"]
        results = run_recipe(config, directory, inputs, **options)
        counts["/".join(directory.path.parts[-2:])] = events["compiled"] - before
        return results

    monkeypatch.setattr(worker, "run_recipe", counting)
    return counts


@pytest.mark.slow
def test_a_grid_compiles_its_step_once_and_each_augmentation_once(
    make_config, compiled_by, tmp_path
):
    config = make_config("grid_search", **{"grid.augmentations": ("none", "medium")})
    before = train_step._cache_size()
    run(config, tmp_path / "run")
    members = {name: count for name, count in compiled_by.items() if name.startswith("grid/")}
    assert len(members) == 2 * 2 * 2
    assert train_step._cache_size() == before + 2  # of the warm-up, and of all members
    first = next(iter(members))
    augmented = next(name for name in members if "medium" in name)
    others = {name: count for name, count in members.items() if name not in (first, augmented)}
    assert members[first] > 0
    assert set(others.values()) == {0}
