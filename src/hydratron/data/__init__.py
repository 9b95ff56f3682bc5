"""Text in, batches out: tokenizers, indexed corpus, samples of each objective and task."""
