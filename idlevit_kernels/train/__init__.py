"""Finetuning an IdleViT: the recipe, the data, a loop that survives, and what `idlevit train` and `eval` do."""
