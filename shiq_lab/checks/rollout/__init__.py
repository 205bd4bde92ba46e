"""check_rollout: does the trainer train on what the sampler sampled, with its probabilities?"""
