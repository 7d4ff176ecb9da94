"""Several processes evaluate like one: no image twice or lost, and a stop or an error in one reaches all."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from oracle_detector import MASK_SIZE, NUM_IMAGES, VECTOR_DIM, OracleDetector, open_dataset, write_coco_folder
from processes import in_process_group

from solq_lab import distributed
from solq_lab.codecs.dct import DCTCodec
from solq_lab.evaluation import gathering
from solq_lab.evaluation.evaluator import evaluate_model
from solq_lab.evaluation.gathering import share_from_main, stream_to_main
from solq_lab.evaluation.results import read_results, write_results
from solq_lab.schema import EvaluationSection

BATCH_SIZES = (1, 2, NUM_IMAGES)  # the last one leaves all but one process without an image


def evaluate(root: Path, *, batch_size: int = 1, should_stop: Callable[[], bool] | None = None) -> dict:
    """What an evaluation gives in this process, as JSON types."""
    dataset, codec = open_dataset(root), DCTCodec(MASK_SIZE, VECTOR_DIM)
    model = OracleDetector(dataset, codec)
    results, evaluation = evaluate_model(
        model, codec, dataset, EvaluationSection(batch_size=batch_size), should_stop=should_stop
    )
    return {"results": results, "evaluation": evaluation.to_dict(), "batches": len(model.modes)}


def failing_at(items: list[int], at: int):
    for item in items:
        if item == at:
            raise ValueError(f"item {item} cannot be computed")
        yield item


def outcome(act: Callable[[], object]) -> object:
    """What `act` returns, or what it raises."""
    try:
        return act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def run_all_cases(processes: int, root: Path) -> None:
    """One process of a group: its outcomes go into a file."""
    gathering.CHUNK_SIZE, rank = 2, distributed.rank()
    last = processes - 1
    items = list(range(100 * rank, 100 * rank + 3 + 4 * rank))  # the shares differ in length
    outcomes = {
        "evaluations": [evaluate(root, batch_size=size) for size in BATCH_SIZES],
        "items": outcome(lambda: list(stream_to_main(items))),
        "nothing": outcome(lambda: list(stream_to_main([]))),
        "stopped": outcome(lambda: evaluate(root, should_stop=lambda: rank == last)),
        "failed": outcome(lambda: list(stream_to_main(failing_at(items, at=100 * last + 5)))),
        "shared": outcome(lambda: share_from_main(lambda: f"from process {rank}")),
        "main failed": outcome(lambda: share_from_main(lambda: 1 // 0)),
        "all are still together": outcome(lambda: list(stream_to_main([rank]))),
    }
    (root / f"process{rank}_of_{processes}.json").write_text(json.dumps(outcomes))


@pytest.fixture(scope="module", params=[2, 3])
def outcomes(request, tmp_path_factory) -> list[dict]:
    """The outcomes of each of two, and of three processes."""
    root = write_coco_folder(tmp_path_factory.mktemp("coco"))
    in_process_group(run_all_cases, request.param, root, processes=request.param)
    found = [json.loads((root / f"process{n}_of_{request.param}.json").read_text()) for n in range(request.param)]
    return [{"root": root} | outcome for outcome in found]


@pytest.mark.parametrize("place", range(len(BATCH_SIZES)))
def test_several_processes_find_and_score_what_one_does(outcomes, place, tmp_path):
    alone = evaluate(outcomes[0]["root"], batch_size=BATCH_SIZES[place])
    main, *others = (process["evaluations"][place] for process in outcomes)
    write_results(tmp_path / "alone.json.gz", alone["results"])
    write_results(tmp_path / "together.json.gz", main["results"])
    assert (tmp_path / "together.json.gz").read_bytes() == (tmp_path / "alone.json.gz").read_bytes()
    assert {result["image_id"] for result in read_results(tmp_path / "together.json.gz")} == set(
        range(1, NUM_IMAGES + 1)
    )
    assert main["evaluation"] == alone["evaluation"]
    assert all(other["evaluation"] == alone["evaluation"] and other["results"] == [] for other in others)


def test_the_images_are_shared_out(outcomes):
    of_each = [process["evaluations"][0]["batches"] for process in outcomes]
    assert sum(of_each) == NUM_IMAGES
    assert max(of_each) - min(of_each) <= 1


def test_the_main_process_receives_every_item_once(outcomes):
    expected = [100 * rank + item for rank in range(len(outcomes)) for item in range(3 + 4 * rank)]
    assert sorted(outcomes[0]["items"]) == expected
    assert all(process["items"] == [] for process in outcomes[1:])
    assert all(process["nothing"] == [] for process in outcomes)


def test_a_stop_in_one_process_stops_all(outcomes):
    assert [process["stopped"] for process in outcomes] == ["EvaluationStopped: a process was stopped"] * len(outcomes)


def test_an_error_in_one_process_reaches_all_by_name(outcomes):
    *others, last = (process["failed"] for process in outcomes)
    error = f"ValueError: item {100 * (len(outcomes) - 1) + 5} cannot be computed"
    assert last == error
    assert others == [f"ProcessFailed: process {len(outcomes) - 1} failed: {error}"] * len(others)


def test_what_the_main_process_computes_or_fails_to_compute_is_known_to_all(outcomes):
    assert [process["shared"] for process in outcomes] == ["from process 0"] * len(outcomes)
    main, *others = (process["main failed"] for process in outcomes)
    assert main == "ZeroDivisionError: integer division or modulo by zero"
    assert others == [f"ProcessFailed: process 0 failed: {main}"] * len(others)


def test_a_group_is_usable_after_a_stop_and_a_failure(outcomes):
    assert sorted(outcomes[0]["all are still together"]) == list(range(len(outcomes)))
