"""Training of the bundled model: data, tokenizer, curriculum, evaluation, export. Knows the model only through `jaxserve.models`."""
