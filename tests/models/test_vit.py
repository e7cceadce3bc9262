"""Vision transformers compute what timm's and torchvision's do, and are merged by unit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.torch_reference import relative_error, state

import medmerge_jax as mm
from medmerge_jax.errors import UserError
from medmerge_jax.merging.trees import flatten, network_order, unflatten
from medmerge_jax.models import Preprocessing, create_model, get_spec, vit
from medmerge_jax.models.network import Network
from medmerge_jax.training import parameterization
from medmerge_jax.training.blocks import by_block
from medmerge_jax.training.step import Task, init_state, train_step
from medmerge_jax.weights import read_tensors, variables_from_torch, variables_to_torch
from medmerge_jax.weights.fit import MisfitError
from medmerge_jax.weights.heads import joined, separated
from medmerge_jax.weights.normalisation import fold_normalisation

CLASSES = 5
TINY = "deit_tiny_patch16_224"
WIDTH, DEPTH, HEADS, GRID = 24, 2, 3, 2
"""Of a transformer that is small enough for float64."""
NETWORKS = [
    *(f"{family}_{size}_patch16_224" for family in ("vit", "deit") for size in ("tiny", "small")),
    "deit_tiny_distilled_patch16_224",
]


@pytest.fixture(scope="module")
def timm(torchvision):
    return pytest.importorskip("timm")


@pytest.fixture
def float64(torch):
    torch.set_default_dtype(torch.float64)
    with jax.enable_x64(True):
        yield
    torch.set_default_dtype(torch.float32)


def shaken(torch, network, seed=0):
    """With no parameter at the value that it is initialised with: zeros would hide mistakes."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def images_of(rng, size, count=2):
    return rng.normal(size=(count, size, size, 3)).astype(np.float32)


def to_torch(torch, images):
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def logits_of(torch, network, images):
    network.eval()
    with torch.no_grad():
        return network(to_torch(torch, images)).numpy()


@pytest.mark.parametrize(
    "name", [n if n == TINY else pytest.param(n, marks=pytest.mark.slow) for n in NETWORKS]
)
def test_logits_and_files_are_timms(torch, timm, rng, tmp_path, name):
    network = shaken(torch, timm.create_model(name, num_classes=CLASSES))
    tensors, images = state(network), images_of(rng, 224, 1)
    variables = variables_from_torch(name, tensors, "timm's")
    found = jax.jit(create_model(name, CLASSES).apply)(variables, images)
    assert relative_error(found, logits_of(torch, network, images)) <= 1e-5

    mm.save_weights(tmp_path / "model.safetensors", name, variables)
    written = read_tensors(tmp_path / "model.safetensors")
    assert set(written) == set(tensors)
    if "head_dist.bias" in tensors:  # both heads are read as one, see `weights.heads`
        mean = (tensors["head.bias"] + tensors["head_dist.bias"]) / 2
        tensors |= {"head.bias": mean, "head_dist.bias": mean}
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(written[key], tensor)
    fresh = timm.create_model(name, num_classes=CLASSES)
    fresh.load_state_dict({k: torch.from_numpy(v) for k, v in written.items()}, strict=True)
    assert relative_error(found, logits_of(torch, fresh, images)) <= 1e-5


def test_the_heads_of_a_distilled_transformer_are_one(rng):
    """Behind any prefix; what has no second head that fits is left as it is."""
    spec = get_spec("deit_tiny_distilled_patch16_224")
    heads = {
        f"module.{head}.{part}": rng.normal(size=shape).astype(np.float32)
        for head in ("head", "head_dist")
        for part, shape in (("weight", (CLASSES, 192)), ("bias", (CLASSES,)))
    }
    features = rng.normal(size=(2, 192)).astype(np.float32)
    wanted = np.mean(
        [
            heads[f"module.{head}.weight"] @ x + heads[f"module.{head}.bias"]
            for head, x in zip(("head", "head_dist"), features, strict=True)
        ],
        axis=0,
    )
    one = {name: np.asarray(x) for name, x in joined(spec, heads).items()}
    assert set(one) == {"module.head.weight", "module.head.bias"}
    logits = one["module.head.weight"] @ features.ravel() + one["module.head.bias"]
    np.testing.assert_allclose(logits, wanted, rtol=1e-5)
    again = separated(spec, {name.removeprefix("module."): x for name, x in one.items()})
    np.testing.assert_array_equal(again["head_dist.weight"], heads["module.head_dist.weight"])
    alone = {name: x for name, x in heads.items() if "dist.bias" not in name}
    assert joined(spec, alone) == alone
    assert joined(get_spec(TINY), heads) == heads


@pytest.mark.parametrize("size", [96, pytest.param(384, marks=pytest.mark.slow)])
def test_positions_of_other_sizes_are_timms(torch, timm, rng, size):
    network = shaken(torch, timm.create_model(TINY, num_classes=CLASSES, dynamic_img_size=True))
    images = images_of(rng, size, 1)
    variables = variables_from_torch(TINY, state(network), "timm's")
    found = jax.jit(create_model(TINY, CLASSES).apply)(variables, images)
    assert relative_error(found, logits_of(torch, network, images)) <= 1e-4


@pytest.mark.slow
def test_torchvisions_vit_is_read_and_written(torch, torchvision, rng):
    name = "vit_base_patch16_224"
    network = shaken(torch, torchvision.models.vit_b_16(num_classes=CLASSES))
    tensors, images = state(network), images_of(rng, 224, 1)
    variables = variables_from_torch(name, tensors, "torchvision's")
    found = jax.jit(create_model(name, CLASSES).apply)(variables, images)
    assert relative_error(found, logits_of(torch, network, images)) <= 1e-5
    rename = get_spec(name).elsewhere["torchvision"].rename
    written = {rename(key): x for key, x in variables_to_torch(name, variables).items()}
    assert set(written) == set(tensors)
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(written[key], tensor)


def test_each_of_torchvisions_names_is_known(torch, torchvision):
    spec = get_spec("vit_base_patch16_224")
    with torch.device("meta"):
        names = list(torchvision.models.vit_b_16().state_dict())
    ours = {
        spec.torch_name("params", path): leaf for path, leaf in spec.shapes(5)["params"].items()
    }
    assert {spec.usual_name(name) for name in names} == set(ours)
    assert [spec.elsewhere["torchvision"].rename(spec.usual_name(name)) for name in names] == names


@pytest.mark.parametrize(
    "name", ["resnet18", pytest.param("densenet121", marks=pytest.mark.slow), TINY]
)
def test_depths_are_those_by_which_timm_scales_rates(torch, timm, name):
    from timm.optim import param_groups_layer_decay

    with torch.device("meta"):
        network = timm.create_model(name, num_classes=2)
    groups = param_groups_layer_decay(network, layer_decay=0.5)
    scales = {id(one): group["lr_scale"] for group in groups for one in group["params"]}
    theirs = {path: scales[id(one)] for path, one in network.named_parameters()}
    spec = get_spec(name)
    last = spec.num_blocks + 1
    depths = spec.depths(spec.shapes(2)["params"])
    for path, depth in depths.items():
        if not path.startswith("norm/"):  # timm's is of the last block, BEiT's and ours behind it
            assert 0.5 ** (last - depth) == theirs[spec.torch_name("params", path)], path


def small_networks(torch, timm, count=1, width=WIDTH, depth=DEPTH, grid=GRID):
    make = functools.partial(
        timm.models.vision_transformer.VisionTransformer,
        img_size=16 * grid, embed_dim=width, depth=depth, num_heads=HEADS, num_classes=CLASSES,
    )  # fmt: skip
    return [shaken(torch, make(), seed).double() for seed in range(count)]


def small_model(num_classes=CLASSES, width=WIDTH, depth=DEPTH, grid=GRID, **options):
    dtype = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
    return vit.VisionTransformer(width, depth, HEADS, num_classes, dtype, grid=grid, **options)


def small_variables(network):
    """From PyTorch's names by the same rules as the registered networks'."""
    spec = get_spec(TINY)
    params = {}
    for name, tensor in state(network).items():
        path = name.replace(".", "/")
        if path.endswith("/weight"):
            last = "scale" if "norm" in path else "kernel"
            path = path.removesuffix("weight") + last
        axes = np.argsort(spec.torch_axes(path, tensor.ndim))
        params[path] = tensor.transpose(axes)
    return {"params": unflatten(params)}


def test_gradients_are_timms(torch, timm, rng, float64):
    (network,) = small_networks(torch, timm)
    images, labels = rng.normal(size=(4, 32, 32, 3)), np.arange(4) % CLASSES
    network.train()
    loss = torch.nn.functional.cross_entropy(
        network(to_torch(torch, images)), torch.from_numpy(labels)
    )
    loss.backward()
    wanted = small_variables(network)
    model = small_model()

    def ours(variables):
        scores = jax.nn.log_softmax(model.apply(variables, images, train=True))
        return -scores[np.arange(4), labels].mean()

    value, gradients = jax.value_and_grad(ours)(wanted)
    assert float(value) == pytest.approx(loss.item(), rel=1e-12)
    for parameter in network.parameters():
        parameter.data = parameter.grad
    by_torch, by_us = flatten(small_variables(network)), flatten(gradients)
    assert set(by_torch) == set(by_us)
    for path, gradient in by_torch.items():
        assert relative_error(by_us[path], gradient) <= 1e-9, path


def test_paths_are_dropped_by_image_and_only_in_training(rng):
    model = small_model(drop_path=0.5)
    images = jnp.repeat(images_of(rng, 32, 1), 64, axis=0)
    variables = jax.jit(model.init)(jax.random.key(0), images[:1])
    apply = jax.jit(model.apply, static_argnames="train")
    still = apply(variables, images)
    np.testing.assert_allclose(still, jnp.broadcast_to(still[:1], still.shape), atol=1e-6)
    never = jax.jit(small_model().apply, static_argnames="train")
    np.testing.assert_allclose(still, never(variables, images, train=True), atol=1e-6)

    def trained(seed):
        key = jax.random.key(seed)
        return apply(variables, images, train=True, rngs={"drop_path": key})

    np.testing.assert_array_equal(trained(1), trained(1))
    assert np.abs(trained(1) - trained(2)).max() > 1e-4
    # The first block is never dropped, the second with its attention, its perceptron or both:
    # four kinds of images.
    assert len(np.unique(np.round(np.asarray(trained(1)), 4), axis=0)) == 4


def test_a_head_has_one_coefficient_and_a_unit_its_bias(rng):
    spec = get_spec(TINY)
    shapes = spec.shapes(0)["params"]
    coefficients = flatten(mm.init_coefficients(shapes, is_kernel=is_kernel(spec), tie=spec.tie))
    assert {path.rpartition("/")[2] for path in coefficients} == {"kernel"}
    assert len(coefficients) == 1 + 4 * 12
    assert coefficients["blocks/3/attn/qkv/kernel"].shape == (3,)
    assert coefficients["blocks/3/mlp/fc1/kernel"].shape == (768,)
    assert coefficients["patch_embed/proj/kernel"].shape == (192,)
    order = sorted(coefficients, key=network_order)
    assert order[:5] == [
        "patch_embed/proj/kernel",
        *(f"blocks/0/{path}/kernel" for path in ("attn/qkv", "attn/proj", "mlp/fc1", "mlp/fc2")),
    ]
    finer = flatten(
        mm.init_coefficients(shapes, is_kernel=is_kernel(spec), tie=spec.tie, granularity="row")
    )
    assert finer["blocks/3/attn/qkv/kernel"].shape == (576,) and set(finer) == set(coefficients)
    whole = flatten(
        mm.init_coefficients(shapes, is_kernel=is_kernel(spec), tie=spec.tie, granularity="layer")
    )
    assert {x.shape for x in whole.values()} == {()} and set(whole) == set(coefficients)
    numbers = flatten(
        mm.init_coefficients(
            shapes, is_kernel=is_kernel(spec), tie=spec.tie, granularity="parameter"
        )
    )
    assert numbers["blocks/3/attn/qkv/bias"].shape == (576,)


def is_kernel(spec):
    return lambda path, leaf: spec.role(path, leaf) == "kernel"


def test_attention_is_blended_by_head(rng):
    """Against loops over heads and units."""
    spec_tie = functools.partial(vit.tie, HEADS)
    init, shake = small_model(0).init, np.random.default_rng(0)
    shapes = flatten(jax.eval_shape(init, jax.random.key(0), images_of(rng, 32, 1))["params"])
    parents = [
        {path: shake.normal(size=x.shape).astype(np.float32) for path, x in shapes.items()}
        for _ in range(2)
    ]
    kernel = lambda path, leaf: vit.role(path, leaf) == "kernel"  # noqa: E731
    start = mm.init_coefficients(unflatten(parents[0]), is_kernel=kernel, tie=spec_tie)
    values = {p: shake.uniform(size=x.shape).astype(np.float32) for p, x in flatten(start).items()}
    merged = flatten(
        mm.merge_kernels(
            [unflatten(one) for one in parents], unflatten(values), is_kernel=kernel, tie=spec_tie
        )
    )
    b, c = parents
    each = WIDTH // HEADS
    for part in ("kernel", "bias"):
        path = f"blocks/1/attn/qkv/{part}"
        wanted = np.empty_like(b[path])
        for third in range(3):
            for head in range(HEADS):
                w = values["blocks/1/attn/qkv/kernel"][head]
                units = slice(third * WIDTH + head * each, third * WIDTH + (head + 1) * each)
                wanted[..., units] = w * b[path][..., units] + (1 - w) * c[path][..., units]
        np.testing.assert_allclose(merged[path], wanted, rtol=1e-5, atol=1e-6)
        path = f"blocks/0/mlp/fc1/{part}"
        w = values["blocks/0/mlp/fc1/kernel"]
        np.testing.assert_allclose(
            merged[path], w * b[path] + (1 - w) * c[path], rtol=1e-5, atol=1e-6
        )
    for path in ("cls_token", "pos_embed", "norm/scale", "blocks/0/norm1/bias"):
        np.testing.assert_allclose(merged[path], (b[path] + c[path]) / 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("width", "depth", "grid"),
    [(WIDTH, DEPTH, GRID), pytest.param(192, 12, 14, id="DeiT-Tiny", marks=pytest.mark.slow)],
)
def test_the_merge_linear_probe_is_an_independent_one_in_pytorch(
    torch, timm, rng, float64, width, depth, grid
):
    sizes = {"width": width, "depth": depth, "grid": grid}
    networks = small_networks(torch, timm, 2, **sizes)
    parents = [small_variables(network) for network in networks]
    head = {"kernel": rng.normal(0, 0.1, (width, CLASSES)), "bias": rng.normal(0, 0.1, CLASSES)}
    batches = [
        {
            "inputs": rng.normal(size=(4, 16 * grid, 16 * grid, 3)),
            "labels": rng.integers(0, CLASSES, 4).astype(np.int32),
        }
        for _ in range(8)
    ]
    start = parameterization.merge_linear_probe(
        parents, head, role=vit.role, tie=functools.partial(vit.tie, HEADS)
    )
    exact = {
        part: jax.tree.map(np.float64, getattr(start, part)) for part in ("trainable", "frozen")
    }
    start = dataclasses.replace(start, **exact)
    losses, state_after = our_training(start, batches, 1e-2, small_model(**sizes))
    coefficients = flatten(state_after.trainable["coefficients"])
    wanted, expected = torch_probe(torch, networks, head, batches, 1e-2)
    np.testing.assert_allclose(losses, wanted, rtol=1e-9)
    assert set(coefficients) == set(expected)
    for path, value in expected.items():
        np.testing.assert_allclose(coefficients[path], value, atol=1e-9, err_msg=path)
    moved = np.concatenate([np.ravel(value) for value in expected.values()]) - 0.5
    assert np.abs(moved).mean() > 0.01


def our_training(start, batches, rate, model=None):
    model = small_model() if model is None else model
    network = Network(model, Preprocessing(size=16 * model.grid))
    task = Task(network, start.assemble, start.train_batch_norm, False)
    train_state, losses = init_state(start)._replace(loss_sum=jnp.zeros(())), []
    numbers = jax.tree.map(np.float64, [dict.fromkeys(start.trainable, rate), 1e-2])
    for batch in batches:
        train_state, loss = train_step(
            task, train_state, start.frozen, batch, *numbers, jnp.ones(CLASSES)
        )
        losses.append(float(loss))
    return losses, train_state


@pytest.mark.parametrize("blocks", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_fine_tuning_is_an_adamw_with_parameter_groups_in_pytorch(
    torch, timm, rng, float64, blocks
):
    (network,) = small_networks(torch, timm)
    variables = small_variables(network)
    depths = get_spec(TINY).depths(flatten(variables["params"]))
    start = parameterization.fine_tune(variables)
    start = by_block(start, depths, blocks=blocks, layer_decay=0.75)
    start = dataclasses.replace(start, frozen=jax.tree.map(np.float64, start.frozen))
    batches = [
        {
            "inputs": rng.normal(size=(4, 32, 32, 3)),
            "labels": rng.integers(0, CLASSES, 4).astype(np.int32),
        }
        for _ in range(3)
    ]
    losses, after = our_training(start, batches, 1e-2)
    groups, powers = [], {"blocks.0.": 2, "blocks.1.": 1, "norm.": 0, "head.": 0}
    for name, parameter in network.named_parameters():
        power = next((n for part, n in powers.items() if name.startswith(part)), 3)
        parameter.requires_grad_(not blocks or power < 2)
        if parameter.requires_grad:
            groups.append({"params": [parameter], "lr": 1e-2 * 0.75**power})
    optimiser = torch.optim.AdamW(groups, weight_decay=1e-2)
    network.train()
    for batch, found in zip(batches, losses, strict=True):
        scores = network(to_torch(torch, batch["inputs"]))
        loss = torch.nn.functional.cross_entropy(scores, torch.from_numpy(batch["labels"]).long())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        assert found == pytest.approx(loss.item(), rel=1e-9)
    wanted = flatten(small_variables(network)["params"])
    found = start.assemble(after.trainable, start.frozen)
    assert set(found) == set(wanted)
    for path, leaf in wanted.items():
        np.testing.assert_allclose(found[path], leaf, atol=1e-9, err_msg=path)
    assert set(after.trainable["params"]) == {p for p in wanted if not blocks or depths[p] > 1}


def torch_probe(torch, networks, head, batches, rate):
    """Written with PyTorch's names and layouts, heads by reshaping."""
    b, c = ({k: v.detach() for k, v in network.named_parameters()} for network in networks)
    blended = [
        n
        for n in b
        if n.endswith(("weight", "bias")) and "norm" not in n and not n.startswith("head")
    ]
    rows = {
        n.rpartition(".")[0]: torch.full((HEADS if "qkv" in n else b[n].shape[0],), 0.5)
        for n in blended
    }
    own = {n: (b[n] + c[n]) / 2 for n in b if n not in blended and not n.startswith("head")}
    own["head.weight"] = torch.from_numpy(head["kernel"].T.copy())
    own["head.bias"] = torch.from_numpy(head["bias"].copy())
    for tensor in (*rows.values(), *own.values()):
        tensor.requires_grad_(True)
    optimiser = torch.optim.AdamW([*rows.values(), *own.values()], rate, weight_decay=1e-2)
    losses = []
    for batch in batches:
        params = dict(own)
        for name in blended:
            w = rows[name.rpartition(".")[0]]
            if "qkv" in name:
                w = w[None, :, None].expand(3, HEADS, len(b[name]) // 3 // HEADS).reshape(-1)
            w = w.reshape(-1, *[1] * (b[name].ndim - 1))
            params[name] = w * b[name] + (1 - w) * c[name]
        scores = torch.func.functional_call(networks[0], params, to_torch(torch, batch["inputs"]))
        loss = torch.nn.functional.cross_entropy(scores, torch.from_numpy(batch["labels"]).long())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses, {
        f"{name.replace('.', '/')}/kernel": value.detach().numpy() for name, value in rows.items()
    }


@pytest.mark.slow
def test_another_normalisation_is_folded_into_the_stem_exactly(rng):
    given = Preprocessing(224, "crop", (0.5,) * 3, (0.5,) * 3)
    wanted = get_spec(TINY).preprocessing
    model = create_model(TINY, 0)
    image = rng.uniform(size=(1, 32, 32, 3)).astype(np.float32)
    variables = model.init(jax.random.key(0), image)
    variables = {"params": jax.tree.map(np.asarray, variables["params"]), "batch_stats": {}}
    folded = fold_normalisation(TINY, variables, given, wanted)
    apply = jax.jit(model.apply)
    one = apply({"params": variables["params"]}, (image - given.mean) / given.std)
    other = apply({"params": folded["params"]}, (image - wanted.mean) / np.asarray(wanted.std))
    assert relative_error(other, one) < 1e-5


@pytest.mark.slow  # all transformers are traced
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {
                "dist_token": np.zeros((1, 1, 192), np.float32),
                "pos_embed": np.zeros((1, 198, 192), np.float32),
            },
            "a distilled DeiT",
        ),
        ({"blocks.0.ls1.gamma": np.ones(192, np.float32)}, "LayerScale"),
        ({"patch_embed.proj.weight": np.zeros((192, 3, 8, 8), np.float32)}, "patches of 8 x 8"),
        ({"pos_embed": np.zeros((1, 577, 192), np.float32)}, "577 positions"),
    ],
)
def test_other_transformers_are_refused_by_name(changed, words):
    shapes = get_spec(TINY).shapes(0)["params"]
    variables = {"params": unflatten({p: np.zeros(x.shape, np.float32) for p, x in shapes.items()})}
    tensors = variables_to_torch(TINY, variables) | changed
    with pytest.raises((UserError, MisfitError), match=words):
        variables_from_torch(TINY, tensors, "x.pth")


def test_images_that_are_no_whole_patches_are_refused(rng):
    with pytest.raises(UserError, match="40 x 40 pixels; the sides must be multiples of 16"):
        small_model().init(jax.random.key(0), images_of(rng, 40, 1))
