"""Pictures for the img2img and inpaint workflows: `python -m demo.workflows.pictures` draws them into demo/inputs."""

from __future__ import annotations

import numpy as np
from PIL import Image

from .. import FOLDER
from ..data.scenes import Scene, SceneObject, render

INPUTS = FOLDER / "inputs"
SIZE = 256
MASK_TOP = 0.54  # everything below, as a fraction of the height, is drawn anew


def main() -> None:
    """Draw both pictures."""
    circle = SceneObject("red", "circle", "medium", 0.5, 0.27, 0.2)
    square = SceneObject("yellow", "square", "medium", 0.5, 0.75, 0.2)
    scene = Scene((circle, square), "above", "white")
    picture = (render(scene, SIZE, SIZE) * 255).round().astype(np.uint8)
    INPUTS.mkdir(exist_ok=True)
    Image.fromarray(picture).save(INPUTS / "pixart-scene.png")
    alpha = np.full((SIZE, SIZE, 1), 255, np.uint8)
    alpha[round(MASK_TOP * SIZE) :] = 0
    Image.fromarray(np.concatenate((picture, alpha), axis=2)).save(INPUTS / "pixart-inpaint.png")


if __name__ == "__main__":
    main()
