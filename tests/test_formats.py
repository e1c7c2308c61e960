"""Which files are images: rare formats and their plug-ins, odd names, sizes without decoding."""

from __future__ import annotations

import logging
import sys

import numpy as np
import pytest
from PIL import Image, ImageFile

from library.data import formats, image_files
from library.data.image_files import list_images
from library.data.images import ImageError, check_decodes, image_size, load_image
from library.data.jxl_header import jxl_size

#: starts of JPEG XL files: bare, in a container, with the orientation "turned by 90 degrees" (40x24 as stored)
CONTAINER = "0000000c4a584c200d0a870a00000014667479706a786c20000000006a786c20"
JXL = {
    (40, 24): "ff0a050888040800010048004b188b150004e2ef01008c4113d849a6d316",
    (37, 301): CONTAINER + "000000136a786c7000000000ff0a600948804800000022457869664d4d002a000000",
    (24, 40): CONTAINER + "000000136a786c7000000000ff0a0588056202000001e36a627264c070db008220",
}


@pytest.fixture
def fresh_formats():
    """The table of formats is made anew in the test, and afterwards again."""

    def forget() -> None:
        for function in (formats.image_suffixes, formats.unused_suffixes, image_files._report_unused):
            function.cache_clear()

    forget()
    yield
    forget()


@pytest.fixture
def without_jxl(fresh_formats, monkeypatch):
    """Neither plug-in for JPEG XL is installed."""
    monkeypatch.setitem(sys.modules, "pillow_jxl", None)
    monkeypatch.setitem(sys.modules, "jxlpy", None)
    for table in (Image.EXTENSION, Image.OPEN):
        monkeypatch.delitem(table, ".jxl", raising=False)
        monkeypatch.delitem(table, "JXL", raising=False)


class FakeJxl(ImageFile.ImageFile):
    """What a plug-in registers: opens any file that starts like JPEG XL as 3x2 grey."""

    format = "JXL"
    format_description = "test"

    def _open(self) -> None:
        if self.fp is None or self.fp.read(2) not in (b"\xff\x0a", b"\0\0"):
            raise SyntaxError("not JPEG XL")
        self._size, self._mode = (3, 2), "L"
        exif = Image.Exif()
        exif[0x0112] = 6
        self.info["exif"] = exif.tobytes()
        self.tile = []

    def load(self):
        self.im = Image.new("L", (3, 2), 7).im
        return self.im and super(ImageFile.ImageFile, self).load()


# --- plug-ins -------------------------------------------------------------------------------------------------
def test_common_formats_are_always_there_and_avif_with_this_pillow():
    assert formats.image_suffixes()[:5] == (".png", ".jpg", ".jpeg", ".webp", ".bmp")
    assert ".avif" in formats.image_suffixes() or formats.missing_plugin("a.avif")


def test_without_a_plugin_files_are_left_out_with_the_package_to_install(tmp_path, without_jxl, caplog):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    for name in ("b.jxl", "c.JXL", "d.heic", "notes.txt", "a.npz"):
        (tmp_path / name).write_bytes(bytes.fromhex(JXL[40, 24]))
    with caplog.at_level(logging.WARNING):
        assert list_images(str(tmp_path)) == [str(tmp_path / "a.png")]
        list_images(str(tmp_path))
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: 1 files are left out: .heic files are not used for training; convert them to PNG, JPEG or WebP",
        f"{tmp_path}: 2 files are left out: reading .jxl files needs a plug-in for Pillow: pip install "
        "pillow-jxl-plugin",
    ]
    for read in (image_size, load_image, check_decodes):
        with pytest.raises(ImageError, match=r"b\.jxl: reading \.jxl files needs .*: pip install pillow-jxl-plugin"):
            read(tmp_path / "b.jxl")


@pytest.mark.parametrize("module", ["pillow_jxl", "jxlpy.JXLImagePlugin"])
def test_an_installed_plugin_is_used_wherever_images_are_opened(tmp_path, without_jxl, monkeypatch, module):
    """The import registers it, as the real ones do; worker processes import nothing else before."""
    package = tmp_path / "site"
    path = package.joinpath(*module.split(".")).with_suffix(".py")
    path.parent.mkdir(parents=True)
    if "." in module:
        (path.parent / "__init__.py").touch()
    path.write_text(
        "from PIL import Image\nfrom tests.test_formats import FakeJxl\n"
        "Image.register_open('JXL', FakeJxl)\nImage.register_extension('JXL', '.jxl')\n", encoding="utf-8",
    )  # fmt: skip
    monkeypatch.syspath_prepend(str(package))
    for name in module.split(".")[0], module:
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "a.jxl").write_bytes(bytes.fromhex(JXL[40, 24]))
    try:
        assert load_image(tmp_path / "a.jxl").tolist() == [[[7] * 3] * 3] * 2  # turned by its own header, not by EXIF
        assert list_images(str(tmp_path)) == [str(tmp_path / "a.jxl")]
        assert formats.missing_plugin("a.jxl") == ""
        assert image_size(tmp_path / "a.jxl") == (40, 24)  # its header, without the plug-in
    finally:
        for name in module.split(".")[0], module:
            sys.modules.pop(name, None)


def test_avif_is_read_upright(tmp_path):
    if ".avif" not in formats.image_suffixes():
        assert "pillow-avif-plugin" in formats.missing_plugin("a.avif")
        return
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 24), "red").save(tmp_path / "a.avif", exif=exif)
    assert image_size(tmp_path / "a.avif") == check_decodes(tmp_path / "a.avif") == (24, 40)
    assert load_image(tmp_path / "a.avif").shape == (40, 24, 3)


# --- JPEG XL headers ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", JXL)
def test_size_of_jpeg_xl_is_in_its_first_bytes(tmp_path, size):
    (tmp_path / "a.jxl").write_bytes(bytes.fromhex(JXL[size]))
    assert jxl_size(tmp_path / "a.jxl") == size


def bits(*fields: tuple[int, int]) -> bytes:
    """A codestream that starts with (value, number of bits) fields, lowest bit first."""
    number, position = 0, 0
    for value, width in fields:
        number |= value << position
        position += width
    return b"\xff\x0a" + number.to_bytes(12, "little")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (bits((1, 1), (31, 5), (1, 3), (1, 1)), (256, 256)),  # small, 1:1
        (bits((1, 1), (2, 5), (5, 3), (1, 1)), (42, 24)),  # small, 16:9, rounded down
        (bits((1, 1), (2, 5), (0, 3), (9, 5), (1, 1)), (80, 24)),
        (bits((0, 1), (0, 2), (511, 9), (2, 3), (1, 1)), (614, 512)),  # 12:10
        (bits((0, 1), (1, 2), (8191, 13), (0, 3), (3, 2), ((1 << 20) - 1, 30), (1, 1)), (1 << 20, 8192)),
        (bits((0, 1), (2, 2), (99_999, 18), (7, 3), (0, 1), (0, 1)), (200_000, 100_000)),  # no extra fields
        (bits((0, 1), (0, 2), (9, 9), (7, 3), (0, 1), (1, 1), (2, 3)), (20, 10)),  # turned by 180 degrees
        (bits((0, 1), (0, 2), (9, 9), (7, 3), (0, 1), (1, 1), (7, 3)), (10, 20)),  # by 270 degrees
        (b"\0\0\0\x0cJXL \r\n\x87\n" + (20).to_bytes(4, "big") + b"ftypjxl \0\0\0\0jxl " + b"\0\0\0\x01jxlc"
         + (40).to_bytes(8, "big") + bits((1, 1), (0, 5), (1, 3), (1, 1)), (8, 8)),  # a box with a long length
    ],
)
def test_every_way_to_write_a_size(tmp_path, content, expected):
    (tmp_path / "a.jxl").write_bytes(content + bytes(16))
    assert jxl_size(tmp_path / "a.jxl") == expected


@pytest.mark.parametrize(
    "content", [b"", b"\xff\x0a", b"\x89PNG\r\n\x1a\n" + bytes(20), b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(40)]
)
def test_other_and_damaged_files_have_no_size(tmp_path, content):
    (tmp_path / "a.jxl").write_bytes(content)
    assert jxl_size(tmp_path / "a.jxl") is None


# --- names and contents ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name",
    ["a [1].png", "[x]{y}(z)!.JPG", "日本語.webp", "😀 🐈‍⬛.bmp", "é.jpeg", "a%20b#c.png", "trailing .png", "-x.png"],
)
def test_odd_names_are_found_and_read(tmp_path, name):
    folder = tmp_path / "folder [2] 😀 %"
    folder.mkdir()
    Image.new("RGB", (6, 4), (9, 9, 9)).save(folder / name)
    assert list_images(str(folder)) == [str(folder / name)]
    assert image_size(folder / name) == check_decodes(folder / name) == (6, 4)


def test_sizes_are_read_without_decoding(tmp_path):
    """A file whose pixels are cut off still has its size; decoding it is an error."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    for suffix in (".png", ".jpg", ".bmp"):
        path = tmp_path / f"a{suffix}"
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
        assert image_size(path) == (48, 64)
        with pytest.raises(ImageError, match=f"a{suffix}: the image cannot be read"):
            check_decodes(path)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK"])
def test_decoding_check_accepts_what_training_reads(tmp_path, mode):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new(mode, (7, 5)).save(path)
    height, width = load_image(path).shape[:2]
    assert check_decodes(path) == (width, height) == (7, 5)


def test_an_empty_file_is_called_empty(tmp_path):
    (tmp_path / "a.png").touch()
    with pytest.raises(ImageError, match=r"a\.png: the file is empty \(0 bytes\)"):
        image_size(tmp_path / "a.png")
