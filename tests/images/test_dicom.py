"""DICOM files written here with pydicom, read as a viewer shows them, or refused clearly."""

import contextlib
import io
import struct
import sys
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from medmerge_jax.errors import UserError
from medmerge_jax.images import read_image
from medmerge_jax.images.dicom import read_dicom

pydicom = pytest.importorskip("pydicom")

from pydicom import uid  # noqa: E402
from pydicom.encaps import encapsulate  # noqa: E402
from pydicom.pixels import apply_voi_lut  # noqa: E402


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def save(tmp_path):
    """A function that writes an array as a DICOM file. Elements given as None are left out."""

    def write(pixels, name="a.dcm", syntax=uid.ExplicitVRLittleEndian, **elements):
        path = tmp_path / name
        pixels = np.asarray(pixels)
        dataset = pydicom.Dataset()
        dataset.SOPClassUID = uid.SecondaryCaptureImageStorage
        dataset.SOPInstanceUID = "1.2.3.4"
        dataset.Modality = "CR"
        dataset.Rows, dataset.Columns = pixels.shape[:2]
        dataset.SamplesPerPixel = 3 if pixels.ndim == 3 else 1
        dataset.PhotometricInterpretation = "RGB" if pixels.ndim == 3 else "MONOCHROME2"
        if pixels.ndim == 3:
            dataset.PlanarConfiguration = 0
        bits = 8 * pixels.dtype.itemsize
        dataset.BitsAllocated = bits
        dataset.BitsStored = elements.pop("BitsStored", bits)
        dataset.HighBit = dataset.BitsStored - 1
        dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
        raw = pixels.tobytes()
        dataset.PixelData = raw + b"\0" * (len(raw) % 2)
        for key, value in elements.items():
            if value is None:
                delattr(dataset, key)
            else:
                setattr(dataset, key, value)
        if "PixelData" in dataset:
            dataset["PixelData"].VR = "OB" if bits == 8 else "OW"
            if uid.UID(syntax).is_encapsulated:
                dataset["PixelData"].is_undefined_length = True
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        dataset.save_as(path, enforce_file_format=True)
        return path

    return write


def read(path):
    image = read_dicom(path)
    assert image.mode == "L"
    return np.asarray(image)


def scaled(values):
    """0 to 1 as 8 bits, half up."""
    return np.floor(np.clip(values, 0, 1) * 255 + 0.5).astype(np.uint8)


def table(entries, first=0, bits=8, vr="US"):
    item = pydicom.Dataset()
    item.add_new("LUTDescriptor", "US" if first >= 0 else "SS", [len(entries), first, bits])
    data = np.asarray(entries, np.uint16).tobytes() if vr == "OW" else list(entries)
    item.add_new("LUTData", vr, data)
    return pydicom.Sequence([item])


def test_eight_bits_come_out_as_they_are(save, rng):
    # Neither 0 nor 255 occurs: the range is that of the bits, not that of the image.
    pixels = rng.integers(40, 90, (6, 9), np.uint8)
    np.testing.assert_array_equal(read(save(pixels)), pixels)


def test_the_name_needs_no_suffix(save, rng):
    pixels = rng.integers(0, 256, (6, 6), np.uint8)
    read = read_image(save(pixels, "1.2.840.113619.2.55"), 6)
    np.testing.assert_array_equal(read, np.repeat(pixels[..., None], 3, axis=2))


def test_monochrome1_is_inverted(save, rng):
    pixels = rng.integers(40, 90, (6, 9), np.uint8)
    path = save(pixels, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(read(path), 255 - pixels)


def test_signed_eight_bits(save):
    pixels = np.array([[-128, -1], [0, 127]], np.int8)
    np.testing.assert_array_equal(read(save(pixels)), [[0, 127], [128, 255]])


@pytest.mark.parametrize("dtype", [np.uint16, np.int16])
@pytest.mark.parametrize("stored", [10, 12, 16])
def test_more_bits_without_a_window_fill_the_range(save, rng, dtype, stored):
    low = -(2 ** (stored - 1)) if dtype == np.int16 else 0
    pixels = rng.integers(low + 5, low + 600, (6, 9)).astype(dtype)
    pixels[0, :2] = low + 3, low + 700
    expected = scaled((pixels.astype(float) - low - 3) / 697)
    np.testing.assert_array_equal(read(save(pixels, BitsStored=stored)), expected)


def test_one_grey_in_more_than_eight_bits_is_black(save):
    assert read(save(np.full((4, 4), 700, np.uint16))).max() == 0


@pytest.mark.parametrize(
    ("slope", "expected"), [("2", [[0, 100], [200, 255]]), ("-2", [[255, 155], [55, 0]])]
)
def test_rescale_without_a_window_keeps_the_range_of_the_bits(save, slope, expected):
    pixels = np.array([[0, 100], [200, 255]], np.uint8)
    path = save(pixels, RescaleSlope=slope, RescaleIntercept="-1000")
    np.testing.assert_array_equal(read(path), expected)


def test_the_window_is_of_rescaled_values(save):
    # Hounsfield units: -1024 + stored. The linear window 40 ± 200 has its ends, as DICOM defines
    # it, at 40 - 0.5 ± 399/2.
    stored = np.array([[0, 864, 865], [1063, 1064, 1262], [1263, 1264, 4095]], np.uint16)
    path = save(
        stored, BitsStored=12, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=40,
        WindowWidth=400,
    )  # fmt: skip
    expected = scaled((stored.astype(float) - 1024 - 39.5) / 399 + 0.5)
    assert expected.tolist() == [[0, 0, 1], [127, 128, 254], [255, 255, 255]]
    np.testing.assert_array_equal(read(path), expected)


def formula(function, x, center, width):
    if function == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (x - center) / width))
    if function == "LINEAR_EXACT":
        return (x - center) / width + 0.5
    return (x - (center - 0.5)) / (width - 1) + 0.5


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID", None])
@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16])
def test_window_functions(save, rng, function, kind, dtype):
    info = np.iinfo(dtype)
    pixels = rng.integers(info.min, info.max, (64, 64), dtype, endpoint=True)
    center, width = float(np.mean(pixels)), (float(info.max) - info.min) / 3
    elements = {} if function is None else {"VOILUTFunction": function}
    path = save(
        pixels, PhotometricInterpretation=kind, WindowCenter=round(center, 2),
        WindowWidth=round(width, 2), **elements,
    )  # fmt: skip
    bright = np.clip(
        formula(function, pixels.astype(float), round(center, 2), round(width, 2)), 0, 1
    )
    expected = scaled(1 - bright if kind == "MONOCHROME1" else bright)
    found = read(path)
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(found)) > 50

    # pydicom's own keeps the range of the input.
    dataset = pydicom.dcmread(path)
    theirs = (apply_voi_lut(pixels, dataset) - info.min) / (float(info.max) - info.min)
    theirs = 1 - theirs if kind == "MONOCHROME1" else theirs
    assert np.abs(theirs * 255 - found).max() <= 0.5 + 1e-6


def test_the_first_of_several_windows(save):
    pixels = np.arange(16, dtype=np.uint16).reshape(4, 4)
    several = save(pixels, "b.dcm", WindowCenter=[8, 3], WindowWidth=[9, 2])
    one = save(pixels, "c.dcm", WindowCenter=8, WindowWidth=9)
    other = save(pixels, "d.dcm", WindowCenter=3, WindowWidth=2)
    np.testing.assert_array_equal(read(several), read(one))
    assert (read(one) != read(other)).any()


def test_a_window_of_width_one_is_a_threshold(save):
    pixels = np.array([[99, 100, 101]], np.uint8)
    path = save(pixels, WindowCenter=100.5, WindowWidth=1)
    np.testing.assert_array_equal(read(path), [[0, 0, 255]])


def test_an_empty_window_counts_as_none(save, rng):
    pixels = rng.integers(40, 90, (6, 9), np.uint8)
    path = save(pixels, WindowCenter="", WindowWidth="")
    np.testing.assert_array_equal(read(path), pixels)


@pytest.mark.parametrize("vr", ["US", "OW"])
def test_voi_table(save, vr):
    pixels = np.array([[0, 9, 10], [11, 12, 255]], np.uint8)
    path = save(pixels, VOILUTSequence=table([1000, 3000, 4095], 10, 12, vr))
    entries = np.array([[1000, 1000, 1000], [3000, 4095, 4095]])
    np.testing.assert_array_equal(read(path), scaled(entries / 4095))


def test_a_voi_table_goes_before_a_window(save):
    pixels = np.array([[0, 1, 2]], np.uint8)
    path = save(
        pixels, VOILUTSequence=table([255, 128, 0]), WindowCenter=1, WindowWidth=2,
    )  # fmt: skip
    np.testing.assert_array_equal(read(path), [[255, 128, 0]])


def test_a_long_table_of_eight_bit_entries(save):
    # 400 entries of 8 bits: an index computed in the entries' type would wrap at 256.
    pixels = np.array([[0, 255, 256, 399, 5000]], np.uint16)
    entries = [0] * 256 + [200] * 143 + [255]
    path = save(pixels, VOILUTSequence=table(entries))
    np.testing.assert_array_equal(read(path), [[0, 0, 200, 255, 255]])


def test_a_voi_table_of_rescaled_values_below_zero(save):
    pixels = np.array([[0, 1, 2, 3]], np.uint16)
    path = save(
        pixels, RescaleSlope=1, RescaleIntercept=-2, VOILUTSequence=table([10, 20, 30], -1),
    )  # fmt: skip
    np.testing.assert_array_equal(read(path), [[10, 10, 20, 30]])


def test_modality_table_then_window(save):
    pixels = np.array([[0, 1, 2, 3]], np.uint8)
    path = save(
        pixels, ModalityLUTSequence=table([0, 500, 600, 1000], bits=16), WindowCenter=550,
        WindowWidth=100, VOILUTFunction="LINEAR_EXACT",
    )  # fmt: skip
    np.testing.assert_array_equal(read(path), scaled(np.array([[-1, 0, 1, 1.0]])))


def test_modality_table_without_a_window_spans_its_bits(save):
    pixels = np.array([[0, 1, 2, 3]], np.uint8)
    path = save(pixels, ModalityLUTSequence=table([0, 500, 600, 65535], bits=16))
    np.testing.assert_array_equal(read(path), scaled(np.array([[0, 500, 600, 65535]]) / 65535))


def test_colours_stay_colours(save, rng):
    pixels = rng.integers(0, 256, (6, 9, 3), np.uint8)
    image = read_dicom(save(pixels))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), pixels)


def test_sixteen_bit_colours_and_separate_planes(save, rng):
    pixels = rng.integers(0, 65536, (6, 10, 3)).astype(np.uint16)
    planes = np.moveaxis(pixels, -1, 0)
    path = save(pixels, PlanarConfiguration=1, PixelData=planes.tobytes())
    np.testing.assert_array_equal(np.asarray(read_dicom(path)), scaled(pixels / 65535))


def test_luminance_and_colour_differences(save):
    pixels = np.full((4, 4, 3), (76, 85, 255), np.uint8)  # red
    image = np.asarray(read_dicom(save(pixels, PhotometricInterpretation="YBR_FULL")))
    assert np.abs(image.astype(int) - (254, 0, 0)).max() <= 2


def test_palette(save, rng):
    pixels = rng.integers(0, 3, (6, 10), np.uint8)
    colours = np.array([[0, 0, 0], [65535, 256, 512], [4096, 8192, 65535]], np.uint16)
    elements = {}
    for position, name in enumerate(("Red", "Green", "Blue")):
        elements[f"{name}PaletteColorLookupTableDescriptor"] = [3, 0, 16]
        elements[f"{name}PaletteColorLookupTableData"] = colours[:, position].tobytes()
    path = save(pixels, PhotometricInterpretation="PALETTE COLOR", **elements)
    np.testing.assert_array_equal(np.asarray(read_dicom(path)), (colours >> 8)[pixels])


@pytest.mark.parametrize(
    "syntax", [uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian]
)
def test_uncompressed_syntaxes(save, rng, syntax):
    pixels = rng.integers(0, 4096, (6, 9)).astype(np.uint16)
    big = syntax == uid.ExplicitVRBigEndian
    written = pixels.astype(">u2") if big else pixels
    path = save(
        pixels, syntax=syntax, PixelData=written.tobytes(), WindowCenter=2048, WindowWidth=4096,
    )  # fmt: skip
    np.testing.assert_array_equal(read(path), scaled((pixels - 2047.5) / 4095 + 0.5))


def test_run_lengths(save, rng, tmp_path):
    pixels = rng.integers(0, 4, (8, 8)).astype(np.uint16) * 21845
    dataset = pydicom.dcmread(save(pixels))
    dataset.compress(uid.RLELossless, generate_instance_uid=False)
    dataset.save_as(tmp_path / "rle.dcm")
    np.testing.assert_array_equal(read(tmp_path / "rle.dcm"), scaled(pixels / 65535))


def jpeg(pixels, format="JPEG", **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=format, **options)
    return encapsulate([buffer.getvalue()])


def test_jpeg_as_in_rsna(save, rng):
    """8-bit JPEG, MONOCHROME2, without a window: exactly what Pillow makes of the JPEG."""
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4), np.uint8))
    pixels = np.asarray(coarse.resize((64, 64), Image.Resampling.BICUBIC))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=90)
    expected = np.asarray(Image.open(io.BytesIO(buffer.getvalue())))
    path = save(pixels, syntax=uid.JPEGBaseline8Bit, PixelData=encapsulate([buffer.getvalue()]))
    np.testing.assert_array_equal(read(path), expected)
    assert np.abs(expected.astype(int) - pixels).max() < 20


def test_jpeg_2000_of_sixteen_bits(save, rng):
    pixels = rng.integers(0, 65536, (32, 32)).astype(np.uint16)
    data = jpeg(pixels, "JPEG2000", irreversible=False)
    path = save(
        pixels, syntax=uid.JPEG2000Lossless, PixelData=data, WindowCenter=32768,
        WindowWidth=65536,
    )  # fmt: skip
    np.testing.assert_array_equal(read(path), scaled(pixels / 65535))


GREY = np.arange(64, dtype=np.uint8).reshape(8, 8)

REFUSED = [
    ({"PixelData": None}, "has no pixels"),
    ({"PixelData": b""}, "has no pixels"),
    ({"Rows": None}, "lacks Rows"),
    ({"PhotometricInterpretation": None}, "lacks PhotometricInterpretation"),
    ({"NumberOfFrames": 3}, "has 3 frames"),
    ({"Rows": 65535, "Columns": 65535}, "65535 × 65535 pixels, too many"),
    ({"PixelData": bytes(10)}, "cannot be decoded .*10 vs 64 bytes"),
    ({"PhotometricInterpretation": "HSV"}, "PhotometricInterpretation is 'HSV'"),
    ({"WindowCenter": 5, "WindowWidth": 0.5}, "WindowWidth 0.5; .*at least 1"),
    (
        {"WindowCenter": 5, "WindowWidth": 0, "VOILUTFunction": "LINEAR_EXACT"},
        "WindowWidth 0.0; .*above 0",
    ),
    ({"WindowCenter": 5, "WindowWidth": 9, "VOILUTFunction": "GAMMA"}, "VOILUTFunction is 'GAMMA'"),
    ({"RescaleSlope": 0, "RescaleIntercept": 0}, "RescaleSlope is 0.0"),
    ({"VOILUTSequence": table([1, 2], bits=40)}, "2 entries of 40 bits"),
    ({"syntax": uid.JPEGLSLossless, "PixelData": encapsulate([b"ab"])}, "JPEG-LS Lossless"),
    ({"syntax": uid.JPEGBaseline8Bit, "PixelData": encapsulate([b"ab"])}, "cannot be decoded"),
    ({"syntax": uid.RLELossless, "PixelData": encapsulate([bytes(64)])}, "cannot be decoded"),
    ({"syntax": "1.2.840.10008.1.2.4.104", "PixelData": encapsulate([b"ab"])}, "MPEG-4"),
]


@pytest.mark.parametrize(("elements", "message"), REFUSED)
def test_refused(save, elements, message):
    path = save(GREY, **elements)
    with pytest.raises(UserError, match=message) as caught:
        read_dicom(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_short_table_is_refused(save):
    sequence = table([1, 2, 3])
    sequence[0].LUTDescriptor = [4, 0, 8]
    with pytest.raises(UserError, match="3 entries of 8 bits where 4"):
        read_dicom(save(GREY, VOILUTSequence=sequence))


def test_a_jpeg_of_another_size_than_declared_is_refused(save):
    path = save(GREY, syntax=uid.JPEGBaseline8Bit, PixelData=jpeg(np.zeros((16, 16), np.uint8)))
    with pytest.raises(UserError, match=str(path)):
        read_dicom(path)


def test_nothing_is_decoded_before_the_size_is_known(save, monkeypatch):
    path = save(GREY, Rows=40000, Columns=40000)
    monkeypatch.setattr("pydicom.pixels.pixel_array", lambda *_: pytest.fail("decoded"))
    with pytest.raises(UserError, match="too many"):
        read_dicom(path)


def test_thirty_two_bits_are_refused(save):
    with pytest.raises(UserError, match="32 bits"):
        read_dicom(save(np.zeros((4, 4), np.uint32)))


def test_floating_point_pixels_are_refused(save):
    path = save(np.zeros((4, 4), np.uint32), PixelData=None, FloatPixelData=bytes(64))
    with pytest.raises(UserError, match="floating-point"):
        read_dicom(path)


def test_a_deflated_file_is_refused_before_it_is_inflated(save, tmp_path, monkeypatch):
    path = save(GREY, syntax=uid.DeflatedExplicitVRLittleEndian)
    monkeypatch.setattr(zlib, "decompress", lambda *_: pytest.fail("inflated"))
    with pytest.raises(UserError, match=f"{path}: is deflated"):
        read_dicom(path)


def test_files_that_are_no_dicom(tmp_path):
    path = tmp_path / "a.dcm"
    with pytest.raises(UserError, match=f"{path}: there is no such file"):
        read_dicom(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"a\.dcm: the file is empty \(0 bytes\)"):
        read_dicom(path)
    path.write_bytes(b"\xff\xd8\xff" + bytes(300))
    with pytest.raises(UserError, match=r"a\.dcm: is not a DICOM file \(it begins with"):
        read_dicom(path)
    with pytest.raises(UserError, match="is a folder"):
        read_dicom(tmp_path)


def test_every_truncation_is_one_user_error(save):
    path = save(GREY, WindowCenter=5, WindowWidth=9)
    whole = path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's, about what it can make of the rest
        for length in range(0, len(whole), 7):
            path.write_bytes(whole[:length])
            with pytest.raises(UserError, match=r"a\.dcm: "):
                read_dicom(path)


def test_without_pydicom_the_error_names_the_extra(save, monkeypatch):
    path = save(GREY)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(UserError, match=r"medmerge-jax\[dicom\]"):
        read_dicom(path)


def test_bombs_of_runs_are_refused(save):
    """A megabyte that pydicom would unpack to 64, of an image of 54 pixels."""
    frame = struct.pack("<16L", 1, 64, *[0] * 14) + b"\x80\x81\x00" * 2**19
    path = save(np.zeros((6, 9), np.uint8), PixelData=encapsulate([frame]), syntax=uid.RLELossless)
    with pytest.raises(UserError, match=r"a\.dcm: its runs unpack to more than the 54 pixels"):
        read_dicom(path)


@pytest.mark.parametrize(("kind", "syntax"), [("JPEG", uid.JPEGBaseline8Bit),
                                              ("JPEG2000", uid.JPEG2000Lossless)])  # fmt: skip
def test_bombs_inside_are_refused_by_their_own_header(save, kind, syntax):
    file = io.BytesIO()
    Image.new("L", (900, 600)).save(file, kind)
    data = encapsulate([file.getvalue()])
    path = save(np.zeros((6, 9), np.uint8), PixelData=data, syntax=syntax)
    with pytest.raises(
        UserError, match=r"compressed image has 600 × 900 pixels, the header .*6 × 9"
    ):
        read_dicom(path)


def test_elements_get_no_more_memory_than_the_file_has(save, tmp_path):
    data = bytearray(save(np.zeros((6, 9), np.uint8)).read_bytes())
    data += struct.pack("<HH2sHL", 0x7FE1, 0x1010, b"OB", 0, 2**32 - 2)
    (tmp_path / "b.dcm").write_bytes(data)
    tracemalloc.start()
    with contextlib.suppress(UserError):
        read_dicom(tmp_path / "b.dcm")
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("dtype, padding", [(np.uint16, 0), (np.int16, -2000), (np.int16, 63536)])
def test_padding_is_black_and_no_part_of_the_range(save, rng, kind, dtype, padding):
    picture = rng.integers(1000, 1100, (6, 9)).astype(dtype)
    picture[1, 1], picture[2, 2] = 1000, 1099
    pixels = picture.copy()
    pixels[:, 0] = padding if padding < 2**15 else padding - 2**16
    path = save(pixels, PhotometricInterpretation=kind)
    dataset = pydicom.dcmread(path)
    dataset.add_new("PixelPaddingValue", "US" if padding >= 0 else "SS", padding)
    dataset.save_as(path)
    expected = (picture.astype(float) - 1000) / 99
    expected = scaled(1 - expected if kind == "MONOCHROME1" else expected)
    expected[:, 0] = 0
    np.testing.assert_array_equal(read(path), expected)


def test_a_range_of_padding(save):
    pixels = np.array([[0, 5, 9, 500, 600, 700]], np.uint16)
    path = save(pixels, PixelPaddingValue=9, PixelPaddingRangeLimit=0)
    np.testing.assert_array_equal(read(path), [[0, 0, 0, 0, 128, 255]])
    with pytest.raises(UserError, match="all pixels are padding"):
        read(save(pixels, PixelPaddingValue=0, PixelPaddingRangeLimit=700))


def test_a_window_of_ones_own_is_in_the_units_of_the_modality(save):
    pixels = np.array([[0, 1000, 1050, 1100, 4000]], np.uint16)
    path = save(pixels, RescaleIntercept=-1024, RescaleSlope=1, WindowCenter=0, WindowWidth=9)
    image = read_dicom(path, (-24, 76))
    np.testing.assert_array_equal(np.asarray(image), scaled((pixels - 1024.0 + 24) / 100))


def test_a_dicom_file_without_suffix(save):
    pixels = np.arange(16, dtype=np.uint8).reshape(4, 4)
    path = save(pixels, "IM000001")
    np.testing.assert_array_equal(read_image(path, 4)[..., 0], pixels)
