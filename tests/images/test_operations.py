"""Every operation against torchvision's, on Pillow images and, where the two agree, on tensors.

And against Pillow's own, of which torchvision's are made, where PyTorch is not installed.
"""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from medmerge_jax.data.synthetic import draw
from medmerge_jax.images import operations as ops
from medmerge_jax.images.augment import RAND_AUGMENT, rand_augment_operation

SIZE = 96
MAGNITUDE = 15


@pytest.fixture(scope="module")
def images():
    """Drawn photographs, and what photographs seldom are: noise, grey, black, of one colour."""
    rng = np.random.default_rng(0)
    drawn = [
        draw(kind, np.arange(4), SIZE, rng, appearance)
        for kind, appearance in (("fundus", 1), ("lesion", 3))
    ]
    noise = rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    dull = noise // 16 + 90
    grey = np.repeat(noise[..., :1], 3, axis=-1)
    flat = np.broadcast_to(np.array([200, 30, 0], np.uint8), noise.shape)
    return np.concatenate([*drawn, [noise, dull, grey, flat, np.zeros_like(noise)]])


@pytest.fixture(scope="module")
def functional(torchvision):
    return importlib.import_module("torchvision.transforms.v2.functional")


def on_pillow(operation, images):
    return np.stack([np.asarray(operation(Image.fromarray(image))) for image in images])


def on_tensors(torch, operation, images):
    tensors = torch.from_numpy(np.moveaxis(images, -1, 1).copy())
    return np.moveaxis(operation(tensors).numpy(), 1, -1)


@functools.partial(jax.jit, static_argnums=(0, 3))
def each(operation, images, options, static):
    return jax.lax.map(lambda image: operation(image, *options, *static), images)


def ours(operation, images, *options, static=()):
    """Compiled once for all values of the options; `static` ones come last."""
    return np.asarray(each(operation, images, options, static))


def assert_close(found, wanted, share=0.0, most=1):
    """At most a share of the values differs, and by at most `most`."""
    assert found.dtype == wanted.dtype == np.uint8
    assert found.shape == wanted.shape
    difference = np.abs(found.astype(int) - wanted)
    assert difference.max() <= most
    assert np.mean(difference > 0) <= share


CROPS = [(0, 0, 96, 96), (3, 5, 80, 90), (40, 1, 28, 33), (10, 50, 77, 17), (95, 95, 1, 1)]


@pytest.mark.parametrize("size", [(96, 96), (40, 64), (128, 50)])
@pytest.mark.parametrize("crop", CROPS)
def test_resized_crop(torch, functional, images, crop, size):
    found = ours(ops.resized_crop, images, *map(jnp.int32, crop), static=(size,))

    def wanted(image):
        return functional.resized_crop(image, *crop, list(size), antialias=True)

    # Where an exact mean ends in a half, the rounding of the weights decides.
    assert_close(found, on_tensors(torch, wanted, images), share=0.03)
    # Pillow 13 begins with the rows, and rounds these, where that is less work.
    rows_first = size[0] < crop[2]
    assert_close(found, on_pillow(wanted, images), share=0.25 if rows_first else 0.03)


@pytest.mark.parametrize("crop", CROPS)
def test_resized_crop_is_pillows(images, crop):
    found = ours(ops.resized_crop, images, *map(jnp.int32, crop), static=((96, 64),))
    top, left, height, width = crop

    def wanted(image):
        part = image.crop((left, top, left + width, top + height))
        return part.resize((64, 96), Image.Resampling.BILINEAR)

    assert_close(found, on_pillow(wanted, images), share=0.03)


@pytest.mark.parametrize("factor", [0.0, 0.1, 0.55, 0.75, 1.0, 1.2, 1.31, 1.45, 1.9])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "sharpness"])
def test_blends(torch, functional, images, name, factor):
    adjust = getattr(ops, f"adjust_{name}")
    found = ours(adjust, images, jnp.float32(factor))
    theirs = getattr(functional, f"adjust_{name}")
    # Where 1.2 x is an integer, Pillow's float32 may be just below it.
    assert_close(found, on_pillow(lambda image: theirs(image, factor), images), share=0.01)
    # On tensors, torchvision cuts the fraction off a grey value, and has a mean with a fraction.
    grey = name in ("contrast", "saturation")
    tensors = on_tensors(torch, lambda image: theirs(image, factor), images)
    assert_close(found, tensors, share=1.0 if grey else 0.03, most=2 if grey else 1)


@pytest.mark.parametrize("bits", range(9))
def test_posterize(functional, images, bits):
    found = ours(lambda image: ops.posterize(image, bits), images)
    if bits:
        wanted = on_pillow(lambda image: functional.posterize(image, bits), images)
    else:  # Pillow refuses
        wanted = np.zeros_like(images)
    assert_close(found, wanted)


@pytest.mark.parametrize("threshold", [0, 1, 127.5, 200, 255])
def test_solarize(functional, images, threshold):
    found = ours(lambda image: ops.solarize(image, threshold), images)
    assert_close(found, on_pillow(lambda image: functional.solarize(image, threshold), images))


def test_autocontrast(functional, images):
    # Pillow's quotients in float64 may be just below an integer; these are exact.
    assert_close(
        ours(ops.autocontrast, images), on_pillow(functional.autocontrast, images), share=0.01
    )


def test_equalize(functional, images):
    assert_close(ours(ops.equalize, images), on_pillow(functional.equalize, images))


def test_equalize_of_a_few_pixels(functional):
    """Fewer than 255 pixels stay, and a little more give levels beyond the highest."""
    rng = np.random.default_rng(1)
    for shape in ((5, 7, 3), (16, 16, 3), (20, 25, 3)):
        images = rng.integers(0, 256, (4, *shape), np.uint8)
        assert_close(ours(ops.equalize, images), on_pillow(functional.equalize, images))


def test_images_too_small_to_be_sharpened(functional):
    images = np.random.default_rng(2).integers(0, 256, (2, 2, 9, 3), np.uint8)
    found = ours(lambda image: ops.adjust_sharpness(image, 0.5), images)
    np.testing.assert_array_equal(found, images)


@pytest.fixture(scope="module")
def rand_augment(torchvision):
    return importlib.import_module("torchvision.transforms.v2").RandAugment(magnitude=MAGNITUDE)


def torchvisions_operation(rand_augment, number, sign):
    """What torchvision's RandAugment does when it has drawn this operation and this sign."""
    name, (magnitudes, signed) = list(rand_augment._AUGMENTATION_SPACE.items())[number]

    bilinear = importlib.import_module("torchvision.transforms.v2").InterpolationMode.BILINEAR

    def apply(image):
        values = magnitudes(31, image.height, image.width)
        magnitude = 0.0 if values is None else float(values[MAGNITUDE])
        if signed:
            magnitude *= sign
        return rand_augment._apply_image_or_video_transform(
            image, name, magnitude, interpolation=bilinear, fill={}
        )

    return name, apply


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("number", range(len(RAND_AUGMENT)))
def test_rand_augment(torchvision, rand_augment, images, number, sign):
    images = np.ascontiguousarray(images[:, :90])  # a height and a width
    drawn = jnp.int32(number), jnp.float32(sign)
    found = ours(rand_augment_operation, images, *drawn, static=(MAGNITUDE,))
    name, apply = torchvisions_operation(rand_augment, number, sign)
    assert name.lower() == RAND_AUGMENT[number].replace("_", "")
    wanted = on_pillow(apply, images)
    assert_close(found, wanted, share=0.01)
    if name != "Identity":
        assert np.mean(wanted != images) > 0.1


def pillows_operation(name, sign, image):
    """One of RandAugment's at magnitude 15 of 30, by the numbers of its table."""
    width, height = image.size
    right, down = (sign * int(150 / 331 * side / 2) for side in (width, height))
    moves = {
        "shear_x": (1, sign * 0.15, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, sign * 0.15, 1, 0),
        "translate_x": (1, 0, -right, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, -down),
    }
    enhancers = {"brightness": "Brightness", "color": "Color", "contrast": "Contrast",
                 "sharpness": "Sharpness"}  # fmt: skip
    bilinear = Image.Resampling.BILINEAR
    if name in moves:
        return image.transform(image.size, Image.Transform.AFFINE, moves[name], bilinear)
    if name in enhancers:
        return getattr(ImageEnhance, enhancers[name])(image).enhance(1 + sign * 0.45)
    others = {
        "identity": lambda: image,
        "rotate": lambda: image.rotate(sign * 15, bilinear),
        "posterize": lambda: ImageOps.posterize(image, 6),
        "solarize": lambda: ImageOps.solarize(image, 127.5),
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
    }
    return others[name]()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", RAND_AUGMENT)
def test_rand_augment_is_pillows(images, name, sign):
    images = np.ascontiguousarray(images[:, :90])  # a height and a width
    drawn = jnp.int32(RAND_AUGMENT.index(name)), jnp.float32(sign)
    found = ours(rand_augment_operation, images, *drawn, static=(MAGNITUDE,))
    wanted = on_pillow(functools.partial(pillows_operation, name, sign), images)
    assert_close(found, wanted, share=0.01)
