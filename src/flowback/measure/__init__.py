"""Figures of tensors: density, calibration, fidelity, probes. They know no run and no file of one."""
