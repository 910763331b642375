"""Samples from the microphone of this computer, until Ctrl-C. `sounddevice` is imported at the moment of use."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from edgefuse.errors import MissingPackage, NoMicrophone
from edgefuse.foreign import first_line
from edgefuse.frontend.log_mel import KALDI_80

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BLOCK_SAMPLES = KALDI_80.sample_rate_hz // 10  # how late a Ctrl-C may be noticed


def blocks(tell: Callable[[str], None]) -> Iterator[NDArray[np.float32]]:
    """Blocks (1600,) of samples in [-1, 1] at 16 kHz, from the default microphone; `tell` hears when it is open.

    Raises:
        MissingPackage: sounddevice, or the library that it needs, is not installed.
        NoMicrophone: there is none, it does not record at 16 kHz, or it is gone.
    """
    sounddevice = _sounddevice()
    try:
        with sounddevice.InputStream(KALDI_80.sample_rate_hz, BLOCK_SAMPLES, channels=1, dtype="float32") as stream:
            tell("Listening; end with Ctrl-C.")
            while True:
                samples, overflowed = stream.read(BLOCK_SAMPLES)
                if overflowed:
                    tell("(samples were lost: this computer is too busy to listen)")
                yield samples[:, 0]
    except sounddevice.PortAudioError as error:
        raise NoMicrophone(
            f"No microphone can be recorded from: {first_line(error)}.", hint="See the devices with: python -m sounddevice"
        ) from error


def until_interrupted(endless: Iterable[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
    """Blocks up to the one in which Ctrl-C is pressed; pressed once more, it interrupts as everywhere."""
    pressed = False

    def stop(*_: object) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, stop)
    try:
        for block in endless:
            yield block
            if pressed:
                return
    finally:
        signal.signal(signal.SIGINT, before)


def _sounddevice() -> Any:  # noqa: ANN401 - it ships no types
    try:
        import sounddevice
    except ModuleNotFoundError as error:
        raise MissingPackage(
            f"The microphone needs {error.name}, which is not installed.",
            hint="Install it with: pip install 'edgefuse[microphone]'",
        ) from error
    except OSError as error:
        raise MissingPackage(
            f"The microphone needs a library that is not installed: {first_line(error)}.",
            hint="Install it with: sudo apt install libportaudio2  (macOS: brew install portaudio)",
        ) from error
    return sounddevice
