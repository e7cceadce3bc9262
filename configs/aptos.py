r"""MedMerge on APTOS 2019, diabetic retinopathy in five grades: the paper's run.

    python -m medmerge_jax.main --config configs/aptos.py --workdir runs/aptos \
        --config.data.root=aptos2019 --config.parents.b=runs/eyepacs

Data: the Kaggle competition "APTOS 2019 Blindness Detection", as downloaded: `train.csv`
(id_code, diagnosis) and `train_images/*.png`, 3,662 labelled images. Parents: b is trained on
EyePACS, by `configs/eyepacs.py` or elsewhere; c is torchvision's ImageNet-1k.

Stages: merge linear probe 50 epochs at 1e-4, fine-tuning 50 epochs at 1e-5, AdamW, 224 px.

Published (arXiv 2403.11646, test accuracy / macro F1):

    method      parents              DenseNet-121   ResNet-50
    FT          ImageNet             .826 / .639    .837 / .674
    FT          EyePACS              .834 / .673    .853 / .702
    LP-FT       ImageNet             .823 / .650    .837 / .685
    LP-FT       EyePACS              .831 / .687    .852 / .706
    MedMerge    both                 .842 / .713    .850 / .710

The paper's split is 2,929 / 366 / 367 images: give a table of it (filename, class, split) with
--config.data.split_table. Without one the split is a fresh stratified 80/10/10.

Variants: `configs/aptos.py:compare` runs the baselines beside it, on three seeds;
`configs/aptos.py:resnet50` and `configs/aptos.py:resnet50,compare` the other backbone, whose
parent b is in `runs/eyepacs_resnet50`. `configs/aptos.py:deit_base` is not the paper's: DeiT-B with
the stochastic depth of its authors (arXiv 2012.12877), whose parent b is in
`runs/eyepacs_deit_base`.
"""

import ml_collections

from medmerge_jax.config import default_config

BACKBONES = {"": "densenet121", "resnet50": "resnet50", "deit_base": "deit_base_patch16_224"}


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """`variant`: empty, "compare", "resnet50" or "deit_base", or "compare" and one of these."""
    words = set(filter(None, variant.split(",")))
    backbone = ",".join(sorted(words - {"compare"}))
    if backbone not in BACKBONES:
        raise ValueError(f"configs/aptos.py has no variant {variant!r}")
    config = default_config()
    config.recipe = "compare" if "compare" in words else "medmerge"
    config.architecture = BACKBONES[backbone]
    config.drop_path = 0.1 if backbone == "deit_base" else 0.0
    config.parents.b = f"runs/eyepacs_{backbone}" if backbone else "runs/eyepacs"
    config.parents.c = "imagenet"
    config.data.name = "aptos2019"
    config.data.kind = "official"
    config.data.root = "aptos2019"
    config.help = (
        f"parents.b is made by: python -m medmerge_jax.main --config configs/eyepacs.py"
        f"{':' if backbone else ''}{backbone} --workdir {config.parents.b}; or give any "
        "weight file or run directory with --config.parents.b=PATH"
    )
    return config
