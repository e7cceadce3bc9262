from medmerge_jax.analysis import comparison_table, results_text


def row(recipe, start, mean, std=0.01, **others):
    value = {"mean": mean, "std": std, "values": [mean - std, mean + std]} if std else None
    names = ("accuracy", "macro_f1", "balanced_accuracy", "macro_auc", "kappa")
    return {
        "recipe": recipe,
        "start": start,
        "seeds": [0, 1],
        **dict.fromkeys(names, value),
        **others,
    }


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_comparison_has_a_row_per_recipe_and_marks_none():
    single = {"mean": 0.9, "std": None, "values": [0.9]}
    table = comparison_table(
        [
            row("ft", "b", 0.8, macro_auc=None, kappa=None),
            row("lp_ft", "c", 0.7, accuracy=single, kappa=None),
            row("medmerge", "b+c", 0.80004, macro_auc={"mean": 0.6, "std": 0.1}, kappa=None),
        ]
    ).splitlines()
    assert cells(table[0]) == [
        "recipe",
        "start",
        "accuracy",
        "macro F1",
        "balanced accuracy",
        "macro AUC",
        "quadratic weighted kappa",
    ]
    best, mean = "0.800 ± 0.010", "0.700 ± 0.010"
    assert cells(table[2]) == ["ft", "b", best, best, best, "-", "-"]
    assert cells(table[3]) == ["lp_ft", "c", "0.900", mean, mean, mean, "-"]
    assert cells(table[4]) == [
        "medmerge",
        "b+c",
        "0.800 ± 0.010",
        best,
        best,
        "0.600 ± 0.100",
        "-",
    ]
    assert len({len(line) for line in table}) == 1
    assert set(table[1]) <= set("|-: ")


def test_names_cannot_break_the_table():
    lines = comparison_table([row("ft", "a|b", 0.5)]).splitlines()
    assert r"a\|b" in lines[2]


def test_text_of_a_comparison():
    rows = [row("ft", "b", 0.5)]
    text = results_text({"recipe": "compare", "seeds": [3, 5], "table": rows})
    assert text.splitlines()[0].startswith("Test split, mean ± standard deviation over seeds 3, 5")
    assert text.endswith(comparison_table(rows))


def test_text_of_differences():
    value = {"difference": 0.0214, "low": -0.01, "high": 0.05, "p": 0.1234}
    found = {
        "reference": "lp_bn_ft from b",
        "metric": "macro_f1",
        "rows": [
            {"recipe": "ft", "start": "c", "macro_f1": value, "accuracy": None},
            {"recipe": "lp", "start": "c", "macro_f1": None},
        ],
    }
    results = {"seeds": [0], "table": [row("ft", "b", 0.5)], "differences": found}
    title, _, head, _, *lines = results_text(results).splitlines()[6:]
    assert title.startswith("Difference to lp_bn_ft from b on the same seeds and test images")
    assert cells(head) == ["recipe", "start", "macro F1", "95 % interval", "p"]
    assert cells(lines[0]) == ["ft", "c", "+0.021", "-0.010 to +0.050", "0.123"]
    assert cells(lines[1]) == ["lp", "c", "-", "-", "-"]


def test_text_of_a_run():
    metrics = {"loss": 0.51234, "accuracy": 0.5, "kappa": None, "num_examples": 12}
    results = {
        "recipe": "ft",
        "start": "b",
        "seed": 3,
        "architecture": "resnet20",
        "val": metrics,
        "test": {**metrics, "accuracy": 0.25},
    }
    lines = results_text(results).splitlines()
    assert lines[0] == "ft, b, resnet20, seed 3"
    assert [cells(line) for line in (lines[2], *lines[4:])] == [
        ["metric", "val", "test"],
        ["loss", "0.5123", "0.5123"],
        ["accuracy", "0.5000", "0.2500"],
        ["quadratic weighted kappa", "-", "-"],
        ["images", "12", "12"],
    ]
