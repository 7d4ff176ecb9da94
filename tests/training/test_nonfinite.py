"""Steps that are not finite: recorded, skipped by all processes alike, replayed bit for bit; fp16 and its scaler."""

import json
import logging
import math
import re
import shutil
from itertools import pairwise

import pytest
import torch
from processes import in_process_group
from spoilt_steps import take_steps
from training_runs import (
    DECODED,
    PLUS,
    SQR,
    assert_an_interruption_changes_nothing,
    before_each_step,
    new_run,
    signal_after,
)
from trap import Trap

from solq_lab import precision
from solq_lab.files import FileError
from solq_lab.models.weights import read_weights
from solq_lab.runs import RunError
from solq_lab.training import nonfinite
from solq_lab.training.checkpoint import step_folders
from solq_lab.training.losses import SetCriterion
from solq_lab.training.metrics import MetricLogger
from solq_lab.training.nonfinite import NonFiniteError, load_record
from solq_lab.training.replay import replay_record
from solq_lab.training.step import SCALE_FLOOR, MicroBatch
from solq_lab.training.trainer import Trainer, train_run

POISONED = "heads.0.vector.layers.2.bias"  # the vector losses alone notice: every other number stays finite


def poison_weight(patch, step):
    """Make one weight nan just before that step."""

    def poison(trainer, batches):
        if trainer.step == step - 1:
            with torch.no_grad():
                trainer.model.get_parameter(POISONED)[0] = math.nan

    before_each_step(patch, poison)


def spoil_total(patch, steps, spoil):
    """Change the loss of those steps, by something that no record holds."""
    total, now = SetCriterion.total, []
    before_each_step(patch, lambda trainer, batches: now.append(trainer.step + 1))

    def spoilt(self, losses):
        value = total(self, losses)
        return spoil(value) if now and now[-1] in steps else value

    patch.setattr(SetCriterion, "total", spoilt)


def to_nan(value):
    return value * math.nan


def everything(trainer):
    """Copies of all that a step may move: weights, statistics of the batch norms, optimiser, averaged weights."""
    moments = [value for state in trainer.optimizer.state.values() for value in state.values()]
    average = trainer.average.state_dict().values()
    return [value.clone() for value in (*trainer.model.state_dict().values(), *moments, *average)]


@pytest.fixture(scope="module")
def stopped(data_root, tmp_path_factory):
    """A run whose third step had a poisoned weight, and what was raised."""
    run = new_run(data_root, tmp_path_factory.mktemp("runs"))
    with pytest.MonkeyPatch.context() as patch:
        poison_weight(patch, 3)
        with pytest.raises(NonFiniteError) as raised:
            train_run(run)
    return run, str(raised.value)


def copy_record(run, folder):
    """A copy to damage."""
    return shutil.copytree(run.folder / "flight" / "step_0000003", folder / "step_0000003")


# ------------------------------------------------------------------------------------------------ record and message


def test_the_message_names_step_cause_images_record_and_cure(stopped):
    run, message = stopped
    facts = json.loads((run.folder / "flight/step_0000003/record.json").read_text())
    ids = [image["id"] for image in facts["shares"][0]["passes"][0]["images"]]
    assert message.startswith(f"step 3: {POISONED} was not finite before the step already; the loss vector/0 is nan")
    assert f"Image ids of this step: {ids}" in message
    assert f"solq-lab replay {run.folder / 'flight/step_0000003'}" in message
    assert "train.skip_nonfinite=0" in message
    assert "optim.lr" in message
    assert run.status()["state"] == "failed"
    assert message in run.status()["message"]
    (line,) = run.metrics("nonfinite")
    assert (line["step"], line["image_ids"], line["record"]) == (3, ids, "flight/step_0000003")
    assert [line["step"] for line in run.metrics("train")] == [1, 2]


def test_the_record_holds_every_term_and_the_step_itself(stopped):
    run, _ = stopped
    facts, weights, ((batches, generators),) = load_record(run.folder / "flight" / "step_0000003")
    (done,) = facts["shares"][0]["passes"]
    terms = ("class", "l1", "giou", "vector")
    assert set(done["losses"]) == {f"{term}{layer}" for term in terms for layer in ("", "/0")} | {"total"}
    assert {name for name, value in done["losses"].items() if value == "nan"} == {"vector", "vector/0", "total"}
    assert done["images"][0]["file_name"] == f"{done['images'][0]['id']}.png"
    assert facts["epoch"] == 1.0
    assert facts["learning_rates"].keys() == {"main", "backbone", "offsets"}
    assert facts["weights_nonfinite"] == [POISONED]
    assert facts["gradients"]["nonfinite"] == {}  # an absolute value that is nan has slope 0: the loss alone tells
    assert len(facts["gradients"]["largest"]) == 20
    assert facts["gradients"]["norm"] >= max(facts["gradients"]["largest"].values())
    ((images, targets),) = batches
    assert generators.keys() == {"cpu"}
    assert images.pixels.dtype == torch.uint8
    assert [target.image_id for target in targets] == [image["id"] for image in done["images"]]
    assert weights.state[POISONED].isnan().sum() == 1
    assert "name: tiny" in weights.experiment


def test_a_gradient_alone_is_distinguished_from_a_loss(data_root, tmp_path, monkeypatch, command_line):
    # the root of nothing: its value is 0, its slope is not finite
    spoil_total(monkeypatch, {2}, lambda value: value + (value * 0).sqrt())
    run = new_run(data_root, tmp_path)
    with pytest.raises(NonFiniteError, match=r"step 2: all losses are finite, the gradient of \S+ \(and \d+ more\) is"):
        train_run(run)
    monkeypatch.undo()
    record = run.folder / "flight" / "step_0000002"
    replay = replay_record(record)  # the loss was spoilt from outside
    assert not replay.reproduced
    assert replay.report().endswith("not reproduced: every value is finite now")
    assert replay.repeated == {}
    assert command_line("replay", record)[0] == 1


def test_costs_that_are_not_finite_stop_after_as_many_steps_as_are_allowed(data_root, tmp_path, caplog):
    run = new_run(data_root, tmp_path, optim={"lr": 1e30, "backbone_lr": 1e30}, train={"skip_nonfinite": 3})
    with pytest.raises(NonFiniteError, match=r"step 5: .* the class cost is not finite; .* in a row .*: 4, .*finite=3"):
        train_run(run)
    skipped = [message for message in caplog.messages if "; skipped," in message]
    counts = [message.rpartition("; ")[2] for message in skipped]
    assert counts == [f"skipped, {number} of at most 3 in a row" for number in (1, 2, 3)]
    assert [path.name for path in step_folders(run.folder / "flight")] == [f"step_000000{n}" for n in (3, 4, 5)]
    assert [line["step"] for line in run.metrics("nonfinite")] == [2, 3, 4, 5]
    weights = [read_weights(path / "weights.safetensors").state for path in step_folders(run.folder / "flight")]
    assert all(torch.equal(weights[0][name], later[name]) for later in weights[1:] for name in later)
    replay = replay_record(run.folder / "flight" / "step_0000003")
    assert replay.exact
    assert replay.firsts["forward"].startswith("output of backbone.")
    assert replay.firsts["backward"].startswith("gradient of the output of the network")
    assert "the class cost is not finite" in replay.firsts["loss"]
    assert re.search(r"and \d+ more", replay.report())


# -------------------------------------------------------------------------------------------------- skipping


def test_a_skipped_step_moves_nothing_and_only_steps_in_a_row_count(data_root, tmp_path, monkeypatch):
    spoil_total(monkeypatch, {3, 4, 6}, to_nan)
    before = []  # each step
    before_each_step(monkeypatch, lambda trainer, batches: before.append(everything(trainer)))
    run = new_run(data_root, tmp_path, train={"skip_nonfinite": 2, "ema": 0.9})
    assert train_run(run) == "finished"
    same = [len(one) == len(next) and all(map(torch.equal, one, next)) for one, next in pairwise(before)]
    assert [step for step, moved_nothing in enumerate(same, start=1) if moved_nothing] == [3, 4, 6]
    assert [line["step"] for line in run.metrics("nonfinite")] == [3, 4, 6]
    assert [line["step"] for line in run.metrics("train")] == [1, 2, 5, 7, 8]


def test_a_run_that_stopped_resumes_where_more_steps_may_be_skipped(data_root, tmp_path, monkeypatch):
    spoil_total(monkeypatch, {4}, to_nan)
    with pytest.raises(NonFiniteError, match=r"Raise train\.skip_nonfinite"):
        train_run(new_run(data_root, tmp_path))
    run = new_run(data_root, tmp_path, train={"skip_nonfinite": 1})
    assert train_run(run) == "finished"
    assert [line["step"] for line in run.metrics("train")] == [1, 2, 3, 5, 6, 7, 8]


def test_a_mean_over_several_steps_leaves_the_skipped_ones_out(data_root, tmp_path):
    run = new_run(data_root, tmp_path, train={"log_every": 3})
    metrics = MetricLogger(run, total_steps=9, steps_per_epoch=3)
    for step, total in enumerate((1.0, None, 4.0, None, None, None), start=1):
        if total is None:
            metrics.skip_step(step, "nonfinite", {})
        else:
            loss = torch.tensor(total)
            metrics.add_step([MicroBatch(None, [], None, {"total": loss}, None)], norm=loss)
        metrics.end_step(step, 0.1, [{"name": "main", "lr": 1e-3}])
    (line,) = run.metrics("train")
    assert (line["step"], line["total"], line["grad_norm"]) == (3, 2.5, 2.5)
    assert line["images_per_second"] == pytest.approx(3 * 4 / 0.3)


def test_a_resumed_training_with_skipped_steps_equals_an_uninterrupted_one_bit_for_bit(
    data_root, tmp_path, monkeypatch
):
    spoil_total(monkeypatch, {4, 5}, to_nan)
    train = {"skip_nonfinite": 2, "ema": 0.9, "log_every": 2}
    assert_an_interruption_changes_nothing(data_root, tmp_path, train=train)


def test_the_count_of_steps_in_a_row_survives_an_interruption(data_root, tmp_path, monkeypatch):
    spoil_total(monkeypatch, {4, 5}, to_nan)
    run = new_run(data_root, tmp_path, train={"skip_nonfinite": 1})
    with monkeypatch.context() as patch:
        signal_after(patch, 4)
        assert train_run(run) == "preempted"
    with pytest.raises(NonFiniteError, match=r"step 5: .*: 2, train\.skip_nonfinite=1"):
        train_run(run)


def test_weights_that_are_not_finite_are_never_saved(data_root, tmp_path, monkeypatch):
    poison_weight(monkeypatch, 5)
    run = new_run(data_root, tmp_path, train={"skip_nonfinite": 5})
    with pytest.raises(NonFiniteError, match=rf"{POISONED} is not finite after step 6: no checkpoint is written"):
        train_run(run)
    assert [path.name for path in step_folders(run.checkpoints)] == ["step_0000003"]


def test_what_is_trained_is_announced_with_the_square_root_rule(data_root, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        train_run(new_run(data_root, tmp_path, train={"steps": 1, "accumulate": 2}))
    assert "batch 4 = 1 x 2 x 2 (processes x passes x images)" in caplog.messages
    assert "learning rates: main 0.001, backbone 0.001, offsets 0.0001; schedule cosine until step 1" in caplog.messages
    (rule,) = [message for message in caplog.messages if "square-root" in message]
    assert rule.endswith("by square-root scaling: optim.lr=7.1e-05 optim.backbone_lr=7.1e-06")


def test_where_the_disk_is_full_the_message_still_names_the_images(data_root, tmp_path, monkeypatch, caplog):
    run = new_run(data_root, tmp_path, train={"skip_nonfinite": 1})
    spoil_total(monkeypatch, {2, 3}, to_nan)

    def refuse(value, path):
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nonfinite.torch, "save", refuse)
    with pytest.raises(NonFiniteError) as raised:
        train_run(run)
    assert "no record could be written ([Errno 28] No space left on device)" in str(raised.value)
    assert "Image ids of this step: [" in str(raised.value)
    assert "solq-lab replay" not in str(raised.value)
    assert list((run.folder / "flight").iterdir()) == []
    assert [line["record"] for line in run.metrics("nonfinite")] == [None, None]


def test_a_step_that_is_not_finite_in_one_process_is_skipped_by_both(data_root, tmp_path):
    run = new_run(data_root, tmp_path, train={"gpus": 2, "skip_nonfinite": 2}, model={"dropout": 0.1})
    in_process_group(take_steps, run.folder, tmp_path, processes=2)
    first, second = (torch.load(tmp_path / f"rank_{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["moved"] == second["moved"] == [False, False, True]
    assert first["reasons"] == second["reasons"]
    cost, loss = first["reasons"]
    assert cost.startswith("in process 1, image ")
    assert "the l1 cost is not finite" in cost
    assert loss == "in process 1, the loss total is inf"
    record = run.folder / "flight" / "step_0000001"
    assert {path.name for path in record.iterdir()} == {"record.json", "weights.safetensors", "rank_0.pt", "rank_1.pt"}
    replay = replay_record(record)  # the box that is nan is in the record
    assert replay.reproduced  # and not exact: its batch norms see one process at a time
    losses = {name for name in replay.repeated if "loss" in name}
    assert losses
    assert all(name.startswith("process 1, ") for name in losses)


# ---------------------------------------------------------------------------------------------------------- replay


def test_a_replay_repeats_the_step_bit_for_bit_and_finds_the_place(stopped, command_line):
    run, _ = stopped
    record = run.folder / "flight" / "step_0000003"
    torch.manual_seed(123)
    replay = replay_record(record)
    assert replay.exact
    assert replay.reproduced
    assert replay.repeated == replay.recorded
    place = "output of heads.0.vector.layers.2 (OneDNNLinear), 10 of 200 values, from finite inputs"
    assert replay.firsts == {"forward": place, "loss": "the loss vector/0 is nan (and 2 more)"}
    status, shown = command_line("replay", record)
    assert status == 0
    assert f"not finite before the step: {POISONED}" in shown
    assert "reproduced, bit for bit" in shown


@pytest.mark.parametrize(
    "sections",
    [
        {"train": {"gradient_checkpointing": True, "accumulate": 2}},
        {"train": {"autocast": "bf16"}},
        {"model": {"two_stage": True, "queries": 6}},
        SQR,
        DECODED,
        PLUS,
    ],
    ids=["recomputed passes", "bf16", "two stages", "SQR", "decoded", "plus"],
)
def test_every_kind_of_training_is_replayed_bit_for_bit(data_root, tmp_path, sections):
    run = new_run(data_root, tmp_path, optim={"lr": 1e30, "backbone_lr": 1e30}, **sections)
    with pytest.raises(NonFiniteError, match="step 2: "):
        train_run(run)
    replay = replay_record(run.folder / "flight" / "step_0000002")
    assert replay.exact
    assert replay.firsts.keys() == {"forward", "loss", "backward"}


def test_a_replay_in_another_precision_says_what_differs(stopped):
    run, _ = stopped
    replay = replay_record(run.folder / "flight" / "step_0000003", autocast="bf16")
    assert replay.reproduced  # a weight that is nan is so in every precision
    assert not replay.exact
    assert replay.report().endswith("reproduced: the same values are not finite, others differ")


@pytest.mark.parametrize("name", ["weights.safetensors", "rank_0.pt"])
def test_a_damaged_or_missing_file_of_a_record_is_named(stopped, tmp_path, name):
    record = copy_record(stopped[0], tmp_path)
    content = (record / name).read_bytes()
    (record / name).write_bytes(content[:-10])
    with pytest.raises(RunError, match=rf"{name}: damaged, it is not what was written; copy the record anew"):
        replay_record(record)
    (record / name).unlink()
    with pytest.raises(RunError, match=rf"{name}: missing; the record cannot be replayed without it"):
        replay_record(record)


def test_a_record_leads_to_no_file_outside_it_and_runs_no_code(stopped, tmp_path):
    record = copy_record(stopped[0], tmp_path)
    facts = json.loads((record / "record.json").read_text())
    torch.save({"passes": Trap(tmp_path / "sprung"), "generators": {}}, record / "rank_0.pt")
    facts["files"]["rank_0.pt"] = nonfinite.hash_file(record / "rank_0.pt")
    (record / "record.json").write_text(json.dumps(facts))
    with pytest.raises(RunError, match="not a record that can be replayed"):
        load_record(record)
    assert not (tmp_path / "sprung").exists()
    facts["files"]["../elsewhere"] = ""
    (record / "record.json").write_text(json.dumps(facts))
    with pytest.raises(RunError, match=r"elsewhere: missing"):
        load_record(record)


def test_what_is_no_record_is_rejected_with_a_list_of_those_there_are(stopped, tmp_path, command_line):
    run, _ = stopped
    with pytest.raises(RunError, match=r"not a flight record .*; records there: .*/flight/step_0000003"):
        replay_record(run.folder)
    (tmp_path / "record.json").write_text('{"step": 3')
    with pytest.raises(FileError, match="not readable as JSON"):
        replay_record(tmp_path)
    (tmp_path / "record.json").write_text('{"step": 3}')
    with pytest.raises(RunError, match="not the JSON of a flight record"):
        replay_record(tmp_path)
    status, shown = command_line("replay", tmp_path / "nowhere")
    assert status == 2
    assert "records there: none" in shown


# ------------------------------------------------------------------------------------------------------------ fp16


def scaled(patch, scale):
    """Start the scaler of every training there; it usually takes a while to find its scale."""
    build = Trainer.__init__

    def build_and_scale(self, *arguments):
        build(self, *arguments)
        if self.step == 0:
            self.scaler = torch.amp.GradScaler(self.device.type, init_scale=scale)

    patch.setattr(Trainer, "__init__", build_and_scale)


@pytest.mark.parametrize(("half", "precision"), [("fp16", 0.01), ("bf16", 0.05)])  # four digits, three digits
def test_half_precision_trains_close_to_float32(data_root, tmp_path, monkeypatch, half, precision):
    scaled(monkeypatch, 1024.0)
    losses = []
    for autocast in ("none", half):
        run = new_run(data_root, tmp_path / autocast, train={"steps": 3, "autocast": autocast}, model={"dropout": 0.0})
        train_run(run)
        losses.append([line["total"] for line in run.metrics("train")])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=precision)


def test_an_overflow_halves_the_scale_without_a_record_and_is_resumed_bit_for_bit(data_root, tmp_path, monkeypatch):
    scaled(monkeypatch, 2.0**18)
    train = {"autocast": "fp16", "ema": 0.9, "save_every": 100, "steps": 6}
    whole = assert_an_interruption_changes_nothing(data_root, tmp_path, train=train)
    overflows = whole.metrics("overflow")
    count = len(overflows)
    assert 2 < count < 6
    assert [line["scale"] for line in overflows] == [2.0 ** (18 - n) for n in range(count)]
    steps = [line["step"] for kind in ("overflow", "train") for line in whole.metrics(kind)]
    assert sorted(steps) == list(range(1, 7))
    assert not (whole.folder / "flight").exists()


def test_gradients_that_overflow_without_a_scale_are_recorded_and_replayed(data_root, tmp_path, monkeypatch):
    scaled(monkeypatch, SCALE_FLOOR)
    run = new_run(data_root, tmp_path, train={"autocast": "fp16"}, loss={"giou_weight": 1e9})
    with pytest.raises(NonFiniteError, match="step 1: all losses are finite, the gradient of"):
        train_run(run)
    replay = replay_record(run.folder / "flight" / "step_0000001")
    assert replay.exact
    assert replay_record(run.folder / "flight" / "step_0000001", autocast="none").reproduced is False


def test_fp16_on_a_processor_without_it_logs_that_it_is_slow(monkeypatch, caplog):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    with caplog.at_level(logging.WARNING, logger=precision.__name__):
        precision.check_autocast("bf16", cpu, allowed=precision.TRAINING)
        assert not caplog.messages
        precision.check_autocast("fp16", cpu, setting="train.autocast", allowed=precision.TRAINING)
    (message,) = caplog.messages
    assert message.startswith("train.autocast=fp16: this CPU has no fp16 instructions")
