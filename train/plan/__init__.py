"""What a training step takes on a machine that is not there: `nha plan`."""
