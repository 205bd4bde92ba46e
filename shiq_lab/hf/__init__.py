"""Full size on transformers: the trainer and its data, preflight, real models, trainers to check. Needs the extra hf."""
