"""Audio files, their sidecars and dataset.json; nothing here imports torch."""
