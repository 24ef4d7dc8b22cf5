"""How the demo's parts are trained; the transformer and the ControlNet are recipes of configs/train."""
