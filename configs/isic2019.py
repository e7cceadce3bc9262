r"""MedMerge on ISIC 2019, dermoscopic images of eight kinds of skin lesions: the paper's run.

    python -m medmerge_jax.main --config configs/isic2019.py --workdir runs/isic2019 \
        --config.data.root=isic2019 --config.parents.b=runs/ham10000

Data: the training data of the ISIC 2019 challenge, as downloaded: `ISIC_2019_Training_Input/`,
`ISIC_2019_Training_GroundTruth.csv` and `ISIC_2019_Training_Metadata.csv`, 25,331 images. Parents:
b is trained on HAM10000, by `configs/ham10000.py` or elsewhere; c is torchvision's ImageNet-1k.

Stages: merge linear probe 50 epochs at 1e-4, fine-tuning 50 epochs at 1e-5, AdamW, 224 px.

Published (arXiv 2403.11646, test accuracy / macro F1):

    method      parents              DenseNet-121   ResNet-50
    FT          ImageNet             .805 / .685    .771 / .634
    FT          HAM10K               .810 / .699    .803 / .664
    LP-FT       ImageNet             .777 / .638    .776 / .637
    LP-FT       HAM10K               .821 / .705    .781 / .642
    MedMerge    both                 .814 / .714    .821 / .709

Two traps of this pair, which the published numbers may owe something to:

- There are several images of many lesions. Here no lesion is in two splits;
  --config.data.split_by=image splits as the paper does.
- ISIC 2019 contains all 10,015 images of HAM10000: a parent trained on that has seen part of any
  test split of this. If b is a run directory, the audit before training says which part;
  --config.data.exclude_overlap=True leaves these images out of the validation and test splits.

Variants: `configs/isic2019.py:compare` runs the baselines beside it, on three seeds;
`configs/isic2019.py:resnet50` and `configs/isic2019.py:resnet50,compare` the other backbone,
whose parent b is in `runs/ham10000_resnet50`.
"""

import ml_collections

from medmerge_jax.config import default_config


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """`variant`: empty, or a comma-separated choice of "compare" and "resnet50"."""
    words = set(filter(None, variant.split(",")))
    if unknown := words - {"compare", "resnet50"}:
        raise ValueError(f"configs/isic2019.py has no variant {sorted(unknown)}")
    config = default_config()
    config.recipe = "compare" if "compare" in words else "medmerge"
    config.architecture = "resnet50" if "resnet50" in words else "densenet121"
    config.parents.b = "runs/ham10000_resnet50" if "resnet50" in words else "runs/ham10000"
    config.parents.c = "imagenet"
    config.data.name = "isic2019"
    config.data.kind = "official"
    config.data.root = "isic2019"
    config.help = (
        f"parents.b is made by: python -m medmerge_jax.main --config configs/ham10000.py"
        f"{':resnet50' if 'resnet50' in words else ''} --workdir {config.parents.b}; or give any "
        "weight file or run directory with --config.parents.b=PATH"
    )
    return config
