"""What we write torchvision loads with `strict=True`, and what it writes we load, bit for bit."""

import pytest

from medmerge_jax.models import get_spec, list_models
from medmerge_jax.weights import load_weights, save_weights

IMAGENET_MODELS = [
    name for name in list_models() if get_spec(name).torch_head in ("fc", "classifier")
]
QUICK = ("resnet18", "densenet121")


@pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in IMAGENET_MODELS],
)
def test_round_trip_through_torchvision(
    torch, torchvision, tmp_path, make_variables, assert_same, name
):
    from safetensors.torch import load_file, save_file

    variables = make_variables(name)
    save_weights(tmp_path / "ours.safetensors", name, variables)
    network = getattr(torchvision.models, name)(weights=None, num_classes=5)
    network.load_state_dict(load_file(tmp_path / "ours.safetensors"), strict=True)

    state = network.state_dict()
    save_file(state, tmp_path / "theirs.safetensors")
    files = ["theirs.safetensors"]
    if name in QUICK:  # for the others their names and shapes are to be shown, not the formats
        files += save_as_pickles(torch, state, tmp_path)
    for file in files:
        assert_same(load_weights(name, tmp_path / file), variables)


def save_as_pickles(torch, state, folder):
    """In all formats that PyTorch has had; returns the files' names."""
    torch.save(state, folder / "zip.pth")
    torch.save({"model": state, "epoch": 3}, folder / "checkpoint.pt")
    torch.save(state, folder / "stream.pth", _use_new_zipfile_serialization=False)
    return ["zip.pth", "checkpoint.pt", "stream.pth"]
