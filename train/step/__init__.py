"""The arithmetic of training: losses, optimizer, one compiled update, and evaluation."""
