"""Measuring a flow: density, accuracy, pictures, and the report."""
