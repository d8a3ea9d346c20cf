"""How much a model reads from its slots, and how long they remember: measuring and drawing it."""
