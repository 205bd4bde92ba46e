"""check_trainer: the exact optimum put into a whole trainer."""
