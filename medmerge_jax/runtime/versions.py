"""What decides a run's numbers, for its records."""

import contextlib
import importlib.metadata

_PACKAGES = (
    "medmerge-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "pillow",
)  # fmt: skip


def package_versions() -> dict[str, str]:
    """Of what results depend on; "unknown" if not installed, as this package in a source tree."""
    versions = dict.fromkeys(_PACKAGES, "unknown")
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions
