r"""FissionFusion on CIFAR-10.

    python -m medmerge_jax.main --config configs/fission_fusion/cifar10.py \
        --workdir runs/ff_cifar10 --config.data.root=cifar10

Data: the official Python archive `cifar-10-python.tar.gz`, in the folder; 5,000 of the 50,000
training images are the validation split.

Warm-up: a linear probe, 10 epochs at 1e-3. Then a fine-tuning for each of 8 learning rates, 50
epochs at most with cosine decay, and 17 epochs of fast geometric generation from each. Soups of
the 48 models: uniform, greedy, and hierarchical (GoU, GoG), ranked by accuracy on the validation
images. AdamW with weight decay 1e-2, batches of 128, heavy augmentation, 224 px, ResNet-50 from
torchvision's ImageNet-1k weights of version 2, whose file `resnet50-11ad3fa6.pth` is wanted.

The paper (arXiv 2403.13341) reports a higher accuracy than a greedy soup of the grid's 48 models;
its tables are not at hand here. That grid, of 8 learning rates, 3 augmentations and 2 seeds, is the
variant `configs/fission_fusion/cifar10.py:grid`.
"""

import ml_collections

from medmerge_jax.config import default_config
from medmerge_jax.studies.fission_fusion import published_settings


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """`variant`: empty or "grid"."""
    config = default_config()
    published_settings(config, variant)
    config.data.kind, config.data.name = "official", "cifar10"
    config.data.root = "cifar10"
    config.soup.metric = "accuracy"
    return config
