"""What a trained flow does: sample to disk, classify, edit, choose the best; functions of a flow."""
