"""A causal LM as it comes: found, opened, walked, run block by block, and measured in full precision."""
