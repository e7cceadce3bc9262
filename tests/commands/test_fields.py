"""`python -m medmerge_jax fields`, and that what it prints is what a config takes."""

import pytest

from medmerge_jax.commands import fields as command
from medmerge_jax.config import Config, EvaluateOn, default_config, fields
from medmerge_jax.errors import UserError
from medmerge_jax.studies.checks import CHOICES, choices_of


@pytest.fixture(autouse=True)
def columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def printed(capsys, *arguments):
    command.main(arguments)
    return capsys.readouterr().out.splitlines()


GROUPS = (
    "data", "synthetic", "merge", "merge_ft", "lp", "ft", "select", "compare", "grid", "fgg",
    "fold_soup", "soup", "study",
)  # fmt: skip


def paths(config, prefix=""):
    for name, value in config.items():
        if name in GROUPS:
            yield from paths(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_every_field_has_its_lines(capsys):
    lines = printed(capsys)
    assert max(map(len, lines)) <= 80
    names = [line.split()[0] for line in lines if not line.startswith(" ")]
    of_sets = [name for name in names if name.startswith("evaluate_on.")]
    assert of_sets == [f"evaluate_on.NAME.{one}" for one in ("split", "classes", "unmapped")]
    plain = [n for n in names if not n.startswith("merge_ft.options.") and n not in of_sets]
    assert sorted([*plain, "merge_ft.options"]) == sorted(paths(default_config()))
    assert "merge_ft.options.alpha" in names
    assert "merge_ft.options.multilabel" not in names


def test_a_group(capsys):
    assert printed(capsys, "merge") == [
        "merge.granularity       str = 'kernel'",
        "                        what has a coefficient of its own; one of kernel, layer,",
        "                        slice, parameter, row",
        "merge.constraint        str = 'none'",
        "                        on coefficients; one of none, clip, sigmoid",
        "merge.train_batch_norm  bool = True",
        "                        whether the batch norms train beside the coefficients",
        "merge.init              tuple[float, ...] = ()",
        "                        parents' weights at first, in order of name; empty:",
        "                        equal",
        "merge.learning_rate     float = 0.0",
        "                        of the coefficients, its peak; 0: lp's; from 0",
        "merge.decay_to          str = 'zero'",
        "                        where weight decay pulls coefficients; one of zero,",
        "                        init, none",
    ]
    assert printed(capsys, "config.ft.learning_rate") == [
        "ft.learning_rate  float = 1e-05",
        "                  its peak; from 0",
    ]
    assert printed(capsys, "merge_ft.options.alpha") == [
        "merge_ft.options.alpha  float = 0.3",
        "                        of zipit",
    ]


def test_no_such_group():
    with pytest.raises(UserError, match=r"there is no field 'dta': did you mean 'data'\?"):
        command.main(["dta"])


def test_every_field_is_documented_and_its_default_can_be_used():
    for field in (*fields(Config()), *fields(EvaluateOn())):
        assert 0 < len(field.doc) < 90
        if isinstance(field.choices, str) and field.choices:
            assert field.choices in CHOICES
        if choices_of(field):
            values = field.value if isinstance(field.value, tuple) else [field.value]
            assert set(values) <= set(choices_of(field))
