"""The doctor's report on this machine's operators."""

import pytest
import torch

from solq_lab.ops.extension import ExtensionBuildError
from solq_lab.ops.ms_deform_attn import implementation_for
from solq_lab.workbench import doctor
from solq_lab.workbench.doctor import TOLERANCE, Implementation, Report, examine


@pytest.fixture(scope="module")
def report():
    return examine()


def test_every_implementation_gives_the_numbers_of_float64(report):
    assert report.healthy
    measured = [each for each in report.implementations if each.difference is not None]
    assert {"reference"} <= {each.name for each in measured}
    for each in measured:
        assert 0 < each.difference <= TOLERANCE
        assert each.forward_ms > 0
        assert each.backward_ms > 0


def test_the_report_says_who_serves_the_processor(report):
    serving = [each.name for each in report.implementations if each.device == "cpu" and each.serves]
    assert serving == [implementation_for("cpu")]


def test_the_text_names_torch_the_tools_and_the_differences(report):
    text = str(report)
    for topic in (
        "torch",
        "processor",
        "GPU",
        "C++ compiler",
        "ninja",
        "CUDA toolkits",
        "CPU operators",
        "kept libraries",
    ):
        assert f"\n{topic}" in f"\n{text}"
    assert torch.__version__ in text
    assert "reference on cpu" in text
    assert "differs from float64 by" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_report_says_why_cuda_serves_nothing(report):
    (line,) = [str(each) for each in report.implementations if each.name == "cuda"]
    assert "cannot be used: " in line
    assert "on this machine" in line or "without CUDA" in line


def test_an_implementation_that_cannot_be_built_is_reported_with_the_reason(monkeypatch):
    def fail(kind):
        raise ExtensionBuildError("ninja is missing; install it", "compiler output")

    monkeypatch.setattr(doctor, "load_extension", fail)
    check = doctor._check("cpu", "cpu")
    assert not check.serves
    assert str(check).endswith("cannot be used: ninja is missing; install it")


def test_different_numbers_are_called_unhealthy():
    good = Implementation("cpu", "reference", True, "", 1e-6, 1.0, 2.0)
    bad = Implementation("cpu", "cpu", True, "", 1e-2, 1.0, 2.0)
    assert Report([], [good]).healthy
    assert not Report([], [good, bad]).healthy
    assert "NOT the same numbers (at most 0.0001)" in str(bad)
