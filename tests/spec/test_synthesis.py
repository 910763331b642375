"""How a sentence becomes a recording, and recordings a corpus."""

from __future__ import annotations

import tomllib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner
from scipy import signal

from edgefuse.speech import read_speech
from edgefuse_calibration import choose, synthesize
from edgefuse_calibration.acoustics import (
    SAMPLE_RATE,
    Scene,
    Waveform,
    babble,
    coloured,
    in_room,
    recorded,
    resized,
    rms,
    trimmed,
)
from edgefuse_calibration.corpus import Clip, load_cuts, write_manifests
from edgefuse_calibration.demo import evenly, voice_family, write_demo
from edgefuse_calibration.engines import (
    ENGINES,
    ESPEAK,
    ESPEAK_SPEAKERS,
    FESTIVAL,
    FLITE,
    MEAN_F0_HZ,
    RHVOICE,
    Engine,
    Speaking,
    finished,
    require,
    scheme,
)
from edgefuse_calibration.errors import EngineFailed, EngineMissing, OtherRecipe
from edgefuse_calibration.synthesize import Goal, claim, planned

PLAIN = Scene(
    size=1.0,
    lead_s=0.1,
    tail_s=0.2,
    reverberation_s=None,
    direct_db=10.0,
    noise=None,
    snr_db=20.0,
    peak_db=-6.0,
    seed=5,
)


def tone(hertz: float, seconds: float, rate: int = SAMPLE_RATE) -> Waveform:
    time_s = np.arange(int(seconds * rate)) / rate
    return np.sin(2 * np.pi * hertz * time_s).astype(np.float32)


def highest_peak_hz(waveform: Waveform) -> float:
    return float(np.argmax(np.abs(np.fft.rfft(waveform))) * SAMPLE_RATE / len(waveform))


def clip_in(folder: Path, identity: str, speaker: str) -> Clip:
    path = f"flac/{identity}.flac"
    (folder / "flac").mkdir(parents=True, exist_ok=True)
    soundfile.write(folder / path, 0.5 * tone(200, 0.5), SAMPLE_RATE, subtype="PCM_16")
    return Clip(identity, path, SAMPLE_RATE // 2, "open the gate", speaker, speaker.partition("/")[0], PLAIN)


def installed(*engines: Engine) -> None:
    missing = [part for engine in engines for part in engine.missing()]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


# The plan


def test_an_utterance_is_decided_by_its_seed_and_id_alone() -> None:
    assert planned("train", 7, "stop", seed=1) == planned("train", 7, "stop", seed=1)
    assert planned("train", 7, "stop", seed=1) != planned("train", 7, "stop", seed=2)
    assert planned("train", 7, "stop", seed=1).scene != planned("train", 8, "stop", seed=1).scene


def test_an_unseen_voice_never_speaks_in_training() -> None:
    assert {planned("train", place, "stop", seed=1).engine for place in range(200)} == {*ENGINES} - {"festival"}


@pytest.mark.parametrize("which", ["dev", "seen"])
def test_a_test_set_of_known_voices_has_those_that_a_distribution_packs(which: str) -> None:
    assert {planned(which, place, "stop", seed=1).engine for place in range(100)} == {"espeak-ng", "flite"}


def test_the_unseen_set_is_spoken_by_festival_alone() -> None:
    assert {planned("unseen", place, "stop", seed=1).engine for place in range(100)} == {"festival"}


def test_no_training_voice_is_the_speaker_of_an_unseen_one() -> None:
    training = {voice[:3] for engine in ENGINES.values() if engine is not FESTIVAL for voice in engine.voices}
    assert not training & {voice[:3] for voice in FESTIVAL.voices}


def test_flite_speaks_a_third_of_the_training_set() -> None:
    engines = Counter(planned("train", place, "stop", seed=1).engine for place in range(1000))
    assert 270 < engines["flite"] < 370


def test_every_peak_lies_below_full_scale() -> None:
    assert max(planned("train", place, "stop", seed=1).scene.peak_db for place in range(200)) < 0


def test_festival_is_told_the_sentence_the_voice_and_the_file() -> None:
    told = scheme(Speaking("what's on", "ked_diphone", 1.1, 1.0), Path("/corpus/1.wav"))
    assert told.splitlines() == [
        "(voice_ked_diphone)",
        "(Parameter.set 'Duration_Stretch 1.100)",
        "(set! int_lr_params '((target_f0_mean 105.0) (target_f0_std 14) (model_f0_mean 170) (model_f0_std 34)))",
        '(utt.save.wave (utt.synth (Utterance Text "what\'s on")) "/corpus/1.wav" \'riff)',
    ]


# The sound


def test_a_smaller_speaker_is_higher_and_quicker() -> None:
    small = resized(tone(200, 1.0, 22_050), 22_050, 1.1)
    assert highest_peak_hz(small) == pytest.approx(220, abs=2)
    assert len(small) / SAMPLE_RATE == pytest.approx(1 / 1.1, abs=0.001)


def test_silence_around_speech_is_cut_and_silence_within_it_is_kept() -> None:
    hush, word = np.zeros(SAMPLE_RATE, np.float32), tone(200, 0.2)
    assert len(trimmed(np.concatenate([hush, word, hush, word, hush]))) == pytest.approx(1.4 * SAMPLE_RATE, abs=640)


def test_nothing_is_left_of_pure_silence() -> None:
    assert trimmed(np.zeros(SAMPLE_RATE, np.float32)).size == 0


def test_a_recording_has_the_asked_peak_and_margins() -> None:
    sound = recorded(tone(200, 1.0), PLAIN, [])
    assert len(sound) == 1.3 * SAMPLE_RATE
    assert np.max(np.abs(sound)) == pytest.approx(10 ** (-6 / 20), rel=1e-4)
    assert np.all(sound[: SAMPLE_RATE // 10] == 0)


@pytest.mark.parametrize("colour", ["white", "pink", "brown"])
def test_noise_lies_below_the_speech_by_the_asked_ratio(colour: str) -> None:
    sound = recorded(tone(200, 1.0), replace(PLAIN, noise=colour, lead_s=1.0, snr_db=15.0), [])
    noise, both = sound[:SAMPLE_RATE], sound[SAMPLE_RATE : 2 * SAMPLE_RATE]
    speech_rms = np.sqrt(rms(both) ** 2 - rms(noise) ** 2)
    assert 20 * np.log10(speech_rms / rms(noise)) == pytest.approx(15, abs=1.5)


@pytest.mark.parametrize(("colour", "slope_db"), [("white", 0), ("pink", -3), ("brown", -6)])
def test_noise_falls_by_its_colours_slope_per_octave(colour: str, slope_db: float) -> None:
    noise = coloured(20 * SAMPLE_RATE, colour, np.random.default_rng(1))
    hertz, power = signal.welch(noise, SAMPLE_RATE, nperseg=4096)
    band = (hertz > 200) & (hertz < 6000)
    assert np.polyfit(np.log2(hertz[band]), 10 * np.log10(power[band]), 1)[0] == pytest.approx(slope_db, abs=0.3)


def test_a_quiet_talker_is_as_loud_as_the_others_in_the_babble() -> None:
    noise = babble(SAMPLE_RATE, [tone(200, 1.0), 0.01 * tone(700, 1.0)], np.random.default_rng(1))
    spectrum = np.abs(np.fft.rfft(noise))
    assert spectrum[200] == pytest.approx(spectrum[700], rel=0.02)


def test_a_room_keeps_the_direct_sound_in_place_and_rings_after_it() -> None:
    click = np.zeros(SAMPLE_RATE, np.float32)
    click[100] = 1.0
    heard = in_room(click, 0.3, 6.0, np.random.default_rng(1))
    assert np.argmax(np.abs(heard)) == 100
    assert 10 * np.log10(np.sum(np.square(heard[101:]))) == pytest.approx(-6, abs=0.1)
    assert rms(heard[110:1000]) > 10 * rms(heard[4000:5000])


# The corpus


def test_the_manifests_of_the_same_clips_are_the_same_bytes(tmp_path: Path) -> None:
    clip = clip_in(tmp_path, "train-000001", "flite/slt")
    for name in ("once", "again"):
        write_manifests(tmp_path, name, [clip])
    assert (tmp_path / "once.cuts.jsonl.gz").read_bytes() == (tmp_path / "again.cuts.jsonl.gz").read_bytes()


def test_cuts_find_their_audio_after_the_corpus_has_moved(tmp_path: Path) -> None:
    write_manifests(tmp_path / "old", "train", [clip_in(tmp_path / "old", "train-000001", "flite/slt")])
    (tmp_path / "old").rename(tmp_path / "new")
    (cut,) = load_cuts(tmp_path / "new", "train")
    assert cut.load_audio().shape == (1, SAMPLE_RATE // 2)
    assert cut.supervisions[0].text == "open the gate"
    assert cut.supervisions[0].speaker == "flite/slt"


def test_a_folder_of_another_seed_is_refused(tmp_path: Path) -> None:
    claim(tmp_path, seed=1)
    claim(tmp_path, seed=1)
    with pytest.raises(OtherRecipe, match="another seed"):
        claim(tmp_path, seed=2)


def test_a_missing_engine_ends_the_command_with_the_line_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    answer = CliRunner().invoke(synthesize.main, [str(tmp_path / "corpus")])
    assert answer.exit_code == EngineMissing.exit_code
    assert "not installed here: espeak-ng" in answer.output
    assert "apt-get install -y espeak-ng" in answer.output


def test_what_is_missing_is_installed_by_one_command_of_each_kind() -> None:
    engines = [replace(ENGINES[name], missing=lambda: ["it"]) for name in ("flite", "rhvoice", "pico", "festival", "piper")]
    with pytest.raises(EngineMissing) as raised:
        require(engines)
    told = "apt-get install -y flite festival festvox-kdlpc16k && pip install 'edgefuse[voices]' && sh calibration/build-rhvoice"
    assert raised.value.hint == f"Install it with: {told}"


def test_the_demo_takes_turns_among_the_voices(tmp_path: Path) -> None:
    speakers = ["flite/slt"] * 20 + ["espeak-ng/en-us+m1"] * 10 + ["espeak-ng/en-us+f2"] * 10 + ["flite/awb"] * 2
    clip = clip_in(tmp_path, "seen-000000", "flite/slt")
    clips = [replace(clip, identity=f"seen-{place:06d}", speaker=name) for place, name in enumerate(speakers)]
    families = Counter(voice_family(each.speaker) for each in evenly(clips, 12))
    assert families == {"flite/slt": 5, "espeak-ng/en-us": 5, "flite/awb": 2}


def test_the_demo_is_the_same_bytes_twice(tmp_path: Path) -> None:
    sets = {"seen": [clip_in(tmp_path, f"seen-{place:06d}", "flite/slt") for place in range(3)]}
    for name in ("once", "again"):
        write_demo(tmp_path, tmp_path / name, sets)
    for path in (tmp_path / "once").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(tmp_path / "once")).read_bytes()


# With the engines


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_says_a_longer_sentence_longer(name: str) -> None:
    engine = ENGINES[name]
    installed(engine)
    lines = ("stop", "turn off the lights in the living room")
    stop, turn_off = engine.speak([Speaking(line, engine.voices[0], 1.0, 1.0) for line in lines])
    assert len(turn_off.waveform) / turn_off.rate > 1.3
    assert len(trimmed(turn_off.waveform)) > 2 * len(trimmed(stop.waveform)) > 0


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_that_is_told_to_speak_slowly_does(name: str) -> None:
    engine = ENGINES[name]
    installed(engine)
    quick, slow = engine.speak([Speaking("open the garage", engine.voices[0], pace, 1.0) for pace in (0.9, 1.3)])
    assert len(trimmed(slow.waveform)) > 1.2 * len(trimmed(quick.waveform))


@pytest.mark.parametrize("name", ["espeak-ng", "festival"])
def test_an_engine_that_lacks_a_voice_fails_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(ENGINES[name])
    monkeypatch.setitem(MEAN_F0_HZ, "nobody", 100)
    with pytest.raises(EngineFailed, match=f"The speech engine {name} failed"):
        ENGINES[name].speak([Speaking("stop", "nobody", 1.0, 1.0)])


@pytest.mark.parametrize("name", ["pico", "hibari", "piper"])
def test_an_engine_from_python_says_the_same_whatever_it_said_before(name: str) -> None:
    engine = ENGINES[name]
    installed(engine)
    stop, turn_off = (Speaking(line, engine.voices[0], 1.0, 1.0) for line in ("stop", "turn off the lights"))
    first, _, again = (engine.speak([each])[0] for each in (stop, turn_off, stop))
    assert np.array_equal(first.waveform, again.waveform)


def test_a_flite_without_a_voice_is_refused_before_it_speaks_with_another(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(FLITE)
    monkeypatch.setattr("edgefuse_calibration.engines.FLITE", replace(FLITE, voices=("slt", "nobody")))
    assert FLITE.missing() == ["the voice nobody"]


def test_a_rhvoice_without_a_voice_is_refused_before_it_speaks_with_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin" / "RHVoice-test"
    for voice in ("bdl", "ksp"):
        (tmp_path / "share" / "RHVoice" / "voices" / voice).mkdir(parents=True)
    program.parent.mkdir()
    program.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    assert RHVOICE.missing() == ["the voice clb"]
    program.unlink()
    assert RHVOICE.missing() == ("RHVoice-test",)


def test_espeak_knows_every_speaker_that_it_is_asked_for() -> None:
    installed(ESPEAK)
    listed = finished(["espeak-ng", "--voices=variant"]).decode()
    assert [name for name in ESPEAK_SPEAKERS if f"!v/{name} " not in listed.replace("\n", " \n")] == []


def test_a_corpus_does_not_depend_on_the_number_of_jobs_nor_on_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(ESPEAK, FLITE)
    monkeypatch.setattr(synthesize, "ROUND", 4)
    once, again = tmp_path / "once", tmp_path / "again"
    synthesize.synthesize(once, {"dev": Goal(0.0, 5)}, seed=3, jobs=1)
    synthesize.synthesize(again, {"dev": Goal(0.0, 2)}, seed=3, jobs=2)
    synthesize.synthesize(again, {"dev": Goal(0.0, 5)}, seed=3, jobs=2)
    written = sorted(path.relative_to(once) for path in once.rglob("*.*"))
    assert sorted(path.relative_to(again) for path in again.rglob("*.*")) == written
    assert [path for path in written if (once / path).read_bytes() != (again / path).read_bytes()] == []
    assert len(load_cuts(once, "dev")) == 5


@pytest.fixture
def small_corpus(tmp_path: Path) -> Path:
    """Forty utterances of four voices, longer and louder from one to the next."""
    clips = []
    for number in range(40):
        identity, speaker = f"train-{number:06}", f"flite/{'abcd'[number % 4]}"
        clip = clip_in(tmp_path, identity, speaker)
        sound = tone(200, 0.5 + number / 20) * (0.01 + number / 50)
        soundfile.write(tmp_path / clip.path, sound, SAMPLE_RATE, subtype="PCM_16")
        clips.append(replace(clip, samples=len(sound)))
    write_manifests(tmp_path, "train", clips)
    (tmp_path / "recipe.json").write_text("{}")
    return tmp_path


def test_what_is_chosen_to_calibrate_on_is_of_every_voice_length_and_loudness(small_corpus: Path, tmp_path: Path) -> None:
    chosen = choose.choose(small_corpus, tmp_path / "set", count=12, seed=1, which="train")
    assert {each.voice for each in chosen} == {f"flite/{voice}" for voice in "abcd"}
    seconds, loudness = ([getattr(each, name) for each in chosen] for name in ("seconds", "loudness_db"))
    assert max(seconds) - min(seconds) > 1
    assert max(loudness) - min(loudness) > 6
    described = tomllib.loads((tmp_path / "set" / "set.toml").read_text())["utterance"]
    speech = read_speech(tmp_path / "set")
    assert [(each["id"], each["sha256"]) for each in described] == [(u.identity, u.sha256) for u in speech.utterances]


def test_the_choice_depends_on_the_seed_alone(small_corpus: Path, tmp_path: Path) -> None:
    names = ("one", "again", "other")
    for name, seed in zip(names, (1, 1, 2), strict=True):
        choose.choose(small_corpus, tmp_path / name, count=6, seed=seed, which="train")
    one, again, other = ((tmp_path / name / "set.toml").read_bytes() for name in names)
    assert one == again != other


def test_a_corpus_without_that_set_is_told_in_words(small_corpus: Path, tmp_path: Path) -> None:
    ended = CliRunner().invoke(choose.main, [str(small_corpus), str(tmp_path / "set"), "--set", "dev"])
    assert ended.exit_code == 1
    assert "has no set 'dev'" in ended.output
    assert "Traceback" not in ended.output
