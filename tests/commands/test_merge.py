"""`python -m medmerge_jax.merge`: files in, a file out, nothing trained."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers.random_models import variables_of
from PIL import Image

import medmerge_jax as mm
from medmerge_jax import weights
from medmerge_jax.commands.merge import main
from medmerge_jax.data.hashing import find_hashes
from medmerge_jax.errors import UserError
from medmerge_jax.images import read_image
from medmerge_jax.merging.trees import flatten
from medmerge_jax.models import get_spec, mergers, statistics


@pytest.fixture
def models(tmp_path):
    """a.safetensors alone, b/ with a card, c of other classes, d of another architecture."""
    weights.save_weights(tmp_path / "a.safetensors", "resnet20", variables_of(0))
    card = {"num_classes": 4, "classes": ["p", "q", "r", "s"], "image_size": 24}
    weights.save_model(tmp_path / "b", weights.model_from_card("resnet20", variables_of(1), card))
    weights.save_weights(tmp_path / "c.safetensors", "resnet20", variables_of(2, num_classes=7))
    d = variables_of(3, architecture="resnet32")
    weights.save_weights(tmp_path / "d.safetensors", "resnet32", d)
    return tmp_path


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(7):
        path = tmp_path / "images" / str(number % 2) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (30, 20, 3), np.uint8)).save(path)
    return tmp_path / "images"


def assert_same(found, wanted):
    found, wanted = flatten(found), flatten(wanted)
    assert found.keys() == wanted.keys()
    for path, leaf in wanted.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)


def test_what_models_were_trained_on_is_known_of_the_merged_one(tmp_path):
    rows = np.arange(24, dtype=np.uint64).reshape(6, 4)
    for seed, (name, known) in enumerate({"a": rows[:3], "b": rows[2:], "c": None}.items()):
        model = weights.model_from_card(
            "resnet20", variables_of(seed), {"data_fingerprint": name * 64}
        )
        weights.save_model(tmp_path / name, dataclasses.replace(model, image_hashes=known))
    for out, names in (("ab", "ab"), ("abc", "abc")):
        main(
            [
                "--method",
                "uniform",
                "--out",
                f"{tmp_path}/{out}",
                *(f"{tmp_path}/{n}" for n in names),
            ]
        )
    merged = mm.load_model(tmp_path / "ab")
    np.testing.assert_array_equal(merged.image_hashes, rows)
    assert mm.load_model(tmp_path / "abc").image_hashes is None  # of c's nothing is known
    fingerprint = merged.provenance["data_fingerprint"]
    assert len(find_hashes(merged.file, fingerprint).training()) == 6


def test_a_file_and_its_card(models, capsys):
    out = models / "new" / "merged.safetensors"
    main(
        f"--method weighted --weights 0.25,0.75 --out {out} "
        f"{models}/a.safetensors {models}/b".split()
    )
    wanted = mm.merge(
        "weighted", "resnet20", [variables_of(0), variables_of(1)], weights=[0.25, 0.75]
    )
    assert_same(mm.load_weights("resnet20", out), jax.device_get(wanted))
    card = json.loads(out.with_suffix(".json").read_text())
    assert card["architecture"] == "resnet20"
    assert card["num_classes"] == 4
    assert card["classes"] == ["p", "q", "r", "s"]
    assert card["options"] == {"weights": [0.25, 0.75], "recalibrate": False, "repair": False}
    assert [parent["source"] for parent in card["parents"].values()] == ["a.safetensors", "b"]
    assert str(models) not in json.dumps(card)
    said = capsys.readouterr().err
    assert "resnet20: 95 arrays, 0.3 million numbers, of each" in said
    assert "a.safetensors: head 64 -> 4" in said
    # What was written can be merged again; another architecture is seen from its tensors.
    again = models / "again"
    main(["--method", "uniform", "--out", str(again), str(out), str(models / "b")])
    assert_same(
        weights.load_parent(again, "resnet20")[0],
        jax.device_get(mm.merge("uniform", "resnet20", [wanted, variables_of(1)])),
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fisher", "activation_matching", "zipit"])
def test_calibration_images(models, images, method, monkeypatch):
    out, merge, given = models / "merged.safetensors", mergers.merge, []
    monkeypatch.setattr(mergers, "merge", lambda *a, **k: given.append(a[3]) or merge(*a, **k))
    main(
        f"--method {method} --out {out} --images {images} --num-images 5 --image-size 16 "
        f"--recalibrate {models}/a.safetensors {models}/b".split()
    )
    # The same images as chosen by the seed, normalised as ImageNet is.
    rows = sorted(np.random.default_rng(0).permutation(7)[:5].tolist())
    paths = sorted(images.rglob("*.png"))
    pixels = np.stack(
        [np.asarray(Image.open(paths[row]).resize((16, 16), Image.BILINEAR)) for row in rows]
    )
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(given[0], (pixels / 255 - mean) / std, rtol=1e-5, atol=1e-6)
    wanted = mm.merge(
        method, "resnet20", [variables_of(0), variables_of(1)], given[0], recalibrate=True
    )
    assert_same(mm.load_weights("resnet20", out), jax.device_get(wanted))


def test_statistics_that_a_parent_lacks(models, images, capsys):
    tensors = weights.read_tensors(models / "a.safetensors")
    bare = {name: leaf for name, leaf in tensors.items() if "running" not in name}
    weights.write_safetensors(models / "bare.safetensors", bare)
    parents = [str(models / "bare.safetensors"), str(models / "b")]
    merge = ["--method", "uniform", "--out", str(models / "m.safetensors")]
    size = ["--images", str(images), "--image-size", "16"]
    with pytest.raises(UserError, match=r"bare\.safetensors: Its batch norms have no running"):
        main([*merge, *size, *parents])
    with pytest.raises(UserError, match="--estimate-statistics wants --images FOLDER"):
        main([*merge, "--estimate-statistics", *parents])
    main([*merge, *size, "--estimate-statistics", *parents])
    note = "its batch norms had no running statistics; they were estimated on 7 images of images"
    assert f"bare.safetensors: {note}\n" in capsys.readouterr().err
    card = json.loads((models / "m.json").read_text())
    assert [parent.get("notes") for parent in card["parents"].values()] == [[note], None]
    pixels = np.stack([read_image(path, 16) for path in sorted(images.rglob("*.png"))])
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    normalised = ((pixels / 255 - mean) / std).astype(np.float32)
    first = statistics.with_statistics("resnet20", variables_of(0), normalised)
    wanted = flatten(mm.merge("uniform", "resnet20", [first, variables_of(1)]))
    for path, leaf in flatten(mm.load_weights("resnet20", models / "m.safetensors")).items():
        np.testing.assert_allclose(leaf, wanted[path], rtol=1e-4, atol=1e-6, err_msg=path)


def test_images_too_small_for_the_architecture(models, images, monkeypatch):
    deep = dataclasses.replace(get_spec("resnet20"), min_size=33)
    monkeypatch.setattr("medmerge_jax.commands.merge.get_spec", lambda name: deep)
    parents = [str(models / "a.safetensors"), str(models / "b")]
    merge = ["--method", "uniform", "--recalibrate", "--out", str(models / "m"), *parents]
    for size, words in (((), "24"), (("--image-size", "32"), "32")):  # 24 is what the parents say
        with pytest.raises(UserError, match=f"{words}: resnet20 takes images of 33 pixels or more"):
            main([*merge, "--images", str(images), *size])


def test_hidden_files_are_no_images(models):
    """What a data set's reader ignores is no image to calibrate with either."""
    for name in ("._x.png", "@eaDir/x.png", ".cache/x.png"):
        (models / "hidden" / name).parent.mkdir(parents=True, exist_ok=True)
        (models / "hidden" / name).write_bytes(b"")
    parents = [str(models / "a.safetensors"), str(models / "b")]
    images = ["--images", str(models / "hidden")]
    with pytest.raises(UserError, match="hidden: holds no image"):
        main(["--method", "zipit", "--out", str(models / "out"), *images, *parents])


def test_heads_of_other_classes_are_dropped(models):
    out = models / "backbone"
    parents = [str(models / "a.safetensors"), str(models / "c.safetensors")]
    with pytest.raises(UserError, match=r"(?s)parent 0 has 4.*--heads drop.*parent 0 is .*a\.saf"):
        main(["--method", "uniform", "--out", str(out), *parents])
    assert not out.exists()
    main(["--method", "uniform", "--heads", "drop", "--out", str(out), *parents])
    assert "head" not in weights.load_parent(out, "resnet20")[0]["params"]
    assert json.loads((out / "model.json").read_text())["num_classes"] == 0


def test_task_arithmetic_of_one_model(models):
    out = models / "merged.safetensors"
    main(
        f"--method task_arithmetic --ancestor {models}/b --scale 0.5 --out {out} "
        f"{models}/a.safetensors".split()
    )
    wanted = mm.merge(
        "task_arithmetic", "resnet20", [variables_of(0)], ancestor=variables_of(1), scale=0.5
    )
    assert_same(mm.load_weights("resnet20", out), jax.device_get(wanted))
    assert json.loads(out.with_suffix(".json").read_text())["options"]["ancestor"].endswith("b")


BAD = {
    "another architecture": (["a.safetensors", "d.safetensors"], [], "They fit resnet32"),
    "another architecture, said": (
        ["a.safetensors", "b"],
        ["--architecture", "resnet32"],
        "a.safetensors: the tensors do not fit resnet32",
    ),
    "one file twice": (["b", "b"], [], "b: it is given twice"),
    "one model twice": (
        ["b", "b/model.safetensors"],
        [],
        "which is the same model, is given twice",
    ),
    "one file": (["b"], [], "1 model is given; two or more are wanted"),
    "no such file": (
        ["a.safetensors", "x.safetensors"],
        [],
        "x.safetensors: there is no such file",
    ),
    "no images": (["a.safetensors", "b"], ["--method", "zipit"], "'zipit' wants --images FOLDER"),
    "no such folder": (["a.safetensors", "b"], ["--images", "x"], "x: there is no such folder"),
    "an empty folder": (["a.safetensors", "b"], ["--images", "empty"], "holds no image"),
    "an option of another method": (
        ["a.safetensors", "b"],
        ["--alpha", "0.5"],
        "'uniform' has no option 'alpha'",
    ),
    "weights": (
        ["a.safetensors", "b"],
        ["--method", "weighted", "--weights", "1,1"],
        "the weights sum to 2",
    ),
    "suffix": (["a.safetensors", "b"], ["--out", "merged.pth"], "a .safetensors file or a folder"),
    "exists": (["a.safetensors", "b"], ["--out", "c.safetensors"], "exists; --overwrite replaces"),
    "NaN": (["a.safetensors", "nan.npz"], [], "nan.npz: tensor 'conv1.weight' has 1 values"),
    "integers": (["a.safetensors", "int.npz"], [], "int.npz: tensor 'bn1.weight' is int64"),
    "a seed that is none": (
        ["a.safetensors", "b"],
        ["--seed", "0.5"],
        "--seed 0.5: a whole number from 0 is wanted",
    ),
    "a folder of other things": (
        ["a.safetensors", "b"],
        ["--out", "empty", "--overwrite"],
        "empty: holds photo.txt, which would be lost",
    ),
}


@pytest.mark.parametrize("flag", ["--num-images", "--image-size", "--batch-size"])
def test_no_images_are_not_enough(models, capsys, flag):
    with pytest.raises(SystemExit):
        main(["--method", "uniform", "--out", "o.safetensors", flag, "0", "a.safetensors", "b"])
    assert f"{flag}: 0 is given; 1 or more is wanted" in capsys.readouterr().err


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_merged(models, monkeypatch, case):
    parents, options, message = BAD[case]
    monkeypatch.chdir(models)
    (models / "empty").mkdir()
    (models / "empty" / "photo.txt").touch()
    tensors = weights.read_tensors(models / "a.safetensors")
    spoiled = tensors["conv1.weight"].copy()
    spoiled[0, 0, 0, 0] = np.nan
    np.savez("nan.npz", **{**tensors, "conv1.weight": spoiled})
    np.savez("int.npz", **{**tensors, "bn1.weight": np.ones(16, np.int64)})
    before = sorted(models.rglob("*"))
    with pytest.raises(UserError) as raised:
        main(["--method", "uniform", "--out", "out.safetensors", *options, *parents])
    assert message in str(raised.value)
    assert sorted(models.rglob("*")) == before


@pytest.mark.slow
def test_exit_status(models):
    def start(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "medmerge_jax.merge", *arguments],
            cwd=models,
            capture_output=True,
            text=True,
            check=False,
        )

    done = start("--method", "uniform", "--out", "m.safetensors", "a.safetensors", "b")
    assert done.returncode == 0, done.stderr
    assert (models / "m.safetensors").exists()
    failed = start("--method", "uniform", "--out", "m.safetensors", "a.safetensors", "b")
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: --out m.safetensors exists")
    assert "Traceback" not in failed.stderr
