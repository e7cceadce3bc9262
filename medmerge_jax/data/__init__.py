"""Data sets of images, their splits, their audit and batches."""

from medmerge_jax.data.audit import audit_data_set
from medmerge_jax.data.batches import (
    Batches,
    ResidentBatches,
    StreamedBatches,
    epoch_order,
    make_batches,
)
from medmerge_jax.data.dataset import DataSet, Split
from medmerge_jax.data.folder import image_folder
from medmerge_jax.data.hashing import ImageHashes, find_overlap, hash_images, load_hashes
from medmerge_jax.data.official import official_data_set
from medmerge_jax.data.official.builders import BUILDERS
from medmerge_jax.data.splits import stratified_group_split
from medmerge_jax.data.synthetic import write_synthetic
from medmerge_jax.data.table import image_table

__all__ = [
    "BUILDERS",
    "Batches",
    "DataSet",
    "ImageHashes",
    "ResidentBatches",
    "Split",
    "StreamedBatches",
    "audit_data_set",
    "epoch_order",
    "find_overlap",
    "hash_images",
    "image_folder",
    "image_table",
    "load_hashes",
    "make_batches",
    "official_data_set",
    "stratified_group_split",
    "write_synthetic",
]
