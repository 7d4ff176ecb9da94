"""Commands around mask codes: fit-codec."""

from __future__ import annotations

from typing import Annotated

import typer

from solq_lab.commands.arguments import ExperimentFile, Overrides


def fit_codec(
    experiment: ExperimentFile,
    overrides: Overrides = None,
    objects: Annotated[
        int | None, typer.Option(min=1, help="Fit to so many objects, drawn at random; by default all.")
    ] = None,
) -> None:
    """Fit a PCA or sparse code to the training masks and write codec.artifact; goes on after an interruption."""
    from solq_lab.config import load_experiment
    from solq_lab.fitting import fit_codec as fit
    from solq_lab.launch import prepare_data

    resolved = load_experiment(experiment, overrides or [])
    if resolved.data.generate != "none":  # of a given folder only the annotations are needed
        prepare_data(resolved)
    about = fit(resolved, max_objects=objects)
    quality, dataset = about.quality, about.dataset
    typer.echo(
        f"{resolved.codec.artifact}: {about.method}, {about.mask_size} x {about.mask_size} cells in {about.vector_dim} "
        f"numbers, fitted to {dataset['used']} of {dataset['objects']} objects of {dataset['annotations']}"
    )
    typer.echo(
        f"on {quality['masks']} of them: {100 * quality['explained_variance']:.2f} % of the variance, "
        f"mean IoU {quality['mean_iou']:.4f}"
    )
