"""Launchers and the planner."""
