"""The workflows of `workflows/`, written by code, and the pictures that the README shows."""
