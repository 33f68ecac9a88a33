"""Distance of samples against evaluations of the network, for every sampler:
python -m benchmarks.sampler_curve [--model MODEL --classifier FOLDER] --out NAME.json.

Each point is the Fréchet distance of unguided samples from the training images, in a classifier's features,
by the protocol of `diffusion evaluate --sweep`. Heun's method evaluates the network twice in a step, so it
takes half as many steps. NAME.png beside the points has a panel for each model. Further calls add models,
curves and evaluations to NAME.json, or measure them again; each curve is written when it is finished.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import diffusion
from diffusion.classifier import classifier_of, load_classifier
from diffusion.evaluation.guidance_sweep import sweep
from diffusion.evaluation.protocol import image_shape
from diffusion.samplers import EVALUATE_TWICE, SAMPLERS
from diffusion.storage.atomic import check_writable, replacing
from diffusion.storage.reading import read_json
from diffusion.utils.validation import choice, whole_number

# The curves: a sampler and its options.
CURVES: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in SAMPLERS}
CURVES |= {
    "dpm++, order 3": ("dpm++", {"solver_order": 3}),
    "dpm++, SDE": ("dpm++", {"sde": True}),
    "unipc, order 3": ("unipc", {"solver_order": 3}),
}
EVALUATIONS = (5, 8, 10, 15, 20, 30, 50)
Result = dict[str, Any]  # of a model: "protocol", "real images" and "points"


def steps_for(sampler: str, evaluations: int) -> int:
    """The most steps of a sampler that need at most so many evaluations of the network."""
    return (evaluations + 1) // 2 if sampler in EVALUATE_TWICE else evaluations


def measure(
    model: diffusion.DDPM, curve: str, evaluations: list[int], classifier: str | None = None, **options: Any
) -> Result:
    """The points of one of CURVES, their protocol, and the distance of as many real images.

    options: of `sweep`, such as num and seed. The distance is None if real images were measured in samples of
    another size.
    """
    if classifier is None:
        classifier = str(classifier_of(image_shape(model)))
    sampler, own = CURVES[curve]
    steps = sorted({steps_for(sampler, count) for count in evaluations})
    found = sweep(
        model, samplers=[sampler], steps=steps, guidance=(), classifier=classifier, **own, **options
    )
    protocol = {name: value for name, value in found["protocol"].items() if name not in own}
    reference = load_classifier(classifier)[1]
    real = reference.real_random if model.num_classes is None else reference.real_balanced
    alike = reference.sample_size == protocol["number of samples"]
    return {
        "protocol": protocol,
        "real images": sum(real) / len(real) if alike else None,
        "points": [{"curve": curve} | point for point in found["points"]],
    }


def joined(former: Result, result: Result) -> Result:
    """Both results of one model; points that were measured again are the new ones. ValueError for others."""
    if former["protocol"] != result["protocol"]:
        raise ValueError("the file of --out holds points of another protocol; choose another name")
    points = {(p["curve"], p["steps"]): p for p in [*former["points"], *result["points"]]}
    order = list(CURVES)
    ranked = sorted(points, key=lambda key: (order.index(key[0]) if key[0] in order else len(order), key))
    return result | {"points": [points[key] for key in ranked]}


def draw(results: dict[str, Result], picture: Path) -> None:
    """Draws a panel for each model, with the distance of real images as a dotted line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2 + 6 * len(results), 5), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, (name, result) in zip(panels, results.items(), strict=True):
        for number, curve in enumerate(dict.fromkeys(point["curve"] for point in result["points"])):
            own = [point for point in result["points"] if point["curve"] == curve]
            values = [[point[key] for point in own] for key in ("evaluations", "distance")]
            axes.plot(*values, "o-" if curve in SAMPLERS else "s--", color=f"C{number}", label=curve)
        if result["real images"] is not None:
            axes.axhline(result["real images"], color="grey", linestyle=":", label="real test images")
        counts = sorted({p["evaluations"] for p in result["points"] if p["evaluations"] == p["steps"]})
        axes.set(xlabel="evaluations of the network", xscale="log", yscale="log", ylabel="distance")
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.xaxis.minorticks_off()
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.grid(alpha=0.3, which="both")
        axes.set_title(f"{name}, {result['protocol']['number of samples']} samples a point, guidance 1")
    panels[0].legend(fontsize=8)
    figure.savefig(picture, format="png", dpi=100)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sampler_curve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="mnist", help="a bundled name, or a folder (default: %(default)s)")
    add("--classifier", help="folder of a classifier (default: the bundled one of the images)")
    add(
        "--curves",
        nargs="+",
        metavar="CURVE",
        default=list(CURVES),
        help=f"{'; '.join(CURVES)} (default: all)",
    )
    add(
        "--evaluations",
        type=int,
        nargs="+",
        metavar="N",
        default=EVALUATIONS,
        help=f"(default: {' '.join(map(str, EVALUATIONS))})",
    )
    add("--num", type=int, default=1000, help="samples of each point (default: %(default)s)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--precision", default="exact", help="exact or fast (default: %(default)s)")
    add("--out", type=Path, required=True, metavar="NAME.json", help="points, with NAME.png beside them")
    args = parser.parse_args(arguments)
    try:
        if args.out.suffix != ".json":
            raise ValueError(f"--out must end in .json: {args.out}")
        picture = args.out.with_suffix(".png")
        check_writable(args.out, picture)
        results = read_json(args.out) if args.out.exists() else {}
        for count in args.evaluations:
            whole_number("--evaluations", count, 1)
        for curve in args.curves:
            choice("curve", curve, CURVES)
        model, name = diffusion.load(args.model), Path(args.model).name
        options = {key: getattr(args, key) for key in ("num", "seed", "precision")}
        for curve in args.curves:
            result = measure(model, curve, args.evaluations, args.classifier, progress=True, **options)
            results[name] = joined(results.get(name, result), result)
            with replacing(args.out, picture) as (as_json, as_png):
                as_json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
                draw(results, as_png)
            for point in result["points"]:
                print(f"{curve:16s}{point['evaluations']:4d} evaluations  distance {point['distance']:.4f}")
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
