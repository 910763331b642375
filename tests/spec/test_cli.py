"""The commands on their good days: each prints one thing, and the same as JSON."""

import json
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from edgefuse import cli
from edgefuse.errors import UsageError
from edgefuse.lower import Chunks, DeploymentGraph
from edgefuse.model import Encoder
from edgefuse.model.cost import cost
from edgefuse.packages import Need, needs, repair
from edgefuse.pipeline import export
from tests.conftest import a_config
from tests.spec.conftest import FUSIONFORMER


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert cli.run([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def parsed(capsys: pytest.CaptureFixture[str], *arguments: object):
    return json.loads(printed(capsys, *arguments, "--json"))


def test_inspect_shows_every_site_of_the_plan_and_why_some_stay(capsys, whole_checkpoint, tmp_path):
    from edgefuse import store
    from tests.conftest import a_checkpoint

    told = parsed(capsys, "inspect", whole_checkpoint)
    table = printed(capsys, "inspect", whole_checkpoint)
    assert told["model"] == "FusionFormer"
    assert all(site["folded"] for site in told["plan"])
    assert all(site["site"] in table for site in told["plan"])
    store.write_checkpoint(tmp_path / "conformer", a_checkpoint("layer", layers=1))
    stays = [site for site in parsed(capsys, "inspect", tmp_path / "conformer")["plan"] if not site["folded"]]
    assert stays
    assert all("LayerNorm" in site["reason"] for site in stays)


def test_inspect_counts_the_trained_parameters(capsys, whole_checkpoint):
    from edgefuse import checkpoint as checkpoints

    encoder = checkpoints.encoder_of(checkpoints.read(whole_checkpoint))
    assert parsed(capsys, "inspect", whole_checkpoint)["parameters"] == sum(p.numel() for p in encoder.parameters())


@pytest.mark.parametrize(
    "changes",
    [{"folded": True}, {"folded": True, "conv_expansion": 2}, {"folded": True, "conv_paths": 2}, {"norm": "layer"}],
    ids=str,
)
def test_the_cost_is_what_pytorch_counts_in_the_deployment_graph(changes):
    frames, config = 100, a_config(**{"positions": "none", **changes})
    graph = DeploymentGraph(Encoder(config).eval(), frames)
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        graph(torch.zeros(1, 4 * frames, 80), torch.tensor([float(frames)]))
    macs = counted.get_total_flops() // 2
    ours = cost(config).macs_per_second(frames / 25) * frames // 25
    first_row = 39 * config.subsampling_channels * 9  # conv1 has one frame more than two for each of conv2's
    assert macs - ours == first_row


def test_fold_prints_its_error_and_writes_a_checkpoint_that_needs_no_fold(capsys, whole_checkpoint, tmp_path):
    line = printed(capsys, "fold", whole_checkpoint, "-o", tmp_path / "folded")
    assert "relative error in float64" in line
    assert "0 stay" in line
    assert parsed(capsys, "inspect", tmp_path / "folded")["config"]["folded"] is True


def test_fold_estimates_the_statistics_again_when_it_is_asked_to(capsys, whole_checkpoint, speech, tmp_path):
    printed(capsys, "fold", whole_checkpoint, "-o", tmp_path / "stale")
    printed(capsys, "fold", whole_checkpoint, "-o", tmp_path / "fresh", "--reestimate", speech)
    stale, fresh = (json.loads((tmp_path / name / "plan.json").read_text()) for name in ("stale", "fresh"))
    assert stale["plan"] == fresh["plan"]
    assert stale["folded"] != fresh["folded"]
    assert fresh["relative_error_float64"]["end_to_end"] < 1e-10


def test_export_prints_a_row_for_each_artifact_and_tells_its_steps_elsewhere(capsys, whole_checkpoint, speech, tmp_path):
    output = tmp_path / "out"
    command = ["export", str(whole_checkpoint), "-t", "reference", "--seconds", "2", "--speech", str(speech), "-o", str(output)]
    assert cli.run(command) == 0
    out, err = capsys.readouterr()
    assert "reference   offline   run   fp32" in out
    assert out.rstrip().endswith(f"Bundle: {output}")
    assert "Exporting for reference" in err
    assert "Exporting" not in out
    told = parsed(capsys, *command, "--overwrite")
    assert told["passed"] is True
    assert told["artifacts"][0]["modes"]["offline"]["p50_ms"] > 0


def test_export_says_what_a_stream_takes_after_rounding_to_whole_frames(capsys, whole_checkpoint, speech, tmp_path):
    wanted = ("--chunk-ms", "150", "--left-context-ms", "310")
    table = printed(capsys, "export", whole_checkpoint, "-t", "reference", *wanted, "--speech", speech, "-o", tmp_path / "out")
    assert "stream_160ms: chunks of 160 ms, after up to 320 ms of past, without look-ahead; its caches go in and out" in table
    later = (*wanted, "--look-ahead-ms", "70")
    table = printed(capsys, "export", whole_checkpoint, "-t", "reference", *later, "--speech", speech, "-o", tmp_path / "later")
    assert "stream_160ms_ahead_80ms: chunks of 160 ms, after up to 320 ms of past, with 80 ms of look-ahead; its caches" in table


def test_soak_prints_what_a_long_utterance_does(capsys, both, speech):
    artifact = both.exports[0].artifact.path
    table = printed(capsys, "soak", artifact, "--checkpoint", FUSIONFORMER, "--minutes", "2", "--speech", speech)
    for word in ("values that are not finite", "SNR, last minute", "at most 1 dB less", "memory"):
        assert word in table


def test_verify_prints_every_check(capsys, whole_bundle, speech):
    table = printed(capsys, "verify", whole_bundle, "--speech", speech)
    for word in ("normalizations", "parity", "padding", "tokens", "WER", "within 0.1 points", "passed"):
        assert word in table
    told = parsed(capsys, "verify", whole_bundle, "--speech", speech)
    assert [check["passed"] for check in told["artifacts"][0]["verdict"]["checks"]] == [True] * 5


def test_transcribe_reads_any_recording_that_fits_and_names_it_when_there_are_several(capsys, whole_bundle, speech):
    recordings = sorted((speech / "flac").iterdir())
    one = printed(capsys, "transcribe", whole_bundle / "model.safetensors", recordings[0])
    several = printed(capsys, "transcribe", whole_bundle, *recordings)
    assert several.splitlines()[0] == f"{recordings[0]}: {one.rstrip()}"
    told = parsed(capsys, "transcribe", whole_bundle, *recordings)
    assert [each["path"] for each in told] == [str(path) for path in recordings]
    assert told[0]["text"] == one.strip()


def test_evaluate_prints_the_error_rate_of_a_test_set_with_hotwords_and_without(capsys, both, speech, tmp_path):
    from edgefuse.speech import read_speech

    artifact, texts = both.exports[0].artifact.path, [each.text for each in read_speech(speech).utterances]
    plain = parsed(capsys, "evaluate", artifact, "--speech", speech)
    assert [(each["set"], each["errors"]["words"]) for each in plain] == [("unseen", len(" ".join(texts).split()))]
    (tmp_path / "words.txt").write_text(f"{texts[1]}\t2\nwhere is pete\t2\n")  # the other says: where is peter
    without, boosted = parsed(capsys, "evaluate", artifact, "--speech", speech, "--hotwords", tmp_path / "words.txt")
    assert (without["hotwords"], boosted["hotwords"]) == (0, 2)
    assert boosted["on_hotwords"]["words"] == len([*texts[1].split(), "where", "is"])
    assert (without["false_hotwords"], boosted["false_hotwords"]) == (0, 1)
    assert boosted["on_other_words"]["wer_percent"] > without["on_other_words"]["wer_percent"]
    assert boosted["errors"]["words"] == boosted["on_hotwords"]["words"] + boosted["on_other_words"]["words"]
    table = printed(capsys, "evaluate", artifact, "--speech", speech, "--hotwords", tmp_path / "words.txt", "--set", "unseen")
    assert "beam 8, 2 hotwords" in table
    live = parsed(capsys, "evaluate", artifact, "--speech", speech, "--stream")
    assert live[0]["errors"]["words"] == plain[0]["errors"]["words"]
    assert live != plain  # chunks hear less


def test_evaluate_says_how_far_an_artifact_is_from_another_and_its_chunks_from_whole_utterances(capsys, both, speech):
    one = both.exports[0].artifact.path
    (same,) = parsed(capsys, "evaluate", one, "--speech", speech, "--against", one)
    assert same["against"]["errors"] == same["errors"]
    assert (same["against"]["points"], same["against"]["interval_95_percent"]) == (0.0, [0.0, 0.0])
    (live,) = parsed(capsys, "evaluate", one, "--speech", speech, "--stream", "--against-whole")
    points = live["errors"]["wer_percent"] - same["errors"]["wer_percent"]
    assert points != 0
    assert live["against"]["errors"] == same["errors"]
    assert live["against"]["points"] == pytest.approx(points)
    low, high = live["against"]["interval_95_percent"]
    assert low <= points <= high
    assert live["against"]["changed_utterances"] > 0
    table = printed(capsys, "evaluate", one, "--speech", speech, "--stream", "--against-whole")
    assert "difference in points" in table
    assert f"{points:+.2f}" in table


def test_chunks_are_not_held_against_chunks_where_there_is_no_whole_entry(capsys, whole_checkpoint, order, speech, tmp_path):
    made = export(whole_checkpoint, tmp_path / "bundle", replace(order, seconds=(), chunks=(Chunks(640, 1280),)))
    artifact = made.exports[0].artifact.path
    asked = ["evaluate", str(artifact), "--speech", str(speech), "--stream"]
    assert cli.run([*asked, "--against", str(artifact)]) == 0
    assert cli.run([*asked, "--against-whole"]) == UsageError.exit_code
    assert "as a whole" in capsys.readouterr().err


def test_targets_lists_the_shelf(capsys):
    told = parsed(capsys, "targets")
    assert {"reference", "executorch", "tflite", "coreml"} <= {row["target"] for row in told}
    assert all(row["state"] == "ready" or row["state"].startswith("missing; pip install ") for row in told)
    assert "model.pte" in printed(capsys, "targets")


def test_doctor_finds_what_edgefuse_itself_needs(capsys):
    told = parsed(capsys, "doctor", "--target", "reference")
    assert {"torch", "numpy", "safetensors"} <= {need["package"] for need in told["packages"]}
    assert told["repair"] is None


def test_doctor_is_content_with_what_the_makefile_installs(capsys):
    told = parsed(capsys, "doctor")
    assert told["repair"] is None
    assert not {"dev", "voices"} & {need["by"] for need in told["packages"]}


def test_a_package_that_is_missing_or_too_old_is_mended_by_one_pip_command():
    found = [
        Need("torch", "torch==2.13.0", "edgefuse", "2.13.0", "ok"),
        Need("rich", "rich>=13", "edgefuse", "9.1", "conflict"),
        Need("coremltools", "coremltools==9.0", "coreml", None, "missing"),
    ]
    assert repair(found) == "pip install coremltools==9.0 'rich>=13'"
    assert repair(found[:1]) is None


def test_conflicts_deep_in_the_tree_are_found(monkeypatch):
    from edgefuse import packages

    real = packages.version
    monkeypatch.setattr(packages, "version", lambda name: "0.0.1" if name == "sympy" else real(name))
    (conflict,) = [need for need in needs(()) if need.package == "sympy"]
    assert (conflict.by, conflict.installed, conflict.state) == ("torch", "0.0.1", "conflict")


def test_doctor_ends_with_its_own_code_and_the_command_when_something_is_missing(capsys, monkeypatch):
    from edgefuse import packages

    def version(name: str) -> str:
        if name == "jiwer":
            raise packages.PackageNotFoundError(name)
        return real(name)

    real = packages.version
    monkeypatch.setattr(packages, "version", version)
    assert cli.run(["doctor"]) == 21
    out, err = capsys.readouterr()
    assert "missing" in out
    assert "hint: Mend it with: pip install 'jiwer>=4.0'" in err
