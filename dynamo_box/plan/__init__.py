"""From a profile and this hardware to what will run where: pure functions, decided before anything starts."""
