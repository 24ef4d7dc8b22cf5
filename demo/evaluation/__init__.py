"""How often the demo is right: plain, with a ControlNet, in few steps, and with a shape that was taught."""
