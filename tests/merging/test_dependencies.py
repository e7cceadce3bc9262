import subprocess
import sys


def test_merging_imports_only_jax_numpy_and_scipy():
    code = "import sys, medmerge_jax.merging; print(*{name.split('.')[0] for name in sys.modules})"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    loaded = set(result.stdout.split())
    assert {"medmerge_jax", "jax", "numpy"} <= loaded
    others = "flax optax orbax grain PIL sklearn matplotlib absl jinja2 ml_collections torch rich"
    assert not loaded & {*others.split(), "safetensors", "huggingface_hub", "tensorboardX"}


def test_scipys_solvers_are_imported_when_they_are_wanted():
    code = "import sys, medmerge_jax.merging; print('scipy.optimize' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "False\n"
