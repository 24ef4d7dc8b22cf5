"""Errors that users meet; each message says what was found, what was expected and what to do."""


class PixArtError(ValueError):
    """Base of every error this package raises on purpose."""

    __module__ = "pixart.errors"  # ComfyUI names the pack by its folder's path, and shows users an error's full type

    def __init_subclass__(cls) -> None:
        cls.__module__ = PixArtError.__module__


class ConfigError(PixArtError):
    """A variant or recipe under `configs/` is unknown or has unknown fields."""


class CheckpointError(PixArtError):
    """A weight file is missing, damaged, foreign, or contradicts the asked-for variant."""


class InputError(PixArtError):
    """A value given to a model, pipeline or node is outside what it accepts."""


class DataError(PixArtError):
    """A data set for training is missing, damaged, or not laid out as any that is known."""


class TextEncoderError(PixArtError):
    """A text encoder or tokenizer can't be loaded, or doesn't fit the model."""


class UnsupportedError(PixArtError):
    """The request is understood, but can't be done by this version or on this machine."""
