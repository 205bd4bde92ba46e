"""The conformance suite: does your loss, and your trainer, have the right fixed point?"""
