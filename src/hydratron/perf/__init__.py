"""FLOP and memory accounting, planner."""
