"""The benchmark: both ways are timed, compared and reported; the plain ways do what ours do."""

import itertools
import json
import time
from pathlib import Path

import pytest
import torch
from tiny import tiny_experiment

from solq_lab.bench import evaluation, gpu, loader, network, op, targets
from solq_lab.bench.runner import PARTS, run, run_builds, table
from solq_lab.bench.timing import compare
from solq_lab.data.annotations import DataError
from solq_lab.errors import UserError
from solq_lab.ops.extension import instruction_set
from solq_lab.ops.ms_deform_attn import ms_deform_attn_reference


def test_medians_ignore_the_warming_run_and_a_slow_moment():
    pauses = itertools.chain([0.2, 0.01, 0.01, 0.1], itertools.repeat(0.01))
    row = compare(
        "p", "w", lambda: time.sleep(next(pauses)) or 1, lambda: time.sleep(0.001) or 1, int.__eq__, repeats=5
    )
    assert 10 <= row.baseline < 50
    assert row.equal
    assert row.to_dict()["ratio"] == row.baseline / row.ours > 1


def test_a_first_run_longer_than_the_time_allowed_is_kept():
    pauses = iter([0.2, 0.02])
    row = compare("p", "w", lambda: time.sleep(next(pauses)), lambda: None, lambda *_: False, repeats=2, seconds=0.05)
    assert row.baseline > 100
    assert not row.equal


def test_a_report_names_machine_versions_and_rows(tmp_path):
    report = run(["matcher", "codec"], tmp_path / "new" / "bench.json")
    stored = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert [row["part"] for row in stored["rows"]] == ["codec"] * 8 + ["matcher"] * 2
    assert all(row["equal"] for row in stored["rows"])
    assert all("masks/s" in row["what"] for row in stored["rows"][:8])
    assert {"part", "what", "baseline_ms", "ours_ms", "ratio", "equal"} == set(stored["rows"][0])
    assert torch.__version__.startswith(stored["versions"]["torch"])
    assert stored == report
    last = table(report).splitlines()[-1]
    assert f"{stored['machine']['processor']}, {stored['threads']} threads, {instruction_set()}; median times" in last
    assert stored["threads"] == torch.get_num_threads()


def test_two_builds_are_measured_side_by_side(tmp_path):
    native, other = run_builds(["native", "native"], ["matcher"], tmp_path / "bench.json")
    assert json.loads((tmp_path / "bench.json").read_text()) == [native, other]
    lines = table(native, other).splitlines()
    name = native["machine"]["instruction_set"]
    assert lines[0].split("  ")[-1].strip() == name
    assert lines[1].count("ratio") == 2
    assert lines[2].count(" ms") == 4
    assert f"{name} and {name}" in lines[-1]


def test_an_unknown_part_and_an_empty_data_folder_are_named(tmp_path):
    with pytest.raises(UserError, match=f"no part ops; allowed are {', '.join(PARTS)}"):
        run(["ops"])
    with pytest.raises(DataError, match="no annotations found; needed is"):
        run(["targets"], data=tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_the_part_for_gpus_is_rejected_where_there_is_none():
    with pytest.raises(UserError, match="part gpu needs an NVIDIA GPU that torch can use; `solq-lab doctor` shows"):
        run(["gpu"])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_what_is_measured_on_a_gpu_gives_the_same_results_on_a_small_scale(device):
    """With a small network; the CPU runs everything but CUDA's own clock and graphs."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    codec = {"mask_size": 128, "vector_dim": 256}
    work = network.Workload(tiny_experiment(Path(), codec=codec), image=(64, 96), shown=(64, 96), batch=2, repeats=1)
    rows = list(gpu.rows(device, work))
    assert [row.what.split(", ")[0] for row in rows] == ["encoder layer"] * 6 + ["inference"] * 2 + ["training step"]
    assert [row.what for row in rows if not row.equal] == []
    ways = [row.what.rpartition(", ")[2] for row in rows[:3]]
    assert ways == ["forward", "backward", "deterministic backward"]
    assert f"{2000 / rows[-1].ours:.1f} images/s" in rows[-1].what
    assert not torch.are_deterministic_algorithms_enabled()


def test_plain_sampling_is_the_reference():
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, 7), (3, 4))
    value = torch.randn(2, 47, 3, 4, generator=generator)
    locations = torch.rand(2, 6, 3, 2, 4, 2, generator=generator) * 1.4 - 0.2
    weights = torch.rand(2, 6, 3, 2, 4, generator=generator)
    expected = ms_deform_attn_reference(value, shapes, locations, weights)
    torch.testing.assert_close(op.sample_by_grid(value, shapes, locations, weights), expected)


def test_both_evaluations_agree_to_six_digits_on_generated_results():
    rows = list(evaluation.rows(num_images=4))
    assert [row.equal for row in rows] == [True, True]


def test_targets_and_samples_agree_on_real_images(coco_tiny: Path):
    images, annotations = coco_tiny / "val2017", coco_tiny / "annotations" / "instances_val2017.json"
    rows = [*targets.rows(annotations), *loader.rows((images, annotations), num_images=2)]
    assert [row.part for row in rows if row.equal] == ["targets", "loader"]
