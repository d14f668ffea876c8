"""A run measured, runs compared: figures, pages, model cards."""
