"""Models for other programs: files of PyTorch's libraries, and a program that any XLA runs."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from medmerge_jax.errors import UserError
from medmerge_jax.models import create_model, get_spec
from medmerge_jax.models.layers import portable
from medmerge_jax.models.network import Network
from medmerge_jax.models.registry import Elsewhere
from medmerge_jax.storage.atomic import write_atomically, write_json
from medmerge_jax.storage.folders import replace_directory
from medmerge_jax.weights.card import FOLDER, OWN_USAGE
from medmerge_jax.weights.files import write_safetensors
from medmerge_jax.weights.layout import (
    CARD_FILE,
    HASHES_FILE,
    README_FILE,
    RESIZES,
    TIMM_FILE,
    WEIGHTS_FILE,
)
from medmerge_jax.weights.models import Model, write_beside
from medmerge_jax.weights.names import variables_to_torch
from medmerge_jax.weights.references import HUB

PROGRAM_FILE, ONNX_FILE = "model.stablehlo", "model.onnx"

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
"""That a program of StableHLO is for."""

FILES = (
    *(WEIGHTS_FILE, CARD_FILE, README_FILE, HASHES_FILE),
    *(TIMM_FILE, PROGRAM_FILE, ONNX_FILE),
)
"""All that an export may have."""

_TOLERANCE = 1e-4
"""Of logits, as a share of the largest."""

_IMPORTS = {"torchvision": "torchvision", "timm": "timm", "monai": "monai.networks.nets"}


def export_model(
    model: Model,
    folder: Path,
    kind: str = "safetensors",
    *,
    normalised: bool = True,
    repository: str = "",
) -> tuple[str, ...]:
    """Writes a model for other programs into a folder, which is replaced whole.

    Beside what each kind is, the folder has `model.json` and `README.md`, a model card of the
    Hugging Face hub that says how the model is used.

    Args:
      model: With a head.
      folder: Made if it is not there.
      kind: "safetensors", `model.safetensors` with torchvision's names; "timm", with timm's, and
        the `config.json` by which `timm.create_model("local-dir:FOLDER")` and the hub know it;
        "monai", with MONAI's; "stablehlo", `model.stablehlo`, a program with the weights inside,
        for any number of images, which JAX's own export runs on CPU, GPU and TPU; "onnx",
        `model.onnx`, the same for ONNX runtimes, which is run on noise and compared before it is
        written.
      normalised: Of a program: whether it takes float32 images that are normalised, (n, size,
        size, 3); else uint8 ones, 0 to 255, that are resized only. It returns logits.
      repository: "ORG/NAME" of the hub, if the folder will be pushed there: the model card then
        says how the model is loaded from there.

    Returns:
      Names of the files.

    Raises:
      UserError: The model has no head, the library has no such network, the folder holds other
        files, a package is missing, or the kind is none of these.
    """
    if kind not in KINDS:
        raise UserError(f"export as {kind!r}: one of {', '.join(KINDS)} is wanted")
    if not model.num_classes:
        raise UserError(f"{model.file or model.architecture}: the model has no head to export")

    def write(new: Path) -> None:
        usage = KINDS[kind](model, new, normalised)
        if repository:
            usage = {title: _from_hub(code, repository) for title, code in usage.items()}
        write_beside(new, model, usage)
        files.extend(sorted(path.name for path in new.iterdir()))

    files: list[str] = []
    replace_directory(folder, write, FILES)
    return tuple(files)


def _from_hub(code: str, repository: str) -> str:
    """The code that loads from the hub what the given one loads from a folder."""
    code = code.replace(f"local-dir:{FOLDER}", f"hf-hub:{repository}")
    code = code.replace(FOLDER, f"{HUB}{repository}")
    for name in (WEIGHTS_FILE, PROGRAM_FILE, ONNX_FILE):
        fetched = f'hf_hub_download("{repository}", "{name}")'
        if f'"{name}"' in code:
            code = "from huggingface_hub import hf_hub_download\n" + code.replace(
                f'"{name}"', fetched
            )
    return code


def _safetensors(model: Model, folder: Path, normalised: bool) -> dict[str, str]:
    del normalised
    write_safetensors(
        folder / WEIGHTS_FILE, variables_to_torch(model.architecture, model.variables)
    )
    elsewhere = get_spec(model.architecture).elsewhere
    usage = {"medmerge-jax": OWN_USAGE}
    for library in ("torchvision", "timm"):  # which have the same names
        if library in elsewhere:
            usage[library] = _loading(library, elsewhere[library], model)
    return usage


def _timm(model: Model, folder: Path, normalised: bool) -> dict[str, str]:
    del normalised
    elsewhere = _of_library(model, "timm")
    _write_renamed(model, folder, elsewhere)
    look, spec = model.preprocessing, get_spec(model.architecture)
    config = {
        "architecture": model.architecture,
        "num_classes": model.num_classes,
        "num_features": spec.num_features,
        "pretrained_cfg": {
            "num_classes": model.num_classes,
            "input_size": [3, look.size, look.size],
            "mean": list(look.mean),
            "std": list(look.std),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": next(mode for mode, ours in RESIZES.items() if ours == look.resize),
            "first_conv": spec.stem,
            "classifier": [spec.torch_head, *spec.further_heads]
            if spec.further_heads
            else spec.torch_head,
            **({"label_names": list(model.classes)} if model.classes else {}),
        },
    }
    write_json(folder / TIMM_FILE, config)
    return {
        "timm": "import timm\n\nmodel = timm.create_model("
        f'"local-dir:{FOLDER}", pretrained=True).eval()'
    }


def _monai(model: Model, folder: Path, normalised: bool) -> dict[str, str]:
    del normalised
    elsewhere = _of_library(model, "monai")
    _write_renamed(model, folder, elsewhere)
    return {"MONAI": _loading("monai", elsewhere, model)}


def _stablehlo(model: Model, folder: Path, normalised: bool) -> dict[str, str]:
    from jax import export

    size = model.preprocessing.size
    (count,) = export.symbolic_shape("n")
    images = jax.ShapeDtypeStruct((count, size, size, 3), _input_type(normalised))
    program = export.export(jax.jit(_logits(model)), platforms=PLATFORMS)(images).serialize()
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / PROGRAM_FILE, lambda file: file.write(program))
    return {
        "JAX": "from pathlib import Path\n\nfrom jax import export\n\n"
        f'data = Path("{PROGRAM_FILE}").read_bytes()\n{_what(model, normalised)}\n'
        "logits = export.deserialize(bytearray(data)).call(images)"
    }


def _onnx(model: Model, folder: Path, normalised: bool) -> dict[str, str]:
    try:
        import jax2onnx
        import onnxruntime
    except ImportError as error:
        raise UserError(
            f"for ONNX the package {error.name} is missing; pip install 'medmerge-jax[onnx]'"
        ) from error
    size, dtype = model.preprocessing.size, _input_type(normalised)
    inputs = [jax.ShapeDtypeStruct(("n", size, size, 3), dtype)]
    # They warn of shapes that are inferred later, and of plugins for packages that are not here.
    with portable(), _only_errors("onnx_ir", "jax2onnx"):
        made = jax2onnx.to_onnx(_logits(model), inputs, model_name=model.architecture)
    data = made.SerializeToString()
    session = onnxruntime.InferenceSession(data)
    noise = np.random.default_rng(0).integers(0, 256, (2, size, size, 3)).astype(dtype)
    images = noise / np.float32(128) - 1 if normalised else noise
    (found,) = session.run(None, {session.get_inputs()[0].name: images})
    wanted = np.asarray(jax.jit(_logits(model))(images))
    if not np.allclose(found, wanted, atol=_TOLERANCE * max(1.0, np.abs(wanted).max())):
        apart = np.abs(found - wanted).max()
        raise UserError(
            f"{model.architecture}: as ONNX its logits differ by {apart:.2g}; use stablehlo"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / ONNX_FILE, lambda file: file.write(data))
    return {
        "ONNX runtime": "import onnxruntime\n\n"
        f'session = onnxruntime.InferenceSession("{ONNX_FILE}")\n'
        f"{_what(model, normalised)}\n"
        "(logits,) = session.run(None, {session.get_inputs()[0].name: images})"
    }


@contextlib.contextmanager
def _only_errors(*packages: str) -> Iterator[None]:
    """Has packages log errors alone."""
    levels = {logger: logger.level for logger in map(logging.getLogger, packages)}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def _logits(model: Model) -> Callable[[jax.Array], Any]:
    network = Network(create_model(model.architecture, model.num_classes), model.preprocessing)
    variables = jax.tree.map(np.asarray, dict(model.variables))

    def logits(images: jax.Array) -> Any:
        return network.model.apply(variables, network.normalise(images), train=False)

    return logits


def _input_type(normalised: bool) -> Any:
    return np.dtype(np.float32 if normalised else np.uint8)


def _what(model: Model, normalised: bool) -> str:
    """A comment on what the images are."""
    size = model.preprocessing.size
    what = "float32, normalised" if normalised else "uint8, 0 to 255"
    return f"# images: (n, {size}, {size}, 3) {what}"


KINDS: Mapping[str, Callable[[Model, Path, bool], dict[str, str]]] = {
    "safetensors": _safetensors,
    "timm": _timm,
    "monai": _monai,
    "stablehlo": _stablehlo,
    "onnx": _onnx,
}
"""What a model is exported as: each writes its files and returns how they are used."""


def _of_library(model: Model, library: str) -> Elsewhere:
    elsewhere = get_spec(model.architecture).elsewhere
    if library not in elsewhere:
        others = [kind for kind in KINDS if kind not in ("timm", "monai") or kind in elsewhere]
        raise UserError(
            f"{library} has no {model.architecture}; it can be exported as {', '.join(others)}"
        )
    return elsewhere[library]


def _write_renamed(model: Model, folder: Path, elsewhere: Elsewhere) -> None:
    tensors = variables_to_torch(model.architecture, model.variables)
    renamed = {elsewhere.rename(name): tensor for name, tensor in tensors.items()}
    write_safetensors(folder / WEIGHTS_FILE, renamed)


def _loading(library: str, elsewhere: Elsewhere, model: Model) -> str:
    create = elsewhere.create.format(classes=model.num_classes)
    return (
        f"import {_IMPORTS[library]}\nfrom safetensors.torch import load_file\n\n"
        f'model = {create}\nmodel.load_state_dict(load_file("{WEIGHTS_FILE}"))\nmodel.eval()'
    )
