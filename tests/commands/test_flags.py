"""What stands on the command line, before any of it is looked up."""

import pytest
from absl import flags
from absl.testing import flagsaver

from medmerge_jax.commands import config_flags, work
from medmerge_jax.errors import UserError


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("data.label_columns=Finding Labels", "('Finding Labels',)"),
        ("data.label_columns=(Finding Labels, Other)", "('Finding Labels', 'Other')"),
        ("data.label_columns=('Finding Labels', 'b')", "('Finding Labels', 'b')"),
        ("data.label_columns=a,b", "('a', 'b')"),
        ("data.label_columns=", "()"),
        ("data.classes=0,1,02", "('0', '1', '02')"),
        ("data.classes=0,1", "('0', '1')"),
        ("data.classes=7", "('7',)"),
        ("compare.seeds=1,2", "(1, 2)"),
        ("compare.seeds=[1, 2]", "(1, 2)"),
        ("compare.seeds=3", "(3,)"),
        ("data.window=-100,400.5", "(-100, 400.5)"),
        ("sources.b.data.fractions=0.5,0.25,0.25", "(0.5, 0.25, 0.25)"),
        ("evaluate_on.b.data.classes=0,1", "('0', '1')"),
    ],
)
def test_a_tuple_stands_with_and_without_parentheses(given, taken):
    name, _, value = given.partition("=")
    assert config_flags.with_tuples([f"--config.{given}"]) == [f"--config.{name}={taken}"]
    assert config_flags.with_tuples([f"--config.{name}", value]) == [f"--config.{name}", taken]


def test_other_flags_are_left_as_they_are():
    given = ["x", "--config=a.py", "--config.batch_size=3", "--config.data.root=a, b", "--workdir="]
    assert config_flags.with_tuples(given) == given


def test_a_list_that_is_none_names_its_flag():
    with pytest.raises(UserError, match=r"--config\.compare\.seeds=1 2: wanted is int"):
        config_flags.with_tuples(["--config.compare.seeds=1 2"])


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("batch_size", "--config.batch_size"),
        ("lp.epochs", "--config.lp.epochs"),
        ("epochs", "--config.lp.epochs or --config.ft.epochs"),
    ],
)
def test_a_field_without_its_prefix_is_understood(name, hint):
    error = flags.UnrecognizedFlagError(name, "5")
    assert hint in config_flags.explain(error)
    assert "--config" not in config_flags.explain(flags.UnrecognizedFlagError("nonsense", "5"))


@pytest.mark.filterwarnings("ignore:the load_module")  # of ml_collections
@flagsaver.flagsaver
def test_the_file_of_a_variant_is_the_file_alone(tmp_path):
    # Further processes of a study import it for what it registers.
    file = tmp_path / "mine.py"
    file.write_text(
        "from medmerge_jax.config import default_config\n\n\n"
        "def get_config(variant):\n"
        "    config = default_config()\n"
        "    config.architecture = variant\n"
        "    return config\n"
    )
    config_flags.parse_flags(["medmerge_jax", f"--config={file}:resnet50"])
    assert config_flags.CONFIG.value.architecture == "resnet50"
    assert config_flags.config_file() == str(file)


def test_a_worker_without_its_config_file_says_so(tmp_path):
    with pytest.raises(UserError, match=r"--import .*mine\.py: there is no such file"):
        work.main([str(tmp_path), f"--import={tmp_path / 'mine.py'}"])
