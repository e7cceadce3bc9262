"""What may make results too good: groups and images in two splits or in a parent's training."""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from medmerge_jax.data.dataset import EXAMPLES, DataSet
from medmerge_jax.data.hashing import ImageHashes, find_overlap
from medmerge_jax.data.splits import SPLITS
from medmerge_jax.errors import UserError
from medmerge_jax.weights.card import last_component

AUDIT_FILE = "data_audit.json"
_EXAMPLES = 5
_WITH_EXAMPLES = ("groups", "duplicates", "parents")


def audit_data_set(
    dataset: DataSet,
    hashes: ImageHashes | None = None,
    parents: Mapping[str, ImageHashes | None] | None = None,
) -> dict[str, Any]:
    """What there is in each split, and what is in two.

    Args:
      dataset: The data set.
      hashes: Of its images; without, images are not compared.
      parents: Hashes of the parents' images, None where their training images are unknown.

    Returns:
      For JSON: "name"; "images" and "counts" (of each class) by split; "groups", None if unknown,
      with their number, that of those in two splits, and their images; "duplicates" for each two
      splits; "parents" with the val and test images among those a parent was trained on; "notes",
      what was inferred and left out when the data was read; and "warnings", a sentence for each
      thing that makes results too good.
    """
    audit: dict[str, Any] = {
        "name": dataset.name,
        "images": {name: len(dataset.splits[name]) for name in SPLITS},
        "counts": {name: dataset.counts()[name] for name in SPLITS},
        "groups": _groups(dataset),
        "duplicates": [] if hashes is None else _duplicates(dataset, hashes),
        "parents": {},
        "notes": list(dataset.notes),
    }
    for name, of_parent in (parents or {}).items():
        audit["parents"][name] = None
        if hashes is not None and of_parent is not None:
            theirs = of_parent.training()
            audit["parents"][name] = {"training_images": len(theirs)}
            for split in ("val", "test"):
                ours = hashes.of(split)
                audit["parents"][name][split] = find_overlap(ours, theirs).summary(ours, theirs)
    audit["warnings"] = list(_warnings(audit))
    return audit


def _groups(dataset: DataSet) -> dict[str, Any] | None:
    homes: dict[str, set[str]] = defaultdict(set)
    for name in SPLITS:
        for group in dataset.splits[name].groups or ():
            homes[group].add(name)
    if not homes:
        return None
    crossing = sorted(group for group, names in homes.items() if len(names) > 1)
    members = set(crossing)
    pairs = itertools.combinations(SPLITS, 2)
    return {
        "groups": len(homes),
        "in_several_splits": len(crossing),
        "by_splits": {
            f"{one} and {other}": sum({one, other} <= homes[group] for group in crossing)
            for one, other in pairs
        },
        "images": {
            name: sum(group in members for group in dataset.splits[name].groups or ())
            for name in SPLITS
        },
        "examples": crossing[:_EXAMPLES],
    }


def _duplicates(dataset: DataSet, hashes: ImageHashes) -> list[dict[str, Any]]:
    pairs = []
    for earlier, later in itertools.combinations(SPLITS, 2):
        ours, theirs = hashes.of(later), hashes.of(earlier)
        overlap = find_overlap(ours, theirs, names=False)
        rows = np.flatnonzero(overlap.any)
        labels = dataset.splits[later].labels[rows]
        others = dataset.splits[earlier].labels[overlap.match[rows]]
        same = (labels == others) | (np.isnan(labels) & np.isnan(others))
        summary = overlap.summary(ours, theirs)
        del summary["by_id"]
        different = ~same.reshape(len(rows), int(np.prod(labels.shape[1:]))).all(axis=1)
        pairs.append({"of": later, "in": earlier, **summary, "other_label": int(different.sum())})
    return pairs


def _warnings(audit: Mapping[str, Any]) -> Iterator[str]:
    name, groups, images = audit["name"], audit["groups"], audit["images"]
    if groups and groups["in_several_splits"]:
        yield (
            f"{name}: {groups['in_several_splits']} of {groups['groups']} groups (patients, "
            "lesions) are in more than one split, with "
            f"{groups['images']['test']} of {images['test']} test images: results will be too good"
        )
    for pair in audit["duplicates"]:
        if pair["images"]:
            labels = f", {pair['other_label']} with another label" if pair["other_label"] else ""
            example = "".join(f", such as {' = '.join(both)}" for both in pair["examples"][:1])
            yield (
                f"{name}: {pair['images']} of {images[pair['of']]} {pair['of']} images are in "
                f"{pair['in']} too ({pair['exact']} with the same pixels{labels}){example}"
            )
    for parent, parts in audit["parents"].items():
        for split in ("val", "test") if parts else ():
            part = parts[split]
            if part["images"]:
                yield (
                    f"{name}: parent {parent} was trained on {part['images']} of "
                    f"{images[split]} {split} images ({part['by_id']} by name, "
                    f"{part['by_hash']} by looks); data.exclude_overlap = True leaves them out"
                )
    for evaluated in audit.get("evaluate_on", {}).values():
        yield from evaluated["warnings"]


def audit_evaluated(
    name: str, hashes: ImageHashes, trained: Mapping[str, ImageHashes | None]
) -> tuple[dict[str, Any], np.ndarray]:
    """Which images of a data set that is only evaluated on a model may know.

    Args:
      name: Of the data set.
      hashes: Of its n images.
      trained: Hashes of all images of those who were trained, by who that was, as "parent b"; None
        where they are not known.

    Returns:
      For JSON: "images"; "known", counts by who was trained on them, None where that is not known;
      and "warnings"; no names of images. And which images anybody was trained on, bool (n,).
    """
    known: dict[str, dict[str, int] | None] = {}
    warnings, rows = [], np.zeros(len(hashes), bool)
    for who, theirs in trained.items():
        known[who] = None
        if theirs is not None:
            training = theirs.training()
            # Of one data set the names are unique; 0001.png may be in each of its folders.
            names = not set(hashes.ids) <= set(theirs.ids)
            overlap = find_overlap(hashes, training, names=names)
            summary = overlap.summary(hashes, training)
            part = {key: summary[key] for key in ("images", "by_id", "by_hash", "exact")}
            known[who], rows = {"training_images": len(training), **part}, rows | overlap.any
            if part["images"]:
                warnings.append(
                    f"{name}: {who} was trained on {part['images']} of {len(hashes)} evaluated "
                    f"images ({part['by_id']} by name, {part['by_hash']} by looks); "
                    "data.exclude_overlap = True leaves them out"
                )
    return {"images": len(hashes), "known": known, "warnings": warnings}, rows


def with_evaluated(
    audit: Mapping[str, Any], evaluated: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """An audit with those of the data sets that are only evaluated on, see `audit_evaluated`."""
    whole = {**audit, "evaluate_on": dict(evaluated)}
    whole["warnings"] = list(_warnings(whole))
    return {**whole, "summary": short_text(whole)}


def shareable_audit(audit: Mapping[str, Any], dataset: DataSet) -> dict[str, Any]:
    """What others may see of an audit: no group, and of images their files' names.

    Names in which a group's occurs are left out.

    Args:
      audit: Of `audit_data_set`, with or without the "summary" of `short_text`.
      dataset: That it is of.
    """
    groups = {group for split in dataset.splits.values() for group in split.groups or ()}

    def cleaned(value: Any) -> Any:
        if isinstance(value, list):
            return [cleaned(entry) for entry in value]
        if not isinstance(value, Mapping):
            return value
        shared = {key: cleaned(entry) for key, entry in value.items() if key != "examples"}
        if "images" in value and "exact" in value:
            pairs = [[last_component(name) for name in pair] for pair in value["examples"]]
            shared["examples"] = [
                pair for pair in pairs if not any(g in name for g in groups for name in pair)
            ]
        return shared

    shared: dict[str, Any] = {**audit, **{k: cleaned(audit[k]) for k in _WITH_EXAMPLES}}
    shared["warnings"] = list(_warnings(shared))
    # The examples of notes come last, and may be names of patients.
    shared["notes"] = [note.partition(EXAMPLES)[0] for note in audit.get("notes", ())]
    return {**shared, "summary": short_text(shared)} if "summary" in audit else shared


def overlapping(
    hashes: ImageHashes, parents: Mapping[str, ImageHashes | None]
) -> dict[str, np.ndarray]:
    """Which val and test images any parent was trained on: bool (n,) for each of the two."""
    rows = {}
    for split in ("val", "test"):
        ours = hashes.of(split)
        rows[split] = np.zeros(len(ours), bool)
        for of_parent in filter(None, parents.values()):
            rows[split] |= find_overlap(ours, of_parent.training()).any
    return rows


def without(dataset: DataSet, rows: Mapping[str, np.ndarray]) -> DataSet:
    """The data set without some images.

    They are left out and not moved to the training split, which so stays what it is without the
    parents: every recipe and every parent is trained on the same images.

    Args:
      dataset: The data set.
      rows: bool (n,) for each split that loses images: those it loses.

    Raises:
      UserError: No image of a split would be left.
    """
    splits = dict(dataset.splits)
    for name, leave in rows.items():
        if leave.all():
            raise UserError(
                f"data set {dataset.name}: the parents were trained on all {len(leave)} images of "
                f"the split {name!r}, and data.exclude_overlap leaves them out; give it other "
                "images, or take other parents"
            )
        splits[name] = splits[name].take(np.flatnonzero(~leave))
    return dataclasses.replace(dataset, splits=splits)


def short_text(audit: Mapping[str, Any]) -> list[str]:
    """A few lines for the terminal, warnings first."""
    images = audit["images"]
    sizes = ", ".join(f"{count} {name}" for name, count in images.items())
    notes = []
    groups = audit["groups"]
    if groups and not groups["in_several_splits"]:
        notes.append(f"none of {groups['groups']} groups is in two splits")
    if audit["duplicates"] and not any(pair["images"] for pair in audit["duplicates"]):
        notes.append("no image is in two splits")
    for parent, parts in audit["parents"].items():
        if parts is None:
            notes.append(f"the training images of parent {parent} are not known")
        elif not any(parts[split]["images"] for split in ("val", "test")):
            notes.append(f"parent {parent} was trained on no val or test image")
    excluded = audit.get("excluded", {})
    if any(excluded.values()):
        counts = " and ".join(f"{count} {name}" for name, count in excluded.items())
        notes.append(f"{counts} images that a parent was trained on are left out")
    line = f"data {audit['name']}: {sizes} images"
    return [
        *(f"warning: {text}" for text in audit["warnings"]),
        "; ".join([line, *notes]),
    ]
