r"""FissionFusion on CIFAR-10.

    python -m medmerge_jax.main --config configs/fission_fusion/cifar10.py \
        --workdir runs/ff_cifar10 --config.data.root=cifar10

Data: the official Python archive `cifar-10-python.tar.gz`, in the folder; 5,000 of the 50,000
training images are the validation split. The weights `resnet50-11ad3fa6.pth` are wanted, too.

The settings are those of the paper's code, see `published_config`; models are ranked by accuracy.
The paper (arXiv 2403.13341) reports a higher accuracy than that of the greedy soup of a grid of 48
models, which is `configs/fission_fusion/cifar10.py:grid`. Its tables are not at hand. With
`:deit_base` the network is DeiT-B, from its own ImageNet-1k weights.
"""

import ml_collections

from medmerge_jax.studies.fission_fusion import published_config


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """`variant`: empty, or a comma-separated choice of "grid" and "deit_base"."""
    return published_config("cifar10", variant, metric="accuracy")
