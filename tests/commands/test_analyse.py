"""`python -m medmerge_jax analyse`: each kind on a tiny run, and what is refused."""

import csv
import json

import numpy as np
import pytest
from absl import flags
from helpers import tiny_config, tiny_network
from helpers.random_models import variables_of
from PIL import Image

import medmerge_jax as mm
from medmerge_jax import weights
from medmerge_jax.commands import analyse
from medmerge_jax.errors import UserError
from medmerge_jax.evaluation.predictions import Predictions
from medmerge_jax.recipes.model_analyses import explanations, mistake_sheet
from medmerge_jax.studies import run
from medmerge_jax.studies.checks import check_config

pytestmark = pytest.mark.filterwarnings("ignore:the load_module")  # of ml_collections

TINY = tiny_config.__file__
PATIENT = "patient-4711"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two models, and images with names of a patient."""
    home = tmp_path_factory.mktemp("analyses")
    patch = pytest.MonkeyPatch()
    patch.setenv("MEDMERGE_JAX_CACHE", str(home / "cache"))
    tiny_network.register_architecture()
    for seed in range(2):
        variables = variables_of(seed, architecture=tiny_network.ARCHITECTURE)
        card = {"image_size": 16, "classes": ["a", "$b", "c", "<d>"]}
        model = weights.model_from_card(tiny_network.ARCHITECTURE, variables, card)
        weights.save_model(home / f"m{seed}", model)
    rng = np.random.default_rng(0)
    (home / "images").mkdir()
    for number in range(5):
        pixels = rng.integers(0, 256, (20, 20, 3), np.uint8)
        Image.fromarray(pixels).save(home / "images" / f"{PATIENT}-{number}.png")
    yield home
    patch.undo()


@pytest.fixture(scope="module")
def merge(home):
    """The directory of a finished merge."""
    config = tiny_config.get_config()
    config.architecture, config.recipe = tiny_network.ARCHITECTURE, "medmerge"
    config.lp.epochs = 3
    run(config, home / "merge")
    return home / "merge"


@pytest.fixture
def call(home, tmp_path, capsys, monkeypatch):
    """The command in that folder; returns what it printed, and a reader of what it wrote."""

    def command(*arguments):
        monkeypatch.chdir(home)
        analyse.main([*arguments, "--out", str(tmp_path / "out")])
        return capsys.readouterr().out

    command.json = lambda name: json.loads((tmp_path / "out" / name).read_text())
    command.csv = lambda name: list(
        csv.DictReader((tmp_path / "out" / name).read_text().splitlines())
    )
    command.out = tmp_path / "out"
    return command


def coefficients(folder):
    with np.load(folder / "coefficients.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


@pytest.mark.slow
def test_depth(call, merge):
    printed = call("depth", "isic=merge", "merge")
    learned = coefficients(merge)
    rows = call.csv("depth.csv")
    assert [row["row"] for row in rows] == ["isic", "merge"]
    for row in rows:
        assert float(row["mean"]) == pytest.approx(learned[row["layer"]].mean())
        assert float(row["deviation_inside"]) == pytest.approx(learned[row["layer"]].std())
        assert (row["parent"], row["deviation_between_seeds"]) == ("b", "")
    assert call.json("depth.json")["rows"][0] == {"row": "isic", "parent": "b", "seeds": 1}
    assert (call.out / "depth.png").stat().st_size > 1000
    assert printed.startswith("isic   b: 0.5") or printed.startswith("isic   b: 0.4")


@pytest.mark.slow
def test_a_trajectory_ends_at_the_learned_coefficients(call, merge):
    """At the epoch that was selected: what is recorded is what coefficients.npz has."""
    call("trajectory", "merge")
    rows = call.csv("trajectory.csv")
    assert [int(row["epoch"]) for row in rows if row["parent"] == "b"] == [1, 2, 3]
    stages = json.loads((merge / "results.json").read_text())["stages"]
    (values,) = coefficients(merge).values()
    at = {row["parent"]: row for row in rows if int(row["epoch"]) == stages[0]["selected_epoch"]}
    for parent, of in (("b", values), ("c", 1 - values)):
        found = [float(at[parent][x]) for x in ("mean", "deviation", "least", "greatest")]
        np.testing.assert_allclose(found, [of.mean(), of.std(), of.min(), of.max()], rtol=1e-5)
    assert len({row["mean"] for row in rows}) == 6
    assert (call.out / "trajectory.png").stat().st_size > 1000


def test_features_are_the_activations(call, home):
    images = ["--images", *map(str, sorted((home / "images").glob("*.png"))[:2])]
    call("features", "b=m0", "m1", *images, "--channels", "2", "--layers", "conv")
    found = call.json("features.json")
    assert list(found["channels"]) == ["conv"] and len(found["channels"]["conv"]) == 2
    assert [one["model"] for one in found["models"]] == ["b", "m1"]
    figures = sorted(path.name for path in call.out.glob("*.png"))
    assert figures == [f"features-{number}.png" for number in (1, 2)]
    assert PATIENT not in (call.out / "features.json").read_text()


def test_cka_of_two_models(call):
    printed = call("cka", "m0", "m1", "--images", "images")
    rows = call.csv("cka.csv")
    names = ["m0: conv", "m0: norm", "m1: conv", "m1: norm"]
    assert [row[""] for row in rows] == names
    matrix = np.array([[float(row[name]) for name in names] for row in rows])
    np.testing.assert_allclose(np.diag(matrix), 1)
    assert "CKA of layers on 5 images: 2 of m0, 2 of m1" in printed
    assert (call.out / "cka.png").stat().st_size > 1000


@pytest.fixture
def flag():
    """The flag --config, which the process forgets afterwards."""
    yield
    flags.FLAGS["config"].unparse()


def test_cka_on_a_data_set(call, flag):
    printed = call("cka", "m0", "--config", TINY, "--split=train", "--num-images", "6")
    assert "on 6 images" in printed


def test_grad_cam_of_the_predicted_and_of_a_named_class(call, home):
    printed = call("grad_cam", "m0", "m1", "--images", *map(str, (home / "images").glob("*3.png")))
    (image,) = call.json("grad_cam.json")["models"][0]["images"]
    probabilities = mm.predict(mm.load_model(home / "m0"), list((home / "images").glob("*3.png")))
    classes = ["a", "$b", "c", "<d>"]
    assert image["class"] == classes[probabilities.argmax()]
    assert image["probability"] == pytest.approx(probabilities.max(), rel=1e-5)
    assert f"m0, image 1: {image['class']} {image['probability']:.3f}" in printed
    image = next(iter((home / "images").glob("*4.png")))
    call("grad_cam", "m0", "--images", str(image), "--class", "$b", "--layer", "conv")
    told = call.json("grad_cam.json")["models"][0]
    assert told["layer"] == "conv" and {one["class"] for one in told["images"]} == {"$b"}
    assert PATIENT not in (call.out / "grad_cam.json").read_text()
    with pytest.raises(UserError, match="m0: no class 'e'; one of a"):
        call("grad_cam", "m0", "--images", "images", "--class", "e")


@pytest.mark.slow
def test_mistakes_are_shown_by_their_rows(call, merge, tmp_path):
    printed = call("mistakes", "merge", "--count", "3")
    said = Predictions.load(merge / "predictions.npz")
    wrong = np.flatnonzero(said.predicted != said.labels)
    rows = call.csv("mistakes.csv")
    assert {int(row["row"]) for row in rows} <= set(wrong.tolist())
    assert len(rows) == min(3, len(wrong)) > 0
    assert f"{len(wrong)} mistakes on {len(said)} test images, {len(rows)} of them shown" in printed
    assert not any(name in (call.out / "mistakes.json").read_text() for name in said.ids)
    other = tiny_config.get_config()
    other.data.synthetic.counts = (9, 9, 9)
    with pytest.raises(UserError, match="of other test images than the data set has now"):
        mistake_sheet(merge, tmp_path / "none", config=check_config(other))
    assert not (tmp_path / "none").exists()


def comparison(folder, name, advantage, weight):
    """A comparison as the program leaves it, of one seed."""
    for part, recipe in (("ft-b/seed0", "ft"), ("medmerge/seed0", "medmerge")):
        path = folder / name / part
        path.mkdir(parents=True)
        write(path / "config.json", {"config": {"recipe": recipe, "seed": 0}})
        write(path / "results.json", {"parents": {"b": {"source": "x"}, "c": {"source": "y"}}})
    arrays = {"conv1/kernel": np.full(4, weight), "layer1/kernel": np.full(4, 1 - weight)}
    np.savez(folder / name / "medmerge/seed0/coefficients.npz", **arrays)
    rows = [{"recipe": "ft", "start": start, "macro_f1": {"mean": mean}}
            for start, mean in (("b", 0.5 + advantage), ("c", 0.5))]  # fmt: skip
    write(folder / name / "results.json", {"table": rows})
    jobs = {"ft-b/seed0": {"status": "done"}, "medmerge/seed0": {"status": "done"}}
    write(folder / name / "jobs.json", {"jobs": jobs})


def write(path, value):
    path.write_text(json.dumps(value))


def test_rank_over_comparisons(call, home, tmp_path):
    pairs = ((-0.1, 0.3), (0.0, 0.45), (0.1, 0.4), (0.2, 0.7))
    for number, (advantage, weight) in enumerate(pairs):
        comparison(tmp_path, f"t{number}", advantage, weight)
    studies = [str(tmp_path / f"t{number}") for number in range(4)]
    printed = call("rank", *studies)
    found = call.json("rank.json")
    assert [one["score"] for one in found["targets"]] == pytest.approx([-0.1, 0, 0.1, 0.2])
    first, second = found["layers"]
    assert (first["rho"], second["rho"]) == pytest.approx((0.8, -0.8))
    assert found["all_layers"] == {"rho": None, "p": None}
    assert "4 targets are too few" in printed
    assert "over 4 targets: undefined" in printed
    with pytest.raises(UserError, match="2 comparisons; 3 or more"):
        call("rank", *studies[:2])
    with pytest.raises(UserError, match="0 merges by the recipe merge_lp; one"):
        call("rank", *studies, "--recipe", "merge_lp")
    with pytest.raises(UserError, match=r"t0: its table has no accuracy of ft from b; a finished"):
        call("rank", *studies, "--metric", "accuracy")


def test_trajectories_of_studies(call, tmp_path):
    comparison(tmp_path, "a", 0.1, 0.4)
    comparison(tmp_path, "b", 0.1, 0.4)
    with pytest.raises(UserError, match=r"seed0: has no coefficients.jsonl, as runs of an earlier"):
        call("trajectory", str(tmp_path / "a"))
    for name, layers in (("a", ("conv1/kernel", "layer1/kernel")), ("b", ("conv1/kernel",))):
        lines = [
            {"stage": "merge_lp", "epoch": e, "layers": {p: [[e, 0.1, 0, 1]] * 2 for p in layers}}
            for e in (1, 2)
        ]
        file = tmp_path / name / "medmerge/seed0/coefficients.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    printed = call("trajectory", f"x={tmp_path / 'a'}")
    assert "x: medmerge/seed0: mean weight of b 1.0000 after epoch 1, 2.0000 after" in printed
    rows = call.csv("trajectory.csv")
    assert [row["mean"] for row in rows] == ["1", "1", "2", "2"] * 2
    with pytest.raises(UserError, match="b: medmerge/seed0: has other layers than a"):
        call("trajectory", str(tmp_path / "a"), str(tmp_path / "b"))


def test_a_sheet_of_very_many_images_is_none(tmp_path):
    with pytest.raises(UserError, match="65 images; 64 at most"):
        explanations({}, ["x.png"] * 65, tmp_path)


def test_members_of_a_study_that_differ_in_their_seed_are_a_row(call, home, tmp_path):
    comparison(tmp_path, "study", 0.1, 0.4)
    other = tmp_path / "study" / "medmerge/seed1"
    other.mkdir()
    write(other / "config.json", {"config": {"recipe": "medmerge", "seed": 1}})
    write(other / "results.json", {"parents": {"b": {"source": "x"}, "c": {"source": "zeros"}}})
    np.savez(
        other / "coefficients.npz", **{"conv1/kernel": np.array([0.6]), "layer1/kernel": [1.0]}
    )
    jobs = json.loads((tmp_path / "study/jobs.json").read_text())["jobs"]
    write(tmp_path / "study/jobs.json", {"jobs": {**jobs, "medmerge/seed1": {"status": "done"}}})
    call("depth", str(tmp_path / "study"))
    first = call.csv("depth.csv")[0]
    assert (first["row"], first["seeds"], float(first["mean"])) == (
        "study",
        "2",
        pytest.approx(0.5),
    )
    assert float(first["deviation_between_seeds"]) == pytest.approx(0.2 / 2**0.5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["depth", "m0"], "m0: there are no learned coefficients"),
        (["depth", "nowhere"], "nowhere: there is no such folder"),
        (["depth", "a=merge", "a=merge"], "two are called the same"),
        (["cka", "m0"], "either --images FILES, or --config FILE"),
        (["cka", "m0", "--images", "images", "--layers", "layr"], "no layer 'layr'"),
        (["cka", "m0", "--images", "images", "--batch-size", "7"], "8 or more at a time"),
        (["features", "imagenet", "--images", "images"], "no other model says the architecture"),
        (["mistakes", "m0"], "m0: a finished run is wanted"),
    ],
)
def test_what_cannot_be_used(call, arguments, words):
    with pytest.raises(UserError, match=words):
        call(*arguments)
    assert not call.out.exists()


def test_kinds_are_explained(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for kind in analyse._KINDS:
        with pytest.raises(SystemExit) as left:
            analyse.main([kind, "--help"])
        assert not left.value.code
        printed = capsys.readouterr().out
        assert "--out FOLDER" in printed and max(map(len, printed.splitlines())) <= 80
