"""The counts of table 5 are the paper's, and speeds come from predictions that were made."""

from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from tiny import tiny_experiment

from solq_lab.config import ConfigError, load_experiment
from solq_lab.studies.efficiency import Cost, count_costs, efficiency_frame, measure_costs
from solq_lab.workbench.paper import paper_table

TINY = tiny_experiment(Path(), model={"vector_hidden": 64})


@pytest.fixture(scope="module")
def costs() -> dict[str, Cost]:
    """At the sizes of the paper's table 5: ResNet-50, width 256, 512 x 852."""
    return count_costs(load_experiment(REPOSITORY / "experiments" / "solq_r50.yaml"))


def test_parameters_at_width_256_are_the_papers(costs):
    assert costs["SQR"].mask_parameters == 26_108_057
    assert costs["UQR"].mask_parameters == 1_575_168
    assert costs["SQR"].detector_parameters == costs["UQR"].detector_parameters == 40_627_260


def test_the_mask_branches_multiply_and_add_as_often_as_the_paper_says(costs):
    assert costs["UQR"].mask_multiply_adds / 1e9 == pytest.approx(0.47, abs=0.005)
    assert costs["SQR"].mask_multiply_adds / 1e9 == pytest.approx(44.88, rel=1e-3)


def test_decoding_is_a_thousandth_of_the_mask_branch(costs):
    # Of the spectrum of N = 128, the first 256 coefficients lie in 23 rows and 22 columns.
    assert costs["UQR"].decoding_multiply_adds == 23 * 22 * 128 + 128 * 23 * 128
    assert costs["UQR"].decoding_multiply_adds / 1e9 == pytest.approx(0.0005, abs=1e-4)  # the paper's, one digit
    assert costs["SQR"].decoding_multiply_adds is None


def test_a_vector_costs_what_its_three_layers_cost():
    width, hidden, dim, queries = 32, 64, 20, 8
    found = count_costs(TINY, num_classes=3, image_size=(64, 96))["UQR"]
    weights = width * hidden + hidden * hidden + hidden * dim
    assert found.mask_multiply_adds == queries * weights
    assert found.mask_parameters == weights + hidden + hidden + dim


def test_speed_is_measured_for_both_and_changes_no_count():
    counted = count_costs(TINY, num_classes=3, image_size=(64, 96))
    measured = measure_costs(TINY, num_classes=3, image_size=(64, 96), device="cpu", repeats=1)
    assert {name: cost._replace(images_per_second=None) for name, cost in measured.items()} == counted
    assert all(0 < cost.images_per_second < 1e5 for cost in measured.values())


def test_the_table_shows_ours_beside_the_papers(costs):
    paper = {name: paper_table("table5", REPOSITORY / "experiments" / "paper_results.yaml").row(name) for name in costs}
    frame = efficiency_frame(costs, paper)
    assert list(frame) == [("SQR", "here"), ("SQR", "paper"), ("UQR", "here"), ("UQR", "paper")]
    assert frame.loc["mask branch, M parameters"].round(2).tolist() == [26.11, 26.11, 1.58, 1.58]
    decoding = frame.loc["decoding one mask, M multiply-adds"].round(1).tolist()
    np.testing.assert_array_equal(decoding, [np.nan, np.nan, 0.4, 0.5])
    np.testing.assert_array_equal(frame.loc["images per second"], [np.nan, 19.3, np.nan, 24.1])
    assert frame.loc["images per second, UQR over SQR", ("UQR", "paper")] == pytest.approx(1.25, abs=0.005)
    twice = {"SQR": costs["SQR"]._replace(images_per_second=2.0), "UQR": costs["UQR"]._replace(images_per_second=5.0)}
    last = efficiency_frame(twice, {}).iloc[-1].tolist()
    np.testing.assert_array_equal(last, [np.nan, np.nan, 2.5, np.nan])


def test_an_experiment_without_mask_vectors_is_refused():
    plain = tiny_experiment(Path(), codec={"kind": "none"}, model={"standardise_vectors": False})
    with pytest.raises(ConfigError, match=r"tiny: codec.kind none has no mask vectors to measure; give an experiment"):
        count_costs(plain)


def test_no_repeat_is_refused():
    with pytest.raises(ValueError, match="repeats 0"):
        measure_costs(TINY, repeats=0)
