"""Read, check, digest and write a checkpoint: a folder of model.safetensors, config.json and tokens.txt; never a pickle."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from edgefuse.decode.tokens import Tokens
from edgefuse.errors import (
    BadConfig,
    BadStatistics,
    CheckpointError,
    DamagedCheckpoint,
    MissingFile,
    NotACheckpoint,
    NotFinite,
    PickledCheckpoint,
    ShapeMismatch,
)
from edgefuse.model import Encoder, EncoderConfig
from edgefuse.model.normalization import COUNTERS
from edgefuse.values import Checkpoint

WEIGHTS, CONFIG, TOKENS = "model.safetensors", "config.json", "tokens.txt"
FILES = (WEIGHTS, CONFIG, TOKENS)
MEAN, ISTD = "frontend.mean", "frontend.istd"
PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")
PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # PyTorch's archive, and plain pickles


def read(folder: Path) -> Checkpoint:
    """Read and check a checkpoint; every way in which it can be wrong is its own `CheckpointError`."""
    with _reading(folder):
        _must_be_checkpoint(folder)
        config = read_config(folder / CONFIG)
        tokens = read_tokens(folder / TOKENS)
        tensors, recorded = _read_tensors(folder / WEIGHTS)
    with _in(folder):
        checkpoint = assemble(config, tensors, tokens)
    if recorded is not None and recorded != checkpoint.digest:
        raise DamagedCheckpoint(
            f"{folder / WEIGHTS}, {CONFIG} and {TOKENS} do not match the digest that was written with them.",
            hint="Copy the checkpoint again from where it came.",
        )
    return checkpoint


def read_config(path: Path) -> EncoderConfig:
    """Read config.json; what is wrong with it is a `BadConfig`."""
    with _reading(path):
        fields = _read_json(path)
    with _in(path):
        return EncoderConfig.from_json(fields)


def read_tokens(path: Path) -> tuple[str, ...]:
    """Read tokens.txt: one token a line, the blank first."""
    with _reading(path):
        return tuple(_read_text(path).splitlines())


def write(folder: Path, checkpoint: Checkpoint) -> None:
    """Write the three files into a folder, which is made in one that exists; the digest travels inside the safetensors."""
    folder.mkdir(exist_ok=True)
    tensors = {**checkpoint.weights, MEAN: checkpoint.frontend_mean, ISTD: checkpoint.frontend_istd}
    contiguous = {name: tensor.detach().contiguous() for name, tensor in sorted(tensors.items())}
    (folder / WEIGHTS).write_bytes(save(contiguous, metadata={"digest": checkpoint.digest}))
    (folder / CONFIG).write_text(json.dumps(checkpoint.config.to_json(), indent=2) + "\n", encoding="utf-8")
    (folder / TOKENS).write_text("".join(f"{token}\n" for token in checkpoint.tokens), encoding="utf-8")


def of_encoder(encoder: Encoder, mean: Tensor, istd: Tensor, tokens: Sequence[str]) -> Checkpoint:
    """The checkpoint of an encoder in memory; mean and istd are (mel_bins,)."""
    weights = {name: tensor.detach().clone() for name, tensor in encoder.state_dict().items()}
    return assemble(encoder.config, {**weights, MEAN: mean, ISTD: istd}, tuple(tokens))


def encoder_of(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Encoder:
    """The encoder that a checkpoint describes, in evaluation mode."""
    encoder = Encoder(checkpoint.config).to(dtype)
    encoder.load_state_dict(dict(checkpoint.weights))
    return encoder.eval()


def assemble(config: EncoderConfig, tensors: Mapping[str, Tensor], tokens: tuple[str, ...]) -> Checkpoint:
    """Check that tensors and tokens are what the config asks for, and make them one."""
    _check_shapes(config, tensors)
    _check_numbers(tensors)
    _check_tokens(config, tokens)
    weights = {name: tensor for name, tensor in tensors.items() if name not in (MEAN, ISTD)}
    return Checkpoint(config, weights, tensors[MEAN], tensors[ISTD], tokens, _digest(config, tensors, tokens))


def _must_be_checkpoint(folder: Path) -> None:
    if not folder.exists():
        raise MissingFile(
            f"There is nothing at {folder}.",
            hint="A checkpoint is a folder; see README.md, 'A first export of your own checkpoint'.",
        )
    if folder.is_file():
        if folder.suffix in PICKLES or starts_as_pickle(folder):
            _refuse_pickle(folder)
        raise NotACheckpoint(f"{folder} is a file, not a checkpoint.", hint=f"A checkpoint is a folder with {', '.join(FILES)}.")
    lacking = [name for name in FILES if not (folder / name).is_file()]
    pickles = sorted(path for path in folder.glob("*") if path.suffix in PICKLES)
    if WEIGHTS in lacking and pickles:
        _refuse_pickle(pickles[0])
    if lacking:
        raise NotACheckpoint(
            f"{folder} is not a checkpoint: it lacks {', '.join(lacking)}.",
            hint=f"A checkpoint is a folder with {', '.join(FILES)}.",
        )
    if starts_as_pickle(folder / WEIGHTS):
        _refuse_pickle(folder / WEIGHTS)


def _refuse_pickle(path: Path) -> NoReturn:
    raise PickledCheckpoint(
        f"{path} is a pickle, which could run code when it is read.",
        hint=f"Convert it safely with: edgefuse convert {path} --config config.json --tokens tokens.txt -o DIR",
    )


def starts_as_pickle(path: Path) -> bool:
    """Whether a file begins as PyTorch's archives and pickles do."""
    with path.open("rb") as stream:
        return stream.read(4).startswith(PICKLE_STARTS)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals to read into a sentence."""
    try:
        yield
    except FileNotFoundError as error:
        raise MissingFile(f"There is nothing at {error.filename or path}.", hint="Check the path.") from error
    except OSError as error:
        raise NotACheckpoint(
            f"{error.filename or path} cannot be read: {error.strerror or error}.", hint="Check the path and its permissions."
        ) from error


@contextmanager
def _in(place: Path) -> Iterator[None]:
    """Say where it is that something is wrong."""
    try:
        yield
    except CheckpointError as error:
        raise type(error)(f"{place}: {error.sentence}", hint=error.hint) from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DamagedCheckpoint(f"{path} is not UTF-8 text.", hint="Copy the checkpoint again.") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path), object_pairs_hook=_unique, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:  # a JSONDecodeError, an integer of thousands of digits, a key twice
        raise BadConfig(f"{path} is not JSON: {error}.", hint="Copy the checkpoint again, or mend the file.") from error
    if not isinstance(value, dict):
        raise BadConfig(f"{path} holds a {type(value).__name__}, not an object with keys.", hint="Copy the checkpoint again.")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, each key once: the last of two would win in silence."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return fields


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number of JSON")


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], str | None]:
    content = path.read_bytes()
    try:
        tensors = dict(sorted(load(content).items()))  # it gives them in any order
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        recorded = (header.get("__metadata__") or {}).get("digest")
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise DamagedCheckpoint(f"{path} is truncated or damaged: {error}.", hint="Copy the checkpoint again.") from error
    return tensors, recorded


def _check_shapes(config: EncoderConfig, tensors: Mapping[str, Tensor]) -> None:
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in Encoder(config).state_dict().items()}
    wanted |= {MEAN: (config.mel_bins,), ISTD: (config.mel_bins,)}
    problems = [f"{name} is missing" for name in wanted if name not in tensors]
    problems += [f"{name} is not in this architecture" for name in tensors if name not in wanted]
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)}, not {shape}"
        for name, shape in wanted.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""  # noqa: PLR2004 - a sentence, not a list
        raise ShapeMismatch(
            f"The weights contradict the config: {'; '.join(problems[:3])}{more}.",
            hint="Use the config.json that was written with these weights.",
        )


def _check_numbers(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        counter = name.endswith(COUNTERS)
        if tensor.is_floating_point() == counter or tensor.dtype.itemsize < 2:  # noqa: PLR2004 - bytes
            raise ShapeMismatch(f"{name} is of type {tensor.dtype}.", hint="Weights are floating-point; see `edgefuse convert`.")
        if not counter and not torch.isfinite(tensor.float()).all():  # as a float32 it must be finite too
            bad = int((~torch.isfinite(tensor.float())).sum())
            raise NotFinite(
                f"{name} has values that are NaN, infinite, or too large for float32: {bad}.",
                hint="Go back to an earlier checkpoint.",
            )
        if name == ISTD and not (tensor > 0).all():
            raise BadStatistics(
                f"{name} has bins with a deviation that is not positive: {int((tensor <= 0).sum())}.",
                hint="It is 1 / standard deviation of each log-mel bin over the training speech.",
            )
        if name.endswith("running_var") and not (tensor > 0).all():
            raise BadStatistics(
                f"{name} has channels with a variance that is not positive: {int((tensor <= 0).sum())}.",
                hint="Go back to an earlier checkpoint: no norm can be computed with them, and nothing can be folded.",
            )


def _check_tokens(config: EncoderConfig, tokens: tuple[str, ...]) -> None:
    if len(tokens) != config.vocabulary_size:
        raise BadConfig(
            f"{TOKENS} has {len(tokens)} tokens; the config's vocabulary_size is {config.vocabulary_size}.",
            hint="Use the tokens.txt that the model was trained with, one token a line, the blank first.",
        )
    Tokens(tokens)  # the blank first, no token twice


def _digest(config: EncoderConfig, tensors: Mapping[str, Tensor], tokens: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    digest.update(json.dumps([config.to_json(), tokens], sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
