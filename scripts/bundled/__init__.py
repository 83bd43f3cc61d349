"""Training of the bundled model, part by part. Knows the model only through `jaxserve.models`."""
