"""What was asked and what came out, in a sentence."""

from collections.abc import Mapping
from typing import Any

from medmerge_jax.config import Data
from medmerge_jax.evaluation.metrics import METRICS, titles


def title_of(results: Mapping[str, Any], folder: str) -> str:
    """What it is about: the data, and the recipe or study."""
    name = results.get("data", {}).get("name", folder)
    recipe = results.get("recipe")
    if recipe is None:
        return f"{name}: no results yet"
    return f"{name}: {'comparison' if recipe == 'compare' else recipe.replace('_', ' ')}"


def headline(results: Mapping[str, Any]) -> str:
    """What came out, in a sentence; empty where that is not known."""
    data, told = results.get("data", {}), results.get("statistics")
    if "table" in results:
        return _best_row(results)
    name = "macro_f1" if results.get("test", {}).get("macro_f1") is not None else "accuracy"
    value = results.get("test", {}).get(name)
    if value is None:
        return ""
    interval = (told or {}).get("intervals", {}).get(name)
    within = f" (95 % interval {interval['low']:.3f} to {interval['high']:.3f})" if interval else ""
    images = results["test"].get("num_examples")
    on = f" on {images} test images" if images else ""
    named = data.get("name", "")
    of = f" of {named}" if named not in ("", Data().name) else ""  # images "of images" are any
    return (
        f"{results.get('recipe', '')} from {results.get('start', '')}: "
        f"{titles().get(name, name)} {value:.3f}{within}{on}{of}."
    )


def _best_row(results: Mapping[str, Any]) -> str:
    """The row of the best mean, and whether it can be told from the reference."""
    differences = results.get("differences") or {}
    metric = differences.get("metric") or results.get("metric") or "macro_f1"
    # What is chosen by the test images is no result.
    there = [row for row in results["table"] if not row["recipe"].endswith(", by test")]
    rows = [row for row in there if row.get(metric)]
    entry = METRICS.get(metric)
    if not rows or entry is None:
        return ""
    sign = 1 if entry.higher_is_better else -1
    best = max(rows, key=lambda row: sign * row[metric]["mean"])
    named, title = f"{best['recipe']} from {best['start']}", titles()[metric]
    what = f"has the best {title} of the test images"
    text = f"Of {len(rows)} rows {named} {what}, {_mean_of(best[metric])}"
    if named == differences.get("reference"):
        return f"{text}: it is the reference itself."
    for row in differences.get("rows", ()):
        found = row.get(metric)
        if (row["recipe"], row["start"]) == (best["recipe"], best["start"]) and found:
            apart = found["low"] > 0 or found["high"] < 0
            verdict = "told apart from" if apart else "not told apart from"
            return (
                f"{text}; it is {verdict} the reference {differences['reference']}, "
                f"{found['difference']:+.3f} (95 % interval {found['low']:+.3f} to "
                f"{found['high']:+.3f})."
            )
    return f"{text}."


def _mean_of(found: Mapping[str, Any]) -> str:
    if found.get("std") is None:
        return f"{found['mean']:.3f}"
    return f"{found['mean']:.3f} ± {found['std']:.3f} over {len(found['values'])} seeds"


def facts(
    results: Mapping[str, Any], config: Mapping[str, Any], audit: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """What was asked, in few words, and how long it took."""
    found = {name: results.get(name) for name in ("recipe", "start", "architecture", "seed")}
    if members := results.get("members"):  # whose names have their seeds
        found["members"] = len(members)
    elif seeds := results.get("seeds"):
        found["seeds"] = ", ".join(map(str, seeds))
    if size := config.get("image_size"):
        found["image size"] = f"{size} px"
    if images := audit.get("images"):
        found["images"] = ", ".join(f"{split} {count}" for split, count in images.items())
    if seconds := results.get("wall_seconds"):
        found["wall time"] = duration(seconds)
    return [(name, str(value)) for name, value in found.items() if value is not None]


def duration(seconds: float) -> str:
    """In words.

    >>> duration(61.52), duration(4000), duration(100_000)
    ('61.5 s', '1 h 6 min', '27 h 46 min')
    """
    if seconds < 600:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(int(seconds) // 60, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
