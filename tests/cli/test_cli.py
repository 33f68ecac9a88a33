"""The command line: what it writes, and one line and status 2 for what it cannot do."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from diffusion import kernels
from diffusion.cli import main
from diffusion.cli.commands import COMMANDS
from diffusion.cli.options import parse_labels
from diffusion.inference import loop
from diffusion.samplers import SAMPLERS, ddim
from helpers.models import make_model
from helpers.processes import start_python


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a conditional and an unconditional model."""
    folder = tmp_path_factory.mktemp("models")
    # Pictures have one channel or three.
    for name, classes in (("digits", 10), ("plain", None)):
        make_model(classes, channels=1).save(folder / name)
    return folder


@pytest.fixture(autouse=True)
def in_tmp_path(saved, tmp_path, monkeypatch):
    """Every test works in a folder of its own with these models."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def run(*words):
    main([str(word) for word in words])


def test_sample_writes_a_grid(capsys):
    run("sample", "--model", "digits", "--labels", "0-9", "--steps", 3, "--out", "a.png", "--scale", 1)
    assert Image.open("a.png").size == (10 * 10 + 2, 12)
    output = capsys.readouterr()
    assert "a.png: 10 images in" in output.out
    assert "10/10 images" in output.err


def test_a_warning_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr("diffusion.samplers.timesteps._warned", False)
    run("sample", "--model", "digits", "--labels", "3", "--sampler", "ddim", "--steps", 501, "--out", "a.png")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert line.startswith("diffusion: warning: spacing 'leading' with steps=501 starts at timestep 500")


def test_sample_writes_an_array_that_python_gives_too():
    run(
        "sample",
        "--model",
        "digits",
        "--labels",
        3,
        1,
        4,
        "--steps",
        3,
        "--seed",
        5,
        "--out",
        "deep/er/a.npz",
    )
    arrays = np.load("deep/er/a.npz")
    assert arrays["labels"].tolist() == [3, 1, 4]
    x = make_model(10, channels=1).sample([3, 1, 4], guidance_scale=2.0, sampler="ddim", steps=3, seed=5)
    expected = ((x + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(arrays["images"], expected)


def test_sample_writes_the_reverse_process():
    run("sample", "--model", "plain", "--num", 3, "--batch-size", 2, "--steps", 5, "--out", "a.gif")
    assert Image.open("a.gif").n_frames == 5


def test_labels_are_repeated_to_the_number_asked_for():
    run("sample", "--model", "digits", "--labels", "0-2", "--num", 5, "--steps", 1, "--out", "a.npz")
    assert np.load("a.npz")["labels"].tolist() == [0, 1, 2, 0, 1]


def test_labels_may_be_none():
    run("sample", "--model", "digits", "--labels", "none", "--num", 2, "--steps", 1, "--out", "a.npz")
    assert "labels" not in np.load("a.npz")


def test_options_reach_the_sampler():
    options = {
        "ddpm": ["--sampler", "ddpm", "--steps", 3, "--variance", "fixed_large", "--spacing", "trailing"],
        "ddim": ["--eta", 1, "--steps", 3, "--guidance-interval", 0, 400, "--guidance-rescale", 0.5],
        "dpm++": [
            "--sampler",
            "dpm++",
            "--sde",
            "--steps",
            3,
            "--dynamic-threshold",
            0.9,
            "--dtype",
            "bfloat16",
        ],
    }
    images = []
    for name, words in options.items():
        run("sample", "--model", "digits", "--labels", 1, *words, "--out", f"{name}.npz")
        images.append(np.load(f"{name}.npz")["images"])
    assert not any(np.array_equal(images[i], images[i - 1]) for i in range(3))


def test_the_limits_of_clipping_are_options():
    words = ["--model", "digits", "--labels", 1, "--steps", 3, "--dtype", "float32"]
    options = {"a": ["--clip", 0.5], "b": ["--dynamic-threshold", 0.9, "--dynamic-threshold-max", 1.25]}
    for name, more in options.items():
        run("sample", *words, *more, "--out", f"{name}.npz")
    same = {"guidance_scale": 2.0, "sampler": "ddim", "steps": 3}
    for name, more in {
        "a": {"clip": 0.5},
        "b": {"dynamic_threshold": 0.9, "dynamic_threshold_max": 1.25},
    }.items():
        x = make_model(10, channels=1).sample([1], **same, **more)
        expected = ((x + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1).numpy()
        np.testing.assert_array_equal(np.load(f"{name}.npz")["images"], expected)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["0-9"], list(range(10))),
        (["3", "1", "4"], [3, 1, 4]),
        (["3 1 4"], [3, 1, 4]),
        (["0-1,7"], [0, 1, 7]),
    ],
)
def test_labels(words, expected):
    assert parse_labels(words) == expected


BAD = {
    "no command": ([], "COMMAND"),
    "unknown command": (["paint"], "paint"),
    "unknown option": (["sample", "--colour", "red"], "--colour"),
    "unknown label": (
        ["sample", "--model", "digits", "--labels", "12"],
        "labels must be whole numbers in 0..9, not 12",
    ),
    "a word as label": (["sample", "--model", "digits", "--labels", "three"], "unknown label 'three'"),
    "labels backwards": (["sample", "--model", "digits", "--labels", "9-0"], "9-0"),
    "labels without classes": (["sample", "--model", "plain", "--labels", "1"], "unconditional"),
    "sampler": (["sample", "--model", "digits", "--sampler", "euler"], "unknown sampler 'euler'"),
    "spacing": (["sample", "--model", "digits", "--spacing", "karras"], "karras"),
    "model": (["sample", "--model", "nonesuch"], "unknown model 'nonesuch'"),
    "no steps": (["sample", "--model", "digits", "--steps", "0"], "steps"),
    "too many steps": (["sample", "--model", "digits", "--steps", "1001"], "1000"),
    "steps is a word": (["sample", "--model", "digits", "--steps", "few"], "few"),
    "num of many digits": (
        ["sample", "--model", "digits", "--num", "9" * 400],
        "--num must be a whole number in 1",
    ),
    "num": (["sample", "--model", "digits", "--num", "0"], "--num"),
    "dtype": (["sample", "--model", "digits", "--dtype", "float8"], "unknown dtype 'float8'"),
    "device": (["sample", "--model", "digits", "--device", "abacus"], "abacus"),
    "backend": (["sample", "--model", "digits", "--backend", "vulkan"], "vulkan"),
    "backend of other devices": (["sample", "--model", "digits", "--backend", "cuda"], "cannot serve"),
    "precision": (["sample", "--model", "digits", "--precision", "quick"], "unknown precision 'quick'"),
    "rescale": (["sample", "--model", "digits", "--guidance-rescale", "2"], "guidance_rescale"),
    "threshold": (
        ["sample", "--model", "digits", "--dynamic-threshold", "1.5"],
        "dynamic_threshold must be a number in [0, 1]",
    ),
    "threshold of nan": (
        ["sample", "--model", "digits", "--dynamic-threshold", "nan"],
        "dynamic_threshold must be a number in [0, 1]",
    ),
    "num without end": (["sample", "--model", "digits", "--num", str(10**15)], "GiB"),
    "huge scale": (["sample", "--model", "digits", "--scale", str(10**9)], "too large"),
    "null character": (["sample", "--model", "digits", "--out", "a\0.png"], "null character"),
    "empty model": (["sample", "--model", ""], "must not be empty"),
    "empty described model": (["info", "--model", ""], "must not be empty"),
    "columns": (["sample", "--model", "digits", "--columns", "0"], "columns"),
    "scale": (["sample", "--model", "digits", "--scale", "0"], "scale"),
    "format": (["sample", "--model", "digits", "--out", "a.tiff"], ".webp, .gif or .npz"),
    "target under a file": (
        ["sample", "--model", "digits", "--out", "digits/config.json/a.png"],
        "cannot write",
    ),
    "target under a device": (["sample", "--model", "digits", "--out", "/dev/null/a.png"], "cannot write"),
    "data set": (
        ["train", "--data", "imagenet", "--recipe", "mnist", "--out", "run"],
        "no data set, folder or zip 'imagenet'",
    ),
    "no data set": (["train", "--data", "imagenet", "--out", "run"], "there is no data set, folder or zip"),
    "no data": (["train", "--recipe", "small-32", "--out", "run"], "--data is missing"),
    "data folder": (["train", "--data", "mnist", "--data-dir", "nowhere", "--out", "run"], "MNIST"),
    "recipe": (["train", "--data-dir", ".", "--out", "run", "--steps", "0"], "steps"),
    "evaluated model": (["evaluate", "--model", "nonesuch"], "unknown model 'nonesuch'"),
    "described model": (["info", "--model", "nonesuch"], "unknown model 'nonesuch'"),
    "imported model": (["import", "nowhere", "--out", "m"], "unknown model 'nowhere'"),
    "imported file": (["import", "nowhere.pt", "--out", "m"], "nowhere.pt"),
    "flag without value": (["import", "a.pt", "--out", "m", "--flag", "learn_sigma"], "NAME=VALUE"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_are_one_line_and_leave_nothing(case, capsys):
    words, expected = BAD[case]
    before = sorted(os.listdir())
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert expected in lines[-1]
    assert len(lines) == 1
    assert sorted(os.listdir()) == before


def test_an_interruption_saves_the_finished_images(monkeypatch, capsys):
    """KeyboardInterrupt in the second batch, as after Ctrl-C."""
    run("sample", "--model", "digits", "--num", 5, "--steps", 2, "--out", "whole.npz")
    engine_run, calls = loop.run, []

    def interrupted(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return engine_run(*args, **options)

    monkeypatch.setattr(loop, "run", interrupted)
    words = ["sample", "--model", "digits", "--num", "5", "--steps", "2", "--batch-size", "3"]
    for name in ("part.npz", "part.gif"):
        calls.clear()
        with pytest.raises(SystemExit) as caught:
            main([*words, "--out", name])
        assert caught.value.code == 130
    assert "part.npz: 3 images" in capsys.readouterr().out
    with np.load("part.npz") as part, np.load("whole.npz") as whole:
        assert np.array_equal(part["images"], whole["images"][:3])
        assert np.array_equal(part["labels"], whole["labels"][:3])


def test_no_more_columns_than_images():
    run("sample", "--model", "digits", "--num", 2, "--steps", 1, "--columns", 10**12, "--out", "two.png")
    with Image.open("two.png") as picture:
        assert picture.width == 2 * (2 * 8 + 2) + 2


def test_info_tells_what_runs(capsys):
    run("info")
    output = capsys.readouterr().out
    for word in ("fused-diffusion", "torch", "cpp", "cuda", "reverse_step:", "attention:", "bundled models"):
        assert word in output
    for op in (*kernels.OPS, *(internal.name for internal in kernels.INTERNAL)):
        assert f"\n{op}: " in output


def test_info_describes_a_model(capsys):
    run("info", "--model", "digits")
    assert "10 classes" in capsys.readouterr().out


def test_import_makes_a_model_folder(capsys):
    run("import", "plain", "--out", "copy")
    assert "T = 1000" in capsys.readouterr().out
    run("sample", "--model", "copy", "--num", 1, "--steps", 1, "--out", "a.png")


def test_names_that_are_no_text(tmp_path):
    """Names of a model and of a picture, on standard output and in an error."""
    model, out = (tmp_path / os.fsdecode(name) for name in (b"mod\xe8le", b"\xff.png"))
    try:
        make_model(channels=1).save(model)
    except ValueError:
        pytest.skip("this file system takes names of UTF-8 only")

    code = """if True:
        import os, sys
        sys.stdout.reconfigure(encoding="utf-8", errors="strict")
        from diffusion.cli import main
        model, out = sys.argv[1:]
        main(["sample", "--model", model, "--steps", "2", "--out", out])
        os.unlink(os.path.join(model, "model.safetensors"))
        print("unlinked", file=sys.stderr)
        main(["info", "--model", model])
    """
    process = start_python(code, str(model), str(out), environment=os.environ | {"OMP_NUM_THREADS": "1"})
    output, errors = process.communicate(timeout=120)
    assert "\\udcff.png: 20 images" in output
    assert process.returncode == 2, errors
    error = errors.partition("unlinked\n")[2]
    assert error.count("\n") == 1
    assert "mod\\udce8le/model.safetensors is missing" in error


def test_the_module_is_the_command():
    """As `python -m diffusion` runs it."""
    code = "import runpy; runpy.run_module('diffusion', run_name='__main__', alter_sys=True)"
    process = start_python(code, "sample", "--model", "digits", "--labels", "x")
    output, errors = process.communicate()
    assert process.returncode == 2
    assert output == ""
    assert errors == "diffusion: unknown label 'x'; write numbers and ranges, such as 0-9 or 3 1 4\n"


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    output = capsys.readouterr().out
    assert all(name in output for name in COMMANDS)


def test_a_sampler_brings_its_options_along(monkeypatch):
    """The command line takes the options of a new sampler from its signature."""
    asked = []

    def mine(
        schedule,
        steps=None,
        *,
        prediction_type="epsilon",
        spacing="leading",
        clip=1.0,
        guidance_scale=1.0,
        guidance_interval=None,
        churn: float = 0.0,
        restart: bool = False,
    ):
        asked.append((churn, restart))
        return ddim(
            schedule,
            steps,
            prediction_type=prediction_type,
            spacing=spacing,
            clip=clip,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            eta=churn,
        )

    monkeypatch.setitem(SAMPLERS, "mine", mine)
    words = ("--model", "digits", "--labels", 3, "--steps", 2)
    run("sample", *words, "--sampler", "mine", "--churn", 0.5, "--restart", "--out", "mine.npz")
    assert asked == [(0.5, True)]
    run("sample", *words, "--sampler", "ddim", "--eta", 0.5, "--out", "ddim.npz")
    assert np.array_equal(np.load("mine.npz")["images"], np.load("ddim.npz")["images"])
    with pytest.raises(SystemExit):
        run("sample", *words, "--sampler", "ddim", "--churn", 0.5)
