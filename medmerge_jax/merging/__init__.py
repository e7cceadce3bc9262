"""Merging as pure functions on trees of parameters; needs only jax, numpy and scipy."""

from medmerge_jax.merging.kernels import (
    CONSTRAINTS,
    GRANULARITIES,
    effective_coefficients,
    init_coefficients,
    is_conv_kernel,
    merge_kernels,
    merge_variables,
    zeros_parent,
)
from medmerge_jax.merging.trees import flatten, nest_like, network_order, unflatten

__all__ = [
    "CONSTRAINTS",
    "GRANULARITIES",
    "effective_coefficients",
    "flatten",
    "init_coefficients",
    "is_conv_kernel",
    "merge_kernels",
    "merge_variables",
    "nest_like",
    "network_order",
    "unflatten",
    "zeros_parent",
]
