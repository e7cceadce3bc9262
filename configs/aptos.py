r"""MedMerge on APTOS 2019, diabetic retinopathy in five grades: the paper's run.

    python -m medmerge_jax.main --config configs/aptos.py --workdir runs/aptos \
        --config.data.root=aptos2019/train_images --config.data.table=aptos2019/train.csv \
        --config.parents.b=runs/eyepacs

Data: the Kaggle competition "APTOS 2019 Blindness Detection", as downloaded: `train.csv`
(id_code, diagnosis) and `train_images/*.png`, 3,662 labelled images. Parents: b is trained on
EyePACS, by `configs/eyepacs.py` or elsewhere; c is torchvision's ImageNet-1k.

Stages: merge linear probe 50 epochs at 1e-4, fine-tuning 50 epochs at 1e-5, AdamW, 224 px.

Published (arXiv 2403.11646, test accuracy / macro F1): DenseNet-121 .842 / .713,
ResNet-50 .850 / .710. The paper's split is 2,929 / 366 / 367 images; without a table that
holds it, the split here is a fresh stratified 80/10/10.

Variants: `configs/aptos.py:compare` runs the baselines beside it, on three seeds;
`configs/aptos.py:resnet50` and `configs/aptos.py:resnet50,compare` the other backbone.
"""

import ml_collections

from medmerge_jax.config import default_config


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """`variant`: empty, or a comma-separated choice of "compare" and "resnet50"."""
    words = set(filter(None, variant.split(",")))
    if unknown := words - {"compare", "resnet50"}:
        raise ValueError(f"configs/aptos.py has no variant {sorted(unknown)}")
    config = default_config()
    config.recipe = "compare" if "compare" in words else "medmerge"
    config.architecture = "resnet50" if "resnet50" in words else "densenet121"
    config.parents.b = "runs/eyepacs"
    config.parents.c = "imagenet"
    config.data.name = "aptos2019"
    config.data.kind = "table"
    config.data.root = "aptos2019/train_images"
    config.data.table = "aptos2019/train.csv"
    config.data.image_column = "id_code"
    config.data.label_columns = ("diagnosis",)
    config.data.classes = ("0", "1", "2", "3", "4")
    return config
