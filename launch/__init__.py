"""Launchers for training jobs, and the planner of their memory and time."""
