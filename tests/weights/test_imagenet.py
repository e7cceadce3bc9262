import hashlib
import re
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from medmerge_jax.errors import UserError
from medmerge_jax.models import get_spec, list_models
from medmerge_jax.weights import find_imagenet_weights, hub, imagenet, load_parent, save_weights


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """A machine without any weights and without network."""
    monkeypatch.setenv("MEDMERGE_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def offline(*_, **__):
        raise ConnectionError("no route to host\nand more")

    hub.fetch.cache_clear()
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", offline)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    yield tmp_path
    hub.fetch.cache_clear()


def test_own_folder_first(machine, make_variables, assert_same, caplog):
    variables = make_variables("resnet18", 1000)
    path = machine / "cache" / "weights" / "resnet18.safetensors"
    save_weights(path, "resnet18", variables)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()

    with caplog.at_level("INFO"):
        found, card = load_parent("imagenet", "resnet18")
    assert_same(found, variables)
    assert (card["file"], card["sha256"], card["num_classes"]) == (str(path), sha256, 1000)
    assert sha256 in caplog.text


def test_torch_cache_is_checked_against_its_name(machine, monkeypatch):
    folder = machine / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    path = folder / "resnet50-0676ba61.pth"
    path.write_bytes(b"weights")
    with pytest.raises(UserError, match=r"its sha256 begins with .*not with the 0676ba61"):
        find_imagenet_weights("resnet50")

    digits = hashlib.sha256(b"weights").hexdigest()[:8]
    right = path.rename(folder / f"resnet50-{digits}.pth")
    found = imagenet._in_torch_cache(right)
    assert found is not None
    assert found.path == right


def test_download(machine, monkeypatch):
    content = b"weights"
    commit, sha256 = "c" * 40, hashlib.sha256(content).hexdigest()
    file = machine / "snapshots" / commit / "model.safetensors"
    file.parent.mkdir(parents=True)
    calls = []

    def download(repository, name, *, revision, etag_timeout):
        calls.append((repository, name, revision, etag_timeout))
        blob = machine / announced
        blob.write_bytes(content)
        file.unlink(missing_ok=True)
        file.symlink_to(blob)
        return str(file)

    def model_info(self, repository, *, revision, timeout):
        assert (revision, timeout) == (None, 3.0)
        names = [SimpleNamespace(rfilename="model.safetensors")]
        return SimpleNamespace(siblings=names)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    announced = sha256
    found = find_imagenet_weights("densenet121")
    assert calls == [("timm/densenet121.tv_in1k", "model.safetensors", None, 3.0)]
    assert (found.path, found.sha256) == (file, sha256)
    assert found.origin == f"hf://timm/densenet121.tv_in1k@{commit}/model.safetensors"

    announced = "0" * 64
    hub.fetch.cache_clear()
    with pytest.raises(UserError, match="the download is damaged"):
        find_imagenet_weights("densenet121")


@pytest.mark.parametrize("name", [name for name in list_models() if get_spec(name).hub_id])
def test_without_network_the_files_are_named(machine, name):
    with pytest.raises(UserError) as error:
        find_imagenet_weights(name)
    message = str(error.value)
    assert "ConnectionError: no route to host)" in message
    assert str(machine / "cache" / "weights" / f"{name}.safetensors") in message
    if get_spec(name).torch_file is None:
        return
    path = re.search(rf"put it at (\S*{name}-[0-9a-f]{{8}}\.pth)", message)
    assert path is not None
    assert Path(path[1]).parent == machine / "torch" / "hub" / "checkpoints"


def test_small_models_have_no_imagenet_weights():
    with pytest.raises(UserError, match="there are no ImageNet weights of resnet20"):
        load_parent("imagenet", "resnet20")


def test_registered_files_are_torchvisions(torchvision):
    for name in list_models():
        spec = get_spec(name)
        if hasattr(torchvision.models, name) and spec.torch_file:
            official = torchvision.models.get_model_weights(name).IMAGENET1K_V1
            assert official.url.endswith(f"/{spec.torch_file}")
            transforms = official.transforms()
            assert (tuple(transforms.mean), tuple(transforms.std)) == (
                spec.preprocessing.mean,
                spec.preprocessing.std,
            )
