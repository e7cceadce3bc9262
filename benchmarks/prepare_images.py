"""Preparing 2,000 photographs of 3,000 × 2,000 pixels on two cores, and reading them back.

    python benchmarks/prepare_images.py

Draws 50 photographs (noise with the spectrum of photographs, quality 90, about 1.5 MB), copies
them until there are 2,000, and reads all files once so that the disk plays no part. Then, block of
250 files by block, each block by every method in another order, images per second to 224 px of:

- `cached_pixels` on two threads, as the program uses it, and on one;
- the same `read_image` in two processes that have been started before;
- the loop `Image.open(path).convert("RGB").resize((224, 224), BILINEAR)`;
- torchvision's `ImageFolder` and `Resize((224, 224))` in a `DataLoader` with two workers.

"Cores" is the processor time per second that a method got: less than it could use where other
programs run too. So the ratios are also given over those blocks alone in which the loop got at
least 0.9 cores and the two threads 1.7, and images per second of processor time; and it is
measured how many cores the threads would have used, which ran or waited for a core.

Then how fast the prepared pixels are read in batches, beside copies of the same memory. PyTorch
and torchvision are the extra `torch`. Takes 3 GB of disk and about five minutes.
"""

import argparse
import contextlib
import importlib
import itertools
import multiprocessing
import os
import shutil
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from measuring import seconds, spread
from PIL import Image, features
from results import Row, output_option, write_table

from medmerge_jax.data import Split
from medmerge_jax.data.batches import ResidentBatches, StreamedBatches
from medmerge_jax.images import cached_pixels, read_image

CORES = 2
QUESTION = "How fast are photographs decoded and shrunk, and prepared pixels read?"
LOOP = "loop over Pillow"
TORCHVISION = "torchvision `ImageFolder`, 2 workers"
THREADS = "`cached_pixels`, 2 threads"


def main() -> None:
    """Prints the tables, and writes them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--distinct", type=int, default=50)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--folder", type=Path, help="for the images; default: a temporary one")
    output_option(parser, "prepare_images")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)  # the DataLoader's
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        blocks = _photographs(Path(name), options.images, options.distinct, options.blocks)
        paths = list(itertools.chain.from_iterable(blocks))
        total = sum(path.stat().st_size for path in paths[: options.distinct])
        more = {
            "Milliseconds of the parts, on one core": _stages(paths[:20], options.size),
            "Cores that `cached_pixels` wants": _demand(paths[:320], options.size, Path(name)),
        }
        rates, difference = _prepare(blocks, options.size, Path(name))
        pixels = cached_pixels(_split(paths), options.size, "squash", Path(name, "cache"))
        more["Reading the prepared pixels, batches of 64"] = _read(pixels.array)
    beside = {row["method"]: row["beside the loop"] for row in rates if row["blocks"] == "all"}
    answer = "Images per second beside a loop over Pillow: " + "; ".join(
        f"{name}: {beside[name]}" for name in (TORCHVISION, THREADS)
    )
    notes = [
        f"{options.images} files of {total / min(options.distinct, len(paths)) / 1e6:.2f} MB, to "
        f"{options.size} px; libjpeg-turbo {features.version('libjpeg_turbo')}. {difference}"
    ]
    write_table(options.output, QUESTION, f"{answer}.", rates, notes, more)


def _photographs(folder: Path, count: int, distinct: int, blocks: int) -> list[list[Path]]:
    """The files of each block, in a folder of their own as ImageFolder wants it."""
    rng = np.random.default_rng(0)
    drawn = []
    for number in range(min(distinct, count)):
        drawn.append(folder / f"{number}.jpg")
        Image.fromarray(_photograph(rng, 3000, 2000)).save(drawn[-1], quality=90)
    files: list[list[Path]] = [[] for _ in range(blocks)]
    for number in range(count):
        block = number * blocks // count
        target = folder / f"block{block}" / "class" / f"{number:05d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(drawn[number % len(drawn)], target)
        files[block].append(target)
    return files


def _photograph(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Octaves of smooth noise, each finer and weaker than the one before, and a camera's grain."""
    pixels = np.full((height, width, 3), 128, np.float32)
    for octave in range(1, 12):
        shape = (min(height, 2**octave * 2 // 3 + 2), min(width, 2**octave + 2))
        grey = 0.8 * rng.standard_normal(shape, np.float32)
        for channel in range(3):
            noise = grey + 0.35 * rng.standard_normal(shape, np.float32)
            smooth = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
            pixels[..., channel] += 90 * 0.66**octave * np.asarray(smooth)
    pixels += 5 * rng.standard_normal((height, width, 1), np.float32)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def _stages(paths: list[Path], size: int) -> list[Row]:
    """Milliseconds of the parts, on one core."""

    def load(path: Path, shrunk: int) -> Image.Image:
        image = Image.open(path)
        image.draft(None, (image.width // shrunk, image.height // shrunk))
        image.load()
        return image

    full = [load(path, 1) for path in paths]
    quarter = [load(path, 4) for path in paths]
    methods: dict[str, Callable[[int], object]] = {
        "read the file": lambda i: paths[i].read_bytes(),
        "decode": lambda i: load(paths[i], 1),
        "decode, shrunk by 2": lambda i: load(paths[i], 2),
        "decode, shrunk by 4": lambda i: load(paths[i], 4),
        "decode, shrunk by 8": lambda i: load(paths[i], 8),
        "`convert`": lambda i: full[i].convert("RGB"),
        "`convert`, shrunk by 4": lambda i: quarter[i].convert("RGB"),
        "`resize`": lambda i: full[i].resize((size, size), Image.Resampling.BILINEAR),
        "`resize`, shrunk by 4": lambda i: quarter[i].resize(
            (size, size), Image.Resampling.BILINEAR
        ),
        "all of the loop": lambda i: _plain(paths[i], size),
        "all of `read_image`": lambda i: read_image(paths[i], size),
    }
    for name, decode in _other_decoders().items():
        methods[f"decode, shrunk by 4, {name}"] = lambda i, decode=decode: decode(paths[i])
    times: dict[str, list[float]] = {name: [] for name in methods}
    for i, (name, method) in itertools.product(range(len(paths)), methods.items()):
        times[name].append(seconds(lambda method=method, i=i: method(i)))
    return [
        {"part": name, "ms": f"{statistics.median(values) * 1e3:.1f}"}
        for name, values in times.items()
    ]


def _other_decoders() -> dict[str, Callable[[Path], object]]:
    """Those that are installed; the project uses neither."""
    decoders: dict[str, Callable[[Path], object]] = {}
    with contextlib.suppress(ImportError):
        simplejpeg = importlib.import_module("simplejpeg")
        decoders[f"simplejpeg {simplejpeg.__version__}"] = lambda path: simplejpeg.decode_jpeg(
            path.read_bytes(), min_width=750, min_height=500
        )
    with contextlib.suppress(ImportError):
        cv2 = importlib.import_module("cv2")
        decoders[f"OpenCV {cv2.__version__}"] = lambda path: cv2.imread(
            str(path), cv2.IMREAD_REDUCED_COLOR_4
        )
    return decoders


def _prepare(blocks: list[list[Path]], size: int, folder: Path) -> tuple[list[Row], str]:
    """Images per second of each method, and their ratio to the loop over the same block."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(CORES) as pool:
        pool.starmap(read_image, [(path, size) for path in blocks[0][:8]], chunksize=1)

        def ours(paths: list[Path], workers: int) -> np.ndarray:
            with tempfile.TemporaryDirectory(dir=folder) as cache:
                return np.array(
                    cached_pixels(_split(paths), size, "squash", Path(cache), workers).array
                )

        methods: dict[str, Callable[[list[Path]], np.ndarray]] = {
            LOOP: lambda paths: np.stack([_plain(path, size) for path in paths]),
            TORCHVISION: _torchvision(size),
            THREADS: lambda paths: ours(paths, 2),
            "`cached_pixels`, 1 thread": lambda paths: ours(paths, 1),
            "`read_image`, 2 processes": lambda paths: np.stack(
                pool.starmap(read_image, [(path, size) for path in paths], chunksize=16)
            ),
        }
        rates: dict[str, list[float]] = {name: [] for name in methods}
        cores: dict[str, list[float]] = {name: [] for name in methods}
        differences = []
        for number, paths in enumerate(blocks):
            results = {}
            order = [*methods][number % len(methods) :] + [*methods][: number % len(methods)]
            for name in order:
                start, used = time.perf_counter(), _processor_time()
                results[name] = methods[name](paths)
                took = time.perf_counter() - start
                rates[name].append(len(paths) / took)
                cores[name].append((_processor_time() - used) / took)
            plain = results[LOOP].astype(np.int16)
            shrunk = np.abs(results[THREADS] - plain)
            differences.append((shrunk.mean(), shrunk.max()))
            loaded = results[TORCHVISION].transpose(0, 2, 3, 1)
            if (loaded != plain).any():
                raise SystemExit("torchvision's pixels are not those of the loop")
    alone = [
        number
        for number in range(len(blocks))
        if cores[LOOP][number] >= 0.9 and cores[THREADS][number] >= 1.7
    ]
    rows = _rates("all", rates, cores, range(len(blocks)))
    rows += _rates("undisturbed", rates, cores, alone)
    mean, most = np.mean([d[0] for d in differences]), max(d[1] for d in differences)
    return rows, (
        f"`cached_pixels` and the loop differ by {mean:.2f} of 255 on average, {most} at most."
    )


def _demand(paths: list[Path], size: int, folder: Path) -> list[Row]:
    """Threads that wait for each other, or for the interpreter's lock, want less than a core."""
    rows: list[Row] = []
    for workers in (1, 2, 1, 2):
        samples: list[tuple[float, int, float, float]] = []

        def sample(done: int, total: int, samples: list = samples) -> None:
            ran, waited = 0, 0
            for thread in threading.enumerate():
                if thread.name.startswith("decode"):
                    states = Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text()
                    ran, waited = (
                        a + int(b) for a, b in zip((ran, waited), states.split()[:2], strict=True)
                    )
            samples.append((time.perf_counter(), done, ran / 1e9, waited / 1e9))

        with tempfile.TemporaryDirectory(dir=folder) as cache:
            cached_pixels(_split(paths), size, "squash", Path(cache), workers, sample)
        first, *_, last = [s for s in samples[1:] if s[1] <= len(paths) - 64]  # all are at work
        took, done, ran, waited = np.subtract(last, first)
        rows.append(
            {
                "threads": workers,
                "cores wanted": f"{(ran + waited) / took:.2f}",
                "cores got": f"{ran / took:.2f}",
                "images per processor second": f"{done / ran:.1f}",
            }
        )
    return rows


def _processor_time() -> float:
    """Seconds, of this process and those it started."""
    times = os.times()
    total = times.user + times.system + times.children_user + times.children_system
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def _rates(
    which: str,
    rates: dict[str, list[float]],
    cores: dict[str, list[float]],
    numbers: Sequence[int],
) -> list[Row]:
    rows: list[Row] = []
    for name in rates if numbers else ():
        values = [rates[name][number] for number in numbers]
        ratios = [rates[name][number] / rates[LOOP][number] for number in numbers]
        got = [cores[name][number] for number in numbers]
        efficiency = statistics.median(v / c for v, c in zip(values, got, strict=True))
        rows.append(
            {
                "method": name,
                "blocks": which,
                "number": len(numbers),
                "images/s": spread(values, digits=1),
                "beside the loop": spread(ratios, digits=1),
                "cores": f"{statistics.median(got):.2f}",
                "images per processor second": f"{efficiency:.1f}",
            }
        )
    return rows


def _split(paths: list[Path]) -> Split:
    return Split(tuple(path.name for path in paths), tuple(paths), np.zeros(len(paths), np.int32))


def _plain(path: Path, size: int) -> np.ndarray:
    image = Image.open(path).convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image)


def _torchvision(size: int) -> Callable[[list[Path]], np.ndarray]:
    torch, recipe = (importlib.import_module(name) for name in ("torch", "pytorch_recipe"))
    recipe.import_torchvision()
    datasets, transforms = (
        importlib.import_module(f"torchvision.{name}") for name in ("datasets", "transforms")
    )

    def load(paths: list[Path]) -> np.ndarray:
        transform = transforms.Compose([transforms.Resize((size, size)), transforms.PILToTensor()])
        folder = datasets.ImageFolder(paths[0].parent.parent, transform)
        loader = torch.utils.data.DataLoader(folder, batch_size=32, num_workers=CORES)
        return np.concatenate([images.numpy() for images, _ in loader])

    return load


def _read(array: np.ndarray, batch_size: int = 64, repeats: int = 7) -> list[Row]:
    """GB/s of a pass over the pixels: batches in random order, and copies of the same memory."""
    labels = np.zeros(len(array), np.int32)
    streamed = StreamedBatches(array, labels, batch_size)
    resident = ResidentBatches(array, labels, batch_size)
    one = np.empty((batch_size, *array.shape[1:]), np.uint8)
    bytes_read = streamed.steps_per_epoch * one.nbytes
    starts = range(0, len(array) - batch_size + 1, batch_size)

    def epoch(batches: StreamedBatches | ResidentBatches, number: int) -> None:
        for batch in batches.epoch(0, number):
            jax.block_until_ready(batch["inputs"])

    methods: dict[str, Callable[[int], object]] = {
        "`memcpy` of each batch, in order, into the same memory": lambda _: [
            np.copyto(one, array[start : start + batch_size]) for start in starts
        ],
        "the same into new memory": lambda _: [
            np.array(array[start : start + batch_size]) for start in starts
        ],
        "`StreamedBatches`, 2 threads, random order": lambda number: epoch(streamed, number),
        "`ResidentBatches`, random order": lambda number: epoch(resident, number),
    }
    times: dict[str, list[float]] = {name: [] for name in methods}
    for number in range(repeats + 1):
        for name, method in methods.items():
            took = seconds(lambda method=method, number=number: method(number))
            if number:  # the first fills the caches and compiles
                times[name].append(took)
    rows: list[Row] = []
    for name, values in times.items():
        rates = [bytes_read / value / 1e9 for value in values]
        images = statistics.median(rates) * 1e9 / array[0].nbytes
        rows.append(
            {"reading": name, "GB/s": spread(rates, digits=1), "images/s": f"{images:,.0f}"}
        )
    return rows


if __name__ == "__main__":
    main()
