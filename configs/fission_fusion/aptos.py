r"""FissionFusion on APTOS 2019, diabetic retinopathy in five grades.

    python -m medmerge_jax.main --config configs/fission_fusion/aptos.py \
        --workdir runs/ff_aptos --config.data.root=aptos2019

Data: the Kaggle competition "APTOS 2019 Blindness Detection", as downloaded. The published split
is 2,929 / 366 / 367 images: give a table of it with --config.data.split_table; without one the
split is a fresh stratified 80/10/10.

Warm-up: a linear probe, 10 epochs at 1e-3. Then a fine-tuning for each of 8 learning rates, 50
epochs at most with cosine decay, and 17 epochs of fast geometric generation from each. Soups of
the 48 models: uniform, greedy, and hierarchical (GoU, GoG), ranked by macro F1 on the validation
images. AdamW with weight decay 1e-2, batches of 128, heavy augmentation, 224 px, ResNet-50 from
torchvision's ImageNet-1k weights of version 2, whose file `resnet50-11ad3fa6.pth` is wanted.

The paper (arXiv 2403.13341) reports a higher macro F1 than a greedy soup of the grid's 48 models;
its tables are not at hand here. That grid, of 8 learning rates, 3 augmentations and 2 seeds, is the
variant `configs/fission_fusion/aptos.py:grid`.
"""

import ml_collections

from medmerge_jax.config import default_config
from medmerge_jax.studies.fission_fusion import published_settings


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """`variant`: empty or "grid"."""
    config = default_config()
    published_settings(config, variant)
    config.data.kind, config.data.name = "official", "aptos2019"
    config.data.root = "aptos2019"
    config.soup.metric = "macro_f1"
    return config
