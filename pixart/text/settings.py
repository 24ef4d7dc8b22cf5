"""config.json of a T5: what shapes don't show is taken from it, checked; what they show must agree."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import TextEncoderError

XXL = {  # T5-v1.1-XXL, as far as shapes show it
    "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_heads": 64, "num_layers": 24,
    "relative_attention_num_buckets": 32, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
SHAPE_FIELDS = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "relative_attention_num_buckets")
ACTIVATIONS = ("relu", "gelu", "gelu_new", "silu")
PROJECTIONS = (*ACTIVATIONS, *(f"gated-{name}" for name in ACTIVATIONS))
MOST_DISTANT = 2**20


def merge_settings(config: dict[str, int | float | str], settings: dict[str, Any], path: Path) -> None:
    """Adds to `config`, which the weights gave, the free fields of config.json; raises TextEncoderError for contradictions and nonsense."""
    wrong = [
        f"{name} {settings[name]} (weights: {config[name]})"
        for name in SHAPE_FIELDS
        if name in settings and settings[name] != config[name]
    ]
    gated = str(settings.get("feed_forward_proj", config["feed_forward_proj"])).startswith("gated")
    if gated != str(config["feed_forward_proj"]).startswith("gated"):
        wrong.append(f"feed_forward_proj {settings['feed_forward_proj']} (weights: {config['feed_forward_proj']})")
    if wrong:
        raise TextEncoderError(f"{path}: config.json contradicts the weights in {', '.join(wrong)}.")
    nearest = int(config["relative_attention_num_buckets"]) // 4  # T5's logarithmic buckets begin there, in either direction
    free = {
        "layer_norm_epsilon": (lambda value: type(value) is float and 0 < value < 1, "a number between 0 and 1"),
        "relative_attention_max_distance": (
            lambda value: type(value) is int and nearest < value <= MOST_DISTANT, f"a whole number from {nearest + 1} to {MOST_DISTANT}"
        ),
        "feed_forward_proj": (lambda value: value in PROJECTIONS, f"one of {', '.join(PROJECTIONS)}"),
    }  # fmt: skip
    for name, (is_valid, expected) in free.items():
        if name in settings and not is_valid(settings[name]):
            raise TextEncoderError(
                f"{path}: config.json has {name} {settings[name]!r:.60}; expected {expected}. Download it again, or delete config.json: "
                "T5's usual values are taken then."
            )
    config.update({name: settings[name] for name in free if name in settings})
