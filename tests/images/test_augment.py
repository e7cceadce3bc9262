"""That random choices are torchvision's, and decided by seed, epoch and example alone."""

import functools
import importlib
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.parameters import some_quick
from scipy import stats

from medmerge_jax.data.synthetic import draw
from medmerge_jax.images import operations as ops
from medmerge_jax.images.augment import (
    POLICIES,
    RAND_AUGMENT,
    Policy,
    augment,
    augment_image,
    draw_crop,
    draw_flip,
    draw_jitter,
    draw_operation,
    epoch_key,
    rand_augment_operation,
)
from medmerge_jax.studies.checks import CHOICES

DRAWS = 20_000
MINIMAL, MEDIUM = POLICIES["minimal"], POLICIES["medium"]
OPERATE = jax.jit(rand_augment_operation, static_argnums=3)
BRIGHT = Policy(crop_scale=(0.5, 1.0), brightness=1.3, contrast=0.4, saturation=0.2)


@pytest.fixture
def v2(torch, torchvision):
    """Draws the same in every test, whichever ran before."""
    torch.manual_seed(0)
    return importlib.import_module("torchvision.transforms.v2")


@pytest.fixture(scope="module")
def images():
    return draw("lesion", np.arange(12) % 4, 40, np.random.default_rng(0), 3)


def keys(draws=DRAWS):
    """Of the examples of several epochs, as `augment` makes them."""
    indices = jnp.arange(draws // 4)
    per_epoch = [
        jax.vmap(functools.partial(jax.random.fold_in, epoch_key(7, epoch)))(indices)
        for epoch in range(4)
    ]
    return jnp.concatenate(per_epoch)


def assert_same_distribution(found, wanted):
    """Neither the mean nor the spread nor the shape of two samples tells them apart."""
    found, wanted = np.asarray(found, float), np.asarray(wanted, float)
    error = math.sqrt(found.var() / len(found) + wanted.var() / len(wanted))
    assert abs(found.mean() - wanted.mean()) <= 4 * error
    assert found.std() == pytest.approx(wanted.std(), rel=0.04)
    assert stats.ks_2samp(found, wanted).pvalue > 1e-4


def assert_same_shares(found, wanted, kinds):
    """Every kind is as frequent in both, and does occur."""
    counts = np.array([[np.sum(sample == kind) for kind in range(kinds)]
                       for sample in (np.asarray(found), np.asarray(wanted))])  # fmt: skip
    assert counts.sum() == len(found) + len(wanted)
    assert counts.min() > 0
    assert stats.chi2_contingency(counts).pvalue > 1e-4


def assert_uncorrelated(*samples):
    correlations = np.corrcoef(np.stack([np.asarray(sample, float) for sample in samples]))
    np.fill_diagonal(correlations, 0)
    assert np.abs(correlations).max() < 4 / math.sqrt(len(samples[0]))


@functools.cache
def crops(height, width, scale):
    draws = jax.jit(jax.vmap(lambda key: draw_crop(key, height, width, scale)))(keys())
    return np.stack(draws, axis=1)


@pytest.fixture
def torchvisions_crops(torch, v2):
    def call(height, width, scale):
        transform, image = v2.RandomResizedCrop(height, scale), torch.zeros(3, height, width)
        names = ("top", "left", "height", "width")
        drawn = [transform.make_params([image]) for _ in range(DRAWS)]
        return np.array([[one[name] for name in names] for one in drawn])

    return call


SHAPES = [(224, 224), (200, 224), (224, 170)]
SCALES = [policy.crop_scale for policy in POLICIES.values()]


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", SCALES)
def test_crops(torchvisions_crops, shape, scale):
    found, wanted = crops(*shape, scale), torchvisions_crops(*shape, scale)
    assert (found >= [0, 0, 1, 1]).all()
    assert (found[:, :2] + found[:, 2:] <= shape).all()
    # Area, logarithm of the aspect ratio, position in what is left of each side.
    describe = (
        lambda crop: crop[:, 2] * crop[:, 3],
        lambda crop: np.log(crop[:, 3] / crop[:, 2]),
        lambda crop: (crop[:, 0] + 0.5) / (shape[0] - crop[:, 2] + 1),
        lambda crop: (crop[:, 1] + 0.5) / (shape[1] - crop[:, 3] + 1),
    )
    for function in describe:
        assert_same_distribution(function(found), function(wanted))
    # Of the fallback, when no draw fitted.
    whole = [np.mean(crop[:, 2] * crop[:, 3] == np.prod(shape)) for crop in (found, wanted)]
    assert whole[0] == pytest.approx(whole[1], abs=4 * math.sqrt(0.5 / DRAWS * max(whole) + 1e-9))
    if shape == (224, 224):
        assert_uncorrelated(*(function(found) for function in describe))


def test_crops_of_the_whole_range():
    """Medium: an area uniform in 8 % … 100 % and an aspect ratio in 3/4 … 4/3, where both fit."""
    found = crops(224, 224, MEDIUM.crop_scale)
    areas, ratios = found[:, 2] * found[:, 3] / 224**2, found[:, 3] / found[:, 2]
    assert 0.075 < areas.min() < 0.085
    assert 0.98 < areas.max() <= 1
    assert 0.73 < ratios.min() < 0.76
    assert 1.32 < ratios.max() < 1.37
    small = areas < 0.5  # every ratio fits
    assert stats.kstest(areas[small], "uniform", (0.08, 0.42)).pvalue > 1e-4
    log_ratios = np.log(ratios[small])
    assert (
        stats.kstest(log_ratios, "uniform", (-math.log(4 / 3), 2 * math.log(4 / 3))).pvalue > 1e-4
    )


@pytest.mark.parametrize("shape", [(30, 90), (90, 30), (40, 40), (40, 45)])
def test_a_crop_that_never_fits_is_torchvisions_centre(torch, v2, shape):
    scale = (1.5, 1.6)
    wanted = v2.RandomResizedCrop(8, scale).make_params([torch.zeros(3, *shape)])
    for key in keys(8):
        found = [int(value) for value in draw_crop(key, *shape, scale)]
        assert found == [wanted[name] for name in ("top", "left", "height", "width")]


def test_flips(rng):
    """torchvision flips if a uniform number is below the probability."""
    for probability in (0.5, 0.1):
        found = np.asarray(jax.jit(jax.vmap(lambda k, p=probability: draw_flip(k, p)))(keys()))
        wanted = rng.random(DRAWS) < probability
        assert_same_shares(found, wanted, 2)
        assert found.mean() == pytest.approx(probability, abs=4 * math.sqrt(0.25 / DRAWS))


@pytest.mark.slow
@pytest.mark.parametrize("policy", [MEDIUM, BRIGHT])
def test_jitter(v2, policy):
    order, factors = jax.jit(jax.vmap(functools.partial(draw_jitter, policy)))(keys())
    order, factors = np.asarray(order), np.asarray(factors)
    names = ("brightness", "contrast", "saturation")
    transform = v2.ColorJitter(**{name: getattr(policy, name) for name in names})
    drawn = [transform.make_params([]) for _ in range(DRAWS)]
    for number, name in enumerate(names):
        assert_same_distribution(factors[:, number], [one[f"{name}_factor"] for one in drawn])
    assert_uncorrelated(*factors.T)
    # Every order is as likely as torchvision's of the operations that it does.
    wanted = [[step for step in one["fn_idx"].tolist() if step < len(names)] for one in drawn]
    orders = math.factorial(len(names))
    assert_same_shares(ranks(order), ranks(np.array(wanted)), orders)


def test_jitter_is_uniform_in_its_range_and_in_every_order():
    """Of brightness 1.3 the factors are from 0, not below, to 2.3."""
    draws = jax.jit(jax.vmap(functools.partial(draw_jitter, BRIGHT)))(keys())
    order, factors = map(np.asarray, draws)
    for factor, low, high in zip(factors.T, (0, 0.6, 0.8), (2.3, 1.4, 1.2), strict=True):
        assert stats.kstest(factor, "uniform", (low, high - low)).pvalue > 1e-4
    assert_even(ranks(order), kinds=6)


def test_every_operation_and_sign_is_as_likely():
    operations, signs = map(np.asarray, jax.jit(jax.vmap(draw_operation))(keys()))
    assert_even(operations, kinds=len(RAND_AUGMENT))
    assert set(signs.tolist()) == {-1, 1}
    assert_even(signs > 0, kinds=2)
    assert_uncorrelated(operations, signs)


def assert_even(found, kinds):
    counts = np.bincount(found, minlength=kinds)
    assert len(counts) == kinds
    assert stats.chisquare(counts).pvalue > 1e-4


def ranks(permutations):
    """A number 0 … k! − 1 for each row."""
    return np.unique(permutations, axis=0, return_inverse=True)[1].reshape(-1)


@pytest.mark.slow
def test_operations_and_signs(torch, v2):
    operations, signs = map(np.asarray, jax.jit(jax.vmap(draw_operation))(keys()))
    drawn = []

    class Recorded(v2.RandAugment):
        def _apply_image_or_video_transform(self, image, name, magnitude, **options):
            drawn.append((list(self._AUGMENTATION_SPACE).index(name), math.copysign(1, magnitude)))
            return image

    image, transform = torch.zeros(3, 32, 32), Recorded(num_ops=2, magnitude=15)
    for _ in range(DRAWS // 2):
        transform(image)
    wanted, wanted_signs = np.array(drawn).T
    assert_same_shares(operations, wanted, len(RAND_AUGMENT))
    signed = [list(transform._AUGMENTATION_SPACE.values())[number][1] for number in range(14)]
    for number in np.flatnonzero(signed):
        assert_same_shares(signs[operations == number] > 0, wanted_signs[wanted == number] > 0, 2)
    assert_uncorrelated(operations, signs)


@pytest.mark.parametrize("number", range(len(RAND_AUGMENT)))
def test_a_sign_matters_where_torchvision_has_one(torch, v2, images, number):
    signed = list(v2.RandAugment._AUGMENTATION_SPACE.values())[number][1]
    results = [OPERATE(images[0], jnp.int32(number), jnp.float32(sign), 15) for sign in (-1, 1)]
    assert np.any(results[0] != results[1]) == signed


def test_the_two_operations_of_an_image_are_independent():
    def both(key):
        return [draw_operation(jax.random.fold_in(key, number))[0] for number in range(2)]

    first, second = map(np.asarray, jax.jit(jax.vmap(both))(keys()))
    counts = np.histogram2d(first, second, bins=14)[0]
    assert counts.min() > 0
    assert stats.chi2_contingency(counts).pvalue > 1e-4


@pytest.mark.parametrize("name", some_quick(POLICIES, "heavy"))
def test_the_policies_are_what_is_drawn_one_after_another(images, name):
    """`augment_image` does what the draws of its key say, in the order of the policy."""
    policy, together = POLICIES[name], jax.jit(augment_image, static_argnums=0)
    changed = []
    for index, image in enumerate(images):
        key = jax.random.fold_in(epoch_key(0, 0), index)
        crop_key, flip_key, jitter_key, operations_key = jax.random.split(key, 4)
        wanted = ops.resized_crop(image, *draw_crop(crop_key, 40, 40, policy.crop_scale), (40, 40))
        if name == "medium":
            wanted = wanted[:, ::-1] if draw_flip(flip_key, 0.5) else wanted
            order, factors = draw_jitter(policy, jitter_key)
            for step in order:
                adjust = (ops.adjust_brightness, ops.adjust_contrast, ops.adjust_saturation)
                wanted = adjust[int(step)](wanted, factors[step])
        if name == "heavy":
            for number in range(2):
                drawn = draw_operation(jax.random.fold_in(operations_key, number))
                wanted = OPERATE(wanted, *drawn, 15)
        found = np.asarray(together(policy, image, key))
        difference = np.abs(found.astype(int) - wanted)
        assert difference.max() <= 1  # compiled together, a rotation may be rounded otherwise
        assert np.mean(difference > 0) < 0.01
        changed.append(np.mean(found != image))
    assert np.mean(changed) > 0.2


def test_the_names_are_the_configs():
    assert CHOICES["augmentation"]() == ("none", "minimal", "medium", "heavy")


augmented = jax.jit(augment, static_argnums=0)


@pytest.mark.parametrize("name", some_quick(POLICIES, "minimal"))
@pytest.mark.parametrize("size", some_quick((1, 4, 5, 12), 4))
def test_the_batch_does_not_matter(images, name, size):
    """Whatever is beside an image, and wherever it is, the same becomes of it."""
    policy, key = POLICIES[name], epoch_key(3, 1)
    wanted = np.asarray(augmented(policy, images, jnp.arange(12), key))
    order = np.random.default_rng(0).permutation(12)
    found = np.zeros_like(images)
    for start in range(0, 12, size):
        rows = order[start : start + size]
        found[rows] = augmented(policy, images[rows], jnp.asarray(rows, jnp.int32), key)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("name", some_quick(POLICIES, "minimal"))
def test_side_by_side_is_one_after_another(images, name):
    """What runs on an accelerator, on this processor: the same but for fused roundings."""
    policy, key = POLICIES[name], epoch_key(3, 1)
    one_by_one = augmented(policy, images, jnp.arange(12), key)
    beside = jax.jit(
        jax.vmap(lambda image, i: augment_image(policy, image, jax.random.fold_in(key, i)))
    )(images, jnp.arange(12))
    difference = np.abs(np.asarray(beside).astype(int) - one_by_one)
    assert difference.max() <= 1
    assert np.mean(difference > 0) < 0.002


def test_seed_epoch_and_example_matter(images):
    same = np.repeat(images[:1], 6, axis=0)
    results = [
        augmented(MEDIUM, same, jnp.arange(6), epoch_key(seed, epoch))
        for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))
    ]
    distinct = {np.asarray(image).tobytes() for batch in results for image in batch}
    assert len(distinct) == 24
    again = augmented(MEDIUM, same, jnp.arange(6), epoch_key(0, 1))
    np.testing.assert_array_equal(again, results[1])


def test_an_epoch_does_not_compile_anew(images):
    augmented(MINIMAL, images, jnp.arange(12), epoch_key(0, 0))
    compiled = augmented._cache_size()
    for epoch in range(1, 4):
        augmented(MINIMAL, images, jnp.arange(12), epoch_key(0, epoch))
    assert augmented._cache_size() == compiled


ON_DEVICES = """
import sys

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from medmerge_jax.images.augment import POLICIES, augment, epoch_key

images = np.load(sys.argv[1])
mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
sharding = NamedSharding(mesh, PartitionSpec("data"))
batch = jax.device_put((images, np.arange(12, dtype=np.int32)), sharding)
for name, policy in POLICIES.items():
    result = jax.jit(augment, static_argnums=0)(policy, *batch, epoch_key(3, 1))
    np.save(f"{sys.argv[1]}.{name}.npy", np.asarray(result))
print(jax.device_count())
"""


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 4])
def test_neither_the_process_nor_the_devices_matter(images, tmp_path, devices):
    np.save(tmp_path / "images.npy", images)
    flags = f"--xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-c", ON_DEVICES, tmp_path / "images.npy"],
        env={**os.environ, "XLA_FLAGS": flags}, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.split() == [str(devices)], done.stderr
    for name, policy in POLICIES.items():
        wanted = augmented(policy, images, jnp.arange(12), epoch_key(3, 1))
        found = np.load(tmp_path / f"images.npy.{name}.npy")
        np.testing.assert_array_equal(found, wanted)
