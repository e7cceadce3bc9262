import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medmerge_jax.merging.correlation import (
    correlation,
    covariance,
    init_moments,
    update_moments,
)

update = jax.jit(update_moments, static_argnames="tap")


def samples_of(batches):
    """(samples, units) in float64 of batches of every model's activations."""
    rows = [np.concatenate([np.asarray(m, np.float64) for m in batch], -1) for batch in batches]
    return np.concatenate([row.reshape(-1, row.shape[-1]) for row in rows])


def test_equals_numpy_over_batches_of_any_sizes_and_positions(rng):
    mix = rng.normal(size=(10, 10))
    batches = []
    for shape in ((7, 3, 2), (1, 5, 5), (12,), (2, 1, 1)):
        x = rng.normal(size=(*shape, 10)) @ mix + rng.normal(size=10)
        batches.append([x[..., :5].astype(np.float32), x[..., 5:].astype(np.float32)])
    moments = init_moments(2, 5)
    for batch in batches:
        moments = update(moments, batch)
    x = samples_of(batches)
    np.testing.assert_allclose(
        covariance(moments), np.cov(x.T, bias=True), rtol=1e-5, atol=1e-6 * x.var()
    )
    found = correlation(moments)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, np.corrcoef(x.T), atol=1e-6)
    np.testing.assert_array_equal(found, found.T)


def test_small_variances_of_large_means_are_not_lost(rng):
    batches = []
    for _ in range(50):
        x = rng.normal(size=(64, 4))
        x[:, 3] = 0.6 * x[:, 0] + 0.8 * x[:, 3]
        batches.append([(1000 + x).astype(np.float32)])
    moments = init_moments(1, 4)
    for batch in batches:
        moments = update(moments, batch)
    wanted = np.corrcoef(samples_of(batches).T)
    np.testing.assert_allclose(correlation(moments), wanted, atol=1e-4)
    assert wanted[0, 3] > 0.5


def test_small_batches_are_not_lost_in_a_large_sum():
    # 2³⁰ and then 1,000 times 1: in float32 each of these alone would be rounded off.
    moments = update(init_moments(1, 1), [np.array([[-(2.0**14.5)], [2.0**14.5]])])
    for _ in range(1000):
        moments = update(moments, [np.array([[-(0.5**0.5)], [0.5**0.5]])])
    assert float(moments.comoment[0, 0]) >= 2.0**30
    np.testing.assert_allclose(covariance(moments)[0, 0] * 2002, 2.0**30 + 1000, rtol=1e-7)


def test_each_tap_is_centred_by_itself(rng):
    x, y = rng.normal(size=(2, 200, 3)).astype(np.float32)
    moments = init_moments(1, 3, num_taps=2)
    moments = update(moments, [x], tap=0)
    moments = update(moments, [y + 100], tap=1)
    within = (200 * np.cov(x.T, bias=True) + 200 * np.cov(y.T, bias=True)) / 400
    np.testing.assert_allclose(covariance(moments), within, atol=1e-4)
    np.testing.assert_array_equal(moments.num_samples, [200, 200])


def test_padding_is_no_sample(rng):
    x = rng.normal(size=(6, 4, 4, 3)).astype(np.float32)
    wanted = update(init_moments(1, 3), [x[:4]])
    found = update(init_moments(1, 3), [x], valid=np.arange(6) < 4)
    assert float(found.num_samples[0]) == 4 * 4 * 4
    np.testing.assert_allclose(covariance(found), covariance(wanted), atol=1e-6)
    nothing = update(found, [x], valid=np.zeros(6))
    np.testing.assert_array_equal(covariance(nothing), covariance(found))


@pytest.mark.parametrize("constant", [0.0, 0.1, -3.7e5])
def test_dead_units_correlate_with_nothing(rng, constant):
    moments = init_moments(2, 2)
    for size in (33, 7, 100):
        x = rng.normal(size=(2, size, 2)).astype(np.float32)
        x[0, :, 1] = constant
        moments = update(moments, list(x))
    found = correlation(moments)
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found[1], 0)
    np.testing.assert_array_equal(found[:, 1], 0)
    np.testing.assert_allclose(found.diagonal()[[0, 2, 3]], 1, atol=1e-12)


def test_eps_is_the_smallest_product_of_standard_deviations(rng):
    x = rng.normal(size=(500, 1)).astype(np.float32)
    moments = update(init_moments(3, 1), [x, 1e-3 * x, 1e-5 * x])
    std = np.std(x.astype(np.float64)) * np.array([1, 1e-3, 1e-5])
    products = np.outer(std, std)
    wanted = products / np.maximum(products, 1e-7)
    np.testing.assert_allclose(correlation(moments), wanted, rtol=1e-5)
    assert wanted[1, 1] == 1 and wanted[2, 2] < 0.01
    np.testing.assert_allclose(correlation(moments, eps=1e-12), 1, rtol=1e-5)


def test_half_precision_activations_are_summed_in_float32(rng):
    x = jnp.asarray(rng.normal(size=(300, 4)), jnp.bfloat16)
    moments = update(init_moments(1, 4), [x])
    assert moments.comoment.dtype == jnp.float32
    wanted = np.cov(np.asarray(x, np.float64).T, bias=True)
    np.testing.assert_allclose(covariance(moments), wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("shapes", "found"),
    [
        ([(4, 3), (4, 2)], r"\(4, 3\), \(4, 2\)"),
        ([(4, 3), (5, 3)], r"\(4, 3\), \(5, 3\)"),
        ([(4, 3)], r"\(4, 3\) for moments of 6 units"),
        ([(3,), (3,)], r"\(3,\), \(3,\)"),
        ([], r"\(\) for moments of 6 units"),
    ],
)
def test_activations_that_do_not_fit_are_refused(shapes, found):
    with pytest.raises(ValueError, match=found):
        update_moments(init_moments(2, 3), [np.zeros(shape) for shape in shapes])


@pytest.mark.parametrize(("name", "numbers"), [("num_models", (0, 3)), ("size", (2, 0))])
def test_moments_of_nothing_are_refused(name, numbers):
    with pytest.raises(ValueError, match=f"{name} is 0"):
        init_moments(*numbers)
    with pytest.raises(ValueError, match="num_taps is 0"):
        init_moments(2, 3, 0)


def test_no_samples_and_infinite_ones_are_refused():
    with pytest.raises(ValueError, match="no activations were observed"):
        correlation(init_moments(2, 3))
    x = np.zeros((4, 3), np.float32)
    x[2, 1] = np.nan
    moments = update(init_moments(2, 3), [np.zeros((4, 3)), x])
    with pytest.raises(ValueError, match=r"1 of 6 units \(first: 4\)"):
        correlation(moments)
