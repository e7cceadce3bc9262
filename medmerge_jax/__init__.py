"""MedMerge and its baselines in JAX and Flax.

    import medmerge_jax as mm

    model = mm.create_model("densenet121", num_classes=5)
    parents = [mm.load_weights("densenet121", path) for path in paths]
    coefficients = mm.init_coefficients(parents[0]["params"])
    params = mm.merge_kernels([parent["params"] for parent in parents], coefficients)

Names are imported on first use, so that `medmerge_jax.merging` needs only jax, numpy and scipy.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medmerge_jax.evaluation.images import predict as predict
    from medmerge_jax.merging import effective_coefficients as effective_coefficients
    from medmerge_jax.merging import init_coefficients as init_coefficients
    from medmerge_jax.merging import merge_kernels as merge_kernels
    from medmerge_jax.merging import merge_variables as merge_variables
    from medmerge_jax.merging import zeros_parent as zeros_parent
    from medmerge_jax.models import create_model as create_model
    from medmerge_jax.models import list_models as list_models
    from medmerge_jax.models.mergers import list_mergers as list_mergers
    from medmerge_jax.models.mergers import merge as merge
    from medmerge_jax.studies import run as run
    from medmerge_jax.weights import Model as Model
    from medmerge_jax.weights import load_model as load_model
    from medmerge_jax.weights import load_weights as load_weights
    from medmerge_jax.weights import save_model as save_model
    from medmerge_jax.weights import save_weights as save_weights

__version__ = "0.1.0"

_HOMES = {
    **dict.fromkeys(("effective_coefficients", "init_coefficients", "zeros_parent"), "merging"),
    **dict.fromkeys(("merge_kernels", "merge_variables"), "merging"),
    **dict.fromkeys(("create_model", "list_models"), "models"),
    **dict.fromkeys(("list_mergers", "merge"), "models.mergers"),
    **dict.fromkeys(("Model", "load_model", "save_model"), "weights"),
    **dict.fromkeys(("load_weights", "save_weights"), "weights"),
    "predict": "evaluation.images",
    "run": "studies",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
