"""The planner: a network as a graph of torch functions, and a plan that computes it with the compiled ops."""
