import importlib

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def transforms(torchvision):
    """torchvision.transforms, on Pillow images."""
    return importlib.import_module("torchvision.transforms")


@pytest.fixture
def write_images():
    """A function that writes small distinct images to the paths given, and returns these."""

    def write(*paths, size=8):
        for number, path in enumerate(paths):
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.full((size, size, 3), number % 256, np.uint8)
            pixels[0, 0] = (number // 256, 7, 9)
            Image.fromarray(pixels).save(path, format="PNG")
        return paths

    return write
