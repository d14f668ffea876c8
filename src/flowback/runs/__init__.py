"""A run's folder: configuration, checkpoints, log, lock."""
