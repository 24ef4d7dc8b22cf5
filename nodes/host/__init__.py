"""The only code that knows ComfyUI's internals and versions (0.3.64 and later): features are detected."""
