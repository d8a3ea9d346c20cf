"""`nha search`: which layers of a trained model deserve wider windows, within a budget."""
