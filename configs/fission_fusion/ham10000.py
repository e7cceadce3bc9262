r"""FissionFusion on HAM10000, seven kinds of skin lesions.

    python -m medmerge_jax.main --config configs/fission_fusion/ham10000.py \
        --workdir runs/ff_ham10000 --config.data.root=ham10000

Data: task 3 of the ISIC 2018 challenge as it was published: 10,015 training, 193 validation and
1,512 test images. The weights `resnet50-11ad3fa6.pth` are wanted, too.

The settings are those of the paper's code, see `published_config`; models are ranked by macro F1.
The paper (arXiv 2403.13341) reports a higher macro F1 than that of the greedy soup of a grid of 48
models, which is `configs/fission_fusion/ham10000.py:grid`. Its tables are not at hand.
"""

import ml_collections

from medmerge_jax.studies.fission_fusion import published_config


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """`variant`: empty or "grid"."""
    config = published_config("ham10000", variant, metric="macro_f1")
    config.data.variant = "published"
    return config
