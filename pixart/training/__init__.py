"""Training of PixArt transformers: `python -m pixart train configs/train/demo.json`."""
