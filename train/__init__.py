"""Training stack of Native Hybrid Attention: the `nha` command line and what it runs."""
