"""Evolution of a learning rule: toy tasks, many small learners at once, and the strategy that compares them."""
