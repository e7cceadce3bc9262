"""TFDS's own test case for builders, on ours, without TensorFlow: python -m helpers.tfds_case.

TFDS cannot import `DatasetBuilderTestCase` without TensorFlow, although little of it needs it.
Here a stand-in takes the place of the module `tensorflow`: a base class of tests, a folder and
three functions on files. It has nothing else, so that whatever needs TensorFlow fails.

Of the five tests `test_download_and_prepare_as_dataset` is run without its loop over TensorFlow's
modes, and reads with `as_data_source` in place of `as_dataset`. Everything else is TFDS's: the
registration, info and tags; downloads forbidden, keys without local paths, the number of examples
of each split, no example in two splits, the same after reloading, for each config.

It is a program of its own, because the stand-in must not be seen by other tests.
"""

import itertools
import os
import shutil
import sys
import tempfile
import types
import unittest
from pathlib import Path

import numpy as np

from helpers import small_layouts
from medmerge_jax.data import BUILDERS


def stand_in():
    """What TFDS's test case needs of TensorFlow."""

    class Dataset:
        """For annotations."""

    gfile = types.SimpleNamespace(exists=os.path.exists, makedirs=os.makedirs, rmtree=shutil.rmtree)
    module = types.ModuleType("tensorflow")
    module.__version__ = "2.99.stand-in"
    module.test = types.SimpleNamespace(TestCase=unittest.TestCase)
    temporary = types.SimpleNamespace(get_temp_dir=lambda: os.environ["TEST_TMPDIR"])
    module.compat = types.SimpleNamespace(v1=types.SimpleNamespace(test=temporary))
    module.io = types.SimpleNamespace(gfile=gfile)
    module.dtypes = types.SimpleNamespace(DType=type)
    module.data = types.SimpleNamespace(Dataset=Dataset)
    return module


def import_test_case():
    """`DatasetBuilderTestCase`; TFDS sees the stand-in only while it is imported."""
    sys.modules["tensorflow"] = stand_in()
    try:
        from tensorflow_datasets.testing.dataset_builder_testing import DatasetBuilderTestCase
    finally:
        del sys.modules["tensorflow"]
    return DatasetBuilderTestCase


def checksum(example):
    """Equal for equal examples."""
    return tuple((name, np.asarray(value).tobytes()) for name, value in sorted(example.items()))


def cases():
    """A test case for each builder."""

    class BuilderTestCase(import_test_case()):
        @classmethod
        def setUpClass(cls):
            super().setUpClass()
            cls.EXAMPLE_DIR = tempfile.mkdtemp(dir=os.environ["TEST_TMPDIR"])
            cls.write(Path(cls.EXAMPLE_DIR))

        def test_download_and_prepare_as_dataset(self):
            for config in self.BUILDER_CONFIG_NAMES_TO_TEST or [None]:
                self._download_and_prepare_as_dataset(self._make_builder(config=config))

        def _assertAsDataset(self, builder):  # noqa: N802
            seen = {}
            for split, number in self.SPLITS.items():
                source = builder.as_data_source(split=split)
                examples = [source[index] for index in range(len(source))]
                self.assertEqual(len(examples), number)
                for example in examples:
                    for name, info in builder.info.features.get_tensor_info().items():
                        value = np.asarray(example[name])
                        self.assertEqual(value.ndim, len(info.shape))
                        if info.shape:
                            self.assertEqual(value.dtype, info.np_dtype)
                seen[split] = {checksum(example) for example in examples}
            for one, other in itertools.combinations(seen.values(), 2):
                self.assertFalse(one & other)

    for name, write, splits, configs in (
        ("aptos2019", small_layouts.aptos2019, (15, 5, 5), ()),
        ("eyepacs", small_layouts.eyepacs, (34, 6, 8), ("pooled",)),
        ("ham10000", small_layouts.ham10000_challenge, (28, 7, 9), ("published",)),
        ("isic2019", small_layouts.isic2019, (32, 8, 8), ()),
        ("chexpert", small_layouts.chexpert, (16, 4, 4), ("zeros", "ones", "ignore")),
        ("rsna_pneumonia", small_layouts.rsna_pneumonia, (12, 2, 2), ()),
        ("cifar10", small_layouts.cifar10, (90, 10, 20), ()),
        ("medmnist", small_layouts.bloodmnist, (16, 8, 9), ("bloodmnist",)),
    ):
        body = {
            "DATASET_CLASS": BUILDERS[name],
            "SPLITS": dict(zip(("train", "validation", "test"), splits, strict=True)),
            "BUILDER_CONFIG_NAMES_TO_TEST": list(configs),
            "write": staticmethod(write),
        }
        yield type(f"Test_{name}", (BuilderTestCase,), body)


def main():
    """Exit status 0 if all pass; prints how many ran."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TEST_TMPDIR"] = folder
        load = unittest.defaultTestLoader.loadTestsFromTestCase
        suite = unittest.TestSuite(load(case) for case in cases())
        result = unittest.TextTestRunner(verbosity=2).run(suite)
    return not (result.wasSuccessful() and result.testsRun)


if __name__ == "__main__":
    sys.exit(main())
