"""Reads libtpu's compile-time dumps: what a schedule costs, with no accelerator at hand."""
