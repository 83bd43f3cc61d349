"""The HTTP face: OpenAI's routes, admin routes, metrics and limits. Knows the library face (api.py), never jax."""
