"""Contenders of a benchmark in processes of their own, which take turns on one GPU."""
