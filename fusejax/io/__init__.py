"""Files: Hugging Face directories, Orbax checkpoints, the distribution store, manifests, tokenizers, progress."""
