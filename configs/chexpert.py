r"""The CheXpert parent of `configs/rsna_pneumonia.py`: fine-tuned from ImageNet, 13 labels.

    python -m medmerge_jax.main --config configs/chexpert.py --workdir runs/chexpert \
        --config.data.root=CheXpert-v1.0-small

Data: CheXpert-v1.0-small (or the large one), as downloaded: `train.csv`, `valid.csv` and, if you
have it, `test.csv`, with their folders. The frontal images. An uncertain label (-1) counts as
absent: --config.data.uncertain=one counts it as present, =unknown leaves it out of the loss; so
does --config.data.blank=unknown with labels that are empty, which count as absent too. Without
`test.csv` some of the training patients are the test split, the same ones whatever is chosen.

The paper (arXiv 2403.11646) does not say how its parent was trained, and gives no figure for it;
what it is good for is in `configs/rsna_pneumonia.py`. Here: all weights, 5 epochs, AdamW at 1e-4
with cosine decay and half an epoch of warm-up, the best epoch by macro AUC.

Variant: `configs/chexpert.py:resnet50 --workdir runs/chexpert_resnet50`.
"""

import ml_collections

from medmerge_jax.config import default_config


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """`variant`: empty or "resnet50"."""
    if variant not in ("", "resnet50"):
        raise ValueError(f"configs/chexpert.py has no variant {variant!r}")
    config = default_config()
    config.recipe = "ft"
    config.architecture = variant or "densenet121"
    config.parents = ml_collections.ConfigDict({"c": "imagenet"})
    config.start = "c"
    config.ft.epochs = 5
    config.ft.learning_rate = 1e-4
    config.ft.schedule = "cosine"
    config.ft.warmup_epochs = 0.5
    config.select.metric = "macro_auc"
    config.data.name = "chexpert"
    config.data.kind = "official"
    config.data.root = "CheXpert-v1.0-small"
    config.data.uncertain = "zero"
    config.data.blank = "zero"
    return config
