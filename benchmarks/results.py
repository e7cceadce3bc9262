"""Where the benchmarks write what they measured, and how it comes into README.md.

    python benchmarks/results.py        # puts the answers of results/*.md into README.md

Every script hands its table to `write_table`, which writes `results/<name>.md`: the question, the
answer in one line, date, processor, versions and command, notes and the table. README.md has, for
each of these files, a pair of marker lines; this command replaces what stands between them.
"""

import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
README = HERE / "README.md"
PACKAGES = ("jax", "flax", "numpy", "scipy", "pillow", "torch")
# Flags of /proc/cpuinfo, the widest vectors last.
VECTOR_UNITS = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX-512 with bfloat16"}
BLOCK = re.compile(r"(<!-- results/([\w-]+)\.md -->\n).*?(<!-- end -->)", re.DOTALL)

Row = Mapping[str, Any]


def output_option(parser: Any, name: str | None) -> None:
    """Adds `--output`, the Markdown file to be written, to an `argparse` parser.

    Without a name it has no default, for scripts whose other options decide it.
    """
    default = RESULTS / f"{name}.md" if name else None
    parser.add_argument("--output", type=Path, default=default)


def write_table(
    output: Path,
    question: str,
    answer: str,
    rows: Sequence[Row],
    notes: Iterable[str] = (),
    more: Mapping[str, Sequence[Row]] | None = None,
    raw: Any = None,
) -> None:
    """Prints what was measured, and writes it as Markdown.

    No host name and no path of the machine is written: of absolute paths in the command the last
    component is left.

    Args:
      output: The file; its name without the suffix is that of the result.
      question: What the benchmark answers, in one sentence.
      answer: The headline, in one line; README.md repeats it.
      rows: The table, one dict of the same columns for each line.
      notes: Lines between the answer and the table.
      more: Further tables by their captions.
      raw: All figures, written beside the table as JSON unless None.
    """
    text = page(question, answer, f"Measured: {machine()}", command(), rows, notes, more or {})
    print(f"\n{text}", flush=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text)
    if raw is not None:
        output.with_suffix(".json").write_text(json.dumps(raw, indent=2) + "\n")


def page(
    question: str,
    answer: str,
    measured: str,
    command_line: str,
    rows: Sequence[Row],
    notes: Iterable[str] = (),
    more: Mapping[str, Sequence[Row]] | None = None,
) -> str:
    """The text of a results file, whose first four paragraphs `summary` reads."""
    parts = [f"# {question}", answer, measured, f"Command: `{command_line}`"]
    parts += [*notes, markdown(rows)]
    for caption, table in (more or {}).items():
        parts += [f"{caption}:", markdown(table)]
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown(rows: Sequence[Row]) -> str:
    """A Markdown table, its first column aligned left and the others right."""
    if not rows:
        return ""
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" + "|---:" * (len(rows[0]) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(map(str, row.values())) + " |" for row in rows])


def by_row(rows: Sequence[Row], labels: Sequence[str], value: str) -> str:
    """One figure of each row in a line, as "resnet18, 8: 1.04; resnet50, 4: 0.98"."""
    return "; ".join(
        f"{', '.join(str(row[name]) for name in labels)}: {row[value]}" for row in rows
    )


def machine() -> str:
    """Date, processor or GPU, vector units, cores, load and versions."""
    versions = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return (
        f"{date.today()}, {processor()}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores, "
        f"load {os.getloadavg()[0]:.1f} at the end; {', '.join(versions)}."
    )


def processor() -> str:
    """The GPU's name if PyTorch or JAX has one, otherwise the processor's and its vector units."""
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if jax is not None and jax.default_backend() == "gpu":
        return jax.devices()[0].device_kind
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    name = re.search(r"model name\s*: (.*)", text)
    flags = re.search(r"flags\s*: (.*)", text)
    units = [unit for flag, unit in VECTOR_UNITS.items() if flags and flag in flags[1].split()]
    return f"{name[1] if name else platform.machine()}{f' ({units[-1]})' if units else ''}"


def command() -> str:
    """The command of this process, without `--output` and without the machine's folders."""
    words = [word for word in sys.argv[1:] if not word.startswith("--output=")]
    if "--output" in words:
        place = words.index("--output")
        del words[place : place + 2]
    words = [re.sub(r"(^|=)/(?:.*/)?", r"\1", word.rstrip("/")) for word in words]
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


def summary(path: Path) -> str:
    """What README.md says of a results file: question, answer, command, when and where."""
    question, answer, measured, command_line, *_ = path.read_text().split("\n\n")
    where = measured.removeprefix("Measured: ").split(";")[0].rstrip(".")
    return (
        f"{question.removeprefix('# ')} {command_line.removeprefix('Command: ').strip()}\\\n"
        f"**{answer}** {where}; [all figures]({RESULTS.name}/{path.name}).\n"
    )


def with_summaries(text: str) -> str:
    """README.md's text with the summary of each results file between its markers."""
    return BLOCK.sub(lambda match: match[1] + summary(RESULTS / f"{match[2]}.md") + match[3], text)


if __name__ == "__main__":
    README.write_text(with_summaries(README.read_text()))
