r"""MedMerge on RSNA Pneumonia, chest X-rays that are normal or have an opacity: the paper's run.

    python -m medmerge_jax.main --config configs/rsna_pneumonia.py --workdir runs/rsna_pneumonia \
        --config.data.root=rsna_pneumonia --config.parents.b=runs/chexpert

Data: the Kaggle competition "RSNA Pneumonia Detection Challenge", as downloaded:
`stage_2_train_labels.csv`, `stage_2_detailed_class_info.csv` and `stage_2_train_images/*.dcm`
(reading them needs the extra `dicom`: pip install -e ".[dicom]"). Of its 26,684 patients the
14,863 of the paper's two classes, with one image each. Parents: b is trained on CheXpert, by
`configs/chexpert.py` or elsewhere; c is torchvision's ImageNet-1k.

Stages: merge linear probe 50 epochs at 1e-4, fine-tuning 50 epochs at 1e-5, AdamW, 224 px.

Published (arXiv 2403.11646, test accuracy / macro F1):

    method      parents              DenseNet-121   ResNet-50
    FT          ImageNet             .949 / .946    .946 / .944
    FT          CheXpert             .935 / .932    .946 / .942
    LP-FT       ImageNet             .947 / .944    .936 / .933
    LP-FT       CheXpert             .946 / .944    .951 / .948
    MedMerge    both                 .950 / .947    .945 / .942

A table of the split (filename or patientId, class, split) goes into --config.data.split_table.
Without one it is a fresh stratified 80/10/10.

Variants: `configs/rsna_pneumonia.py:compare` runs the baselines beside it, on three seeds;
`configs/rsna_pneumonia.py:resnet50` and `configs/rsna_pneumonia.py:resnet50,compare` the other
backbone, whose parent b is in `runs/chexpert_resnet50`.
"""

import ml_collections

from medmerge_jax.config import default_config


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """`variant`: empty, or a comma-separated choice of "compare" and "resnet50"."""
    words = set(filter(None, variant.split(",")))
    if unknown := words - {"compare", "resnet50"}:
        raise ValueError(f"configs/rsna_pneumonia.py has no variant {sorted(unknown)}")
    config = default_config()
    config.recipe = "compare" if "compare" in words else "medmerge"
    config.architecture = "resnet50" if "resnet50" in words else "densenet121"
    config.parents.b = "runs/chexpert_resnet50" if "resnet50" in words else "runs/chexpert"
    config.parents.c = "imagenet"
    config.data.name = "rsna_pneumonia"
    config.data.kind = "official"
    config.data.root = "rsna_pneumonia"
    config.help = (
        f"parents.b is made by: python -m medmerge_jax.main --config configs/chexpert.py"
        f"{':resnet50' if 'resnet50' in words else ''} --workdir {config.parents.b}; or give any "
        "weight file or run directory with --config.parents.b=PATH"
    )
    return config
