"""The papers' data sets in the layouts in which they are published."""

from medmerge_jax.data.official.published import LAYOUTS, layout, official_data_set
from medmerge_jax.data.official.records import Layout, Records

__all__ = ["LAYOUTS", "Layout", "Records", "layout", "official_data_set"]
