"""Hugging Face: the oracle as a real model, trainers to check. Needs the extra: pip install "shiq-lab[hf]"."""
