"""PixArt-alpha and PixArt-Sigma for ComfyUI. Without a host (pytest, plain Python) this file exports nothing."""
from importlib.util import find_spec

WEB_DIRECTORY = "./web"  # node help lies in web/docs

# The host is recognised by its node API; a broken import inside the pack must still be seen.
if __package__ and find_spec("comfy_api") is not None:
    from .nodes import comfy_entrypoint

    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
