"""A trained model as one safetensors file for others: weights, mask code, classes and experiment, but no paths."""

from __future__ import annotations

from pathlib import Path

from solq_lab.build import build_codec
from solq_lab.codecs.base import FittedCodec
from solq_lab.config import ConfigError, Experiment, change_experiment
from solq_lab.files import replacing
from solq_lab.inference.predictor import Predictor, find_weights, read_trained
from solq_lab.models.weights import save_weights
from solq_lab.runs import Run
from solq_lab.schema import Role, keys_with


def share(weights_or_run: str | Path | Run, destination: Path) -> Predictor:
    """Write a file from which `Predictor(file)` can do everything, on a machine that has nothing else.

    A fitted code's tables go into the file even where the original left them beside it; paths of data, code and
    starting weights are cut to their last part, so that nothing tells where the model was trained.

    Args:
        weights_or_run: as for `Predictor`.
        destination: the file; it must not exist.

    Returns:
        The predictor of the written file.

    Raises:
        ConfigError: the destination exists, or the tables of its mask code are nowhere to be found.
        RunError, WeightMismatch: as for `Predictor`.
    """
    if destination.exists():
        raise ConfigError(f"{destination}: exists already and is not written over; remove it or name another file")
    weights, experiment, classes = read_trained(find_weights(weights_or_run))
    codec = build_codec(experiment, tables=weights.codec)
    tables = codec.state_dict() if isinstance(codec, FittedCodec) else {}
    destination.parent.mkdir(parents=True, exist_ok=True)
    with replacing(destination) as unfinished:
        about = {"experiment": without_paths(experiment).to_yaml(), "classes": classes.to_json()}
        save_weights(unfinished, weights.state, codec=tables, **about)
        unfinished.chmod(0o644)  # temporary files are private, this one is to be shared
        return Predictor(unfinished, device="cpu")


def without_paths(experiment: Experiment) -> Experiment:
    """The same experiment without the folders of the machine that trained it."""
    names = {key: Path(experiment.value(key)).name for key in keys_with(Role.START)}
    return change_experiment(experiment, names | {"data.root": ""}, source=experiment.name)
