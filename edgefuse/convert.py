"""A pickle of weights becomes a checkpoint, without running what else the pickle may hold."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgefuse import store, wenet
from edgefuse.checkpoint import ISTD, MEAN, assemble, read_config, read_tokens, starts_as_pickle
from edgefuse.errors import MissingFile, NotACheckpoint, PickledCheckpoint, ShapeMismatch
from edgefuse.foreign import first_line
from edgefuse.values import Checkpoint

NESTS = ("state_dict", "model_state_dict", "model", "weights")  # where trainers keep the weights
PREFIXES = ("module.", "_orig_mod.", "encoder.")  # what wrappers put in front of their names
WENET_CMVN = {MEAN: "mean_stat", ISTD: "var_stat"}
SMALLEST_VARIANCE = 1e-20  # WeNet's floor


def convert(
    pickled: Path, config: Path, tokens: Path, output: Path, *, cmvn: Path | None = None, overwrite: bool = False
) -> Checkpoint:
    """Read weights with `torch.load(weights_only=True)`, check them against the config, and write a checkpoint.

    Config and tokens are `config.json` and `tokens.txt` of edgefuse, or `train.yaml` and `units.txt` of WeNet, see wenet.py. The
    mean and inverse deviation of the features are read from the weights, as `frontend.mean` and `frontend.istd`, or from `cmvn`,
    a `global_cmvn` of WeNet in JSON.

    Raises:
        PickledCheckpoint: the file holds more than tensors.
        CheckpointError: whatever else is wrong with it.
    """
    weights = _own_names(_load(pickled))
    if config.suffix in wenet.SUFFIXES:
        (shape, weights), symbols = wenet.read_wenet(config, weights), wenet.read_units(tokens)
    else:
        shape, symbols = read_config(config), read_tokens(tokens)
    if cmvn is not None:
        weights |= _read_cmvn(cmvn)
    if lacking := [name for name in (MEAN, ISTD) if name not in weights]:
        raise ShapeMismatch(
            f"{pickled} lacks {' and '.join(lacking)}: without them the features cannot be normalized as in training.",
            hint="Name WeNet's global_cmvn with --cmvn FILE, or add both tensors to the weights.",
        )
    checkpoint = assemble(shape, weights, symbols)
    store.write_checkpoint(output, checkpoint, overwrite=overwrite)
    return checkpoint


def _load(pickled: Path) -> dict[str, Tensor]:
    if not pickled.exists():
        raise MissingFile(f"There is nothing at {pickled}.", hint="Check the path.")
    if pickled.is_dir() or not starts_as_pickle(pickled):
        raise NotACheckpoint(f"{pickled} is not a file of weights that PyTorch wrote.", hint="Name a .pt or .ckpt file.")
    try:
        loaded: Any = torch.load(pickled, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise PickledCheckpoint(
            f"{pickled} holds more than tensors, and reading the rest could run code.",
            hint="Where it was made, save its weights alone: torch.save(model.state_dict(), 'weights.pt')",
        ) from error
    except Exception as error:  # a damaged archive fails in many ways
        raise NotACheckpoint(
            f"{pickled} cannot be read as weights of PyTorch: {first_line(error)}", hint="Copy it again."
        ) from error
    for nest in NESTS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(nest), Mapping):
            loaded = loaded[nest]
    if not isinstance(loaded, Mapping):
        raise NotACheckpoint(f"{pickled} holds a {type(loaded).__name__}, not weights by name.", hint="Save a state_dict.")
    tensors = {str(name): value.detach() for name, value in loaded.items() if isinstance(value, Tensor) and not value.is_sparse}
    if not tensors:
        raise NotACheckpoint(f"{pickled} holds no weights.", hint="Save a state_dict.")
    return tensors


def _own_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as `edgefuse.model.Encoder` has them, without the prefix that all weights share."""
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in weights if name not in (MEAN, ISTD)):
            weights = {name if name in (MEAN, ISTD) else name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def _read_cmvn(path: Path) -> dict[str, Tensor]:
    """WeNet's sums over the training speech: mean = sum / n, istd = 1 / sqrt(sum of squares / n - mean^2)."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        total, squares = (torch.tensor(fields[key], dtype=torch.float64) for key in WENET_CMVN.values())
        count = float(fields["frame_num"])
        mean = total / count
        variance = (squares / count - mean.square()).clamp_min(SMALLEST_VARIANCE)
    except FileNotFoundError as error:
        raise MissingFile(f"There is nothing at {path}.", hint="Check --cmvn.") from error
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError, RuntimeError) as error:
        raise NotACheckpoint(
            f"{path} is not a global_cmvn of WeNet: {first_line(error)}",
            hint="It has mean_stat, var_stat and frame_num, in JSON.",
        ) from error
    return {MEAN: mean.float(), ISTD: variance.rsqrt().float()}
