"""Where pictures and captions come from: one module a source, with its `Settings` and `Part`, a `batch.Source`."""
