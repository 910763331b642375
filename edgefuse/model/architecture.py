"""An architecture in a TOML file: what a preset's encoder has otherwise, as fields of `EncoderConfig`.

norm = "batch"
subsampling = 8

[[stages]]
layers = 4
attention = "none"
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from edgefuse.errors import BadConfig, MissingFile
from edgefuse.model.config import AS_TRAINED, EncoderConfig, Norm, preset

NOT_ITS_OWN: Mapping[str, str] = MappingProxyType(
    {"vocabulary_size": "is learnt from the corpus; say how large it may be with --vocabulary", "folded": "is what a fold makes"}
)  # fields of a config that no architecture decides


def read_architecture(path: Path, size: str) -> dict[str, Any]:
    """The fields that a file replaces in the preset of a size, once it is sure that they make an encoder.

    Raises:
        MissingFile: there is no such file.
        BadConfig: it is no TOML, or says what no encoder can be; the sentence names the file.
    """
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MissingFile(f"There is nothing at {path}.", hint="Check the path.") from error
    except (OSError, ValueError) as error:  # a TOMLDecodeError, or what is no UTF-8
        raise BadConfig(
            f"{path} is not TOML: {error}.", hint="An architecture is a file with lines such as: subsampling = 8"
        ) from error
    try:
        encoder_config(size, "batch", 2, fields)
    except BadConfig as error:
        raise BadConfig(f"{path}: {error.sentence}", hint=error.hint) from error
    return fields


def encoder_config(size: str, norm: Norm, vocabulary_size: int, architecture: Mapping[str, Any]) -> EncoderConfig:
    """The preset of a size with that norm, or the architecture's own, and with everything else that the architecture says.

    Raises:
        BadConfig: there is no such preset, or no such encoder.
    """
    for name in sorted(NOT_ITS_OWN.keys() & architecture.keys()):
        raise BadConfig(f"An architecture does not say {name}: it {NOT_ITS_OWN[name]}.", hint=f"Leave {name} out.")
    twin = preset(size, norm=architecture.get("norm", norm), vocabulary_size=vocabulary_size)
    if not architecture:
        return twin
    try:
        return EncoderConfig.from_json({**twin.to_json(), **architecture})
    except BadConfig as error:
        raise BadConfig(
            error.sentence,
            hint=f"Change the architecture, or name another preset than {size}." if error.hint == AS_TRAINED else error.hint,
        ) from error


def norm_of(architecture: Mapping[str, Any], told: Norm | None) -> Norm | None:
    """The one norm that an architecture and a command line say; None where neither does."""
    own: Norm | None = architecture.get("norm")
    if own is not None and told is not None and own != told:
        raise BadConfig(f"The architecture's norm is {own!r}, and --norm is {told!r}.", hint="Leave --norm away.")
    return own or told
