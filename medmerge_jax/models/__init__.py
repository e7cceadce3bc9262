"""Model definitions and their registry."""

from medmerge_jax.models.layers import LinearHead as LinearHead
from medmerge_jax.models.norm import BatchNorm as BatchNorm
from medmerge_jax.models.preprocessing import Preprocessing as Preprocessing
from medmerge_jax.models.registry import ModelSpec as ModelSpec
from medmerge_jax.models.registry import create_model as create_model
from medmerge_jax.models.registry import get_spec as get_spec
from medmerge_jax.models.registry import list_models as list_models
from medmerge_jax.models.registry import register as register

# Each family's file registers its architectures; this is their order in lists.
from medmerge_jax.models import resnet as resnet  # isort: skip
from medmerge_jax.models import densenet as densenet  # isort: skip
from medmerge_jax.models import vit as vit  # isort: skip
