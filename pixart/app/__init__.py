"""A page for the browser on `pixart.Pipeline`: one prompt box, no graph. Gradio (the extra `app`) is imported by page.py and server.py."""
