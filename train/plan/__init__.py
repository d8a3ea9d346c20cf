"""`nha plan`: what a training step needs on a machine that is not there."""
