"""From a DICOM file to the 8-bit image that a viewer would show."""

import contextlib
import io
import itertools
import struct
from collections.abc import MutableSequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from medmerge_jax.errors import UserError
from medmerge_jax.images.formats import reading, refuse_bombs

if TYPE_CHECKING:
    from pydicom import Dataset

_GREY = ("MONOCHROME1", "MONOCHROME2")
# pydicom decodes these to RGB, the two of wavelets (ICT and RCT) by its Pillow plugin.
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_PALETTE = "PALETTE COLOR"
_DEFLATED = "1.2.840.10008.1.2.1.99"
_RUN_LENGTHS = "1.2.840.10008.1.2.5"


def read_dicom(path: Path, window: tuple[float, float] | None = None) -> Image.Image:
    """Decodes a DICOM file of one frame as a viewer shows it.

    Stored values of 1 to 16 bits, signed or not, go through the modality look-up table or rescale
    slope and intercept; then through the first VOI look-up table or else the first window (LINEAR,
    LINEAR_EXACT or SIGMOID; DICOM PS3.3 C.11.1 and C.11.2). Without either, up to 8 bits keep
    their whole range, so that 8-bit files come out unchanged; more bits are stretched from the
    darkest to the brightest pixel, because most of the range is usually empty. MONOCHROME1 is
    inverted, so that more is always brighter. Padding (PixelPaddingValue, alone or with
    PixelPaddingRangeLimit) is black, and no part of what is stretched.

    Args:
      path: The file.
      window: The modality's values, as Hounsfield units, that are black and white, instead of
        what the file says of it.

    Returns:
      An image of mode "L", or "RGB" where the file has colours.

    Raises:
      UserError: pydicom is not installed; or the file is missing, empty, no DICOM file, without
        pixels, of several frames, too large, damaged, or compressed in a way that needs a
        decoder that is not installed.
    """
    try:
        import pydicom
        import pydicom.errors
        import pydicom.pixels
    except ImportError as error:
        raise UserError(
            "reading DICOM files needs pydicom, which is not installed; install the extra: "
            "pip install 'medmerge-jax[dicom]'"
        ) from error
    with reading(path, "a DICOM file", pydicom.errors.InvalidDicomError):
        # From a file pydicom would allocate whatever length an element claims to have; from
        # bytes in memory it gets no more than they are.
        file = io.BytesIO(path.read_bytes())
        _refuse_deflated(file)
        dataset = pydicom.dcmread(file)
        pixels = _pixels(dataset)
        return _colour(dataset, pixels) if pixels.ndim == 3 else _grey(dataset, pixels, window)


def _refuse_deflated(file: BinaryIO) -> None:
    """Its size is unknown before it is inflated, and may then be any."""
    from pydicom.filereader import read_dataset, read_preamble

    read_preamble(file, force=False)
    header = read_dataset(file, False, True, stop_when=lambda tag, *_: tag >> 16 != 2)
    if header.get("TransferSyntaxUID") == _DEFLATED:
        raise UserError("is deflated as a whole, which is not read; save it uncompressed")
    file.seek(0)


def _pixels(dataset: "Dataset") -> np.ndarray:
    """Stored values (rows, columns), or colours (rows, columns, 3), of a sane and known size."""
    from pydicom.pixels import get_decoder, pixel_array

    if "FloatPixelData" in dataset or "DoubleFloatPixelData" in dataset:
        raise UserError("the pixels are floating-point numbers; 1 to 16 bits are wanted")
    if not dataset.get("PixelData"):
        raise UserError("has no pixels (no PixelData element); remove or replace the file")
    needed = ("Rows", "Columns", "BitsAllocated", "BitsStored", "PhotometricInterpretation")
    missing = [name for name in needed if not dataset.get(name)]
    if missing:
        raise UserError(f"its header lacks {', '.join(missing)}; replace the file")
    if int(dataset.get("NumberOfFrames") or 1) > 1:
        raise UserError(
            f"has {dataset.NumberOfFrames} frames; save the one that is wanted as a file by itself"
        )
    refuse_bombs(dataset.Rows, dataset.Columns)
    if dataset.BitsAllocated > 16:
        raise UserError(f"has {dataset.BitsAllocated} bits per pixel; 1 to 16 are wanted")
    kind = dataset.PhotometricInterpretation
    if kind not in (*_GREY, *_COLOUR, _PALETTE):
        raise UserError(
            f"its PhotometricInterpretation is {kind!r}; one of "
            f"{', '.join((*_GREY, *_COLOUR, _PALETTE))} is wanted"
        )
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    if not syntax:
        raise UserError("its header lacks TransferSyntaxUID; replace the file")
    try:
        available = get_decoder(syntax).is_available
    except NotImplementedError:
        raise UserError(f"its transfer syntax {syntax.name!r} is not one of images") from None
    if not available:
        raise UserError(
            f"its pixels are compressed as {syntax.name!r}, for which no decoder is installed; "
            "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg, or decompress the files"
        )
    if syntax.is_encapsulated:
        _check_compressed_size(dataset)
    pixels = pixel_array(dataset)
    expected = (dataset.Rows, dataset.Columns) + ((3,) if kind in _COLOUR else ())
    if pixels.shape != expected:
        raise UserError(f"its pixels have the shape {pixels.shape}, the header says {expected}")
    return _palette_colours(dataset, pixels) if kind == _PALETTE else pixels


def _check_compressed_size(dataset: "Dataset") -> None:
    """The compressed image has a header of its own, which pydicom believes."""
    from pydicom.encaps import get_frame

    frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
    if dataset.file_meta.TransferSyntaxUID == _RUN_LENGTHS:
        _check_run_lengths(frame, dataset.Rows * dataset.Columns)
        return
    with (
        contextlib.suppress(UnidentifiedImageError),  # Only other decoders know it.
        Image.open(io.BytesIO(frame), formats=("JPEG", "JPEG2000")) as image,
    ):
        if image.size != (dataset.Columns, dataset.Rows):
            raise UserError(
                f"its compressed image has {image.height} × {image.width} pixels, the header says "
                f"{dataset.Rows} × {dataset.Columns}; replace the file"
            )


def _check_run_lengths(frame: bytes, pixels: int) -> None:
    """Counts before pydicom unpacks all runs that there are: 128 bytes of two (PS3.5 annex G)."""
    (count,) = struct.unpack("<L", frame[:4])
    starts = struct.unpack("<15L", frame[4:64])[:count]
    for start, end in itertools.pairwise((*starts, len(frame))):
        position, unpacked = start, 0
        while position < end and unpacked <= 2 * pixels:
            code = frame[position]
            if code > 128:
                position, unpacked = position + 2, unpacked + 257 - code
            elif code < 128:
                position, unpacked = position + code + 2, unpacked + code + 1
            else:  # This code does nothing.
                position += 1
        if unpacked > 2 * pixels:
            raise UserError(f"its runs unpack to more than the {pixels} pixels; replace the file")


def _palette_colours(dataset: "Dataset", pixels: np.ndarray) -> np.ndarray:
    from pydicom.pixels import apply_color_lut

    colours = apply_color_lut(pixels, dataset)[..., :3]
    return (colours >> 8).astype(np.uint8) if colours.dtype == np.uint16 else colours


def _colour(dataset: "Dataset", pixels: np.ndarray) -> Image.Image:
    if pixels.dtype != np.uint8:
        top = 2**dataset.BitsStored - 1
        pixels = _to_8_bits(pixels.astype(np.float64) / top)
    return Image.fromarray(pixels)


def _grey(
    dataset: "Dataset", pixels: np.ndarray, window: tuple[float, float] | None
) -> Image.Image:
    # The brightness depends on the stored value alone, of which there are at most 65536, fewer
    # than pixels.
    padding = _padding(dataset)
    if padding is not None:
        outside = (pixels >= padding[0]) & (pixels <= padding[1])
        picture = pixels[~outside]
        if not picture.size:
            raise UserError(f"all pixels are padding (PixelPaddingValue {padding}); remove it")
        low, high = int(picture.min()), int(picture.max())
    else:
        low, high = int(pixels.min()), int(pixels.max())
    table = _to_8_bits(_brightness(dataset, low, high, window))
    if padding is not None:
        index = np.clip(pixels.astype(np.int32), low, high) - low
        return Image.fromarray(np.where(outside, np.uint8(0), table[index]))
    index = pixels if low == 0 and pixels.dtype.kind == "u" else pixels.astype(np.int32) - low
    return Image.fromarray(table[index])


def _padding(dataset: "Dataset") -> tuple[int, int] | None:
    """The stored values from and to which a pixel is no part of the picture (PS3.3 C.7.5.1.1.2)."""
    ends = []
    for name in ("PixelPaddingValue", "PixelPaddingRangeLimit"):
        value = dataset.get(name)
        if isinstance(value, bytes):  # The element says that its type is unknown.
            order = "<" if dataset.file_meta.TransferSyntaxUID.is_little_endian else ">"
            value = int(np.frombuffer(value[:2], f"{order}u2")[0]) if len(value) >= 2 else None
        number = _first(value)
        if number is None:
            break
        # Some devices write the bits of a negative number as one without a sign.
        signed = dataset.PixelRepresentation == 1 and number >= 2 ** (dataset.BitsAllocated - 1)
        ends.append(int(number) - (2**dataset.BitsAllocated if signed else 0))
    return (min(ends), max(ends)) if ends else None


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    return np.floor(np.clip(values, 0.0, 1.0) * 255 + 0.5).astype(np.uint8)


def _brightness(
    dataset: "Dataset", low: int, high: int, window: tuple[float, float] | None
) -> np.ndarray:
    """Of each stored value from `low` to `high`: 0 is black, 1 is white."""
    values, black, white = _modality(dataset, np.arange(low, high + 1))
    tables = [item for item in dataset.get("VOILUTSequence") or [] if _is_table(item)]
    center, width = _first(dataset.get("WindowCenter")), _first(dataset.get("WindowWidth"))
    if window is not None:
        bright = np.clip((values - window[0]) / (window[1] - window[0]), 0.0, 1.0)
    elif tables:
        entries, top = _look_up(dataset, tables[0], values)
        bright = entries / top
    elif center is not None and width is not None:
        bright = _window(dataset, values, center, width)
    elif black == white:  # All pixels are the same grey.
        bright = np.zeros(len(values))
    else:
        bright = (values - black) / (white - black)
    return 1.0 - bright if dataset.PhotometricInterpretation == "MONOCHROME1" else bright


def _modality(dataset: "Dataset", stored: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Values that the window is given in, and the least and the greatest that count."""
    tables = [item for item in dataset.get("ModalityLUTSequence") or [] if _is_table(item)]
    if tables:
        entries, top = _look_up(dataset, tables[0], stored)
        return entries, 0.0, top
    slope, intercept = _first(dataset.get("RescaleSlope")), _first(dataset.get("RescaleIntercept"))
    slope = 1.0 if slope is None else slope
    intercept = 0.0 if intercept is None else intercept
    if not slope or not np.isfinite([slope, intercept]).all():
        raise UserError(
            f"its RescaleSlope is {slope} and its RescaleIntercept {intercept}; finite numbers, "
            "the slope not 0, are wanted"
        )
    least, most = int(stored[0]), int(stored[-1])
    if dataset.BitsStored <= 8:
        half = 2 ** (dataset.BitsStored - 1)
        least, most = (-half, half - 1) if dataset.PixelRepresentation else (0, 2 * half - 1)
    ends = sorted((least * slope + intercept, most * slope + intercept))
    return stored * slope + intercept, ends[0], ends[1]


def _window(dataset: "Dataset", values: np.ndarray, center: float, width: float) -> np.ndarray:
    """DICOM PS3.3 C.11.2.1.2 and C.11.2.1.3, for an output from 0 to 1."""
    function = str(dataset.get("VOILUTFunction") or "LINEAR").upper()
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        raise UserError(
            f"its VOILUTFunction is {function!r}; LINEAR, LINEAR_EXACT or SIGMOID is wanted"
        )
    least = 1 if function == "LINEAR" else 0
    if not np.isfinite([center, width]).all() or width < least or width == 0:
        raise UserError(
            f"its WindowCenter is {center} and its WindowWidth {width}; finite numbers, the width "
            f"{'at least 1' if least else 'above 0'}, are wanted for the function {function}"
        )
    if function == "SIGMOID":
        # exp overflows to infinity far below the window, where the result is 0 all the same.
        with np.errstate(over="ignore"):
            return 1.0 / (1.0 + np.exp(-4.0 * (values - center) / width))
    if function == "LINEAR":
        center, width = center - 0.5, width - 1.0
    if width == 0:
        return (values > center).astype(np.float64)
    return np.clip((values - center) / width + 0.5, 0.0, 1.0)


def _is_table(item: "Dataset") -> bool:
    return item.get("LUTDescriptor") is not None and item.get("LUTData") is not None


def _look_up(dataset: "Dataset", item: "Dataset", values: np.ndarray) -> tuple[np.ndarray, float]:
    """Entries of a table (DICOM PS3.3 C.11.1.1), and the greatest that its bits can hold.

    pydicom's own function computes the index in the pixels' or the entries' 8 bits, where it
    overflows.
    """
    length, first, bits = (int(number) for number in item.LUTDescriptor)
    length = length or 2**16
    data = item.LUTData
    if isinstance(data, bytes):
        packed = len(data) < 2 * length  # Each entry has one byte.
        order = "<" if dataset.file_meta.TransferSyntaxUID.is_little_endian else ">"
        entries = np.frombuffer(data, np.uint8 if packed else f"{order}u2")
    else:
        entries = np.asarray(data).reshape(-1)
    if len(entries) < length or not 8 <= bits <= 16:
        raise UserError(
            f"a look-up table has {len(entries)} entries of {bits} bits where {length} of 8 to 16 "
            "bits are wanted; replace the file"
        )
    index = np.clip(np.rint(values) - first, 0, length - 1).astype(np.int64)
    return entries[index].astype(np.float64), float(2**bits - 1)


def _first(value: Any) -> float | None:
    """A number, the first of several, or None where the element is absent or empty."""
    if isinstance(value, MutableSequence):
        value = value[0] if len(value) else None
    return None if value is None or value == "" else float(value)
