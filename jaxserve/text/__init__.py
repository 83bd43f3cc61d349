"""Text at the edges of an engine: tokens, chat templates, streamed text, stop strings, parameters. No jax."""
