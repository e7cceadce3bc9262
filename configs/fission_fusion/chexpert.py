r"""FissionFusion on CheXpert, 13 labels of frontal chest X-rays.

    python -m medmerge_jax.main --config configs/fission_fusion/chexpert.py \
        --workdir runs/ff_chexpert --config.data.root=CheXpert-v1.0-small

Data: CheXpert-v1.0-small as downloaded, with `test.csv`: the 202 and 518 official frontal images
are validation and test. Uncertain and empty labels are unknown and left out of the loss, whose
labels are weighted by how rare they are.

Warm-up: a linear probe, 10 epochs at 1e-3. Then a fine-tuning for each of 8 learning rates, 50
epochs at most with cosine decay, and 17 epochs of fast geometric generation from each. Soups of
the 48 models: uniform, greedy, and hierarchical (GoU, GoG), ranked by mean AUC on the validation
images. AdamW with weight decay 1e-2, batches of 128, heavy augmentation, 224 px, ResNet-50 from
torchvision's ImageNet-1k weights of version 2, whose file `resnet50-11ad3fa6.pth` is wanted.

The paper (arXiv 2403.13341) reports a higher mean AUC than a greedy soup of the grid's 48 models;
its tables are not at hand here. That grid, of 8 learning rates, 3 augmentations and 2 seeds, is the
variant `configs/fission_fusion/chexpert.py:grid`.
"""

import ml_collections

from medmerge_jax.config import default_config
from medmerge_jax.studies.fission_fusion import published_settings


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """`variant`: empty or "grid"."""
    config = default_config()
    published_settings(config, variant)
    config.data.kind, config.data.name = "official", "chexpert"
    config.data.root = "CheXpert-v1.0-small"
    config.soup.metric = "macro_auc"
    config.data.uncertain = config.data.blank = "unknown"
    config.class_weights = "by_frequency"
    return config
