r"""The EyePACS parent of `configs/aptos.py`: fine-tuned from ImageNet, five grades.

    python -m medmerge_jax.main --config configs/eyepacs.py --workdir runs/eyepacs \
        --config.data.root=eyepacs/train --config.data.table=eyepacs/trainLabels.csv

Data: the Kaggle competition "Diabetic Retinopathy Detection", as downloaded: `trainLabels.csv`
(image, level) and `train/*.jpeg`, 35,126 images. Left and right eye of one patient
(`10_left`, `10_right`) must not fall into different splits: give the table a column with the
patient and name it with --config.data.group_column, or the split is per image, as published.

The paper does not say how its parent was trained. Here: all weights, 20 epochs, AdamW at 1e-4
with cosine decay and one epoch of warm-up, the best epoch by quadratic weighted kappa.

Variant: `configs/eyepacs.py:resnet50`.
"""

import ml_collections

from medmerge_jax.config import default_config


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """`variant`: empty or "resnet50"."""
    if variant not in ("", "resnet50"):
        raise ValueError(f"configs/eyepacs.py has no variant {variant!r}")
    config = default_config()
    config.recipe = "ft"
    config.architecture = variant or "densenet121"
    config.parents = ml_collections.ConfigDict({"c": "imagenet"})
    config.start = "c"
    config.ft.epochs = 20
    config.ft.learning_rate = 1e-4
    config.ft.schedule = "cosine"
    config.ft.warmup_epochs = 1.0
    config.select.metric = "kappa"
    config.data.name = "eyepacs"
    config.data.kind = "table"
    config.data.root = "eyepacs/train"
    config.data.table = "eyepacs/trainLabels.csv"
    config.data.image_column = "image"
    config.data.label_columns = ("level",)
    config.data.classes = ("0", "1", "2", "3", "4")
    return config
