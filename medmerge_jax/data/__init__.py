"""Data sets of images, their splits, their audit and batches."""

from medmerge_jax.data.audit import audit_data_set as audit_data_set
from medmerge_jax.data.batches import Batches as Batches
from medmerge_jax.data.batches import ResidentBatches as ResidentBatches
from medmerge_jax.data.batches import StreamedBatches as StreamedBatches
from medmerge_jax.data.batches import epoch_order as epoch_order
from medmerge_jax.data.batches import make_batches as make_batches
from medmerge_jax.data.dataset import DataSet as DataSet
from medmerge_jax.data.dataset import Split as Split
from medmerge_jax.data.folder import image_folder as image_folder
from medmerge_jax.data.hashing import ImageHashes as ImageHashes
from medmerge_jax.data.hashing import find_overlap as find_overlap
from medmerge_jax.data.hashing import hash_images as hash_images
from medmerge_jax.data.hashing import load_hashes as load_hashes
from medmerge_jax.data.official import official_data_set as official_data_set
from medmerge_jax.data.official.builders import BUILDERS as BUILDERS
from medmerge_jax.data.splits import stratified_group_split as stratified_group_split
from medmerge_jax.data.synthetic import write_synthetic as write_synthetic
from medmerge_jax.data.table import image_table as image_table
