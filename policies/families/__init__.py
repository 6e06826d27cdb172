"""One small file for each model family; every `Policy` in them is registered."""
