import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.torch_reference import reference, state

import medmerge_jax as mm
from medmerge_jax.merging.averages import uniform_average
from medmerge_jax.merging.recalibration import recalibrate, repair, repair_scales
from medmerge_jax.merging.trees import flatten
from medmerge_jax.models.norm import batch_statistics
from medmerge_jax.models.resnet import CifarResNet
from medmerge_jax.weights import variables_from_torch

CLASSES = 5


def statistics_of(variables, x):
    """Of one "batch norm" of features that are the inputs times a weight."""
    features = x * variables["params"]["w"]
    mean = features.mean(0)
    return {"bn": {"mean": mean, "var": np.square(features - mean).sum(0) / (len(x) - 1)}}


@pytest.fixture
def variables():
    return {
        "params": {"w": np.array([1, 2, 0.5], np.float32)},
        "batch_stats": {"bn": {"mean": np.full(3, 7, np.float32), "var": np.ones(3, np.float32)}},
    }


@pytest.fixture(scope="module")
def network():
    """He et al.'s network with one block in each stage, and two of its initialisations."""
    model = CifarResNet(1, CLASSES)
    init = jax.jit(lambda key: model.init(key, jnp.zeros((1, 16, 16, 3))))
    return model, init(jax.random.key(0)), init(jax.random.key(1))


class TestRecalibrate:
    @pytest.mark.parametrize("name", ["resnet20", pytest.param("resnet18", marks=pytest.mark.slow)])
    def test_matches_pytorchs_cumulative_average(self, torch, torchvision, rng, name):
        network = reference(torch, torchvision, name, CLASSES)
        variables = variables_from_torch(name, state(network), "the reference")
        images = rng.normal(size=(4, 8, 32, 32, 3)).astype(np.float32)
        batches = [torch.from_numpy(batch.transpose(0, 3, 1, 2)) for batch in images]
        torch.optim.swa_utils.update_bn(batches, network)  # resets, and sets momentum to None
        wanted = flatten(variables_from_torch(name, state(network), "PyTorch")["batch_stats"])

        model = mm.create_model(name, CLASSES)
        found = recalibrate(lambda v, x: batch_statistics(model, v, x), variables, images)
        assert found["params"] is variables["params"]
        for path, leaf in flatten(found["batch_stats"]).items():
            error = np.linalg.norm(leaf - wanted[path]) / np.linalg.norm(wanted[path])
            assert error < 1e-4, (path, error)

    def test_one_batch_gives_its_own_statistics(self, network, rng):
        model, variables, _ = network
        images = rng.normal(size=(16, 16, 16, 3)).astype(np.float32)
        found = recalibrate(lambda v, x: batch_statistics(model, v, x), variables, [images])
        apply = jax.jit(model.apply, static_argnames=("train", "mutable"))
        trained, _ = apply(variables, images, train=True, mutable=("batch_stats",))
        # Unbiased variances differ from those the batch was normalised with by 1/n at most.
        np.testing.assert_allclose(
            apply(found, images), trained, rtol=0.05, atol=0.05 * np.std(trained)
        )
        far = np.abs(apply(variables, images) - trained).max()
        assert far > np.std(trained)

    def test_forgets_the_former_statistics(self, network, rng):
        model, variables, _ = network
        images = rng.normal(size=(2, 4, 16, 16, 3)).astype(np.float32)
        other = {
            **variables,
            "batch_stats": jax.tree.map(lambda x: 3 * x + 1, variables["batch_stats"]),
        }
        first, second = (
            recalibrate(lambda v, x: batch_statistics(model, v, x), v, images)
            for v in (variables, other)
        )
        chex_equal(first["batch_stats"], second["batch_stats"])

    def test_every_example_counts_alike(self, variables, rng):
        x = rng.normal(size=(11, 3)).astype(np.float32)
        found = recalibrate(statistics_of, variables, iter([x[:8], x[8:]]))["batch_stats"]["bn"]
        features = x.astype(np.float64) * [1, 2, 0.5]
        np.testing.assert_allclose(found["mean"], features.mean(0), rtol=1e-5, atol=1e-6)
        inside = (8 * features[:8].var(0, ddof=1) + 3 * features[8:].var(0, ddof=1)) / 11
        np.testing.assert_allclose(found["var"], inside, rtol=1e-5)

    def test_order_of_batches_does_not_matter(self, variables, rng):
        x = rng.normal(size=(5, 8, 3)).astype(np.float32)
        first = recalibrate(statistics_of, variables, x)["batch_stats"]
        second = recalibrate(statistics_of, variables, x[::-1])["batch_stats"]
        chex_equal(first, second, rtol=1e-6)

    def test_restores_the_variance_of_a_merge(self, network, rng):
        """Of two networks that share nothing, the midpoint's features collapse."""
        model, first, second = network
        images = rng.normal(size=(2, 16, 16, 16, 3)).astype(np.float32)

        def calibrated(variables):
            return recalibrate(lambda v, x: batch_statistics(model, v, x), variables, images)

        @jax.jit
        def spread(variables):
            # Of the units before the head, over examples.
            _, seen = model.apply(
                variables, images[0], capture_intermediates=lambda m, _: m.name == "bn1"
            )
            last = flatten(seen["intermediates"])["layer3/0/bn1/__call__"][0]
            return jnp.std(last, axis=(0, 1, 2)).mean()

        parents = [calibrated(first), calibrated(second)]
        merged = uniform_average(parents)
        wanted = np.mean([spread(parent) for parent in parents])
        assert spread(merged) < 0.8 * wanted
        np.testing.assert_allclose(spread(calibrated(merged)), wanted, rtol=0.05)

    def test_keeps_dtype_and_other_collections(self, variables, rng):
        variables["batch_stats"]["bn"]["mean"] = variables["batch_stats"]["bn"]["mean"].astype("f2")
        variables["extra"] = {"a": np.ones(1)}
        found = recalibrate(statistics_of, variables, rng.normal(size=(1, 4, 3)).astype("f4"))
        assert found["batch_stats"]["bn"]["mean"].dtype == np.float16
        assert found["extra"] is variables["extra"]

    def test_bad_input_is_named(self, variables, rng):
        x = rng.normal(size=(1, 4, 3)).astype(np.float32)
        with pytest.raises(ValueError, match="no batch to estimate"):
            recalibrate(statistics_of, variables, [])
        with pytest.raises(ValueError, match='no "batch_stats"'):
            recalibrate(statistics_of, {"params": variables["params"]}, x)
        with pytest.raises(ValueError, match=r"batch_stats/bn/var: shape .* absent in a batch's"):
            recalibrate(lambda v, x: {"bn": {"mean": x.mean(0)}}, variables, x)
        x[0, 0, 0] = np.nan
        with pytest.raises(ValueError, match="bn/mean in a batch's statistics: 1 of 3 numbers"):
            recalibrate(statistics_of, variables, x)


def chex_equal(first, second, rtol=0.0):
    first, second = flatten(first), flatten(second)
    assert first.keys() == second.keys()
    for path, leaf in first.items():
        np.testing.assert_allclose(leaf, second[path], rtol=rtol, atol=rtol, err_msg=path)


LAYERS = ("layer1", "layer2", "layer10")


def make_plain(seed):
    """A convolution and two dense layers of width 32, with biases and no batch norm."""
    rng = np.random.default_rng(seed)

    def layer(*shape):
        scale = np.sqrt(2 / np.prod(shape[:-1]))
        return {
            "kernel": rng.normal(0, scale, shape).astype(np.float32),
            "bias": rng.normal(0, 0.3, shape[-1]).astype(np.float32),
        }

    return {
        "layer10": layer(32, 32),
        "layer1": layer(3, 3, 2, 32),
        "layer2": layer(32, 32),
        "head": layer(32, CLASSES),
    }


def preactivations(params, images):
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    x = jax.lax.conv_general_dilated(
        images,
        params["layer1"]["kernel"],
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    outputs = {"layer1": x + params["layer1"]["bias"]}
    x = jax.nn.relu(outputs["layer1"]).mean((1, 2))
    for name in LAYERS[1:]:
        outputs[name] = x @ params[name]["kernel"] + params[name]["bias"]
        x = jax.nn.relu(outputs[name])
    return outputs


class TestRepair:
    @pytest.fixture
    def measure(self, rng):
        images = rng.normal(size=(64, 6, 6, 2)).astype(np.float32)

        @jax.jit
        def moments(params):
            outputs = preactivations(params, images)
            flat = {name: x.reshape(-1, x.shape[-1]) for name, x in outputs.items()}
            return [(flat[name].mean(0), flat[name].var(0)) for name in LAYERS]

        # Not from inside jax.jit, which sorts: layer10 would come before layer2.
        return lambda params: dict(zip(LAYERS, moments(params), strict=True))

    @pytest.mark.parametrize("weights", [None, (0.5, 0.3, 0.2)])
    def test_units_get_the_mean_moments_of_the_parents(self, measure, weights):
        parents = [make_plain(seed) for seed in range(3)]
        shares = weights or (1 / 3, 1 / 3, 1 / 3)
        merged = jax.tree.map(
            lambda *x: sum(w * y for w, y in zip(shares, x, strict=True)), *parents
        )
        repaired = repair(measure, merged, parents, weights)
        for layer in LAYERS:
            of_parents = [measure(parent)[layer] for parent in parents]
            mean, variance = measure(repaired)[layer]
            wanted = sum(w * m for w, (m, _) in zip(shares, of_parents, strict=True))
            std = sum(w * np.sqrt(v) for w, (_, v) in zip(shares, of_parents, strict=True))
            np.testing.assert_allclose(mean, wanted, atol=1e-4)
            np.testing.assert_allclose(np.sqrt(variance), std, rtol=1e-4)
            # Which the merge itself is far from.
            assert np.mean(np.sqrt(measure(merged)[layer][1])) < 0.8 * np.mean(std)
        np.testing.assert_array_equal(repaired["head"]["kernel"], merged["head"]["kernel"])

    @pytest.mark.parametrize("n", [1, 2])
    def test_identical_parents_stay_as_they_are(self, measure, n):
        parent = make_plain(0)
        chex_equal(repair(measure, parent, [parent] * n), parent, rtol=1e-5)

    def test_a_dead_unit_is_not_blown_up(self, measure):
        parents = [make_plain(seed) for seed in range(2)]
        merged = uniform_average(parents)
        merged["layer2"]["kernel"] = merged["layer2"]["kernel"].at[:, 3].set(0)
        repaired = repair(measure, merged, parents)
        np.testing.assert_array_equal(repaired["layer2"]["kernel"][:, 3], 0)
        wanted = np.mean([measure(parent)["layer2"][0][3] for parent in parents])
        np.testing.assert_allclose(measure(repaired)["layer2"][0][3], wanted, rtol=1e-4)

    def test_dtype_is_kept(self, measure):
        parents = [make_plain(seed) for seed in range(2)]
        half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), uniform_average(parents))
        repaired = repair(measure, half, parents)
        assert {leaf.dtype for leaf in jax.tree.leaves(repaired)} == {np.dtype(jnp.bfloat16)}

    def test_bad_input_is_named(self, measure):
        parents = [make_plain(seed) for seed in range(2)]
        merged = uniform_average(parents)
        with pytest.raises(ValueError, match="0 parents"):
            repair(measure, merged, [])
        with pytest.raises(ValueError, match="1 weights for 2"):
            repair(measure, merged, parents, (1.0,))
        with pytest.raises(ValueError, match=r"sum to 1\.5"):
            repair(measure, merged, parents, (1.0, 0.5))
        with pytest.raises(ValueError, match="stem has no kernel"):
            repair(lambda p: {"stem": measure(p)["layer1"]}, merged, parents)
        with pytest.raises(ValueError, match=r"head: .* statistics of 32 units"):
            repair(lambda p: {"head": measure(p)["layer1"]}, merged, parents)
        with pytest.raises(ValueError, match="layer1 in the variances of parent 0: 32 of 32"):
            repair(lambda p: {"layer1": (np.zeros(32), np.full(32, np.nan))}, merged, parents)
        del merged["layer2"]["bias"]
        with pytest.raises(ValueError, match="layer2 has no bias"):
            repair(lambda p: {"layer2": (np.zeros(32), np.ones(32))}, merged, parents)


class TestRepairScales:
    def make(self, scale):
        scale = np.array(scale, np.float32)
        zeros = np.zeros_like(scale)
        return {
            "params": {
                "bn": {"scale": scale, "bias": zeros + 0.5},
                "other": {"scale": scale},  # without running statistics: not a batch norm
            },
            "batch_stats": {"bn": {"mean": zeros, "var": zeros + 1}},
        }

    def test_scales_are_as_long_as_the_parents(self):
        parents = [self.make([1, -1, 2, -3]), self.make([3, -2, -4, 3])]
        merged = uniform_average(parents)
        repaired = repair_scales(merged, parents)
        np.testing.assert_allclose(repaired["params"]["bn"]["scale"], [2, -1.5, -3, 3])
        for path, leaf in flatten(repaired).items():
            if path != "params/bn/scale":
                np.testing.assert_array_equal(leaf, flatten(merged)[path])

    def test_weights(self):
        parents = [self.make([1, -1]), self.make([-3, 1])]
        repaired = repair_scales(self.make([-2, 0.5]), parents, (0.25, 0.75))
        np.testing.assert_allclose(repaired["params"]["bn"]["scale"], [-2.5, 1])

    def test_units_behind_a_batch_norm_get_the_moments_that_repair_asks_for(self, network, rng):
        model, *starts = network
        images = rng.normal(size=(16, 16, 16, 3)).astype(np.float32)

        def with_scales(variables):
            normal = rng.normal
            params = flatten(variables["params"])
            params = {p: normal(size=x.shape) if "bn" in p else x for p, x in params.items()}
            return {**variables, "params": mm.merging.unflatten(params)}

        @jax.jit
        def stds(variables):
            _, seen = model.apply(
                variables,
                images,
                train=True,
                mutable=["batch_stats", "intermediates"],
                capture_intermediates=lambda m, _: m.name in ("bn1", "bn2"),
            )
            return {p: jnp.std(x[0], (0, 1, 2)) for p, x in flatten(seen["intermediates"]).items()}

        parents = [with_scales(start) for start in starts]
        merged = uniform_average(parents)
        first, second, plain, repaired = map(
            stds, [*parents, merged, repair_scales(merged, parents)]
        )
        for path, std in repaired.items():
            np.testing.assert_allclose(std, (first[path] + second[path]) / 2, rtol=0.01)
        assert max(np.mean(plain[p] / repaired[p]) for p in plain) < 0.9

    def test_bad_input_is_named(self):
        merged = self.make([1, 2])
        with pytest.raises(ValueError, match="0 parents"):
            repair_scales(merged, [])
        with pytest.raises(ValueError, match=r"params/bn/scale: .* shape \(3,\) in parent 1"):
            repair_scales(merged, [merged, self.make([1, 2, 3])])
