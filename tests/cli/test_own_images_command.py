"""`diffusion sample` from images, with masks, and between two noises."""

import numpy as np
import pytest
from PIL import Image

import diffusion
from diffusion import kernels
from diffusion.cli import main
from helpers.models import make_model


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    """A model of 8 x 8 pixels, and a picture and a mask of twice as many."""
    monkeypatch.chdir(tmp_path)
    make_model(10, channels=1).save("digits")
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
    Image.fromarray(pixels).save("a.png")
    Image.fromarray((np.arange(16)[:, None] >= 8).repeat(16, 1)).save("mask.png")


def run(*words):
    main(["sample", "--model", "digits", "--sampler", "ddim", "--steps", "4", *map(str, words)])


def grey(path: str) -> np.ndarray:
    return np.load(path)["images"].transpose(0, 3, 1, 2)


def expected(model, labels, **options) -> np.ndarray:
    x = model.sample(labels, sampler="ddim", steps=4, **options)
    return ((x.double() + 1) * 127.5).numpy()


@pytest.mark.parametrize("masked", [False, True])
def test_images_and_masks_are_those_of_python(masked, capsys):
    words = ["--mask", "mask.png", "--resamples", 2] if masked else ["--strength", 0.5]
    run("--image", "a.png", "--labels", 3, 1, "--guidance-scale", 1, *words, "--out", "b.npz")
    options = {"image": Image.open("a.png"), "guidance_scale": 1}
    options |= {"mask": Image.open("mask.png"), "resamples": 2} if masked else {"strength": 0.5}
    difference = grey("b.npz") - expected(diffusion.load("digits"), [3, 1], **options).clip(0, 255)
    assert abs(difference).max() < 0.51
    assert "a.png: the middle of 16 x 16 pixels, scaled to 8 x 8" in capsys.readouterr().out


def test_labels_repeat_over_the_images(capsys):
    run("--image", "a.png", "a.png", "a.png", "--labels", 3, 8, "--out", "b.npz")
    assert np.load("b.npz")["labels"].tolist() == [3, 8, 3]
    run("--image", "a.png", "a.png", "--labels", 3, "--captions", "--out", "b.png")
    assert Image.open("b.png").size[0] == 2 + 2 * 18


@pytest.mark.parametrize(
    ("words", "how"),
    [
        (["--strength", 0.5], "ddim, 2 of 4 steps"),
        (["--mask", "mask.png"], "ddim, 4 steps, taken 31 times in all"),  # 3 of the 4 are taken 10 times
        (["--mask", "mask.png", "--sampler", "heun"], "heun, 4 steps, taken 4 times in all"),
        (["--mask", "mask.png", "--strength", 0.5, "--resamples", 2], "2 of 4 steps, taken 3 times in all"),
    ],
)
def test_the_steps_that_were_taken_are_told(words, how, capsys):
    run("--image", "a.png", *words, "--out", "b.png")
    assert f"{how})\n" in capsys.readouterr().out


def test_an_animation_of_an_image():
    run("--image", "a.png", "a.png", "--out", "b.gif")
    assert Image.open("b.gif").n_frames == 3  # int(0.8 * 4) steps


def test_between_two_noises():
    run("--labels", 3, 1, "--guidance-scale", 1, "--seed", 5, "--interpolate", 3, "--out", "b.gif")
    assert Image.open("b.gif").n_frames == 4  # there and back
    words = ["--labels", 3, 1, "--guidance-scale", 1, "--seed", 5, "--interpolate", 3, "--scale", 1]
    run(*words, "--out", "b.png")
    picture = np.asarray(Image.open("b.png"))
    assert picture.shape == (2 * 10 + 2, 3 * 10 + 2)
    a, b = (kernels.philox_normal((2, 1, 8, 8), seed=seed) for seed in (5, 6))
    for frame, share in enumerate((0, 0.5, 1)):
        x = expected(diffusion.load("digits"), [3, 1], noise=diffusion.slerp(a, b, share), guidance_scale=1)
        for row in range(2):
            tile = picture[2 + 10 * row : 10 + 10 * row, 2 + 10 * frame : 10 + 10 * frame]
            assert abs(tile - x[row, 0].clip(0, 255)).max() < 0.51


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--strength", 0.5], "--strength needs --image"),
        (["--mask", "mask.png"], "--mask needs --image"),
        (["--image", "a.png", "--resamples", 3], "--resamples needs --mask"),
        (["--image", "b.png"], "cannot read b.png: no such file"),
        (["--image", "digits/config.json"], "cannot read digits/config.json: it is no image"),
        (["--image", "a.png", "--mask", "mask.png", "--out", "c.gif"], "no .gif is made"),
        (["--image", "a.png", "--out", "folder/"], "write into one file"),
        (["--interpolate", 1], "--interpolate must be a whole number in 2..1000"),
        (["--interpolate", 3, "--image", "a.png"], "leave out one of them"),
        (["--interpolate", 3, "--out", "c.npz"], "makes a .gif or a picture"),
        (["--interpolate", 3, "--captions"], "--interpolate writes no --captions"),
        (["--interpolate", 3, "--columns", 2], "a row for each image; leave out --columns"),
        (["--invert"], "--invert needs --image"),
        (["--iterations", 3], "--iterations needs --invert"),
        (["--image", "a.png", "--invert", "--strength", 0.5], "no clipping: leave out --strength"),
        (["--image", "a.png", "--invert", "--eta", 1], "no clipping: leave out --eta"),
        (["--image", "a.png", "--invert", "--eta", 0], "no clipping: leave out --eta"),
        (["--image", "a.png", "--invert", "--sampler", "heun"], "of the sampler ddim, not heun"),
        (["--image", "a.png", "--invert", 30], "labels"),
        (["--x0", "--out", "c.npz"], "--x0 makes a .gif or a picture"),
        (["--x0", "--out", "folder/"], "--x0 makes a .gif or a picture"),
        (["--x0", "--captions"], "without --captions; leave out one of them"),
        (["--x0", "--interpolate", 3], "without --interpolate; leave out one of them"),
        (["--x0", "--columns", 0], "--num times --columns must be"),
        (["--interpolate", 1000, "--num", 30, "--scale", 40], "pixels is too large"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*words)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--solver-order", 2], "unknown option of ddim 'solver_order'; samplers with it: dpm++"),
        (["--labels", 30], "labels must be whole numbers in 0..9, not 30"),
        (["--guidance-scale", 3], "guidance_scale needs labels to guide towards"),
        (["--guidance-interval", 5, 1], "guidance_interval must be two numbers (low, high)"),
        (["--seed", -1], "seed must be a whole number in 0..2^64-1"),
        (["--spacing", "wide"], "unknown spacing 'wide'"),
        (["--precision", "half"], "unknown precision 'half'"),
    ],
    ids=str,
)
def test_mistakes_about_the_samples_are_told_before_the_inversion(words, message, capsys, monkeypatch):
    """An inversion takes longer than sampling."""
    monkeypatch.setattr(diffusion.DDPM, "invert", lambda *_, **__: pytest.fail("it was inverted"))
    with pytest.raises(SystemExit) as stopped:
        run("--image", "a.png", "--invert", *words)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "own", "labels", "scale"),
    [
        (["--invert"], None, None, 1),
        (["--invert", 3], 3, 3, 1),
        (["--invert", 3, "--labels", 3, 8, "--guidance-scale", 2], 3, [3, 8], 2),
        (
            ["--invert", "--labels", 8, "--guidance-scale", 2],
            None,
            8,
            2,
        ),  # inverted without labels or guidance
    ],
    ids=str,
)
def test_inversion_is_that_of_python(words, own, labels, scale):
    run("--image", "a.png", *words, "--iterations", 3, "--out", "b.npz")
    model, image = diffusion.load("digits"), Image.open("a.png")
    guided = scale if own is not None else 1
    noise = model.invert(image, own, steps=4, iterations=3, guidance_scale=guided)
    count = len(labels) if isinstance(labels, list) else 1
    options = {"noise": noise.repeat(count, 1, 1, 1), "clip": None, "eta": 0, "guidance_scale": scale}
    assert abs(grey("b.npz") - expected(model, labels, **options).clip(0, 255)).max() < 0.51


def test_inversion_gives_the_images_again():
    """Each of the images comes back from its own noise, also where there are more samples than images."""
    Image.open("a.png").rotate(90).resize((8, 8)).save("turned.png")
    Image.open("a.png").resize((8, 8)).save("small.png")
    run("--image", "small.png", "turned.png", "--invert", "--iterations", 20, "--num", 3, "--out", "b.npz")
    pictures = [np.asarray(Image.open(name), dtype=int) for name in ("small.png", "turned.png", "small.png")]
    assert abs(grey("b.npz")[:, 0] - np.stack(pictures)).max() <= 12


def test_predicted_images_in_pictures_and_animations():
    run("--labels", 3, 1, "--guidance-scale", 1, "--x0", "--scale", 1, "--out", "b.png")
    run("--labels", 3, 1, "--guidance-scale", 1, "--x0", "--scale", 1, "--columns", 1, "--out", "last.png")
    run("--labels", 3, 1, "--guidance-scale", 1, "--x0", "--scale", 1, "--columns", 1, "--out", "b.gif")
    options = {"sampler": "ddim", "steps": 4, "guidance_scale": 1, "return_x0": True}
    _, x0 = diffusion.load("digits").sample([3, 1], **options)
    pixels = ((x0.double() + 1) * 127.5).clamp(0, 255).numpy()
    picture = np.asarray(Image.open("b.png"))
    assert picture.shape == (2 * 10 + 2, 4 * 10 + 2)
    animation, last = Image.open("b.gif"), np.asarray(Image.open("last.png"))
    for step in range(4):
        animation.seek(step)
        frame = np.asarray(animation.convert("L"))
        for row in range(2):
            rows, columns = slice(2 + 10 * row, 10 + 10 * row), slice(2 + 10 * step, 10 + 10 * step)
            assert abs(picture[rows, columns] - pixels[step, row, 0]).max() < 0.51
            assert abs(frame[rows, 2:10] - pixels[step, row, 0]).max() < 0.51
            if step == 3:
                assert abs(last[rows, 2:10] - pixels[step, row, 0]).max() < 0.51
