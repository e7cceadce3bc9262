r"""FissionFusion on APTOS 2019, diabetic retinopathy in five grades.

    python -m medmerge_jax.main --config configs/fission_fusion/aptos.py \
        --workdir runs/ff_aptos --config.data.root=aptos2019

Data: the Kaggle competition "APTOS 2019 Blindness Detection", as downloaded. The published split
is 2,929 / 366 / 367 images: give a table of it with --config.data.split_table; without one the
split is a fresh stratified 80/10/10. The weights `resnet50-11ad3fa6.pth` are wanted, too.

The settings are those of the paper's code, see `published_config`; models are ranked by macro F1.
The paper (arXiv 2403.13341) reports a higher macro F1 than that of the greedy soup of a grid of 48
models, which is `configs/fission_fusion/aptos.py:grid`. Its tables are not at hand. With
`:deit_base` the network is DeiT-B, from its own ImageNet-1k weights.
"""

import ml_collections

from medmerge_jax.studies.fission_fusion import published_config


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """`variant`: empty, or a comma-separated choice of "grid" and "deit_base"."""
    return published_config("aptos2019", variant, metric="macro_f1")
