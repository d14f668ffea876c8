"""What a trained flow does: sample to disk, classify, edit, refine; functions of a flow."""
