"""Real questions, at a budget of rows: tasks, scores and the ways to read that are compared."""
