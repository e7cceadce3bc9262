"""What soups are of, what is refused, and how one that is worse than a member is explained."""

import types

import numpy as np
import pytest

from medmerge_jax.config import Config, Soup
from medmerge_jax.errors import UserError
from medmerge_jax.recipes import soups
from medmerge_jax.recipes.soups import check_heads


def cards(*heads):
    return [{"head": head} if head else {} for head in heads]


def test_members_of_one_head_are_a_soup():
    check_heads(["a", "b"], cards("x", "x"), any_heads=False)


@pytest.mark.parametrize(
    ("heads", "words"),
    [
        (("x", "x", "y"), "a and c began with different heads"),
        (("x", "", "x"), "nothing says with which head b began"),
        (("", ""), "nothing says with which head a began"),
    ],
)
def test_others_are_refused_unless_asked_for(heads, words):
    names = ["a", "b", "c"][: len(heads)]
    with pytest.raises(UserError, match=f"{words}.*soup.any_heads = True"):
        check_heads(names, cards(*heads), any_heads=False)
    check_heads(names, cards(*heads), any_heads=True)


def averaged(monkeypatch, loss, numbers, **settings):
    """The soup of models of one number, and of statistics that are 1, or 0 if estimated anew.

    Their loss on any images is a function of both.
    """
    names = [chr(ord("a") + index) for index in range(len(numbers))]

    def open_parent(config, name, folder):
        number = numbers[names.index(name)]
        return {"params": {"w": np.float32(number)}, "batch_stats": {"s": np.float32(1)}}

    def metrics(variables):
        value = loss(float(variables["params"]["w"]), float(variables["batch_stats"]["s"]))
        return {"loss": value, "accuracy": 1 - value}

    monkeypatch.setattr(soups.inputs, "open_parent", open_parent)
    monkeypatch.setattr(soups, "classification_metrics", metrics)
    experiment = types.SimpleNamespace(
        config=Config(soup=Soup(**settings)),
        inputs=types.SimpleNamespace(parents={n: ({}, {"head": "x"}) for n in names}, folder=None),
        predictions=lambda variables, split: variables,
        recalibrated=lambda variables, count: {**variables, "batch_stats": {"s": np.float32(0)}},
    )
    return soups.average(experiment)


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
def test_a_greedy_soup_begins_with_the_best_by_its_metric(monkeypatch, metric):
    """0 and 1 are better together; with 4 they are worse."""

    def loss(w, s):
        return (w - 0.4) ** 2

    settings = {"kind": "greedy", "metric": metric, "recalibrate": "never"}
    soup = averaged(monkeypatch, loss, (4.0, 0.0, 1.0), **settings)
    facts = soup.facts["soup"]
    assert facts["chosen"] == ["b", "c"]
    assert float(soup.variables["params"]["w"]) == 0.5
    wanted = [loss(w, 1) if metric == "loss" else 1 - loss(w, 1) for w in (4.0, 0.0, 1.0)]
    assert list(facts["members"].values()) == pytest.approx(wanted)
    assert soup.head == "x"


@pytest.mark.parametrize(
    ("recalibrate", "gain", "taken"),
    [
        ("if_better", 0.1, "recalibrated"),
        ("if_better", -0.1, "averaged"),
        ("if_better", 0.0, "averaged"),  # of equals that which was not touched
        ("never", 0.1, "averaged"),
        ("always", -0.1, "recalibrated"),
    ],
)
def test_statistics_are_estimated_anew_where_the_config_says(monkeypatch, recalibrate, gain, taken):
    def loss(w, s):
        return 1 + w**2 - gain * (s == 0)

    settings = {"kind": "uniform", "metric": "loss", "recalibrate": recalibrate}
    soup = averaged(monkeypatch, loss, (-1.0, 1.0), **settings)
    assert soup.facts["soup"]["taken"] == taken
    assert float(soup.variables["batch_stats"]["s"]) == (taken == "averaged")
    losses = {name: one["val"]["loss"] for name, one in soup.facts["soup"]["variants"].items()}
    assert losses == {"averaged": 1, "recalibrated": pytest.approx(1 - gain)}


class Judge:
    """Scores of models of one number, by the loss as a function of that number."""

    class experiment:  # noqa: N801  # stands for an object
        class config:  # noqa: N801
            class soup:  # noqa: N801
                metric = "loss"

    def __init__(self, loss):
        self.loss = loss

    def shown(self, score):
        return -score

    def score(self, variables):
        return -self.metrics(variables, "val")["loss"]

    def metrics(self, variables, split):
        return {"loss": float(self.loss(float(variables["params"]["w"])))}


class Members(list):
    names = ("left", "right")


def explained(loss, numbers, recalibrated=None):
    judge = Judge(loss)
    members = Members({"params": {"w": np.float32(number)}} for number in numbers)
    variants = {"averaged": {"params": {"w": np.float32(np.mean(numbers))}}}
    ranks = {"averaged": judge.score(variants["averaged"])}
    if recalibrated is not None:
        ranks["recalibrated"] = -recalibrated
    scores = [judge.score(one) for one in members]
    assert ranks["averaged"] < max(scores)
    return soups._explanation(judge, members, scores, variants, ranks, "averaged")


def test_a_barrier_between_members_is_named():
    text = explained(lambda w: 1 - (w - 2) ** 2 / 4 + w / 100, (1.0, 3.0))
    assert "members are too far apart" in text
    assert "half-way between left and right the validation loss is 1.0200, 0.2500 above" in text


def test_statistics_are_named_where_recalibration_mends_it():
    text = explained(lambda w: 1 - (w - 2) ** 2 / 4, (1.0, 3.0), recalibrated=0.5)
    assert "the statistics of its batch norms are to blame" in text
    assert "for recalibrated it has 0.5000" in text


def test_members_that_hardly_differ_are_named():
    text = explained(lambda w: abs(w - 1.0), (1.0, 1.0001))
    assert "so alike that they have the same faults" in text


def test_a_member_that_is_just_better_is_named():
    text = explained(lambda w: w, (1.0, 3.0))
    assert "no barrier lies between its members, other members are just worse" in text
