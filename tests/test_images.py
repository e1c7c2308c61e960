"""Decoding, resizing, cropping and augmentation of pictures."""

from __future__ import annotations

import pickle
import random
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from library.data import augmentation, images
from library.data.augmentation import Face, FaceCrop
from library.data.images import ImageError, image_size, load_image, resize, to_tensor

RNG = np.random.default_rng(0)


def noise(width: int, height: int, channels: int = 3) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, channels), dtype=np.uint8)


# --- decoding -------------------------------------------------------------------------------------------------
def test_rgb_comes_back_exactly(tmp_path: Path) -> None:
    pixels = noise(5, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(load_image(tmp_path / "a.png"), pixels)
    opaque = load_image(tmp_path / "a.png", alpha=True)
    assert np.array_equal(opaque[..., :3], pixels) and (opaque[..., 3] == 255).all()


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (6, 4), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    pixels = load_image(tmp_path / "a.jpg")
    assert pixels.shape == (4, 6, 3)
    assert pixels[..., 0].min() > 240 and pixels[..., 1:].max() < 15


def test_16_bit_greyscale_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png")[0, :, 0].tolist() == [0, 1, 128, 255]


def test_16_bit_colour_is_scaled(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.full((2, 2, 3), 32768, np.uint16))
    assert load_image(tmp_path / "a.png").tolist() == np.full((2, 2, 3), 128).tolist()


def test_palette_with_alpha(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=bytes([0, 128]))
    assert load_image(tmp_path / "a.png").tolist() == [[[255, 0, 0], [0, 0, 255]]]
    assert load_image(tmp_path / "a.png", alpha=True)[0, :, 3].tolist() == [0, 128]


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "1", "P"])
def test_other_modes_have_three_or_four_channels(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (3, 2)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png").shape == (2, 3, 3)
    assert load_image(tmp_path / "a.png", alpha=True).shape == (2, 3, 4)


def test_transparency_is_discarded_without_blending(tmp_path: Path) -> None:
    Image.new("RGBA", (1, 1), (10, 20, 30, 0)).save(tmp_path / "a.png")
    pixels, is_transparent = images.load_image_and_transparency(tmp_path / "a.png")
    assert pixels.tolist() == [[[10, 20, 30]]] and is_transparent
    Image.new("RGBA", (1, 1), (10, 20, 30, 255)).save(tmp_path / "b.png")
    assert not images.load_image_and_transparency(tmp_path / "b.png")[1]


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_to_pixels_and_size(tmp_path: Path, orientation: int, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    settings = {"lossless": True} if suffix == ".webp" else {}
    Image.fromarray(noise(16, 8)).save(path, exif=exif, **settings)
    with Image.open(path) as image:
        upright = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(load_image(path), upright)
    assert image_size(path) == (upright.shape[1], upright.shape[0])


def test_exif_behind_the_pixels_of_a_png_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(noise(16, 8)).save(path)
    exif = Image.Exif()
    exif[0x0112] = 6
    body = b"eXIf" + exif.tobytes().removeprefix(b"Exif\x00\x00")
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    content = path.read_bytes()
    path.write_bytes(content[:-12] + chunk + content[-12:])
    assert image_size(path) == (8, 16)
    assert load_image(path).shape == (16, 8, 3)


def test_damaged_exif_counts_as_upright(tmp_path: Path) -> None:
    Image.fromarray(noise(16, 8)).save(tmp_path / "a.jpg", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
    assert image_size(tmp_path / "a.jpg") == (16, 8)
    assert load_image(tmp_path / "a.jpg").shape == (8, 16, 3)


def test_one_pixel_image_and_non_ascii_name(tmp_path: Path) -> None:
    path = tmp_path / "日本 ü [1].png"
    Image.new("RGB", (1, 1), (1, 2, 3)).save(path)
    assert image_size(path) == (1, 1)
    assert load_image(path).tolist() == [[[1, 2, 3]]]
    assert resize(load_image(path), (4, 2)).tolist() == [[[1, 2, 3]] * 4] * 2


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_truncated_body_is_an_error_with_the_file_name(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"broken{suffix}"
    Image.fromarray(noise(64, 64)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ImageError, match=f"broken{suffix}: the image cannot be read|broken{suffix}: not an image"):
        load_image(path)


def test_missing_and_foreign_files_are_errors_with_the_file_name(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    for load in (load_image, image_size):
        with pytest.raises(ImageError, match=r"text\.png: not an image"):
            load(tmp_path / "text.png")
        with pytest.raises(ImageError, match=r"gone\.png: the image file does not exist"):
            load(tmp_path / "gone.png")


def test_image_error_survives_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(ImageError("a.png", "broken")))
    assert (error.path, error.reason, str(error)) == ("a.png", "broken", "a.png: broken")


# --- resizing and tensors -------------------------------------------------------------------------------------
CV2_FILTERS = {
    "area": cv2.INTER_AREA, "nearest": cv2.INTER_NEAREST_EXACT, "bilinear": cv2.INTER_LINEAR,
    "linear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC, "cubic": cv2.INTER_CUBIC,
}
PIL_FILTERS = {"lanczos": Image.Resampling.LANCZOS, "box": Image.Resampling.BOX}


@pytest.mark.parametrize("size", [(20, 10), (70, 90)])
@pytest.mark.parametrize("name", [*CV2_FILTERS, *PIL_FILTERS])
def test_named_filter_is_used_up_and_down(name: str, size: tuple[int, int]) -> None:
    pixels = noise(40, 30)
    if name in CV2_FILTERS:
        expected = cv2.resize(pixels, size, interpolation=CV2_FILTERS[name])
    else:
        expected = np.asarray(Image.fromarray(pixels).resize(size, PIL_FILTERS[name]))
    assert np.array_equal(resize(pixels, size, name), expected)


def test_default_filter_is_area_when_no_side_grows_else_lanczos() -> None:
    pixels = noise(40, 30)
    assert np.array_equal(resize(pixels, (40, 20)), resize(pixels, (40, 20), "area"))
    for size in ((41, 20), (20, 31), (80, 60)):
        assert np.array_equal(resize(pixels, size), resize(pixels, size, "lanczos"))
    assert resize(pixels, (40, 30), "nearest") is pixels


@pytest.mark.parametrize("name", ["lanczos", "box", "area", "bicubic"])
def test_alpha_is_resized_as_an_independent_channel(name: str) -> None:
    pixels = noise(20, 20, 4)
    resized = resize(pixels, (9, 13), name)
    assert np.array_equal(resized[..., :3], resize(pixels[..., :3], (9, 13), name))


def test_unknown_filter_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'sinc'.*bicubic.*lanczos"):
        resize(noise(4, 4), (2, 2), "sinc")


def test_tensor_range_and_alpha_mask() -> None:
    pixels = np.zeros((2, 3, 4), np.uint8)
    pixels[0, 0] = 255, 0, 51, 102
    tensor = to_tensor(pixels)
    assert tensor.shape == (3, 2, 3) and tensor.dtype == torch.float32
    assert tensor[:, 0, 0].tolist() == pytest.approx([1.0, -1.0, -0.6])
    assert images.alpha_mask(pixels)[0].tolist() == pytest.approx([0.4, 0, 0])
    assert (images.alpha_mask(pixels[..., :3]) == 1).all()


# --- augmentation ---------------------------------------------------------------------------------------------
def test_random_crop_draws_width_then_height_and_reaches_both_ends() -> None:
    expected = random.Random(3)
    assert augmentation.random_crop_offset((12, 11), (10, 10), random.Random(3)) == (
        expected.randint(0, 2), expected.randint(0, 1)
    )
    offsets = {augmentation.random_crop_offset((12, 10), (10, 10), random.Random(seed)) for seed in range(50)}
    assert offsets == {(0, 0), (1, 0), (2, 0)}


def test_colour_augmentation_rate_and_untouched_alpha() -> None:
    pixels = noise(8, 8, 4)
    changed = 0
    for seed in range(1000):
        augmented = augmentation.augment_colors(pixels, random.Random(seed))
        assert np.array_equal(augmented[..., 3], pixels[..., 3])
        changed += not np.array_equal(augmented, pixels)
    assert abs(changed - 330) < 4 * (1000 * 0.33 * 0.67) ** 0.5


def test_gamma_keeps_black_and_white_and_changes_little() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(1, 256, 1).repeat(3, axis=2)
    changed = augmentation.apply_gamma(ramp, 1.05)[0, :, 0].astype(int)
    assert changed[0] == 0 and changed[255] == 255
    assert changed[128] == int(255 * (128 / 255) ** 1.05)


def test_hue_shift_of_red_turns_both_ways() -> None:
    red = np.full((1, 1, 3), (255, 0, 0), np.uint8)
    one, other = (augmentation.shift_hue(red, shift)[0, 0].tolist() for shift in (8.0, -8.0))
    assert one[0] == other[0] == 255
    assert sorted([one[1], one[2]]) == sorted([other[1], other[2]]) and one != other


def test_face_in_a_file_name() -> None:
    assert augmentation.face_from_name("d_1/girl_10_20_30_40.png") == Face((10, 20), (30, 40))
    assert augmentation.face_from_name("d/girl_0_0_0_0.png") is None
    assert augmentation.face_from_name("1_2_3_4/girl.png") is None
    assert augmentation.face_from_name("a_b_c_d_e.png") is None
    with pytest.raises(ImageError, match="girl_5_5_0_0.png"):
        augmentation.face_from_name("girl_5_5_0_0.png")


def test_face_crop_centres_the_face_and_clamps_to_the_image() -> None:
    pixels = np.zeros((200, 300, 3), np.uint8)
    pixels[90:110, 140:160] = 255  # a face of 20x20 around (150, 100)
    crop = FaceCrop(2.0, 2.0, is_random=False)
    cut = crop(pixels, Face((150, 100), (20, 20)), (100, 100), random.Random(0))
    assert cut.shape == (100, 100, 3)
    ys, xs = np.nonzero(cut[..., 0])
    assert (round(xs.mean()), round(ys.mean())) == (50, 50)
    corner = crop(pixels, Face((5, 195), (50, 50)), (100, 100), random.Random(0))
    assert corner.shape == (100, 100, 3)


def test_face_crop_scales_the_face_into_the_range() -> None:
    pixels = np.zeros((1000, 1000, 3), np.uint8)
    pixels[400:600, 400:600] = 255
    for seed in range(20):
        cut = FaceCrop(2.0, 4.0, is_random=True)(pixels, Face((500, 500), (200, 200)), (200, 200), random.Random(seed))
        assert cut.shape == (200, 200, 3)
    exact = FaceCrop(4.0, 4.0, is_random=False)(pixels, Face((500, 500), (200, 200)), (200, 200), random.Random(0))
    assert (exact[..., 0] > 127).sum() == pytest.approx(50 * 50, rel=0.05)


def test_face_crop_finds_the_face_in_the_scaled_image() -> None:
    pixels = np.zeros((800, 1200, 3), np.uint8)
    pixels[150:250, 850:950] = 255  # a face of 100x100 around (900, 200): not in the middle
    crop = FaceCrop(4.0, 4.0, is_random=False)  # the window is four faces wide: the image shrinks to a half
    cut = crop(pixels, Face((900, 200), (100, 100)), (200, 200), random.Random(0))
    ys, xs = np.nonzero(cut[..., 0] > 127)
    assert (round(xs.mean()), round(ys.mean())) == (100, 100)


def test_face_crop_refuses_images_smaller_than_the_target() -> None:
    with pytest.raises(ValueError, match="50x50.*smaller than the resolution 100x100"):
        FaceCrop(1.0, 2.0, is_random=False)(noise(50, 50), Face((25, 25), (10, 10)), (100, 100), random.Random(0))
    small = noise(100, 100)
    assert FaceCrop(1.0, 2.0, is_random=True)(small, Face((1, 1), (9, 9)), (100, 100), random.Random(0)) is small
