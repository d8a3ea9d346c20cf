"""Models on disk: saved folders, and parameters read and written in parts."""
