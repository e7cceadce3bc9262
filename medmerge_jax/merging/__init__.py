"""Merging as pure functions on trees of parameters; needs only jax, numpy and scipy."""

from medmerge_jax.merging.alignment import (
    activation_matching,
    align_to_mean,
    compose_permutations,
    identity_permutations,
    invert_permutations,
    matched_averaging,
    permute_variables,
    random_permutations,
    weight_matching,
)
from medmerge_jax.merging.averages import (
    diagonal_fisher,
    fisher_average,
    slerp,
    task_arithmetic,
    uniform_average,
    weighted_average,
)
from medmerge_jax.merging.coefficients import (
    CONSTRAINTS,
    GRANULARITIES,
    effective_coefficients,
    init_coefficients,
    is_conv_kernel,
    is_head,
)
from medmerge_jax.merging.correlation import (
    Moments,
    correlation,
    covariance,
    init_moments,
    update_moments,
)
from medmerge_jax.merging.kernels import (
    merge_kernels,
    merge_variables,
    zeros_parent,
)
from medmerge_jax.merging.recalibration import (
    recalibrate,
    repair,
    repair_scales,
)
from medmerge_jax.merging.soups import (
    greedy_soup,
    hierarchical_soup,
    learned_soup,
    uniform_soup,
)
from medmerge_jax.merging.spaces import (
    Space,
    Walk,
    dense_spaces,
    find_spaces,
    residual_spaces,
)
from medmerge_jax.merging.trees import (
    flatten,
    nest_like,
    network_order,
    unflatten,
)
from medmerge_jax.merging.zipit import (
    match_features,
    partial_stops,
    partial_zipit,
    zipit,
)

__all__ = [
    "CONSTRAINTS",
    "GRANULARITIES",
    "Moments",
    "Space",
    "Walk",
    "activation_matching",
    "align_to_mean",
    "compose_permutations",
    "correlation",
    "covariance",
    "dense_spaces",
    "diagonal_fisher",
    "effective_coefficients",
    "find_spaces",
    "fisher_average",
    "flatten",
    "greedy_soup",
    "hierarchical_soup",
    "identity_permutations",
    "init_coefficients",
    "init_moments",
    "invert_permutations",
    "is_conv_kernel",
    "is_head",
    "learned_soup",
    "match_features",
    "matched_averaging",
    "merge_kernels",
    "merge_variables",
    "nest_like",
    "network_order",
    "partial_stops",
    "partial_zipit",
    "permute_variables",
    "random_permutations",
    "recalibrate",
    "repair",
    "repair_scales",
    "residual_spaces",
    "slerp",
    "task_arithmetic",
    "unflatten",
    "uniform_average",
    "uniform_soup",
    "update_moments",
    "weight_matching",
    "weighted_average",
    "zeros_parent",
    "zipit",
]
