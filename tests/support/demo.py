"""The demo models, as the tests use them."""

from pathlib import Path

from demo import WEIGHTS as DEMO

__all__ = ["DEMO", "ROOT", "SECOND_MODEL"]
ROOT = Path(__file__).resolve().parents[2]
SECOND_MODEL = "second.safetensors"  # random, made when the host starts
