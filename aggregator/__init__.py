"""Who trains what, and what the model is now."""
