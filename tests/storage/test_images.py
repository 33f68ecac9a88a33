"""Pictures: values, layout, and files that are whole or absent."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion import save_gif, save_grid
from diffusion.storage.images import save_npz, to_uint8

SAVE = [save_grid, save_npz, lambda x, path: save_gif([x], path.with_suffix(".gif"))]


def test_rounding_to_bytes():
    x = torch.tensor([-2.0, -1.0, -1 + 1 / 255, 0.0, 1 - 1.01 / 255, 1.0, 3.0])
    # 255 (x + 1) / 2 = ..., 0, 0.5 (to even: 0), 127.5 (to even: 128), 254.495, 255, ...
    assert to_uint8(x).tolist() == [0, 0, 0, 128, 254, 255, 255]


def test_grid_places_images_row_by_row(tmp_path):
    x = torch.stack([torch.full((1, 2, 3), value) for value in (-1.0, 0.2, 1.0)])
    save_grid(x, tmp_path / "grid.png", columns=2, padding=1, scale=2)
    picture = np.asarray(Image.open(tmp_path / "grid.png"))
    assert picture.shape == (2 * 4 + 3, 2 * 6 + 3)
    assert (picture[1:5, 8:14] == 153).all()
    assert (picture[6:10, 1:7] == 255).all()
    assert picture[1:5, 1:7].sum() == picture[6:10, 8:14].sum() == 0
    assert os.listdir(tmp_path) == ["grid.png"]


def test_colours_keep_their_order(tmp_path):
    x = torch.tensor([1.0, -1.0, 0.0]).reshape(1, 3, 1, 1).expand(1, 3, 4, 4)
    save_grid(x, tmp_path / "c.png", padding=0)
    assert np.asarray(Image.open(tmp_path / "c.png"))[0, 0].tolist() == [255, 0, 128]


def test_gif_has_every_frame(tmp_path):
    save_gif([torch.full((2, 1, 4, 4), v) for v in (-1.0, 0.0, 1.0)], tmp_path / "a.gif", duration=0.1)
    picture = Image.open(tmp_path / "a.gif")
    assert picture.n_frames == 3
    picture.seek(2)
    assert np.asarray(picture.convert("L")).max() == 255
    assert picture.info["loop"] == 0


def test_npz_holds_images_in_the_layout_of_evaluation_suites(tmp_path):
    x = torch.rand(3, 1, 4, 5) * 2 - 1
    save_npz(x, tmp_path / "a.npz", [7, 8, 9], seed=3)
    arrays = np.load(tmp_path / "a.npz")
    assert arrays["images"].dtype == np.uint8
    np.testing.assert_array_equal(arrays["images"], to_uint8(x).permute(0, 2, 3, 1).numpy())
    assert arrays["labels"].tolist() == [7, 8, 9]
    assert arrays["seed"] == 3


@pytest.mark.parametrize("shape", [(1, 28, 28), (0, 1, 4, 4), (2, 2, 4, 4)])
def test_other_shapes_are_refused(shape, tmp_path):
    with pytest.raises(ValueError, match="a picture needs"):
        save_grid(torch.zeros(shape), tmp_path / "a.png")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("save", SAVE)
def test_floats_of_0_to_255_need_their_range(save, tmp_path):
    """They would all be white. Samples that were not clipped are drawn, because some are below 0."""
    x = torch.linspace(0, 255, 16).view(1, 1, 4, 4)
    with pytest.raises(
        ValueError, match=r"must be in \[-1, 1\], and these look like those of 0\.\.255; give x"
    ):
        save(x, tmp_path / "a.png")
    save(x - 1.5, tmp_path / "a.png")


def test_floats_of_0_to_255_with_their_range(tmp_path):
    x = torch.linspace(0, 255, 16).round().view(1, 1, 4, 4)
    save_grid(x, tmp_path / "a.png", padding=0, value_range=(0, 255))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), x[0, 0].numpy())


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a"])
def test_a_gif_is_not_written_by_another_name(name, tmp_path):
    with pytest.raises(ValueError, match=r"the name of a GIF ends in \.gif, not as "):
        save_gif([torch.zeros(1, 1, 4, 4)], tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_one_image_without_a_batch_gets_a_hint(tmp_path):
    with pytest.raises(ValueError, match=r"of one image \[C, H, W\], take x\[None\]"):
        save_grid(torch.zeros(1, 4, 4), tmp_path / "a.png")


def test_a_gif_without_frames_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one frame"):
        save_gif([], tmp_path / "a.gif")


@pytest.mark.parametrize("save", SAVE)
def test_targets_that_cannot_be_written(save, tmp_path):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder.gif").mkdir()
    with pytest.raises(ValueError, match="cannot write"):
        save(torch.zeros(1, 1, 4, 4), tmp_path / "file" / "a.png")
    with pytest.raises(ValueError, match="cannot write"):
        save(torch.zeros(1, 1, 4, 4), tmp_path / "folder.gif")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.gif"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    save_grid(torch.zeros(1, 1, 4, 4), tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()

    def fails(self, file, **options):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fails)
    with pytest.raises(ValueError, match="No space left"):
        save_grid(torch.ones(1, 1, 4, 4), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == before
    assert os.listdir(tmp_path) == ["a.png"]


@pytest.mark.parametrize("make", [torch.tensor, np.array], ids=["tensor", "array"])
def test_bytes_stay_as_they_are(make, tmp_path):
    pixels = make(np.arange(48, dtype=np.uint8).reshape(1, 3, 4, 4) * 5)
    save_grid(pixels, tmp_path / "a.png", padding=0)
    expected = np.asarray(pixels)[0].transpose(1, 2, 0)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), expected)
    save_npz(pixels, tmp_path / "a.npz")
    np.testing.assert_array_equal(np.load(tmp_path / "a.npz")["images"][0], expected)
    save_gif([pixels[:, :1]], tmp_path / "a.gif", padding=0)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.gif").convert("L")), expected[..., 0])


def test_arrays_of_floats_are_those_of_tensors(tmp_path):
    x = torch.rand(2, 1, 4, 4) * 2 - 1
    save_grid(x, tmp_path / "a.png")
    save_grid(x.numpy()[:, :, :, ::-1][:, :, :, ::-1], tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("save", SAVE)
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (
            torch.zeros(1, 1, 4, 4, dtype=torch.int64),
            "floats in .-1, 1., or uint8 in 0..255, not torch.int64",
        ),
        (torch.zeros(1, 1, 4, 4, dtype=torch.bool), "not torch.bool"),
        (np.zeros((1, 1, 4, 4), np.uint16), "not torch.uint16"),
        (np.array(["a"]), r"tensor or array \[N, C, H, W\], or PIL images, not ndarray of <U1"),
        (Image.new("I;16", (4, 4)), "mode 'I;16' has more than 8 bits; scale it to 0..255"),
        (
            [Image.new("L", (4, 4)), Image.new("L", (4, 5))],
            r"one size, and these are \[4, 4, 1\] and \[5, 4, 1\]",
        ),
        (
            [torch.zeros(1, 4, 4), torch.zeros(1, 5, 4)],
            r"one size, and these are \[1, 4, 4\] and \[1, 5, 4\]",
        ),
        ([Image.new("L", (4, 4)), None], "not a list of Image, NoneType"),
        (None, "not NoneType"),
        (torch.zeros(1, 4, 4), r"\[1, 4, 4\]"),
    ],
)
def test_what_is_no_image(save, x, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        save(x, tmp_path / "a.png")
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "options",
    [{"columns": 0}, {"columns": 1.5}, {"scale": 10**400}, {"padding": -1}, {"scale": True}],
    ids=str,
)
def test_wrong_layouts(options, tmp_path):
    name = next(iter(options))
    with pytest.raises(ValueError, match=f"{name} must be a whole number in"):
        save_grid(torch.zeros(1, 1, 4, 4), tmp_path / "a.png", **options)
    for option in ("duration", "hold"):
        with pytest.raises(ValueError, match=f"{option} must be a number in .0, 600., not"):
            save_gif([torch.zeros(1, 1, 4, 4)], tmp_path / "a.gif", **{option: 1e30})


@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_of_image_gives_the_same_picture(channels, tmp_path):
    pixels = torch.arange(2 * channels * 20, dtype=torch.uint8).reshape(2, channels, 4, 5) * 2
    last = pixels.permute(0, 2, 3, 1).numpy()
    pictures = [Image.fromarray(image.squeeze()) for image in last]
    kinds = {
        "floats": pixels.double() / 127.5 - 1,
        "last": last,
        "floats, last": last / 127.5 - 1,
        "pil": pictures,
        "tensors": list(pixels),
        "arrays": list(last),
    }
    save_grid(pixels, tmp_path / "a.png")
    for kind, x in kinds.items():
        save_grid(x, tmp_path / "b.png")
        assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes(), kind
    save_grid(pixels[:1], tmp_path / "a.png", padding=0)
    save_grid(pictures[0], tmp_path / "b.png", padding=0)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    save_gif([pictures, pixels], tmp_path / "a.gif")
    save_npz(pictures, tmp_path / "a.npz")
    np.testing.assert_array_equal(np.load(tmp_path / "a.npz")["images"], last)


def test_grey_among_colours_and_transparency(tmp_path):
    grey, clear = Image.new("L", (2, 2), 7), Image.new("RGBA", (2, 2), (1, 2, 3, 0))
    save_grid([grey, clear], tmp_path / "a.png", padding=0)
    picture = np.asarray(Image.open(tmp_path / "a.png"))
    assert picture[0, 0].tolist() == [7, 7, 7]
    assert picture[0, 2].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("name", "kind", "error"),
    [("a.png", "PNG", 0), ("a.jpg", "JPEG", 8), ("a.JPEG", "JPEG", 8), ("a.webp", "WEBP", 0)],
)
def test_the_name_says_the_format(name, kind, error, tmp_path):
    x = torch.linspace(-1, 1, 3 * 64).reshape(1, 3, 8, 8)
    save_grid(x, tmp_path / name, padding=0)
    with Image.open(tmp_path / name) as picture:
        assert picture.format == kind
        found = np.asarray(picture.convert("RGB")).astype(int)
    expected = ((x[0].double() + 1) * 127.5).permute(1, 2, 0).numpy()
    assert abs(found - expected).max() <= 0.501 + error


@pytest.mark.parametrize("name", ["a.bmp", "a", "png"])
def test_a_name_of_no_format(name, tmp_path):
    with pytest.raises(ValueError, match=r"end its name in .png, .jpg, .jpeg or .webp"):
        save_grid(torch.zeros(1, 1, 4, 4), tmp_path / name)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("value_range", [1, (1,), None, (1, 0), "ab"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_a_wrong_value_range_is_named(value_range, dtype, tmp_path):
    with pytest.raises(ValueError, match=r"^value_range must be two"):
        save_grid(torch.zeros(1, 1, 8, 8, dtype=dtype), tmp_path / "a.png", value_range=value_range)
