"""A model that WeNet has trained, in edgefuse's terms: its train.yaml, its weights by their names, and its units.

All of it was read in WeNet's sources [R, wenet-e2e/wenet @0154699]. Taken are causal Conformers with a CTC head; the attention
decoder stays behind. What such an encoder answers is what WeNet's answers, to the rounding of floats, when `history` mean frames
stand before the utterance (3 of 10 ms where WeNet subsamples by 4): edgefuse's subsampling pads there, so that a chunk of
features is a chunk of frames. Beside WeNet's own code, in float64, logits of 2 differ by 5e-8, the rounding of what is moved into
the float32 weights [M]:

- WeNet pads the convolution module at its input, edgefuse behind GLU. So the depthwise convolution of WeNet sees
  c = GLU(b), b the bias of the pointwise one, before the first frame. Here c is subtracted behind GLU
  (`EncoderConfig.gate_shift`), zeros stand there, and the depthwise bias has c times the sum of the taps besides.
- WeNet flattens the subsampling's output channel by channel, edgefuse bin by bin.

In chunks after a limited past WeNet's positions go on counting over the utterance; edgefuse's count in the window, as those of
the exported artifacts do. Where WeNet attends to all of the past, both are the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from edgefuse.decode.tokens import BLANK
from edgefuse.errors import BadConfig, MissingFile, NotACheckpoint, ShapeMismatch
from edgefuse.foreign import first_line
from edgefuse.model import EncoderConfig
from edgefuse.model.config import FEATURE_HOP_MS

SUFFIXES = (".yaml", ".yml")
BLANKS = ("<blank>", BLANK)
FRAME_MS, SAMPLE_RATE = 25, 16_000
SUBSAMPLED_BY = MappingProxyType({"conv2d": 4, "conv2d4": 4, "conv2d6": 6, "conv2d8": 8})
SIZES = MappingProxyType(  # our name, and WeNet's default
    {
        "output_size": ("dimension", 256),
        "num_blocks": ("layers", 6),
        "attention_heads": ("heads", 4),
        "linear_units": ("feed_forward", 2048),
        "cnn_module_kernel": ("kernel", 15),
    }
)
POSITIONS = MappingProxyType({("rel_pos", "rel_selfattn"): "relative", ("no_pos", "selfattn"): "none"})
CONV_NORMS = MappingProxyType({"batch_norm": "batch", "layer_norm": "layer"})
ONLY = MappingProxyType(  # what edgefuse has only like this, which is WeNet's default, too
    {
        "normalize_before": True,
        "final_norm": True,
        "macaron_style": True,
        "use_cnn_module": True,
        "conv_inner_factor": 2,
        "activation_type": "swish",
        "positionwise_conv_kernel_size": 1,
        "layer_norm_type": "layer_norm",
        "mlp_type": "position_wise_feed_forward",
        "norm_eps": 1e-5,
        "conv_norm_eps": 1e-5,
        "n_kv_head": None,
        "head_dim": None,
    }
)
WITHOUT_EFFECT = frozenset(  # on what a trained encoder answers, or told by its weights
    {
        *("dropout_rate", "positional_dropout_rate", "attention_dropout_rate", "gradient_checkpointing", "use_sdpa"),
        *("static_chunk_size", "use_dynamic_chunk", "use_dynamic_left_chunk", "n_expert", "n_expert_activated"),
        *("query_bias", "key_bias", "value_bias", "conv_bias", "mlp_bias"),
    }
)
KNOWN = WITHOUT_EFFECT.union(
    SIZES, ONLY, ("input_layer", "causal", "cnn_module_norm", "pos_enc_layer_type", "selfattention_layer_type")
)
NAMES = MappingProxyType(  # of WeNet's modules, and ours
    {
        "encoder.global_cmvn": "frontend",
        "encoder.embed.conv.0": "subsampling.conv1.conv",
        "encoder.embed.conv.2": "subsampling.conv2.conv",
        "encoder.embed.conv.4": "subsampling.conv3.conv",
        "encoder.embed.out.0": "subsampling.linear.linear",
        "encoder.embed.linear": "subsampling.linear.linear",
        "encoder.after_norm": "norm",
        "ctc.ctc_lo": "ctc",
    }
)
BLOCK_NAMES = MappingProxyType(  # in encoder.encoders.N, and in blocks.N
    {
        "norm_ff_macaron": "macaron.norm",
        "feed_forward_macaron.w_1": "macaron.w1.linear",
        "feed_forward_macaron.w_2": "macaron.w2.linear",
        "norm_mha": "norm_attention",
        "self_attn.linear_q": "attention.query.linear",
        "self_attn.linear_k": "attention.key.linear",
        "self_attn.linear_v": "attention.value.linear",
        "self_attn.linear_out": "attention.output.linear",
        "self_attn.linear_pos": "attention.position.linear",
        "self_attn.pos_bias_u": "attention.u",
        "self_attn.pos_bias_v": "attention.v",
        "norm_conv": "convolution.norm",
        "conv_module.pointwise_conv1": "convolution.pointwise1.linear",
        "conv_module.depthwise_conv": "convolution.depthwise.conv",
        "conv_module.norm": "convolution.depthwise.norm",
        "conv_module.pointwise_conv2": "convolution.pointwise2.linear",
        "norm_ff": "feed_forward.norm",
        "feed_forward.w_1": "feed_forward.w1.linear",
        "feed_forward.w_2": "feed_forward.w2.linear",
        "norm_final": "norm_final",
    }
)
LEFT_OUT = re.compile(r"(?!encoder\.|ctc\.)|encoder\.embed\.pos_enc\.")  # a decoder, and a table that is computed


class _Loader(yaml.SafeLoader):
    """Plain values alone; what else a trainer has written becomes nothing."""


_Loader.add_multi_constructor("", lambda *_: None)


def read_wenet(config: Path, weights: Mapping[str, Tensor]) -> tuple[EncoderConfig, dict[str, Tensor]]:
    """The encoder that ``train.yaml`` describes, and the tensors of a checkpoint of WeNet as it wants them.

    Raises:
        MissingFile: ``train.yaml`` is not there.
        BadConfig: an encoder that edgefuse does not build, by the name of what it lacks.
        NotACheckpoint: weights without a CTC head.
        ShapeMismatch: tensors that cannot be those of such an encoder.
    """
    if weights.get("ctc.ctc_lo.weight", torch.zeros(())).dim() != 2:  # noqa: PLR2004 - a matrix
        raise NotACheckpoint("These are not weights of WeNet: they lack ctc.ctc_lo.weight.", hint="Name its final.pt.")
    encoder = _encoder_config(_read_yaml(config), vocabulary_size=len(weights["ctc.ctc_lo.weight"]), place=config)
    try:
        return encoder, _own_weights(encoder, weights)
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        raise ShapeMismatch(
            f"The weights contradict {config}: {first_line(error)}.",
            hint="Use the train.yaml that was written with these weights.",
        ) from error


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        fields = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 - a safe loader it is
    except FileNotFoundError as error:
        raise MissingFile(f"There is nothing at {path}.", hint="Check --config.") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        told = " ".join(str(error).split())
        raise BadConfig(f"{path} is not YAML: {told}.", hint="WeNet writes train.yaml beside its checkpoints.") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("encoder_conf"), dict):
        raise BadConfig(f"{path} has no encoder_conf.", hint="WeNet writes train.yaml beside its checkpoints.")
    return fields


def _encoder_config(fields: Mapping[str, Any], *, vocabulary_size: int, place: Path) -> EncoderConfig:
    told = fields["encoder_conf"]
    if problems := [*_problems(fields, told)]:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""  # noqa: PLR2004 - a sentence, not a list
        raise BadConfig(
            f"{place} describes what edgefuse does not build: {'; '.join(problems[:3])}{more}.",
            hint="It takes causal Conformers with relative positions, LayerNorms before their branches, Swish and GLU.",
        )
    sizes = {own: told.get(name, default) for name, (own, default) in SIZES.items()}
    positions = _positions(told)
    return EncoderConfig.from_json(
        {
            **sizes,
            "vocabulary_size": vocabulary_size,
            "subsampling": SUBSAMPLED_BY[told.get("input_layer", "conv2d")],
            "subsampling_channels": sizes["dimension"],
            "mel_bins": fields.get("input_dim", 80),
            "norm": "layer",
            "conv_norm": CONV_NORMS[told.get("cnn_module_norm", "batch_norm")],
            "activation": "swish",
            "positions": positions,
            "norm_residual": "block",
            "scale_embedding": positions == "relative",
            "dropout": told.get("dropout_rate", 0.1),
            "gate_shift": True,
        }
    )


def _problems(fields: Mapping[str, Any], told: Mapping[str, Any]) -> list[str]:
    """What edgefuse has otherwise, or not at all."""
    problems = [f"encoder is {fields['encoder']}"] if fields.get("encoder", "conformer") != "conformer" else []
    if told.get("causal", False) is not True:
        problems.append("causal is not true: its convolutions see the future, and no chunk could be heard before the next")
    problems += [f"{name} is {told[name]}" for name, only in ONLY.items() if told.get(name, only) != only]
    for name, known, default in (("input_layer", SUBSAMPLED_BY, "conv2d"), ("cnn_module_norm", CONV_NORMS, "batch_norm")):
        if told.get(name, default) not in [*known]:
            problems.append(f"{name} is {told[name]}")
    if _positions(told) is None:
        problems.append(f"pos_enc_layer_type is {told.get('pos_enc_layer_type')} with {told.get('selfattention_layer_type')}")
    problems += [f"encoder_conf has {name}, which edgefuse does not know" for name in sorted(map(str, told)) if name not in KNOWN]
    return problems + _feature_problems(fields)


def _feature_problems(fields: Mapping[str, Any]) -> list[str]:
    """What is computed otherwise from the speech, or read otherwise from the logits."""
    dataset = _section(fields, "dataset_conf")
    fbank = _section(dataset, "fbank_conf")
    wanted = (
        ("feats_type", dataset.get("feats_type", "fbank"), "fbank"),
        ("frame_shift", fbank.get("frame_shift", FEATURE_HOP_MS), FEATURE_HOP_MS),
        ("frame_length", fbank.get("frame_length", FRAME_MS), FRAME_MS),
        ("resample_rate", _section(dataset, "resample_conf").get("resample_rate", SAMPLE_RATE), SAMPLE_RATE),
        ("ctc_blank_id", _section(fields, "ctc_conf").get("ctc_blank_id", 0), 0),
    )
    return [f"{name} is {value}, not {only}" for name, value, only in wanted if value != only]


def _section(fields: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = fields.get(name)
    return section if isinstance(section, dict) else {}


def _positions(told: Mapping[str, Any]) -> str | None:
    both = (told.get("pos_enc_layer_type", "rel_pos"), told.get("selfattention_layer_type", "rel_selfattn"))
    return next((ours for theirs, ours in POSITIONS.items() if theirs == both), None)


def _own_weights(config: EncoderConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Under the names of `edgefuse.model.Encoder`; a bias that was trained without is zero. What is unknown keeps its name."""
    own: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if not LEFT_OUT.match(name):
            own[_own_name(name)] = tensor
    for name in [name for name in own if name.endswith((".linear.weight", ".conv.weight"))]:
        if ".position." not in name:
            own.setdefault(name.removesuffix("weight") + "bias", torch.zeros(len(own[name]), dtype=own[name].dtype))
    for name, tensor in own.items():
        if name.endswith(("pointwise1.linear.weight", "pointwise2.linear.weight")) and tensor.dim() == 3:  # noqa: PLR2004 - a conv1d of one tap
            own[name] = tensor.squeeze(-1)
        elif name.endswith("num_batches_tracked"):
            own[name] = tensor.long()  # WeNet averages it, as a float
    flat = "subsampling.linear.linear.weight"
    if flat in own and own[flat].shape[-1] == config.subsampled_bins * config.subsampling_channels:
        by_channel = own[flat].reshape(-1, config.subsampling_channels, config.subsampled_bins)
        own[flat] = by_channel.transpose(1, 2).flatten(1)
    for block in range(config.layers):
        _shift_gate(own, f"blocks.{block}.convolution")
    return own


def _own_name(name: str) -> str:
    """Of a tensor; one of another architecture keeps its name, and is found when it is checked."""
    block = re.match(r"encoder\.encoders\.(\d+)\.", name)
    names, place = (BLOCK_NAMES, f"blocks.{block[1]}.") if block else (NAMES, "")
    told = name[block.end() :] if block else name
    module, _, leaf = told.rpartition(".")
    if told in names:
        return f"{place}{names[told]}"
    return f"{place}{names[module]}.{leaf}" if module in names else name


def _shift_gate(own: dict[str, Tensor], module: str) -> None:
    """c = GLU(b); b_depthwise + c times the sum of the taps. What is missing or of another shape is found when it is checked."""
    bias, taps, shifted = (
        own.get(f"{module}.{name}") for name in ("pointwise1.linear.bias", "depthwise.conv.weight", "depthwise.conv.bias")
    )
    if bias is None or taps is None or shifted is None or not len(bias) == 2 * len(taps) == 2 * len(shifted):
        return
    before = F.glu(bias.double(), dim=0)
    own[f"{module}.shift"] = before.to(bias.dtype)
    own[f"{module}.depthwise.conv.bias"] = (shifted.double() + before * taps.double().sum((1, 2))).to(shifted.dtype)


def read_units(path: Path) -> tuple[str, ...]:
    """The symbols in the order of their ids, the first one the blank: a line of ``units.txt`` is a symbol and its id.

    Raises:
        MissingFile: it is not there.
        BadConfig: it is something else.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise MissingFile(f"There is nothing at {path}.", hint="Check --tokens.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BadConfig(f"{path} cannot be read as text in UTF-8.", hint="It is WeNet's units.txt.") from error
    units: dict[int, str] = {}
    for number, line in enumerate(lines, start=1):
        fields = line.split()
        if len(fields) != 2 or not fields[1].isdecimal():  # noqa: PLR2004 - a symbol and its id
            raise BadConfig(
                f"Line {number} of {path} is not a symbol and its id: {line[:40]!r}.",
                hint="It is WeNet's units.txt: '<blank> 0' first.",
            )
        units.setdefault(int(fields[1]), fields[0])
    symbols = [symbol for _, symbol in sorted(units.items())]
    if [*sorted(units)] != [*range(len(units))] or not symbols or symbols[0] not in BLANKS:
        raise BadConfig(
            f"The ids of {path} do not count from the blank, 0, up.", hint="It is WeNet's units.txt: '<blank> 0' first."
        )
    return (BLANK, *symbols[1:])
