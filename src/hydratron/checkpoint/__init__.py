"""Checkpoints: ours (sharded), Hugging Face's and Megatron's."""
