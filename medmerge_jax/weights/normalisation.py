"""One normalisation of images for all parents: what a parent's own did goes into its stem."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from medmerge_jax.errors import UserError
from medmerge_jax.merging.trees import flatten, unflatten
from medmerge_jax.models import Preprocessing, get_spec
from medmerge_jax.weights.names import Variables


def fold_normalisation(
    architecture: str, variables: Mapping[str, Any], given: Preprocessing, wanted: Preprocessing
) -> Variables:
    """A model for images normalised in one way, from one for images normalised in another.

    Where x = (image - mean) / std, the first convolution's kernel is multiplied by
    std_wanted / std_given for each colour, and what the means differ by goes into its bias or the
    running mean of the batch norm behind it. In evaluation the result is the same but at the
    border, where the image is padded: the zeros around it are another colour now.

    Args:
      architecture: One of `models.list_models()`.
      variables: `{"params": ..., "batch_stats": ...}`; the latter may be empty, to be estimated on
        images normalised as wanted.
      given: What the model was trained with; its mean and std count.
      wanted: Likewise, of the images that it will see.

    Raises:
      UserError: The architecture does not say what its stem is.
    """
    spec = get_spec(architecture)
    if not spec.stem:
        raise UserError(
            f"{architecture}: its images are normalised with mean {list(given.mean)} and std "
            f"{list(given.std)}, wanted are {list(wanted.mean)} and {list(wanted.std)}; the "
            "architecture does not say what its stem is, so that this cannot be adapted"
        )
    stem = spec.stem.replace(".", "/")
    kernel_path, bias_path = f"{stem}/kernel", f"{stem}/bias"
    mean_path = f"{spec.stem_norm.replace('.', '/')}/mean"
    params, statistics = flatten(variables["params"]), flatten(variables.get("batch_stats", {}))
    kernel = np.asarray(params[kernel_path], np.float64)  # (h, w, colours, c_out)
    shift = (np.asarray(wanted.mean) - given.mean) / given.std
    scale = np.asarray(wanted.std) / given.std
    moved = np.einsum("hwcd,c->d", kernel, shift)
    params[kernel_path] = (kernel * scale[:, None]).astype(np.float32)
    if bias_path in params:
        params[bias_path] = (np.asarray(params[bias_path]) + moved).astype(np.float32)
    elif statistics:
        statistics[mean_path] = (np.asarray(statistics[mean_path]) - moved).astype(np.float32)
    return {**variables, "params": unflatten(params), "batch_stats": unflatten(statistics)}


def as_published(
    architecture: str, variables: Variables, card: Mapping[str, Any]
) -> tuple[Variables, dict[str, Any], str]:
    """A parent for images normalised as the architecture's published weights want, and its card.

    Args:
      architecture: One of `models.list_models()`.
      variables: The parent's.
      card: What is known of it; without "mean" and "std", nothing is to be done.

    Returns:
      Variables, card, and the sentence that says what was done, which is the last of the card's
      "notes"; "" if there was nothing to do.
    """
    published = get_spec(architecture).preprocessing
    mean, std = card.get("mean", published.mean), card.get("std", published.std)
    given = Preprocessing(published.size, published.resize, tuple(mean), tuple(std))
    if np.allclose(given.mean, published.mean, atol=1e-3) and np.allclose(
        given.std, published.std, atol=1e-3
    ):
        return variables, dict(card), ""
    folded = fold_normalisation(architecture, variables, given, published)
    how = "its first convolution was adapted, which is exact"
    if get_spec(architecture).stem_norm:
        how = (
            "its first convolution and batch norm were adapted, which is exact but for the border "
            "of the images"
        )
    note = (
        f"its images were normalised with mean {list(given.mean)} and std {list(given.std)}, here "
        f"they are with {list(published.mean)} and {list(published.std)}: {how}"
    )
    own = {"mean": list(published.mean), "std": list(published.std)}
    return folded, {**card, **own, "notes": [*card.get("notes", []), note]}, note
