"""Vision transformers: ViT (Dosovitskiy et al. 2021, arXiv 2010.11929) and DeiT (2012.12877).

Submodules bear timm's names, so that a parameter's path is its name there with "/" for "."; files
with torchvision's names are read too. The tokens are patches of 16 x 16 pixels and a class token,
whose last state is what the head reads. Blocks normalise before they mix.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from medmerge_jax.errors import UserError
from medmerge_jax.merging.spaces import Space, Walk
from medmerge_jax.merging.trees import at_least_float32
from medmerge_jax.models.layers import dense_head
from medmerge_jax.models.preprocessing import Preprocessing
from medmerge_jax.models.registry import (
    LEAF_NAMES,
    Elsewhere,
    ModelSpec,
    leaf_role,
    numbered_block,
    register,
)

Array = jax.Array

PATCH = 16
TOKENS = ("cls_token", "dist_token")
GRID = 14
"""Patches in each direction of the images, of 224 pixels, that positions are embedded for."""
EPSILON = 1e-6
_SMALL = nn.initializers.truncated_normal(0.02)


class PatchEmbed(nn.Module):
    """Patches of the image, each mapped to a token: a convolution whose stride is its size.

    Attributes:
      width: Of a token.
      dtype: Compute dtype.
    """

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps (n, 16 h, 16 w, 3) to (n, h, w, width)."""
        proj = _Projection((PATCH, PATCH, x.shape[-1], self.width), self.dtype, name="proj")
        n, height, width, channels = x.shape
        if height % PATCH or width % PATCH:
            raise UserError(
                f"images of {height} x {width} pixels; the sides must be multiples of {PATCH}, "
                "that of a vision transformer's patches"
            )
        x = x.reshape(n, height // PATCH, PATCH, width // PATCH, PATCH, channels)
        patches = x.transpose(0, 1, 3, 2, 4, 5)
        return proj(patches.reshape(n, height // PATCH, width // PATCH, -1))


class _Projection(nn.Module):
    """A product with a convolution's kernel, of patches that lie in rows; and its bias."""

    shape: tuple[int, ...]
    dtype: Any

    @nn.compact
    def __call__(self, patches: Array) -> Array:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), self.shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, self.shape[-1:], jnp.float32)
        matrix = kernel.reshape(-1, self.shape[-1]).astype(self.dtype)
        return patches.astype(self.dtype) @ matrix + bias.astype(self.dtype)


class Attention(nn.Module):
    """Self-attention; the matrix `qkv` makes queries, keys and values of all heads.

    Attributes:
      heads: Their number; each has width / heads units.
      dtype: Compute dtype.
    """

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps (n, tokens, width) to the same shape."""
        n, tokens, width = x.shape
        qkv = _dense(3 * width, self.dtype, "qkv")(x)
        qkv = qkv.reshape(n, tokens, 3, self.heads, width // self.heads)
        query, key, value = (qkv[:, :, i] for i in range(3))
        y = _attend(query, key, value)
        return _dense(width, self.dtype, "proj")(y.reshape(n, tokens, width))


def _attend(query: Array, key: Array, value: Array) -> Array:
    """Values (n, tokens, heads, d), averaged with the softmax of the scores q · k / √d."""
    if query.dtype != jnp.float64:
        return jax.nn.dot_product_attention(query, key, value)
    # JAX's own takes the softmax in float32.
    scores = jnp.einsum("nqhd,nkhd->nhqk", query, key) / query.shape[-1] ** 0.5
    return jnp.einsum("nhqk,nkhd->nqhd", jax.nn.softmax(scores), value)


class Mlp(nn.Module):
    """Four times as many hidden units as the width, with the exact GELU."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps (n, tokens, width) to the same shape."""
        hidden = nn.gelu(_dense(4 * x.shape[-1], self.dtype, "fc1")(x), approximate=False)
        return _dense(x.shape[-1], self.dtype, "fc2")(hidden)


class Block(nn.Module):
    """Attention and a perceptron, each of the normalised tokens and added to them.

    Attributes:
      heads: Of the attention.
      drop_path: With what probability each of the two is left out of an image's training step
        (Huang et al., arXiv 1603.09382); what stays is scaled by 1 / (1 - drop_path).
      dtype: Compute dtype.
    """

    heads: int
    drop_path: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Maps (n, tokens, width) to the same shape."""

        def dropped(y: Array, number: int) -> Array:
            name, axes = f"drop_path{number}", (1, 2)
            layer = nn.Dropout(self.drop_path, axes, rng_collection="drop_path", name=name)
            return layer(y, deterministic=not train)

        y = Attention(self.heads, self.dtype, name="attn")(_norm("norm1", self.dtype)(x))
        x = x + dropped(y, 1)
        y = Mlp(self.dtype, name="mlp")(_norm("norm2", self.dtype)(x))
        return x + dropped(y, 2)


class Blocks(nn.Module):
    """Blocks "0", "1", …, each dropped more often than the one before it, from zero on."""

    depth: int
    heads: int
    drop_path: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Maps (n, tokens, width) to the same shape."""
        for i, rate in enumerate(np.linspace(0, self.drop_path, self.depth)):
            x = Block(self.heads, float(rate), self.dtype, name=str(i))(x, train)
        return x


class VisionTransformer(nn.Module):
    """timm's `VisionTransformer` with a class token.

    Attributes:
      width: Of a token.
      depth: Number of blocks.
      heads: Of each attention.
      num_classes: Number of logits; 0 leaves the head out.
      dtype: Compute dtype.
      drop_path: Of the last block, see `Block`; it draws from the random stream "drop_path".
      grid: Patches in each direction of the images that positions are embedded for.
      distilled: Whether there is a second token, which DeiT's authors trained to agree with a
        teacher. A head of its own reads it, and the logits are the mean of the two heads': here
        that is one head on the states of both tokens, one after another, (n, 2 width).
    """

    width: int
    depth: int
    heads: int
    num_classes: int
    dtype: Any = jnp.float32
    drop_path: float = 0.0
    grid: int = GRID
    distilled: bool = False

    @nn.compact
    def __call__(
        self, x: Array, train: bool = False, use_running_average: bool | None = None
    ) -> Array:
        """Logits of images (n, h, w, 3), sides multiples of 16, see `registry.create_model`."""
        del use_running_average  # there are no batch norms
        x = PatchEmbed(self.width, self.dtype, name="patch_embed")(x)
        n, height, width, _ = x.shape
        names = TOKENS if self.distilled else TOKENS[:1]
        shape, init = (1, 1, self.width), nn.initializers.normal(1e-6)
        tokens = [self.param(name, init, shape).astype(self.dtype) for name in names]
        count = len(tokens)
        pos_embed = self.param("pos_embed", _SMALL, (1, count + self.grid**2, self.width))
        first = [jnp.broadcast_to(token, (n, 1, self.width)) for token in tokens]
        x = jnp.concatenate([*first, x.reshape(n, height * width, self.width)], axis=1)
        x = x + resized_positions(pos_embed, height, width, count).astype(self.dtype)
        x = Blocks(self.depth, self.heads, self.drop_path, self.dtype, name="blocks")(x, train)
        # No patch is read: the last norm is of each token by itself.
        x = _norm("norm", self.dtype)(x[:, :count])
        x = at_least_float32(x.reshape(n, count * self.width))
        return dense_head(x.shape[1], self.num_classes)(x) if self.num_classes else x


def resized_positions(pos_embed: Array, height: int, width: int, tokens: int = 1) -> Array:
    """Position embeddings for another number of patches, as timm has them.

    Bicubic (a = -0.5) with antialiasing; torchvision's own helper aligns corners and has none.

    Args:
      pos_embed: (1, t + g², width): the tokens', then those of g x g patches by rows.
      height: Patches from top to bottom.
      width: Patches from left to right.
      tokens: t, those that are no patches.

    Returns:
      (1, t + height · width, width).
    """
    grid = round((pos_embed.shape[1] - tokens) ** 0.5)
    if (height, width) == (grid, grid):
        return pos_embed
    of_tokens, of_patches = pos_embed[:, :tokens], pos_embed[:, tokens:]
    size = pos_embed.shape[2]
    of_patches = jax.image.resize(
        of_patches.reshape(1, grid, grid, size), (1, height, width, size), "cubic"
    )
    return jnp.concatenate([of_tokens, of_patches.reshape(1, height * width, size)], axis=1)


def _dense(features: int, dtype: Any, name: str) -> nn.Dense:
    return nn.Dense(features, dtype=dtype, kernel_init=_SMALL, name=name)


def _norm(name: str, dtype: Any) -> nn.LayerNorm:
    # The fast variance, E[x²] - E[x]², loses the small ones.
    return nn.LayerNorm(epsilon=EPSILON, dtype=dtype, use_fast_variance=False, name=name)


def role(path: str, leaf: Any) -> str:
    """What a parameter is, see `registry.leaf_role`.

    A kernel is the affine map of an output unit, row and bias, see `tie`. The class token and the
    positions are trained in the probe as layer norms are.
    """
    module, _, name = path.rpartition("/")
    if name == "kernel" or (name == "bias" and "norm" not in module.rpartition("/")[2]):
        return "head" if module == "head" else "kernel"
    return "norm" if not module else leaf_role(path, leaf)


def tie(heads: int, path: str, shape: tuple[int, ...]) -> tuple[str, np.ndarray | None]:
    """Whose coefficients a leaf shares, see `merging.coefficients.Tie`.

    A unit's bias goes with its row. In an attention each head has one coefficient for its queries,
    keys and values: a score is a sum of products of queries and keys, so that rows of the two that
    are blended apart make no sense.
    """
    module, _, _ = path.rpartition("/")
    owner = f"{module}/kernel"
    if module.rpartition("/")[2] != "qkv":
        return owner, None
    each = shape[-1] // 3 // heads
    return owner, np.tile(np.repeat(np.arange(heads), each), 3)


def spaces(heads: int, variables: Any) -> tuple[Space, ...]:
    """The hidden units that can be put in another order, see `merging.spaces`.

    The residual stream is one space: layer norms take mean and variance over all of it. The hidden
    units of each perceptron are a space, and an attention has two, see there.
    """
    network = Walk(variables)
    projection, width = "patch_embed/proj", network.shapes.get("params/cls_token", (0,))[-1]
    stream = network.new_units(projection, width)
    network.linear(projection, None, stream)
    tokens = [name for name in TOKENS if f"params/{name}" in network.shapes]
    for name in (*tokens, "pos_embed"):
        network.note(f"params/{name}", 2, "out", stream)
    for block in network.children("blocks"):
        attention, mlp = f"{block}/attn", f"{block}/mlp"
        network.norm(f"{block}/norm1", stream)
        scores, values = (
            network.new_units(f"{attention}/{name}", width, heads=heads, attention=attention)
            for name in ("qk", "v")
        )
        qkv = (scores, scores, values)
        network.linear(f"{attention}/qkv", stream, *qkv)
        for number, units in enumerate(qkv):
            network.tap(f"{attention}/qkv", units, start=number * width)
        network.linear(f"{attention}/proj", values, stream)
        network.norm(f"{block}/norm2", stream)
        hidden = network.new_units(f"{mlp}/fc1", 4 * width)
        network.linear(f"{mlp}/fc1", stream, hidden)
        network.tap(f"{mlp}/fc1", hidden, "gelu")
        network.linear(f"{mlp}/fc2", hidden, stream)
        network.tap(block, stream)
    network.norm("norm", stream)
    network.head(*[stream] * len(tokens))
    return network.spaces()


_NAMES = (
    ("conv_proj.", "patch_embed.proj."),
    ("class_token", "cls_token"),
    ("encoder.pos_embedding", "pos_embed"),
    ("encoder.layers.encoder_layer_#.", "blocks.#."),
    ("encoder.ln.", "norm."),
    (".ln_#.", ".norm#."),
    (".self_attention.in_proj_", ".attn.qkv."),
    (".self_attention.out_proj.", ".attn.proj."),
    (".mlp.0.", ".mlp.fc1."),
    (".mlp.3.", ".mlp.fc2."),
    ("heads.head.", "head."),
)
"""Parts of names in torchvision's `vit_b_16` and in timm; # is a number. Those without a dot before
them begin a name."""

_OLDER_NAMES = ((".mlp.linear_1.", ".mlp.fc1."), (".mlp.linear_2.", ".mlp.fc2."))
"""Likewise, in torchvision's older files."""


def _timm_name(name: str) -> str:
    return _renamed((*_NAMES, *_OLDER_NAMES), name)


def _torchvision_name(name: str) -> str:
    return _renamed([(ours, theirs) for theirs, ours in _NAMES], name)


def _renamed(parts: Sequence[tuple[str, str]], name: str) -> str:
    for old, new in parts:
        start = "" if old.startswith(".") else "^"
        pattern = start + re.escape(old).replace(re.escape("#"), r"(\d+)")
        name = re.sub(pattern, new.replace("#", r"\1"), name)
    return name


def _other_network(tokens: int, shapes: Mapping[str, tuple[int, ...]]) -> str:
    patch = shapes.get("patch_embed.proj.weight", ())
    positions = shapes.get("pos_embed", ())
    if tokens == 1 and "dist_token" in shapes:
        return "a distilled DeiT, with a second token and a second head"
    if any(name.endswith(".ls1.gamma") for name in shapes):
        return "a vision transformer with LayerScale (DeiT III, DINOv2)"
    if len(patch) == 4 and patch[2:] != (PATCH, PATCH):
        return f"a vision transformer with patches of {patch[2]} x {patch[3]} pixels"
    if len(positions) == 3 and positions[1] != tokens + GRID**2:
        return f"a vision transformer with {positions[1]} positions; {tokens + GRID**2} are wanted"
    return ""


_LEAF_NAMES = {
    **LEAF_NAMES,
    **{("params", name): name for name in (*TOKENS, "pos_embed")},
}

_FILES = {
    "deit_tiny_patch16_224": "a1311bcf",
    "deit_small_patch16_224": "cd65a155",
    "deit_base_patch16_224": "b5f2ef4d",
    "deit_tiny_distilled_patch16_224": "b40b3cf7",
    "deit_small_distilled_patch16_224": "649709d9",
    "deit_base_distilled_patch16_224": "df68dfff",
}
"""Digits of the files that DeiT's authors publish."""

for _family, _kind, _weights, _own in (
    ("vit", "", "augreg_in21k_ft_in1k", Preprocessing(224, "crop", (0.5,) * 3, (0.5,) * 3)),
    ("deit", "", "fb_in1k", Preprocessing(224, "crop")),
    ("deit", "_distilled", "fb_in1k", Preprocessing(224, "crop")),
):
    for _size, _width, _heads in (("tiny", 192, 3), ("small", 384, 6), ("base", 768, 12)):
        _name = f"{_family}_{_size}{_kind}_patch16_224"
        _tokens = TOKENS if _kind else TOKENS[:1]
        _elsewhere = {
            "timm": Elsewhere(f"timm.create_model('{_name}', num_classes={{classes}})"),
        }
        if _size == "base" and not _kind:
            _elsewhere["torchvision"] = Elsewhere(
                "torchvision.models.vit_b_16(num_classes={classes})",
                _torchvision_name,
            )
        register(
            ModelSpec(
                name=_name,
                build=functools.partial(
                    VisionTransformer, _width, 12, _heads, distilled=bool(_kind)
                ),
                num_features=len(_tokens) * _width,
                preprocessing=_own,
                torch_head="head",
                further_heads=("head_dist",) if _kind else (),
                licence="Apache-2.0",
                hub_id=f"timm/{_name}.{_weights}",
                torch_file=f"{_name}-{_FILES[_name]}.pth" if _name in _FILES else None,
                min_size=PATCH,
                patch=PATCH,
                role=role,
                tie=functools.partial(tie, _heads),
                spaces=functools.partial(spaces, _heads),
                block=functools.partial(numbered_block, r"blocks/(\d+)/", "norm/|head/"),
                drop_path=True,
                leaf_names=_LEAF_NAMES,
                stem="patch_embed.proj",
                usual_name=_timm_name,
                other_network=functools.partial(_other_network, len(_tokens)),
                elsewhere=_elsewhere,
            )
        )
