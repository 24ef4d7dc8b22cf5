"""The demo model: its scenes, their checker, its small autoencoder and its evaluation."""
