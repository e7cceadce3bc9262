"""Images of more than 8 bits, transparent and damaged ones, from a folder to decoded pixels."""

import dataclasses

import numpy as np
import pytest
from helpers.random_models import variables_of
from PIL import Image

import medmerge_jax as mm
from medmerge_jax.config import default_config
from medmerge_jax.data import image_folder
from medmerge_jax.errors import UserError
from medmerge_jax.images import read_image
from medmerge_jax.models.preprocessing import PLAIN, Preprocessing, Rendering
from medmerge_jax.recipes import inputs
from medmerge_jax.studies.checks import check_config

SIDE = 16


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDMERGE_JAX_CACHE", str(tmp_path / "cache"))


def folder(root, values, suffix="png", per_class=5):
    """Images of two classes from a function of their number."""
    for number in range(2 * per_class):
        path = root / "ab"[number % 2] / f"{number}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values(number)).save(path)
    return root


def decoded(root, **fields):
    config = default_config()
    config.image_size = 8
    config.update_from_flattened_dict({f"data.{name}": value for name, value in fields.items()})
    dataset = image_folder(root, fractions=(0.6, 0.2, 0.2))
    return inputs.decode(check_config(config), dataset)


def grey(number):
    """float64 in [0, 1], darker for later ones, so that single images have other ranges."""
    picture = np.random.default_rng(number).random((SIDE, SIDE)) / (1 + number)
    if number == 0:
        picture[0, 0] = 1.0
    return picture


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_few_bits_in_sixteen_decode_as_eight_bits_do(tmp_path, bits, suffix):
    top = 2**bits - 1
    deep = folder(tmp_path / "x", lambda n: np.round(top * grey(n)).astype(np.uint16), suffix)
    dataset, pixels, rendering = decoded(deep)
    plain = folder(tmp_path / "y", lambda n: np.round(255 * grey(n)).astype(np.uint8), suffix)
    _, expected, of_plain = decoded(plain)
    assert (rendering.white, of_plain) == (top, PLAIN)
    assert any(f"greatest value is {top}: {top} is taken for white" in n for n in dataset.notes)
    for name, part in pixels.items():
        difference = np.abs(part.array.astype(int) - expected[name].array)
        assert difference.max() <= 1
    # Measured once: what the cache has says the same.
    assert decoded(deep)[0].notes == dataset.notes


@pytest.mark.parametrize("suffix", ["tif", "webp", "png"])
def test_that_of_several_pages_the_first_is_read_is_said(tmp_path, suffix):
    root = folder(tmp_path / "x", lambda n: np.full((SIDE, SIDE), 20 * n, np.uint8), suffix)
    assert not any("frames" in note for note in decoded(root)[0].notes)
    first, *others = (Image.new("RGB", (SIDE, SIDE), (value,) * 3) for value in (9, 99, 199))
    first.save(root / "a" / f"pages.{suffix}", save_all=True, append_images=others, lossless=True)
    words = "1 of 11 images have several pages or frames, of which the first is read"
    for fields in ({}, {"intensity": 255}):
        dataset, pixels, _ = decoded(root, **fields)
        assert sum(words in note for note in dataset.notes) == 1
    (home,) = [s for s in pixels if f"a/pages.{suffix}" in dataset.splits[s].ids]
    read = pixels[home].array[dataset.splits[home].ids.index(f"a/pages.{suffix}")]
    assert (read == 9).all()


def test_intensity_and_window_overrule_what_was_inferred(tmp_path):
    root = folder(tmp_path / "x", lambda n: np.full((SIDE, SIDE), 100 * n, np.uint16))
    assert decoded(root)[2].white == 1023
    dataset, pixels, rendering = decoded(root, intensity=65535)
    assert (rendering.white, pixels["train"].array.max()) == (65535, 4)
    assert not any("16 bits" in note for note in dataset.notes)
    _, pixels, rendering = decoded(root, window=(200, 400))
    levels = {int(np.floor(255 * np.clip((100 * n - 200) / 200, 0, 1) + 0.5)) for n in range(10)}
    assert {v for part in pixels.values() for v in np.unique(part.array)} == levels
    with pytest.raises(UserError, match=r"pixels reach 900, and 800 is white; set data.intensity"):
        decoded(root, intensity=800)


def test_a_few_pixels_far_above_the_others_are_pointed_out(tmp_path):
    def marked(number):
        values = np.full((64, 64), 3000, np.uint16)
        values[0, 0] = 65535 if number == 3 else 0
        return values

    dataset, _, rendering = decoded(folder(tmp_path / "x", marked))
    assert rendering.white == 65535
    (note,) = (note for note in dataset.notes if "16 bits" in note)
    assert "data.window = (0, 16383) keeps the contrast" in note


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_floats_and_signed_numbers_want_a_window(tmp_path, dtype):
    root = folder(tmp_path / "x", lambda n: np.full((SIDE, SIDE), 100 * n - 500, dtype), "tif")
    with pytest.raises(UserError, match=r"of 10 images cannot be read") as error:
        decoded(root)
    assert "data.window = (low, high)" in str(error.value)
    _, pixels, rendering = decoded(root, window=(-400, 100))
    assert rendering.window == (-400.0, 100.0)
    levels = {int(np.floor(255 * np.clip((100 * n - 100) / 500, 0, 1) + 0.5)) for n in range(10)}
    assert {v for part in pixels.values() for v in np.unique(part.array)} == levels


def test_no_number_is_black(tmp_path):
    values = np.array([[np.nan, np.inf], [-np.inf, 0.5]], np.float32)
    Image.fromarray(values).save(tmp_path / "a.tif")
    read = read_image(tmp_path / "a.tif", 2, "squash", Rendering(window=(0, 1)))
    assert read[..., 0].tolist() == [[0, 255], [0, 128]]


def test_dark_colours_of_sixteen_bits_are_refused(tmp_path):
    """Pillow keeps the upper 8 bits of each channel."""
    import struct
    import zlib

    def png(value):
        rows = b"".join(b"\0" + struct.pack(">3H", value, value, value) * 4 for _ in range(4))
        header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
        chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
        return b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks
        )

    root = folder(tmp_path / "x", lambda n: np.zeros((4, 4), np.uint8))
    for path in root.rglob("*.png"):
        path.write_bytes(png(60000))
    _, pixels, _ = decoded(root)
    assert pixels["train"].array.max() == 60000 // 256
    for path in root.rglob("*.png"):
        path.write_bytes(png(4000))
    with pytest.raises(UserError, match="10 of 10 images have 16 bits in each of several channels"):
        decoded(root)


def test_what_lies_under_transparent_pixels(tmp_path):
    def half(number):
        picture = np.full((SIDE, SIDE, 4), 100, np.uint8)
        picture[..., 3] = 255
        picture[: SIDE // 2, :, 3] = 0
        return picture

    root = folder(tmp_path / "x", half)
    for background, level in (("black", 0), ("white", 255)):
        dataset, pixels, _ = decoded(root, background=background)
        assert np.unique(pixels["train"].array[:, :2]).tolist() == [level]
        assert np.unique(pixels["train"].array[:, -2:]).tolist() == [100]
        assert any("10 of 10 images have an alpha channel" in note for note in dataset.notes)
    Image.new("RGBA", (SIDE, SIDE), (255, 255, 255, 0)).save(root / "a" / "0.png")
    with pytest.raises(UserError, match=r"0\.png: has no opaque pixel"):
        decoded(root)


def test_a_model_remembers_how_its_images_were_rendered(tmp_path):
    rendering = Rendering(4095, None, "white")
    model = mm.Model("resnet20", variables_of(0), Preprocessing(16, rendering=rendering))
    mm.save_model(tmp_path / "m", model)
    loaded = mm.load_model(tmp_path / "m")
    assert loaded.preprocessing.rendering == rendering
    values = np.arange(16 * 16, dtype=np.uint16).reshape(16, 16) * 16
    Image.fromarray(values).save(tmp_path / "deep.png")
    Image.fromarray(np.round(values / 4095 * 255).astype(np.uint8)).save(tmp_path / "plain.png")
    deep, plain = mm.predict(loaded, [tmp_path / "deep.png", tmp_path / "plain.png"])
    np.testing.assert_allclose(deep, plain, atol=1e-6)
    windowed = Preprocessing(16, rendering=Rendering(window=(-100, 400)))
    mm.save_model(tmp_path / "m", dataclasses.replace(model, preprocessing=windowed))
    assert mm.load_model(tmp_path / "m").preprocessing == windowed
    card = (tmp_path / "m" / "model.json").read_text()
    (tmp_path / "m" / "model.json").write_text(card.replace("400", "-400"))
    with pytest.raises(UserError, match=r"window is .*two numbers, the lower one first"):
        mm.load_model(tmp_path / "m")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"window": (3.0, 1.0)}, "data.window = .3.0, 1.0.: two numbers"),
        ({"window": (1.0,)}, "two numbers"),
        ({"window": (0.0, float("inf"))}, "finite"),
        ({"window": (0.0, 1.0), "intensity": 255}, "both say what is white"),
        ({"background": "grey"}, "one of black, white"),
        ({"unreadable": "ignore"}, "one of error, skip"),
    ],
)
def test_fields_that_cannot_be_used(fields, words):
    config = default_config()
    config.update_from_flattened_dict({f"data.{name}": value for name, value in fields.items()})
    with pytest.raises(UserError, match=words):
        check_config(config)


def test_one_damaged_image_among_many_may_be_left_out(tmp_path):
    root = folder(tmp_path / "x", lambda n: np.full((4, 4), n, np.uint8), "bmp", per_class=100)
    (root / "a" / "0.bmp").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"1 of 200 images cannot be read:\n.*0\.bmp") as error:
        decoded(root)
    assert "data.unreadable = 'skip' leaves them out" in str(error.value)
    for _ in range(2):
        dataset, pixels, _ = decoded(root, unreadable="skip")
        assert sum(map(len, dataset.splits.values())) == 199
        assert all(len(pixels[n].array) == len(dataset.splits[n]) for n in pixels)
        (note,) = (note for note in dataset.notes if "left out" in note)
        assert note.startswith("1 of 200 images cannot be read and are left out")
        assert "0.bmp" in note
    for number in (1, 2, 3):
        (root / "ab"[number % 2] / f"{number}.bmp").write_bytes(b"")
    for unreadable in ("skip", "error"):
        with pytest.raises(UserError, match="4 of 200 images cannot be read") as error:
            decoded(root, unreadable=unreadable)
        assert all(f"{number}.bmp" in str(error.value) for number in range(4))  # of all splits
        assert "leaves out 2 of 200 at most" in str(error.value)


@pytest.mark.parametrize("lost", [1, 2, 30])
def test_a_jpeg_without_its_last_bytes_is_damaged(tmp_path, lost):
    path = tmp_path / "a.jpg"
    Image.new("RGB", (64, 64), (10, 200, 30)).save(path)
    path.write_bytes(path.read_bytes()[:-lost])
    with pytest.raises(UserError, match="truncated"):
        read_image(path, 16)


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [("tif", "TIFF"), ("TIFF", "TIFF"), ("bmp", "BMP"), ("webp", "WEBP"), ("jfif", "JPEG")],
)
def test_folders_of_what_the_reader_reads(tmp_path, suffix, kind):
    for number in range(10):
        path = tmp_path / "x" / "ab"[number % 2] / f"{number}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (200, 40, 90)).save(path, kind)
    _, pixels, _ = decoded(tmp_path / "x")
    assert np.abs(pixels["train"].array.astype(int) - (200, 40, 90)).max() < 8


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    Image.new("L", (4, 4)).save(path)

    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(UserError, match=r"a\.png: may not be read \(Permission denied\)"):
        read_image(path, 4)
