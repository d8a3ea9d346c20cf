"""The devices of a run: their mesh, its processes, chips' peaks, and compiled programs on disk."""
