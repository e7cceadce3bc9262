"""The loss, what a step changes and what it leaves, and how often it compiles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.parameters import some_slow
from helpers.tiny_network import TwoLayers

from medmerge_jax.evaluation.metrics import METRICS
from medmerge_jax.evaluation.predictions import Predictions
from medmerge_jax.images.augment import epoch_key
from medmerge_jax.merging.trees import flatten, unflatten
from medmerge_jax.models import LinearHead, get_spec
from medmerge_jax.models.network import Network
from medmerge_jax.training import parameterization
from medmerge_jax.training.accumulation import accumulated_step
from medmerge_jax.training.loss import weighted_loss
from medmerge_jax.training.schedules import SCHEDULES, learning_rates
from medmerge_jax.training.step import Task, collapse, copy_tree, init_state, train_step

CLASSES = 3
SPEC = get_spec("resnet20")


@pytest.fixture
def batch(rng):
    return {
        "inputs": rng.integers(0, 256, (4, 16, 16, 3), np.uint8),
        "labels": rng.integers(0, CLASSES, 4).astype(np.int32),
    }


@functools.cache
def initial(num_classes, seed):
    init = jax.jit(TwoLayers(num_classes).init)
    return init(jax.random.key(seed), jnp.zeros((1, 16, 16, 3)))


def parent(seed, num_classes=CLASSES):
    variables = initial(num_classes, seed)
    shift = jax.tree.map(lambda leaf: leaf + 0.01 * seed, variables["batch_stats"])
    return {**variables, "batch_stats": shift}


def task_of(start, dtype=jnp.float32):
    network = Network(TwoLayers(CLASSES, dtype), SPEC.preprocessing)
    return Task(network, start.assemble, start.train_batch_norm, False)


def step(task, state, start, batch, rate=1e-3, key=None, decay=1e-2):
    weights, scalars = jnp.ones(CLASSES), np.float32([rate, decay])
    return train_step(task, state, start.frozen, batch, *scalars, weights, key)


def test_weighted_cross_entropy_is_pytorchs(torch, rng):
    logits, labels = rng.normal(size=(8, 5)).astype(np.float32), rng.integers(0, 5, 8)
    weights = rng.uniform(0.1, 3, 5).astype(np.float32)
    wanted = torch.nn.functional.cross_entropy(*map(torch.from_numpy, (logits, labels, weights)))
    found = weighted_loss(logits, labels, weights, multilabel=False)
    assert float(found) == pytest.approx(wanted.item(), rel=1e-6)


def test_multilabel_loss_is_pytorchs_on_the_known_labels(torch, rng):
    logits = rng.normal(size=(8, 5)).astype(np.float32)
    labels = rng.integers(0, 2, (8, 5)).astype(np.float32)
    unknown = rng.random((8, 5)) < 0.3
    weights = rng.uniform(0.1, 3, 5).astype(np.float32)
    losses = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.from_numpy(logits), torch.from_numpy(labels),
        pos_weight=torch.from_numpy(weights), reduction="none",
    )  # fmt: skip
    wanted = losses.numpy()[~unknown].mean()
    labels[unknown] = np.nan
    found, gradient = jax.value_and_grad(weighted_loss)(logits, labels, weights, multilabel=True)
    assert float(found) == pytest.approx(wanted, rel=1e-6)
    assert np.isfinite(gradient).all()
    assert not gradient[unknown].any()


def test_weights_of_whole_labels_are_fission_fusions(torch, rng):
    """The sum over labels of w times PyTorch's mean over the examples whose label is known."""
    logits = rng.normal(size=(8, 5)).astype(np.float32)
    labels = rng.integers(0, 2, (8, 5)).astype(np.float32)
    labels[rng.random((8, 5)) < 0.3] = np.nan
    labels[:, 3] = np.nan  # of this label nothing is known
    weights = rng.uniform(0.1, 3, 5).astype(np.float32)
    outputs = torch.from_numpy(logits.copy()).requires_grad_()
    wanted = torch.zeros(())
    for label in range(5):
        known = ~torch.isnan(torch.from_numpy(labels[:, label]))
        targets = torch.from_numpy(labels[:, label])[known]
        if len(targets):
            cross_entropy = torch.nn.functional.binary_cross_entropy_with_logits
            wanted = wanted + float(weights[label]) * cross_entropy(outputs[known, label], targets)
    wanted.backward()
    found, gradient = jax.value_and_grad(weighted_loss)(
        logits, labels, weights[None], multilabel=True
    )
    assert float(found) == pytest.approx(wanted.item(), rel=1e-6)
    np.testing.assert_allclose(gradient, outputs.grad.numpy(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["classes", "labels", "row"])
def test_the_loss_is_that_of_the_metrics(rng, kind):
    """Without PyTorch too: with class weights, and of several labels of those that are known."""
    logits, weights = rng.normal(size=(8, 5)), np.array([0.1, 3, 1, 0.5, 2])
    labels = rng.integers(0, 5, 8)
    if kind != "classes":
        labels = rng.choice([0, 1, np.nan], (8, 5))
        labels[:, 3] = np.nan  # of this label nothing is known
    loss = METRICS["loss"]
    if kind == "row":  # each label's own mean
        each = [
            loss(Predictions(logits[:, [one]], labels[:, [one]], True)) or 0.0 for one in range(5)
        ]
        wanted, given = weights @ each, weights[None]
    else:
        said = Predictions(logits, labels, kind == "labels", class_weights=weights)
        wanted, given = loss(said), weights
    with jax.enable_x64(True):
        found, gradient = jax.value_and_grad(weighted_loss)(
            logits, labels, given, multilabel=kind != "classes"
        )
    assert float(found) == pytest.approx(wanted, rel=1e-9)
    assert np.isfinite(gradient).all()
    if kind != "classes":
        np.testing.assert_array_equal(np.asarray(gradient) == 0, np.isnan(labels))


@pytest.mark.parametrize("train_batch_norm", some_slow((True, False), False))
def test_a_merge_step_changes_what_is_trained_and_nothing_else(batch, train_batch_norm):
    parents = [parent(0), parent(1, num_classes=7)]
    head = parent(2)["params"]["head"]
    start = parameterization.merge_linear_probe(parents, head, train_batch_norm=train_batch_norm)
    task = task_of(start)
    state, _ = step(task, init_state(start), start, batch)
    before, after = flatten(start.trainable), flatten(state.trainable)
    kinds = {path.rsplit("/", 1)[-1] for path in before if path.startswith("params/norm")}
    assert kinds == ({"scale", "bias"} if train_batch_norm else set())
    for path in before:
        assert not np.array_equal(before[path], after[path]), path
    means = jax.tree.map(lambda *leaves: sum(leaves) / 2, *(p["batch_stats"] for p in parents))
    for path, leaf in flatten(state.batch_stats).items():
        np.testing.assert_allclose(
            flatten(start.batch_stats)[path], flatten(means)[path], rtol=1e-6
        )
        assert np.array_equal(leaf, flatten(start.batch_stats)[path]) != train_batch_norm, path
    # Collapsed, it is an ordinary model.
    params = collapse(start.assemble, state.trainable, start.frozen)
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (params, parents[0]["params"])]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("init", [(1, 0), (0, 1), (0, 1, 0)])
@pytest.mark.parametrize("train_batch_norm", [True, False])
def test_a_merge_can_start_from_one_of_the_parents_to_the_bit(init, train_batch_norm):
    parents = [parent(seed) for seed in range(len(init))]
    anchor = parents[init.index(1)]
    start = parameterization.merge_linear_probe(
        parents, anchor["params"]["head"], init=init, train_batch_norm=train_batch_norm
    )
    variables = {
        "params": collapse(start.assemble, start.trainable, start.frozen),
        "batch_stats": start.batch_stats,
    }
    found, wanted = flatten(variables), flatten(anchor)
    assert found.keys() == wanted.keys()
    for path, leaf in wanted.items():
        assert np.asarray(found[path]).tobytes() == np.asarray(leaf).tobytes(), path


def test_a_start_beyond_the_parents_has_variances_that_are_some():
    parents = [parent(0), parent(1)]
    parents[1]["batch_stats"] = jax.tree.map(lambda leaf: 5 * leaf, parents[1]["batch_stats"])
    head = parents[0]["params"]["head"]
    start = parameterization.merge_linear_probe(parents, head, init=(1.5, -0.5))
    b, c = (flatten(one["batch_stats"]) for one in parents)
    for path, leaf in flatten(start.batch_stats).items():
        least = np.minimum(b[path], c[path]) if path.endswith("/var") else -np.inf
        wanted = np.maximum(1.5 * b[path] - 0.5 * c[path], least)
        np.testing.assert_allclose(leaf, wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("decay_to", "parts"),
    [
        *(("zero", 0), ("init", 1)),
        *(pytest.param(to, 0, marks=pytest.mark.slow) for to in ("init", "none")),
    ],
)
def test_coefficients_have_a_rate_and_a_decay_of_their_own(batch, decay_to, parts):
    """Of which nothing else notices; the second step decays from where the first one ended."""
    take, batch = (accumulated_step, (batch,)) if parts else (train_step, batch)
    options = {"init": (0.8, 0.2), "decay_to": decay_to}
    parents = [parent(0), parent(1)]
    start = parameterization.merge_linear_probe(parents, parents[0]["params"]["head"], **options)
    task, ends, factor = task_of(start), {}, start.weight_decay.get("coefficients", 1.0)
    for decay in (0.0, 0.5):
        of_part = {"params": jnp.float32(0.0), "coefficients": jnp.float32(factor * decay)}
        for rate in (1e-3, 1e-2):
            rates = {"params": jnp.float32(1e-3), "coefficients": jnp.float32(rate)}
            arguments = rates, of_part, jnp.ones(CLASSES), None
            state, _ = take(task, init_state(start), start.frozen, batch, *arguments)
            ends[decay, rate] = state.trainable
    for path, first in flatten(start.trainable).items():
        end = {key: flatten(tree)[path] for key, tree in ends.items()}
        if path.startswith("params/"):
            assert all(np.array_equal(leaf, end[0.0, 1e-3]) for leaf in end.values())
            continue
        np.testing.assert_allclose(
            end[0.0, 1e-2] - first, 10 * (end[0.0, 1e-3] - first), rtol=1e-2, atol=1e-6
        )
        pulled = -1e-2 * 0.5 * 0.8 if decay_to == "zero" else 0.0
        np.testing.assert_allclose(end[0.5, 1e-2] - end[0.0, 1e-2], pulled, atol=1e-6)


def test_one_compilation_for_all_rates_of_coefficients(batch):
    parents = [parent(0), parent(1)]
    head, compiled = parents[0]["params"]["head"], None
    for learning_rate in (0.0, 1e-2):
        start = parameterization.merge_linear_probe(parents, head, learning_rate=learning_rate)
        rate = start.learning_rate.get("coefficients", 1e-3)
        rates = {"params": np.float32(1e-3), "coefficients": np.float32(rate)}
        constants = {part: np.float32(1e-2) for part in rates}, jnp.ones(CLASSES), None
        train_step(task_of(start), init_state(start), start.frozen, batch, rates, *constants)
        compiled = compiled or train_step._cache_size()
    assert train_step._cache_size() == compiled


def test_a_probe_trains_the_head_and_on_request_the_batch_norms():
    variables = parent(0)
    head = parameterization.linear_probe(variables)
    assert flatten(head.trainable).keys() == {"params/head/kernel", "params/head/bias"}
    norms = parameterization.linear_probe(variables, norms="train")
    assert len(flatten(norms.trainable)) == 2 + 2 * 2
    drift = parameterization.linear_probe(variables, norms="drift")  # the statistics alone
    assert flatten(drift.trainable).keys() == flatten(head.trainable).keys()
    assert [one.train_batch_norm for one in (head, drift, norms)] == [False, True, True]
    for start in (head, drift, norms):
        params = flatten(start.assemble(start.trainable, start.frozen))
        for path, leaf in flatten(variables["params"]).items():
            np.testing.assert_array_equal(params[path], leaf)


def test_a_state_is_donated_and_its_start_is_not(batch):
    start = parameterization.fine_tune(parent(0))
    task = task_of(start)
    state = init_state(start)
    step(task, state, start, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.trainable))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(start.trainable))


def test_a_stage_may_go_on_with_the_optimizer_of_another(batch):
    """Its first step is then the other's next one."""
    start = parameterization.fine_tune(parent(0))
    task = task_of(start)
    state, _ = step(task, init_state(start), start, batch)
    ended = {"params": unflatten(state.trainable["params"]), "batch_stats": state.batch_stats}
    later = [parameterization.fine_tune(ended, one) for one in (copy_tree(state.opt_state), None)]
    found, anew = (step(task, init_state(one), one, batch)[0].trainable for one in later)
    wanted = step(task, state, start, batch)[0].trainable
    for path, leaf in flatten(wanted).items():
        np.testing.assert_array_equal(flatten(found)[path], leaf)
        assert not np.array_equal(flatten(anew)[path], leaf)


def test_one_compilation_for_all_rates_and_equal_tasks(batch):
    start = parameterization.fine_tune(parent(0))
    state = init_state(start)
    state, _ = step(task_of(start), state, start, batch)
    compiled = train_step._cache_size()
    for rate in (1e-3, 1e-5):
        state, _ = step(task_of(start), state, start, batch, rate)
    assert train_step._cache_size() == compiled


def test_of_what_a_step_has_no_use_for_nothing_is_computed(batch):
    """The program is the one of a batch without indices and of no key: its results are too."""
    start = parameterization.fine_tune(parent(0))
    task = task_of(start)
    arguments = (task, init_state(start), start.frozen)
    programs = [
        train_step.lower(
            *arguments, images, *np.float32([1e-3, 1e-2]), jnp.ones(CLASSES), key
        ).as_text()
        for images, key in (
            (batch, None),
            ({**batch, "indices": np.arange(4, dtype=np.int32)}, epoch_key(0, 0)),
        )
    ]
    assert programs[0] == programs[1]


def test_the_first_step_whose_loss_is_not_finite_is_remembered(batch):
    start = parameterization.fine_tune(parent(0))
    task = task_of(start)
    state = init_state(start)
    for rate in (1e-3, np.inf, 1e-3, 1e-3):
        assert int(state.bad_step) == -1
        state, _ = step(task, state, start, batch, rate)
        if rate == np.inf:
            break
    state, _ = step(task, state, start, batch)
    state, _ = step(task, state, start, batch)
    assert int(state.bad_step) == 2


def test_bfloat16_computes_and_keeps_float32(batch):
    start = parameterization.fine_tune(parent(0))
    losses = []
    for dtype in (jnp.float32, jnp.bfloat16):
        task = task_of(start, dtype)
        state, loss = step(task, init_state(start), start, batch)
        losses.append(float(loss))
        kept = jax.tree.leaves((state.trainable, state.batch_stats))
        assert {leaf.dtype for leaf in kept} == {jnp.dtype(jnp.float32)}
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_weight_decay_is_a_part_of_the_step(rng):
    """Decoupled: a step changes a parameter p by −rate · (Adam's direction + decay · p)."""
    batch = {"inputs": rng.normal(size=(4, 5)).astype(np.float32), "labels": np.arange(4) % CLASSES}
    head = LinearHead(CLASSES)
    start = parameterization.fine_tune(head.init(jax.random.key(0), batch["inputs"]))
    task = Task(Network(head), start.assemble, start.train_batch_norm, False)
    ends = [
        flatten(step(task, init_state(start), start, batch, decay=decay)[0].trainable)
        for decay in (0.0, 0.5)
    ]
    for path, leaf in flatten(start.trainable).items():
        np.testing.assert_allclose(ends[1][path] - ends[0][path], -1e-3 * 0.5 * leaf, rtol=1e-2,
                                   atol=1e-7)  # fmt: skip


@pytest.mark.parametrize(
    "multilabel, row",
    [(False, False), (True, True), pytest.param(True, False, marks=pytest.mark.slow)],
)
def test_a_batch_in_parts_is_the_whole_batch(rng, multilabel, row):
    """Also where the parts differ in size, weight and unknown labels."""
    inputs = rng.normal(size=(7, 5)).astype(np.float32)
    labels = rng.integers(0, CLASSES, 7).astype(np.int32)
    if multilabel:
        labels = rng.integers(0, 2, (7, CLASSES)).astype(np.float32)
        labels[:3, :2] = np.nan
    head, weights = LinearHead(CLASSES), jnp.array([0.2, 1.0, 3.0])
    weights = weights[None] if row else weights
    start = parameterization.fine_tune(head.init(jax.random.key(0), inputs))
    task = Task(Network(head), start.assemble, start.train_batch_norm, multilabel)
    batch = {"inputs": inputs, "labels": labels}
    parts = tuple({name: a[rows] for name, a in batch.items()} for rows in (slice(4), slice(4, 7)))
    ends = []
    for take, given in ((train_step, batch), (accumulated_step, parts)):
        state, losses = init_state(start), []
        for _ in range(3):
            state, loss = take(task, state, {"params": {}}, given, *np.float32([0.1, 0]), weights)
            losses.append(float(loss))
        ends.append((flatten(state.trainable), losses, float(state.loss_sum), int(state.step)))
    for path, leaf in ends[0][0].items():
        np.testing.assert_allclose(ends[1][0][path], leaf, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(ends[1][1], ends[0][1], rtol=1e-5)
    assert ends[1][2:] == (pytest.approx(sum(ends[0][1]), rel=1e-5), 3)


def test_batch_norms_see_the_parts_of_a_batch_one_after_another(batch):
    start = parameterization.fine_tune(parent(0))
    parts = tuple({name: a[rows] for name, a in batch.items()} for rows in (slice(2), slice(2, 4)))
    constants, task = (jnp.float32(0.0), jnp.float32(0.0), jnp.ones(CLASSES)), task_of(start)
    found, _ = accumulated_step(task, init_state(start), start.frozen, parts, *constants)
    wanted = init_state(start)
    for part in parts:  # steps of rate 0, which change nothing else
        wanted, _ = train_step(task, wanted, start.frozen, part, *constants)
    for path, leaf in flatten(wanted.batch_stats).items():
        np.testing.assert_allclose(flatten(found.batch_stats)[path], leaf, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("steps, warmup", [(1, 0), (1, 1), (7, 0), (9, 3), (5000, 4500), (4, 9)])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_learning_rates_are_those_of_the_formulas(schedule, steps, warmup):
    formulas = {
        "constant": lambda t: np.ones_like(t),
        "cosine": lambda t: (1 + np.cos(np.pi * t)) / 2,
        "linear": lambda t: 1 - t,
        "exponential": lambda t: 100.0**-t,
    }
    number = np.arange(steps)
    t = np.clip((number - warmup) / max(steps - warmup, 1), 0, 1)
    rising = (number + 1) / max(warmup, 1)
    expected = 0.3 * np.where(number < warmup, rising, formulas[schedule](t))
    rates = learning_rates(schedule, 0.3, steps, warmup_steps=warmup)
    assert rates.dtype == np.float32
    np.testing.assert_allclose(rates, expected, rtol=1e-7)
    if schedule == "constant":
        np.testing.assert_array_equal(rates, expected.astype(np.float32))


def test_learning_rates():
    constant = learning_rates("constant", 0.5, 10, warmup_steps=4)
    np.testing.assert_allclose(constant[:5], [0.125, 0.25, 0.375, 0.5, 0.5])
    cosine = learning_rates("cosine", 1.0, 8)
    np.testing.assert_allclose(cosine, 0.5 * (1 + np.cos(np.pi * np.arange(8) / 8)), rtol=1e-6)
    warm = learning_rates("cosine", 1.0, 8, warmup_steps=2)
    np.testing.assert_allclose(warm[:3], [0.5, 1.0, 1.0])
    assert (np.diff(warm[2:]) < 0).all()
