import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medmerge_jax.merging.averages import (
    diagonal_fisher,
    fisher_average,
    slerp,
    task_arithmetic,
    uniform_average,
    weighted_average,
)
from medmerge_jax.merging.trees import flatten
from medmerge_jax.models.resnet import CifarResNet

NUM_CLASSES = 3


def make_variables(seed, dtype=np.float32, num_classes=NUM_CLASSES):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(dtype)

    def positive(*shape):
        return rng.uniform(0.5, 2, shape).astype(dtype)

    return {
        "params": {
            "conv": {"kernel": normal(3, 3, 2, 4)},
            "bn": {"scale": positive(4), "bias": normal(4)},
            "head": {"kernel": normal(4, num_classes), "bias": normal(num_classes)},
        },
        "batch_stats": {"bn": {"mean": normal(4), "var": positive(4)}},
    }


def make_fisher(seed):
    rng = np.random.default_rng(seed)
    params = make_variables(0)["params"]
    return {"params": jax.tree.map(lambda x: rng.exponential(1e-3, x.shape), params)}


def fisher_merge(parents, **options):
    fishers = [make_fisher(seed) for seed in range(len(parents))]
    return fisher_average(parents, fishers, **options)


def weighted(parents):
    return weighted_average(parents, np.arange(1, len(parents) + 1) / sum(range(len(parents) + 1)))


# Those that take any number of parents, with the options at which identical parents stay put.
MERGERS = {
    "uniform": uniform_average,
    "weighted": weighted,
    "fisher": fisher_merge,
    "task_arithmetic": lambda parents: task_arithmetic(
        make_variables(99), parents, scale=1 / len(parents)
    ),
}


def assert_trees_close(actual, wanted, rtol=2e-6, atol=1e-6):
    actual, wanted = flatten(actual), flatten(wanted)
    assert set(actual) == set(wanted)
    for path in wanted:
        np.testing.assert_allclose(
            np.asarray(actual[path], np.float64), wanted[path], rtol, atol, err_msg=path
        )


def assert_trees_equal(actual, wanted):
    assert_trees_close(actual, wanted, rtol=0, atol=0)


def in_float64(function, *trees):
    return jax.tree.map(
        lambda *leaves: function(*[np.asarray(x, np.float64) for x in leaves]), *trees
    )


class TestAll:
    @pytest.mark.parametrize("name", MERGERS)
    @pytest.mark.parametrize("n", [2, 3, 7])
    def test_identical_parents_are_a_fixed_point(self, name, n):
        parent = make_variables(0)
        assert_trees_close(MERGERS[name]([parent] * n), parent)

    @pytest.mark.parametrize("name", ["uniform", "weighted", "fisher"])
    def test_one_parent_comes_back_bit_for_bit(self, name):
        parent = make_variables(0)
        assert_trees_equal(MERGERS[name]([parent]), parent)

    @pytest.mark.parametrize("name", MERGERS)
    @pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
    def test_dtype_is_the_parents(self, name, dtype):
        merged = MERGERS[name]([make_variables(seed, dtype) for seed in range(2)])
        wanted = np.float32 if name == "task_arithmetic" else dtype  # its ancestor is float32
        assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {np.dtype(wanted)}

    @pytest.mark.parametrize("name", [*MERGERS, "slerp"])
    def test_works_under_jit(self, name):
        merger = slerp if name == "slerp" else MERGERS[name]
        parents = [make_variables(seed) for seed in range(2)]
        wanted = jax.tree.map(np.asarray, merger(parents))
        assert_trees_close(jax.jit(merger)(parents), wanted)

    @pytest.mark.parametrize("name", [*MERGERS, "slerp"])
    def test_leaves_stay_in_the_parents_order(self, name):
        merger = slerp if name == "slerp" else MERGERS[name]
        parents = [make_variables(seed) for seed in range(2)]
        assert list(flatten(merger(parents))) == list(flatten(parents[0]))

    @pytest.mark.parametrize("name", [*MERGERS, "slerp"])
    @pytest.mark.parametrize(
        ("path", "value", "message"),
        [
            ("params/conv/kernel", np.zeros((3, 3, 2, 5), np.float32), r"shape \(3, 3, 2, 4\) in"),
            ("params/head/bias", np.zeros(8, np.float32), r"params/head/bias: shape \(3,\) in"),
            ("params/bn2/scale", np.zeros(4, np.float32), "params/bn2/scale: absent in parent 0"),
            (
                "params/bn/bias",
                np.zeros(4, np.int32),
                "params/bn/bias in parent 1 is of dtype int32",
            ),
            ("params/bn/bias", [1, 2, 3, 4], "params/bn/bias in parent 1 is list"),
            (
                "batch_stats/bn/var",
                np.array([1, np.nan, np.inf, 1], np.float32),
                "batch_stats/bn/var in parent 1: 2 of 4 numbers are NaN or infinite",
            ),
        ],
    )
    def test_bad_parents_are_named(self, name, path, value, message):
        bad = make_variables(1)
        node = bad
        *above, last = path.split("/")
        for part in above:
            node = node.setdefault(part, {})
        node[last] = value
        if isinstance(value, list):
            message = rf"({message}|params/bn/bias: shape \(4,\) in parent 0)"
        merger = slerp if name == "slerp" else MERGERS[name]
        with pytest.raises(ValueError, match=message):
            merger([make_variables(0), bad])

    @pytest.mark.parametrize("name", MERGERS)
    def test_no_parent_is_refused(self, name):
        merger = MERGERS[name] if name not in ("weighted", "task_arithmetic") else None
        with pytest.raises(ValueError, match="0 parents"):
            if merger:
                merger([])
            elif name == "weighted":
                weighted_average([], [])
            else:
                task_arithmetic(make_variables(0), [], 1.0)


class TestAverages:
    @pytest.mark.parametrize("n", [2, 3, 100])
    def test_uniform_is_the_mean_of_every_collection(self, n):
        parents = [make_variables(seed) for seed in range(n)]
        wanted = in_float64(lambda *leaves: np.mean(leaves, axis=0), *parents)
        assert_trees_close(uniform_average(parents), wanted)

    def test_weighted_is_the_sum_of_weight_times_parent(self):
        parents = [make_variables(seed) for seed in range(3)]
        wanted = in_float64(lambda a, b, c: 0.5 * a + 0.7 * b - 0.2 * c, *parents)
        assert_trees_close(weighted_average(parents, (0.5, 0.7, -0.2)), wanted)

    def test_a_weight_of_one_gives_that_parent_bit_for_bit(self):
        parents = [make_variables(seed) for seed in range(3)]
        assert_trees_equal(weighted_average(parents, (0, 1, 0)), parents[1])

    @pytest.mark.parametrize(
        ("weights", "message"),
        [
            ((0.5, 0.6), "sum to 1.1;"),
            ((0.5, float("nan")), "sum to nan;"),
            ((1.0,), "1 weights for 2 parents"),
            ((0.5, 0.25, 0.25), "3 weights for 2 parents"),
        ],
    )
    def test_weights_that_do_not_fit_are_refused(self, weights, message):
        with pytest.raises(ValueError, match=message):
            weighted_average([make_variables(0), make_variables(1)], weights)

    def test_rounding_of_weights_is_forgiven(self):
        parents = [make_variables(seed) for seed in range(3)]
        weighted_average(parents, np.full(3, 1 / 3, np.float32))


class TestSlerp:
    def test_is_shoemakes_formula(self):
        parents = [make_variables(seed) for seed in range(2)]

        def formula(a, b):
            angle = np.arccos(np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b))
            return (np.sin(0.7 * angle) * a + np.sin(0.3 * angle) * b) / np.sin(angle)

        merged = slerp(parents, 0.3)
        wanted = in_float64(formula, parents[0]["params"], parents[1]["params"])
        assert_trees_close(merged["params"], wanted, rtol=1e-5)

    def test_ends_are_the_parents(self):
        parents = [make_variables(seed) for seed in range(2)]
        assert_trees_equal(slerp(parents, 0.0), parents[0])
        assert_trees_equal(slerp(parents, 1.0), parents[1])

    def test_keeps_the_norm_where_the_mean_does_not(self):
        parents = [{"w": np.array([3.0, 0.0], np.float32)}, {"w": np.array([0.0, 3.0], np.float32)}]
        middle = slerp(parents)["w"]
        np.testing.assert_allclose(middle, [3 / 2**0.5] * 2, rtol=1e-6)
        assert np.linalg.norm(uniform_average(parents)["w"]) < 2.2

    @pytest.mark.parametrize(
        "other",
        [[3.0, 4.0], [6.0, 8.0], [3.0, 4.01], [-3.0, -4.0], [-3.0, -4.01], [0.0, 0.0]],
        ids=["same", "longer", "near", "opposite", "near opposite", "zero"],
    )
    def test_is_linear_where_the_angle_says_nothing(self, other):
        first, second = np.array([3.0, 4.0], np.float32), np.array(other, np.float32)
        merged = slerp([{"w": first}, {"w": second}], 0.25)["w"]
        np.testing.assert_allclose(merged, 0.75 * first + 0.25 * second, rtol=1e-6)

    def test_of_identical_parents_is_the_parent(self):
        parent = make_variables(0)
        assert_trees_close(slerp([parent, parent], 0.3), parent)

    def test_running_statistics_are_linear(self):
        parents = [make_variables(seed) for seed in range(2)]
        wanted = in_float64(lambda a, b: 0.7 * a + 0.3 * b, *[p["batch_stats"] for p in parents])
        assert_trees_close(slerp(parents, 0.3)["batch_stats"], wanted)

    @pytest.mark.parametrize("n", [0, 1, 3])
    def test_is_between_two(self, n):
        with pytest.raises(ValueError, match=f"{n} parents; slerp is between two"):
            slerp([make_variables(0)] * n)


class TestTaskArithmetic:
    @pytest.mark.parametrize("scale", [0.4, (0.4, 0.9)])
    def test_adds_the_scaled_differences(self, scale):
        ancestor, *parents = [make_variables(seed) for seed in range(3)]
        s, t = np.broadcast_to(scale, 2)
        wanted = in_float64(lambda o, a, b: o + s * (a - o) + t * (b - o), ancestor, *parents)
        merged = task_arithmetic(ancestor, parents, scale)
        assert_trees_close(merged["params"], wanted["params"])
        np.testing.assert_allclose(
            merged["batch_stats"]["bn"]["mean"], wanted["batch_stats"]["bn"]["mean"], 1e-5, 1e-6
        )

    def test_scale_zero_is_the_ancestor_and_one_over_n_the_mean(self):
        ancestor, *parents = [make_variables(seed) for seed in range(4)]
        assert_trees_equal(task_arithmetic(ancestor, parents, 0.0), ancestor)
        assert_trees_close(task_arithmetic(ancestor, parents, 1 / 3), uniform_average(parents))

    def test_one_parent_at_scale_one_is_that_parent(self):
        assert_trees_close(
            task_arithmetic(make_variables(0), [make_variables(1)], 1.0), make_variables(1)
        )

    def test_variances_stay_positive(self):
        ancestor, *parents = [make_variables(seed) for seed in range(3)]
        ancestor["batch_stats"]["bn"]["var"] = np.array([4, 4, 1, 1], np.float32)
        parents[0]["batch_stats"]["bn"]["var"] = np.array([1, 2, 3, 1], np.float32)
        parents[1]["batch_stats"]["bn"]["var"] = np.array([0.5, 3, 2, 1], np.float32)
        merged = task_arithmetic(ancestor, parents, 1.0)
        # By the formula: -2.5, 1, 4, 1.
        np.testing.assert_allclose(merged["batch_stats"]["bn"]["var"], [0.5, 2, 4, 1])

    def test_an_ancestor_that_does_not_fit_is_named(self):
        ancestor = make_variables(0)
        ancestor["params"]["conv"]["kernel"] = ancestor["params"]["conv"]["kernel"][:1]
        with pytest.raises(ValueError, match=r"\(1, 3, 2, 4\) in the ancestor"):
            task_arithmetic(ancestor, [make_variables(1)], 1.0)
        ancestor = make_variables(0)
        ancestor["params"]["bn"]["bias"][0] = np.nan
        with pytest.raises(ValueError, match="params/bn/bias in the ancestor: 1 of 4"):
            task_arithmetic(ancestor, [make_variables(1)], 1.0)

    def test_one_scale_for_each_parent(self):
        with pytest.raises(ValueError, match="3 scales for 1 parents"):
            task_arithmetic(make_variables(0), [make_variables(1)], (1, 1, 1))


def small_network(params, images):
    """Convolution, ReLU, average, head: (n, 5, 5, 2) to (n, 3) log probabilities."""
    x = jax.lax.conv_general_dilated(
        images,
        params["conv"]["kernel"],
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    x = jax.nn.relu(x * params["bn"]["scale"] + params["bn"]["bias"]).mean((1, 2))
    return jax.nn.log_softmax(x @ params["head"]["kernel"] + params["head"]["bias"])


def brute_force_fisher(log_probs, params, images):
    """The definition, as a loop over examples and one over classes, summed in float64."""
    total = jax.tree.map(lambda x: np.zeros(np.shape(x)), params)
    differentiate = jax.jit(jax.value_and_grad(lambda p, x, c: log_probs(p, x)[0, c]))
    for image in images:
        for c in range(NUM_CLASSES):
            log_p, gradient = differentiate(params, image[None], c)
            p = np.exp(float(log_p))
            total = jax.tree.map(
                lambda t, g, p=p: t + p * np.square(g, dtype=float), total, gradient
            )
    return jax.tree.map(lambda t: t / len(images), total)


@pytest.fixture
def images(rng):
    return rng.normal(size=(11, 5, 5, 2)).astype(np.float32)


@pytest.fixture
def params():
    return make_variables(0)["params"]


class TestDiagonalFisher:
    def test_equals_the_double_loop(self, params, images):
        wanted = brute_force_fisher(small_network, params, images)
        fisher = diagonal_fisher(small_network, params, [images[:4], images[4:8], images[8:]])
        assert_trees_close(fisher, wanted, rtol=1e-5, atol=1e-9)

    def test_equals_the_formula_of_a_linear_model(self, rng):
        inputs = rng.normal(size=(20, 4))
        params = {"head": make_variables(0)["params"]["head"]}
        logits = inputs @ params["head"]["kernel"] + params["head"]["bias"]
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        variance = p * (1 - p)  # of the one-hot label under the model

        def log_probs(params, x):
            return jax.nn.log_softmax(x @ params["head"]["kernel"] + params["head"]["bias"])

        fisher = diagonal_fisher(log_probs, params, [inputs.astype(np.float32)])
        wanted = {"kernel": np.square(inputs).T @ variance / 20, "bias": variance.mean(0)}
        assert_trees_close(fisher["head"], wanted, rtol=1e-5)

    def test_of_a_multilabel_model_is_that_of_all_combinations_of_labels(self, rng):
        inputs = rng.normal(size=(6, 4)).astype(np.float32)
        params = {"head": make_variables(0)["params"]["head"]}

        def log_probs(params, x):
            logits = x @ params["head"]["kernel"] + params["head"]["bias"]
            return jax.nn.log_sigmoid(jnp.stack([-logits, logits], -1))

        def joint(params, x):
            """(n, 8): each of the three labels absent or present."""
            of_labels = log_probs(params, x)
            combinations = np.array(list(np.ndindex(2, 2, 2)))
            return sum(of_labels[:, i][:, combinations[:, i]] for i in range(3))

        fisher = diagonal_fisher(log_probs, params, [inputs])
        assert_trees_close(fisher, diagonal_fisher(joint, params, [inputs]), rtol=1e-5)

    def test_is_not_the_square_of_the_batch_gradient(self, params, images):
        fisher = flatten(diagonal_fisher(small_network, params, [images]))

        def expected(params, c):
            log_p = small_network(params, images)[:, c]
            return (jax.lax.stop_gradient(jnp.exp(log_p)) * log_p).mean()

        squares = [flatten(jax.grad(expected)(params, c)) for c in range(NUM_CLASSES)]
        batch = sum(np.sum(np.square(s["conv/kernel"])) for s in squares)
        assert float(fisher["conv/kernel"].sum()) > 2 * batch

    @pytest.mark.parametrize("classes_at_once", [1, 2, 3, 100])
    def test_does_not_depend_on_how_it_is_cut(self, params, images, classes_at_once):
        wanted = diagonal_fisher(small_network, params, [images])
        batches = (images[i : i + 1] for i in range(len(images)))
        fisher = diagonal_fisher(small_network, params, batches, classes_at_once=classes_at_once)
        assert_trees_close(fisher, wanted, rtol=1e-5, atol=1e-9)

    @pytest.mark.slow
    def test_of_a_residual_network_with_running_statistics(self, rng):
        model = CifarResNet(1, NUM_CLASSES)
        variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
        images = rng.normal(size=(3, 8, 8, 3)).astype(np.float32)

        def log_probs(params, images):
            return jax.nn.log_softmax(model.apply({**variables, "params": params}, images))

        fisher = diagonal_fisher(log_probs, variables["params"], [images[:2], images[2:]])
        wanted = brute_force_fisher(log_probs, variables["params"], images)
        scale = max(float(np.max(leaf)) for leaf in jax.tree.leaves(wanted))
        assert_trees_close(fisher, wanted, rtol=1e-4, atol=1e-5 * scale)

    def test_inputs_may_be_trees(self, params, images):
        batches = [{"images": images, "weights": np.ones(len(images), np.float32)}]

        def log_probs(params, inputs):
            return small_network(params, inputs["images"] * inputs["weights"][:, None, None, None])

        wanted = diagonal_fisher(small_network, params, [images])
        assert_trees_close(diagonal_fisher(log_probs, params, batches), wanted)

    def test_a_partial_is_compiled_once_for_all_models(self, params, images):
        traces = []

        def log_probs(shift, params, images):
            traces.append(shift)
            return small_network(params, images + shift)

        def fisher(shift):
            return diagonal_fisher(
                jax.tree_util.Partial(log_probs, np.float32(shift)), params, [images]
            )

        first, before = fisher(0), len(traces)
        second = fisher(1)
        assert len(traces) == before + 1  # for the shape of its outputs alone
        assert not np.allclose(first["conv"]["kernel"], second["conv"]["kernel"], rtol=1e-2)
        assert_trees_close(first, diagonal_fisher(small_network, params, [images]))

    def test_parameters_of_half_precision_have_a_fisher_in_float32(self, images):
        params = make_variables(0, np.float16)["params"]
        fisher = diagonal_fisher(small_network, params, [images.astype(np.float16)])
        assert {leaf.dtype for leaf in jax.tree.leaves(fisher)} == {np.dtype(np.float32)}
        single = jax.tree.map(lambda x: x.astype(np.float32), params)
        wanted = brute_force_fisher(small_network, single, images)
        assert_trees_close(fisher, wanted, rtol=0.1, atol=1e-3)

    def test_wrong_functions_are_refused(self, params, images):
        with pytest.raises(ValueError, match="no example"):
            diagonal_fisher(small_network, params, [])
        with pytest.raises(ValueError, match=r"sum to .*, not to 1"):
            diagonal_fisher(lambda p, x: jnp.exp(small_network(p, x)), params, [images])
        with pytest.raises(ValueError, match=r"shape \(3,\) for one example"):
            diagonal_fisher(lambda p, x: small_network(p, x)[0], params, [images])
        with pytest.raises(ValueError, match="classes_at_once is 0"):
            diagonal_fisher(small_network, params, [images], classes_at_once=0)
        params["conv"]["kernel"][0, 0, 0, 0] = np.nan
        with pytest.raises(ValueError, match="conv/kernel in the model: 1 of 72"):
            diagonal_fisher(small_network, params, [images])


class TestFisherAverage:
    @pytest.mark.parametrize("normalise", [True, False])
    @pytest.mark.parametrize("coefficients", [None, (0.2, 0.5, 0.3)])
    def test_is_the_published_formula(self, normalise, coefficients):
        parents = [make_variables(seed) for seed in range(3)]
        fishers = [make_fisher(seed) for seed in range(3)]
        fishers[1] = jax.tree.map(lambda f: 100 * f, fishers[1])
        fishers[2]["params"]["bn"]["bias"][:2] = 0  # below the floor
        norms = [
            np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(f))) if normalise else 1
            for f in fishers
        ]
        lambdas = [c / norm for c, norm in zip(coefficients or (1, 1, 1), norms, strict=True)]

        def formula(*leaves):
            weights = [
                c * np.maximum(fisher, 1e-6) for c, fisher in zip(lambdas, leaves[3:], strict=True)
            ]
            return sum(w * x for w, x in zip(weights, leaves[:3], strict=True)) / sum(weights)

        merged = fisher_average(parents, fishers, coefficients, normalise=normalise)
        wanted = in_float64(
            formula, *[p["params"] for p in parents], *[f["params"] for f in fishers]
        )
        assert_trees_close(merged["params"], wanted, rtol=1e-5)

    def test_running_statistics_are_averaged_by_the_coefficients(self):
        parents = [make_variables(seed) for seed in range(2)]
        merged = fisher_merge(parents, coefficients=(3, 1))
        wanted = in_float64(lambda a, b: 0.75 * a + 0.25 * b, *[p["batch_stats"] for p in parents])
        assert_trees_close(merged["batch_stats"], wanted)

    def test_equal_fishers_give_the_weighted_average(self):
        parents = [make_variables(seed) for seed in range(2)]
        merged = fisher_average(parents, [make_fisher(5)] * 2, (0.3, 0.7))
        assert_trees_close(merged, weighted_average(parents, (0.3, 0.7)))

    def test_zero_coefficient_leaves_a_parent_out(self):
        parents = [make_variables(seed) for seed in range(2)]
        assert_trees_equal(fisher_merge(parents, coefficients=(0, 1)), parents[1])

    def test_a_large_fisher_wins_where_it_is_large(self):
        parents = [{"w": np.zeros(2, np.float32)}, {"w": np.ones(2, np.float32)}]
        fishers = [{"w": np.array([1, 0], np.float32)}, {"w": np.array([0, 1], np.float32)}]
        merged = fisher_average(parents, fishers)["w"]
        np.testing.assert_allclose(merged, [1e-6, 1 - 1e-6], rtol=1e-3)

    def test_norm_of_tiny_fishers_does_not_vanish(self):
        parents = [make_variables(seed) for seed in range(2)]
        fishers = [jax.tree.map(lambda f: 1e-20 * f, make_fisher(seed)) for seed in range(2)]
        # All are far below the floor, so that only the two norms matter.
        norms = [
            np.sqrt(sum((np.float64(x) ** 2).sum() for x in jax.tree.leaves(f))) for f in fishers
        ]
        weight = norms[1] / sum(norms)
        merged = fisher_average(parents, fishers)
        wanted = weighted_average(parents, (weight, 1 - weight))
        assert_trees_close(merged["params"], wanted["params"], rtol=1e-4)

    def test_bad_input_is_named(self):
        parents = [make_variables(seed) for seed in range(2)]
        good, bad = make_fisher(0), make_fisher(1)

        def refused(message, fishers, **options):
            with pytest.raises(ValueError, match=message):
                fisher_average(parents, fishers, **options)

        refused("1 fishers for 2 parents", [good])
        bad["params"]["bn"]["bias"][1] = -1
        refused("params/bn/bias: negative in the Fisher information of parent 1", [good, bad])
        bad["params"]["bn"]["bias"][1] = np.nan
        refused("params/bn/bias in the Fisher information of parent 1: 1 of 4", [good, bad])
        del bad["params"]["bn"]["bias"]
        refused("params/bn/bias: absent in the Fisher information of parent 1", [good, bad])
        refused("params/bn/bias: absent in the Fisher information of parent 0", [bad, good])
        bad["params"]["bn"]["bias"] = np.zeros(5)
        refused(r"params/bn/bias: shape \(5,\) in the Fisher information", [good, bad])
        refused("params/bias: shape", [{"params": {"bias": np.ones(3)}}] * 2)
        zero = jax.tree.map(np.zeros_like, good)
        refused("of parent 1 is zero everywhere", [good, zero])
        fisher_average(parents, [good, zero], normalise=False)
        refused("1 coefficients for 2", [good, good], coefficients=(1,))
        refused("none negative", [good, good], coefficients=(2, -1))
        refused("not all zero", [good, good], coefficients=(0, 0))
        refused("the floor is 0", [good, good], floor=0)
