"""A local page where one draws, classifies, edits, compares and trains."""
