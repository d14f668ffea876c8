"""What everything stands on: errors, files, seeds, units, devices."""
