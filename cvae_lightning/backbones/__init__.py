"""Hugging Face causal LMs as entangled model, router, generator and posterior backbone."""
