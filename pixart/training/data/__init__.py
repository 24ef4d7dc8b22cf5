"""Data sets for training: readers by layout, pictures made fit for their bin, features computed once and kept on disk.

A picture goes through these rooms in order: `places` (which layout), `folder`, `reference` or `tables` (which pictures and
captions), `look` (size, and whether it is whole), `features` (T5 states and latents into the `cache`), `order` (which batch).
"""
