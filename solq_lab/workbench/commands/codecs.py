"""Commands for mask codecs: fit-codec, codec-ceiling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from solq_lab.workbench.commands.arguments import ExperimentFile, JsonFile, Overrides, Split, folder_to_write

if TYPE_CHECKING:
    from solq_lab.studies.codec_benchmark import CodecBenchmark, UpperBound

Number = TypeVar("Number", int, float)
Threshold = Literal["own", "middle", "half"]
PCAVariant = Literal["plain", "released"]


def fit_codec(
    experiment: ExperimentFile,
    overrides: Overrides = None,
    objects: Annotated[
        int | None, typer.Option(min=1, help="Fit to so many objects, drawn at random; by default all.")
    ] = None,
) -> None:
    """Fit a PCA or sparse codec to the training masks. Writes codec.artifact; re-running resumes."""
    from solq_lab.config import load_experiment
    from solq_lab.data_folder import prepare_data
    from solq_lab.errors import Interrupted
    from solq_lab.fitting import fit_codec as fit

    resolved = load_experiment(experiment, overrides or [])
    if resolved.data.generate != "none":  # of a given folder only the annotations are needed
        prepare_data(resolved)
    try:
        about = fit(resolved, max_objects=objects)
    except KeyboardInterrupt:
        raise Interrupted(f"{resolved.codec.artifact}: not fitted yet; re-running resumes") from None
    quality, dataset = about.quality, about.dataset
    typer.echo(
        f"{resolved.codec.artifact}: {about.method}, {about.mask_size} x {about.mask_size} cells in {about.vector_dim} "
        f"numbers, fitted to {dataset['used']} of {dataset['objects']} objects of {dataset['annotations']}"
    )
    typer.echo(
        f"on {quality['masks']} of them: {100 * quality['explained_variance']:.2f} % of the variance, "
        f"mean IoU {quality['mean_iou']:.4f}"
    )


def codec_ceiling(
    data: Annotated[Path, typer.Argument(help="COCO-format folder, annotation file, or experiment file (.yaml).")],
    overrides: Overrides = None,
    codec: Annotated[str, typer.Option(help="Kind of codec; several with commas, as in all lists.")] = "dct",
    mask_size: Annotated[str, typer.Option(help="N: pixels per side of the box frame.")] = "128",
    vector_dim: Annotated[str, typer.Option(help="n_k: numbers per mask.")] = "256",
    box_noise: Annotated[str, typer.Option(help="Standard error of each box edge, in sides of the box.")] = "0",
    vector_noise: Annotated[str, typer.Option(help="The same of each vector entry, in its std over objects.")] = "0",
    bits: Annotated[
        str, typer.Option(help="Round entries to these steps, in their std over objects, and count bits; 0: do not.")
    ] = "0",
    threshold: Annotated[Threshold, typer.Option(help="The codec's own, the middle of the range, or 0.5.")] = "own",
    pca: Annotated[PCAVariant, typer.Option(help="The paper's eq. 4, or as released.")] = "plain",
    beta: Annotated[float, typer.Option(min=1e-9, help="Sparse coding: price of a coefficient.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of errors and fits.")] = 0,
    split: Annotated[Split, typer.Option(help="Images of the folder to measure on.")] = "val",
    fit_on: Annotated[Path | None, typer.Option(help="Annotations to fit to; by default the training split.")] = None,
    fit_objects: Annotated[int | None, typer.Option(min=1, help="Fit to so many objects; by default all.")] = None,
    area_sides: Annotated[str, typer.Option(help="Small below, medium below, pixels; default 32,96.")] = "",
    boundary_ratio: Annotated[float | None, typer.Option(min=1e-4, max=1.0, help="Width over diagonal.")] = None,
    max_images: Annotated[int | None, typer.Option(min=1, help="Only the first so many images.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes that share the images.")] = 2,
    output: Annotated[
        Path, typer.Option(help="Folder of results; those it holds are not measured again.", callback=folder_to_write)
    ] = Path("runs/ceilings"),
    json_path: JsonFile = None,
) -> None:
    """Encode and decode ground truth, and score it. A network without errors would reach this."""
    from solq_lab.errors import Interrupted
    from solq_lab.studies.codec_benchmark import CodecBenchmark, make_grid

    settings = make_grid(
        [kind.strip() for kind in codec.split(",")],
        _numbers("--mask-size", mask_size, int),
        _numbers("--vector-dim", vector_dim, int),
        box_noises=_numbers("--box-noise", box_noise, float),
        vector_noises=_numbers("--vector-noise", vector_noise, float),
        steps=_numbers("--bits", bits, float),
        threshold=None if threshold == "own" else threshold,
        pca=pca,
        beta=beta,
        seed=seed,
    )

    # Options win over the experiment's own scoring.
    scene: dict[str, Any] = {}
    if area_sides:
        scene["area_sides"] = sides = tuple(_numbers("--area-sides", area_sides, float))
        if len(sides) != 2 or not 0 < sides[0] < sides[1]:
            raise typer.BadParameter(
                f"found {area_sides!r}, allowed are two rising sides in pixels, as in 32,96", param_hint="--area-sides"
            )
    scene = _scene(data, overrides or [], split, fit_on) | scene
    if boundary_ratio is not None:
        scene["boundary_ratio"] = boundary_ratio
    benchmark = CodecBenchmark(
        **scene, folder=output, fit_objects=fit_objects, max_images=max_images, processes=processes
    )

    typer.echo(benchmark)
    try:
        bounds = benchmark.measure(settings)
    except KeyboardInterrupt:
        raise Interrupted(f"stopped; finished settings are kept in {output}, re-running resumes") from None
    _report(benchmark, bounds, output, json_path, title=f"{data}: upper bound of the mask codec")


def _report(
    benchmark: CodecBenchmark, bounds: Sequence[UpperBound], output: Path, json_path: Path | None, *, title: str
) -> None:
    """Print the table, and write it with its figure into the folder `output`."""
    from solq_lab.files import write_json
    from solq_lab.studies.codec_benchmark import ceiling_table, write_csv
    from solq_lab.viz.ceilings import ceiling_curves
    from solq_lab.viz.style import save

    typer.echo(ceiling_table(bounds))
    rows = [bound.row() for bound in bounds]
    write_csv(output / "ceilings.csv", bounds)

    # The figure's axis: a noise that varies at one length of vectors, otherwise the length.
    varied = [key for key in ("box_noise", "vector_noise") if len({row[key] for row in rows}) > 1]
    over = varied[0] if varied and len({row["vector_dim"] for row in rows}) == 1 else "vector_dim"
    over = "bits" if any(row["step"] for row in rows) else over
    save(ceiling_curves(rows, over=over, title=title), output / "ceilings.png")

    if json_path is not None:
        write_json(json_path, {"data": str(benchmark), "ceilings": rows})
    typer.echo(f"\ntable     {output / 'ceilings.csv'}\nfigure    {output / 'ceilings.png'}")


def _numbers(option: str, text: str, kind: Callable[[str], Number]) -> list[Number]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"found {text!r}, allowed are numbers with commas between them", param_hint=option
        ) from None


def _scene(data: Path, overrides: list[str], split: Split, fit_on: Path | None) -> dict[str, Any]:
    """Annotations to measure on and to fit to, and how to score, as arguments of `CodecBenchmark`."""
    from solq_lab.config import load_experiment
    from solq_lab.data.folders import explain_missing, find_splits
    from solq_lab.data_folder import annotations_of, prepare_data

    if data.suffix in (".yaml", ".yml"):
        experiment = load_experiment(data, overrides)
        prepare_data(experiment)
        scoring = {name: getattr(experiment.evaluation, name) for name in ("area_sides", "boundary_ratio")}
        fit_annotations = annotations_of(experiment, "train") if fit_on is None else fit_on
        return {"annotations": annotations_of(experiment, split), "fit_annotations": fit_annotations} | scoring

    if overrides:
        raise typer.BadParameter(f"{' '.join(overrides)}: only an experiment file has values to change")
    files = {part.name: part.annotations for part in find_splits(data)}
    if data.is_file():
        return {"annotations": next(iter(files.values())), "fit_annotations": fit_on}
    if split not in files:
        raise explain_missing(data, split)
    return {"annotations": files[split], "fit_annotations": fit_on or files.get("train")}
