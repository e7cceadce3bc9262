"""What a config may say, and what is said of one that cannot be used."""

import importlib.util
import json
from pathlib import Path

import ml_collections
import pytest

from medmerge_jax.config import default_config, default_evaluate_on, from_json, parse, to_json
from medmerge_jax.errors import UserError
from medmerge_jax.models.mergers import MERGERS, merger_options
from medmerge_jax.studies.checks import check_config

CONFIGS = sorted((Path(__file__).parent.parent / "configs").rglob("*.py"))


@pytest.mark.parametrize(
    "path", CONFIGS, ids=lambda path: path.relative_to(path.parents[1]).as_posix()
)
def test_the_configs_that_come_with_the_project(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = check_config(module.get_config())
    # As further processes of a study read it.
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
    with pytest.raises(ValueError, match=r"no variant .*nonsense"):
        module.get_config("nonsense")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"recipe": "lpft"}, ["recipe = 'lpft'", "did you mean 'lp_ft'"]),
        ({"batch_size": 0, "seed": -1}, ["batch_size = 0", "seed = -1"]),
        ({"start": "a"}, ["start = 'a'", "one of b, c"]),
        ({"compare.recipes": ("ft", "medmrge")}, ["compare.recipes", "did you mean 'medmerge'"]),
        ({"recipe": "compare", "compare.seeds": (1, 1)}, ["compare.seeds = (1, 1)"]),
        (
            {"recipe": "compare", "compare.reference": "lp_tf-b"},
            ["compare.reference = 'lp_tf-b'", "did you mean 'lp_ft-b'"],
        ),
        (
            {"recipe": "grid_search", "grid.seeds": (), "grid.axes": ("weight_decy=1|2",)},
            ["grid.seeds = ()", "'weight_decy' is no field: did you mean 'weight_decay'"],
        ),
        (
            {"recipe": "grid_search", "grid.axes": ("data.root=a|b", "batch_size=8|8")},
            ["data.root cannot differ between members", "'batch_size=8|8': wanted are different"],
        ),
        (
            {"recipe": "grid_search", "grid.axes": ("batch_size=8|big",)},
            ["'batch_size=8|big': 'big' is no int"],
        ),
        (
            {"recipe": "fission_fusion", "fgg.cycle": 5, "soup.group_by": "ft.rate"},
            ["fgg.cycle = 5: an even number", "soup.group_by = 'ft.rate'"],
        ),
        ({"recipe": "soup"}, ["parents ['c']: a soup wants one or more models"]),
        ({"study.executor": "slurmm"}, ["study.executor = 'slurmm'"]),
        ({"augmentation": "havy"}, ["augmentation = 'havy'", "did you mean 'heavy'"]),
        (
            {
                "recipe": "merge_ft",
                "merge_ft.method": "uniform",
                "merge_ft.repair": True,
                "architecture": "resnet20",
            },
            ["merge_ft.repair = True: resnet20 has batch norms"],
        ),
        ({"merge_ft.method": "zippit"}, ["merge_ft.method = 'zippit'", "did you mean 'zipit'"]),
        ({"compare.mergers": ("fissher",)}, ["compare.mergers has 'fissher'", "'fisher'"]),
        (
            {"recipe": "merge_ft", "merge_ft.method": "task_arithmetic"},
            ["merge_ft.ancestor = ''", "one of b, c"],
        ),
        (
            {"recipe": "merge_ft", "merge_ft.method": "fisher", "parents.b": "random"},
            ["parents ['b'] have no head; the merger 'fisher'"],
        ),
        (
            {"compare.recipes": ("merge_ft",), "recipe": "compare", "parents.b": "zeros"},
            ["one is zeros, which only medmerge can merge"],
        ),
        ({"select.metric": "macrof1"}, ["select.metric = 'macrof1'", "did you mean 'macro_f1'"]),
        ({"compare.seeds": (0, [1])}, ["compare.seeds has [1]: wanted is int, not list"]),
        ({"compare.seeds": (0, -1)}, ["compare.seeds has -1"]),
        ({"compare.recipes": ("ft", 1)}, ["compare.recipes has 1: wanted is str"]),
        ({"data.fractions": (0.8, "0.1", 0.1)}, ["data.fractions has '0.1': wanted is float"]),
        ({"data.classes": (0, 1)}, ["data.classes has 0", "data.classes has 1"]),
        ({"data.synthetic.counts": (1, 2)}, ["data.synthetic.counts = (1, 2)"]),
        ({"lp.learning_rate": float("nan")}, ["lp.learning_rate = nan"]),
        ({"weight_decay": float("inf")}, ["weight_decay = inf"]),
        ({"ft.layer_decay": 1.5}, ["ft.layer_decay = 1.5: 0 to 1 is wanted"]),
        (
            {"architecture": "resnet20", "ft.blocks": 10},
            ["ft.blocks = 10: resnet20 has 9 blocks; 0 trains all of them"],
        ),
        (
            {"architecture": "resnet20", "recipe": "grid_search", "grid.axes": ("ft.blocks=1|12",)},
            ["ft.blocks = 12: resnet20 has 9 blocks"],
        ),
        ({"drop_path": 0.1}, ["drop_path = 0.1: densenet121 has no stochastic depth"]),
        ({"seed": 2**40}, ["seed = 1099511627776"]),
        ({"ft.keep": (0, 60)}, ["ft.keep has 0: 1 to ", "ft.keep = (0, 60): [60] come after"]),
        ({"merge.decay_to": "one"}, ["merge.decay_to = 'one'", "one of zero, init, none"]),
        ({"merge.learning_rate": -1.0}, ["merge.learning_rate = -1.0"]),
        ({"merge.init": (1.0,)}, ["merge.init = (1.0,), of the parents b, c: 1 weights for 2"]),
        ({"merge.init": (0.5, 0.6)}, ["merge.init", "sum to 1.1; a sum of 1 is wanted"]),
        ({"merge.init": (1.0, float("nan"))}, ["merge.init", "sum to nan"]),
        (
            {"merge.init": (1.0, 0.0), "merge.constraint": "sigmoid"},
            ["merge.init", "only in the limit", "constraint 'none' or 'clip'"],
        ),
        (
            {"merge.init": (1.5, -0.5), "merge.constraint": "clip"},
            ["merge.init", "every weight from 0 to 1", "the constraint 'none'"],
        ),
        ({"batch_size": 10**5000}, ["batch_size = an enormous number"]),
    ],
)
def test_values_that_cannot_be_used_are_all_named(changes, words):
    config = default_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError) as error:
        check_config(config)
    for word in words:
        assert word in str(error.value)


def test_options_of_mergers_are_fields():
    fields = check_config(default_config()).merge_ft.options
    names = set().union(*map(merger_options, MERGERS))
    assert set(fields) == names - {"ancestor", "multilabel"}  # which the recipe knows
    assert set(fields.values()) == {None}


def test_options_of_mergers_are_known_ones():
    config = default_config().unlock()
    config.recipe = "merge_ft"
    config.merge_ft.method = "zipit"
    config.merge_ft.options.alpha = 0.5
    check_config(config)
    config.merge_ft.options.gamma = 1.0
    with pytest.raises(
        UserError, match=r"merge_ft\.options\.gamma: .*one of alpha, beta is wanted"
    ):
        check_config(config)


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("uniform", {"t": 0.5}, r"merge_ft\.options\.t: uniform has no options"),
        ("weighted", {}, "weighted of 2 parents: .*wants the option 'weights'"),
        ("weighted", {"weights": (0.5, 0.6)}, r"weights sum to 1\.1"),
        ("weighted", {"weights": 0.5}, "'weights' is 0.5; a sequence with one number for each"),
        ("weight_matching", {"weights": (1.0,)}, "1 weights for 2 parents"),
        ("weight_matching", {"seed": -1}, "'seed' is -1; wanted: a whole number from 0 on"),
        ("weight_matching", {"seed": 0.5}, "'seed' is 0.5; wanted: a whole number"),
        ("slerp", {"t": "half"}, "'t' is 'half'; one number is wanted"),
        ("slerp", {"t": float("nan")}, "'t' is nan; wanted: finite numbers"),
        ("slerp", {"t": 10**400}, "wanted: finite numbers"),
        ("task_arithmetic", {"scale": (0.5, 0.5)}, "of 1 parents: 2 scales for 1 parents"),
        ("task_arithmetic", {"scale": "x"}, "'scale' is 'x'; wanted: finite numbers"),
        ("fisher", {"floor": 0.0}, r"the floor is 0\.0; a positive number"),
        ("fisher", {"coefficients": (1.0, -1.0)}, "none negative"),
        ("zipit", {"alpha": 1.5}, r"alpha is 1\.5; a number from 0 to 1"),
        ("zipit", {"beta": True}, "'beta' is True; wanted: finite numbers"),
    ],
)
def test_options_that_no_parents_could_be_merged_with(method, options, words):
    config = default_config().unlock()
    config.recipe, config.merge_ft.method, config.merge_ft.ancestor = "merge_ft", method, "c"
    config.merge_ft.options = ml_collections.ConfigDict(options)
    with pytest.raises(UserError, match=words):
        check_config(config)


def test_options_that_can_be_used():
    config = default_config().unlock()
    config.recipe, config.compare.recipes = "compare", ("merge_ft",)
    config.compare.mergers, config.merge_ft.ancestor = tuple(MERGERS), "c"
    config.merge_ft.options = ml_collections.ConfigDict(
        {"weights": (0.7, 0.3), "t": 0.2, "scale": 0.4, "coefficients": (1, 2), "floor": 1e-3}
        | {"alpha": 0, "beta": 1.0, "seed": 3}
    )
    check_config(config)
    config.parents.d = "random"
    config.compare.mergers = ("slerp", "weighted")
    with pytest.raises(UserError, match=r"slerp of 3 parents: .*between two") as error:
        check_config(config)
    assert "weighted of 3 parents: 2 weights for 3 parents" in str(error.value)


def test_an_unlocked_config_may_not_have_other_fields():
    config = default_config().unlock()
    config.batchsize = 3
    del config.lp
    config.ft = ml_collections.ConfigDict({**config.ft, "epochs": "many"})
    with pytest.raises(UserError) as error:
        check_config(config)
    lines = str(error.value).splitlines()[1:]
    assert lines[0] == "  lp is missing"
    assert lines[1].startswith("  batchsize is no field: did you mean 'batch_size'?")
    assert lines[2] == "  ft.epochs = 'many': wanted is int, not str"
    assert len(lines) == 3


def test_a_source_is_checked_too():
    config = default_config().unlock()
    config.sources = ml_collections.ConfigDict({"b": default_config().unlock()})
    config.sources.b.lp.epochs = 0
    with pytest.raises(UserError, match=r"sources\.b\.lp\.epochs = 0"):
        check_config(config)


def test_whole_numbers_and_lists_do_where_others_are_the_default():
    config = default_config().unlock()
    config.data.classes = ["a", "b"]
    config.ft = ml_collections.ConfigDict({**config.ft, "warmup_epochs": 1})
    check_config(config)


def test_parents_are_texts_and_sources_are_configs():
    config = default_config().unlock()
    config.parents = ml_collections.ConfigDict({"b": 5, "c": ["imagenet"]})
    config.sources = ml_collections.ConfigDict({"a": "runs/a"})
    with pytest.raises(UserError) as error:
        check_config(config)
    for word in ("parents.b = 5: wanted is str", "parents.c = ", "sources.a = 'runs/a'"):
        assert word in str(error.value)


def test_a_config_that_is_its_own_source():
    config = default_config().unlock()
    config.sources = ml_collections.ConfigDict({"a": config})
    with pytest.raises(UserError, match="sources inside sources"):
        check_config(config)


def test_of_very_many_mistakes_the_first_are_said():
    config = default_config().unlock()
    config.update({f"field_{number:04}": 0 for number in range(1000)})
    with pytest.raises(UserError) as error:
        check_config(config)
    lines = str(error.value).splitlines()
    assert len(lines) == 52
    assert "field_0049 is no field" in lines[-2] and lines[-1] == "  and 950 more"


def test_a_config_json_of_an_earlier_version_has_the_defaults_of_newer_fields():
    config = default_config().unlock()
    source, elsewhere = default_config().unlock(), default_evaluate_on()
    config.seed, source.seed, elsewhere.split = 3, 4, "all"
    config.sources = type(config)({"b": source})
    config.evaluate_on = type(config)({"there": elsewhere})
    recorded = to_json(parse(config))
    for part in (recorded, recorded["sources"]["b"]):
        del part["grid"], part["compare"]["reference"], part["data"]["folds"]
    del recorded["evaluate_on"]["there"]["data"]["folds"]
    assert from_json(recorded) == parse(config)
