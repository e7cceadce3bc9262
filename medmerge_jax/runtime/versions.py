"""What decides a run's numbers, for its records."""

import contextlib
import importlib.metadata

_PACKAGES = (
    "medmerge-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "pillow",
)  # fmt: skip


def package_versions() -> dict[str, str]:
    """Versions of this package and of those that its results depend on; "unknown" if not installed.

    From a source tree that is not installed, this package itself is unknown.
    """
    versions = dict.fromkeys(_PACKAGES, "unknown")
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions
