"""Reports of a run: metrics in files and services, a progress bar, the speed, pictures."""
