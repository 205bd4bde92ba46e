"""check_component: checks of what surrounds a loss."""
