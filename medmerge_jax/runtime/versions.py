"""What decides a run's numbers, for its records."""

import importlib.metadata

_PACKAGES = (
    "medmerge-jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "pillow",
)


def package_versions() -> dict[str, str]:
    """Versions of this package and of those that its results depend on; "unknown" if not installed.

    From a source tree that is not installed, this package itself is unknown.
    """
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "unknown"
    return versions
