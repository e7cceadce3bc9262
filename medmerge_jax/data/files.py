"""Which files below a folder are images of the data set, and what is said of the others."""

import fnmatch
import os
import re
from collections import deque
from collections.abc import Collection
from pathlib import Path

from medmerge_jax.data.dataset import EXAMPLES
from medmerge_jax.errors import UserError
from medmerge_jax.images.formats import SUFFIXES, is_dicom

_LITTER = (
    "__macosx", "@eadir", "lost+found", "thumbs.db", "desktop.ini", "$recycle.bin", "#recycle",
    "@recycle", "system volume information", "__pycache__", "ipynb_checkpoints",
)  # fmt: skip
"""What operating systems, disk stations and editors leave, beside hidden files; in lower case."""

_NO_SUFFIX = re.compile(r"(?:\.[0-9]*)?")
"""In place of a suffix: nothing, or the end of an identifier."""


def find_images(root: Path, exclude: Collection[str] = ()) -> tuple[list[Path], list[str]]:
    """All image files below a folder, and a sentence for each kind of thing that is left out.

    Links to folders are followed; a file that several links lead to is there once.

    Args:
      root: The folder.
      exclude: Patterns as "*_mask*"; files and folders whose name, or path below the root, is like
        one of them are left out, in any case.

    Raises:
      UserError: A folder cannot be listed.
    """
    finder = ImageFinder(root, exclude)
    return finder.images(root), finder.notes()


class ImageFinder:
    """Lists folders below a root, and keeps what it leaves out.

    Attributes:
      linked: Links to folders, which are followed.
    """

    def __init__(self, root: Path, exclude: Collection[str] = ()):
        self.linked: set[Path] = set()
        self._root = root
        patterns = (exclude,) if isinstance(exclude, str) else exclude
        self._patterns = [pattern.lower() for pattern in patterns]
        self._others: set[Path] = set()
        self._excluded: set[Path] = set()
        self._litter: set[Path] = set()
        self._again: set[Path] = set()
        self._loose: set[Path] = set()
        self._file_links = False
        self._listed: dict[Path, list[tuple[Path, bool, bool]]] = {}

    @property
    def has_links(self) -> bool:
        """Whether a file may have been found under two names."""
        return bool(self.linked) or self._file_links

    def folders(self, parent: Path) -> list[Path]:
        """The folders in a folder, by name."""
        return [path for path, is_folder, _ in self._list(parent) if is_folder]

    def files(self, parent: Path) -> list[Path]:
        """The files directly in a folder, by name."""
        return [path for path, is_folder, _ in self._list(parent) if not is_folder]

    def loose(self, parent: Path) -> list[Path]:
        """The image files directly in a folder, which has folders for images."""
        images = [path for path in self.files(parent) if is_image(path)]
        self._loose |= set(images)
        return images

    def images(self, folder: Path) -> list[Path]:
        """The image files below a folder, to any depth, each once, sorted by path."""
        above = os.path.realpath(folder)
        seen: set[str] = set()
        found: list[tuple[bool, str, Path]] = []
        # Links come last, so that what they lead to has its own path where it is below the folder.
        queue, links = deque([folder]), deque[Path]()
        while queue or links:
            directory = queue.popleft() if queue else links.popleft()
            home = os.path.realpath(directory)
            if home in seen or (home != above and f"{above}/".startswith(f"{home}/")):
                self._again.add(directory)
                continue
            seen.add(home)
            for path, is_folder, is_link in self._list(directory):
                if is_folder:
                    (links if is_link else queue).append(path)
                elif is_image(path):
                    real = os.path.realpath(path) if is_link else f"{home}/{path.name}"
                    self._file_links |= is_link
                    found.append((is_link, real, path))
                else:
                    self._others.add(path)
        files: dict[str, Path] = {}
        for _, real, path in sorted(found, key=lambda one: (one[0], one[2].as_posix())):
            if real in files:
                self._again.add(path)
            else:
                files[real] = path
        return sorted(files.values(), key=Path.as_posix)

    def notes(self) -> list[str]:
        """A sentence for each kind of thing that was left out or followed; examples last."""
        endings = ", ".join(SUFFIXES)
        kinds = (
            (self._others, "file", f"left out: no name ends in {endings}, nor is it DICOM"),
            (self._loose, "image", "left out, in the folder of no class"),
            (self._excluded, "path", "left out by data.exclude"),
            (self._again, "link", "left out: what they lead to is there already"),
            (self.linked, "link", "followed to a folder; data.exclude leaves it out"),
        )
        notes = [
            f"{count(len(paths), what)} {done}{EXAMPLES}{self._shown(min(paths))}"
            for paths, what, done in kinds
            if paths
        ]
        if self._litter:
            names = ", ".join(sorted({path.name for path in self._litter}))
            notes.append(
                f"{count(len(self._litter), 'folder')} left out that computers leave for "
                f"themselves: {names}"
            )
        return notes

    def _shown(self, path: Path) -> str:
        return path.relative_to(self._root).as_posix()

    def _list(self, directory: Path) -> list[tuple[Path, bool, bool]]:
        """What is in a folder, by name: path, whether it is a folder, whether it is a link."""
        if directory in self._listed:
            return self._listed[directory]
        try:
            with os.scandir(directory) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(
                f"{directory}: the folder cannot be listed ({error.strerror}); give yourself the "
                "right to read it, or leave it out with data.exclude"
            ) from error
        kept = []
        for entry in listed:
            path, is_link = Path(directory, entry.name), entry.is_symlink()
            try:
                is_folder = entry.is_dir()
            except OSError:  # a link to itself
                is_folder = False
            if entry.name.startswith(".") or entry.name.lower() in _LITTER:
                if is_folder and not entry.name.startswith("."):
                    self._litter.add(path)
            elif self._is_excluded(path):
                self._excluded.add(path)
            else:
                if is_folder and is_link:
                    self.linked.add(path)
                kept.append((path, is_folder, is_link))
        self._listed[directory] = kept
        return kept

    def _is_excluded(self, path: Path) -> bool:
        if not self._patterns:
            return False
        names = (path.name.lower(), self._shown(path).lower())
        return any(fnmatch.fnmatchcase(name, p) for p in self._patterns for name in names)


def refuse_no_folder(root: Path) -> None:
    """Raises a UserError if the folder of the images is not there."""
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise UserError(f"{root}: {what}; the folder of the images is wanted")


def count(number: int, noun: str) -> str:
    """A number of things with its verb.

    >>> count(1, "file"), count(3, "file")
    ('1 file is', '3 files are')
    """
    return f"{number} {noun} is" if number == 1 else f"{number} {noun}s are"


def is_image(path: Path) -> bool:
    """Whether a file is called like an image, or has no suffix and begins as DICOM files do.

    Scanners name their files IM000001 or by an identifier, 1.2.840.113619.2.55; of these the first
    132 bytes are read. A file DICOMDIR only lists others.
    """
    name = path.name.lower()
    if name.endswith(SUFFIXES):
        return True
    if not _NO_SUFFIX.fullmatch(path.suffix) or name == "dicomdir":
        return False
    try:
        return path.is_file() and is_dicom(path)
    except OSError:  # may not be read
        return False
