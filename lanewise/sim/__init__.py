"""Discrete-event simulation of a service, driven by the same policies as the workers and the router."""
