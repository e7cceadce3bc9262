r"""Your own images and your own two weight files.

    python -m medmerge_jax.main --config configs/folder.py --workdir runs/mine \
        --config.data.root=images \
        --config.parents.b=medical.pth --config.parents.c=imagenet.safetensors

`images/<split>/<class>/*.jpg|png` with the splits train, val and test; or
`images/<class>/*`, then a stratified split is made. With a table instead, in which each row
names an image and its label(s), and optionally a split and a group (the patient):

    ... --config configs/folder.py:table --config.data.table=labels.csv

The parents are files with torchvision's names (`.safetensors`, `.pth`), model or run
directories of this program, or "imagenet". Their heads may have any size: they are replaced.

Variants: "table", "compare" (the baselines beside MedMerge, three seeds), or "table,compare".
"""

import ml_collections

from medmerge_jax.config import default_config


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """`variant`: empty, or a comma-separated choice of "table" and "compare"."""
    words = set(filter(None, variant.split(",")))
    if unknown := words - {"table", "compare"}:
        raise ValueError(f"configs/folder.py has no variant {sorted(unknown)}")
    config = default_config()
    config.recipe = "compare" if "compare" in words else "medmerge"
    config.architecture = "resnet50"
    config.data.kind = "table" if "table" in words else "folder"
    return config
