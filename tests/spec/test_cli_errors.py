"""Every foreseen failure: one sentence, a hint, its own exit code, no traceback; word for word in tests/golden/errors.

Write the pages again, and read what has changed, with: EDGEFUSE_GOLDEN=write pytest tests/spec/test_cli_errors.py
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from edgefuse import cli, errors, target
from tests.broken import checkpoints, recordings

GOLDEN = Path(__file__).parent.parent / "golden" / "errors"
CHECKPOINTS = [name for name, made in vars(checkpoints).items() if getattr(made, "__module__", "") == checkpoints.__name__]
RECORDINGS = [name for name, made in vars(recordings).items() if getattr(made, "__module__", "") == recordings.__name__]


def leaves(kind: type[errors.EdgefuseError]) -> list[type[errors.EdgefuseError]]:
    below = [leaf for child in kind.__subclasses__() for leaf in leaves(child)]
    return below or [kind]


def said(arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The page of a failed command; paths of this run are replaced by what they are."""
    capsys.readouterr()
    code = cli.run(arguments)
    out, err = capsys.readouterr()
    told = "".join(line for line in err.splitlines(keepends=True) if line.startswith(("error:", "  hint:")))
    page = f"$ edgefuse {shlex.join(arguments)}\n{out}{told}exit code {code}\n"
    return page.replace(str(folder), "HERE").replace(str(Path(errors.__file__).parent.parent), "CHECKOUT")


def must_equal_golden(name: str, page: str) -> None:
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("EDGEFUSE_GOLDEN") == "write":
        path.write_text(page, encoding="utf-8")
    assert page == path.read_text(encoding="utf-8")


def must_be_an_error(page: str, sentences: int = 1) -> None:
    assert page.count("error: ") == sentences
    assert page.count("  hint: ") == sentences
    assert "Traceback" not in page
    assert "exit code 0" not in page


@pytest.mark.parametrize("wrong", [name for name in CHECKPOINTS if not name.startswith("change")])
def test_a_broken_checkpoint_is_refused_word_for_word(wrong, checkpoint_folder, tmp_path, capsys):
    getattr(checkpoints, wrong)(checkpoint_folder)
    page = said(["inspect", str(checkpoint_folder)], tmp_path, capsys)
    must_be_an_error(page)
    must_equal_golden(f"checkpoint_{wrong}", page)


@pytest.mark.parametrize("wrong", RECORDINGS)
def test_a_recording_that_the_model_cannot_hear_is_refused_word_for_word(wrong, bundle_folder, tmp_path, capsys):
    recording = tmp_path / "hello.wav"
    getattr(recordings, wrong)(recording)
    page = said(["transcribe", str(bundle_folder / "model.safetensors"), str(recording)], tmp_path, capsys)
    must_be_an_error(page)
    must_equal_golden(f"recording_{wrong}", page)


def an_artifact_byte(bundle: Path) -> None:
    content = bytearray((bundle / "model.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / "model.safetensors").write_bytes(content)


def a_byte_of_the_description(bundle: Path) -> None:
    text = (bundle / "edgefuse.json").read_text(encoding="utf-8")
    (bundle / "edgefuse.json").write_text(text.replace('"fp32"', '"fp16"'), encoding="utf-8")


def a_space_in_the_description(bundle: Path) -> None:
    (bundle / "edgefuse.json").write_bytes((bundle / "edgefuse.json").read_bytes() + b" ")


def a_file_less(bundle: Path) -> None:
    (bundle / "tokens.txt").unlink()


def a_file_more(bundle: Path) -> None:
    (bundle / "model.pte").write_bytes(b"")


def no_description(bundle: Path) -> None:
    (bundle / "edgefuse.json").unlink()


def nothing(bundle: Path) -> None:
    shutil.rmtree(bundle)


@pytest.mark.parametrize(
    "wrong",
    [
        an_artifact_byte,
        a_byte_of_the_description,
        a_space_in_the_description,
        a_file_less,
        a_file_more,
        no_description,
        nothing,
    ],
)
def test_a_changed_bundle_is_refused_word_for_word(wrong, bundle_folder, tmp_path, capsys):
    wrong(bundle_folder)
    page = said(["verify", str(bundle_folder)], tmp_path, capsys)
    must_be_an_error(page)
    must_equal_golden(f"bundle_{wrong.__name__}", page)


COMMANDS = {
    "unknown_command": ["fuse"],
    "unknown_option": ["inspect", "HERE/checkpoint", "--fast"],
    "missing_argument": ["inspect"],
    "unknown_precision": ["export", "HERE/checkpoint", "-t", "reference", "--precision", "int1", "-o", "HERE/new"],
    "unknown_input": ["export", "HERE/checkpoint", "-t", "reference", "--input", "mp3", "-o", "HERE/new"],
    "no_target": ["export", "HERE/checkpoint", "-o", "HERE/new"],
    "all_and_a_target": ["export", "HERE/checkpoint", "--all", "-t", "reference", "-o", "HERE/new"],
    "unknown_target": ["export", "HERE/checkpoint", "-t", "gameboy", "-o", "HERE/new"],
    "output_exists": ["export", "HERE/checkpoint", "-t", "reference", "-o", "HERE/bundle"],
    "output_is_not_ours": ["export", "HERE/checkpoint", "-t", "reference", "-o", "HERE/diary", "--overwrite"],
    "output_below_a_file": ["fold", "HERE/checkpoint", "-o", "HERE/diary/entry.txt/folded"],
    "no_length": ["export", "HERE/checkpoint", "-t", "reference", "--seconds", "0", "-o", "HERE/new"],
    "length_that_is_no_number": ["export", "HERE/checkpoint", "-t", "reference", "--seconds", "nan", "-o", "HERE/new"],
    "length_beyond_the_model": ["export", "HERE/checkpoint", "-t", "reference", "--seconds", "3600", "-o", "HERE/new"],
    "length_too_short_for_the_speech": [
        *["export", "HERE/checkpoint", "-t", "reference", "--seconds", "0.08", "--speech", "HERE/speech", "-o", "HERE/new"]
    ],
    "state_without_a_stream": ["export", "HERE/checkpoint", "-t", "reference", "--state", "held", "-o", "HERE/new"],
    "state_that_a_target_cannot_hold": [
        *("export", "HERE/checkpoint", "-t", "reference", "--chunk-ms", "640", "--left-context-ms", "1280", "--state", "held"),
        *("-o", "HERE/new"),
    ],
    "no_chunk": ["export", "HERE/checkpoint", "-t", "reference", "--chunk-ms", "0", "-o", "HERE/new"],
    "no_left_context": [
        *["export", "HERE/checkpoint", "-t", "reference", "--chunk-ms", "640", "--left-context-ms", "-1", "-o", "HERE/new"]
    ],
    "no_look_ahead": [
        *["export", "HERE/checkpoint", "-t", "reference", "--chunk-ms", "640", "--look-ahead-ms", "-1", "-o", "HERE/new"]
    ],
    "look_ahead_without_a_stream": ["export", "HERE/checkpoint", "-t", "reference", "--look-ahead-ms", "320", "-o", "HERE/new"],
    "chunk_beyond_the_model": ["export", "HERE/checkpoint", "-t", "reference", "--chunk-ms", "3600000", "-o", "HERE/new"],
    "chunk_without_speech_to_estimate": ["fold", "HERE/checkpoint", "--chunk-ms", "640", "-o", "HERE/new"],
    "no_depth": ["export", "HERE/checkpoint", "-t", "reference", "--depth", "0", "-o", "HERE/new"],
    "depth_above_the_layers": ["fold", "HERE/checkpoint", "--depth", "2", "-o", "HERE/new"],
    "depth_of_what_is_folded": ["export", "HERE/folded", "-t", "reference", "--depth", "1", "-o", "HERE/new"],
    "depth_with_speech_that_is_not_there": [
        *["export", "HERE/checkpoint", "-t", "reference", "--depth", "1", "--reestimate", "HERE/diary", "-o", "HERE/new"]
    ],
    "pretrain_without_a_corpus": ["pretrain", "--speech", "HERE/speech", "-o", "HERE/new"],
    "pretrain_no_epochs": ["pretrain", "--speech", "HERE/speech", "--epochs", "0", "-o", "HERE/new"],
    "no_speech": ["export", "HERE/checkpoint", "-t", "reference", "--speech", "HERE/diary", "-o", "HERE/new"],
    "no_baseline": ["export", "HERE/checkpoint", "-t", "reference", "--baseline", "HERE/diary", "-o", "HERE/new"],
    "nothing_to_estimate": ["fold", "HERE/folded", "--reestimate", "HERE/speech", "-o", "HERE/new"],
    "other_speech": ["verify", "HERE/bundle"],
    "target_not_in_the_bundle": ["verify", "HERE/bundle", "-t", "coreml"],
    "bars_missing": ["verify", "HERE/bundle", "--bars", "HERE/no.toml"],
    "bars_no_toml": ["verify", "HERE/bundle", "--bars", "HERE/diary/entry.txt"],
    "bars_a_folder": ["verify", "HERE/bundle", "--bars", "HERE/diary"],
    "bars_unknown": ["verify", "HERE/bundle", "--bars", "HERE/unknown.toml"],
    "bars_no_number": ["export", "HERE/checkpoint", "-t", "reference", "--bars", "HERE/nan.toml", "-o", "HERE/new"],
    "bars_negative": ["verify", "HERE/bundle", "--bars", "HERE/negative.toml"],
    "bars_of_another_type": ["verify", "HERE/bundle", "--bars", "HERE/half.toml"],
    "no_artifact": ["transcribe", "HERE/bundle/model.pte", "HERE/hello.wav"],
    "a_file_that_is_no_artifact": ["transcribe", "HERE/bundle/tokens.txt", "HERE/hello.wav"],
    "no_recording": ["transcribe", "HERE/bundle"],
    "recording_and_microphone": ["transcribe", "HERE/bundle", "HERE/hello.wav", "--microphone"],
    "endpoints_without_a_stream": ["transcribe", "HERE/bundle", "HERE/hello.wav", "--endpoint-silence-ms", "800"],
    "second_pass_without_a_stream": ["transcribe", "HERE/bundle", "HERE/hello.wav", "--second-pass"],
    "endpoints_after_no_silence": ["transcribe", "HERE/bundle", "HERE/hello.wav", "--stream", "--endpoint-silence-ms", "0"],
    "no_beam": ["transcribe", "HERE/bundle", "HERE/hello.wav", "--beam", "0"],
    "hotwords_without_a_beam": ["transcribe", "HERE/bundle", "HERE/hello.wav", "--beam", "1", "--hotwords", "HERE/rooms.txt"],
    "hotwords_missing": ["transcribe", "HERE/bundle", "HERE/hello.wav", "--hotwords", "HERE/names.txt"],
    "hotwords_empty": ["transcribe", "HERE/bundle", "HERE/hello.wav", "--hotwords", "HERE/empty.txt"],
    "hotwords_not_text": ["transcribe", "HERE/bundle", "HERE/hello.wav", "--hotwords", "HERE/weights.pt"],
    "hotwords_a_folder": ["transcribe", "HERE/bundle", "HERE/hello.wav", "--hotwords", "HERE/diary"],
    "hotwords_with_a_weight_that_is_no_number": [*["transcribe", "HERE/bundle", "HERE/hello.wav", "--hotwords", "HERE/much.txt"]],
    "hotwords_that_no_token_spells": ["transcribe", "HERE/bundle", "HERE/hello.wav", "--hotwords", "HERE/diary/entry.txt"],
    "evaluate_without_speech": ["evaluate", "HERE/bundle", "--speech", "HERE/diary"],
    "evaluate_whole_utterances_against_whole_utterances": [
        *["evaluate", "HERE/bundle", "--speech", "HERE/speech", "--against-whole"]
    ],
    "evaluate_against_nothing": ["evaluate", "HERE/bundle", "--speech", "HERE/speech", "--against", "HERE/nobody"],
    "evaluate_another_set": ["evaluate", "HERE/bundle", "--speech", "HERE/speech", "--set", "heard"],
    "evaluate_a_stream_that_is_none": ["evaluate", "HERE/bundle", "--speech", "HERE/speech", "--stream"],
    "average_of_one": ["average", "HERE/checkpoint", "-o", "HERE/new"],
    "average_without_speech": ["average", "HERE/checkpoint", "HERE/checkpoint", "-o", "HERE/new"],
    "average_of_what_is_folded": ["average", "HERE/checkpoint", "HERE/folded", "-o", "HERE/new"],
    "average_of_another_architecture": ["average", "HERE/checkpoint", "HERE/other", "-o", "HERE/new"],
    "train_on_no_corpus": ["train", "--speech", "HERE/diary", "-o", "HERE/new"],
    "train_on_no_speech_at_a_time": ["train", "--speech", "HERE/diary", "-o", "HERE/new", "--batch-seconds", "0"],
    "train_with_no_patience": ["train", "--speech", "HERE/diary", "-o", "HERE/new", "--patience", "0"],
    "train_with_nothing_accumulated": ["train", "--speech", "HERE/diary", "-o", "HERE/new", "--accumulate", "0"],
    "train_with_workers_before_none": ["train", "--speech", "HERE/diary", "-o", "HERE/new", "--workers", "-1"],
    "train_with_checkpoints_before_time": [*["train", "--speech", "HERE/diary", "-o", "HERE/new", "--checkpoint-minutes", "-1"]],
    "no_weights_to_convert": ["convert", "HERE/no.pt", "--config", "HERE/c.json", "--tokens", "HERE/t.txt", "-o", "HERE/new"],
    "no_config_to_convert_with": [
        *["convert", "HERE/weights.pt", "--config", "HERE/c.json", "--tokens", "HERE/t.txt", "-o", "HERE/new"]
    ],
    "a_pickle_with_more_than_tensors": [
        *["convert", "HERE/code.pt", "--config", "HERE/c.json", "--tokens", "HERE/t.txt", "-o", "HERE/new"]
    ],
    "weights_without_a_frontend": [
        *["convert", "HERE/bare.pt", "--config", "HERE/other/config.json", "--tokens", "HERE/other/tokens.txt", "-o", "HERE/new"]
    ],
    "weights_that_wenet_did_not_write": [
        *["convert", "HERE/bare.pt", "--config", "HERE/train.yaml", "--tokens", "HERE/rooms.txt", "-o", "HERE/new"]
    ],
    "wenets_encoder_that_sees_the_future": [
        *["convert", "HERE/wenet.pt", "--config", "HERE/train.yaml", "--tokens", "HERE/rooms.txt", "-o", "HERE/new"]
    ],
    "not_weights": ["convert", "HERE/diary/entry.txt", "--config", "HERE/c.json", "--tokens", "HERE/t.txt", "-o", "HERE/new"],
}


BARS = {"unknown": "snr = 20", "nan": "wer_points = nan", "negative": "agreement_percent = -1.0", "half": "words = 1.5"}


def must_be_refused(command, golden, here, capsys):
    """Word for word, and nothing was lost, nothing was left behind."""
    before = sorted(here.rglob("*"))
    page = said([word.replace("HERE", str(here)) for word in command], here, capsys)
    must_be_an_error(page)
    must_equal_golden(golden, page)
    assert sorted(here.rglob("*")) == before


class Opener:
    """What a pickle can hold besides tensors: a call."""

    def __reduce__(self):
        return (os.system, ("echo this must never run > /tmp/edgefuse-was-fooled",))


@pytest.fixture
def here(checkpoint_folder, bundle_folder, speech, tmp_path):
    """A folder with something of each kind in it."""
    (tmp_path / "diary").mkdir()
    (tmp_path / "diary" / "entry.txt").write_text("Dear diary\n")
    shutil.copytree(speech, tmp_path / "speech")
    (tmp_path / "rooms.txt").write_text("kitchen\nliving room\t0.8\n")
    for name, line in BARS.items():
        (tmp_path / f"{name}.toml").write_text(f"{line}\n")
    (tmp_path / "much.txt").write_text("kitchen\nanna\tmuch\n")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "train.yaml").write_text("encoder_conf: {output_size: 256, causal: false, lora_rank: 8}\n")
    torch.save({"ctc.ctc_lo.weight": torch.zeros(2, 2)}, tmp_path / "wenet.pt")
    torch.save({"ctc.weight": torch.zeros(2, 2)}, tmp_path / "bare.pt")
    torch.save({"frontend.mean": torch.zeros(80), "frontend.istd": torch.ones(80)}, tmp_path / "weights.pt")
    torch.save({"weights": Opener()}, tmp_path / "code.pt")
    assert cli.run(["new", "--preset", "tiny", "-o", str(tmp_path / "other")]) == 0
    assert cli.run(["fold", str(checkpoint_folder), "-o", str(tmp_path / "folded")]) == 0
    assert bundle_folder.is_dir()
    return tmp_path


@pytest.mark.parametrize("wrong", COMMANDS)
def test_a_command_that_makes_no_sense_is_refused_word_for_word(wrong, here, capsys):
    must_be_refused(COMMANDS[wrong], f"command_{wrong}", here, capsys)


def test_a_pickle_that_runs_code_does_not_run_it(here):
    code = str(here / "code.pt")
    cli.run(["convert", code, "--config", "c", "--tokens", "t", "-o", str(here / "new")])
    cli.run(["inspect", code])
    assert not Path("/tmp/edgefuse-was-fooled").exists()  # noqa: S108 - what the pickle would have written


def test_a_target_whose_package_is_missing_names_the_pip_command(here, capsys, monkeypatch):
    from edgefuse_targets import reference

    monkeypatch.setattr(reference, "missing", lambda: ["gameboy-runtime==1.0"])
    page = said(["export", str(here / "checkpoint"), "-t", "reference", "-o", str(here / "new")], here, capsys)
    must_equal_golden("command_package_missing", page)


def test_a_target_that_refuses_the_program_says_why(here, capsys, monkeypatch):
    from edgefuse_targets import reference

    monkeypatch.setattr(reference, "refusals", lambda _: ["It has no such operator."])
    arguments = ["export", str(here / "checkpoint"), "-t", "reference", "--speech", str(here / "speech"), "-o", str(here / "new")]
    must_equal_golden("command_target_refuses", said(arguments, here, capsys))
    assert not (here / "new").exists()


def test_an_exporter_that_fails_is_told_in_one_line(here, capsys, monkeypatch):
    from edgefuse_targets import reference

    def fail(*_: object) -> None:
        raise RuntimeError("internal compiler error\n  at line 1\n  at line 2")

    monkeypatch.setattr(reference, "export", fail)
    arguments = ["export", str(here / "checkpoint"), "-t", "reference", "--speech", str(here / "speech"), "-o", str(here / "new")]
    must_equal_golden("command_exporter_fails", said(arguments, here, capsys))
    assert not (here / "new").exists()


def test_a_name_from_a_broken_file_cannot_move_the_cursor_or_fill_the_screen(checkpoint_folder, tmp_path, capsys):
    checkpoints.change_config(checkpoint_folder, **{"\x1b[2J\r" + "x" * 10_000: 1})
    page = said(["inspect", str(checkpoint_folder)], tmp_path, capsys)
    assert "\x1b" not in page
    assert "\r" not in page
    assert len(page) < 2000


def test_ctrl_c_ends_with_130_and_without_a_traceback(checkpoint_folder, capsys, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("edgefuse.inspection.inspect", interrupt)
    assert cli.run(["inspect", str(checkpoint_folder)]) == 130
    assert capsys.readouterr().err.strip() == "interrupted"


def test_a_package_that_a_command_needs_and_does_not_find_is_named(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "edgefuse.train.train", None)  # as if importing it had failed
    code = cli.run(["train", "--speech", str(tmp_path), "-o", str(tmp_path / "run")])
    assert code == errors.MissingPackage.exit_code
    assert "is not installed" in capsys.readouterr().err


def test_every_error_has_an_exit_code_of_its_own():
    kinds = leaves(errors.EdgefuseError)
    codes = [kind.exit_code for kind in kinds]
    assert len(set(codes)) == len(codes)
    assert {kind.__name__: kind.exit_code for kind in kinds if str(kind.exit_code) not in str(errors.__doc__)} == {}
    assert not {0, 1, 130} & set(codes)


def test_every_kind_of_error_about_inputs_has_a_golden_page():
    pages = "".join(path.read_text(encoding="utf-8") for path in GOLDEN.glob("*.txt"))
    untold = {errors.FoldInexact, errors.GateFailed, errors.TrainingDiverged, errors.NoSpace, errors.Slower}  # told by tests
    untold |= {errors.DeviceMissing, errors.DeviceBusy, errors.DeviceGone, errors.RunFailed, errors.SetupFailed}  # of their own
    codes = {kind.exit_code for kind in leaves(errors.EdgefuseError) if kind not in untold}
    assert {code for code in codes if f"exit code {code}\n" not in pages} == set()


def test_the_program_itself_ends_with_the_code_and_without_a_traceback(tmp_path):
    command = [sys.executable, "-m", "edgefuse.cli", "inspect", str(tmp_path / "nowhere")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == errors.MissingFile.exit_code
    assert ended.stdout == ""
    assert ended.stderr.startswith("error: There is nothing at ")
    assert "Traceback" not in ended.stderr


def test_help_answers_without_torch_and_in_a_fifth_of_a_second():
    looks = (
        "import sys; from edgefuse import cli; code = cli.run(['--help']); import resource as r; u = r.getrusage(r.RUSAGE_SELF)"
    )
    says = "print(json.dumps([code, 'torch' in sys.modules, 'numpy' in sys.modules, u.ru_utime + u.ru_stime]))"
    command = [sys.executable, "-c", f"{looks}; import json; {says}"]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1] for _ in range(3)]
    answers = [json.loads(run) for run in runs]
    assert all(answer[:3] == [0, False, False] for answer in answers)
    assert min(answer[3] for answer in answers) < 0.2  # seconds of the processor: the clock of a busy machine says nothing


def test_the_shelf_is_read_without_importing_a_target():
    assert {"reference", "executorch", "tflite", "coreml"} <= set(target.shelf())
