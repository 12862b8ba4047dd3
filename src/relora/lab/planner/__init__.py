"""What a run will need, known before it starts: memory by kind, FLOPs a token, and what fits."""
