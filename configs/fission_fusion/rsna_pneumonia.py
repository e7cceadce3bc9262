r"""FissionFusion on the RSNA Pneumonia challenge, normal against lung opacity.

    python -m medmerge_jax.main --config configs/fission_fusion/rsna_pneumonia.py \
        --workdir runs/ff_rsna_pneumonia --config.data.root=rsna_pneumonia

Data: the Kaggle competition "RSNA Pneumonia Detection Challenge", as downloaded. The published
split is 11,911 / 1,469 / 1,483 images: give a table of it with --config.data.split_table; without
one the split is a fresh stratified 80/10/10. The weights `resnet50-11ad3fa6.pth` are wanted, too.

The settings are those of the paper's code, see `published_config`; models are ranked by macro F1.
The paper (arXiv 2403.13341) reports a higher macro F1 than that of the greedy soup of a grid of 48
models, which is `configs/fission_fusion/rsna_pneumonia.py:grid`. Its tables are not at hand. With
`:deit_base` the network is DeiT-B, from its own ImageNet-1k weights.
"""

import ml_collections

from medmerge_jax.studies.fission_fusion import published_config


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """`variant`: empty, or a comma-separated choice of "grid" and "deit_base"."""
    return published_config("rsna_pneumonia", variant, metric="macro_f1")
