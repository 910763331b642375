"""The microphone: blocks until Ctrl-C, and a sentence where there is none."""

import signal
import sys
from itertools import chain, repeat
from types import ModuleType

import numpy as np
import pytest
import soundfile

from edgefuse import cli
from edgefuse.decode.endpoint import Endpointing
from edgefuse.decode.search import Decoding
from edgefuse.errors import EmptyAudio
from edgefuse.listen import load, record
from edgefuse.microphone import BLOCK_SAMPLES, blocks, until_interrupted
from edgefuse.recognizer import Recognizer
from tests.spec.test_cli_errors import must_be_an_error, must_equal_golden, said

SILENCE = np.zeros(BLOCK_SAMPLES, np.float32)


def ctrl_c_after(spoken):
    """Blocks as a microphone gives them, endlessly; Ctrl-C is pressed when the last one of `spoken` is asked for."""
    yield from spoken[:-1]
    signal.raise_signal(signal.SIGINT)
    yield spoken[-1]
    yield from repeat(SILENCE)


@pytest.fixture(autouse=True)
def ctrl_c_interrupts():
    """As in a terminal: a shell lets its background jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def spoken(speech):
    samples, _ = soundfile.read(min(speech.rglob("*.flac")), dtype="float32")
    return [samples[start : start + BLOCK_SAMPLES] for start in range(0, len(samples), BLOCK_SAMPLES)]


def test_blocks_come_until_ctrl_c_and_the_last_one_is_not_lost():
    before = signal.getsignal(signal.SIGINT)
    given = [np.full(4, number, np.float32) for number in range(5)]
    taken = list(until_interrupted(ctrl_c_after(given)))
    assert [int(block[0]) for block in taken] == [0, 1, 2, 3, 4]
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_pressed_twice_interrupts_as_everywhere():
    def impatient():
        yield SILENCE
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        yield SILENCE

    with pytest.raises(KeyboardInterrupt):
        list(until_interrupted(impatient()))


def test_a_recording_that_ctrl_c_ends_is_heard_to_its_end(both, spoken):
    path = both.exports[0].artifact.path
    ended: list = []
    heard = record(path, Decoding(), Endpointing(), ctrl_c_after(spoken), lambda _: None, ended.append)
    alone = Recognizer(load(path), endpointing=Endpointing())
    alone.accept(np.concatenate(spoken))
    alone.finish()
    assert heard.said == alone.said == tuple(ended)
    assert heard.seconds == pytest.approx(sum(map(len, spoken)) / 16_000)
    assert len(heard.latency_ns) > 0


def test_a_recording_that_ends_before_it_begins_is_empty(both):
    with pytest.raises(EmptyAudio, match="Nothing was recorded"):
        record(both.exports[0].artifact.path, Decoding(), Endpointing(), iter([]), lambda _: None, lambda _: None)


class PortAudioError(Exception):
    """As sounddevice has it."""


def sounddevice(monkeypatch, read) -> list:
    """Put a sounddevice in place whose stream reads so; what was asked of it."""
    asked: list = []

    class InputStream:
        def __init__(self, samplerate, blocksize, channels, dtype):
            asked.append((samplerate, blocksize, channels, dtype))
            self.read = read

        def __enter__(self):
            return self

        def __exit__(self, *_):
            asked.append("closed")

    module = ModuleType("sounddevice")
    module.InputStream, module.PortAudioError = InputStream, PortAudioError
    monkeypatch.setitem(sys.modules, "sounddevice", module)
    return asked


def test_blocks_are_one_channel_at_16_khz_and_lost_samples_are_told(monkeypatch):
    recorded = chain([(np.ones((BLOCK_SAMPLES, 1), np.float32), False)], repeat((np.zeros((BLOCK_SAMPLES, 1), np.float32), True)))
    asked, told = sounddevice(monkeypatch, lambda _: next(recorded)), []
    listening = blocks(told.append)
    first, second = next(listening), next(listening)
    assert (first.shape, second.shape) == ((BLOCK_SAMPLES,), (BLOCK_SAMPLES,))
    assert (first.sum(), second.sum()) == (BLOCK_SAMPLES, 0)
    listening.close()
    assert asked == [(16_000, BLOCK_SAMPLES, 1, "float32"), "closed"]
    assert ["lost" in each for each in told] == [False, True]


def test_transcribe_prints_what_the_microphone_hears_and_ends_with_ctrl_c(both, spoken, monkeypatch, capsys):
    microphone = ctrl_c_after([np.pad(block, (0, BLOCK_SAMPLES - len(block))) for block in spoken])
    asked = sounddevice(monkeypatch, lambda _: (next(microphone)[:, None], False))
    assert cli.run(["transcribe", str(both.exports[0].artifact.path), "--microphone"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0]
    assert "real-time factor" in out
    assert "Listening; end with Ctrl-C." in err
    assert asked[-1] == "closed"


def no_package(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)


def no_library(monkeypatch) -> None:
    """What sounddevice does where PortAudio is not installed."""

    class Finder:
        def find_spec(self, name, *_):
            if name == "sounddevice":
                raise OSError("PortAudio library not found")

    monkeypatch.delitem(sys.modules, "sounddevice", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])


def no_device(monkeypatch) -> None:
    def fail(_):
        raise PortAudioError("Error querying device -1")

    sounddevice(monkeypatch, fail)


@pytest.mark.parametrize("lacking", [no_package, no_library, no_device])
def test_a_computer_without_a_microphone_is_told_so_word_for_word(lacking, both, monkeypatch, capsys):
    lacking(monkeypatch)
    bundle = both.bundle.folder
    page = said(["transcribe", str(bundle), "--microphone"], bundle.parent, capsys)
    must_be_an_error(page)
    must_equal_golden(f"microphone_{lacking.__name__}", page)
