r"""The EyePACS parent of `configs/aptos.py`: fine-tuned from ImageNet, five grades.

    python -m medmerge_jax.main --config configs/eyepacs.py --workdir runs/eyepacs \
        --config.data.root=eyepacs

Data: the Kaggle competition "Diabetic Retinopathy Detection", as downloaded: `trainLabels.csv`
(image, level) and `train/*.jpeg`, 35,126 images; with the labels of the test images,
`retinopathy_solution.csv`, and `test/*.jpeg` they are the papers' 88,702.

Both eyes of a patient fall into the same split. The papers' split is per image, which puts 15,078
of 44,351 patients into several: --config.data.split_by=image does the same, and a table of their
split (filename, class, split) goes into --config.data.split_table. With
--config.data.variant=kaggle the competition's own test images are the test split.

The paper (arXiv 2403.11646) does not say how its parent was trained, and gives no figure for it;
what it is good for is in `configs/aptos.py`. Here: all weights, 20 epochs, AdamW at 1e-4 with
cosine decay and one epoch of warm-up, the best epoch by quadratic weighted kappa.

Variants: `configs/eyepacs.py:resnet50 --workdir runs/eyepacs_resnet50` and
`configs/eyepacs.py:deit_base --workdir runs/eyepacs_deit_base`, the latter not the paper's.
"""

import ml_collections

from medmerge_jax.config import default_config


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """`variant`: empty, "resnet50" or "deit_base"."""
    if variant not in ("", "resnet50", "deit_base"):
        raise ValueError(f"configs/eyepacs.py has no variant {variant!r}")
    config = default_config()
    config.recipe = "ft"
    config.architecture = variant or "densenet121"
    if variant == "deit_base":
        config.architecture, config.drop_path = "deit_base_patch16_224", 0.1
    config.parents = ml_collections.ConfigDict({"c": "imagenet"})
    config.start = "c"
    config.ft.epochs = 20
    config.ft.learning_rate = 1e-4
    config.ft.schedule = "cosine"
    config.ft.warmup_epochs = 1.0
    config.select.metric = "kappa"
    config.data.name = "eyepacs"
    config.data.kind = "official"
    config.data.root = "eyepacs"
    return config
