"""Real silent bugs, planted: each the smallest change to something that the suite accepts."""
