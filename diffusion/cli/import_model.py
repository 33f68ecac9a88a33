"""Convert a checkpoint of diffusers or of another project into a model folder."""

import argparse
import ast
from pathlib import Path

from .. import importers
from ..certificates import FILE as CERTIFICATE
from ..certificates import measure, summary, write_certificate
from ..ddpm import DDPM
from ..storage.atomic import check_writable

OPTIONS = ("format", "schedule", "size", "null_label")  # flags that have an option of their own


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    formats = [importer.NAME for importer in importers.REGISTRY]
    add("source", help="a file or folder of another project, or hf:owner/name")
    add("--out", required=True, metavar="DIR", help="the model folder to write")
    add(
        "--flag",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting that the source lacks, such as image_size=64; may be repeated; see below",
    )
    add("--format", help=f"the project, where the source does not tell: {', '.join(formats)}")
    add("--schedule", help="a noise schedule by name, or a scheduler_config.json, where the source has none")
    add("--size", help="height and width of the images, such as 32 or 32x48, where the source has none")
    add("--null-label", type=int, help="the label that stands for no label, where the source has one")
    add("--certify", action="store_true", help="measure the model against the original: certificate.json")
    add("--reference", metavar="FILE", help="numbers of the original, .safetensors, for --certify")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _flags_help()


def _flags_help() -> str:
    """The flags of each format, a line for each."""
    lines = ["flags, for --flag NAME=VALUE:"]
    for importer in importers.REGISTRY:
        if importer.FLAGS:
            lines.append(f"  {importer.NAME}")
            lines += [f"    {name}: {words}" for name, words in importer.FLAGS.items()]
    return "\n".join(lines)


def run(args: argparse.Namespace) -> None:
    flags = _flags(args.flag)
    if args.reference and not args.certify:
        raise ValueError("--reference belongs to --certify")
    flags |= {name: value for name in OPTIONS if (value := getattr(args, name)) is not None}
    check_writable(Path(args.out, "config.json"))
    imported = importers.read(args.source, flags=flags)
    if assumed := imported.assumed_text():
        print(f"assumed flags, which --flag NAME=VALUE changes: {assumed}")
    if imported.note:
        print(imported.note)
    model = DDPM(imported.unet, imported.schedule, **imported.conventions).eval()
    certificate = None
    if args.certify:  # before anything is written: the reference may be damaged
        how = {"flags": flags, "assumed": imported.assumed or {}, "reference": args.reference}
        certificate = measure(model, args.source, **how)
    model.save(args.out, source=args.source)
    parameters = model.unet.config.num_parameters
    print(
        f"{args.out}: {parameters:,} parameters, {model.prediction_type} prediction, {model.schedule.summary}"
    )
    if certificate is not None:
        write_certificate(args.out, certificate)
        print(f"{Path(args.out, CERTIFICATE)}: {summary(certificate)}")


def _flags(words: list[str]) -> dict[str, object]:
    """["a=1", "b=cosine"] to {"a": 1, "b": "cosine"}: values of Python, or else text."""
    flags = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"--flag takes NAME=VALUE, not {word!r}")
        try:
            flags[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            flags[name] = value  # a bare word, such as cosine
    return flags
