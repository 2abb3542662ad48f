"""Training loop, optimizer of the ODE, recovery from bad steps."""
