"""A pretended CUDA card, for machines without one.

Its tensors say `cuda:0`, hold their numbers in main memory, refuse to be mixed with CPU tensors as a card's do, and
write down every copy and every wait. It can't show kernels' own rounding and speed, real streams and lack of memory,
several cards, Windows, MPS and ROCm.
"""
from tests.support.card.tensors import LOG, CardTensor, Event, Mode

__all__ = ["LOG", "PRETEND", "CardTensor", "Event", "Mode"]
PRETEND = "PIXART_PRETENDED_CARD"  # set: benchmarks put the card into their process before all else
