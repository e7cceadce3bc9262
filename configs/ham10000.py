r"""The HAM10000 parent of `configs/isic2019.py`: fine-tuned from ImageNet, seven kinds of lesions.

    python -m medmerge_jax.main --config configs/ham10000.py --workdir runs/ham10000 \
        --config.data.root=ham10000

Data: task 3 of the ISIC 2018 challenge (`ISIC2018_Task3_Training_Input/` and the folder or table
`ISIC2018_Task3_Training_GroundTruth`, with `ISIC2018_Task3_Training_LesionGroupings.csv`), or the
Harvard Dataverse's `HAM10000_metadata` and `HAM10000_images_part_1/`, `..._part_2/`: the 10,015
training images of 7,470 lesions, none of which is in two splits. With
--config.data.variant=published the challenge's test images are the test split.

The paper (arXiv 2403.11646) does not say how its parent was trained, and gives no figure for it;
what it is good for is in `configs/isic2019.py`. Here: all weights, 20 epochs, AdamW at 1e-4 with
cosine decay and one epoch of warm-up, the best epoch by macro F1.

All of these images are in ISIC 2019 too. This run leaves their hashes, by which the data audit of
`configs/isic2019.py` finds them, and `data.exclude_overlap` leaves them out there.

Variant: `configs/ham10000.py:resnet50 --workdir runs/ham10000_resnet50`.
"""

import ml_collections

from medmerge_jax.config import default_config


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """`variant`: empty or "resnet50"."""
    if variant not in ("", "resnet50"):
        raise ValueError(f"configs/ham10000.py has no variant {variant!r}")
    config = default_config()
    config.recipe = "ft"
    config.architecture = variant or "densenet121"
    config.parents = ml_collections.ConfigDict({"c": "imagenet"})
    config.start = "c"
    config.ft.epochs = 20
    config.ft.learning_rate = 1e-4
    config.ft.schedule = "cosine"
    config.ft.warmup_epochs = 1.0
    config.select.metric = "macro_f1"
    config.data.name = "ham10000"
    config.data.kind = "official"
    config.data.root = "ham10000"
    config.data.variant = "training"
    return config
