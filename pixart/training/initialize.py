"""Starting weights of a transformer trained from scratch."""
from __future__ import annotations

import torch
from torch import nn

from ..model import PixArtTransformer


@torch.no_grad()
def initialize_weights(model: PixArtTransformer) -> None:
    """As PixArt begins: Xavier layers, small embedders, and blocks and output that start as zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(model.x_embedder.proj.weight.flatten(1))
    nn.init.zeros_(model.x_embedder.proj.bias)
    embedders = [model.t_embedder.mlp[0], model.t_embedder.mlp[2], model.t_block[1]]
    embedders += [model.y_embedder.y_proj.fc1, model.y_embedder.y_proj.fc2]
    if model.config.micro_condition:
        embedders += [model.csize_embedder.mlp[0], model.csize_embedder.mlp[2]]
        embedders += [model.ar_embedder.mlp[0], model.ar_embedder.mlp[2]]
    for layer in embedders:
        nn.init.normal_(layer.weight, std=0.02)
    size = model.config.hidden_size
    for block in model.blocks:
        nn.init.normal_(block.scale_shift_table, std=size**-0.5)
        nn.init.zeros_(block.cross_attn.proj.weight)
    nn.init.normal_(model.final_layer.scale_shift_table, std=size**-0.5)
    nn.init.zeros_(model.final_layer.linear.weight)
    nn.init.zeros_(model.final_layer.linear.bias)
