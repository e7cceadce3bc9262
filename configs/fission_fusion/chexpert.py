r"""FissionFusion on CheXpert, 13 labels of frontal chest X-rays.

    python -m medmerge_jax.main --config configs/fission_fusion/chexpert.py \
        --workdir runs/ff_chexpert --config.data.root=CheXpert-v1.0-small

Data: CheXpert-v1.0-small as downloaded, with `test.csv`: the 202 and 518 official frontal images
are validation and test. Uncertain and empty labels are unknown and left out of the loss, whose
labels are weighted by how rare they are. The weights `resnet50-11ad3fa6.pth` are wanted, too.

The settings are those of the paper's code, see `published_config`; models are ranked by mean AUC.
The paper (arXiv 2403.13341) reports a higher mean AUC than that of the greedy soup of a grid of 48
models, which is `configs/fission_fusion/chexpert.py:grid`. Its tables are not at hand.
"""

import ml_collections

from medmerge_jax.studies.fission_fusion import published_config


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """`variant`: empty or "grid"."""
    config = published_config("chexpert", variant, metric="macro_auc")
    config.data.root = "CheXpert-v1.0-small"
    config.data.uncertain = config.data.blank = "unknown"
    config.class_weights = "by_frequency"
    return config
