"""What the networks are: one Transformer with two LayerNorm placements, BERT and GPT-2 on it."""
