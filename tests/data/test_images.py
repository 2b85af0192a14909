"""Files of every kind to pixels: what is read, what is refused and how, and the transforms against plain matrices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pictures import cut, levels, save, save_bomb, save_plain
from PIL import Image

from accessory.config import ImageTransform
from accessory.data.images import (
    ImageProblem,
    check_images,
    deterministic,
    load_pixels,
    padded_resize,
    random_resized_crop,
    read_image,
    resized_center_crop,
    to_pixels,
)

SIZE = 28
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def read(path) -> np.ndarray:
    image = read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


# --- kinds of files --------------------------------------------------------------------------------------------------


def test_plain_rgb_picture_is_read_to_the_letter(tmp_path):
    assert (read(save(tmp_path / "a.png")) == levels(40, 30)).all()


def test_opened_picture_is_taken_like_its_file(tmp_path):
    path = Path(save(tmp_path / "a.png"))
    assert (read(Image.open(path)) == read(path)).all()


def test_cmyk_jpeg_has_the_colour_that_its_inks_print(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)  # magenta and yellow: red
    assert np.abs(read(tmp_path / "a.jpg") - [255, 0, 0]).max() < 12


def test_of_an_animation_the_first_frame_is_taken(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (read(tmp_path / "a.gif") == [255, 0, 0]).all()


def test_transparency_lies_on_white(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 200, 51)).save(tmp_path / "rgba.png")
    assert np.abs(read(tmp_path / "rgba.png") - [204, 204, 244]).max() <= 1  # a fifth of the colour, the rest white
    Image.new("LA", (4, 4), (0, 0)).save(tmp_path / "la.png")
    assert (read(tmp_path / "la.png") == 255).all()


@pytest.mark.parametrize("name", ["a.png", "a.gif"])
def test_transparent_entry_of_a_palette_is_white_and_the_others_keep_their_colour(name, tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 0])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / name, transparency=0)
    assert read(tmp_path / name).tolist() == [[[255, 255, 255], [200, 100, 0]]]


def test_colour_that_a_png_calls_transparent_is_white(tmp_path):
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    image.save(tmp_path / "a.png", transparency=(1, 2, 3))
    assert read(tmp_path / "a.png").tolist() == [[[255, 255, 255], [9, 9, 9]]]


@pytest.mark.parametrize(
    ("kind", "name"), [("<u2", "a.png"), (">u2", "a.tif"), ("<u2", "a.tif"), ("<i4", "a.tif")], ids=str
)
def test_16_bit_grays_are_scaled_and_not_clipped(kind, name, tmp_path):
    grays = np.array([[0, 257, 1000, 30000, 65535]], dtype=kind)
    Image.fromarray(grays).save(tmp_path / name)
    assert read(tmp_path / name)[0].tolist() == [[round(int(gray) / 257)] * 3 for gray in grays[0]]


def test_one_bit_and_gray_pictures_become_rgb(tmp_path):
    Image.new("1", (3, 2), 1).save(tmp_path / "bit.png")
    Image.new("L", (3, 2), 77).save(tmp_path / "gray.png")
    assert (read(tmp_path / "bit.png") == 255).all()
    assert (read(tmp_path / "gray.png") == 77).all()


# orientation: how the stored pixels are to be turned for the eye (EXIF 2.3, section 4.6.4)
UPRIGHT = {
    2: lambda a: a[:, ::-1],
    3: lambda a: np.rot90(a, 2),
    6: lambda a: np.rot90(a, -1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = levels(48, 32)
    Image.fromarray(stored).save(tmp_path / "a.jpg", exif=exif, quality=100, subsampling=0)
    expected = UPRIGHT[orientation](stored)
    found = read(tmp_path / "a.jpg")
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 10


def test_broken_exif_data_does_not_cost_the_picture(tmp_path):
    Image.fromarray(levels(48, 32)).save(tmp_path / "a.jpg", exif=b"Exif\0\0garbage", quality=100, subsampling=0)
    assert np.abs(read(tmp_path / "a.jpg") - levels(48, 32)).max() < 10


# --- refusals --------------------------------------------------------------------------------------------------------


def problem_of(path) -> str:
    """What reading says; checking must say the same."""
    with pytest.raises(ImageProblem) as caught:
        read_image(path)
    assert check_images([str(path)]).problems == {str(path): str(caught.value)}
    return str(caught.value)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.webp"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_truncated_file_is_refused(name, share, tmp_path):
    reason = problem_of(cut(save(tmp_path / name, 200, 150), share))
    assert reason == "truncated" or name == "a.webp"  # whose decoder does not tell why


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "progressive.jpg", "cmyk.jpg"])
def test_quick_check_refuses_exactly_what_reading_refuses(name, tmp_path):
    """Cut anywhere: the check decodes JPEGs at an eighth of their size and must still see all of the file."""
    path = tmp_path / name
    image = Image.fromarray(levels(64, 48))
    image.convert("CMYK" if "cmyk" in name else "RGB").save(path, **{"progressive": True} if "prog" in name else {})
    content, verdicts = path.read_bytes(), set()
    for length in range(1, len(content) + 1, 7):
        path.write_bytes(content[:length])
        refused = bool(check_images([str(path)]).problems)
        try:
            read_image(path)
            assert not refused, length
        except ImageProblem:
            assert refused, length
        verdicts.add(refused)
    path.write_bytes(content)
    assert verdicts | {bool(check_images([str(path)]).problems)} == {True, False}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # pytest undoes the module's own filter
def test_bomb_is_refused_by_its_header(tmp_path):
    assert problem_of(save_bomb(tmp_path / "a.png", 10000, 10000)).startswith("is too large: 10000 x 10000 pixels")
    assert problem_of(save_bomb(tmp_path / "b.png", 20000, 20000)).startswith("is too large: ")


def test_what_is_no_image_says_what_it_is(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("hello")
    assert problem_of(tmp_path / "empty.png") == "empty file"
    assert problem_of(tmp_path / "text.png") == "not an image"
    assert problem_of(tmp_path / "absent.png") == "no such file"
    assert problem_of(tmp_path / "text.png" / "a.png") == "no such file"
    assert problem_of(tmp_path) == "is a folder"
    assert problem_of("/dev/null") == "not a file"
    assert problem_of("a\0b.png") == "not a file name"
    assert problem_of("a" * 5000) == "file name too long"


def test_file_that_may_not_be_read_says_so(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    path = save(tmp_path / "a.png")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert problem_of(path) == "permission denied"


def test_floating_point_picture_is_refused_and_not_black(tmp_path):
    Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)).save(tmp_path / "a.tif")
    assert "floating-point" in problem_of(tmp_path / "a.tif")


# --- transforms ------------------------------------------------------------------------------------------------------


def bicubic(length: int, size: int) -> np.ndarray:
    """Resampling along one side as a matrix, float64 [size, length]: Keys' kernel (a = -0.5), wider to shrink."""
    scale = length / size
    centres = (np.arange(size)[:, None] + 0.5) * scale - 0.5
    x = np.abs(np.arange(length)[None, :] - centres) / max(scale, 1.0)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return weights / weights.sum(axis=1, keepdims=True)


def resized(array: np.ndarray, width: int, height: int) -> np.ndarray:
    rows, columns = bicubic(array.shape[0], height), bicubic(array.shape[1], width)
    return np.einsum("yh,hwc,xw->yxc", rows, array.astype(float), columns, optimize=True).clip(0, 255)


def close(image: Image.Image, expected: np.ndarray) -> bool:
    """Pillow rounds to whole levels after each side."""
    found = np.asarray(image).astype(float)
    return found.shape == expected.shape and np.abs(found - expected).max() < 2


SHAPES = [(50, 40), (40, 50), (28, 28), (300, 100), (31, 97), (10, 7), (5, 60)]


@pytest.mark.parametrize(("width", "height"), SHAPES)
def test_center_crop_is_the_middle_of_the_whole_resized_to_its_short_side(width, height):
    array = levels(width, height)
    w, h = (SIZE, int(SIZE * height / width)) if width < height else (int(SIZE * width / height), SIZE)
    left, top = round((w - SIZE) / 2), round((h - SIZE) / 2)
    expected = resized(array, w, h)[top : top + SIZE, left : left + SIZE]
    assert close(resized_center_crop(Image.fromarray(array), SIZE), expected)


@pytest.mark.parametrize(("width", "height"), [*SHAPES, (1, 3000)])
def test_padded_resize_is_the_square_canvas_resized(width, height):
    side = max(width, height)
    canvas = np.full((side, side, 3), [int(255 * m) for m in MEAN], dtype=np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    canvas[top : top + height, left : left + width] = levels(width, height)
    assert close(padded_resize(Image.fromarray(levels(width, height)), SIZE), resized(canvas, SIZE, SIZE))


def boxes(width: int, height: int, draws: int) -> np.ndarray:
    """left, top, width, height of random crops, read off a picture whose colours are its coordinates."""
    x, y = np.meshgrid(np.arange(width) * 255 / (width - 1), np.arange(height) * 255 / (height - 1))
    chart = Image.fromarray(np.stack([x, y, 0 * x], axis=-1).round().astype(np.uint8))
    rng = np.random.default_rng(0)
    found = []
    for _ in range(draws):
        crop = np.asarray(random_resized_crop(chart, 64, rng)).astype(float)
        line = np.arange(8, 56)  # away from the edges, where the filter sees less
        (slope_x, start_x), (slope_y, start_y) = (
            np.polyfit(line + 0.5, crop[line][:, line, c].mean(axis=c), 1) for c in (0, 1)
        )
        scale_x, scale_y = (width - 1) / 255, (height - 1) / 255
        found.append((start_x * scale_x + 0.5, start_y * scale_y + 0.5, slope_x * 64 * scale_x, slope_y * 64 * scale_y))
    return np.array(found)


def test_random_crop_takes_nine_tenths_or_more_at_any_permitted_ratio_and_place():
    left, top, width, height = boxes(256, 256, 300).T
    share = width * height / 256**2
    assert share.min() > 0.89
    assert share.max() < 1.01
    assert np.histogram(share, bins=4, range=(0.9, 1.0))[0].min() > 20
    assert (width / height).min() < 0.95
    assert (width / height).max() > 1.05
    assert min(left.min(), top.min()) > -1
    assert max((left + width).max(), (top + height).max()) < 257
    assert np.ptp(left) > 8
    assert np.ptp(top) > 8


def test_random_crop_keeps_to_the_permitted_ratios():
    """Nine tenths of a picture of 1.3:1 would fit at a ratio of 1.44:1."""
    _, _, width, height = boxes(260, 200, 300).T
    assert 1.3 < (width / height).max() < 1.36


@pytest.mark.parametrize(
    ("width", "height", "box"),
    [(400, 100, (133, 0, 266, 100)), (100, 400, (0, 133, 100, 266)), (30, 3, (13, 0, 17, 3))],
)
def test_picture_too_long_for_a_random_box_gives_its_middle(width, height, box):
    left, top, right, bottom = box
    array = levels(width, height)
    crop = random_resized_crop(Image.fromarray(array), SIZE, np.random.default_rng(0))
    assert close(crop, resized(array[top:bottom, left:right], SIZE, SIZE))


def test_random_crop_is_a_function_of_its_generator(tmp_path):
    path, transform = save(tmp_path / "a.png"), ImageTransform.random_resized_crop
    one, same, other = (load_pixels(path, transform, SIZE, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert one.equal(same)
    assert not one.equal(other)


@pytest.mark.parametrize("transform", ImageTransform)
@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 5000), (5000, 1), (2, 2_000_000), (37, 51)])
def test_plain_colour_survives_every_transform_at_every_shape(width, height, transform):
    """Where the whole of 1 x 5000 pixels was resized, it would have 4 million rows; padded, 2,000,000² pixels."""
    image = Image.new("RGB", (width, height), (200, 30, 90))
    pixels = load_pixels(image, transform, SIZE, np.random.default_rng(0))
    middle = SIZE // 2
    expected = [(v / 255 - m) / s for v, m, s in zip((200, 30, 90), MEAN, STD, strict=True)]
    if transform is not ImageTransform.padded_resize:
        assert np.abs(pixels.numpy() - np.reshape(expected, (3, 1, 1))).max() < 1e-5
    elif max(width, height) < 60:
        assert np.abs(pixels[:, middle, middle].numpy() - expected).max() < 1e-5
    assert pixels.shape == (3, SIZE, SIZE)


def test_pixels_are_normalised_as_clip_does():
    image = Image.new("RGB", (2, 1))
    image.putpixel((1, 0), (255, 51, 0))
    pixels = to_pixels(image)
    assert pixels.shape == (3, 1, 2)
    assert pixels[:, 0, 0].tolist() == pytest.approx([-1.79226, -1.75210, -1.48022], abs=1e-5)
    assert pixels[:, 0, 1].tolist() == pytest.approx([1.93034, -0.98670, -1.48022], abs=1e-5)


def test_where_nothing_may_be_random_the_random_crop_becomes_the_central_one():
    assert [deterministic(transform).value for transform in ImageTransform] == [
        "resized_center_crop",
        "resized_center_crop",
        "padded_resize",
    ]


# --- checking --------------------------------------------------------------------------------------------------------


def test_check_names_every_problem_and_stamps_every_file(tmp_path):
    good, bad = save(tmp_path / "a.png"), cut(save(tmp_path / "b.png", 200, 150))
    check = check_images([good, str(tmp_path / "absent.png"), bad, good])
    assert check.problems == {str(tmp_path / "absent.png"): "no such file", bad: "truncated"}
    status = Path(good).stat()
    assert list(check.stamps) == [good, str(tmp_path / "absent.png"), bad]
    assert check.stamps[good] == (status.st_size, status.st_mtime_ns)
    assert check.stamps[str(tmp_path / "absent.png")] is None


def test_digest_is_of_contents_in_their_order_wherever_they_lie(tmp_path):
    def digest(folder, *colours):
        paths = [save_plain(tmp_path / folder / f"{i}.png", colour) for i, colour in enumerate(colours)]
        return check_images(paths).digest

    red, blue = (255, 0, 0), (0, 0, 255)
    first = digest("a", red, blue)
    assert digest("b", red, blue) == first
    assert digest("c", blue, red) != first
    assert digest("d", red, red) != first
    assert digest("e", red) != first


def test_check_of_more_pictures_than_one_portion_sees_them_all(tmp_path):
    content = Path(save(tmp_path / "a.png", 4, 4)).read_bytes()
    for i in range(1500):
        (tmp_path / f"{i}.png").write_bytes(content if i % 500 else content[:60])
    check = check_images([str(tmp_path / f"{i}.png") for i in range(1500)])
    assert sorted(check.problems) == sorted(str(tmp_path / f"{i}.png") for i in (0, 500, 1000))
