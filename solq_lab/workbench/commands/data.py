"""Commands around data sets: make-shapes, download-coco, check-data, convert-data."""

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from solq_lab.workbench.commands.arguments import FAILED, Overrides, existing_path, folder_to_write


def make_shapes(
    root: Annotated[
        Path, typer.Argument(help="Folder to write: images and COCO annotations.", callback=folder_to_write)
    ],
    level: Annotated[
        Literal["easy", "hard"], typer.Option(help="Small upright shapes, or any size and rotation.")
    ] = "easy",
    train_images: Annotated[int, typer.Option("--train", min=1, help="Training images.")] = 6000,
    val_images: Annotated[int, typer.Option("--val", min=1, help="Validation images.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="The same seed draws the same images.")] = 0,
    processes: Annotated[int, typer.Option(min=1, help="Drawing processes.")] = 2,
) -> None:
    """Draw overlapping, textured shapes as a COCO folder."""
    from solq_lab.data.shapes.writer import write_shapes

    write_shapes(root, level=level, train=train_images, val=val_images, seed=seed, processes=processes)
    typer.echo(f"{train_images} + {val_images} images in {root}")


def download_coco(
    folder: Annotated[Path, typer.Argument(help="Data folder to fill.", callback=folder_to_write)],
    split: Annotated[
        list[str] | None,
        typer.Option(help="Images to fetch: train, val or test, several times for more; by default train and val."),
    ] = None,
    base_url: Annotated[str | None, typer.Option(help="Another server with COCO's archives, http or https.")] = None,
    sums: Annotated[
        Path | None, typer.Option(help="File of MD5 or SHA-256 sums, for a server with other archives than COCO's.")
    ] = None,
    keep_archives: Annotated[bool, typer.Option("--keep-archives", help="Leave the zip files in .download.")] = False,
    retries: Annotated[int, typer.Option(min=0, help="Attempts in a row that may bring nothing new.")] = 8,
) -> None:
    """Fetch COCO 2017, verify and unpack it. Re-running resumes, and skips what is complete."""
    from tqdm.contrib.logging import logging_redirect_tqdm

    from solq_lab.errors import Interrupted
    from solq_lab.workbench.download import coco as download

    splits = list(dict.fromkeys(split or ("train", "val")))
    try:
        with logging_redirect_tqdm():  # messages appear above the bar, not in the middle of it
            download.download_coco(
                folder,
                splits,
                base_url=base_url or download.BASE_URL,
                sums=None if sums is None else download.read_sums(sums),
                keep_archives=keep_archives,
                retries=retries,
            )
    except KeyboardInterrupt:
        raise Interrupted(f"{folder}: stopped; what has arrived is kept, re-running resumes") from None
    typer.echo(
        f"{' and '.join(splits)} of COCO 2017 in {folder}\ncheck it:  solq-lab check-data {shlex.quote(str(folder))}"
    )


def convert_data(
    source: Annotated[Path, typer.Argument(help="LVIS file (.json), or YOLO segmentation folder with a data.yaml.")],
    target: Annotated[
        Path, typer.Argument(help="COCO-format folder to write; it may hold the other split.", callback=folder_to_write)
    ],
    images: Annotated[Path | None, typer.Option(help="LVIS: folder of COCO's train2017 and val2017.")] = None,
    split: Annotated[
        Literal["train", "val"] | None, typer.Option(help="LVIS: by default as the file's name says.")
    ] = None,
    link: Annotated[bool, typer.Option("--link/--no-link", help="Link the images into the folder.")] = True,
) -> None:
    """Make a COCO-format folder of LVIS or YOLO segmentation. Images stay where they are."""
    from solq_lab.workbench.convert.converter import convert_data as convert

    splits = convert(source, target, images=images, split=split, link=link)
    settings = [f"data.root={target}"]
    for part in () if link else splits:  # what is linked is found
        settings.append(f"data.{part.name}_images={part.images}")
    typer.echo(f"check it:  {shlex.join(['solq-lab', 'check-data', str(target)])}\nuse it:    {shlex.join(settings)}")


def check_data(
    data: Annotated[
        Path,
        typer.Argument(help="Data folder, annotation file, or experiment file (.yaml).", callback=existing_path),
    ],
    overrides: Overrides = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the images, where it is not found.")] = None,
    look: Annotated[
        Literal["decode", "header", "names"],
        typer.Option(help="Decode every image, read its header only, or not open it."),
    ] = "decode",
    queries: Annotated[int | None, typer.Option(min=1, help="J: objects found per image; by default 300.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes that share the images.")] = 2,
    fail_on: Annotated[
        Literal["refused", "harmful", "note"],
        typer.Option(help="Exit with 1 for what stops a training, harms it too, or any note."),
    ] = "harmful",
    allow: Annotated[
        list[str] | None, typer.Option(help="A rule that may be broken, so often at most.", metavar="RULE[=COUNT]")
    ] = None,
    worst: Annotated[int, typer.Option(min=0, help="Findings of each rule and split in report.json.")] = 100,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder of report.json; by default runs/data_checks/NAME.", callback=folder_to_write),
    ] = None,
) -> None:
    """Check a data set before training on it. Exit status: 0 clean, 1 with problems, 2 cannot be read."""
    from solq_lab.files import write_json
    from solq_lab.workbench.check.inputs import find_data

    allowed = _allowed(allow or [])
    splits, options, name = find_data(data, overrides or [], images)

    from solq_lab.workbench.check.checker import check_data as check  # torch: not for a wrong folder

    options = options._replace(look=look, queries=queries or options.queries)
    report = check(splits, options, processes=processes)
    typer.echo(report.table(str(data)))
    folder = output or Path("runs/data_checks") / name
    write_json(folder / "report.json", report.to_dict(worst) | {"allowed": allowed})
    typer.echo(f"\nnumbers {folder / 'report.json'}")
    if not (overrides or images):
        typer.echo(f"images  solq-lab run notebooks/data_report.ipynb -p {shlex.quote(f'root={data}')}")
    failing = report.findings.failing(fail_on, allowed)
    if failing:
        allowing = " ".join(f"--allow {rule}" for rule in failing)
        typer.echo(f"problems: {', '.join(failing)}\nmend them, or let them pass with {allowing}")
        raise typer.Exit(FAILED)


def _allowed(texts: list[str]) -> dict[str, int | None]:
    """How often each rule may be broken; None: without limit."""
    from solq_lab.workbench.check.findings import RULES

    allowed: dict[str, int | None] = {}
    for text in texts:
        rule, equals, count = text.partition("=")
        if rule not in RULES or (equals and not count.isdecimal()):
            rules = ", ".join(RULES)
            raise typer.BadParameter(
                f"found {text!r}, allowed is RULE or RULE=COUNT; rules: {rules}", param_hint="--allow"
            )
        allowed[rule] = int(count) if equals else None
    return allowed
