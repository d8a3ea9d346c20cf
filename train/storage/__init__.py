"""A run's files: its folder, its initial model, its result, and writing any file atomically."""
