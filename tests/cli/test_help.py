"""The help of the command line, which is printed without importing PyTorch."""

import subprocess
import sys

import pytest

from diffusion.cli import main, make_parser, record_help, recorded_help
from diffusion.cli.commands import COMMANDS

HELP = [["--help"], *([command, "--help"] for command in COMMANDS)]


def printed(words, capsys, parse=main) -> str:
    with pytest.raises(SystemExit) as caught:
        parse(words)
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_the_record_holds_the_options_of_all_commands():
    assert recorded_help.FILE.read_text(encoding="utf-8") == record_help.text(), (
        "an option has changed: run python -m diffusion.cli.record_help"
    )


@pytest.mark.parametrize("words", HELP, ids=lambda words: words[0])
def test_recorded_help_is_that_of_the_command(words, capsys):
    assert printed(words, capsys) == printed(words, capsys, make_parser(COMMANDS).parse_args)


@pytest.mark.parametrize("words", [["sample", "--steps", "many", "--help"], ["nonsense", "--help"], []])
def test_a_wrong_option_before_help_has_the_error_of_the_command(words, capsys):
    errors = []
    for parse in (main, make_parser(COMMANDS).parse_args):
        with pytest.raises(SystemExit) as caught:
            parse(words)
        assert caught.value.code == 2
        errors.append(capsys.readouterr().err)
    assert errors[0] == errors[1]


def test_help_and_the_version_need_no_torch():
    code = f"""if True:
        import sys
        sys.path[:] = {sys.path!r}
        before = set(sys.modules)
        from diffusion.cli import main
        for words in {[*HELP, ["--version"]]!r}:
            try:
                main(words)
            except SystemExit as end:
                assert end.code == 0, words
        from diffusion.classifier.__main__ import main as train_a_classifier
        try:
            train_a_classifier(["--help"])
        except SystemExit as end:
            assert end.code == 0
        for name in ("torch", "numpy", "diffusion.ddpm"):
            assert name in before or name not in sys.modules, name
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "usage: diffusion sample" in done.stdout
