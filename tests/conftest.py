import os

# Before JAX and matplotlib are imported: the tests are the same on every machine.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["MPLBACKEND"] = "Agg"
os.environ["HF_HUB_OFFLINE"] = "1"  # or what is missing is looked for until all retries are over

import collections
import importlib
import sys

import numpy as np
import pytest
from helpers.programs import WarmPrograms
from PIL import Image

ALL_FORMATS = {}
"""Of figures, as they were before the first test."""


@pytest.fixture(scope="session")
def compiled_programs(tmp_path_factory):
    """A folder of compiled programs for all tests of this worker, most of which want the same.

    Not one for all workers: JAX may read there what another process has not yet written to the end.
    """
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="session")
def warm_programs():
    """Starts programs of the package in a moment: all of this worker are forks of one process."""
    programs = WarmPrograms()
    yield programs
    programs.close()


@pytest.fixture
def events():
    """How often JAX said that something happened, in any thread; "compiled" is a program made."""
    import jax

    counter = collections.Counter()

    def count(event, *_, **__):
        counter["compiled" if event.endswith("/backend_compile_duration") else event] += 1

    jax.monitoring.register_event_listener(count)
    jax.monitoring.register_event_duration_secs_listener(count)
    yield counter
    jax.monitoring.unregister_event_listener(count)
    jax.monitoring.unregister_event_duration_listener(count)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """What the quick tests spare; set before their fixtures are made, which run programs too.

    XLA's compiler optimises little, as most programs run for a moment, and figures are drawn as PNG
    files alone: SVG and PDF take twice as long again. The slow tests run what users do, and so do
    all processes that tests start.
    """
    quick = item.get_closest_marker("slow") is None
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_disable_most_optimizations", quick)
    if drawing := sys.modules.get("medmerge_jax.analysis.drawing"):
        formats = ALL_FORMATS.setdefault("figures", drawing.FORMATS)
        drawing.FORMATS = formats[:1] if quick else formats


@pytest.fixture(scope="module", autouse=True)
def memory(compiled_programs):
    """Gives back what a module compiled: together, the large models' programs fill gigabytes.

    They stay on the disk. Set here and not in the environment, which processes of tests inherit.
    """
    if "jax" in sys.modules:
        config = sys.modules["jax"].config
        config.update("jax_compilation_cache_dir", str(compiled_programs))
        config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def torch():
    """PyTorch on two threads; without it the test is skipped."""
    module = pytest.importorskip("torch")
    module.set_num_threads(2)
    return module


@pytest.fixture(scope="session")
def torchvision(torch):
    """torchvision, also where its compiled operators cannot be loaded: the models need none."""
    try:
        return importlib.import_module("torchvision")
    except ImportError:
        pytest.skip("torchvision is not installed")
    except RuntimeError:  # "operator torchvision::nms does not exist"
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    module = importlib.import_module("torchvision")
    module.schemas_kept_alive = library
    return module


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
