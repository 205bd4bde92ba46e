"""check_distributed: two processes must find the gradient that one process finds."""
