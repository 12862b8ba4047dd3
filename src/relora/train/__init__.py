"""The trainer: recipes, the loop, and what is done with its runs."""
