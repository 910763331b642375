"""A model that WeNet trained becomes a checkpoint that answers as WeNet does."""

import math

import pytest
import torch
import torch.nn.functional as F
import yaml

from edgefuse import checkpoint as checkpoints
from edgefuse import cli
from edgefuse.convert import convert
from edgefuse.errors import BadConfig, MissingFile, NotACheckpoint, ShapeMismatch
from edgefuse.model import Context

UNITS, HEADS, TAPS = 11, 2, 4
CONF = {
    "output_size": 16,
    "attention_heads": HEADS,
    "linear_units": 24,
    "num_blocks": 2,
    "cnn_module_kernel": TAPS,
    "causal": True,
    "cnn_module_norm": "layer_norm",
    "use_dynamic_chunk": True,
    "dropout_rate": 0.1,
}
CONVOLUTIONS = {"conv2d": ((3, 2), (3, 2)), "conv2d6": ((3, 2), (5, 3)), "conv2d8": ((3, 2), (3, 2), (3, 2))}
WITHOUT_POSITIONS = {"pos_enc_layer_type": "no_pos", "selfattention_layer_type": "selfattn"}


class Weights(dict):
    """A state_dict by WeNet's names, lived in."""

    def __init__(self, conf, *, biases=True):
        super().__init__()
        torch.manual_seed(1)
        self.conf, self.biases, self.width = conf, biases, conf["output_size"]
        self.embed(conf.get("input_layer", "conv2d"))
        for number in range(conf["num_blocks"]):
            self.block(f"encoder.encoders.{number}")
        self.norm("encoder.after_norm")
        self.linear("ctc.ctc_lo", UNITS, self.width, bias=True)
        self.linear("decoder.embed.0", UNITS, self.width, bias=False)
        self["encoder.global_cmvn.mean"], self["encoder.global_cmvn.istd"] = torch.randn(80) + 8, torch.rand(80) + 0.2

    def norm(self, name):
        self[f"{name}.weight"], self[f"{name}.bias"] = 1 + 0.3 * torch.randn(self.width), 0.3 * torch.randn(self.width)

    def linear(self, name, out, *inputs, bias=None):
        self[f"{name}.weight"] = torch.randn(out, *inputs) / math.sqrt(math.prod(inputs))
        if self.biases if bias is None else bias:
            self[f"{name}.bias"] = 0.5 * torch.randn(out)

    def embed(self, layer):
        bins = 80
        for number, (kernel, stride) in enumerate(CONVOLUTIONS[layer]):
            self.linear(f"encoder.embed.conv.{2 * number}", self.width, self.width if number else 1, kernel, kernel, bias=True)
            bins = (bins - kernel) // stride + 1
        self.linear(f"encoder.embed.{'out.0' if layer == 'conv2d' else 'linear'}", self.width, self.width * bins, bias=True)
        self["encoder.embed.pos_enc.pe"] = torch.zeros(1, 5000, self.width)

    def block(self, at):
        d, inner = self.width, self.conf["linear_units"]
        for name in ("norm_ff_macaron", "norm_mha", "norm_conv", "norm_ff", "norm_final", "conv_module.norm"):
            self.norm(f"{at}.{name}")
        for name in ("feed_forward_macaron", "feed_forward"):
            self.linear(f"{at}.{name}.w_1", inner, d)
            self.linear(f"{at}.{name}.w_2", d, inner)
        for name in ("q", "k", "v", "out"):
            self.linear(f"{at}.self_attn.linear_{name}", d, d)
        if "selfattention_layer_type" not in self.conf:
            self.linear(f"{at}.self_attn.linear_pos", d, d, bias=False)
            for name in "uv":
                self[f"{at}.self_attn.pos_bias_{name}"] = torch.randn(HEADS, d // HEADS)
        self.linear(f"{at}.conv_module.pointwise_conv1", 2 * d, d, 1)
        self.linear(f"{at}.conv_module.depthwise_conv", d, 1, TAPS)
        self.linear(f"{at}.conv_module.pointwise_conv2", d, d, 1)
        if self.conf["cnn_module_norm"] == "batch_norm":
            self[f"{at}.conv_module.norm.running_mean"] = torch.randn(d)
            self[f"{at}.conv_module.norm.running_var"] = 0.5 + torch.rand(d)
            self[f"{at}.conv_module.norm.num_batches_tracked"] = torch.tensor(3.0)  # as WeNet's average has it


class WeNet:
    """What WeNet computes of one utterance, in float64: encoder.py, encoder_layer.py, attention.py and convolution.py [R]."""

    def __init__(self, conf, weights):
        self.conf, self.w, self.width = conf, {name: tensor.double() for name, tensor in weights.items()}, conf["output_size"]
        self.relative = "selfattention_layer_type" not in conf

    def logits(self, mels, chunk=None):
        """(T, 80) to (T', units)."""
        x = self.embed(((mels - self.w["encoder.global_cmvn.mean"]) * self.w["encoder.global_cmvn.istd"])[None])
        self.table = self.positions(len(x))
        ends = torch.full((len(x),), len(x)) if chunk is None else (torch.arange(len(x)) // chunk + 1) * chunk
        self.seen = torch.arange(len(x)) < ends[:, None]
        for number in range(self.conf["num_blocks"]):
            x = self.block(f"encoder.encoders.{number}", x)
        return self.affine("ctc.ctc_lo", self.norm("encoder.after_norm", x))

    def embed(self, x):
        layer = self.conf.get("input_layer", "conv2d")
        for number, (_, stride) in enumerate(CONVOLUTIONS[layer]):
            at = f"encoder.embed.conv.{2 * number}"
            x = F.relu(F.conv2d(x, self.w[f"{at}.weight"], self.w[f"{at}.bias"], stride=stride))
        x = self.affine(f"encoder.embed.{'out.0' if layer == 'conv2d' else 'linear'}", x.transpose(0, 1).flatten(1))
        return x * math.sqrt(self.width) if self.relative else x

    def positions(self, frames):
        rate = torch.exp(torch.arange(0, self.width, 2).double() * -(math.log(10000.0) / self.width))
        angle = torch.arange(frames).double()[:, None] * rate
        return torch.stack((torch.sin(angle), torch.cos(angle)), dim=-1).flatten(1)

    def block(self, at, x):
        x = x + 0.5 * self.feed_forward(f"{at}.feed_forward_macaron", self.norm(f"{at}.norm_ff_macaron", x))
        x = x + self.attention(f"{at}.self_attn", self.norm(f"{at}.norm_mha", x))
        x = x + self.convolution(f"{at}.conv_module", self.norm(f"{at}.norm_conv", x))
        x = x + 0.5 * self.feed_forward(f"{at}.feed_forward", self.norm(f"{at}.norm_ff", x))
        return self.norm(f"{at}.norm_final", x)

    def affine(self, name, x):
        return F.linear(x, self.w[f"{name}.weight"].flatten(1), self.w.get(f"{name}.bias"))

    def norm(self, name, x):
        return F.layer_norm(x, (self.width,), self.w[f"{name}.weight"], self.w[f"{name}.bias"], 1e-5)

    def feed_forward(self, name, x):
        return self.affine(f"{name}.w_2", F.silu(self.affine(f"{name}.w_1", x)))

    def attention(self, name, x):
        q, k, v = (self.split(self.affine(f"{name}.linear_{each}", x)) for each in "qkv")
        scores = q @ k.mT
        if self.relative:
            p = self.split(self.affine(f"{name}.linear_pos", self.table))
            u, bias = (self.w[f"{name}.pos_bias_{each}"][:, None] for each in "uv")
            scores = (q + u) @ k.mT + (q + bias) @ p.mT
        scores = (scores / math.sqrt(self.width // HEADS)).masked_fill(~self.seen, -math.inf)
        return self.affine(f"{name}.linear_out", (scores.softmax(-1) @ v).transpose(0, 1).flatten(1))

    def split(self, x):
        return x.unflatten(-1, (HEADS, -1)).transpose(0, 1)

    def convolution(self, name, x):
        x = F.pad(x.T, (TAPS - 1, 0)).T  # in front of the pointwise convolution
        x = F.glu(self.affine(f"{name}.pointwise_conv1", x), dim=-1)
        taps, bias = self.w[f"{name}.depthwise_conv.weight"], self.w.get(f"{name}.depthwise_conv.bias")
        x = F.conv1d(x.T, taps, bias, groups=self.width)
        if self.conf["cnn_module_norm"] == "batch_norm":
            state = (self.w[f"{name}.norm.{each}"] for each in ("running_mean", "running_var", "weight", "bias"))
            x = F.batch_norm(x[None], *state)[0].T
        else:
            x = self.norm(f"{name}.norm", x.T)
        return self.affine(f"{name}.pointwise_conv2", F.silu(x))


def left_behind(folder, conf, weights, **more):
    """What a training of WeNet leaves: final.pt, train.yaml and units.txt."""
    folder.mkdir(exist_ok=True)
    torch.save(dict(weights), folder / "final.pt")
    fields = {"encoder": "conformer", "encoder_conf": conf, "input_dim": 80, "ctc_conf": {"ctc_blank_id": 0}, **more}
    (folder / "train.yaml").write_text(yaml.safe_dump(fields))
    symbols = ["<blank>", "<unk>", *(chr(0x4E00 + number) for number in range(UNITS - 3)), "<sos/eos>"]
    (folder / "units.txt").write_text("".join(f"{symbol} {number}\n" for number, symbol in enumerate(symbols)))
    return folder


def converted(folder, **options):
    return convert(folder / "final.pt", folder / "train.yaml", folder / "units.txt", folder / "out", **options)


@pytest.mark.parametrize("chunk", [None, 3], ids=["whole", "chunks"])
@pytest.mark.parametrize(
    ("changes", "biases"),
    [
        ({}, True),
        ({}, False),
        ({"cnn_module_norm": "batch_norm"}, True),
        ({"input_layer": "conv2d6"}, True),
        ({"input_layer": "conv2d8"}, True),
        (WITHOUT_POSITIONS, True),
    ],
    ids=["as it is", "no biases", "batch norm", "by 6", "by 8", "no positions"],
)
def test_what_wenet_trained_answers_as_it_does_there(changes, biases, chunk, tmp_path):
    conf = CONF | changes
    weights = Weights(conf, biases=biases)
    made = converted(left_behind(tmp_path, conf, weights))
    encoder, mels = checkpoints.encoder_of(made, torch.float64), torch.randn(1, 150, 80).double() * 2 + 8
    features, lengths = (mels - made.frontend_mean.double()) * made.frontend_istd.double(), torch.tensor([150])
    context = Context() if chunk is None else Context(chunk)
    logits, counts = encoder(features, lengths, context)
    before = made.frontend_mean.double().expand(encoder.subsampling.history, 80)  # what stands there once it is normalized
    expected = WeNet(conf, weights).logits(torch.cat((before, mels[0])), chunk)
    assert counts.item() == len(expected) == 150 // encoder.config.reduction
    torch.testing.assert_close(logits[0], expected, rtol=0, atol=2e-6)  # a bias is moved, in float32


def test_what_wenet_trained_has_its_units_and_its_statistics(tmp_path):
    weights = Weights(CONF)
    made = converted(left_behind(tmp_path, CONF, weights))
    assert made.tokens[:3] == ("<blk>", "<unk>", "一")
    assert torch.equal(made.frontend_mean, weights["encoder.global_cmvn.mean"])
    assert checkpoints.read(tmp_path / "out").digest == made.digest


@pytest.mark.parametrize(
    ("changes", "more", "told"),
    [
        ({"causal": False}, {}, "causal is not true"),
        ({"activation_type": "relu"}, {}, "activation_type is relu"),
        ({"pos_enc_layer_type": "rope_pos"}, {}, "pos_enc_layer_type is rope_pos"),
        ({"input_layer": "dwconv2d4"}, {}, "input_layer is dwconv2d4"),
        ({"cnn_module_norm": "rms_norm"}, {}, "cnn_module_norm is rms_norm"),
        ({"stride_layer_idx": 3}, {}, "stride_layer_idx, which edgefuse does not know"),
        ({}, {"encoder": "branchformer"}, "encoder is branchformer"),
        ({}, {"dataset_conf": {"resample_conf": {"resample_rate": 8000}}}, "resample_rate is 8000, not 16000"),
        ({}, {"dataset_conf": {"fbank_conf": {"frame_shift": 20}}}, "frame_shift is 20, not 10"),
        ({}, {"ctc_conf": {"ctc_blank_id": 7}}, "ctc_blank_id is 7, not 0"),
        ({"output_size": "wide"}, {}, "dimension is 'wide'"),
        ({"input_layer": ["conv2d"]}, {}, "input_layer is"),
        ({"pos_enc_layer_type": {}}, {"dataset_conf": 3}, "pos_enc_layer_type is"),
    ],
)
def test_what_edgefuse_does_not_build_is_refused_by_name(changes, more, told, tmp_path):
    folder = left_behind(tmp_path, CONF | changes, Weights(CONF), **more)
    with pytest.raises(BadConfig, match=told):
        converted(folder)
    assert not (folder / "out").exists()


def test_weights_that_contradict_train_yaml_are_refused(tmp_path):
    weights = Weights(CONF)
    with pytest.raises(ShapeMismatch, match=r"blocks\.2\.\S+ is missing"):
        converted(left_behind(tmp_path, CONF | {"num_blocks": 3}, weights))
    with pytest.raises(ShapeMismatch, match=r"encoder\.embed\.extra is not in this architecture"):
        converted(left_behind(tmp_path, CONF, {**weights, "encoder.embed.extra": torch.zeros(1)}))
    with pytest.raises(NotACheckpoint, match="ctc_lo"):
        converted(left_behind(tmp_path, CONF, {"decoder.embed.0.weight": torch.zeros(1)}))


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (1, 2, 3, 4), (0,)], ids=str)
def test_a_tensor_of_another_shape_is_refused_in_words(shape, tmp_path):
    weights = Weights(CONF | {"num_blocks": 1})
    for name in weights:
        if not name.startswith(("decoder.", "encoder.embed.pos_enc.")):
            with pytest.raises((ShapeMismatch, NotACheckpoint, BadConfig)):
                converted(left_behind(tmp_path, CONF | {"num_blocks": 1}, {**weights, name: torch.zeros(shape)}))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("<blank> 0\n一 2\n", "do not count from the blank"),
        ("一 0\n<blank> 1\n", "do not count from the blank"),
        ("<blk>\n一\n", "Line 1"),
        ("<blank> zero\n", "Line 1"),
        ("", "do not count from the blank"),
    ],
)
def test_units_that_are_none_are_refused(content, told, tmp_path):
    folder = left_behind(tmp_path, CONF, Weights(CONF))
    (folder / "units.txt").write_text(content)
    with pytest.raises(BadConfig, match=told):
        converted(folder)


def test_a_train_yaml_that_is_none_is_refused(tmp_path):
    folder = left_behind(tmp_path, CONF, Weights(CONF))
    for content, told in (
        ("a: [", "is not YAML"),
        ("- 1\n", "has no encoder_conf"),
        ("encoder_conf: 3\n", "has no encoder_conf"),
    ):
        (folder / "train.yaml").write_text(content)
        with pytest.raises(BadConfig, match=told):
            converted(folder)
    (folder / "train.yaml").unlink()
    with pytest.raises(MissingFile):
        converted(folder)


def test_a_train_yaml_runs_nothing(tmp_path):
    folder = left_behind(tmp_path, CONF, Weights(CONF))
    trap = folder / "trap"
    with (folder / "train.yaml").open("a") as stream:
        stream.write(f"optim: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{trap}']]\n")
    assert converted(folder)
    assert not trap.exists()


def test_the_command_takes_what_wenet_left(tmp_path, capsys):
    folder = left_behind(tmp_path, CONF, Weights(CONF))
    files = [str(folder / "final.pt"), "--config", str(folder / "train.yaml"), "--tokens", str(folder / "units.txt")]
    assert cli.run(["convert", *files, "-o", str(folder / "out")]) == 0
    assert "LayerNorm Conformer" in capsys.readouterr().out
