"""The stages whose rates `benchmarks scale` measures: real ones, on the demo and on a random vision-language model."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from demo import WEIGHTS
from demo.captions import caption as demo_caption
from demo.scenes import draw_scene, random_scene
from pixart.scale.caption_stage import CaptionSettings, CaptionStage
from pixart.scale.draw_stage import DrawSettings, DrawStage
from pixart.scale.encode_stage import EncodeStage, TextSettings
from pixart.scale.graph import GraphModels
from pixart.scale.prompt_rows import Picture
from pixart.scale.stage import Stage
from pixart.scale.where import Where, run

BATCH, SIDE, ANSWER = 2, 256, 32  # items, pixels, tokens
PROMPTS_A_PICTURE = 16  # T5 is so much faster than the rest that it gets more items
