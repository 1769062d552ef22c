"""The planner that improves the placement that is served."""
