import struct
import subprocess
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from medmerge_jax.errors import UserError
from medmerge_jax.images import decode, read_image


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def save(path, image, **options):
    image.save(path, **options)
    return path


def photo(rng, width=48, height=40):
    """Smooth enough that JPEG keeps it."""
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def test_an_image_of_the_size_is_not_resampled(tmp_path, rng):
    pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
    path = save(tmp_path / "a.png", Image.fromarray(pixels))
    for resize in ("squash", "crop"):
        read = read_image(path, 16, resize)
        assert read.dtype == np.uint8
        np.testing.assert_array_equal(read, pixels)


def test_greyscale_becomes_three_equal_channels(tmp_path, rng):
    pixels = rng.integers(0, 256, (16, 16), np.uint8)
    read = read_image(save(tmp_path / "a.png", Image.fromarray(pixels)), 16)
    np.testing.assert_array_equal(read, np.repeat(pixels[..., None], 3, axis=-1))


def test_one_bit(tmp_path, rng):
    pixels = rng.integers(0, 2, (16, 16)).astype(bool)
    read = read_image(save(tmp_path / "a.png", Image.fromarray(pixels)), 16)
    np.testing.assert_array_equal(read, np.repeat(pixels[..., None], 3, axis=-1) * 255)


def palette_image(rng):
    colours = rng.integers(0, 256, (4, 3), np.uint8)
    indices = rng.integers(0, 4, (16, 16), np.uint8)
    image = Image.fromarray(indices).convert("L")
    image = Image.frombytes("P", (16, 16), indices.tobytes())
    image.putpalette(colours.tobytes())
    return image, colours, indices


def test_palette(tmp_path, rng):
    image, colours, indices = palette_image(rng)
    read = read_image(save(tmp_path / "a.png", image), 16)
    np.testing.assert_array_equal(read, colours[indices])


def test_palette_with_transparency_is_put_over_black(tmp_path, rng):
    image, colours, indices = palette_image(rng)
    path = save(tmp_path / "a.png", image, transparency=bytes([0, 255, 255, 255]))
    expected = np.where((indices == 0)[..., None], 0, colours[indices])
    np.testing.assert_array_equal(read_image(path, 16), expected)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_alpha_is_put_over_black(tmp_path, rng, mode):
    channels = {"LA": 1, "RGBA": 3}[mode]
    colour = rng.integers(0, 256, (16, 16, channels), np.uint8)
    alpha = rng.integers(0, 256, (16, 16, 1), np.uint8)
    alpha[0, 0] = 255
    image = Image.fromarray(np.concatenate([colour, alpha], axis=-1), mode=None)
    assert image.mode == mode
    read = read_image(save(tmp_path / "a.png", image), 16).astype(float)
    np.testing.assert_allclose(read, colour * (alpha / 255.0) * np.ones(3), atol=1)


def test_rgb_with_a_transparent_colour(tmp_path):
    pixels = np.full((16, 16, 3), 200, np.uint8)
    pixels[:4] = (1, 2, 3)
    path = save(tmp_path / "a.png", Image.fromarray(pixels), transparency=(200, 200, 200))
    read = read_image(path, 16)
    np.testing.assert_array_equal(read[:4], pixels[:4])
    assert not read[4:].any()


def test_cmyk_jpeg(tmp_path):
    image = Image.new("RGB", (16, 16), (200, 40, 90)).convert("CMYK")
    read = read_image(save(tmp_path / "a.jpg", image, quality=100), 16)
    np.testing.assert_allclose(read, np.broadcast_to((200, 40, 90), read.shape), atol=3)


def test_sixteen_bit_greyscale_keeps_its_range(tmp_path):
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    image = Image.fromarray(values)
    assert image.mode == "I;16"
    read = read_image(save(tmp_path / "a.png", image), 16)
    np.testing.assert_array_equal(read[..., 0], np.round(values / 257.0))
    np.testing.assert_array_equal(read[..., 0], read[..., 2])


def test_sixteen_bit_greyscale_is_rounded_not_cut_off(tmp_path):
    """257 steps make one of 255, so that 65535 is 255 and the middle of two goes up."""
    values = np.array(
        [0, 128, 129, 255, 256, 385, 386, 32767, 32768, 65279, 65407, 65535] + [0] * 4
    )
    path = save(tmp_path / "a.png", Image.fromarray(values.astype(np.uint16).reshape(4, 4)))
    wanted = [0, 0, 1, 1, 1, 1, 2, 127, 128, 254, 255, 255] + [0] * 4
    np.testing.assert_array_equal(read_image(path, 4)[..., 0].ravel(), wanted)


def test_integers_beyond_sixteen_bits_are_refused(tmp_path):
    values = np.linspace(0, 65535, 256).astype(np.int32).reshape(16, 16)
    path = save(tmp_path / "a.tiff", Image.fromarray(values))
    np.testing.assert_array_equal(read_image(path, 16)[..., 0], np.round(values / 257.0))
    save(tmp_path / "b.tiff", Image.fromarray(values + 1))
    with pytest.raises(UserError, match=r"b\.tiff.* 1 to 65536, not 0 to 65535; .*data\.window"):
        read_image(tmp_path / "b.tiff", 16)


def test_floats_are_refused(tmp_path, rng):
    path = save(tmp_path / "a.tiff", Image.fromarray(rng.random((16, 16)).astype(np.float32)))
    with pytest.raises(UserError, match=r"a\.tiff: the pixels are floating-point"):
        read_image(path, 16)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, rng, orientation):
    upright = photo(rng)
    undo = {  # how a camera held that way stores the upright scene
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = upright if undo is None else upright.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("a.png", "a.jpg"):
        options = {"quality": 95, "subsampling": 0} if name == "a.jpg" else {}
        path = save(tmp_path / name, stored, exif=exif, **options)
        expected = np.asarray(upright.resize((16, 16), Image.Resampling.BILINEAR), int)
        np.testing.assert_allclose(read_image(path, 16), expected, atol=0 if not options else 12)


def decoded_in_full(path, size, resize="squash"):
    """What `read_image` gave if nothing were shrunk, by Pillow's own functions."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image).convert("RGB")
    if resize == "crop":
        width, height = image.size
        longer = int(size * max(width, height) / min(width, height))
        image = image.resize(
            (longer, size) if width > height else (size, longer), Image.Resampling.BILINEAR
        )
        left, top = round((image.width - size) / 2), round((image.height - size) / 2)
        return np.asarray(image.crop((left, top, left + size, top + size)), int)
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR), int)


@pytest.mark.parametrize("resize", ["squash", "crop"])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("size", [6, 20, 40])  # shrunk by 8, 4 and 2
def test_shrinking_a_jpeg_is_close_to_decoding_it_in_full(
    tmp_path, rng, size, mode, progressive, resize
):
    image = photo(rng, 301, 203).convert(mode)
    path = save(tmp_path / "a.jpg", image, quality=90, progressive=progressive)
    full = decoded_in_full(path, size, resize)
    difference = np.abs(read_image(path, size, resize) - full)
    assert difference.mean() < 0.5
    assert difference.max() <= 4
    assert difference.any()  # it was shrunk indeed


def test_shrinking_a_drawing_keeps_its_edges(tmp_path, rng):
    pixels = np.full((800, 1200, 3), 255, np.uint8)
    for left, top in rng.integers(0, 700, (100, 2)):
        pixels[top : top + 90, left : left + 140] = rng.integers(0, 256, 3)
    path = save(tmp_path / "a.jpg", Image.fromarray(pixels), quality=90)
    difference = np.abs(read_image(path, 100) - decoded_in_full(path, 100))
    assert difference.mean() < 0.6
    assert difference.max() <= 24


@pytest.mark.parametrize("resize", ["squash", "crop"])
@pytest.mark.parametrize("width, height", [(301, 203), (80, 79), (79, 400)])
def test_a_jpeg_that_is_not_much_larger_is_decoded_in_full(tmp_path, rng, width, height, resize):
    noise = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    path = save(tmp_path / "a.jpg", noise)
    size = min(width, height) // 4 + 1  # the limit
    expected = decoded_in_full(path, size, resize)
    np.testing.assert_array_equal(read_image(path, size, resize), expected)
    assert (read_image(path, size - 1) != decoded_in_full(path, size - 1)).any()


@pytest.mark.parametrize("resize", ["squash", "crop"])
@pytest.mark.parametrize("width, height", [(193, 257), (261, 197), (197, 193), (256, 192)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_shrunk_jpeg_is_turned_with_its_incomplete_pixels(
    tmp_path, rng, orientation, width, height, resize
):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "a.jpg", photo(rng, width, height), exif=exif, quality=95)
    full = decoded_in_full(path, 12, resize)
    # Where a quarter of a pixel is taken for a whole one, or looked for on the wrong side, 16.
    np.testing.assert_allclose(read_image(path, 12, resize), full, atol=4)


def test_an_image_too_elongated_to_crop(tmp_path):
    path = save(tmp_path / "a.png", Image.new("RGB", (1001, 1), (1, 2, 3)))
    np.testing.assert_array_equal(read_image(path, 4)[0, 0], (1, 2, 3))
    with pytest.raises(UserError, match=r"a\.png: one side is more than 1000 times the other"):
        read_image(path, 4, "crop")
    with pytest.raises(UserError, match="one side is more than 1000 times the other"):
        decode.resize_pixels(np.zeros((1, 1001), np.uint8), 4, "crop")
    path = save(tmp_path / "a.png", Image.new("RGB", (1000, 1), (1, 2, 3)))
    np.testing.assert_array_equal(read_image(path, 4, "crop")[0, 0], (1, 2, 3))


def test_damaged_metadata_does_not_matter(tmp_path, rng):
    image = photo(rng)
    path = save(tmp_path / "a.png", image, exif=b"Exif\x00\x00this is no exif")
    expected = np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(read_image(path, 16), expected)


@pytest.mark.parametrize(
    "width, height", [(48, 40), (40, 47), (33, 20), (16, 16), (16, 30), (9, 7)]
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_resizing_is_that_of_torchvision(transforms, tmp_path, rng, width, height, mode):
    image = photo(rng, width, height).convert(mode)
    path = save(tmp_path / "a.png", image)
    squash = transforms.Resize((16, 16))
    crop = transforms.Compose([transforms.Resize(16), transforms.CenterCrop(16)])
    for resize, transform in (("squash", squash), ("crop", crop)):
        expected = np.asarray(transform(image.convert("RGB")))
        np.testing.assert_array_equal(read_image(path, 16, resize), expected)


def test_unknown_resize(tmp_path):
    with pytest.raises(UserError, match="'stretch': squash or crop is wanted"):
        read_image(tmp_path / "a.png", 16, "stretch")


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
@pytest.mark.parametrize("kept", [0.3, 0.7])
@pytest.mark.parametrize("size", [16, 200])  # shrunk while it is decoded, or not
def test_truncated(tmp_path, rng, name, kept, size):
    noise = Image.fromarray(rng.integers(0, 256, (200, 200, 3), np.uint8))
    path = save(tmp_path / name, noise)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(UserError, match=rf"{name}: cannot be decoded \(.*truncated"):
        read_image(path, size)


def test_zero_bytes(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"a\.png: the file is empty"):
        read_image(path, 16)


def test_text_named_png(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("This is a text file, not an image.\n")
    with pytest.raises(UserError, match=r"a\.png: is not an image .*b'This is a text f'"):
        read_image(path, 16)


def test_missing(tmp_path):
    with pytest.raises(UserError, match=r"a\.png: there is no such file"):
        read_image(tmp_path / "a.png", 16)


def test_a_folder(tmp_path):
    with pytest.raises(UserError, match="is a folder; an image that can be read is wanted"):
        read_image(tmp_path, 16)


def test_decompression_bomb(tmp_path):
    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    path = tmp_path / "a.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100))
    )
    with pytest.raises(UserError, match=r"a\.png: too many pixels .*3600000000"):
        read_image(path, 16)


@pytest.mark.parametrize("size", [16, 30_000])
def test_decompression_bomb_in_a_jpeg(tmp_path, size):
    path = save(tmp_path / "a.jpg", Image.new("RGB", (64, 64)))
    data = bytearray(path.read_bytes())
    frame = data.index(b"\xff\xc0")  # its marker, length and depth; then height and width
    data[frame + 5 : frame + 9] = struct.pack(">HH", 60_000, 60_000)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.jpg: too many pixels .*3600000000"):
        read_image(path, size)


def test_more_pixels_than_a_photograph_has(tmp_path, monkeypatch):
    """Pillow itself only warns, up to twice as many."""
    path = save(tmp_path / "a.png", Image.new("RGB", (64, 64)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UserError, match=r"a\.png: .*64 × 64 pixels, too many pixels"):
            read_image(path, 16)


def test_a_program_in_the_clothes_of_an_image_is_not_run(tmp_path, monkeypatch):
    def start(*arguments, **options):
        raise AssertionError(f"started {arguments}")

    monkeypatch.setattr(subprocess, "Popen", start)
    path = tmp_path / "a.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(UserError, match=r"a\.jpg: is not an image that can be read .*%!PS"):
        read_image(path, 16)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "BMP", "GIF", "WEBP"])
def test_what_a_file_holds_counts_not_its_suffix(tmp_path, kind):
    path = tmp_path / "a.jpg"
    Image.new("RGB", (32, 32), (255, 0, 0)).save(path, kind)
    red, green, blue = read_image(path, 16)[8, 8]
    assert red > 250 > 5 > green
    assert blue < 5
